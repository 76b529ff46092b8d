/* flight.c - writing the flight recorder's file. */
#include "coordinator/flight.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/flight_internal.h"

_Static_assert(sizeof(struct flight_record) == FLIGHT_RECORD_BYTES, "the format");
_Static_assert(sizeof(struct flight_header) <= FLIGHT_HEADER_BYTES, "the format");

struct flight {
    uint8_t *map;
    size_t bytes;
    uint64_t n, next; /* records; seq of the next */
};

uint32_t flight_check(const struct flight_record *r)
{
    const uint8_t *p = (const uint8_t *)r;
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < sizeof *r; i++) {
        uint8_t b = i >= 20 && i < 24 ? 0 : p[i];
        h = (h ^ b) * 16777619u;
    }
    return h;
}

static struct flight_record *at(const struct flight *f, uint64_t seq)
{
    return (struct flight_record *)(f->map + FLIGHT_HEADER_BYTES) + (seq - 1) % f->n;
}

static bool valid(const struct flight *f, uint64_t index)
{
    const struct flight_record *r = at(f, index + 1);
    return r->seq && (r->seq - 1) % f->n == index && r->check == flight_check(r);
}

/* Goes on with what is there, when it is of this size. */
static void take_over(struct flight *f)
{
    const struct flight_header *h = (const struct flight_header *)f->map;
    f->next = 1;
    if (memcmp(h->magic, FLIGHT_MAGIC, sizeof h->magic) != 0 || h->record_bytes != FLIGHT_RECORD_BYTES ||
        h->n != f->n) {
        memset(f->map, 0, f->bytes);
        return;
    }
    for (uint64_t i = 0; i < f->n; i++)
        if (valid(f, i) && at(f, i + 1)->seq >= f->next && at(f, i + 1)->seq < UINT64_MAX)
            f->next = at(f, i + 1)->seq + 1;
}

static void write_header(struct flight *f, int64_t now_us)
{
    struct flight_header *h = (struct flight_header *)f->map;
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    memcpy(h->magic, FLIGHT_MAGIC, sizeof h->magic);
    h->record_bytes = FLIGHT_RECORD_BYTES;
    h->n = f->n;
    h->clock_us = (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000 - now_us;
    h->pid = (uint32_t)getpid();
}

static enum status_code map_file(struct flight *f, const char *path, struct status *st)
{
    struct stat sb;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return status_errno(st, errno == ENOENT ? ST_NOT_FOUND : ST_PERMISSION_DENIED, errno, "%s", path);
    enum status_code rc = ST_OK;
    int err = 0;
    if (fstat(fd, &sb) || !S_ISREG(sb.st_mode))
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: expected a regular file", path);
    else if (ftruncate(fd, (off_t)f->bytes) || (err = posix_fallocate(fd, 0, (off_t)f->bytes)))
        rc = status_errno(st, ST_RESOURCE_EXHAUSTED, err ? err : errno, "%s: %zu bytes", path, f->bytes);
    if (rc == ST_OK) {
        f->map = mmap(NULL, f->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (f->map == MAP_FAILED) {
            f->map = NULL;
            rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "%s: mapping %zu bytes", path, f->bytes);
        }
    }
    close(fd);
    return rc;
}

enum status_code flight_open(struct flight **out, const char *path, uint64_t bytes, int64_t now_us, struct status *st)
{
    if (bytes < FLIGHT_MIN_BYTES || bytes > FLIGHT_MAX_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %llu bytes, expected %u to %llu", path,
                          (unsigned long long)bytes, FLIGHT_MIN_BYTES, FLIGHT_MAX_BYTES);
    struct flight *f = calloc(1, sizeof *f);
    if (!f)
        return status_nomem(st, "flight recorder", sizeof *f);
    f->n = (bytes - FLIGHT_HEADER_BYTES) / FLIGHT_RECORD_BYTES;
    f->bytes = FLIGHT_HEADER_BYTES + f->n * FLIGHT_RECORD_BYTES;
    enum status_code rc = map_file(f, path, st);
    if (rc != ST_OK || !f->map) {
        free(f);
        return rc;
    }
    take_over(f);
    write_header(f, now_us);
    flight_text(f, now_us, FLIGHT_START, 0, FLIGHT_NO_RANK, TANDEM_VERSION);
    *out = f;
    return ST_OK;
}

void flight_close(struct flight *f, int64_t now_us)
{
    if (!f)
        return;
    flight_text(f, now_us, FLIGHT_STOP, 0, FLIGHT_NO_RANK, "");
    munmap(f->map, f->bytes);
    free(f);
}

/* A kill between two of these stores leaves seq 0 or a check that is wrong. */
void flight_write(struct flight *f, struct flight_record *r)
{
    if (!f)
        return;
    r->seq = f->next++;
    r->check = flight_check(r);
    struct flight_record *to = at(f, r->seq);
    __atomic_store_n(&to->seq, 0, __ATOMIC_RELEASE);
    memcpy((char *)to + sizeof to->seq, (const char *)r + sizeof r->seq, sizeof *r - sizeof r->seq);
    __atomic_store_n(&to->seq, r->seq, __ATOMIC_RELEASE);
}

/* As much as there is room for, the rest zeros. */
static void put(char *to, size_t cap, const char *text)
{
    size_t n = strnlen(text, cap);
    memcpy(to, text, n);
}

void flight_text(struct flight *f, int64_t now_us, enum flight_kind kind, uint64_t epoch, uint32_t rank,
                 const char *text)
{
    struct flight_record r = {.time_us = now_us, .kind = (uint16_t)kind, .rank = (uint16_t)rank, .epoch = epoch};
    if (!f)
        return;
    put(r.text, sizeof r.text, text);
    flight_write(f, &r);
}

void flight_numbers(struct flight *f, int64_t now_us, enum flight_kind kind, uint64_t epoch, uint32_t rank, uint64_t id,
                    const uint32_t *number, uint32_t n)
{
    struct flight_record r = {
        .time_us = now_us, .kind = (uint16_t)kind, .rank = (uint16_t)rank, .epoch = epoch, .id = id};
    if (!f)
        return;
    for (uint32_t i = 0; i < n && i < FLIGHT_TEXT / 4; i++)
        r.numbers[i] = number[i];
    flight_write(f, &r);
}

void flight_named(struct flight *f, int64_t now_us, enum flight_kind kind, const char *name, const uint32_t *number,
                  uint32_t n)
{
    struct flight_record r = {.time_us = now_us, .kind = (uint16_t)kind, .rank = FLIGHT_NO_RANK};
    if (!f)
        return;
    for (uint32_t i = 0; i < n && i < 6; i++)
        r.number[i] = number[i];
    put(r.name, sizeof r.name, name);
    flight_write(f, &r);
}
