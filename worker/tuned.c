/* tuned.c - the file of tuned.h.
 *
 *   offset  size
 *        0    16   "tandem tuned 01\n"
 *       16     4   bytes of the identity, at most TUNED_IDENTITY_MAX
 *       20     4   records, at most TUNED_RECORDS_MAX
 *       24     8   FNV-1a, 64 bits, of all that follows
 *       32         identity, then the records: key (TUNED_KEY_WORDS words of 32 bits), value; ends with the last one
 *
 * Numbers are little-endian. Its name is the FNV-1a of the identity in hexadecimal, and ".tuned". A file is used when its
 * size is what the two numbers say, the sum is right and the identity is ours; else it is as good as none, and the next save
 * replaces it. Files are written under another name and renamed: a reader sees the old one or the new one.
 */
#include "worker/tuned.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC       "tandem tuned 01\n"
#define MAGIC_BYTES 16u

struct header {
    char magic[MAGIC_BYTES];
    uint32_t identity_bytes, records;
    uint64_t sum;
};

struct record {
    uint32_t key[TUNED_KEY_WORDS];
    uint8_t value[TUNED_VALUE_BYTES];
};

#define FILE_MAX (sizeof(struct header) + TUNED_IDENTITY_MAX + TUNED_RECORDS_MAX * sizeof(struct record))

_Static_assert(sizeof(struct header) == 32, "as the file has it");
_Static_assert(sizeof(struct record) == 4 * TUNED_KEY_WORDS + TUNED_VALUE_BYTES, "as the file has it");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are written as they are");

struct tuned {
    char dir[PATH_MAX], path[PATH_MAX];
    char identity[TUNED_IDENTITY_MAX + 1];
    char problem[PATH_MAX + 128]; /* "": none */
    struct record *record;        /* [TUNED_RECORDS_MAX] */
    uint32_t n;
    bool changed;
};

static uint64_t fnv(const void *data, size_t n)
{
    const uint8_t *p = data;
    uint64_t sum = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++)
        sum = (sum ^ p[i]) * 0x100000001b3u;
    return sum;
}

static struct record *find(const struct tuned *t, const uint32_t *key)
{
    for (uint32_t i = 0; i < t->n; i++)
        if (memcmp(t->record[i].key, key, sizeof t->record[i].key) == 0)
            return &t->record[i];
    return NULL;
}

/* ---- reading ---- */

/* All of the file up to FILE_MAX + 1 bytes; -1 with errno. */
static ssize_t read_file(const char *path, uint8_t *to)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t got = 0;
    if (fd < 0)
        return -1;
    while (got <= FILE_MAX) {
        ssize_t n = read(fd, to + got, FILE_MAX + 1 - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            int err = errno;
            close(fd);
            errno = err;
            return -1;
        }
        if (n == 0)
            break;
        got += (size_t)n;
    }
    close(fd);
    return (ssize_t)got;
}

/* What is wrong with it; NULL: nothing. *records points into data. */
static const char *check(const struct tuned *t, const uint8_t *data, size_t bytes, const uint8_t **records, uint32_t *n)
{
    struct header h;
    if (bytes < sizeof h)
        return "it is shorter than its header";
    memcpy(&h, data, sizeof h);
    if (memcmp(h.magic, MAGIC, MAGIC_BYTES) != 0)
        return "it is not of this kind";
    if (h.identity_bytes > TUNED_IDENTITY_MAX || h.records > TUNED_RECORDS_MAX)
        return "its header has numbers that are too large";
    if (bytes != sizeof h + h.identity_bytes + h.records * sizeof(struct record))
        return "its size is not what its header says";
    if (fnv(data + sizeof h, bytes - sizeof h) != h.sum)
        return "its sum is wrong";
    if (h.identity_bytes != strlen(t->identity) || memcmp(data + sizeof h, t->identity, h.identity_bytes) != 0)
        return "it is of another device or library";
    *records = data + sizeof h + h.identity_bytes;
    *n = h.records;
    return NULL;
}

/* Adds what the file has and we have not. A file that is not there is no problem. */
static void take_file(struct tuned *t, uint8_t *buffer)
{
    const uint8_t *records = NULL;
    uint32_t n = 0;
    t->problem[0] = '\0';
    ssize_t bytes = read_file(t->path, buffer);
    if (bytes < 0 && errno == ENOENT)
        return;
    const char *why = bytes < 0 ? strerror(errno) : check(t, buffer, (size_t)bytes, &records, &n);
    if (why) {
        snprintf(t->problem, sizeof t->problem, "%s: %s", t->path, why);
        return;
    }
    for (uint32_t i = 0; i < n && t->n < TUNED_RECORDS_MAX; i++) {
        struct record r;
        memcpy(&r, records + i * sizeof r, sizeof r);
        if (!find(t, r.key))
            t->record[t->n++] = r;
    }
}

