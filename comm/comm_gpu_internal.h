/* comm_gpu_internal.h - the ranks on GPUs of comm.h, shared by comm_gpu.c (memory, launches, waits), comm_gpu_connect.c
 * (who reaches whom, which way a sum takes), comm_gpu_nccl.c (the library) and the kernels.
 *
 * What peers read and write stands in one allocation of each rank, laid out alike on all:
 *
 *   signals [BLOCKS][PEERS] uint32   what each peer's block of this number has reached
 *   parts   [PARTS][max_rows][hidden] bf16
 *   inbox   [2][ranks][inbox_rows][hidden / 4] lines of 16 bytes; comm_gpu_push.cu says when which half is written
 *   share   [gather_rows][cols_max] float, rows at this rank's own stride of cols_count
 */
#ifndef TANDEM_COMM_GPU_INTERNAL_H
#define TANDEM_COMM_GPU_INTERNAL_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#define COMM_GPU_BLOCKS 264 /* of a launch: two of 1024 threads on each of Hopper's 132 SMs */
#define COMM_GPU_RANKS  64  /* COMM_GPU_MAX_RANKS */
#define COMM_GPU_PEERS  8   /* COMM_GPU_PEER_RANKS: ranks that reach each other's memory, this one included */
#define COMM_GPU_TRIAL_BYTES(rows, hidden)                                                                             \
    (((uint64_t)(rows) + 1) * (hidden) * sizeof(float) + (uint64_t)(rows) * (hidden)*2) /* while ways are compared */
#define COMM_GPU_PUSH_HIDDEN 16384 /* of a row that is pushed, at most */

#ifdef __cplusplus
extern "C" {
#endif

/* Pinned memory of the host that kernels see: the host writes abort, a kernel that gave up writes the rest. */
struct comm_gpu_watch {
    uint32_t abort;
    uint32_t fault; /* 0; 1: told to abort; 2: too late */
    uint32_t peer;  /* whom it waited for */
};

/* What bounds a wait. */
struct comm_gpu_limit {
    uint32_t *broken; /* own: a kernel gave up, nobody waits any more */
    struct comm_gpu_watch *watch;
    uint64_t timeout_ns;
};

/* The handshake of a launch: block b of every rank meets block b of all others. ranks 0: there is none. */
struct comm_gpu_meet {
    struct comm_gpu_limit limit;
    uint32_t *signal[COMM_GPU_PEERS]; /* of each rank */
    uint32_t rank, ranks;
    uint32_t *count; /* [COMM_GPU_BLOCKS], own: how often the block of this number has met */
};

/* What becomes of the sum: x = or += sum + bias, h = norm(x) * weight. */
struct comm_gpu_rows {
    uint32_t rows, hidden;
    int set;
    float *x;
    const float *bias, *weight;
    float eps;
    void *h;
};

struct comm_gpu_sum_job {
    struct comm_gpu_meet meet;
    const void *part[COMM_GPU_PEERS]; /* bf16 [rows][hidden], added in this order */
    uint32_t parts;
    struct comm_gpu_rows rows;
};

struct comm_gpu_push_job {
    struct comm_gpu_limit limit;
    void *inbox[COMM_GPU_PEERS]; /* of each rank */
    uint32_t rank, ranks, inbox_rows;
    uint32_t *turn;   /* [inbox_rows], own: how often the row of this number has been pushed */
    const void *part; /* own, bf16 [rows][hidden] */
    struct comm_gpu_rows rows;
};

struct comm_gpu_gather_job {
    struct comm_gpu_meet meet;
    const float *share[COMM_GPU_RANKS]; /* [rows][count] */
    uint32_t first[COMM_GPU_RANKS], count[COMM_GPU_RANKS];
    uint32_t ranks, rows, total;
    float *out; /* [rows][total] */
};

/* Loads all kernels. By default CUDA loads one at its first launch, which waits for what runs on the device: behind a kernel
 * that waits for a rank that is gone, the launch would wait with it, and nobody would look at the clock. */
cudaError_t comm_gpu_load_kernels(void);
cudaError_t comm_gpu_load_push(void); /* of comm_gpu_push.cu */
cudaError_t comm_gpu_launch_sum(cudaStream_t stream, const struct comm_gpu_sum_job *job);
cudaError_t comm_gpu_launch_push(cudaStream_t stream, const struct comm_gpu_push_job *job);
cudaError_t comm_gpu_launch_gather(cudaStream_t stream, const struct comm_gpu_gather_job *job);

#ifdef __cplusplus
}
#endif

