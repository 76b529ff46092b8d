/* comm_gpu.c - ranks on GPUs: memory, who can reach whom, which way a sum takes, waits with a bound. */
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "comm/comm_gpu_internal.h"
#include "comm/comm_internal.h"

#define ALIGN_BYTES      256u
#define NCCL_BYTES       (512ull << 20) /* what the library takes of a device when it connects; seen: up to 400 MiB */
#define FIRST_SLEEP_NS   (100ull * 1000000)
#define SLEEP_NS         50000
#define TRIALS           20 /* of a sum, when ways are compared */
#define PEER_ROWS_NEVER  0u
#define PEER_ROWS_ALWAYS UINT32_MAX

_Static_assert(COMM_GPU_RANKS == COMM_GPU_MAX_RANKS, "one number");

struct layout {
    uint64_t part[COMM_GPU_PARTS], share, bytes; /* offsets from the start of the shared memory */
};

struct comm_gpu {
    struct comm_gpu_config cfg;
    uint32_t rank, ranks;
    bool connected, ended;
    uint32_t peer_rows; /* sums of so many rows and less read peers' memory */
    bool peer_gather;
    char text[96];

    void *memory; /* shared with peers */
    struct layout layout;
    void *peer[COMM_GPU_RANKS];   /* theirs, mapped here; our own at our place; NULL: not mapped */
    uint32_t *state;              /* count[COMM_GPU_BLOCKS], broken */
    struct comm_gpu_watch *watch; /* pinned; the address is the same on the device */
    uint32_t first[COMM_GPU_RANKS], count[COMM_GPU_RANKS], cols_max;
    struct comm_nccl *nccl;
    float *staging; /* of gathers over NCCL: [ranks][gather_rows][cols_max] */
};

static enum status_code check(cudaError_t err, struct status *st, const char *what)
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

