/* kernels_products_gpu.c - of check_kernels_gpu: products of few rows (worker/cuda_few.cu) and of some (worker/cuda_some.cu); gate
 * and up of many rows with SwiGLU (worker/cuda_glu.cu). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/kernels_gpu.h"
#include "worker/cuda_kernels.h"

/* ---- few rows, and some ---- */

/* Rows of W at the edges of a block's eight warps; k at those of a load of one warp, and of four in flight: 256 and 1024. Of 4243 rows
 * there are more blocks than SMs. */
static const struct shape {
    uint32_t n, k;
    bool small;
} shapes[] = {
    {1, 8, true},        {7, 248, false},    {8, 256, true},     {9, 264, true},   {64, 64, true},
    {17, 1016, true},    {896, 896, false},  {33, 1024, true},   {16, 1032, true}, {5, 2048, true},
    {1000, 4096, false}, {4096, 896, false}, {4243, 520, false}, {4243, 64, true},
};

/* t above CUDA_FEW_ROWS_MAX: by cuda_some_rows. */
static void few(struct kg *k, const struct shape *s, uint32_t t, enum cuda_out out)
{
    static const char *const kind[] = {"bf16", "f32", "f32, added"};
    const bool some = t > CUDA_FEW_ROWS_MAX;
    const size_t n = (size_t)t * s->n, out_size = out == CUDA_OUT_BF16 ? sizeof(uint16_t) : sizeof(float);
    kg_begin(k, "%s_rows %u of %ux%u, %s", some ? "some" : "few", t, s->n, s->k, kind[out]);
    uint16_t *x = kg_halves(k, (size_t)t * s->k, 1), *w = kg_halves(k, (size_t)s->n * s->k, 1);
    double *y = kg_zeros(n, sizeof *y), *size = kg_zeros(n, sizeof *size);
    float *old = kg_floats(k, n, 5);
    void *got = kg_zeros(n, out_size);
    kg_product(y, size, x, w, t, s->n, s->k);
    void *d_y = out == CUDA_OUT_F32_ADD ? kg_give(k, old, n * out_size) : kg_poisoned(k, n * out_size);
    const void *d_x = kg_give(k, x, (size_t)t * s->k * sizeof *x),
               *d_w = kg_give(k, w, (size_t)s->n * s->k * sizeof *w);
    kg_launched(k, some ? cuda_some_rows(k->stream, d_y, out, d_x, d_w, NULL, t, s->n, s->k)
                        : cuda_few_rows(k->stream, d_y, out, d_x, d_w, t, s->n, s->k));
    kg_take(k, got, d_y, n * out_size);
    for (size_t i = 0; i < n; i++) {
        const double want = out == CUDA_OUT_F32_ADD ? (double)old[i] + y[i] : y[i];
        const double rounding = fabs(want) * (out == CUDA_OUT_BF16 ? KG_BF16_OFF : 0x1p-24);
        kg_near(k, "y", i, (double)(out == CUDA_OUT_BF16 ? kg_float(((uint16_t *)got)[i]) : ((float *)got)[i]), want,
                rounding + kg_few_off(size[i], s->k));
    }
    kg_end(k);
    free(got);
    free(old);
    free(size);
    free(y);
    free(w);
    free(x);
}

/* ---- SwiGLU of products ---- */

struct glu_want {
    double *act, *allowed; /* [T][inner] */
};

/* y [T][2 inner], whose element is off by at most off; bias NULL: none. */
static struct glu_want glu_of(const double *y, const double *off, const float *bias, uint32_t t, uint32_t inner)
{
    const size_t n = (size_t)t * inner;
    struct glu_want want = {kg_zeros(n, sizeof(double)), kg_zeros(n, sizeof(double))};
    for (size_t i = 0; i < n; i++) {
        const size_t gate = i / inner * 2 * inner + i % inner, up = gate + inner;
        const double g = y[gate] + (bias ? (double)bias[i % inner] : 0);
        const double u = y[up] + (bias ? (double)bias[inner + i % inner] : 0);
        const double silu = g / (1 + exp(-g));
        want.act[i] = silu * u;
        want.allowed[i] = fabs(want.act[i]) * KG_BF16_OFF +
                          1.02 * (1.1 * off[gate] * fabs(u) + fabs(silu) * off[up] + off[gate] * off[up]) + 1e-30;
    }
    return want;
}

static void glu_free(struct glu_want *want)
{
    free(want->act);
    free(want->allowed);
}

