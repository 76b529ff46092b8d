/* attention_kernels_impl.h - the kernels of attention_host_internal.h, written once and included by attention_kernels.c
 * for each instruction set, with
 *   ISA           suffix of all names
 *   VW            floats in a vector
 *   TARGET        function attribute that turns the instructions on
 *   MM_R, MM_NV   rows and vectors of a register block of the tile products
 *   CVT_F16(h), CVT_BF16(h)   VW halves to floats
 *   FEW_KB        keys of a register block with one row
 *   MAX(a, b)     the greater; NaN where b is NaN
 *   FOLD(v)       v to 4 floats, sums of VW / 4 elements
 *   FOLD_MAX(v)   likewise, the greatest
 * No include guard: it is meant to be included several times.
 */
#define STRING2(a) #a
#define STRING(a)  STRING2(a)
#define CAT2(a, b) a##_##b
#define CAT(a, b)  CAT2(a, b)
#define NAME(n)    CAT(n, ISA)
#define INLINE     static inline __attribute__((always_inline)) TARGET
#define UNROLL     _Pragma("GCC unroll 32")
/* Instances by their constant arguments, inlined; one that takes them as it goes where each access is checked: they would
 * take a minute to compile. */
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

/* VW elements, widened. */
INLINE NAME(vf) NAME(load)(const void *p, enum attn_dtype dtype)
{
    if (dtype == ATTN_F32)
        return *(const NAME(vf_mem) *)p;
    NAME(vh) h = *(const NAME(vh_mem) *)p;
    return dtype == ATTN_F16 ? CVT_F16(h) : CVT_BF16(h);
}

/* 8 elements, zeros behind: the end of a row whose D is no multiple of a vector of 16. */
INLINE NAME(vf) NAME(load8)(const void *p, enum attn_dtype dtype)
{
    _Alignas(64) char buf[VW * 4 + 32] = {0};
    memcpy(buf, p, dtype == ATTN_F32 ? 32 : 16);
    return NAME(load)(buf, dtype);
}

INLINE void NAME(store)(float *p, NAME(vf) v)
{
    *(NAME(vf_mem) *)p = v;
}

INLINE NAME(vf) NAME(splat)(float x)
{
    return x - (NAME(vf)){0};
}

#define EXP2_ROUND 0x1.8p23f /* adding it leaves the nearest integer in the low bits */

/* (2^r - 1) / r on [-1/2, 1/2]. */
INLINE NAME(vf) NAME(exp2_rest)(NAME(vf) r)
{
    NAME(vf) p = EXP2_C6 * r + EXP2_C5;
    p = p * r + EXP2_C4;
    p = p * r + EXP2_C3;
    p = p * r + EXP2_C2;
    return p * r + EXP2_C1;
}

/* 2^x by a polynomial on [-1/2, 1/2]: relative error below 2e-7. Below -126 the result stays at 2^-126; x is never
 * above 0 but for infinities and NaN, and NaN stays NaN. */
INLINE NAME(vf) NAME(exp2v)(NAME(vf) x)
{
    x = MAX(NAME(splat)(-126.0f), x);
    NAME(vf) shifted = x + EXP2_ROUND;
    NAME(vf) r = x - (shifted - EXP2_ROUND);
    NAME(vf) p = NAME(exp2_rest)(r) * r + 1.0f;
    NAME(vu) n = (NAME(vu))shifted - 0x4B400000; /* the bits of EXP2_ROUND */
    return p * (NAME(vf))((n + 127) << 23);
}

/* cap * tanh(x / cap), x and cap base 2. With 2^n (1 + m) the power of 2 that stands for e^-2y, tanh(y) is
 * -(2^n (1 + m) - 1) / (2^n (1 + m) + 1), and 2^n - 1 + 2^n m cancels nowhere: the relative error stays below 4e-7. */
