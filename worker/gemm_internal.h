/* gemm_internal.h - the kernels behind gemm.h, one table per instruction set. */
#ifndef TANDEM_GEMM_INTERNAL_H
#define TANDEM_GEMM_INTERNAL_H

#include "worker/gemm.h"

/* y[i][n] = sum over k of x[i][k] * W[n][k], for i < t and first <= n < end. The sum of an element is formed in the
 * same order whatever first and end are. */
struct gemm_few_args {
    float *y;
    uint64_t ldy;
    const float *x;
    uint64_t ldx;
    uint32_t t;
    const struct mat *w;
};

struct gemm_kernels {
    const char *name;
    void (*few)(const struct gemm_few_args *a, uint32_t first, uint32_t end);
    void (*widen)(float *dst, const void *src, uint64_t n, enum mat_dtype dtype);
};

extern const struct gemm_kernels gemm_kernels_portable;
extern const struct gemm_kernels gemm_kernels_avx2;   /* x86-64 only */
extern const struct gemm_kernels gemm_kernels_avx512; /* x86-64 only */

enum { GEMM_MAX_KERNELS = 3 };

/* Those that this CPU runs, the best first; returns how many, at least 1. */
uint32_t gemm_kernels_list(const struct gemm_kernels *out[GEMM_MAX_KERNELS]);

#endif
