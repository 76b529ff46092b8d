/* kernels_rope_gpu.c - of check_kernels_gpu: q rotated, K and V to the slots, from q, k and v (worker/cuda_rows.cu) and from
 * the product that makes them (worker/cuda_few.cu). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/kernels_gpu.h"
#include "worker/cuda_kernels.h"
#include "worker/forward_internal.h"
#include "worker/rope.h"

#define POSITIONS 700
#define LAYERS    2 /* and the last of them */

static const struct shape {
    uint32_t rows, heads, kv_heads, head_dim;
    bool norms, small;
} shapes[] = {
    {1, 1, 1, 8, false, true},     {3, 4, 2, 64, false, true},    {64, 14, 2, 64, false, false},
    {257, 14, 2, 64, true, false}, {3, 32, 8, 128, true, true},   {64, 32, 8, 128, false, false},
    {4, 4, 4, 80, true, true},     {2, 7, 1, 120, false, true},   {257, 8, 4, 32, false, false},
    {3, 3, 3, 136, true, true},    {64, 16, 8, 256, true, false}, {1, 8, 1, 256, false, true},
    {4, 32, 8, 128, false, false},
};

struct problem {
    const struct shape *s;
    uint32_t all, tokens; /* heads of a row; places in the slots */
    uint32_t position[257], place[257];
    bool padding[257];
    float *cosine, *sine, *bias, *q_norm, *k_norm;
    uint16_t *kv;
    size_t kv_bytes, token_stride;
    struct cuda_rope r;
};

static void angles(struct kg *k, struct problem *p)
{
    const size_t half = p->s->head_dim / 2, n = POSITIONS * half;
    const struct rope rope = {.theta = 10000, .attention_factor = 1};
    bool used[POSITIONS] = {false};
    float *cosine = p->cosine = kg_zeros(n, sizeof *cosine), *sine = p->sine = kg_zeros(n, sizeof *sine);
    rope_table(cosine, sine, &rope, p->s->head_dim, POSITIONS);
    for (uint32_t r = 0; r < p->s->rows; r++)
        used[p->position[r]] = true;
    for (size_t i = 0; i < n; i++) /* other positions are NaN */
        if (!used[i / half])
            cosine[i] = sine[i] = NAN;
    p->r.cosine = kg_give(k, cosine, n * sizeof *cosine);
    p->r.sine = kg_give(k, sine, n * sizeof *sine);
}

/* Rows go to places in another order, with others between them; every fifth is padding. */
static void places(struct kg *k, struct problem *p, bool apart)
{
    const struct shape *s = p->s;
    const size_t head_bytes = (s->head_dim + (apart ? 8 : 0)) * sizeof(uint16_t);
    struct cuda_row row[257];
    memset(row, 0, sizeof row);
    p->r.head_stride = head_bytes;
    p->r.v_offset = s->kv_heads * head_bytes;
    p->token_stride = LAYERS * 2 * p->r.v_offset;
    p->r.layer_offset = (LAYERS - 1) * 2 * p->r.v_offset;
    p->tokens = s->rows + s->rows / 2 + 2;
    p->kv_bytes = p->tokens * p->token_stride;
    p->kv = kg_poisoned(k, p->kv_bytes);
    for (uint32_t i = 0; i < s->rows; i++) {
        p->padding[i] = i % 5 == 3;
        p->place[i] = p->tokens - 2 - i;
        p->position[i] = row[i].position = i == 0 ? POSITIONS - 1 : p->padding[i] ? 0 : kg_below(k, POSITIONS);
        row[i].k = p->padding[i] ? 0 : (uint64_t)(uintptr_t)p->kv + p->place[i] * p->token_stride;
    }
    p->r.row = kg_give(k, row, s->rows * sizeof *row);
}

static void make(struct kg *k, struct problem *p, const struct shape *s, bool apart, bool biased, bool norms)
{
    memset(p, 0, sizeof *p);
    p->s = s;
    p->all = s->heads + 2 * s->kv_heads;
    p->r.heads = s->heads;
    p->r.kv_heads = s->kv_heads;
    p->r.head_dim = s->head_dim;
    p->r.eps = 1e-6f;
    places(k, p, apart);
    angles(k, p);
    const size_t d = s->head_dim;
    p->bias = kg_floats(k, p->all * d, 1);
    p->q_norm = kg_floats(k, d, 2);
    p->k_norm = kg_floats(k, d, 2);
    p->r.bias = biased ? kg_give(k, p->bias, p->all * d * sizeof(float)) : NULL;
    p->r.q_norm = norms ? kg_give(k, p->q_norm, d * sizeof(float)) : NULL;
    p->r.k_norm = norms ? kg_give(k, p->k_norm, d * sizeof(float)) : NULL;
}

static void clear(struct problem *p)
{
    free(p->k_norm);
    free(p->q_norm);
    free(p->bias);
    free(p->sine);
    free(p->cosine);
}

/* One row: raw [all][D] becomes what is wanted, size what its two terms amount to. */
static void turn(const struct problem *p, uint32_t r, float *raw, float *size)
{
    const uint32_t d = p->s->head_dim, half = d / 2, turned = p->s->heads + p->s->kv_heads;
    for (uint32_t i = 0; p->r.bias && i < p->all * d; i++)
        raw[i] += p->bias[i];
    if (p->r.q_norm) {
        forward_norm_heads(raw, p->q_norm, p->s->heads, d, p->r.eps);
        forward_norm_heads(raw + p->s->heads * d, p->k_norm, p->s->kv_heads, d, p->r.eps);
    }
    for (uint32_t i = 0; i < p->all * d; i++)
        size[i] = fabsf(raw[i]) + fabsf(raw[i % d < half ? i + half : i - half]);
    const float *c = p->cosine + (size_t)p->position[r] * half, *s = p->sine + (size_t)p->position[r] * half;
    forward_rope_row(raw, raw, c, s, turned, d);
}