INLINE NAME(vf) NAME(capv)(NAME(vf) x, float cap)
{
    NAME(vu) sign = (NAME(vu))x & 0x80000000;
    NAME(vf) y = (NAME(vf))((NAME(vu))x & 0x7fffffff) * (-2.88539008f / cap);
    y = MAX(NAME(splat)(-126.0f), y);
    NAME(vf) shifted = y + EXP2_ROUND;
    NAME(vf) r = y - (shifted - EXP2_ROUND);
    NAME(vf) m = NAME(exp2_rest)(r) * r;
    NAME(vf) power = (NAME(vf))(((NAME(vu))shifted - 0x4B400000 + 127) << 23);
    NAME(vf) less = power - 1.0f + power * m; /* e^-2y - 1 */
    NAME(vf) t = -less / (less + 2.0f) * cap;
    return (NAME(vf))((NAME(vu))t | sign);
}

static TARGET float NAME(exp2s)(float x)
{
    return NAME(exp2v)(NAME(splat)(x))[0];
}

/* The sums over four accumulators. */
INLINE f32x4 NAME(sum4)(NAME(vf) a, NAME(vf) b, NAME(vf) c, NAME(vf) d)
{
    f32x4 fa = FOLD(a), fb = FOLD(b), fc = FOLD(c), fd = FOLD(d);
    f32x4 ab = __builtin_shufflevector(fa, fb, 0, 2, 4, 6) + __builtin_shufflevector(fa, fb, 1, 3, 5, 7);
    f32x4 cd = __builtin_shufflevector(fc, fd, 0, 2, 4, 6) + __builtin_shufflevector(fc, fd, 1, 3, 5, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

INLINE float NAME(sum)(NAME(vf) v)
{
    return NAME(sum4)(v, v, v, v)[0];
}

static TARGET void NAME(scale)(float *dst, const float *src, uint32_t n, float factor)
{
    uint32_t i = 0;
    for (; i + VW <= n; i += VW)
        NAME(store)(dst + i, NAME(load)(src + i, ATTN_F32) * factor);
    for (; i < n; i++)
        dst[i] = src[i] * factor;
}

static TARGET void NAME(add_scaled)(float *dst, const float *src, uint32_t n, float factor)
{
    uint32_t i = 0;
    for (; i + VW <= n; i += VW)
        NAME(store)(dst + i, NAME(load)(dst + i, ATTN_F32) + NAME(load)(src + i, ATTN_F32) * factor);
    for (; i < n; i++)
        dst[i] += src[i] * factor;
}

/* Row i after the scores of a tile: raises the maximum, turns scores to powers (0 for keys the row does not see, up to
 * the vector's end), and scales what was summed so far. n: keys of the tile, first is key `from`. */
INSTANCE void NAME(softmax_row)(const struct host_block *b, struct host_scratch *s, uint32_t i, uint32_t from,
                                uint32_t n)
{
    float *p = s->p + (uint64_t)i * TILE_KEYS;
    uint32_t seen = s->limit[i] <= from ? 0 : s->limit[i] - from < n ? s->limit[i] - from : n;
    uint32_t skip = s->start[i] <= from ? 0 : s->start[i] - from; /* keys that slid out of the row's window */
    if (skip >= seen) {
        memset(p, 0, (n + VW - 1) / VW * VW * sizeof *p);
        return;
    }
    for (uint32_t j = 0; b->cap > 0 && j < seen; j += VW)
        NAME(store)(p + j, NAME(capv)(NAME(load)(p + j, ATTN_F32), b->cap));
    for (uint32_t j = 0; j < skip; j++)
        p[j] = -INFINITY;
    for (uint32_t j = seen; j % VW; j++)
        p[j] = -INFINITY;
    NAME(vf) mv = NAME(load)(p, ATTN_F32);
    for (uint32_t j = VW; j < seen; j += VW)
        mv = MAX(mv, NAME(load)(p + j, ATTN_F32));
    /* A NaN may get lost here; its power is NaN all the same. */
    f32x4 m4 = FOLD_MAX(mv);
    float m01 = m4[0] > m4[1] ? m4[0] : m4[1], m23 = m4[2] > m4[3] ? m4[2] : m4[3];
    float max = m01 > m23 ? m01 : m23;
    if (max > s->max[i]) {
        float factor = NAME(exp2s)(s->max[i] - max);
        float *out = s->out + (uint64_t)i * b->DP;
        s->sum[i] *= factor;
        for (uint32_t d = 0; d < b->DP; d += VW)
            NAME(store)(out + d, NAME(load)(out + d, ATTN_F32) * factor);
        s->max[i] = max;
    }
    max = s->max[i];
    NAME(vf) sum = {0};
    uint32_t j = 0;
    for (; j < seen; j += VW) {
        NAME(vf) e = NAME(exp2v)(NAME(load)(p + j, ATTN_F32) - max);
        NAME(store)(p + j, e);
        /* What was -inf became 2^-126, not 0: it must be 0 so that values the row does not see cannot matter. */
        if (j < skip || j + VW > seen) {
            for (uint32_t z = j; z < skip && z < j + VW; z++)
                p[z] = 0;
            for (uint32_t z = seen; z < j + VW; z++)
                p[z] = 0;
            e = NAME(load)(p + j, ATTN_F32);
        }
        sum += e;
    }
    for (; j < n; j += VW)
        NAME(store)(p + j, (NAME(vf)){0});
    s->sum[i] += NAME(sum)(sum);
}

/* ---- few rows: keys and values are read in place, in their dtype ---- */

/* Scores of KB keys (1, 4 or 8) with R rows: dot products along D. */
INSTANCE void NAME(dots)(const struct host_block *b, const float *q, const char *k, float *p, const int KB, const int R,
                         enum attn_dtype dtype)
{
    const uint32_t elem = dtype == ATTN_F32 ? 4 : 2;
    const uint64_t stride = b->token_stride;
    NAME(vf) acc[8][4] = {0};
    uint32_t d = 0;
#define DOT_STEP(LOAD)                                                                                                 \
    do {                                                                                                               \
        NAME(vf) kv[8];                                                                                                \
        UNROLL for (int j = 0; j < KB; j++) kv[j] = LOAD(k + (uint64_t)j * stride + (uint64_t)d * elem, dtype);        \
        UNROLL for (int r = 0; r < R; r++)                                                                             \
        {                                                                                                              \
            NAME(vf) qv = NAME(load)(q + (uint64_t)r * b->DP + d, ATTN_F32);                                           \
            UNROLL for (int j = 0; j < KB; j++) acc[j][r] += kv[j] * qv;                                               \
        }                                                                                                              \
    } while (0)
    for (; d + VW <= b->D; d += VW)
        DOT_STEP(NAME(load));
    if (d < b->D)
        DOT_STEP(NAME(load8));
#undef DOT_STEP
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int j = 0; j < KB; j += 4)
        {
            f32x4 s = NAME(sum4)(acc[j][r], acc[(j + 1) % KB][r], acc[(j + 2) % KB][r], acc[(j + 3) % KB][r]);
            memcpy(p + r * TILE_KEYS + j, &s, (KB < 4 ? KB : 4) * sizeof(float));
        }
    }
}

