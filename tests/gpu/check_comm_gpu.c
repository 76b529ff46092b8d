/* check_comm_gpu.c - sums and gathers of ranks on GPUs against plain loops on the host.
 *
 *     mpirun -np R check_comm_gpu [MODE [WAY]]          77 where there are not enough GPUs
 *
 * MODE: all        the default
 *       quick      less of it, with a bound of a minute: under compute-sanitizer
 *       deadline   the last rank stays away: the others say so, in time
 *       abort      the same, but comm_abort comes first
 * WAY:  peer, push, read, nccl or auto; default: all but peer that the machine has, auto for deadline and abort
 *
 * PUSH and READ: x to the bit (the sum is x + (p0 + p1 + ...) + bias in float32, nothing to contract). NCCL sums in bf16: a part of
 * 2^-8. h: a bf16 rounding (2^-8) and the order of the sum of squares.
 */
#include <cuda_runtime_api.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "comm/comm.h"
#include "tests/gpu/own_device.h"

#define SKIP       77
#define ROWS_MAX   1024
#define TIMEOUT_MS 2000
#define QUICK_MS   60000
#define SUMS       12
#define KEPT_MAX   512
#define SUMS_MAX   12 /* of a graph */
#define STRESS     3000
#define LATE_BYTES (64u << 20)

static struct comm *comm;
static uint32_t rank, ranks, failures;
static bool quick;

static struct {
    uint32_t n, at;
    uint64_t bits[KEPT_MAX]; /* of h, in the order of the checks; 0: not known, by NCCL so far */
} kept;

static void expect(bool ok, const char *what, double a, double b)
{
    if (ok)
        return;
    failures++;
    printf("FAILED on rank %u: %s: %g, %g\n", rank, what, a, b);
    fflush(stdout);
}

static void must(bool ok, const char *what, const char *why)
{
    if (ok)
        return;
    fprintf(stderr, "rank %u: %s: %s\n", rank, what, why);
    exit(1);
}

