#include "tests/temp_dir.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void give_up(const char *what)
{
    perror(what);
    abort();
}

struct temp_dir temp_dir_make(void)
{
    struct temp_dir d;
    const char *base = getenv("TMPDIR");
    snprintf(d.path, sizeof d.path, "%.200s/tandem-test-XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(d.path))
        give_up(d.path);
    return d;
}

void temp_dir_write(const struct temp_dir *d, const char *name, const void *data, size_t bytes)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", d->path, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f) != 0)
        give_up(path);
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *at)
{
    (void)info;
    (void)type;
    (void)at;
    return remove(path);
}

void temp_dir_remove(struct temp_dir *d)
{
    if (nftw(d->path, remove_one, 8, FTW_DEPTH | FTW_PHYS) != 0)
        give_up(d->path);
}

char *temp_dir_read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END) != 0)
        give_up(path);
    long size = ftell(f);
    char *data = malloc((size_t)size + 1);
    rewind(f);
    if (!data || fread(data, 1, (size_t)size, f) != (size_t)size)
        give_up(path);
    fclose(f);
    data[size] = '\0';
    if (bytes)
        *bytes = (size_t)size;
    return data;
}