/* Scores of n keys with R rows. */
INLINE void NAME(scores)(const struct host_block *b, const float *q, const char *k, float *p, uint32_t n, const int KB,
                         const int R, enum attn_dtype dtype)
{
    uint32_t j = 0;
    for (; j + KB <= n; j += KB)
        NAME(dots)(b, q, k + j * b->token_stride, p + j, KB, R, dtype);
    for (; j < n; j++)
        NAME(dots)(b, q, k + j * b->token_stride, p + j, 1, R, dtype);
}

/* out[R][NV vectors] += p[R][n] * v[n]; HALF: the last vector of a row, 8 elements. */
INSTANCE void NAME(values)(const struct host_block *b, float *out, const float *p, const char *v, uint32_t n,
                           const int R, const int NV, const int HALF, enum attn_dtype dtype)
{
    NAME(vf) acc[4][8];
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int c = 0; c < NV; c++) acc[r][c] = NAME(load)(out + (uint64_t)r * b->DP + c * VW, ATTN_F32);
    }
    for (uint32_t j = 0; j < n; j++) {
        UNROLL for (int c = 0; c < NV; c++)
        {
            const char *at = v + c * VW * (dtype == ATTN_F32 ? 4 : 2);
            NAME(vf) vv = HALF ? NAME(load8)(at, dtype) : NAME(load)(at, dtype);
            UNROLL for (int r = 0; r < R; r++) acc[r][c] += vv * p[r * TILE_KEYS + j];
        }
        v += b->token_stride;
    }
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int c = 0; c < NV; c++) NAME(store)(out + (uint64_t)r * b->DP + c * VW, acc[r][c]);
    }
}