static void cuda(cudaError_t err, const char *what)
{
    must(err == cudaSuccess, what, cudaGetErrorString(err));
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void *device(size_t bytes)
{
    void *p;
    cuda(cudaMalloc(&p, bytes), "cudaMalloc");
    return p;
}

/* ---- numbers that every rank can make for every other ---- */

static uint32_t hash(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t h = a * 0x9E3779B9u ^ b * 0x85EBCA6Bu ^ c * 0xC2B2AE35u;
    h ^= h >> 15;
    h *= 0x2C1B3C6Du;
    h ^= h >> 12;
    return h * 0x297A2D39u ^ h >> 15;
}

static float of_bf16(uint16_t v)
{
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* of [-2, 2), exact in bf16 */
static uint16_t part_at(uint32_t r, uint32_t turn, uint32_t i)
{
    float f = (float)((int32_t)(hash(r, turn, i) % 512) - 256) / 128;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float float_at(uint32_t turn, uint32_t i)
{
    return (float)((int32_t)(hash(77, turn, i) % 20011) - 10005) / 5003;
}

/* ---- one group ---- */

struct bench {
    struct comm_gpu *g;
    bool exact;
    uint32_t hidden, cols_first, cols_count, cols_total;
    cudaStream_t stream;
    cudaEvent_t event;
    float *x, *bias, *weight, *out; /* on the device */
    void *h;
    float *want, *got;
    uint16_t *words;
};

static void finish(struct bench *b)
{
    struct status st = STATUS_INIT;
    cuda(cudaEventRecord(b->event, b->stream), "event");
    must(comm_gpu_finish(b->g, b->event, &st) == ST_OK, "finish", st.message);
}

static void fill_part(struct bench *b, uint32_t part, uint32_t turn, uint32_t rows)
{
    for (uint32_t i = 0; i < rows * b->hidden; i++)
        b->words[i] = part_at(rank, turn, i);
    cuda(cudaMemcpyAsync(comm_gpu_part(b->g, part), b->words, (size_t)rows * b->hidden * 2, cudaMemcpyHostToDevice,
                         b->stream),
         "part");
    finish(b);
}

static void check_x(struct bench *b, uint32_t rows)
{
    cuda(cudaMemcpy(b->got, b->x, (size_t)rows * b->hidden * 4, cudaMemcpyDeviceToHost), "x");
    double worst = 0;
    for (uint32_t i = 0; i < rows * b->hidden; i++) {
        double off = fabs((double)b->got[i] - (double)b->want[i]);
        worst = off > worst ? off : worst;
    }
    expect(worst <= (b->exact ? 0 : 0.02 * SUMS), "x is off by", worst, rows);
}

/* The same whatever way of peer memory it was: the first one's are kept. NCCL may have rounded otherwise. */
static void check_bits(const uint16_t *h, size_t n, bool exact)
{
    uint64_t bits = 0xCBF29CE484222325u; /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        bits = (bits ^ h[i]) * 0x100000001B3u;
    must(kept.at < KEPT_MAX, "bits of h", "too many to keep");
    if (kept.at == kept.n)
        kept.n++;
    uint64_t *first = &kept.bits[kept.at];
    if (exact && *first == 0)
        *first = bits;
    expect(!exact || *first == bits, "h has other bits than with another way: check number", kept.at, 0);
    kept.at++;
}

static void check_h(struct bench *b, uint32_t rows, float eps, const float *weight)
{
    cuda(cudaMemcpy(b->words, b->h, (size_t)rows * b->hidden * 2, cudaMemcpyDeviceToHost), "h");
    double worst = 0;
    for (uint32_t r = 0; r < rows; r++) {
        const float *x = b->got + (size_t)r * b->hidden;
        double squares = 0;
        for (uint32_t i = 0; i < b->hidden; i++)
            squares += (double)x[i] * (double)x[i];
        double factor = 1 / sqrt(squares / b->hidden + (double)eps);
        for (uint32_t i = 0; i < b->hidden; i++) {
            double want = (double)x[i] * factor * (double)weight[i];
            double off = fabs((double)of_bf16(b->words[(size_t)r * b->hidden + i]) - want) / (fabs(want) + 1e-3);
            worst = off > worst ? off : worst;
        }
    }
    expect(worst < 0x1.1p-8, "h is off by a share of", worst, rows);
    check_bits(b->words, (size_t)rows * b->hidden, b->exact);
}

/* SUMS sums after one another, each with other extras. */
static void check_sums(struct bench *b, uint32_t rows)
{
    struct status st = STATUS_INIT;
    float *bias = malloc(b->hidden * sizeof *bias), *weight = malloc(b->hidden * sizeof *weight);
    for (uint32_t i = 0; i < b->hidden; i++) {
        bias[i] = float_at(1000, i);
        weight[i] = float_at(1001, i);
    }
    cuda(cudaMemcpy(b->bias, bias, b->hidden * sizeof *bias, cudaMemcpyHostToDevice), "bias");
    cuda(cudaMemcpy(b->weight, weight, b->hidden * sizeof *weight, cudaMemcpyHostToDevice), "weight");
    cuda(cudaDeviceSynchronize(), "bias and weight"); /* a copy from pageable memory returns before it has arrived */
    for (uint32_t turn = 0; turn < SUMS; turn++) {
        struct comm_gpu_sum s = {
            .part = turn % COMM_GPU_PARTS,
            .rows = rows,
            .set = turn % 5 == 0,
            .x = b->x,
            .bias = turn % 3 == 1 ? b->bias : NULL,
            .weight = turn % 4 != 2 ? b->weight : NULL,
            .eps = 1e-5f,
            .h = b->h,
            .stream = b->stream,
        };
        fill_part(b, s.part, turn, rows);
        must(comm_gpu_sum(b->g, &s, &st) == ST_OK, "sum", st.message);
        finish(b);
        for (uint32_t i = 0; i < rows * b->hidden; i++) {
            float sum = 0, x = s.set ? 0 : b->want[i];
            for (uint32_t r = 0; r < ranks; r++)
                sum += of_bf16(part_at(r, turn, i));
            x += sum;
            b->want[i] = s.bias ? x + bias[i % b->hidden] : x;
        }
        check_x(b, rows);
        if (s.weight)
            check_h(b, rows, s.eps, weight);
    }
    free(weight);
    free(bias);
}

static void check_gather(struct bench *b, uint32_t rows, uint32_t turn)
{
    struct status st = STATUS_INIT;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < b->cols_count; i++)
            b->got[(size_t)r * b->cols_count + i] = float_at(turn + r, b->cols_first + i);
    cuda(cudaMemcpyAsync(comm_gpu_share(b->g), b->got, (size_t)rows * b->cols_count * 4, cudaMemcpyHostToDevice,
                         b->stream),
         "share");
    finish(b); /* got is written again below */
    const struct comm_gpu_gather gather = {.rows = rows, .out = b->out, .stream = b->stream};
    must(comm_gpu_gather(b->g, &gather, &st) == ST_OK, "gather", st.message);
    finish(b);
    cuda(cudaMemcpy(b->got, b->out, (size_t)rows * b->cols_total * 4, cudaMemcpyDeviceToHost), "out");
    uint32_t wrong = 0;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < b->cols_total; i++)
            wrong += b->got[(size_t)r * b->cols_total + i] != float_at(turn + r, i);
    expect(wrong == 0, "gathered values that are wrong, of rows", wrong, rows);
}

static float small_at(uint32_t r, uint32_t s, uint32_t i)
{
    return (float)((int32_t)(hash(r, s, i) % 3) - 1);
}

/* Sums of stress, and what stands in front of each of them. */
struct mix {
    uint32_t n, rows[SUMS_MAX]; /* n: a multiple of the parts */
    bool skewed;                /* ranks are late by turns, up to some 0.1 ms, and rows are gathered in between */
    void *late;                 /* LATE_BYTES: filling it takes time */
    void *source[SUMS_MAX];
};

static void fill_sources(struct bench *b, struct mix *m)
{
    for (uint32_t s = 0; s < m->n; s++) {
        size_t count = (size_t)m->rows[s] * b->hidden;
        for (uint32_t i = 0; i < count; i++) {
            float f = small_at(rank, s, i);
            uint32_t bits;
            memcpy(&bits, &f, sizeof bits);
            b->words[i] = (uint16_t)(bits >> 16);
        }
        m->source[s] = device(count * 2);
        cuda(cudaMemcpy(m->source[s], b->words, count * 2, cudaMemcpyHostToDevice), "source");
    }
}

static void launch_mix(struct bench *b, const struct mix *m)
{
    struct status st = STATUS_INIT;
    for (uint32_t s = 0; s < m->n; s++) {
        struct comm_gpu_sum sum = {.part = s % COMM_GPU_PARTS, .rows = m->rows[s], .x = b->x, .stream = b->stream};
        for (uint32_t i = 0; m->skewed && hash(rank, 99, s) % 2 && i < 4; i++)
            cuda(cudaMemsetAsync(m->late, (int)i, LATE_BYTES, b->stream), "late");
        cuda(cudaMemcpyAsync(comm_gpu_part(b->g, sum.part), m->source[s], (size_t)sum.rows * b->hidden * 2,
                             cudaMemcpyDeviceToDevice, b->stream),
             "copy");
        must(comm_gpu_sum(b->g, &sum, &st) == ST_OK, "sum", st.message);
        const struct comm_gpu_gather gather = {.rows = 2, .out = b->out, .stream = b->stream};
        if (m->skewed && s == m->n / 2)
            must(comm_gpu_gather(b->g, &gather, &st) == ST_OK, "gather", st.message);
    }
}

static void check_mix(struct bench *b, const struct mix *m, uint32_t replays)
{
    size_t count = (size_t)ROWS_MAX * b->hidden;
    uint32_t wrong = 0;
    cuda(cudaMemcpy(b->got, b->x, count * 4, cudaMemcpyDeviceToHost), "x");
    memset(b->want, 0, count * 4);
    for (uint32_t s = 0; s < m->n; s++)
        for (uint32_t r = 0; r < ranks; r++)
            for (uint32_t i = 0; i < m->rows[s] * b->hidden; i++)
                b->want[i] += small_at(r, s, i) * (float)replays;
    for (size_t i = 0; i < count; i++)
        wrong += b->got[i] != b->want[i];
    expect(wrong == 0,
           m->skewed ? "sums of ranks out of step: wrong values, of sums"
                     : "sums without a pause: wrong values, of sums",
           wrong, m->n);
}

/* A graph of sums, replayed without a pause: parts come from device memory, so nothing but the rules of comm/ keeps a rank
 * from writing over what another still reads. All numbers are small integers: x is exact however it is summed. */
static void stress(struct bench *b, struct mix m)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    const uint32_t replays = (quick ? STRESS / 20 : STRESS) / m.n;
    m.late = device(LATE_BYTES);
    fill_sources(b, &m);
    cuda(cudaMemset(b->x, 0, (size_t)ROWS_MAX * b->hidden * 4), "x");
    cuda(cudaDeviceSynchronize(), "x");
    cuda(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal), "capture");
    launch_mix(b, &m);
    cuda(cudaStreamEndCapture(b->stream, &graph), "capture");
    cuda(cudaGraphInstantiate(&exec, graph, 0), "graph");
    for (uint32_t i = 0; i < replays; i++) {
        if (m.skewed && i % ranks == rank && i % 3 == 0)
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
        cuda(cudaGraphLaunch(exec, b->stream), "launch");
        if (i % 50 == 49)
            finish(b);
    }
    finish(b);
    check_mix(b, &m, replays);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaFree(m.late);
    for (uint32_t s = 0; s < m.n; s++)
        cudaFree(m.source[s]);
}

