/* gemm_kernels.c - the kernels of gemm_kernels_impl.h for portable C, AVX2 and AVX-512, and the choice between them. */
#include <stdint.h>
#include <string.h>

#include "worker/gemm_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* Vectors of 4 floats: SSE2, NEON, or whatever the compiler makes of them. */
typedef float f32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8)));

/* Exponent and mantissa moved to their places in a float stand for a value 2^-112 times too small, denormals included;
 * the multiplication is exact. Infinity and NaN get the exponent that the multiplication cannot give them. */
static inline f32x4 cvt_f16_portable(u16x4 h)
{
    u32x4 u = __builtin_convertvector(h, u32x4);
    u32x4 sign = (u & 0x8000) << 16, mag = (u & 0x7fff) << 13;
    u32x4 special = (u32x4)(mag >= 0x0f800000) & 0x7f800000;
    f32x4 f = (f32x4)mag * 0x1p112f;
    return (f32x4)((u32x4)f | special | sign);
}

#define ISA         portable
#define VW          4
#define TARGET      /* what the compiler was told */
#define MAX_TT      4
#define BLOCKS(X)   X(4, 1) X(4, 2) X(3, 3) X(2, 4)
#define CVT_F16(h)  cvt_f16_portable(h)
#define CVT_BF16(h) (f32x4)(__builtin_convertvector(h, u32x4) << 16)
#define FOLD(v)     (v)
#include "worker/gemm_kernels_impl.h"

#if defined(__x86_64__)
#define ISA         avx2
#define VW          8
#define TARGET      __attribute__((target("avx2,fma,f16c")))
#define MAX_TT      4
#define BLOCKS(X)   X(8, 1) X(4, 2) X(3, 3) X(3, 4)
#define CVT_F16(h)  _mm256_cvtph_ps((__m128i)(h))
#define CVT_BF16(h) (__m256) _mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)(h)), 16)
#define FOLD(v)     (f32x4) _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))
#include "worker/gemm_kernels_impl.h"

/* Halves onto each other, twice. */
static inline __attribute__((always_inline, target("avx512f,avx512dq"))) f32x4 fold_avx512(__m512 v)
{
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return (f32x4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

#define ISA         avx512
#define VW          16
#define TARGET      __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define MAX_TT      6
#define BLOCKS(X)   X(8, 1) X(8, 2) X(4, 3) X(4, 4) X(4, 5) X(4, 6)
#define CVT_F16(h)  _mm512_cvtph_ps((__m256i)(h))
#define CVT_BF16(h) (__m512) _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)(h)), 16)
#define FOLD(v)     fold_avx512(v)
#include "worker/gemm_kernels_impl.h"
#endif

#if defined(__x86_64__)
static int has_f16c(void)
{
#if defined(__clang__) /* clang 14 does not know it by name; the instruction traps on virtual machines, so only here */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
#else
    return __builtin_cpu_supports("f16c");
#endif
}
#endif

uint32_t gemm_kernels_list(const struct gemm_kernels *out[GEMM_MAX_KERNELS])
{
    uint32_t n = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        out[n++] = &gemm_kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        out[n++] = &gemm_kernels_avx2;
#endif
    out[n++] = &gemm_kernels_portable;
    return n;
}
