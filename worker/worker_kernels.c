/* worker_kernels.c - kernels and copies in the timeline (worker_trace.c): a thread takes them from the device's source ten times a
 * second, lays them under their steps (worker_activity.c) and writes them, so that the thread of the steps does none of it.
 *
 *   kernels, kernels 2 ...  a track each of kernels that do not overlap; args: step, stream
 *   copies, copies 2 ...    copies and fills; args: bytes, too
 *
 * The summary gains: kernels, copies; kernel_busy_us: a kernel was running; inside_gap_us: none was, of all steps' time, and what
 * of it copies ran (copy_us); longest_gap_us, longest_gap_step; top_kernels: name, count, us of the ten that took most. What is
 * missing: dropped (no room, no times, or impossible ones), late, steps_without_kernels, steps_lost. kernels_outside: of the start, and
 * between steps. shift_us: by how much records were moved at most to lie under the steps.
 */
#include "worker/worker_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/worker_activity.h"

#define TAKE_MS    100
#define SETTLE_US  200000   /* what began so long before the newest record has come, as records come about in order */
#define IDLE_US    10000000 /* and what began so long ago, whatever comes; of steps: none takes longer than this */
#define TEXT_BYTES 65536
#define EVENT_MAX  (ACTIVITY_JSON_MAX + 256)
#define STEPS_MAX  1024 /* told and not taken; more are lost */
#define TOP        10

struct step {
    uint64_t step;
    double begin_us, end_us;
};

struct worker_kernels {
    const struct activity_source *source;
    uint32_t rank;
    void (*write)(void *ctx, const char *text, size_t n);
    void *ctx;
    pthread_t thread;

    /* of the thread */
    struct activity_book *book;
    uint64_t dropped;
    double newest_us; /* beginning of a record */
    size_t n;
    char text[TEXT_BYTES];
    struct step taken[STEPS_MAX];

    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* guarded by lock */
    bool end, ended; /* the thread is to end; it has nothing more to do */
    uint32_t steps;
    uint64_t steps_lost;
    struct step step[STEPS_MAX];
};

/* ---- the thread ---- */

static void write_text(struct worker_kernels *k)
{
    if (k->n)
        k->write(k->ctx, k->text, k->n);
    k->n = 0;
}

static void on_placed(void *ctx, const struct activity_placed *p)
{
    struct worker_kernels *k = ctx;
    char name[ACTIVITY_JSON_MAX], track[32], step[32] = "", bytes[32] = "";
    snprintf(track, sizeof track, p->kind == ACTIVITY_KERNEL ? "kernels" : "copies");
    if (p->lane)
        snprintf(track + strlen(track), sizeof track - strlen(track), " %u", p->lane + 1);
    if (p->in_step)
        snprintf(step, sizeof step, "\"step\":%" PRIu64 ",", p->step);
    if (p->kind != ACTIVITY_KERNEL)
        snprintf(bytes, sizeof bytes, "\"bytes\":%" PRIu64 ",", p->bytes);
    if (k->n + EVENT_MAX > sizeof k->text)
        write_text(k);
    /* Viewers leave out what overlaps, if only by rounding: both ends are rounded, not one and the difference. */
    const long long begin_ns = llround(p->begin_us * 1e3), ns = llround(p->end_us * 1e3) - begin_ns;
    k->n += (size_t)snprintf(
        k->text + k->n, EVENT_MAX,
        ",\n{\"name\":\"%s\",\"ph\":\"X\",\"pid\":%u,\"tid\":\"%s\",\"ts\":%lld.%03lld,\"dur\":%lld.%03lld,"
        "\"args\":{%s%s\"stream\":%u}}",
        activity_name_json(name, p->name), k->rank, track, begin_ns / 1000, begin_ns % 1000, ns / 1000, ns % 1000, step,
        bytes, p->stream);
}

static void on_record(void *ctx, const struct activity *a)
{
    struct worker_kernels *k = ctx;
    if (a->begin_us < 0) { /* before the machine was started: there is no clock behind it */
        k->dropped++;
        return;
    }
    k->newest_us = fmax(k->newest_us, a->begin_us);
    activity_book_add(k->book, a);
}

/* Records first: all those of a step that is known were launched before it was told. */
static void take(struct worker_kernels *k, bool last)
{
    const double now_us = (double)worker_now_us();
    k->dropped += k->source->take(last, on_record, k);
    pthread_mutex_lock(&k->lock);
    uint32_t n = k->steps;
    memcpy(k->taken, k->step, n * sizeof *k->taken);
    k->steps = 0;
    pthread_mutex_unlock(&k->lock);
    for (uint32_t i = 0; i < n; i++)
        activity_book_step(k->book, k->taken[i].step, k->taken[i].begin_us, k->taken[i].end_us);
    const double idle_us = last ? INFINITY : now_us - IDLE_US;
    const double newest_us = fmin(k->newest_us, now_us); /* whatever a record says */
    activity_book_settle(k->book, fmax(newest_us - SETTLE_US, idle_us), idle_us);
    write_text(k);
}

