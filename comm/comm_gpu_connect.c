/* comm_gpu_connect.c - who can reach whom, and which way a sum takes. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "comm/comm_gpu_internal.h"

#define TRIALS  20 /* sums in a graph, when ways are compared */
#define REPLAYS 4  /* of the graph; the fastest but the first counts */

/* ---- who reaches whom ---- */

/* What each rank tells the others. */
struct card {
    cudaIpcMemHandle_t handle;
    uint8_t uuid[16];
    uint64_t processes; /* names the PID namespace; 0: not known */
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

/* ---- peer memory ----
 *
 * A handle of CUDA can be opened by any process that sees the exporter's, whether its device is visible there or not. Between pods,
 * which have PID namespaces of their own, the driver refuses (or, with numbers of processes that mean something else there, might
 * find another process). So nothing is believed: each rank stamps its memory with the UUID of its device, peers read it
 * through their mapping, and unless all of them see what they should, nobody uses peer memory. */

#define STAMP_BYTES 16 /* at the start of part 0, which has 256 at least */

/* Ours, or zeros as before. Has ended when this returns. */
static enum status_code stamp(struct comm_gpu *g, const uint8_t *with, struct status *st)
{
    enum status_code rc = comm_gpu_check(cudaMemcpy(comm_gpu_part(g, 0), with, STAMP_BYTES, cudaMemcpyHostToDevice), st,
                                         "stamp of memory that ranks share");
    return rc == ST_OK ? comm_gpu_check(cudaDeviceSynchronize(), st, "stamp of memory that ranks share") : rc;
}

static uint64_t process_space(void)
{
    struct stat s;
    return stat("/proc/self/ns/pid", &s) == 0 ? (uint64_t)s.st_ino : 0;
}

static bool map_peer(struct comm_gpu *g, const struct card *card, uint32_t r, char *why, size_t why_bytes)
{
    uint8_t seen[STAMP_BYTES] = {0};
    void *memory = NULL;
    cudaError_t err = card[r].has_handle ? cudaIpcOpenMemHandle(&memory, card[r].handle, cudaIpcMemLazyEnablePeerAccess)
                                         : cudaErrorNotSupported;
    if (err == cudaSuccess) {
        g->peer[r] = memory;
        err = cudaMemcpy(seen, (uint8_t *)memory + g->layout.part[0], sizeof seen, cudaMemcpyDeviceToHost);
    }
    cudaGetLastError();
    if (err == cudaSuccess && memcmp(seen, card[r].uuid, sizeof seen) == 0)
        return true;
    const bool apart = card[r].processes != card[g->rank].processes;
    snprintf(why, why_bytes, "memory of rank %u cannot be mapped: %s%s", r,
             err != cudaSuccess ? cudaGetErrorString(err) : "what is mapped is not that",
             apart ? ", and it is in another PID namespace (pods of their own?)" : "");
    return false;
}

static void unmap_peers(struct comm_gpu *g)
{
    for (uint32_t r = 0; r < g->ranks; r++) {
        if (r == g->rank || !g->peer[r])
            continue;
        cudaIpcCloseMemHandle(g->peer[r]);
        g->peer[r] = NULL;
    }
    cudaGetLastError();
}

/* Whether all memory of all peers is mapped here; why is for people. */
static bool map_peers(struct comm_gpu *g, const struct card *card, char *why, size_t why_bytes)
{
    if (g->ranks > COMM_GPU_PEERS) {
        snprintf(why, why_bytes, "%u ranks, of which %d are joined by it at most", g->ranks, COMM_GPU_PEERS);
        return false;
    }
    if (comm_local_size(g->cfg.comm) != g->ranks) {
        snprintf(why, why_bytes, "the ranks are on several machines");
        return false;
    }
    for (uint32_t r = 0; r < g->ranks; r++)
        if (r != g->rank && !map_peer(g, card, r, why, why_bytes))
            return false;
    return true;
}

/* ---- which way ---- */

struct trial {
    cudaStream_t stream;
    cudaEvent_t event[2];
    float *x, *weight;
    void *h;
};

static enum status_code launch_sums(struct comm_gpu *g, const struct trial *t, uint32_t rows, uint32_t n,
                                    struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; rc == ST_OK && i < n; i++)
        rc = comm_gpu_sum(g,
                          &(struct comm_gpu_sum){.part = i % COMM_GPU_PARTS,
                                                 .rows = rows,
                                                 .x = t->x,
                                                 .weight = t->weight,
                                                 .eps = 1,
                                                 .h = t->h,
                                                 .stream = t->stream},
                          st);
    return rc;
}