/* raw [rows][all][D] in front of the bias, which is off by what `off` has (NULL: exact); before: q, k and v as they were. */
static void compare(struct kg *k, const struct problem *p, const float *raw, const float *off, const uint16_t *before)
{
    const uint32_t d = p->s->head_dim, half = d / 2, heads = p->s->heads, kv_heads = p->s->kv_heads;
    const size_t row_size = (size_t)p->all * d, n = p->s->rows * row_size;
    uint16_t *qkv = kg_zeros(n, sizeof *qkv), *kv = kg_zeros(p->kv_bytes, 1);
    float *want = kg_zeros(row_size, sizeof *want), *size = kg_zeros(row_size, sizeof *size);
    kg_take(k, qkv, p->r.qkv, n * sizeof *qkv);
    kg_take(k, kv, p->kv, p->kv_bytes);
    for (uint32_t r = 0; r < p->s->rows; r++) {
        memcpy(want, raw + r * row_size, row_size * sizeof *want);
        turn(p, r, want, size);
        for (uint32_t i = 0; i < row_size; i++) {
            const uint32_t head = i / d, kv_head = head < heads ? 0 : (head - heads) % kv_heads;
            const size_t at = r * row_size + i, pair = i % d < half ? at + half : at - half;
            uint16_t got = qkv[at];
            if (head >= heads) {
                kg_same(k, "k or v in front of the slots", at, got, before[at]);
                if (p->padding[r])
                    continue;
                uint16_t *to = kv +
                               (p->place[r] * p->token_stride + p->r.layer_offset +
                                (head >= heads + kv_heads ? p->r.v_offset : 0) + kv_head * p->r.head_stride) /
                                   sizeof *kv +
                               i % d;
                got = *to;
                *to = 0xffff; /* what is left was to stay as it was */
            }
            const double product_off = off ? (double)off[at] + (double)off[pair] : 0;
            kg_near(k, head < heads ? "q" : "k or v", at, (double)kg_float(got), (double)want[i],
                    fabs((double)want[i]) * KG_BF16_OFF + (double)size[i] * 1e-6 + product_off * 1.02 + 1e-30);
        }
    }
    kg_untouched(k, "slots", kv, p->kv_bytes);
    free(size);
    free(want);
    free(kv);
    free(qkv);
}

static void rope(struct kg *k, const struct shape *s, bool apart, bool biased)
{
    struct problem p;
    kg_begin(k, "rope_kv %u rows, %u/%u heads of %u%s%s%s", s->rows, s->heads, s->kv_heads, s->head_dim,
             biased ? ", bias" : "", s->norms ? ", norms" : "", apart ? ", heads apart" : "");
    make(k, &p, s, apart, biased, s->norms);
    const size_t n = (size_t)s->rows * p.all * s->head_dim;
    uint16_t *qkv = kg_halves(k, n, 3);
    float *raw = kg_zeros(n, sizeof *raw);
    for (size_t i = 0; i < n; i++)
        raw[i] = kg_float(qkv[i]);
    p.r.qkv = kg_give(k, qkv, n * sizeof *qkv);
    kg_launched(k, cuda_rope_kv(k->stream, &p.r, s->rows));
    compare(k, &p, raw, NULL, qkv);
    kg_end(k);
    free(raw);
    free(qkv);
    clear(&p);
}

static void few_rope(struct kg *k, const struct shape *s, uint32_t depth, bool biased)
{
    struct problem p;
    kg_begin(k, "few_rope %u rows of %u, %u/%u heads of %u%s", s->rows, depth, s->heads, s->kv_heads, s->head_dim,
             biased ? ", bias" : "");
    make(k, &p, s, false, biased, false);
    const uint32_t out = p.all * s->head_dim;
    const size_t n = (size_t)s->rows * out;
    uint16_t *x = kg_halves(k, (size_t)s->rows * depth, 1), *w = kg_halves(k, (size_t)out * depth, 0.3f);
    uint16_t *before = kg_zeros(n, sizeof *before);
    double *y = kg_zeros(n, sizeof *y), *size = kg_zeros(n, sizeof *size);
    float *raw = kg_zeros(n, sizeof *raw), *off = kg_zeros(n, sizeof *off);
    kg_product(y, size, x, w, s->rows, out, depth);
    for (size_t i = 0; i < n; i++) {
        raw[i] = (float)y[i];
        off[i] = (float)kg_few_off(size[i], depth);
    }
    memset(before, 0xff, n * sizeof *before);
    p.r.qkv = kg_poisoned(k, n * sizeof *before);
    const void *d_x = kg_give(k, x, (size_t)s->rows * depth * sizeof *x);
    const void *d_w = kg_give(k, w, (size_t)out * depth * sizeof *w);
    kg_launched(k, cuda_few_rope(k->stream, &p.r, d_x, d_w, s->rows, depth));
    compare(k, &p, raw, off, before);
    kg_end(k);
    free(off);
    free(raw);
    free(size);
    free(y);
    free(before);
    free(w);
    free(x);
    clear(&p);
}

void kg_rope(struct kg *k)
{
    static const uint32_t depth[] = {8, 64, 896, 1032, 4096};
    for (uint32_t i = 0; i < KG_COUNT(shapes); i++) {
        const struct shape *s = &shapes[i];
        if (k->small && !s->small)
            continue;
        rope(k, s, false, i % 2);
        rope(k, s, true, i % 2 == 0);
        if (s->rows <= CUDA_FEW_ROWS_MAX)
            few_rope(k, s, k->small ? depth[i % 3] : depth[i % KG_COUNT(depth)], i % 3 != 0);
    }
}
