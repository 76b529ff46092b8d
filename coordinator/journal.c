/* journal.c - the queue between those who tell and the one who writes, and the journal's life. */
#include "coordinator/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/journal_internal.h"

#define LOCK_NAME  "lock"
#define QUEUE_KEEP (1u << 20) /* of a queue that was larger once */

/* Payloads, each behind its length. */
struct queue {
    uint8_t *data;
    size_t len, cap;
};

struct journal {
    /* constant */
    void (*report)(void *, bool, const char *);
    void *report_ctx;
    char *path;
    int lock_fd;
    pthread_t thread;
    bool running;
    atomic_uint_least64_t number;
    /* mu */
    pthread_mutex_t mu;
    pthread_cond_t cond;
    struct queue in;
    bool stop, hurry;
    uint64_t dropped;
    struct journal_stats published;
    /* the journal's thread, or whoever has not started it */
    struct queue work;
    struct journal_state state;
    struct journal_file file;
    uint64_t skipped, nomem, damaged, records;
    int64_t expired_us; /* when the ended were looked over */
    bool told;          /* that it is degraded */
};

/* ---- the system ---- */

static int sys_open(void *ctx, int dir, const char *name, int flags)
{
    (void)ctx;
    return openat(dir, name, flags, 0600);
}

static ssize_t sys_write(void *ctx, int fd, const void *data, size_t n)
{
    (void)ctx;
    return write(fd, data, n);
}

static int sys_sync(void *ctx, int fd)
{
    (void)ctx;
    return fdatasync(fd);
}

static int sys_truncate(void *ctx, int fd, off_t size)
{
    (void)ctx;
    return ftruncate(fd, size);
}

static int sys_unlink(void *ctx, int dir, const char *name)
{
    (void)ctx;
    return unlinkat(dir, name, 0);
}