#ifndef __cplusplus
#include "comm/comm.h"

/* ---- the group ---- */

/* How a sum is done, by its rows. Bucket b has 2^(b-1) + 1 .. 2^b of them. */
enum comm_gpu_form { COMM_GPU_FORM_PUSH, COMM_GPU_FORM_READ, COMM_GPU_FORM_NCCL, COMM_GPU_FORMS };
#define COMM_GPU_BUCKETS 33

static inline uint32_t comm_gpu_bucket(uint32_t rows)
{
    return rows > 1 ? 32 - (uint32_t)__builtin_clz(rows - 1) : 0;
}

struct comm_gpu_layout {
    uint64_t part[COMM_GPU_PARTS], inbox, share, bytes; /* offsets from the start of the shared memory */
    uint32_t inbox_rows;
};

struct comm_gpu {
    struct comm_gpu_config cfg;
    uint32_t rank, ranks;
    bool connected, ended;
    uint8_t form[COMM_GPU_BUCKETS];
    bool peer_gather;
    char text[320];

    void *memory; /* shared with peers */
    struct comm_gpu_layout layout;
    void *peer[COMM_GPU_RANKS];   /* theirs, mapped here; our own at our place; NULL: not mapped */
    uint32_t *state;              /* count[COMM_GPU_BLOCKS], turn[COMM_GPU_PUSH_ROWS], broken */
    struct comm_gpu_watch *watch; /* pinned; the address is the same on the device */
    uint32_t first[COMM_GPU_RANKS], count[COMM_GPU_RANKS], cols_max;
    struct comm_nccl *nccl;
    float *staging; /* of gathers over NCCL: [ranks][gather_rows][cols_max] */
};

STATUS_MUST_CHECK enum status_code comm_gpu_check(cudaError_t err, struct status *st, const char *what);
uint64_t comm_gpu_staging_bytes(const struct comm_gpu_config *c, uint32_t ranks);

/* ---- NCCL, opened at run time (comm_gpu_nccl.c) ---- */

struct comm_nccl;

/* Whether this build can, and the machine has the library; the reason in st. Exchanges nothing. */
STATUS_MUST_CHECK enum status_code comm_nccl_open(struct comm_nccl **out, const char *library, struct status *st);
void comm_nccl_close(struct comm_nccl *n);             /* NULL is fine. Collective unless aborted */
uint32_t comm_nccl_version(const struct comm_nccl *n); /* 22809 */
/* Collective. */
STATUS_MUST_CHECK enum status_code comm_nccl_connect(struct comm_nccl *n, struct comm *c, struct status *st);
/* n bf16 elements, in place. */
STATUS_MUST_CHECK enum status_code comm_nccl_sum(struct comm_nccl *n, void *x, uint64_t count, cudaStream_t stream,
                                                 struct status *st);
/* out[r][count] = in of rank r. */
STATUS_MUST_CHECK enum status_code comm_nccl_gather(struct comm_nccl *n, const float *in, float *out, uint64_t count,
                                                    cudaStream_t stream, struct status *st);
/* What went wrong behind the calls (a peer's connection, a kernel): UNAVAILABLE with the library's words. Takes no time, asks no
 * device; the thread of the other calls. ST_OK when not connected, or aborted. */
STATUS_MUST_CHECK enum status_code comm_nccl_fault(const struct comm_nccl *n, struct status *st);
/* Has what is under way ended, soon; the group is of no use any more. */
void comm_nccl_abort(struct comm_nccl *n);
#endif

#endif
