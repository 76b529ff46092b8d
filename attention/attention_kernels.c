/* attention_kernels.c - the kernels of attention_kernels_impl.h for portable C, AVX2 and AVX-512, and the choice. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention/attention_host_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x4_mem __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x4 __attribute__((vector_size(8)));

/* 2^r on [-1/2, 1/2] is 1 + C1 r + .. + C6 r^6 with a relative error of 2e-9 before rounding (minimax, constant term
 * fixed, so that 2^0 is 1 exactly). */
#define EXP2_C1 0.693147203f
#define EXP2_C2 0.240226479f
#define EXP2_C3 0.0555033247f
#define EXP2_C4 0.00961843738f
#define EXP2_C5 0.00133988760f
#define EXP2_C6 0.000153533599f

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

static inline f32x4 max_portable(f32x4 a, f32x4 b)
{
    i32x4 keep = a > b;
    return (f32x4)(((i32x4)a & keep) | ((i32x4)b & ~keep));
}

#define ISA         portable
#define VW          4
#define TARGET      /* what the compiler was told */
#define MM_R        4
#define MM_NV       2
#define FEW_KB      4
#define CVT_F16(h)  cvt_f16_portable(h)
#define CVT_BF16(h) (f32x4)(__builtin_convertvector(h, u32x4) << 16)
#define MAX(a, b)   max_portable(a, b)
#define FOLD(v)     (v)
#define FOLD_MAX(v) (v)
#include "attention/attention_kernels_impl.h"

#if defined(__x86_64__)
#define ISA         avx2
#define VW          8
#define TARGET      __attribute__((target("avx2,fma,f16c")))
#define MM_R        6
#define MM_NV       2
#define FEW_KB      8
#define CVT_F16(h)  _mm256_cvtph_ps((__m128i)(h))
#define CVT_BF16(h) (__m256) _mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)(h)), 16)
#define MAX(a, b)   _mm256_max_ps(a, b)
#define FOLD(v)     (f32x4) _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))
#define FOLD_MAX(v) (f32x4) _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))
#include "attention/attention_kernels_impl.h"

/* Halves onto each other, twice. */
static inline __attribute__((always_inline, target("avx512f,avx512dq"))) f32x4 fold_avx512(__m512 v)
{
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return (f32x4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

static inline __attribute__((always_inline, target("avx512f,avx512dq"))) f32x4 fold_max_avx512(__m512 v)
{
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return (f32x4)_mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

#define ISA         avx512
#define VW          16
#define TARGET      __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define MM_R        6
#define MM_NV       4
#define FEW_KB      8
#define CVT_F16(h)  _mm512_cvtph_ps((__m256i)(h))
#define CVT_BF16(h) (__m512) _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)(h)), 16)
#define MAX(a, b)   _mm512_max_ps(a, b)
#define FOLD(v)     fold_avx512(v)
#define FOLD_MAX(v) fold_max_avx512(v)
#include "attention/attention_kernels_impl.h"
#endif

#if defined(__x86_64__)
/* Not every compiler knows it by name. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

uint32_t host_kernels_list(const struct host_kernels *out[HOST_MAX_KERNELS])
{
    uint32_t n = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        out[n++] = &host_kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        out[n++] = &host_kernels_avx2;
#endif
    out[n++] = &host_kernels_portable;
    return n;
}