static void after_ms(struct timespec *t, long ms)
{
    clock_gettime(CLOCK_MONOTONIC, t);
    t->tv_nsec += ms * 1000000;
    t->tv_sec += t->tv_nsec / 1000000000;
    t->tv_nsec %= 1000000000;
}

/* Until the next turn; true: it is the last. */
static bool wait_turn(struct worker_kernels *k)
{
    struct timespec until;
    after_ms(&until, TAKE_MS);
    pthread_mutex_lock(&k->lock);
    while (!k->end && pthread_cond_timedwait(&k->changed, &k->lock, &until) != ETIMEDOUT)
        ;
    bool end = k->end;
    pthread_mutex_unlock(&k->lock);
    return end;
}

static void *run(void *arg)
{
    struct worker_kernels *k = arg;
    while (!wait_turn(k))
        take(k, false);
    take(k, true);
    pthread_mutex_lock(&k->lock);
    k->ended = true;
    pthread_cond_signal(&k->changed);
    pthread_mutex_unlock(&k->lock);
    return NULL;
}

/* ---- for worker_trace.c ---- */

static void release(struct worker_kernels *k)
{
    activity_book_destroy(k->book);
    pthread_cond_destroy(&k->changed);
    pthread_mutex_destroy(&k->lock);
    free(k);
}

enum status_code worker_kernels_start(struct worker_kernels **out, const struct activity_source *source, uint32_t rank,
                                      void (*write)(void *ctx, const char *text, size_t n), void *ctx,
                                      struct status *st)
{
    struct worker_kernels *k = calloc(1, sizeof *k);
    if (!k)
        return status_nomem(st, "--trace-kernels", sizeof *k);
    *k = (struct worker_kernels){.source = source, .rank = rank, .write = write, .ctx = ctx};
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&k->lock, NULL);
    pthread_cond_init(&k->changed, &attr);
    pthread_condattr_destroy(&attr);
    enum status_code rc = activity_book_create(&k->book, 0, on_placed, k, st);
    int err = rc == ST_OK ? pthread_create(&k->thread, NULL, run, k) : 0;
    if (err)
        rc = status_errno(st, ST_RESOURCE_EXHAUSTED, err, "--trace-kernels: thread");
    if (rc != ST_OK) {
        release(k);
        return rc;
    }
    *out = k;
    return ST_OK;
}

void worker_kernels_step(struct worker_kernels *k, uint64_t step, double begin_us, double end_us)
{
    pthread_mutex_lock(&k->lock);
    if (k->steps < STEPS_MAX)
        k->step[k->steps++] = (struct step){.step = step, .begin_us = begin_us, .end_us = end_us};
    else
        k->steps_lost++;
    pthread_mutex_unlock(&k->lock);
}

static void summarise(const struct worker_kernels *k, char *args, size_t cap)
{
    const struct activity_totals t = activity_book_totals(k->book);
    struct activity_top top[TOP];
    char name[ACTIVITY_JSON_MAX];
    size_t n_top = activity_book_top(k->book, top, TOP);
    size_t n = (size_t)snprintf(
        args, cap,
        ",\"kernels\":%" PRIu64 ",\"kernel_busy_us\":%.0f,\"inside_gap_us\":%.0f,\"inside_gap_share\":%.5f,"
        "\"copies\":%" PRIu64 ",\"copy_us\":%.0f,\"longest_gap_us\":%.3f,\"longest_gap_step\":%" PRIu64
        ",\"dropped\":%" PRIu64 ",\"late\":%" PRIu64 ",\"steps_with_kernels\":%" PRIu64
        ",\"steps_without_kernels\":%" PRIu64 ",\"steps_lost\":%" PRIu64 ",\"kernels_outside\":%" PRIu64
        ",\"shift_us\":%.3f,\"top_kernels\":[",
        t.kernels, t.busy_us, t.gap_us, t.gap_us / (t.step_us + 1e-9), t.copies, t.copy_us, t.longest_gap_us,
        t.longest_step, k->dropped, t.late, t.steps, t.bare_steps, k->steps_lost, t.outside, t.shift_us);
    for (size_t i = 0; i < n_top && n < cap; i++)
        n += (size_t)snprintf(args + n, cap - n, "%s{\"name\":\"%s\",\"count\":%" PRIu64 ",\"us\":%.0f}", i ? "," : "",
                              activity_name_json(name, top[i].name), top[i].count, top[i].us);
    if (n + 2 <= cap)
        snprintf(args + n, cap - n, "]");
    else
        *args = '\0';
}

bool worker_kernels_end(struct worker_kernels *k, char *args, size_t cap)
{
    struct timespec until;
    after_ms(&until, WORKER_KERNELS_END_MS);
    pthread_mutex_lock(&k->lock);
    k->end = true;
    pthread_cond_signal(&k->changed);
    while (!k->ended && pthread_cond_timedwait(&k->changed, &k->lock, &until) != ETIMEDOUT)
        ;
    const bool ended = k->ended;
    pthread_mutex_unlock(&k->lock);
    if (!ended) {
        pthread_detach(k->thread);
        snprintf(args, cap, ",\"kernels_stuck\":true");
        return false;
    }
    pthread_join(k->thread, NULL);
    summarise(k, args, cap);
    release(k);
    return true;
}
