/* kernels_gpu.h - of check_kernels_gpu: device memory with guards, what comes out against what should, and the groups of
 * cases. Prefix kg_. Whatever fails but a comparison ends the program with a message.
 */
#ifndef TANDEM_TESTS_KERNELS_GPU_H
#define TANDEM_TESTS_KERNELS_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#define KG_BLOCKS_MAX   32
#define KG_COUNT(array) ((uint32_t)(sizeof(array) / sizeof *(array)))

struct kg {
    bool small; /* few and small shapes, for checkers that make kernels slow */
    bool bare;  /* no guards, inputs not poisoned: a checker sees what is read before it was written */
    cudaStream_t stream;
    uint64_t random;
    unsigned cases, failures;

    /* of the case under way */
    char name[160], problem[240];
    uint64_t values;
    double share, error, allowed; /* where the error is the largest share of what is allowed */
    uint32_t n_blocks;
    struct kg_block {
        uint8_t *base, *at;
        size_t bytes;
    } block[KG_BLOCKS_MAX];
};

/* A case from here to kg_end, which waits for the kernels, looks at the guards, frees all memory and says how it went. */
void kg_begin(struct kg *k, const char *name, ...) __attribute__((format(printf, 2, 3)));
void kg_end(struct kg *k);

/* Device memory, 256-byte aligned, until kg_end; in front of it and behind it are bytes 0xff, which are NaN as bf16 and as
 * float32 and must stay. */
void *kg_give(struct kg *k, const void *host, size_t bytes);
void *kg_poisoned(struct kg *k, size_t bytes); /* 0xff itself */
void kg_poison(struct kg *k, void *device, size_t bytes);
/* Waits for the kernels. */
void kg_take(struct kg *k, void *host, const void *device, size_t bytes);
void kg_launched(const struct kg *k, cudaError_t err);

/* Element `at` of `what`. A NaN is never near. */
void kg_near(struct kg *k, const char *what, uint64_t at, double got, double want, double allowed);
void kg_same(struct kg *k, const char *what, uint64_t at, uint64_t got, uint64_t want);
/* Bytes that nothing may have written. */
void kg_untouched(struct kg *k, const char *what, const void *host, size_t bytes);

/* ---- data ---- */

void *kg_zeros(size_t count, size_t size); /* free() */
uint32_t kg_below(struct kg *k, uint32_t n);
float kg_value(struct kg *k); /* in -1 .. 1 */
float *kg_floats(struct kg *k, size_t n, float scale);
uint16_t *kg_halves(struct kg *k, size_t n, float scale); /* bf16 */
uint16_t kg_bf16(float x);                                /* to nearest, ties to even; not for NaN */
float kg_float(uint16_t bf16);
uint32_t kg_bits(float x);

#define KG_BF16_OFF 0x1.02p-8 /* one rounding to bf16, relative, and a little for float32 before it */

/* y[T][N] = x[T][K] W[N][K]^T in double, and size: the same of absolute values. */
void kg_product(double *y, double *size, const uint16_t *x, const uint16_t *w, uint32_t t, uint32_t n, uint32_t k);
/* What a sum of float32 may be off by that cuda_few.cu or cuda_some.cu forms of k products. */
double kg_few_off(double size, uint32_t k);

/* ---- groups; each one's cases ---- */

void kg_embed(struct kg *k);
void kg_norm(struct kg *k);
void kg_swiglu(struct kg *k);
void kg_random(struct kg *k);
void kg_rope(struct kg *k);
void kg_few(struct kg *k);
void kg_glu(struct kg *k);
void kg_adjust(struct kg *k);
void kg_sample(struct kg *k);
void kg_score(struct kg *k);

#endif
