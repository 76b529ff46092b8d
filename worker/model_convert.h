/* model_convert.h - rows of weights from one dtype to another, and random ones. Prefix model_. */
#ifndef TANDEM_MODEL_CONVERT_H
#define TANDEM_MODEL_CONVERT_H

#include <stdint.h>

#include "worker/gemm.h"

#ifdef __CUDACC__
#define MODEL_INLINE static inline __host__ __device__
#else
#define MODEL_INLINE static inline
#endif

/* n elements, neither side aligned. To BF16: to nearest, ties to even; NaN stays NaN. To F16: from F16 only. */
void model_convert(void *out, enum mat_dtype to, const void *in, enum mat_dtype from, uint64_t n);

/* A tensor's own stream of random numbers. */
uint64_t model_random_seed(const char *tensor);
/* out[i]: element first + i of the stream, each evenly spread over -scale .. scale. */
void model_random(void *out, enum mat_dtype to, uint64_t seed, uint64_t first, uint64_t n, float scale);

/* One element; the same bits on the host and on a device: all steps are exact but the last product. */
MODEL_INLINE float model_random_value(uint64_t seed, uint64_t index, float scale)
{
    uint64_t z = seed + index * 0x9E3779B97F4A7C15ull; /* splitmix64 (Steele, Lea, Flood, 2014) */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (float)((int32_t)(z >> 40) - (1 << 23)) * 0x1p-23f * scale;
}

#endif