static struct layout lay_out(const struct comm_gpu_config *c, uint32_t ranks)
{
    struct layout l = {.bytes = (uint64_t)COMM_GPU_BLOCKS * COMM_GPU_RANKS * sizeof(uint32_t)};
    for (uint32_t i = 0; i < COMM_GPU_PARTS; i++) {
        l.part[i] = l.bytes;
        l.bytes += ((uint64_t)c->max_rows * c->hidden * 2 + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    }
    l.share = l.bytes;
    l.bytes += (uint64_t)c->gather_rows * cols_bound(c, ranks) * sizeof(float);
    return l;
}

static uint64_t staging_bytes(const struct comm_gpu_config *c, uint32_t ranks)
{
    return (uint64_t)ranks * c->gather_rows * cols_bound(c, ranks) * sizeof(float);
}

uint64_t comm_gpu_bytes(const struct comm_gpu_config *cfg)
{
    uint32_t ranks = comm_size(cfg->comm);
    return lay_out(cfg, ranks).bytes + staging_bytes(cfg, ranks) + NCCL_BYTES;
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
    uint64_t state_bytes = (COMM_GPU_BLOCKS + 1) * sizeof *g->state;
    if ((rc = check(cudaMalloc(&g->memory, g->layout.bytes), st, "memory that ranks share")) != ST_OK ||
        (rc = check(cudaMemset(g->memory, 0, g->layout.bytes), st, "memory that ranks share")) != ST_OK ||
        (rc = check(cudaMalloc((void **)&g->state, state_bytes), st, "counts of meetings")) != ST_OK ||
        (rc = check(cudaMemset(g->state, 0, state_bytes), st, "counts of meetings")) != ST_OK ||
        (rc = check(cudaHostAlloc((void **)&g->watch, sizeof *g->watch, cudaHostAllocMapped | cudaHostAllocPortable),
                    st, "pinned memory")) != ST_OK ||
        (rc = check(cudaDeviceSynchronize(), st, "memory that ranks share")) != ST_OK) {
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

/* ---- connect ---- */

/* What each rank tells the others. */
struct card {
    cudaIpcMemHandle_t handle;
    uint8_t uuid[16];
    uint64_t bytes;
    uint32_t cols_first, cols_count;
    uint32_t has_nccl, has_handle;
};

/* all[r] = one of rank r, bytes each. */
static enum status_code exchange(struct comm_gpu *g, const void *one, void *all, size_t bytes, struct status *st)
{
    size_t each[COMM_GPU_RANKS];
    for (uint32_t r = 0; r < g->ranks; r++)
        each[r] = bytes;
    return comm_all_gather(g->cfg.comm, one, all, each, st);
}

static enum status_code all_of_us(struct comm_gpu *g, bool mine, bool *all, struct status *st)
{
    uint8_t one = mine, each[COMM_GPU_RANKS];
    enum status_code rc = exchange(g, &one, each, sizeof one, st);
    if (rc != ST_OK)
        return rc;
    *all = true;
    for (uint32_t r = 0; r < g->ranks; r++)
        *all = *all && each[r];
    return ST_OK;
}

static enum status_code check_cards(struct comm_gpu *g, const struct card *card, struct status *st)
{
    uint32_t at = 0;
    for (uint32_t r = 0; r < g->ranks; r++) {
        for (uint32_t q = 0; q < r; q++)
            if (memcmp(card[r].uuid, card[q].uuid, sizeof card[r].uuid) == 0)
                return status_set(st, ST_FAILED_PRECONDITION,
                                  "ranks %u and %u share one GPU; give each rank a device of its own (--devices, --tp)",
                                  q, r);
        if (card[r].bytes != g->layout.bytes || card[r].cols_first != at)
            return status_set(st, ST_FAILED_PRECONDITION,
                              "rank %u shares %" PRIu64 " bytes and columns from %u, expected %" PRIu64
                              " and %u: ranks must have the same options",
                              r, card[r].bytes, card[r].cols_first, g->layout.bytes, at);
        g->first[r] = at;
        g->count[r] = card[r].cols_count;
        at += card[r].cols_count;
        g->cols_max = g->count[r] > g->cols_max ? g->count[r] : g->cols_max;
    }
    if (at != g->cfg.cols_total)
        return status_set(st, ST_FAILED_PRECONDITION, "columns: the ranks have %u of %u", at, g->cfg.cols_total);
    return ST_OK;
}

/* Whether all memory of all peers is mapped here; why is for people. */
static bool map_peers(struct comm_gpu *g, const struct card *card, char *why, size_t why_bytes)
{
    if (comm_local_size(g->cfg.comm) != g->ranks) {
        snprintf(why, why_bytes, "the ranks are on several machines");
        return false;
    }
    for (uint32_t r = 0; r < g->ranks; r++) {
        if (r == g->rank)
            continue;
        cudaError_t err = card[r].has_handle
                              ? cudaIpcOpenMemHandle(&g->peer[r], card[r].handle, cudaIpcMemLazyEnablePeerAccess)
                              : cudaErrorNotSupported;
        if (err != cudaSuccess) {
            cudaGetLastError();
            g->peer[r] = NULL;
            snprintf(why, why_bytes, "memory of rank %u cannot be mapped: %s", r, cudaGetErrorString(err));
            return false;
        }
    }
    return true;
}

static struct comm_gpu_meet meeting(const struct comm_gpu *g)
{
    struct comm_gpu_meet m = {
        .rank = g->rank,
        .ranks = g->ranks,
        .count = g->state,
        .broken = g->state + COMM_GPU_BLOCKS,
        .watch = g->watch,
        .timeout_ns = g->cfg.comm->timeout_ms * UINT64_C(1000000),
    };
    for (uint32_t r = 0; r < g->ranks; r++)
        m.signal[r] = g->peer[r];
    return m;
}

/* Milliseconds of `TRIALS` sums; every rank runs them. */
static enum status_code time_sums(struct comm_gpu *g, uint32_t rows, bool peer, float *x, cudaStream_t stream,
                                  cudaEvent_t event[2], float *ms, struct status *st)
{
    g->peer_rows = peer ? PEER_ROWS_ALWAYS : PEER_ROWS_NEVER;
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; rc == ST_OK && i < TRIALS + 2; i++) {
        if (i == 2)
            rc = check(cudaEventRecord(event[0], stream), st, "cudaEventRecord");
        if (rc == ST_OK)
            rc = comm_gpu_sum(
                g,
                &(struct comm_gpu_sum){.part = i % COMM_GPU_PARTS, .rows = rows, .set = true, .x = x, .stream = stream},
                st);
    }
    if (rc == ST_OK)
        rc = check(cudaEventRecord(event[1], stream), st, "cudaEventRecord");
    if (rc == ST_OK)
        rc = comm_gpu_finish(g, event[1], st);
    return rc == ST_OK ? check(cudaEventElapsedTime(ms, event[0], event[1]), st, "cudaEventElapsedTime") : rc;
}

/* The largest number of rows, by doubling, up to which peer memory is not slower. */
static enum status_code compare_ways(struct comm_gpu *g, uint32_t *peer_rows, struct status *st)
{
    cudaStream_t stream = NULL;
    cudaEvent_t event[2] = {NULL, NULL};
    float *x = NULL, ms[2];
    uint32_t best = PEER_ROWS_ALWAYS;
    enum status_code rc;
    if ((rc = check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), st, "stream")) != ST_OK ||
        (rc = check(cudaEventCreate(&event[0]), st, "event")) != ST_OK ||
        (rc = check(cudaEventCreate(&event[1]), st, "event")) != ST_OK ||
        (rc = check(cudaMalloc((void **)&x, (uint64_t)g->cfg.max_rows * g->cfg.hidden * sizeof *x), st,
                    "rows to compare ways with")) != ST_OK)
        goto done;
    for (uint32_t rows = 1;; rows = rows * 4 < g->cfg.max_rows ? rows * 4 : g->cfg.max_rows) {
        for (int peer = 0; rc == ST_OK && peer < 2; peer++)
            rc = time_sums(g, rows, peer, x, stream, event, &ms[peer], st);
        if (rc != ST_OK)
            goto done;
        if (ms[1] > ms[0] && best == PEER_ROWS_ALWAYS)
            best = rows / 4;
        if (rows == g->cfg.max_rows)
            break;
    }
    *peer_rows = best;
    rc = comm_broadcast(g->cfg.comm, peer_rows, sizeof *peer_rows, 0, st); /* rank 0's reading counts */
done:
    cudaFree(x);
    for (int i = 0; i < 2; i++)
        if (event[i])
            cudaEventDestroy(event[i]);
    if (stream)
        cudaStreamDestroy(stream);
    return rc;
}

