/* gemm.h - matrices of weights on the host and their product with activations. Prefix gemm_.
 *
 *   y[T][N] = x[T][K] * W[N][K]^T        float32 activations, weights in the dtype of the file
 *
 * Few rows (decode) are bound by memory: own vectorised kernels read each weight once, in its stored dtype. Many rows go
 * through the BLAS (OpenBLAS sgemm, one call per thread and panel; 16-bit panels are widened first).
 */
#ifndef TANDEM_GEMM_H
#define TANDEM_GEMM_H

#include <stdint.h>

#include "proto/status.h"
#include "worker/threads.h"

enum mat_dtype { MAT_F32, MAT_BF16, MAT_F16 };

struct mat {
    const void *data; /* row-major, rows contiguous, 64-byte aligned start; NULL when rows or cols is 0 */
    enum mat_dtype dtype;
    uint32_t rows; /* N, outputs */
    uint32_t cols; /* K, inputs */
};

struct gemm;

/* Scratch for widened panels; max_cols is the largest K. pool: outlives the gemm. */
STATUS_MUST_CHECK enum status_code gemm_create(struct gemm **out, struct thread_pool *pool, uint32_t max_cols,
                                               struct status *st);
void gemm_destroy(struct gemm *g); /* NULL is fine */

/* y row stride ldy and x row stride ldx in floats. T, N or K of 0 is fine (K 0: y = 0). One thread at a time. */
void gemm_run(struct gemm *g, float *y, uint64_t ldy, const float *x, uint64_t ldx, uint32_t t, const struct mat *w);

static inline uint32_t mat_elem_bytes(enum mat_dtype d)
{
    return d == MAT_F32 ? 4 : 2;
}
/* One row, widened: for embedding look-ups. out has w->cols floats. */
void gemm_row(float *out, const struct mat *w, uint32_t row);

#endif