INLINE void NAME(values_row)(const struct host_block *b, float *out, const float *p, const char *v, uint32_t n,
                             const int R, enum attn_dtype dtype)
{
    const uint32_t elem = dtype == ATTN_F32 ? 4 : 2;
    uint32_t d = 0;
    if (R <= 2) {
        for (; d + 8 * VW <= b->D; d += 8 * VW)
            NAME(values)(b, out + d, p, v + (uint64_t)d * elem, n, R, 8, 0, dtype);
    }
    for (; d + 4 * VW <= b->D; d += 4 * VW)
        NAME(values)(b, out + d, p, v + (uint64_t)d * elem, n, R, 4, 0, dtype);
    for (; d + 2 * VW <= b->D; d += 2 * VW)
        NAME(values)(b, out + d, p, v + (uint64_t)d * elem, n, R, 2, 0, dtype);
    for (; d + VW <= b->D; d += VW)
        NAME(values)(b, out + d, p, v + (uint64_t)d * elem, n, R, 1, 0, dtype);
    if (d < b->D)
        NAME(values)(b, out + d, p, v + (uint64_t)d * elem, n, R, 1, 1, dtype);
}

/* Keys per pass over the rows: when more rows than a register block has walk the same keys, these are still in L1. */
#define PASS_KEYS 16

INLINE void NAME(few_of)(const struct host_block *b, struct host_scratch *s, enum attn_dtype dtype)
{
    for (uint32_t from = b->k_begin; from < b->k_end; from += TILE_KEYS) {
        uint32_t n = b->k_end - from < TILE_KEYS ? b->k_end - from : TILE_KEYS;
        for (uint32_t j = 0; j < n; j += PASS_KEYS) {
            uint32_t nj = n - j < PASS_KEYS ? n - j : PASS_KEYS, i = 0;
            const char *k = b->k + (uint64_t)(from + j) * b->token_stride;
            for (; i + 4 <= b->rows; i += 4)
                NAME(scores)(b, s->q + (uint64_t)i * b->DP, k, s->p + i * TILE_KEYS + j, nj, 4, 4, dtype);
            for (; i + 2 <= b->rows; i += 2)
                NAME(scores)(b, s->q + (uint64_t)i * b->DP, k, s->p + i * TILE_KEYS + j, nj, 4, 2, dtype);
            for (; i < b->rows; i++)
                NAME(scores)(b, s->q + (uint64_t)i * b->DP, k, s->p + i * TILE_KEYS + j, nj, FEW_KB, 1, dtype);
        }
        for (uint32_t i = 0; i < b->rows; i++)
            NAME(softmax_row)(b, s, i, from, n);
        for (uint32_t j = 0; j < n; j += PASS_KEYS) {
            uint32_t nj = n - j < PASS_KEYS ? n - j : PASS_KEYS, i = 0;
            const char *v = b->v + (uint64_t)(from + j) * b->token_stride;
            for (; i + 4 <= b->rows; i += 4)
                NAME(values_row)(b, s->out + (uint64_t)i * b->DP, s->p + i * TILE_KEYS + j, v, nj, 4, dtype);
            for (; i + 2 <= b->rows; i += 2)
                NAME(values_row)(b, s->out + (uint64_t)i * b->DP, s->p + i * TILE_KEYS + j, v, nj, 2, dtype);
            for (; i < b->rows; i++)
                NAME(values_row)(b, s->out + (uint64_t)i * b->DP, s->p + i * TILE_KEYS + j, v, nj, 1, dtype);
        }
    }
}

INLINE void NAME(start)(const struct host_block *b, struct host_scratch *s)
{
    for (uint32_t i = 0; i < b->rows; i++) {
        s->max[i] = -INFINITY;
        s->sum[i] = 0;
    }
    memset(s->out, 0, (uint64_t)b->rows * b->DP * sizeof *s->out);
}

static TARGET void NAME(few)(const struct host_block *b, struct host_scratch *s)
{
    NAME(start)(b, s);
    switch (b->dtype) {
    case ATTN_F32:
        NAME(few_of)(b, s, ATTN_F32);
        break;
    case ATTN_BF16:
        NAME(few_of)(b, s, ATTN_BF16);
        break;
    case ATTN_F16:
        NAME(few_of)(b, s, ATTN_F16);
        break;
    }
}