static void describe(struct comm_gpu *g)
{
    char nccl[32] = "";
    if (g->nccl) {
        uint32_t v = comm_nccl_version(g->nccl);
        snprintf(nccl, sizeof nccl, "NCCL %u.%u.%u", v / 10000, v / 100 % 100, v % 100);
    }
    if (g->peer_rows == PEER_ROWS_ALWAYS)
        snprintf(g->text, sizeof g->text, "peer memory");
    else if (g->peer_rows == PEER_ROWS_NEVER)
        snprintf(g->text, sizeof g->text, "%s", nccl);
    else
        snprintf(g->text, sizeof g->text, "peer memory up to %u rows, then %s", g->peer_rows, nccl);
}

/* Both ways that all ranks have; NCCL is connected only where it may be used. */
static enum status_code choose_way(struct comm_gpu *g, bool peer, bool nccl, const char *no_peer, const char *no_nccl,
                                   struct status *st)
{
    enum comm_gpu_way way = g->cfg.way;
    if (way == COMM_GPU_PEER || !nccl) {
        comm_nccl_close(g->nccl);
        g->nccl = NULL;
    }
    if ((way == COMM_GPU_PEER && !peer) || (way == COMM_GPU_NCCL && !nccl) || (!peer && !nccl))
        return status_set(st, ST_FAILED_PRECONDITION, "no way between the GPUs of the ranks: peer memory: %s; NCCL: %s",
                          peer ? "not wanted" : no_peer, nccl ? "not wanted" : no_nccl);
    g->peer_rows = peer ? PEER_ROWS_ALWAYS : PEER_ROWS_NEVER;
    g->peer_gather = peer && way != COMM_GPU_NCCL;
    if (!g->nccl)
        return ST_OK;
    enum status_code rc = comm_nccl_connect(g->nccl, g->cfg.comm, st);
    if (rc == ST_OK && !g->peer_gather)
        rc = check(cudaMalloc((void **)&g->staging, staging_bytes(&g->cfg, g->ranks)), st, "logits of all ranks");
    if (rc != ST_OK || way == COMM_GPU_NCCL || !peer) {
        g->peer_rows = PEER_ROWS_NEVER;
        return rc;
    }
    uint32_t rows = 0;
    rc = compare_ways(g, &rows, st);
    g->peer_rows = rows;
    return rc;
}

