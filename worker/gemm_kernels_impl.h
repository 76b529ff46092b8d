/* gemm_kernels_impl.h - the kernels of gemm_internal.h, written once and included by gemm_kernels.c for each instruction
 * set, with
 *   ISA            suffix of all names
 *   VW             floats in a vector
 *   TARGET         function attribute that turns the instructions on
 *   BLOCKS(X)      how many rows of W a block has with 1, 2 .. rows of x: what the registers hold
 *   CVT_F16(h)     VW halves to floats
 *   CVT_BF16(h)    VW bfloat16 to floats
 *   FOLD(v)        v to 4 floats, all sums of VW / 4 elements, in some fixed order
 * No include guard: it is meant to be included several times.
 */
#define STRING2(a) #a
#define STRING(a)  STRING2(a)
#define CAT2(a, b) a##_##b
#define CAT(a, b)  CAT2(a, b)
#define NAME(n)    CAT(n, ISA)
#define INLINE     static inline __attribute__((always_inline)) TARGET
/* Instances by their constant arguments, inlined; one that takes them as it goes where each access is checked: they take
 * long to compile. */
#ifdef TANDEM_SANITIZED
#define INSTANCE static __attribute__((noinline)) TARGET
#else
#define INSTANCE INLINE
#endif

typedef float NAME(vf) __attribute__((vector_size(VW * 4)));
typedef uint32_t NAME(vu) __attribute__((vector_size(VW * 4)));
typedef float NAME(vf_mem) __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t NAME(vh) __attribute__((vector_size(VW * 2)));
typedef uint16_t NAME(vh_mem) __attribute__((vector_size(VW * 2), aligned(2), may_alias));

/* VW elements from index i on, widened. */
INLINE NAME(vf) NAME(load)(const void *p, uint64_t i, enum mat_dtype dtype)
{
    if (dtype == MAT_F32)
        return *(const NAME(vf_mem) *)((const float *)p + i);
    NAME(vh) h = *(const NAME(vh_mem) *)((const uint16_t *)p + i);
    if (dtype == MAT_F16)
        return CVT_F16(h);
    return CVT_BF16(h);
}

/* The same for the n < VW last elements of a row; zeros behind. */
INLINE NAME(vf) NAME(load_tail)(const void *p, uint64_t i, uint32_t n, enum mat_dtype dtype)
{
    _Alignas(64) uint8_t buf[VW * 4] = {0};
    uint32_t elem = mat_elem_bytes(dtype);
    memcpy(buf, (const uint8_t *)p + i * elem, (size_t)n * elem);
    return NAME(load)(buf, 0, dtype);
}