static enum status_code replay(struct comm_gpu *g, const struct trial *t, cudaGraphExec_t graph, float *ms,
                               struct status *st)
{
    enum status_code rc;
    if ((rc = comm_gpu_check(cudaEventRecord(t->event[0], t->stream), st, "cudaEventRecord")) != ST_OK ||
        (rc = comm_gpu_check(cudaGraphLaunch(graph, t->stream), st, "cudaGraphLaunch")) != ST_OK ||
        (rc = comm_gpu_check(cudaEventRecord(t->event[1], t->stream), st, "cudaEventRecord")) != ST_OK ||
        (rc = comm_gpu_finish(g, t->event[1], st)) != ST_OK)
        return rc;
    return comm_gpu_check(cudaEventElapsedTime(ms, t->event[0], t->event[1]), st, "cudaEventElapsedTime");
}

/* Milliseconds of TRIALS sums in a graph, as a forward has them: launched one by one the host may be slower than they are. */
static enum status_code time_form(struct comm_gpu *g, const struct trial *t, uint32_t rows, float *best,
                                  struct status *st)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    enum status_code rc = launch_sums(g, t, rows, COMM_GPU_PARTS, st); /* NCCL connects at its first use */
    if (rc == ST_OK)
        rc = comm_gpu_check(cudaStreamBeginCapture(t->stream, cudaStreamCaptureModeThreadLocal), st, "capture");
    if (rc != ST_OK)
        return rc;
    rc = launch_sums(g, t, rows, TRIALS, st);
    cudaError_t err = cudaStreamEndCapture(t->stream, &graph);
    if (rc == ST_OK)
        rc = comm_gpu_check(err, st, "capture");
    if (rc == ST_OK)
        rc = comm_gpu_check(cudaGraphInstantiate(&exec, graph, 0), st, "cudaGraphInstantiate");
    for (int i = 0; rc == ST_OK && i < REPLAYS; i++) {
        float ms;
        rc = replay(g, t, exec, &ms, st);
        if (rc == ST_OK && (i <= 1 || ms < *best))
            *best = ms;
    }
    if (exec)
        cudaGraphExecDestroy(exec);
    if (graph)
        cudaGraphDestroy(graph);
    return rc;
}

/* Rows that bucket b is tried with: the most that it has. */
static uint32_t rows_of(const struct comm_gpu *g, uint32_t b)
{
    return b < 31 && 1u << b < g->cfg.max_rows ? 1u << b : g->cfg.max_rows;
}

static bool can(const struct comm_gpu *g, uint32_t b, enum comm_gpu_form form)
{
    return form == COMM_GPU_FORM_PUSH ? rows_of(g, b) <= g->layout.inbox_rows
                                      : form != COMM_GPU_FORM_NCCL || g->nccl != NULL;
}

static enum status_code compare_forms(struct comm_gpu *g, const struct trial *t, struct status *st)
{
    uint8_t chosen[COMM_GPU_BUCKETS] = {0};
    for (uint32_t b = 0; b <= comm_gpu_bucket(g->cfg.max_rows); b++) {
        float best = 0, ms = 0;
        for (enum comm_gpu_form form = 0; form < COMM_GPU_FORMS; form++) {
            if (!can(g, b, form))
                continue;
            g->form[b] = (uint8_t)form;
            enum status_code rc = time_form(g, t, rows_of(g, b), &ms, st);
            if (rc != ST_OK)
                return rc;
            if (best > 0 && ms >= best)
                continue;
            best = ms;
            chosen[b] = (uint8_t)form;
        }
    }
    enum status_code rc = comm_broadcast(g->cfg.comm, chosen, sizeof chosen, 0, st); /* rank 0's reading counts */
    memcpy(g->form, chosen, sizeof chosen);
    return rc;
}

/* Rows to add to and to norm, zeros all of them, as parts are at first. */
static enum status_code open_trial(struct trial *t, const struct comm_gpu_config *c, struct status *st)
{
    const uint64_t numbers = (uint64_t)c->max_rows * c->hidden, bytes = COMM_GPU_TRIAL_BYTES(c->max_rows, c->hidden);
    enum status_code rc;
    if ((rc = comm_gpu_check(cudaStreamCreateWithFlags(&t->stream, cudaStreamNonBlocking), st, "stream")) != ST_OK ||
        (rc = comm_gpu_check(cudaEventCreate(&t->event[0]), st, "event")) != ST_OK ||
        (rc = comm_gpu_check(cudaEventCreate(&t->event[1]), st, "event")) != ST_OK ||
        (rc = comm_gpu_check(cudaMalloc((void **)&t->x, bytes), st, "rows to compare ways with")) != ST_OK)
        return rc;
    t->weight = t->x + numbers;
    t->h = t->weight + c->hidden;
    return comm_gpu_check(cudaMemsetAsync(t->x, 0, bytes, t->stream), st, "rows to compare ways with");
}