enum status_code tuned_open(struct tuned **out, const char *dir, const char *identity, struct status *st)
{
    size_t name_bytes = sizeof "/0123456789abcdef.tuned.XXXXXX";
    if (strlen(identity) > TUNED_IDENTITY_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "identity of %zu bytes, expected at most %d", strlen(identity),
                          TUNED_IDENTITY_MAX);
    if (strlen(dir) + name_bytes > PATH_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "folder of measurements: a path of %zu bytes, expected at most %zu",
                          strlen(dir), PATH_MAX - name_bytes);
    struct tuned *t = calloc(1, sizeof *t);
    struct record *record = malloc(TUNED_RECORDS_MAX * sizeof *record);
    uint8_t *buffer = malloc(FILE_MAX + 1);
    if (!t || !record || !buffer) {
        free(buffer);
        free(record);
        free(t);
        return status_nomem(st, "measurements", FILE_MAX);
    }
    t->record = record;
    strcpy(t->dir, dir);
    strcpy(t->identity, identity);
    snprintf(t->path, sizeof t->path, "%.*s/%016llx.tuned", (int)(PATH_MAX - name_bytes), dir,
             (unsigned long long)fnv(identity, strlen(identity)));
    take_file(t, buffer);
    free(buffer);
    *out = t;
    return ST_OK;
}

void tuned_close(struct tuned *t)
{
    if (!t)
        return;
    free(t->record);
    free(t);
}

const char *tuned_problem(const struct tuned *t)
{
    return t->problem[0] ? t->problem : NULL;
}

const char *tuned_path(const struct tuned *t)
{
    return t->path;
}

uint32_t tuned_count(const struct tuned *t)
{
    return t->n;
}

bool tuned_find(const struct tuned *t, const uint32_t key[TUNED_KEY_WORDS], void *value)
{
    const struct record *r = find(t, key);
    if (r)
        memcpy(value, r->value, sizeof r->value);
    return r != NULL;
}

bool tuned_put(struct tuned *t, const uint32_t key[TUNED_KEY_WORDS], const void *value)
{
    struct record *r = find(t, key);
    if (!r && t->n == TUNED_RECORDS_MAX)
        return false;
    if (!r) {
        r = &t->record[t->n++];
        memcpy(r->key, key, sizeof r->key);
    }
    memcpy(r->value, value, sizeof r->value);
    t->changed = true;
    return true;
}

/* ---- writing ---- */

/* The folder and those above it. */
static enum status_code make_folder(const char *dir, struct status *st)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", dir);
    for (char *p = path + 1;; p++) {
        if (*p && *p != '/')
            continue;
        char end = *p;
        *p = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST)
            return status_errno(st, ST_UNAVAILABLE, errno, "%.200s", path);
        if (!end)
            return ST_OK;
        *p = end;
    }
}

static bool write_all(int fd, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n) {
        ssize_t done = write(fd, p, n);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return false;
        p += done;
        n -= (size_t)done;
    }
    return true;
}

static enum status_code replace(const struct tuned *t, const uint8_t *data, size_t bytes, struct status *st)
{
    char name[PATH_MAX + 16];
    snprintf(name, sizeof name, "%s.XXXXXX", t->path);
    int fd = mkostemp(name, O_CLOEXEC); /* 0600 */
    if (fd < 0)
        return status_errno(st, ST_UNAVAILABLE, errno, "%.200s", name);
    bool ok = write_all(fd, data, bytes);
    int err = errno;
    if (close(fd) != 0 && ok) {
        ok = false;
        err = errno;
    }
    if (ok && rename(name, t->path) != 0) {
        ok = false;
        err = errno;
    }
    if (ok)
        return ST_OK;
    unlink(name);
    return status_errno(st, ST_UNAVAILABLE, err, "%.200s", name);
}

enum status_code tuned_save(struct tuned *t, struct status *st)
{
    if (!t->changed)
        return ST_OK;
    uint8_t *data = malloc(FILE_MAX + 1);
    if (!data)
        return status_nomem(st, "measurements", FILE_MAX);
    take_file(t, data); /* what other processes have put there since */
    struct header h = {.identity_bytes = (uint32_t)strlen(t->identity), .records = t->n};
    memcpy(h.magic, MAGIC, MAGIC_BYTES);
    size_t records_bytes = t->n * sizeof *t->record, bytes = sizeof h + h.identity_bytes + records_bytes;
    memcpy(data + sizeof h, t->identity, h.identity_bytes);
    memcpy(data + sizeof h + h.identity_bytes, t->record, records_bytes);
    h.sum = fnv(data + sizeof h, bytes - sizeof h);
    memcpy(data, &h, sizeof h);
    enum status_code rc = make_folder(t->dir, st);
    if (rc == ST_OK)
        rc = replace(t, data, bytes, st);
    free(data);
    t->changed = rc != ST_OK && t->changed;
    return rc;
}