static int64_t sys_now_us(void *ctx)
{
    struct timespec ts;
    (void)ctx;
    clock_gettime(CLOCK_REALTIME, &ts);
    return ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static const struct journal_io sys_io = {.open = sys_open,
                                         .write = sys_write,
                                         .sync = sys_sync,
                                         .truncate = sys_truncate,
                                         .unlink = sys_unlink,
                                         .now_us = sys_now_us};

/* ---- telling ---- */

static bool queue_reserve(struct queue *q, size_t more)
{
    if (q->cap - q->len >= more)
        return true;
    size_t cap = q->len + more + q->len / 2 + 4096;
    uint8_t *p = realloc(q->data, cap);
    if (!p)
        return false;
    q->data = p;
    q->cap = cap;
    return true;
}

/* Room for a payload, with the lock held; NULL: it is dropped. */
static uint8_t *push(struct journal *j, size_t payload, bool always)
{
    uint32_t len = (uint32_t)payload;
    if ((!always && j->in.len + payload + sizeof len > JOURNAL_QUEUE_BYTES) || payload > JOURNAL_MAX_RECORD ||
        !queue_reserve(&j->in, payload + sizeof len)) {
        j->dropped++;
        return NULL;
    }
    uint8_t *at = j->in.data + j->in.len;
    memcpy(at, &len, sizeof len);
    j->in.len += sizeof len + payload;
    return at + sizeof len;
}

uint64_t journal_number(struct journal *j)
{
    return atomic_fetch_add_explicit(&j->number, 1, memory_order_relaxed);
}

void journal_accept(struct journal *j, const struct journal_accept *a)
{
    pthread_mutex_lock(&j->mu);
    uint8_t *at = push(j, journal_accept_size(a), false);
    if (at)
        journal_put_accept(at, a);
    j->hurry = true; /* a request that is not on the disk cannot be gone on with: its tokens can wait */
    pthread_cond_signal(&j->cond);
    pthread_mutex_unlock(&j->mu);
}

void journal_tokens(struct journal *j, uint64_t number, uint32_t choice, uint32_t from, const uint32_t *ids, uint32_t n)
{
    pthread_mutex_lock(&j->mu);
    for (uint32_t at = 0, k; at < n; at += k) {
        k = n - at < UINT16_MAX ? n - at : UINT16_MAX;
        uint8_t *p = push(j, JOURNAL_TOKENS_BYTES + (size_t)k * 4, false);
        if (p)
            journal_put_tokens(p, number, choice, from + at, ids + at, k);
    }
    pthread_mutex_unlock(&j->mu);
}

void journal_end(struct journal *j, uint64_t number, int64_t until_us)
{
    pthread_mutex_lock(&j->mu);
    uint8_t *at = push(j, JOURNAL_END_BYTES, true); /* as many as there are requests, at most */
    if (at)
        journal_put_end(at, number, until_us);
    pthread_mutex_unlock(&j->mu);
}

void journal_get_stats(struct journal *j, struct journal_stats *out)
{
    pthread_mutex_lock(&j->mu);
    *out = j->published;
    out->dropped += j->dropped;
    pthread_mutex_unlock(&j->mu);
}

/* ---- writing ---- */

static void tell(struct journal *j)
{
    char text[400];
    if (j->told == j->file.stats.degraded)
        return;
    j->told = !j->told;
    if (j->told)
        snprintf(text, sizeof text, "journal %.200s: %s failed: %s; serving goes on without it, and it is tried again",
                 j->path, j->file.failed, strerror(j->file.error));
    else
        snprintf(text, sizeof text, "journal %.200s: whole again: %llu requests", j->path,
                 (unsigned long long)j->state.n);
    if (j->report)
        j->report(j->report_ctx, j->told, text);
}

static void publish(struct journal *j)
{
    struct journal_stats s = j->file.stats;
    s.records = j->records;
    s.skipped = j->skipped;
    s.dropped = j->nomem;
    s.damaged = j->damaged;
    s.live = j->state.n;
    pthread_mutex_lock(&j->mu);
    j->published = s;
    pthread_mutex_unlock(&j->mu);
}

static void take(struct journal *j, const uint8_t *payload, uint32_t n)
{
    switch (journal_apply(&j->state, payload, n)) {
    case JOURNAL_DONE:
        if (j->file.fd < 0)
            return;
        j->records++;
        if (!journal_file_add(&j->file, payload, n))
            j->nomem++; /* a gap on the disk until the next segment */
        return;
    case JOURNAL_OVER:
        j->skipped++;
        return;
    case JOURNAL_NOMEM:
        j->nomem++;
        return;
    case JOURNAL_IGNORED:
        return;
    }
}

void journal_turn(struct journal *j, bool last)
{
    pthread_mutex_lock(&j->mu);
    struct queue full = j->in;
    j->in = j->work;
    j->in.len = 0;
    j->work = full;
    j->hurry = false;
    pthread_mutex_unlock(&j->mu);
    for (size_t at = 0; at < j->work.len;) {
        uint32_t n;
        memcpy(&n, j->work.data + at, sizeof n);
        take(j, j->work.data + at + sizeof n, n);
        at += sizeof n + n;
    }
    j->work.len = 0;
    if (j->work.cap > QUEUE_KEEP) {
        free(j->work.data);
        j->work = (struct queue){0};
    }
    int64_t now_us = j->file.io.now_us(j->file.io.ctx);
    if (now_us - j->expired_us >= JOURNAL_EXPIRE_US || now_us < j->expired_us) {
        journal_expire(&j->state, now_us);
        j->expired_us = now_us;
    }
    bool due = last || now_us - j->file.tried_us >= JOURNAL_RETRY_US || now_us < j->file.tried_us;
    if (j->file.fd >= 0)
        (void)!journal_file_flush(&j->file, last);
    else if (due)
        (void)!journal_file_begin(&j->file, &j->state);
    if (j->file.fd >= 0 && j->file.size > j->file.max_bytes / 2)
        (void)!journal_file_begin(&j->file, &j->state);
    tell(j);
    publish(j);
}

static void *journal_main(void *arg)
{
    struct journal *j = arg;
    bool last = false;
    while (!last) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += JOURNAL_TURN_US * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_mutex_lock(&j->mu);
        while (!j->stop && !j->hurry && pthread_cond_timedwait(&j->cond, &j->mu, &until) == 0)
            ;
        last = j->stop;
        pthread_mutex_unlock(&j->mu);
        journal_turn(j, last);
    }
    return NULL;
}

