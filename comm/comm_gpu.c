/* comm_gpu.c - ranks on GPUs: memory, launches, waits with a bound. */
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "comm/comm_gpu_internal.h"
#include "comm/comm_internal.h"

#define ALIGN_BYTES    256u
#define NCCL_BYTES     (512ull << 20) /* what the library takes of a device when it connects; seen: up to 400 MiB */
#define FIRST_SLEEP_NS (100ull * 1000000)
#define SLEEP_NS       50000

_Static_assert(COMM_GPU_RANKS == COMM_GPU_MAX_RANKS && COMM_GPU_PEERS == COMM_GPU_PEER_RANKS, "one number");

enum status_code comm_gpu_check(cudaError_t err, struct status *st, const char *what)
{
    if (err == cudaSuccess)
        return ST_OK;
    cudaGetLastError();
    return status_set(st, err == cudaErrorMemoryAllocation ? ST_RESOURCE_EXHAUSTED : ST_INTERNAL, "%s: %s (%s)", what,
                      cudaGetErrorString(err), cudaGetErrorName(err));
}

/* ---- memory ---- */

/* The most columns that a rank may have, known before anybody is asked: shares are even but for a unit of rounding. */
static uint32_t cols_bound(const struct comm_gpu_config *c, uint32_t ranks)
{
    uint32_t even = (c->cols_total + ranks - 1) / ranks + 64;
    return even > c->cols_count ? even : c->cols_count;
}

