/* journal_read.c - segments to state. Any bytes may be there. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "coordinator/journal_internal.h"

#define SUFFIX       ".journal"
#define MAX_SEGMENTS 1024 /* looked at; there are two at most, but for those of a disk that was full */

void journal_file_name(char out[JOURNAL_NAME_BYTES], uint64_t sequence)
{
    snprintf(out, JOURNAL_NAME_BYTES, "%016" PRIx64 SUFFIX, sequence);
}

bool journal_file_sequence(const char *name, uint64_t *sequence)
{
    char again[JOURNAL_NAME_BYTES];
    uint64_t v = 0;
    if (strlen(name) != 16 + sizeof SUFFIX - 1 || sscanf(name, "%16" SCNx64, &v) != 1)
        return false;
    journal_file_name(again, v);
    if (strcmp(again, name) != 0)
        return false;
    *sequence = v;
    return true;
}

/* The payload's length where a good record stands at `at`; 0: none does. */
static uint32_t good_record(const uint8_t *data, size_t len, size_t at)
{
    uint32_t n, crc;
    if (at > len || len - at <= JOURNAL_FRAME_BYTES)
        return 0;
    memcpy(&n, data + at, sizeof n);
    memcpy(&crc, data + at + 4, sizeof crc);
    if (n == 0 || n > JOURNAL_MAX_RECORD || n > len - at - JOURNAL_FRAME_BYTES || crc != journal_crc(data + at, n))
        return 0;
    return n;
}

/* Where reading goes on behind a record that is not good; 0: nowhere. */
static size_t resume_behind(const uint8_t *data, size_t len, size_t at)
{
    uint32_t n;
    if (len - at <= JOURNAL_FRAME_BYTES)
        return 0;
    memcpy(&n, data + at, sizeof n);
    if (n > len - at - JOURNAL_FRAME_BYTES)
        return 0;
    size_t next = at + JOURNAL_FRAME_BYTES + n;
    return good_record(data, len, next) ? next : 0;
}

bool journal_parse(struct journal_state *s, const uint8_t *data, size_t len, uint64_t *sequence, uint64_t *damaged)
{
    bool complete = false;
    if (!journal_get_header(data, len, sequence))
        return false;
    for (size_t at = JOURNAL_HEADER_BYTES; at < len;) {
        uint32_t n = good_record(data, len, at);
        if (n) {
            const uint8_t *payload = data + at + JOURNAL_FRAME_BYTES;
            complete |= payload[0] == JOURNAL_SNAPSHOT && n == JOURNAL_SNAP_BYTES;
            (void)journal_apply(s, payload, n);
            at += JOURNAL_FRAME_BYTES + n;
            continue;
        }
        ++*damaged;
        at = resume_behind(data, len, at);
        if (at == 0)
            break;
    }
    return complete;
}

static enum status_code read_segment(struct journal_state *s, int dir, uint64_t sequence, bool *good, uint64_t *damaged,
                                     struct status *st)
{
    char name[JOURNAL_NAME_BYTES];
    struct stat info;
    uint64_t inside = 0;
    *good = false;
    journal_file_name(name, sequence);
    int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return status_errno(st, errno == EACCES ? ST_PERMISSION_DENIED : ST_UNAVAILABLE, errno, "%s", name);
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < JOURNAL_HEADER_BYTES) {
        close(fd);
        return ST_OK;
    }
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (data == MAP_FAILED)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "%s", name);
    *good = journal_parse(s, data, (size_t)info.st_size, &inside, damaged) && inside == sequence;
    munmap(data, (size_t)info.st_size);
    if (!*good)
        journal_state_fini(s);
    return ST_OK;
}

static int newest_first(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x < *y) - (*x > *y);
}

/* Sequences that are there, newest first. */
static enum status_code list_segments(int dir, uint64_t *found, size_t *n, struct status *st)
{
    int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        int err = errno;
        if (fd >= 0)
            close(fd);
        return status_errno(st, ST_UNAVAILABLE, err, "reading the folder");
    }
    *n = 0;
    for (struct dirent *e; (e = readdir(d)) && *n < MAX_SEGMENTS;)
        *n += journal_file_sequence(e->d_name, &found[*n]);
    closedir(d);
    qsort(found, *n, sizeof *found, newest_first);
    return ST_OK;
}

enum status_code journal_read_dir(struct journal_state *s, int dir, uint64_t *sequence, uint64_t *damaged,
                                  struct status *st)
{
    uint64_t found[MAX_SEGMENTS];
    size_t n = 0;
    bool good = false;
    enum status_code rc = list_segments(dir, found, &n, st);
    *sequence = rc == ST_OK && n ? found[0] : 0;
    for (size_t i = 0; i < n && rc == ST_OK && !good; i++) {
        uint64_t limit = s->max_bytes;
        rc = read_segment(s, dir, found[i], &good, damaged, st);
        s->max_bytes = limit;
    }
    return rc;
}
