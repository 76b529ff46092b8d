/* bench_comm_gpu.c - sum over the ranks' GPUs + residual + norm: peer memory against NCCL's all-reduce and a norm behind it.
 *
 *     mpirun -np 2 bench_comm_gpu [HIDDEN, default 4096]        77 where there are not enough GPUs
 *
 * Per message size (rows of bf16): microseconds of one such operation within a graph of 60, median of 30 replays, the three
 * parts in turn as in a forward; the time per operation that the bytes alone would take at --rate GB/s (default 400: one
 * direction of NVLink 4 as it is measured by copies) is the limit.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm.h"

#define SKIP     77
#define OPS      60
#define REPLAYS  30
#define ROWS_MAX 4096

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

int main(int argc, char **argv)
{
    static const char *const names[] = {"auto", "peer", "nccl"};
    struct status st = STATUS_INIT;
    struct comm *comm;
    int count = 0, device = 0;
    uint32_t hidden = argc > 1 ? (uint32_t)atoi(argv[1]) : 4096;
    if (!getenv("OMPI_COMM_WORLD_SIZE") || cudaGetDeviceCount(&count) != cudaSuccess || count < 2) {
        printf("needs mpirun and two GPUs or more: skipped\n");
        return SKIP;
    }
    must(comm_create(&comm, &(struct comm_config){.ops = &comm_ops_mpi}, &st) == ST_OK, "comm", st.message);
    device = (int)comm_local_rank(comm);
    cuda(cudaSetDevice(device), "device");
    double us[3][16] = {{0}};
    uint32_t n = 0, rank = comm_rank(comm);
    for (int way = COMM_GPU_PEER; way >= 0; way = way == COMM_GPU_PEER   ? COMM_GPU_NCCL
                                                  : way == COMM_GPU_NCCL ? 0
                                                                         : -1) {
        struct bench b;
        struct comm_gpu_config cfg = {.comm = comm,
                                      .device = device,
                                      .max_rows = ROWS_MAX,
                                      .hidden = hidden,
                                      .gather_rows = 1,
                                      .cols_first = rank,
                                      .cols_count = 1,
                                      .cols_total = comm_size(comm),
                                      .way = (enum comm_gpu_way)way};
        must(comm_gpu_create(&b.g, &cfg, &st) == ST_OK, "create", st.message);
        if (comm_gpu_connect(b.g, &st) != ST_OK) {
            if (rank == 0)
                printf("%s: %s\n", names[way], st.message);
            comm_gpu_destroy(b.g);
            continue;
        }
        if (rank == 0)
            printf("%s: %s\n", names[way], comm_gpu_text(b.g));
        cuda(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking), "stream");
        cuda(cudaEventCreate(&b.begin), "event");
        cuda(cudaEventCreate(&b.end), "event");
        cuda(cudaMalloc((void **)&b.x, (size_t)ROWS_MAX * hidden * 4), "x");
        cuda(cudaMalloc(&b.h, (size_t)ROWS_MAX * hidden * 2), "h");
        cuda(cudaMalloc((void **)&b.weight, (size_t)hidden * 4), "weight");
        cuda(cudaMemset(b.x, 0, (size_t)ROWS_MAX * hidden * 4), "x");
        cuda(cudaMemset(b.weight, 0, (size_t)hidden * 4), "weight");
        n = 0;
        for (uint32_t rows = 1; rows <= ROWS_MAX; rows *= 2)
            us[way][n++] = time_rows(&b, rows);
        must(comm_barrier(comm, &st) == ST_OK, "barrier", st.message);
        comm_gpu_destroy(b.g);
        cudaFree(b.x);
        cudaFree(b.h);
        cudaFree(b.weight);
    }
    if (rank == 0) {
        printf("%10s %8s %10s %10s %10s %8s %12s\n", "bytes", "rows", "peer us", "nccl us", "auto us", "ratio",
               "peer GB/s");
        for (uint32_t i = 0; i < n; i++) {
            double bytes = 2.0 * hidden * (1u << i);
            printf("%10.0f %8u %10.2f %10.2f %10.2f %8.2f %12.1f\n", bytes, 1u << i, us[COMM_GPU_PEER][i],
                   us[COMM_GPU_NCCL][i], us[0][i], us[COMM_GPU_PEER][i] / us[COMM_GPU_NCCL][i],
                   bytes / us[COMM_GPU_PEER][i] / 1e3);
        }
    }
    comm_destroy(comm);
    return 0;
}