/* ---- many rows: a tile of keys is widened and transposed, then both products are plain matrix products ---- */

/* c[R][NV vectors] (+)= a[R][n] * b[n][NV vectors], row strides lda, ldb, ldc. */
INSTANCE void NAME(mm_block)(float *c, uint64_t ldc, const float *a, uint64_t lda, const float *b, uint64_t ldb,
                             uint32_t n, const int R, const int NV, const int ADD)
{
    NAME(vf) acc[6][4];
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] =
            ADD ? NAME(load)(c + (uint64_t)r * ldc + v * VW, ATTN_F32) : (NAME(vf)){0};
    }
    for (uint32_t k = 0; k < n; k++) {
        NAME(vf) bv[4];
        UNROLL for (int v = 0; v < NV; v++) bv[v] = NAME(load)(b + v * VW, ATTN_F32);
        UNROLL for (int r = 0; r < R; r++)
        {
            UNROLL for (int v = 0; v < NV; v++) acc[r][v] += bv[v] * a[(uint64_t)r * lda];
        }
        a++;
        b += ldb;
    }
    UNROLL for (int r = 0; r < R; r++)
    {
        UNROLL for (int v = 0; v < NV; v++) NAME(store)(c + (uint64_t)r * ldc + v * VW, acc[r][v]);
    }
}

/* The same for any number of vectors. */
INLINE void NAME(mm_rows)(float *c, uint64_t ldc, const float *a, uint64_t lda, const float *b, uint64_t ldb,
                          uint32_t n, uint32_t vectors, const int R, const int ADD)
{
    uint32_t v = 0;
    for (; v + MM_NV <= vectors; v += MM_NV)
        NAME(mm_block)(c + v * VW, ldc, a, lda, b + v * VW, ldb, n, R, MM_NV, ADD);
    for (; MM_NV > 2 && v + 2 <= vectors; v += 2)
        NAME(mm_block)(c + v * VW, ldc, a, lda, b + v * VW, ldb, n, R, 2, ADD);
    for (; v < vectors; v++)
        NAME(mm_block)(c + v * VW, ldc, a, lda, b + v * VW, ldb, n, R, 1, ADD);
}

/* Rows of the tile's keys into columns of kt; columns behind n, up to a vector's end, stay as they are: whatever comes of
 * them is masked. */
INSTANCE void NAME(transpose)(const struct host_block *b, struct host_scratch *s, const char *k, uint32_t n,
                              enum attn_dtype dtype)
{
    const uint32_t elem = dtype == ATTN_F32 ? 4 : 2;
    for (uint32_t j = 0; j < n; j += 4) {
        const float *row[4];
        for (uint32_t r = 0; r < 4; r++) {
            /* Behind the last key stands nothing that may be read: its row again. */
            const char *src = k + (uint64_t)(j + r < n ? j + r : n - 1) * b->token_stride;
            if (dtype == ATTN_F32) {
                row[r] = (const float *)src;
                continue;
            }
            float *wide = s->v + (uint64_t)r * b->DP; /* free until the values are widened */
            uint32_t d = 0;
            for (; d + VW <= b->D; d += VW)
                NAME(store)(wide + d, NAME(load)(src + (uint64_t)d * elem, dtype));
            if (d < b->D)
                NAME(store)(wide + d, NAME(load8)(src + (uint64_t)d * elem, dtype));
            row[r] = wide;
        }
        float *to = s->kt + j;
        for (uint32_t d = 0; d < b->D; d += 4, to += 4 * TILE_KEYS) {
            f32x4 r0 = *(const f32x4_mem *)(row[0] + d), r1 = *(const f32x4_mem *)(row[1] + d);
            f32x4 r2 = *(const f32x4_mem *)(row[2] + d), r3 = *(const f32x4_mem *)(row[3] + d);
            f32x4 a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), c = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
            f32x4 e = __builtin_shufflevector(r2, r3, 0, 4, 1, 5), g = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
            *(f32x4 *)to = __builtin_shufflevector(a, e, 0, 1, 4, 5);
            *(f32x4 *)(to + TILE_KEYS) = __builtin_shufflevector(a, e, 2, 3, 6, 7);
            *(f32x4 *)(to + 2 * TILE_KEYS) = __builtin_shufflevector(c, g, 0, 1, 4, 5);
            *(f32x4 *)(to + 3 * TILE_KEYS) = __builtin_shufflevector(c, g, 2, 3, 6, 7);
        }
    }
}