static void few_swiglu(struct kg *k, const struct shape *s, uint32_t t, bool biased)
{
    const uint32_t inner = s->n;
    const size_t n = (size_t)t * inner;
    const bool some = t > CUDA_FEW_ROWS_MAX;
    kg_begin(k, "%s_swiglu %u of 2x%ux%u%s", some ? "some" : "few", t, inner, s->k, biased ? ", bias" : "");
    uint16_t *x = kg_halves(k, (size_t)t * s->k, 1), *w = kg_halves(k, 2 * (size_t)inner * s->k, 0.5f);
    float *bias = kg_floats(k, 2 * (size_t)inner, 2);
    double *y = kg_zeros(2 * n, sizeof *y), *off = kg_zeros(2 * n, sizeof *off);
    uint16_t *act = kg_zeros(n, sizeof *act);
    kg_product(y, off, x, w, t, 2 * inner, s->k);
    for (size_t i = 0; i < 2 * n; i++)
        off[i] = kg_few_off(off[i], s->k) + 0x1p-22;
    struct glu_want want = glu_of(y, off, biased ? bias : NULL, t, inner);
    void *d_act = kg_poisoned(k, n * sizeof *act);
    const void *d_x = kg_give(k, x, (size_t)t * s->k * sizeof *x);
    const void *d_w = kg_give(k, w, 2 * (size_t)inner * s->k * sizeof *w);
    const float *d_bias = biased ? kg_give(k, bias, 2 * (size_t)inner * sizeof *bias) : NULL;
    kg_launched(k, some ? cuda_some_rows(k->stream, d_act, CUDA_OUT_SWIGLU, d_x, d_w, d_bias, t, inner, s->k)
                        : cuda_few_swiglu(k->stream, d_act, d_x, d_w, d_bias, t, inner, s->k));
    kg_take(k, act, d_act, n * sizeof *act);
    for (size_t i = 0; i < n; i++)
        kg_near(k, "act", i, (double)kg_float(act[i]), want.act[i], want.allowed[i]);
    kg_end(k);
    glu_free(&want);
    free(act);
    free(off);
    free(y);
    free(bias);
    free(w);
    free(x);
}

/* What a row comes to by cuda_some_rows has the same bits whatever is beside it. */
static void some_alike(struct kg *k, const struct shape *s)
{
    static const uint32_t rows[] = {CUDA_SOME_ROWS_MAX, 1, 5, 8, 9};
    const size_t n = (size_t)CUDA_SOME_ROWS_MAX * s->n;
    kg_begin(k, "some_rows of %ux%u, bits of rows alone and beside others", s->n, s->k);
    uint16_t *x = kg_halves(k, (size_t)CUDA_SOME_ROWS_MAX * s->k, 1), *w = kg_halves(k, (size_t)s->n * s->k, 1);
    float *all = kg_zeros(n, sizeof *all), *got = kg_zeros(n, sizeof *got);
    const void *d_x = kg_give(k, x, (size_t)CUDA_SOME_ROWS_MAX * s->k * sizeof *x),
               *d_w = kg_give(k, w, (size_t)s->n * s->k * sizeof *w);
    for (uint32_t i = 0; i < KG_COUNT(rows); i++) {
        void *d_y = kg_poisoned(k, n * sizeof *got);
        kg_launched(k, cuda_some_rows(k->stream, d_y, CUDA_OUT_F32, d_x, d_w, NULL, rows[i], s->n, s->k));
        kg_take(k, i ? got : all, d_y, n * sizeof *got);
        for (size_t j = 0; i && j < (size_t)rows[i] * s->n; j++)
            kg_same(k, "y", j, kg_bits(got[j]), kg_bits(all[j]));
    }
    kg_end(k);
    free(got);
    free(all);
    free(w);
    free(x);
}

void kg_few(struct kg *k)
{
    for (uint32_t i = 0; i < KG_COUNT(shapes); i++)
        for (uint32_t t = 1; t <= CUDA_SOME_ROWS_MAX; t++) {
            if (k->small && (!shapes[i].small || (t + i) % 2))
                continue;
            if (t > CUDA_FEW_ROWS_MAX && t % 4 != i % 4 && t != 8 && t != 9 && t != CUDA_SOME_ROWS_MAX)
                continue;
            for (enum cuda_out out = CUDA_OUT_BF16; out <= CUDA_OUT_F32_ADD; out++)
                if (!k->small || (t + i) % 6 / 2 == (uint32_t)out)
                    few(k, &shapes[i], t, out);
            few_swiglu(k, &shapes[i], t, (t + i) / 2 % 2);
        }
    for (uint32_t i = 0; i < KG_COUNT(shapes); i++)
        if (!k->small || shapes[i].small)
            some_alike(k, &shapes[i]);
}

/* ---- gate and up of many rows ---- */

#define GLU_ROWS 257

struct glu_problem {
    uint32_t inner, k;
    bool biased;
    struct cuda_glu device;
    const void *x, *w;
    const float *bias;
    void *act;
    uint16_t *got;
    struct glu_want want; /* of GLU_ROWS rows */
};

/* Rows behind the first t stay as they were. x is there for all of them: rows that no tile needs may be read, but count for
 * nothing. */
