#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

static void give_up(const char *path)
{
    perror(path);
    exit(EXIT_FAILURE);
}

void fuzz_one(const void *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1);
    if (!exact)
        give_up("fuzz");
    memcpy(exact, data, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

static void replay_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    char *data = NULL;
    size_t n = 0, room = 0, got = 1;
    if (!f)
        give_up(path);
    while (got > 0) {
        if (n == room && !(data = realloc(data, room = room ? 2 * room : 4096)))
            give_up(path);
        n += got = fread(data + n, 1, room - n, f);
    }
    if (ferror(f))
        give_up(path);
    fclose(f);
    fuzz_one(data, n);
    free(data);
}

static int is_visible(const struct dirent *e)
{
    return e->d_name[0] != '.';
}

static size_t replay(const char *path)
{
    struct dirent **files;
    int n = scandir(path, &files, is_visible, alphasort);
    if (n < 0 && errno != ENOTDIR)
        give_up(path);
    if (n < 0) {
        replay_file(path);
        return 1;
    }
    for (int i = 0; i < n; i++) {
        char *file;
        if (asprintf(&file, "%s/%s", path, files[i]->d_name) < 0)
            give_up(path);
        replay_file(file);
        free(file);
        free(files[i]);
    }
    free(files);
    return (size_t)n;
}

long fuzz_start(int argc, char **argv, long runs)
{
    size_t n = 0;
    for (int i = 2; i < argc; i++)
        n += replay(argv[i]);
    runs = argc > 1 ? strtol(argv[1], NULL, 10) : runs;
    printf("%zu files replayed, %ld inputs made\n", n, runs);
    return runs;
}
