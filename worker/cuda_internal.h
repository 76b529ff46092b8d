/* cuda_internal.h - the CUDA back end of a rank, shared by its own C files: backend_cuda.c (devices, sessions, memory for
 * weights), cuda_forward.c (create), cuda_run.c (a step), cuda_gemm.c (products).
 *
 * One stream carries all of a step. Everything that changes from step to step is written to pinned memory of the host and
 * goes over in one copy; the launches that follow depend on the bucket alone, so they can be replayed as a graph.
 */
#ifndef TANDEM_CUDA_INTERNAL_H
#define TANDEM_CUDA_INTERNAL_H

#include <stdbool.h>

#include <cuda_runtime_api.h>

#include "attention/attention.h"
#include "comm/comm.h"
#include "worker/cuda_kernels.h"
#include "worker/forward.h"

/* "what: text (name)"; code by err: RESOURCE_EXHAUSTED when memory is out, else INTERNAL. Clears the error that the
 * runtime keeps. ST_OK stays ST_OK. */
enum status_code cuda_check(cudaError_t err, struct status *st, const char *what);

/* ---- products (cuda_gemm.c) ---- */

struct cuda_gemm;

#define CUDA_GEMM_WORKSPACE_BYTES (64u << 20)

struct cuda_product {
    const struct mat *w; /* in the device's memory, BF16 */
    const void *x;       /* [rows][w->cols] bf16 */
    void *y;             /* [rows][w->rows] */
    enum cuda_out out;
    uint32_t rows;
};

STATUS_MUST_CHECK enum status_code cuda_gemm_create(struct cuda_gemm **out, cudaStream_t stream, struct status *st);
void cuda_gemm_destroy(struct cuda_gemm *g); /* NULL is fine */
#define CUDA_GEMM_TURNS 4

/* Picks the fastest way for products of this shape by trying them on these matrices of one shape in turn, so that none is
 * in the cache when its turn comes (p->w is one of them), the results going to scratch (as large as y); nothing when the
 * way is known. Waits for the stream. */
STATUS_MUST_CHECK enum status_code cuda_gemm_prepare(struct cuda_gemm *g, const struct cuda_product *p,
                                                     const void *const w[CUDA_GEMM_TURNS], void *scratch,
                                                     struct status *st);
/* Whether the shape, which was prepared, is computed by cuda_few_rows. */
bool cuda_gemm_is_few(const struct cuda_gemm *g, const struct cuda_product *p);
/* Launches. The shape was prepared. */
STATUS_MUST_CHECK enum status_code cuda_gemm_run(struct cuda_gemm *g, const struct cuda_product *p, struct status *st);

/* ---- the pass ---- */

#define CUDA_BUCKETS_MAX 64

/* Launches of the layers for up to `rows` rows. */
struct cuda_bucket {
    uint32_t rows;
    bool prepared;
    cudaGraphExec_t graph[2]; /* of steps with chunks; of decodes alone. NULL: not captured yet */
    bool ran[2];
};

struct forward {
    struct forward_config cfg;
    cudaStream_t stream;
    struct cuda_gemm *gemm;
    struct attn_gpu *attn[2]; /* whole context; window. NULL: no such layers */
    struct comm_gpu *group;   /* NULL: one rank */
    cudaEvent_t finished;
    bool graphs;
    uint32_t n_buckets;
    struct cuda_bucket bucket[CUDA_BUCKETS_MAX];
    uint32_t head_rows; /* logits are made for so many rows at a time */

    /* device memory, one allocation */
    void *arena;
    float *x;                            /* [T][hidden] */
    void *h, *qkv, *att, *gate_up, *act; /* [T][...] bf16; gate_up is scratch of cuda_gemm_prepare, too */
    float *cosine, *sine;                /* [max_context][D / 2] */
    void *picked;                        /* [head_rows][hidden] bf16 */
    float *logits;                       /* [head_rows][V], of all ranks */
    struct cuda_choice *choice;          /* [max_samples] */

    /* of the step under way: once in the device's memory, once pinned; the same layout */
    void *step, *host_step;
    uint64_t step_bytes;
    struct cuda_row *row, *host_row;          /* [T] */
    struct attn_seq *seq, *host_seq;          /* [max_seqs] */
    uint32_t *counts, *host_counts;           /* [1] sequences */
    struct cuda_sample *sample, *host_sample; /* [max_samples] */

    /* pinned */
    struct cuda_choice *host_choice; /* [max_samples] */
    uint32_t *host_fault;            /* [2] of attn */

    /* rows whose options the device does not know: sampled on the host */
    struct sampler *sampler;
    float *host_logits, *host_adjusted; /* pinned [V]; [V] */
};

uint32_t cuda_forward_max_seqs(const struct forward_config *cfg);
enum status_code cuda_forward_run(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                  struct status *st);

extern const struct forward_ops forward_ops_cuda;

#endif