/* The sums over four accumulators. Each is formed in the same order, whichever of the four it is. */
INLINE f32x4 NAME(sum4)(NAME(vf) a, NAME(vf) b, NAME(vf) c, NAME(vf) d)
{
    f32x4 fa = FOLD(a), fb = FOLD(b), fc = FOLD(c), fd = FOLD(d);
    f32x4 ab = __builtin_shufflevector(fa, fb, 0, 2, 4, 6) + __builtin_shufflevector(fa, fb, 1, 3, 5, 7);
    f32x4 cd = __builtin_shufflevector(fc, fd, 0, 2, 4, 6) + __builtin_shufflevector(fc, fd, 1, 3, 5, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

/* R rows of W from n on with TT rows of x from t on. One accumulator per product, whatever R and TT are, so that an
 * element's sum is always formed in the same order. */
INSTANCE void NAME(block)(const struct gemm_few_args *a, uint32_t t, uint32_t n, const int R, const int TT,
                          enum mat_dtype dtype)
{
    const uint32_t K = a->w->cols;
    const uint64_t w_row = (uint64_t)K * mat_elem_bytes(dtype), x_row = a->ldx * sizeof(float);
    const char *w = (const char *)a->w->data + n * w_row;
    const char *x = (const char *)(a->x + t * a->ldx);
    NAME(vf) acc[8][6] = {0}; /* sizes known without R and TT: only then does the compiler keep it in registers */
    uint32_t left = K;
    for (; left >= VW; left -= VW) {
        NAME(vf) wv[8];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
            wv[r] = NAME(load)(w + (uint64_t)r * w_row, 0, dtype);
#pragma GCC unroll 32
        for (int i = 0; i < TT; i++) {
            NAME(vf) xv = NAME(load)(x + (uint64_t)i * x_row, 0, MAT_F32);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++)
                acc[r][i] += wv[r] * xv;
        }
        w += VW * mat_elem_bytes(dtype);
        x += VW * sizeof(float);
    }
    if (left) {
#pragma GCC unroll 32
        for (int i = 0; i < TT; i++) {
            NAME(vf) xv = NAME(load_tail)(x + (uint64_t)i * x_row, 0, left, MAT_F32);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++)
                acc[r][i] += NAME(load_tail)(w + (uint64_t)r * w_row, 0, left, dtype) * xv;
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < TT; i++) {
        float *y = a->y + (t + i) * a->ldy + n;
#pragma GCC unroll 32
        for (int r = 0; r < R; r += 4) {
            f32x4 s = NAME(sum4)(acc[r][i], acc[(r + 1) % R][i], acc[(r + 2) % R][i], acc[(r + 3) % R][i]);
            memcpy(y + r, &s, (R - r < 4 ? R - r : 4) * sizeof(float));
        }
    }
}

#define BLOCK(R, TT)                                                                                                   \
    for (; n + R <= end; n += R)                                                                                       \
        NAME(block)(a, t, n, R, TT, dtype);
#define CASE(R, TT)                                                                                                    \
    case TT:                                                                                                           \
        BLOCK(R, TT)                                                                                                   \
        BLOCK(1, TT)                                                                                                   \
        break;

INLINE void NAME(few_of)(const struct gemm_few_args *a, uint32_t first, uint32_t end, enum mat_dtype dtype)
{
    uint32_t groups = (a->t + MAX_TT - 1) / MAX_TT;
    for (uint32_t t = 0, tt; t < a->t; t += tt) {
        tt = (a->t - t + groups - 1) / groups; /* 8 rows are 4 and 4, not 6 and 2 */
        groups--;
        uint32_t n = first;
        switch (tt) {
            BLOCKS(CASE)
        }
    }
}

static TARGET void NAME(few)(const struct gemm_few_args *a, uint32_t first, uint32_t end)
{
    switch (a->w->dtype) {
    case MAT_F32:
        NAME(few_of)(a, first, end, MAT_F32);
        break;
    case MAT_BF16:
        NAME(few_of)(a, first, end, MAT_BF16);
        break;
    case MAT_F16:
        NAME(few_of)(a, first, end, MAT_F16);
        break;
    }
}

INSTANCE void NAME(widen_of)(float *dst, const void *src, uint64_t n, enum mat_dtype dtype)
{
    uint64_t i = 0;
    for (; i + VW <= n; i += VW)
        *(NAME(vf_mem) *)(dst + i) = NAME(load)(src, i, dtype);
    if (i < n) {
        NAME(vf) v = NAME(load_tail)(src, i, (uint32_t)(n - i), dtype);
        memcpy(dst + i, &v, (n - i) * sizeof(float));
    }
}

static TARGET void NAME(widen)(float *dst, const void *src, uint64_t n, enum mat_dtype dtype)
{
    switch (dtype) {
    case MAT_F32:
        memcpy(dst, src, n * sizeof(float));
        break;
    case MAT_BF16:
        NAME(widen_of)(dst, src, n, MAT_BF16);
        break;
    case MAT_F16:
        NAME(widen_of)(dst, src, n, MAT_F16);
        break;
    }
}

const struct gemm_kernels NAME(gemm_kernels) = {
    .name = STRING(ISA),
    .few = NAME(few),
    .widen = NAME(widen),
};

#undef STRING2
#undef STRING
#undef CAT2
#undef CAT
#undef NAME
#undef INLINE
#undef INSTANCE
#undef BLOCK
#undef CASE
#undef ISA
#undef VW
#undef TARGET
#undef BLOCKS
#undef MAX_TT
#undef CVT_F16
#undef CVT_BF16
#undef FOLD