enum status_code comm_gpu_connect(struct comm_gpu *g, struct status *st)
{
    struct card card = {.bytes = g->layout.bytes, .cols_first = g->cfg.cols_first, .cols_count = g->cfg.cols_count};
    struct card all[COMM_GPU_RANKS];
    char no_peer[160] = "another rank cannot map it", no_nccl[160] = "another rank lacks it";
    struct cudaDeviceProp p;
    struct status why = STATUS_INIT;
    enum status_code rc = check(cudaGetDeviceProperties(&p, g->cfg.device), st, "cudaGetDeviceProperties");
    if (rc != ST_OK)
        return rc;
    memcpy(card.uuid, &p.uuid, sizeof card.uuid);
    card.has_handle = cudaIpcGetMemHandle(&card.handle, g->memory) == cudaSuccess;
    cudaGetLastError();
    card.has_nccl = comm_nccl_open(&g->nccl, g->cfg.nccl, &why) == ST_OK;
    if (!card.has_nccl)
        snprintf(no_nccl, sizeof no_nccl, "%.*s", (int)sizeof no_nccl - 1, why.message);
    if ((rc = exchange(g, &card, all, sizeof card, st)) != ST_OK || (rc = check_cards(g, all, st)) != ST_OK)
        return rc;
    bool nccl = true, peer = g->cfg.way != COMM_GPU_NCCL && map_peers(g, all, no_peer, sizeof no_peer);
    for (uint32_t r = 0; r < g->ranks; r++)
        nccl = nccl && all[r].has_nccl;
    if ((rc = all_of_us(g, peer, &peer, st)) != ST_OK)
        return rc;
    if ((rc = choose_way(g, peer, nccl, no_peer, no_nccl, st)) != ST_OK)
        return rc;
    describe(g);
    g->connected = true;
    return ST_OK;
}

bool comm_gpu_connected(const struct comm_gpu *g)
{
    return g->connected;
}

const char *comm_gpu_text(const struct comm_gpu *g)
{
    return g->text;
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

enum status_code comm_gpu_sum(struct comm_gpu *g, const struct comm_gpu_sum *s, struct status *st)
{
    if (s->rows == 0)
        return ST_OK;
    struct comm_gpu_sum_job job = {
        .rows = s->rows,
        .hidden = g->cfg.hidden,
        .set = s->set,
        .x = s->x,
        .bias = s->bias,
        .weight = s->weight,
        .eps = s->eps,
        .h = s->h,
    };
    if (s->rows <= g->peer_rows) {
        job.meet = meeting(g);
        job.parts = g->ranks;
        for (uint32_t r = 0; r < g->ranks; r++)
            job.part[r] = (const uint8_t *)g->peer[r] + g->layout.part[s->part];
    } else {
        job.parts = 1;
        job.part[0] = comm_gpu_part(g, s->part);
        enum status_code rc =
            comm_nccl_sum(g->nccl, comm_gpu_part(g, s->part), (uint64_t)s->rows * g->cfg.hidden, s->stream, st);
        if (rc != ST_OK)
            return rc;
    }
    return check(comm_gpu_launch_sum(s->stream, &job), st, "sum over ranks");
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
    return check(comm_gpu_launch_gather(s->stream, &job), st, "gather over ranks");
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
        return check(err, st, "step");
    *done = err == cudaSuccess;
    if (!*done && !atomic_load_explicit(&g->cfg.comm->aborted, memory_order_relaxed))
        return ST_OK;
    if (!*done)
        return status_set(st, ST_ABORTED, "the group was aborted");
    if (watch(g)->fault) {
        end_all(g);
        return broken(g, st);
    }
    return ST_OK;
}

/* The kernels were told to end; their memory is not ours to free before they have. */
static enum status_code wait_for_end(struct comm_gpu *g, cudaEvent_t event)
{
    uint64_t until = comm_now_ns() + COMM_GPU_ABORT_MS * UINT64_C(1000000);
    end_all(g);
    while (cudaEventQuery(event) == cudaErrorNotReady && comm_now_ns() < until)
        nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
    return ST_OK;
}

enum status_code comm_gpu_finish(struct comm_gpu *g, void *event, struct status *st)
{
    uint64_t start = comm_now_ns(), limit = g->cfg.comm->timeout_ms * UINT64_C(1000000);
    for (;;) {
        bool done = false;
        enum status_code rc = comm_gpu_poll(g, event, &done, st);
        if (rc != ST_OK) {
            if (rc == ST_ABORTED || rc == ST_DEADLINE_EXCEEDED)
                (void)wait_for_end(g, event);
            return rc;
        }
        if (done)
            return ST_OK;
        uint64_t waited = comm_now_ns() - start;
        /* The kernels have the same bound from the time they began to wait on, and name the peer: they go first. */
        if (waited > limit + limit / 4) {
            (void)wait_for_end(g, event);
            return status_set(st, ST_DEADLINE_EXCEEDED, "the GPU has not finished within %" PRIu64 " ms",
                              waited / 1000000);
        }
        if (waited > FIRST_SLEEP_NS)
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
        else
            sched_yield();
    }
}
