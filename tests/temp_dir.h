/* temp_dir.h - folders of a test's own. Prefix temp_dir_. Errors abort the test program. */
#ifndef TANDEM_TESTS_TEMP_DIR_H
#define TANDEM_TESTS_TEMP_DIR_H

#include <stddef.h>

struct temp_dir {
    char path[256];
};

struct temp_dir temp_dir_make(void);
void temp_dir_write(const struct temp_dir *d, const char *name, const void *data, size_t bytes);
void temp_dir_remove(struct temp_dir *d);

/* The whole file, with a NUL behind it; to be freed. */
char *temp_dir_read_file(const char *path, size_t *bytes);

#endif