static enum status_code choose_forms(struct comm_gpu *g, struct status *st)
{
    struct trial t = {0};
    enum status_code rc = open_trial(&t, &g->cfg, st);
    if (rc == ST_OK)
        rc = compare_forms(g, &t, st);
    cudaFree(t.x);
    for (int i = 0; i < 2; i++)
        if (t.event[i])
            cudaEventDestroy(t.event[i]);
    if (t.stream)
        cudaStreamDestroy(t.stream);
    return rc;
}

/* "pushed up to 64 rows, read up to 1024, NCCL 2.28.9"; no_peer: why all goes over NCCL though it was not asked for, or NULL. */
static void describe(struct comm_gpu *g, const char *no_peer)
{
    uint32_t last = comm_gpu_bucket(g->cfg.max_rows), v = g->nccl ? comm_nccl_version(g->nccl) : 0;
    char nccl[32];
    snprintf(nccl, sizeof nccl, "NCCL %u.%u.%u", v / 10000, v / 100 % 100, v % 100);
    const char *const names[COMM_GPU_FORMS] = {"peer memory, pushed", "peer memory, read", nccl};
    size_t at = 0;
    for (uint32_t b = 0; b <= last; b++) {
        if (b < last && g->form[b] == g->form[b + 1])
            continue;
        int n = snprintf(g->text + at, sizeof g->text - at, "%s", names[g->form[b]]);
        at += n > 0 ? (size_t)n : 0;
        if (b == last || at >= sizeof g->text)
            break;
        n = snprintf(g->text + at, sizeof g->text - at, " up to %u rows; ", rows_of(g, b));
        at += n > 0 ? (size_t)n : 0;
        if (at >= sizeof g->text)
            break;
    }
    if (no_peer && at < sizeof g->text)
        snprintf(g->text + at, sizeof g->text - at, ", as peer memory is out of reach: %s", no_peer);
}

/* Both ways that all ranks have; NCCL is connected only where it may be used. */
static enum status_code choose_way(struct comm_gpu *g, bool peer, bool nccl, const char *no_peer, const char *no_nccl,
                                   struct status *st)
{
    enum comm_gpu_way way = g->cfg.way;
    bool only_peer = way != COMM_GPU_AUTO && way != COMM_GPU_NCCL;
    if (only_peer || !nccl) {
        comm_nccl_close(g->nccl);
        g->nccl = NULL;
    }
    if ((only_peer && !peer) || (way == COMM_GPU_NCCL && !nccl) || (!peer && !nccl))
        return status_set(st, ST_FAILED_PRECONDITION, "no way between the GPUs of the ranks: peer memory: %s; NCCL: %s",
                          peer ? "not wanted" : no_peer, nccl ? "not wanted" : no_nccl);
    g->peer_gather = peer && way != COMM_GPU_NCCL;
    for (uint32_t b = 0; b < COMM_GPU_BUCKETS; b++)
        g->form[b] = !g->peer_gather                                         ? COMM_GPU_FORM_NCCL
                     : way != COMM_GPU_READ && can(g, b, COMM_GPU_FORM_PUSH) ? COMM_GPU_FORM_PUSH
                                                                             : COMM_GPU_FORM_READ;
    enum status_code rc = g->nccl ? comm_nccl_connect(g->nccl, g->cfg.comm, st) : ST_OK;
    if (rc == ST_OK && !g->peer_gather)
        rc = comm_gpu_check(cudaMalloc((void **)&g->staging, comm_gpu_staging_bytes(&g->cfg, g->ranks)), st,
                            "logits of all ranks");
    return rc == ST_OK && (way == COMM_GPU_AUTO || way == COMM_GPU_PEER) && peer ? choose_forms(g, st) : rc;
}

enum status_code comm_gpu_connect(struct comm_gpu *g, struct status *st)
{
    static const uint8_t zeros[STAMP_BYTES];
    struct card card = {.processes = process_space(),
                        .bytes = g->layout.bytes,
                        .cols_first = g->cfg.cols_first,
                        .cols_count = g->cfg.cols_count};
    struct card all[COMM_GPU_RANKS];
    char no_peer[200] = "another rank cannot map it", no_nccl[160] = "another rank lacks it";
    struct cudaDeviceProp p;
    struct status why = STATUS_INIT;
    enum status_code rc = comm_gpu_check(cudaGetDeviceProperties(&p, g->cfg.device), st, "cudaGetDeviceProperties");
    if (rc != ST_OK)
        return rc;
    memcpy(card.uuid, &p.uuid, sizeof card.uuid);
    if ((rc = stamp(g, card.uuid, st)) != ST_OK)
        return rc;
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
    if ((rc = all_of_us(g, peer, &peer, st)) != ST_OK || (rc = stamp(g, zeros, st)) != ST_OK)
        return rc;
    if (!peer)
        unmap_peers(g);
    if ((rc = choose_way(g, peer, nccl, no_peer, no_nccl, st)) != ST_OK)
        return rc;
    describe(g, !peer && g->cfg.way == COMM_GPU_AUTO ? no_peer : NULL);
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