static bool open_group(struct bench *b, enum comm_gpu_way way, uint32_t hidden, uint32_t cols, uint32_t unit)
{
    struct status st = STATUS_INIT;
    uint32_t units = (cols + unit - 1) / unit, each = units / ranks, more = units % ranks;
    uint32_t first = (rank * each + (rank < more ? rank : more)) * unit, end = first + (each + (rank < more)) * unit;
    struct comm_gpu_config cfg = {
        .comm = comm,
        .max_rows = ROWS_MAX,
        .hidden = hidden,
        .gather_rows = 64,
        .cols_first = first,
        .cols_count = (end < cols ? end : cols) - first,
        .cols_total = cols,
        .way = way,
    };
    *b = (struct bench){.hidden = hidden, .cols_first = first, .cols_count = cfg.cols_count, .cols_total = cols};
    cuda(cudaGetDevice(&cfg.device), "device");
    must(comm_gpu_create(&b->g, &cfg, &st) == ST_OK, "create", st.message);
    enum status_code rc = comm_gpu_connect(b->g, &st);
    if (rc == ST_FAILED_PRECONDITION) {
        if (rank == 0)
            printf("way %d: not here: %s\n", (int)way, st.message);
        comm_gpu_destroy(b->g);
        return false;
    }
    must(rc == ST_OK, "connect", st.message);
    size_t most = (size_t)ROWS_MAX * hidden > (size_t)64 * cols ? (size_t)ROWS_MAX * hidden : (size_t)64 * cols;
    cuda(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "stream");
    cuda(cudaEventCreate(&b->event), "event");
    b->x = device((size_t)ROWS_MAX * hidden * 4);
    b->h = device((size_t)ROWS_MAX * hidden * 2);
    b->bias = device(hidden * 4);
    b->weight = device(hidden * 4);
    b->out = device((size_t)64 * cols * 4);
    b->want = calloc(most, sizeof *b->want);
    b->got = calloc(most, sizeof *b->got);
    b->words = calloc(most, sizeof *b->words);
    b->exact = strstr(comm_gpu_text(b->g), "NCCL") == NULL;
    return true;
}