static void glu_way(struct kg *k, struct glu_problem *p, const struct cuda_glu_way *way, uint32_t t)
{
    const size_t n = (size_t)t * p->inner, all = (size_t)GLU_ROWS * p->inner;
    kg_poison(k, p->act, all * sizeof *p->got);
    kg_launched(k, cuda_glu_run(k->stream, &p->device, way, p->act, p->x, p->w, p->bias, t, p->inner, p->k));
    kg_take(k, p->got, p->act, all * sizeof *p->got);
    for (size_t i = 0; i < n; i++)
        kg_near(k, "act", i, (double)kg_float(p->got[i]), p->want.act[i], p->want.allowed[i]);
    kg_untouched(k, "rows behind the last", p->got + n, (all - n) * sizeof *p->got);
}

/* One kernel: rows at the edges of its tiles, in turn with other orders, lags and numbers of blocks, few of which have to work
 * at several tiles each. */
static void glu_kernel(struct kg *k, struct glu_problem *p, uint32_t rows, enum cuda_glu_share share, uint32_t sms)
{
    static const uint32_t group[] = {CUDA_GLU_ALL_ROWS, 1, 2}, most[] = {UINT32_MAX, 4, 2};
    const uint32_t edge[] = {rows + 1, 1, rows, rows - 1, 64, GLU_ROWS};
    for (uint32_t i = 0; i < (k->small ? 2 : KG_COUNT(edge)); i++) {
        const uint32_t turn = i + rows / 8 + share;
        const struct cuda_glu_way way = {rows, share, group[turn % 3], turn % 3};
        p->device.blocks = sms < most[turn / 3 % 3] ? sms : most[turn / 3 % 3];
        glu_way(k, p, &way, edge[i]);
    }
}

/* Cases of one shape: every kernel that there is. */
static void glu_shape(struct kg *k, struct glu_problem *p, uint32_t sms)
{
    static const char *const shares[] = {"alone", "shares x", "shares W"};
    const size_t n = (size_t)GLU_ROWS * p->inner;
    uint16_t *x = kg_halves(k, (size_t)GLU_ROWS * p->k, 1);
    uint16_t *w = kg_halves(k, 2 * (size_t)p->inner * p->k, 4 / sqrtf((float)p->k));
    float *bias = kg_floats(k, 2 * (size_t)p->inner, 1);
    double *y = kg_zeros(2 * n, sizeof *y), *off = kg_zeros(2 * n, sizeof *off);
    kg_product(y, off, x, w, GLU_ROWS, 2 * p->inner, p->k);
    for (size_t i = 0; i < 2 * n; i++) /* sums of float32 in any order, cut off instead of rounded */
        off[i] = off[i] * (p->k + 2) * 0x1p-24 + 0x1p-22;
    p->want = glu_of(y, off, p->biased ? bias : NULL, GLU_ROWS, p->inner);
    p->got = kg_zeros(n, sizeof *p->got);
    for (uint32_t rows = 8; rows <= 256; rows += 8)
        for (enum cuda_glu_share share = CUDA_GLU_ALONE; share <= CUDA_GLU_SHARES_W; share++) {
            const struct cuda_glu_way way = {rows, share, 1, 0};
            if (!cuda_glu_fits(&p->device, &way, GLU_ROWS, p->inner, p->k))
                continue;
            kg_begin(k, "glu 2x%ux%u, tiles of %u rows, %s%s", p->inner, p->k, rows, shares[share],
                     p->biased ? ", bias" : "");
            p->act = kg_poisoned(k, n * sizeof *p->got);
            p->x = kg_give(k, x, (size_t)GLU_ROWS * p->k * sizeof *x);
            p->w = kg_give(k, w, 2 * (size_t)p->inner * p->k * sizeof *w);
            p->bias = p->biased ? kg_give(k, bias, 2 * (size_t)p->inner * sizeof *bias) : NULL;
            glu_kernel(k, p, rows, share, sms);
            kg_end(k);
        }
    free(p->got);
    glu_free(&p->want);
    free(off);
    free(y);
    free(bias);
    free(w);
    free(x);
}

void kg_glu(struct kg *k)
{
    static const struct {
        uint32_t inner, k;
        bool biased, small;
    } all[] = {{256, 192, true, true}, {128, 64, false, false}, {384, 896, true, false}, {1024, 448, false, false}};
    struct cuda_glu device;
    cudaError_t err = cuda_glu_open(&device);
    if (err == cudaErrorNotSupported) {
        printf("glu: not for this device\n");
        return;
    }
    kg_launched(k, err);
    for (uint32_t i = 0; i < KG_COUNT(all); i++) {
        struct glu_problem p = {.inner = all[i].inner, .k = all[i].k, .biased = all[i].biased, .device = device};
        if (!k->small || all[i].small)
            glu_shape(k, &p, device.blocks);
    }
}