/* ---- life ---- */

/* One process at a time. The lock goes with its process, however that ends. */
static enum status_code lock_dir(struct journal *j, const char *path, struct status *st)
{
    j->lock_fd = openat(j->file.dir, LOCK_NAME, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (j->lock_fd < 0)
        return status_errno(st, ST_PERMISSION_DENIED, errno, "%.300s/" LOCK_NAME, path);
    if (flock(j->lock_fd, LOCK_EX | LOCK_NB) != 0)
        return status_set(st, ST_ALREADY_EXISTS, "%.300s: another process uses this journal", path);
    return ST_OK;
}

static enum status_code open_dir(struct journal *j, const char *path, struct status *st)
{
    if (mkdir(path, 0700) != 0 && errno != EEXIST)
        return status_errno(st, errno == ENOENT ? ST_NOT_FOUND : ST_PERMISSION_DENIED, errno, "%.300s", path);
    j->file.dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (j->file.dir < 0)
        return status_errno(st, errno == ENOTDIR ? ST_INVALID_ARGUMENT : ST_PERMISSION_DENIED, errno, "%.300s", path);
    return lock_dir(j, path, st);
}

enum status_code journal_open(struct journal **out, const struct journal_config *cfg, struct status *st)
{
    struct journal *j = calloc(1, sizeof *j);
    if (!j)
        return status_nomem(st, "journal", sizeof *j);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&j->cond, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&j->mu, NULL);
    j->report = cfg->report;
    j->report_ctx = cfg->report_ctx;
    j->file =
        (struct journal_file){.io = cfg->io ? *cfg->io : sys_io,
                              .dir = -1,
                              .fd = -1,
                              .max_bytes = cfg->max_bytes > JOURNAL_MIN_BYTES ? cfg->max_bytes : JOURNAL_MIN_BYTES,
                              .sync_ms = cfg->sync_ms};
    j->state.max_bytes = UINT64_MAX; /* what is there is taken */
    j->lock_fd = -1;
    j->path = strdup(cfg->dir);
    enum status_code rc = j->path ? open_dir(j, cfg->dir, st) : status_nomem(st, "journal", 0);
    if (rc == ST_OK && journal_read_dir(&j->state, j->file.dir, &j->file.sequence, &j->damaged, st) != ST_OK)
        rc = status_prefix(st, "%.300s", cfg->dir);
    if (rc != ST_OK) {
        journal_close(j);
        return rc;
    }
    j->state.max_bytes = j->file.max_bytes / 4;
    journal_expire(&j->state, j->file.io.now_us(j->file.io.ctx));
    atomic_init(&j->number, j->state.next_number ? j->state.next_number : 1);
    (void)!journal_file_begin(&j->file, &j->state);
    tell(j);
    publish(j);
    *out = j;
    return ST_OK;
}

void journal_each(struct journal *j, void (*fn)(void *ctx, const struct journal_found *f), void *ctx)
{
    struct journal_found found;
    for (const struct journal_entry *e = journal_first(&j->state); e; e = journal_next(&j->state, e)) {
        journal_found_of(e, &found);
        fn(ctx, &found);
    }
}

enum status_code journal_start(struct journal *j, struct status *st)
{
    int err = pthread_create(&j->thread, NULL, journal_main, j);
    if (err)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "starting the journal's thread");
    j->running = true;
    return ST_OK;
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    if (j->running) {
        pthread_mutex_lock(&j->mu);
        j->stop = true;
        pthread_cond_signal(&j->cond);
        pthread_mutex_unlock(&j->mu);
        pthread_join(j->thread, NULL);
    }
    journal_file_fini(&j->file);
    journal_state_fini(&j->state);
    if (j->file.dir >= 0)
        close(j->file.dir);
    if (j->lock_fd >= 0)
        close(j->lock_fd);
    pthread_mutex_destroy(&j->mu);
    pthread_cond_destroy(&j->cond);
    free(j->in.data);
    free(j->work.data);
    free(j->path);
    free(j);
}
