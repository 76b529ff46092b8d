/* flight_read.c - reading the flight recorder's file: any bytes, since whoever wrote it may have died while doing so. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "coordinator/flight_internal.h"

const char *flight_kind_name(uint32_t kind)
{
    static const char *const names[FLIGHT_KINDS] = {"?",    "start",  "stop",  "attach", "ready", "lost",
                                                    "plan", "result", "admit", "refuse", "end",   "silent"};
    return kind < FLIGHT_KINDS ? names[kind] : "?";
}

static int by_seq(const void *a, const void *b)
{
    uint64_t x = ((const struct flight_record *)a)->seq, y = ((const struct flight_record *)b)->seq;
    return (x > y) - (x < y);
}

enum status_code flight_parse(struct flight_log *out, const char *name, const void *bytes, size_t n, struct status *st)
{
    struct flight_header h;
    struct flight_log l = {0};
    if (n < FLIGHT_HEADER_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %zu bytes, a flight recorder's file has %u at least", name, n,
                          FLIGHT_HEADER_BYTES);
    memcpy(&h, bytes, sizeof h);
    if (memcmp(h.magic, FLIGHT_MAGIC, sizeof h.magic) != 0 || h.record_bytes != FLIGHT_RECORD_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: not a flight recorder's file of this version", name);
    uint64_t there = (n - FLIGHT_HEADER_BYTES) / FLIGHT_RECORD_BYTES;
    if (h.n < 1 || h.n > (FLIGHT_MAX_BYTES - FLIGHT_HEADER_BYTES) / FLIGHT_RECORD_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: says it has %llu records", name, (unsigned long long)h.n);
    there = there < h.n ? there : h.n;
    l.record = malloc(there ? there * sizeof *l.record : 1);
    if (!l.record)
        return status_nomem(st, name, there * sizeof *l.record);
    for (uint64_t i = 0; i < there; i++) {
        struct flight_record *r = &l.record[l.n];
        memcpy(r, (const char *)bytes + FLIGHT_HEADER_BYTES + i * FLIGHT_RECORD_BYTES, sizeof *r);
        if (r->seq == 0)
            continue;
        if ((r->seq - 1) % h.n == i && r->check == flight_check(r) && r->kind > 0 && r->kind < FLIGHT_KINDS)
            l.n++;
        else
            l.spoilt++;
    }
    qsort(l.record, l.n, sizeof *l.record, by_seq);
    l.clock_us = h.clock_us;
    l.pid = h.pid;
    *out = l;
    return ST_OK;
}

enum status_code flight_load(struct flight_log *out, const char *path, struct status *st)
{
    struct stat sb;
    enum status_code rc;
    char *bytes = NULL;
    FILE *f = fopen(path, "rbe");
    if (!f)
        return status_errno(st, errno == ENOENT ? ST_NOT_FOUND : ST_PERMISSION_DENIED, errno, "%s", path);
    if (fstat(fileno(f), &sb) || !S_ISREG(sb.st_mode) || sb.st_size > (off_t)FLIGHT_MAX_BYTES)
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: expected a file of at most %llu bytes", path, FLIGHT_MAX_BYTES);
    else if (!(bytes = malloc((size_t)sb.st_size + 1)))
        rc = status_nomem(st, path, (size_t)sb.st_size + 1);
    else {
        size_t n = fread(bytes, 1, (size_t)sb.st_size, f);
        rc = ferror(f) ? status_errno(st, ST_INTERNAL, EIO, "%s", path) : flight_parse(out, path, bytes, n, st);
    }
    free(bytes);
    fclose(f);
    return rc;
}

void flight_log_free(struct flight_log *l)
{
    free(l->record);
    *l = (struct flight_log){0};
}