static void close_group(struct bench *b)
{
    struct status st = STATUS_INIT;
    must(comm_barrier(comm, &st) == ST_OK, "barrier", st.message);
    comm_gpu_destroy(b->g);
    cudaFree(b->x);
    cudaFree(b->h);
    cudaFree(b->bias);
    cudaFree(b->weight);
    cudaFree(b->out);
    free(b->want);
    free(b->got);
    free(b->words);
    cudaEventDestroy(b->event);
    cudaStreamDestroy(b->stream);
}

static void check_shape(struct bench *b, const uint32_t *rows, size_t n, bool large)
{
    for (size_t r = 0; r < n; r++) {
        if (b->hidden <= 4096 || rows[r] < 300)
            check_sums(b, rows[r]);
        check_gather(b, rows[r] < 64 ? rows[r] : 64, 2000 + (uint32_t)r);
    }
    stress(b, (struct mix){.n = 3, .rows = {1, 1, 1}});
    stress(b, (struct mix){.n = 6, .rows = {16, 16, 16, 16, 16, 16}});
    stress(b, (struct mix){.n = 6, .rows = {1, 1, 1, 1, 1, 1}, .skewed = true});
    if (large)
        stress(b, (struct mix){.n = 12, .rows = {1, 3, 16, 2, 300, 64, 1, 130, 5, 128, 300, 1}, .skewed = true});
}

static void check_way(enum comm_gpu_way way)
{
    static const struct {
        uint32_t hidden, cols, unit;
    } shape[] = {{4096, 128256, 8}, {320, 4096, 8}, {5120, 32000, 8}, {12, 1001, 1}, {288, 32000, 3}};
    static const uint32_t rows[] = {1, 3, 64, 128, 265, ROWS_MAX};
    kept.at = 0;
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
        struct bench b;
        if (quick && shape[s].hidden > 320)
            continue;
        if (!open_group(&b, way, shape[s].hidden, shape[s].cols, shape[s].unit))
            return;
        if (rank == 0) {
            printf("way %d, hidden %u, %u columns: %s\n", (int)way, shape[s].hidden, shape[s].cols, comm_gpu_text(b.g));
            fflush(stdout);
        }
        check_shape(&b, rows, quick ? 4 : sizeof rows / sizeof *rows, s < 2 && !quick);
        close_group(&b);
    }
}

