/* comm.c - arguments, clock and failures of the operations; the work is the back end's. */
#include "comm/comm.h"

#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "comm/comm_internal.h"

#define TIMEOUT_MS_DEFAULT 60000u

/* How a waiting rank spends its time. Ranks in step wait for microseconds: the first polls only ask again. Then it
 * yields, which is what lets R ranks run on fewer than R cores. A wait beyond YIELD_NS is no longer jitter but a peer at
 * work: sleep for a 16th of what was waited already, so that the sleep is never more than 6 % of the wait. */
#define SPIN_POLLS   64u
#define YIELD_NS     (500ull * 1000)
#define SLEEP_MIN_NS (20ull * 1000)
#define SLEEP_MAX_NS (1000ull * 1000)

uint64_t comm_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

enum status_code comm_wait_step(struct comm *c, struct comm_wait *w)
{
    if (atomic_load_explicit(&c->aborted, memory_order_relaxed))
        return ST_ABORTED;
    if (w->polls < SPIN_POLLS) {
        w->polls++;
        return ST_OK;
    }
    uint64_t now = comm_now_ns();
    if (now >= c->deadline_ns)
        return ST_DEADLINE_EXCEEDED;
    if (!w->since_ns)
        w->since_ns = now;
    uint64_t waited = now - w->since_ns;
    if (waited < YIELD_NS) {
        sched_yield();
        return ST_OK;
    }
    uint64_t ns = waited / 16;
    ns = ns < SLEEP_MIN_NS ? SLEEP_MIN_NS : ns > SLEEP_MAX_NS ? SLEEP_MAX_NS : ns;
    nanosleep(&(struct timespec){.tv_nsec = (long)ns}, NULL);
    return ST_OK;
}

void comm_start_clock(struct comm *c)
{
    c->start_ns = comm_now_ns();
    c->deadline_ns = c->start_ns + c->timeout_ms * UINT64_C(1000000);
}

enum status_code comm_create(struct comm **out, const struct comm_config *cfg, struct status *st)
{
    if (!cfg->ops)
        return status_set(st, ST_INVALID_ARGUMENT, "ops: none, expected a back end such as comm_ops_self");
    struct comm *c = calloc(1, sizeof *c);
    if (!c)
        return status_nomem(st, "a comm group", sizeof *c);
    c->ops = cfg->ops;
    c->timeout_ms = cfg->timeout_ms ? cfg->timeout_ms : TIMEOUT_MS_DEFAULT;
    atomic_init(&c->aborted, false);
    enum status_code rc = c->ops->open(c, st);
    if (rc != ST_OK) {
        free(c);
        return rc;
    }
    *out = c;
    return ST_OK;
}

void comm_destroy(struct comm *c)
{
    if (!c)
        return;
    comm_start_clock(c);
    c->ops->close(c, c->failed == ST_OK && !atomic_load(&c->aborted));
    free(c);
}

uint32_t comm_rank(const struct comm *c)
{
    return c->rank;
}

uint32_t comm_size(const struct comm *c)
{
    return c->size;
}

uint32_t comm_local_size(const struct comm *c)
{
    return c->local_size;
}

uint32_t comm_local_rank(const struct comm *c)
{
    return c->local_rank;
}

uint32_t comm_machine(const struct comm *c)
{
    return c->machine;
}

uint32_t comm_timeout_ms(const struct comm *c)
{
    return c->timeout_ms;
}

void comm_abort(struct comm *c)
{
    atomic_store(&c->aborted, true);
}

/* Before each operation: not after abort, not after a failure; starts its clock. */
static enum status_code begin(struct comm *c, const char *what, struct status *st)
{
    if (atomic_load(&c->aborted))
        return status_set(st, ST_ABORTED, "%s on rank %u of %u: the group was aborted", what, c->rank, c->size);
    if (c->failed != ST_OK)
        return status_set(st, c->failed, "%s on rank %u of %u: an earlier operation of the group failed (%s)", what,
                          c->rank, c->size, status_name(c->failed));
    comm_start_clock(c);
    return ST_OK;
}

static enum status_code end(struct comm *c, enum status_code rc, const char *what, struct status *st)
{
    if (rc == ST_OK)
        return ST_OK;
    c->failed = rc;
    status_prefix(st, "%s on rank %u of %u", what, c->rank, c->size);
    return rc;
}

enum status_code comm_all_reduce(struct comm *c, float *x, size_t n, struct status *st)
{
    enum status_code rc = begin(c, "all_reduce", st);
    if (rc != ST_OK || c->size == 1 || n == 0)
        return rc;
    if (!x || n > SIZE_MAX / sizeof(float))
        return status_set(st, ST_INVALID_ARGUMENT, "all_reduce: %zu floats at %p", n, (void *)x);
    return end(c, c->ops->all_reduce(c, x, n, st), "all_reduce", st);
}

enum status_code comm_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes, struct status *st)
{
    enum status_code rc = begin(c, "all_gather", st);
    if (rc != ST_OK)
        return rc;
    if (!bytes)
        return status_set(st, ST_INVALID_ARGUMENT, "all_gather: bytes is NULL, expected %u entries", c->size);
    size_t total = 0, own = 0, own_bytes = bytes[c->rank];
    for (uint32_t r = 0; r < c->size; r++) {
        if (r == c->rank)
            own = total;
        if (__builtin_add_overflow(total, bytes[r], &total))
            return status_set(st, ST_INVALID_ARGUMENT, "all_gather: bytes[%u] = %zu, the sum overflows", r, bytes[r]);
    }
    if (total == 0)
        return ST_OK;
    if (!recv || (!send && own_bytes > 0))
        return status_set(st, ST_INVALID_ARGUMENT, "all_gather: %zu bytes from %p to %p", total, send, recv);
    /* memmove: send may overlap its place if a caller is off by some bytes; in place it costs nothing. */
    if (own_bytes > 0 && send != (char *)recv + own)
        memmove((char *)recv + own, send, own_bytes);
    if (c->size == 1)
        return ST_OK;
    return end(c, c->ops->all_gather(c, (char *)recv + own, recv, bytes, st), "all_gather", st);
}

enum status_code comm_broadcast(struct comm *c, void *x, size_t bytes, uint32_t root, struct status *st)
{
    enum status_code rc = begin(c, "broadcast", st);
    if (rc != ST_OK)
        return rc;
    if (root >= c->size)
        return status_set(st, ST_INVALID_ARGUMENT, "broadcast: root %u of %u ranks", root, c->size);
    if (c->size == 1 || bytes == 0)
        return ST_OK;
    if (!x)
        return status_set(st, ST_INVALID_ARGUMENT, "broadcast: %zu bytes at NULL", bytes);
    return end(c, c->ops->broadcast(c, x, bytes, root, st), "broadcast", st);
}

enum status_code comm_barrier(struct comm *c, struct status *st)
{
    enum status_code rc = begin(c, "barrier", st);
    if (rc != ST_OK || c->size == 1)
        return rc;
    return end(c, c->ops->barrier(c, st), "barrier", st);
}