INSTANCE void NAME(widen_values)(const struct host_block *b, struct host_scratch *s, const char *v, uint32_t n,
                                 enum attn_dtype dtype)
{
    const uint32_t elem = dtype == ATTN_F32 ? 4 : 2;
    for (uint32_t j = 0; j < n; j++, v += b->token_stride) {
        float *to = s->v + (uint64_t)j * b->DP;
        uint32_t d = 0;
        for (; d + VW <= b->D; d += VW)
            NAME(store)(to + d, NAME(load)(v + (uint64_t)d * elem, dtype));
        if (d < b->D)
            NAME(store)(to + d, NAME(load8)(v + (uint64_t)d * elem, dtype));
    }
}

/* R rows of the block, from row i on, with a tile of n keys. */
INLINE void NAME(tile_rows)(const struct host_block *b, struct host_scratch *s, uint32_t i, uint32_t from, uint32_t n,
                            const int R)
{
    uint32_t last = s->limit[i + R - 1]; /* limits rise with the row */
    if (last <= from || s->start[i] >= from + n)
        return;
    uint32_t seen = last - from < n ? last - from : n;
    float *p = s->p + (uint64_t)i * TILE_KEYS;
    NAME(mm_rows)(p, TILE_KEYS, s->q + (uint64_t)i * b->DP, b->DP, s->kt, TILE_KEYS, b->D, (seen + VW - 1) / VW, R, 0);
    for (int r = 0; r < R; r++)
        NAME(softmax_row)(b, s, i + (uint32_t)r, from, seen);
    NAME(mm_rows)(s->out + (uint64_t)i * b->DP, b->DP, p, TILE_KEYS, s->v, b->DP, seen, (b->D + VW - 1) / VW, R, 1);
}

static TARGET void NAME(many)(const struct host_block *b, struct host_scratch *s)
{
    NAME(start)(b, s);
    for (uint32_t from = b->k_begin; from < b->k_end; from += TILE_KEYS) {
        uint32_t n = b->k_end - from < TILE_KEYS ? b->k_end - from : TILE_KEYS, i = 0;
        const char *k = b->k + (uint64_t)from * b->token_stride, *v = b->v + (uint64_t)from * b->token_stride;
        switch (b->dtype) {
        case ATTN_F32:
            NAME(transpose)(b, s, k, n, ATTN_F32);
            NAME(widen_values)(b, s, v, n, ATTN_F32);
            break;
        case ATTN_BF16:
            NAME(transpose)(b, s, k, n, ATTN_BF16);
            NAME(widen_values)(b, s, v, n, ATTN_BF16);
            break;
        case ATTN_F16:
            NAME(transpose)(b, s, k, n, ATTN_F16);
            NAME(widen_values)(b, s, v, n, ATTN_F16);
            break;
        }
        for (; i + MM_R <= b->rows; i += MM_R)
            NAME(tile_rows)(b, s, i, from, n, MM_R);
        for (; i < b->rows; i++)
            NAME(tile_rows)(b, s, i, from, n, 1);
    }
}

const struct host_kernels NAME(host_kernels) = {
    .name = STRING(ISA),
    .few = NAME(few),
    .many = NAME(many),
    .scale = NAME(scale),
    .add_scaled = NAME(add_scaled),
    .exp2 = NAME(exp2s),
};

#undef STRING2
#undef STRING
#undef CAT2
#undef CAT
#undef NAME
#undef INLINE
#undef INSTANCE
#undef UNROLL
#undef PASS_KEYS
#undef EXP2_ROUND
#undef ISA
#undef VW
#undef TARGET
#undef MM_R
#undef MM_NV
#undef FEW_KB
#undef CVT_F16
#undef CVT_BF16
#undef MAX
#undef FOLD
#undef FOLD_MAX