/* ---- faults ---- */

static void *abort_soon(void *arg)
{
    nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
    comm_abort(comm);
    return arg;
}

static _Noreturn void check_fault(bool aborted, enum comm_gpu_way way)
{
    struct bench b;
    struct status st = STATUS_INIT;
    pthread_t thread;
    must(open_group(&b, way, 4096, 128, 8), "group", "none");
    if (rank == ranks - 1) {
        nanosleep(&(struct timespec){.tv_sec = 2 * TIMEOUT_MS / 1000 + 2}, NULL);
        exit(0);
    }
    double start = now_s();
    if (aborted)
        must(pthread_create(&thread, NULL, abort_soon, NULL) == 0, "thread", "none");
    for (uint32_t i = 0; i < 64; i++) { /* a step's worth, all of which must end */
        const struct comm_gpu_sum s = {.part = i % 3, .rows = 8, .x = b.x, .stream = b.stream};
        must(comm_gpu_sum(b.g, &s, &st) == ST_OK, "sum", st.message);
    }
    cuda(cudaEventRecord(b.event, b.stream), "event");
    enum status_code rc = comm_gpu_finish(b.g, b.event, &st);
    double took = now_s() - start;
    expect(rc == (aborted ? ST_ABORTED : ST_DEADLINE_EXCEEDED), "code", rc, 0);
    expect(took < (aborted ? 0.3 + 1.0 : TIMEOUT_MS * 1.25e-3 + 1.0), "seconds until it was said", took, 0);
    start = now_s();
    cuda(cudaStreamSynchronize(b.stream), "the kernels end by themselves");
    expect(now_s() - start < 1, "seconds until the kernels ended", now_s() - start, 0);
    printf("rank %u: %s after %.2f s: %s\n", rank, status_name(rc), took, st.message);
    fflush(stdout);
    _exit(failures != 0);
}

/* The ways that name says, by bits; 0: no such name. */
static uint32_t ways_named(const char *name)
{
    static const char *const names[] = {[COMM_GPU_AUTO] = "auto",
                                        [COMM_GPU_PEER] = "peer",
                                        [COMM_GPU_PUSH] = "push",
                                        [COMM_GPU_READ] = "read",
                                        [COMM_GPU_NCCL] = "nccl"};
    if (!name)
        return 31u & ~(1u << COMM_GPU_PEER);
    for (uint32_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i]))
            return 1u << i;
    return 0;
}

int main(int argc, char **argv)
{
    struct status st = STATUS_INIT;
    int count = 0, own = 0;
    const char *mode = argc > 1 ? argv[1] : "all", *way = argc > 2 ? argv[2] : NULL;
    uint32_t ways = ways_named(way);
    bool some = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    if (!getenv("OMPI_COMM_WORLD_SIZE") || !some) {
        printf("needs mpirun and a GPU for each rank: skipped\n");
        return SKIP;
    }
    bool aborted = !strcmp(mode, "abort"), fault = aborted || !strcmp(mode, "deadline");
    quick = !strcmp(mode, "quick");
    must(ways && (fault || quick || !strcmp(mode, "all")), "arguments",
         "[all|quick|deadline|abort [auto|peer|push|read|nccl]]");
    const struct comm_config cfg = {.ops = &comm_ops_mpi, .timeout_ms = quick ? QUICK_MS : TIMEOUT_MS};
    must(comm_create(&comm, &cfg, &st) == ST_OK, "comm", st.message);
    rank = comm_rank(comm);
    ranks = comm_size(comm);
    must(ranks > 1, "ranks", "two at least");
    must(own_device(comm, &own, &st) == ST_OK, "device", st.message);
    cuda(cudaSetDevice(own), "device");
    for (enum comm_gpu_way w = COMM_GPU_AUTO; w <= COMM_GPU_NCCL; w++) {
        if (!(ways >> w & 1))
            continue;
        if (fault)
            check_fault(aborted, w);
        check_way(w);
    }
    if (rank == 0 || failures)
        printf("rank %u: %s: %u failures\n", rank, failures ? "FAILED" : "ok", failures);
    comm_destroy(comm);
    return failures != 0;
}
