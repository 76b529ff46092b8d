/* bench_comm_gpu.c - sum over the ranks' GPUs + residual + norm: pushed to peers, read from peers, NCCL's all-reduce with a norm
 * behind it, and what is chosen of these.
 *
 *     mpirun -np R bench_comm_gpu [HIDDEN, default 4096]        77 where there are not enough GPUs
 *
 * Per message size (rows of bf16): microseconds of one such operation within a graph of 60, median of 30 replays, the three
 * parts in turn as in a forward. Rows beyond COMM_GPU_PUSH_ROWS are read in the first column as well. The last column is to be
 * held against one direction of NVLink 4, about 400 GB/s as it is measured by copies, times what a rank receives of it: R - 1.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"
#include "tests/gpu/own_device.h"

#define SKIP     77
#define OPS      60
#define REPLAYS  30
#define ROWS_MAX 4096
#define SIZES    13 /* 1, 2, 4 .. ROWS_MAX rows */
#define WAYS     4

static const struct {
    enum comm_gpu_way way;
    const char *name;
} ways[WAYS] = {{COMM_GPU_PUSH, "push"}, {COMM_GPU_READ, "read"}, {COMM_GPU_NCCL, "nccl"}, {COMM_GPU_AUTO, "auto"}};

static void must(bool ok, const char *what, const char *why)
{
    if (ok)
        return;
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void cuda(cudaError_t err, const char *what)
{
    must(err == cudaSuccess, what, cudaGetErrorString(err));
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

struct bench {
    struct comm_gpu *g;
    cudaStream_t stream;
    cudaEvent_t begin, end;
    float *x, *weight;
    void *h;
};

static double time_rows(struct bench *b, uint32_t rows)
{
    struct status st = STATUS_INIT;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float ms[REPLAYS];
    for (int captured = 0; captured < 2; captured++) { /* once by itself: NCCL connects at its first use */
        if (captured)
            cuda(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal), "capture");
        for (uint32_t i = 0; i < (captured ? OPS : 3u); i++) {
            const struct comm_gpu_sum s = {.part = i % COMM_GPU_PARTS,
                                           .rows = rows,
                                           .x = b->x,
                                           .weight = b->weight,
                                           .eps = 1e-5f,
                                           .h = b->h,
                                           .stream = b->stream};
            must(comm_gpu_sum(b->g, &s, &st) == ST_OK, "sum", st.message);
        }
        if (captured)
            cuda(cudaStreamEndCapture(b->stream, &graph), "capture");
    }
    cuda(cudaGraphInstantiate(&exec, graph, 0), "graph");
    for (int i = -3; i < REPLAYS; i++) {
        cuda(cudaEventRecord(b->begin, b->stream), "event");
        cuda(cudaGraphLaunch(exec, b->stream), "launch");
        cuda(cudaEventRecord(b->end, b->stream), "event");
        must(comm_gpu_finish(b->g, b->end, &st) == ST_OK, "finish", st.message);
        if (i >= 0)
            cuda(cudaEventElapsedTime(&ms[i], b->begin, b->end), "time");
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    qsort(ms, REPLAYS, sizeof *ms, ascending);
    return (double)ms[REPLAYS / 2] * 1e3 / OPS;
}

static bool open_bench(struct bench *b, struct comm *comm, int device, uint32_t hidden, size_t way)
{
    struct status st = STATUS_INIT;
    const struct comm_gpu_config cfg = {
        .comm = comm,
        .device = device,
        .max_rows = ROWS_MAX,
        .hidden = hidden,
        .gather_rows = 1,
        .cols_first = comm_rank(comm),
        .cols_count = 1,
        .cols_total = comm_size(comm),
        .way = ways[way].way,
    };
    must(comm_gpu_create(&b->g, &cfg, &st) == ST_OK, "create", st.message);
    bool is_there = comm_gpu_connect(b->g, &st) == ST_OK;
    if (comm_rank(comm) == 0)
        printf("%s: %s\n", ways[way].name, is_there ? comm_gpu_text(b->g) : st.message);
    if (!is_there) {
        comm_gpu_destroy(b->g);
        return false;
    }
    cuda(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "stream");
    cuda(cudaEventCreate(&b->begin), "event");
    cuda(cudaEventCreate(&b->end), "event");
    cuda(cudaMalloc((void **)&b->x, (size_t)ROWS_MAX * hidden * 4), "x");
    cuda(cudaMalloc(&b->h, (size_t)ROWS_MAX * hidden * 2), "h");
    cuda(cudaMalloc((void **)&b->weight, (size_t)hidden * 4), "weight");
    cuda(cudaMemset(b->x, 0, (size_t)ROWS_MAX * hidden * 4), "x");
    cuda(cudaMemset(b->weight, 0, (size_t)hidden * 4), "weight");
    cuda(cudaDeviceSynchronize(), "memory");
    return true;
}

static void close_bench(struct bench *b, struct comm *comm)
{
    struct status st = STATUS_INIT;
    must(comm_barrier(comm, &st) == ST_OK, "barrier", st.message);
    comm_gpu_destroy(b->g);
    cudaFree(b->x);
    cudaFree(b->h);
    cudaFree(b->weight);
    cudaEventDestroy(b->begin);
    cudaEventDestroy(b->end);
    cudaStreamDestroy(b->stream);
}

static void print(double us[][SIZES], uint32_t hidden)
{
    printf("%10s %8s %10s %10s %10s %10s %10s %10s\n", "bytes", "rows", "push us", "read us", "nccl us", "auto us",
           "auto/nccl", "auto GB/s");
    for (uint32_t i = 0; i < SIZES; i++) {
        double bytes = 2.0 * hidden * (1u << i);
        printf("%10.0f %8u", bytes, 1u << i);
        for (size_t way = 0; way < WAYS; way++)
            printf(" %10.2f", us[way][i]);
        printf(" %10.2f %10.1f\n", us[3][i] / us[2][i], bytes / us[3][i] / 1e3);
    }
}

int main(int argc, char **argv)
{
    struct status st = STATUS_INIT;
    struct comm *comm;
    int count = 0;
    uint32_t hidden = argc > 1 ? (uint32_t)atoi(argv[1]) : 4096;
    if (!getenv("OMPI_COMM_WORLD_SIZE") || cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("needs mpirun and a GPU for each rank: skipped\n");
        return SKIP;
    }
    must(comm_create(&comm, &(struct comm_config){.ops = &comm_ops_mpi}, &st) == ST_OK, "comm", st.message);
    must(comm_size(comm) > 1, "ranks", "two at least");
    int device = 0;
    must(own_device(comm, &device, &st) == ST_OK, "device", st.message);
    cuda(cudaSetDevice(device), "device");
    double us[WAYS][SIZES] = {{0}};
    for (size_t i = 0; i < WAYS; i++) {
        struct bench b;
        if (!open_bench(&b, comm, device, hidden, i))
            continue;
        for (uint32_t size = 0; size < SIZES; size++)
            us[i][size] = time_rows(&b, 1u << size);
        close_bench(&b, comm);
    }
    if (comm_rank(comm) == 0)
        print(us, hidden);
    comm_destroy(comm);
    return 0;
}