static void put(struct comm_gpu_layout *l, uint64_t *at, uint64_t bytes)
{
    *at = l->bytes;
    l->bytes += (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
}

/* Whether peers may come to map our memory: the same answer on all ranks, before anybody is asked. */
static bool may_reach(const struct comm_gpu_config *c, uint32_t ranks)
{
    return c->way != COMM_GPU_NCCL && ranks <= COMM_GPU_PEERS && comm_local_size(c->comm) == ranks;
}

static struct comm_gpu_layout lay_out(const struct comm_gpu_config *c, uint32_t ranks)
{
    struct comm_gpu_layout l = {.inbox_rows = c->max_rows < COMM_GPU_PUSH_ROWS ? c->max_rows : COMM_GPU_PUSH_ROWS};
    if (c->hidden > COMM_GPU_PUSH_HIDDEN || !may_reach(c, ranks))
        l.inbox_rows = 0;
    uint64_t signals;
    put(&l, &signals, (uint64_t)COMM_GPU_BLOCKS * COMM_GPU_PEERS * sizeof(uint32_t)); /* first, at 0 */
    for (uint32_t i = 0; i < COMM_GPU_PARTS; i++)
        put(&l, &l.part[i], (uint64_t)c->max_rows * c->hidden * 2);
    put(&l, &l.inbox, (uint64_t)2 * ranks * l.inbox_rows * c->hidden * 4);
    put(&l, &l.share, (uint64_t)c->gather_rows * cols_bound(c, ranks) * sizeof(float));
    return l;
}

uint64_t comm_gpu_staging_bytes(const struct comm_gpu_config *c, uint32_t ranks)
{
    return (uint64_t)ranks * c->gather_rows * cols_bound(c, ranks) * sizeof(float);
}

uint64_t comm_gpu_bytes(const struct comm_gpu_config *cfg)
{
    uint32_t ranks = comm_size(cfg->comm);
    return lay_out(cfg, ranks).bytes + comm_gpu_staging_bytes(cfg, ranks) + NCCL_BYTES +
           COMM_GPU_TRIAL_BYTES(cfg->max_rows, cfg->hidden);
}

static enum status_code check_config(const struct comm_gpu_config *c, struct status *st)
{
    uint32_t ranks = comm_size(c->comm);
    if (ranks < 2 || ranks > COMM_GPU_MAX_RANKS)
        return status_set(st, ST_INVALID_ARGUMENT, "ranks: %u, expected 2 to %d", ranks, COMM_GPU_MAX_RANKS);
    if (c->hidden == 0 || c->hidden % 4 || c->max_rows == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "rows: %u of %u elements, expected some, of a multiple of 4",
                          c->max_rows, c->hidden);
    if ((uint64_t)c->cols_first + c->cols_count > c->cols_total)
        return status_set(st, ST_INVALID_ARGUMENT, "columns: %u from %u, expected at most %u", c->cols_count,
                          c->cols_first, c->cols_total);
    return ST_OK;
}

enum status_code comm_gpu_create(struct comm_gpu **out, const struct comm_gpu_config *cfg, struct status *st)
{
    enum status_code rc = check_config(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct comm_gpu *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "ranks on GPUs", sizeof *g);
    g->cfg = *cfg;
    g->rank = comm_rank(cfg->comm);
    g->ranks = comm_size(cfg->comm);
    g->layout = lay_out(cfg, g->ranks);
    uint64_t state_bytes = (COMM_GPU_BLOCKS + COMM_GPU_PUSH_ROWS + 1) * sizeof *g->state;
    if ((rc = comm_gpu_check(comm_gpu_load_kernels(), st, "kernels of sums over ranks")) != ST_OK ||
        (rc = comm_gpu_check(cudaMalloc(&g->memory, g->layout.bytes), st, "memory that ranks share")) != ST_OK ||
        (rc = comm_gpu_check(cudaMemset(g->memory, 0, g->layout.bytes), st, "memory that ranks share")) != ST_OK ||
        (rc = comm_gpu_check(cudaMalloc((void **)&g->state, state_bytes), st, "counts of meetings")) != ST_OK ||
        (rc = comm_gpu_check(cudaMemset(g->state, 0, state_bytes), st, "counts of meetings")) != ST_OK ||
        (rc = comm_gpu_check(
             cudaHostAlloc((void **)&g->watch, sizeof *g->watch, cudaHostAllocMapped | cudaHostAllocPortable), st,
             "pinned memory")) != ST_OK ||
        (rc = comm_gpu_check(cudaDeviceSynchronize(), st, "memory that ranks share")) != ST_OK) {
        comm_gpu_destroy(g);
        return rc;
    }
    memset(g->watch, 0, sizeof *g->watch);
    g->peer[g->rank] = g->memory;
    *out = g;
    return ST_OK;
}

void comm_gpu_destroy(struct comm_gpu *g)
{
    if (!g)
        return;
    comm_nccl_close(g->nccl);
    for (uint32_t r = 0; r < g->ranks; r++)
        if (g->peer[r] && r != g->rank)
            cudaIpcCloseMemHandle(g->peer[r]);
    cudaFree(g->staging);
    if (g->watch)
        cudaFreeHost(g->watch);
    cudaFree(g->state);
    cudaFree(g->memory);
    free(g);
}

/* ---- launches ---- */

void *comm_gpu_part(struct comm_gpu *g, uint32_t part)
{
    return (uint8_t *)g->memory + g->layout.part[part];
}

float *comm_gpu_share(struct comm_gpu *g)
{
    return (float *)(void *)((uint8_t *)g->memory + g->layout.share);
}

static struct comm_gpu_limit limit_of(const struct comm_gpu *g)
{
    return (struct comm_gpu_limit){
        .broken = g->state + COMM_GPU_BLOCKS + COMM_GPU_PUSH_ROWS,
        .watch = g->watch,
        .timeout_ns = g->cfg.comm->timeout_ms * UINT64_C(1000000),
    };
}

static struct comm_gpu_meet meeting(const struct comm_gpu *g)
{
    struct comm_gpu_meet m = {.limit = limit_of(g), .rank = g->rank, .ranks = g->ranks, .count = g->state};
    for (uint32_t r = 0; r < g->ranks; r++)
        m.signal[r] = g->peer[r];
    return m;
}

static cudaError_t push(struct comm_gpu *g, const struct comm_gpu_rows *rows, const struct comm_gpu_sum *s)
{
    struct comm_gpu_push_job job = {
        .limit = limit_of(g),
        .rank = g->rank,
        .ranks = g->ranks,
        .inbox_rows = g->layout.inbox_rows,
        .turn = g->state + COMM_GPU_BLOCKS,
        .part = comm_gpu_part(g, s->part),
        .rows = *rows,
    };
    for (uint32_t r = 0; r < g->ranks; r++)
        job.inbox[r] = (uint8_t *)g->peer[r] + g->layout.inbox;
    return comm_gpu_launch_push(s->stream, &job);
}

enum status_code comm_gpu_sum(struct comm_gpu *g, const struct comm_gpu_sum *s, struct status *st)
{
    if (s->rows == 0)
        return ST_OK;
    const struct comm_gpu_rows rows = {
        .rows = s->rows,
        .hidden = g->cfg.hidden,
        .set = s->set,
        .x = s->x,
        .bias = s->bias,
        .weight = s->weight,
        .eps = s->eps,
        .h = s->h,
    };
    struct comm_gpu_sum_job job = {.rows = rows};
    switch ((enum comm_gpu_form)g->form[comm_gpu_bucket(s->rows)]) {
    case COMM_GPU_FORM_PUSH:
        return comm_gpu_check(push(g, &rows, s), st, "sum over ranks");
    case COMM_GPU_FORM_READ:
        job.meet = meeting(g);
        job.parts = g->ranks;
        for (uint32_t r = 0; r < g->ranks; r++)
            job.part[r] = (const uint8_t *)g->peer[r] + g->layout.part[s->part];
        break;
    default:
        job.parts = 1;
        job.part[0] = comm_gpu_part(g, s->part);
        enum status_code rc =
            comm_nccl_sum(g->nccl, comm_gpu_part(g, s->part), (uint64_t)s->rows * g->cfg.hidden, s->stream, st);
        if (rc != ST_OK)
            return rc;
    }
    return comm_gpu_check(comm_gpu_launch_sum(s->stream, &job), st, "sum over ranks");
}

enum status_code comm_gpu_gather(struct comm_gpu *g, const struct comm_gpu_gather *s, struct status *st)
{
    if (s->rows == 0)
        return ST_OK;
    struct comm_gpu_gather_job job = {.ranks = g->ranks, .rows = s->rows, .total = g->cfg.cols_total, .out = s->out};
    uint64_t each = (uint64_t)s->rows * g->cols_max;
    memcpy(job.first, g->first, sizeof job.first);
    memcpy(job.count, g->count, sizeof job.count);
    for (uint32_t r = 0; r < g->ranks; r++)
        job.share[r] = g->peer_gather ? (const float *)(const void *)((uint8_t *)g->peer[r] + g->layout.share)
                                      : g->staging + r * each;
    if (g->peer_gather) {
        job.meet = meeting(g);
    } else {
        enum status_code rc = comm_nccl_gather(g->nccl, comm_gpu_share(g), g->staging, each, s->stream, st);
        if (rc != ST_OK)
            return rc;
    }
    return comm_gpu_check(comm_gpu_launch_gather(s->stream, &job), st, "gather over ranks");
}

/* ---- waits ---- */

static volatile struct comm_gpu_watch *watch(struct comm_gpu *g)
{
    return g->watch;
}

/* Ends the kernels that wait for peers. */
static void end_all(struct comm_gpu *g)
{
    if (g->ended)
        return;
    g->ended = true;
    watch(g)->abort = 1;
    if (g->nccl)
        comm_nccl_abort(g->nccl);
    comm_abort(g->cfg.comm);
}

static enum status_code broken(struct comm_gpu *g, struct status *st)
{
    uint32_t peer = watch(g)->peer;
    if (watch(g)->fault == 2)
        return status_set(st, ST_DEADLINE_EXCEEDED, "no answer from rank %u within %u ms: it is stuck or gone", peer,
                          g->cfg.comm->timeout_ms);
    return status_set(st, ST_ABORTED, "the group was aborted");
}

enum status_code comm_gpu_poll(struct comm_gpu *g, void *event, bool *done, struct status *st)
{
    cudaError_t err = cudaEventQuery(event);
    if (err != cudaSuccess && err != cudaErrorNotReady)
        return comm_gpu_check(err, st, "step");
    *done = err == cudaSuccess;
    if (!*done && !atomic_load_explicit(&g->cfg.comm->aborted, memory_order_relaxed)) {
        /* Its kernels wait for a peer that is gone as for one that is late: only the library knows of a broken connection. */
        enum status_code rc = g->nccl ? comm_nccl_fault(g->nccl, st) : ST_OK;
        if (rc != ST_OK)
            end_all(g);
        return rc;
    }
    if (!*done)
        return status_set(st, ST_ABORTED, "the group was aborted");
    if (watch(g)->fault) {
        end_all(g);
        return broken(g, st);
    }
    return ST_OK;
}

/* The kernels were told to end; their memory is not ours to free before they have. */
static void wait_for_end(struct comm_gpu *g, cudaEvent_t event)
{
    uint64_t until = comm_now_ns() + COMM_GPU_ABORT_MS * UINT64_C(1000000);
    end_all(g);
    while (cudaEventQuery(event) == cudaErrorNotReady && comm_now_ns() < until)
        nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
}

enum status_code comm_gpu_finish(struct comm_gpu *g, void *event, struct status *st)
{
    uint64_t start = comm_now_ns(), limit = g->cfg.comm->timeout_ms * UINT64_C(1000000);
    for (;;) {
        bool done = false;
        enum status_code rc = comm_gpu_poll(g, event, &done, st);
        if (rc != ST_OK) {
            if (rc == ST_ABORTED || rc == ST_DEADLINE_EXCEEDED || rc == ST_UNAVAILABLE)
                wait_for_end(g, event);
            return rc;
        }
        if (done)
            return ST_OK;
        uint64_t waited = comm_now_ns() - start;
        /* The kernels have the same bound from the time they began to wait on, and name the peer: they go first. */
        if (waited > limit + limit / 4) {
            wait_for_end(g, event);
            return status_set(st, ST_DEADLINE_EXCEEDED, "the GPU has not finished within %" PRIu64 " ms",
                              waited / 1000000);
        }
        if (waited > FIRST_SLEEP_NS)
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
        else
            sched_yield();
    }
}
