/* kernels_rows_gpu.c - of check_kernels_gpu: embedding, norms, SwiGLU, random weights (worker/cuda_rows.cu). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/kernels_gpu.h"
#include "worker/cuda_kernels.h"
#include "worker/forward_internal.h"
#include "worker/model_convert.h"

/* Rows and hidden sizes: one, odd, at the edges of a warp and of a block of 1024 quads. */
static const struct shape {
    uint32_t rows, hidden;
    bool small;
} shapes[] = {
    {1, 4, true},    {3, 64, true},      {64, 64, false},   {257, 64, false},  {1, 124, false}, {3, 128, true},
    {3, 132, true},  {64, 896, true},    {257, 896, false}, {1, 4092, false},  {3, 4096, true}, {64, 4096, false},
    {3, 4100, true}, {257, 4096, false}, {3, 8192, false},  {2, 12292, false},
};

/* ---- embedding ---- */

#define SLOTS 7

/* Of tokens first .. first + count - 1 the table has rows; those of tokens that no row asks for are NaN. */
static void embed(struct kg *k, const struct shape *s, uint32_t first, uint32_t count, bool part)
{
    kg_begin(k, "%s %ux%u, tokens %u on", part ? "embed_part" : "embed", s->rows, s->hidden, first);
    struct cuda_row *row = kg_zeros(s->rows, sizeof *row);
    uint32_t *token = kg_zeros(s->rows, sizeof *token), last[SLOTS];
    const size_t out_size = part ? sizeof(uint16_t) : sizeof(float);
    uint16_t *table = kg_zeros((size_t)count * s->hidden, sizeof *table);
    void *out = kg_zeros((size_t)s->rows * s->hidden, out_size);
    memset(table, 0xff, (size_t)count * s->hidden * sizeof *table);
    for (uint32_t i = 0; i < SLOTS; i++)
        last[i] = first + kg_below(k, count);
    for (uint32_t r = 0; r < s->rows; r++) {
        const uint32_t slot = kg_below(k, SLOTS), all = first + count + count / 4 + 1;
        token[r] = r % 3 == 1 ? last[slot] : r % 3 == 2 ? kg_below(k, all) : first + kg_below(k, count);
        if (r == 2 || r == 5) /* the first behind the table, and the last in front of it */
            token[r] = r == 5 && first ? first - 1 : first + count;
        row[r].token = r % 3 == 1 ? CUDA_TOKEN_OF_SLOT | slot : token[r];
        for (uint32_t i = 0; token[r] - first < count && i < s->hidden; i++)
            table[(size_t)(token[r] - first) * s->hidden + i] = kg_bf16(kg_value(k));
    }
    void *d_out = kg_poisoned(k, (size_t)s->rows * s->hidden * out_size);
    const struct cuda_embedding e = {
        .row = kg_give(k, row, s->rows * sizeof *row),
        .last = kg_give(k, last, sizeof last),
        .table = kg_give(k, table, (size_t)count * s->hidden * sizeof *table),
        .first = first,
        .count = count,
        .rows = s->rows,
        .hidden = s->hidden,
    };
    kg_launched(k, part ? cuda_embed_part(k->stream, d_out, &e) : cuda_embed(k->stream, d_out, &e));
    kg_take(k, out, d_out, (size_t)s->rows * s->hidden * out_size);
    for (size_t i = 0; i < (size_t)s->rows * s->hidden; i++) {
        const uint32_t place = token[i / s->hidden] - first;
        const uint16_t want = place < count ? table[(size_t)place * s->hidden + i % s->hidden] : 0;
        if (part)
            kg_same(k, "element", i, ((uint16_t *)out)[i], want);
        else
            kg_same(k, "element", i, kg_bits(((float *)out)[i]), kg_bits(kg_float(want)));
    }
    kg_end(k);
    free(out);
    free(table);
    free(token);
    free(row);
}

void kg_embed(struct kg *k)
{
    for (uint32_t i = 0; i < KG_COUNT(shapes); i++) {
        if (k->small && !shapes[i].small)
            continue;
        embed(k, &shapes[i], 0, 512, false);
        embed(k, &shapes[i], i % 2 ? 512 : 0, 511, true);
    }
}

/* ---- norms ---- */

static void norm(struct kg *k, const struct shape *s, bool biased, bool picks)
{
    const float eps = 1e-5f;
    const uint32_t given = picks ? s->rows + 3 : s->rows, hidden = s->hidden;
    const size_t n = (size_t)given * hidden, n_out = (size_t)s->rows * hidden;
    kg_begin(k, "norm %ux%u%s%s", s->rows, hidden, biased ? ", bias" : "", picks ? ", picked rows" : "");
    struct cuda_sample *pick = kg_zeros(s->rows, sizeof *pick);
    bool *read = kg_zeros(given, sizeof *read);
    float *x = kg_floats(k, n, 3), *bias = kg_floats(k, hidden, 1), *weight = kg_floats(k, hidden, 2);
    float *after = kg_zeros(n, sizeof *after), *sum = kg_zeros(n, sizeof *sum), *want = kg_zeros(hidden, sizeof *want);
    uint16_t *h = kg_zeros(n_out, sizeof *h);
    for (uint32_t r = 0; r < s->rows; r++)
        read[pick[r].row = picks ? kg_below(k, given) : r] = true;
    for (size_t i = 0; i < n; i++) { /* rows that are not picked are NaN */
        if (!read[i / hidden])
            memset(&x[i], 0xff, sizeof x[i]);
        sum[i] = biased ? x[i] + bias[i % hidden] : x[i];
    }
    float *d_x = kg_give(k, x, n * sizeof *x);
    void *d_h = kg_poisoned(k, n_out * sizeof *h);
    const float *d_bias = biased ? kg_give(k, bias, hidden * sizeof *bias) : NULL;
    const float *d_weight = kg_give(k, weight, hidden * sizeof *weight);
    const struct cuda_sample *d_pick = picks ? kg_give(k, pick, s->rows * sizeof *pick) : NULL;
    kg_launched(k, cuda_norm(k->stream, d_h, d_x, d_bias, d_weight, eps, d_pick, s->rows, hidden));
    kg_take(k, h, d_h, n_out * sizeof *h);
    kg_take(k, after, d_x, n * sizeof *after);
    for (uint32_t r = 0; r < s->rows; r++) {
        forward_norm_row(want, sum + (size_t)pick[r].row * hidden, weight, hidden, eps);
        for (uint32_t i = 0; i < hidden; i++) {
            const size_t at = (size_t)r * hidden + i;
            kg_near(k, "h", at, (double)kg_float(h[at]), (double)want[i], fabs((double)want[i]) * KG_BF16_OFF + 1e-30);
        }
    }
    for (size_t i = 0; i < n; i++)
        kg_same(k, "x", i, kg_bits(after[i]), kg_bits(picks ? x[i] : sum[i]));
    kg_end(k);
    free(h);
    free(want);
    free(sum);
    free(after);
    free(weight);
    free(bias);
    free(x);
    free(read);
    free(pick);
}

void kg_norm(struct kg *k)
{
    for (uint32_t i = 0; i < KG_COUNT(shapes); i++)
        for (uint32_t how = 0; how < 4; how++)
            if (!k->small || (shapes[i].small && (how == i % 4 || shapes[i].hidden > 4096)))
                norm(k, &shapes[i], how & 1, how & 2);
}

/* ---- SwiGLU ---- */

static void swiglu(struct kg *k, uint32_t rows, uint32_t inner, bool biased)
{
    const size_t n = (size_t)rows * inner;
    kg_begin(k, "swiglu %ux%u%s", rows, inner, biased ? ", bias" : "");
    uint16_t *gate_up = kg_halves(k, 2 * n, 8), *act = kg_zeros(n, sizeof *act);
    float *bias = kg_floats(k, 2 * (size_t)inner, 2), *wide = kg_zeros(2 * (size_t)inner, sizeof *wide);
    float *want = kg_zeros(inner, sizeof *want);
    for (size_t i = 0; i < n; i += 37) /* where the exponential ends, and beyond */
        gate_up[i / inner * 2 * inner + i % inner] = kg_bf16(kg_value(k) * 200);
    void *d_act = kg_poisoned(k, n * sizeof *act), *d_in = kg_give(k, gate_up, 2 * n * sizeof *gate_up);
    const float *d_bias = biased ? kg_give(k, bias, 2 * (size_t)inner * sizeof *bias) : NULL;
    kg_launched(k, cuda_swiglu(k->stream, d_act, d_in, d_bias, rows, inner));
    kg_take(k, act, d_act, n * sizeof *act);
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t i = 0; i < 2 * inner; i++)
            wide[i] = kg_float(gate_up[(size_t)r * 2 * inner + i]) + (biased ? bias[i] : 0);
        forward_swiglu_row(want, wide, wide + inner, inner);
        for (uint32_t i = 0; i < inner; i++) {
            const size_t at = (size_t)r * inner + i;
            kg_near(k, "act", at, (double)kg_float(act[at]), (double)want[i],
                    fabs((double)want[i]) * KG_BF16_OFF + 1e-30);
        }
    }
    kg_end(k);
    free(want);
    free(wide);
    free(bias);
    free(act);
    free(gate_up);
}

void kg_swiglu(struct kg *k)
{
    static const uint32_t rows[] = {1, 3, 64, 257}, inner[] = {4, 60, 1020, 1024, 1028, 4864};
    for (uint32_t r = 0; r < KG_COUNT(rows); r++)
        for (uint32_t i = 0; i < KG_COUNT(inner); i++)
            if (!k->small || (rows[r] == 3 && inner[i] <= 1028))
                swiglu(k, rows[r], inner[i], (r + i) % 2);
}

/* ---- random weights ---- */

static void random_values(struct kg *k, uint64_t n, uint64_t first)
{
    const uint64_t seed = model_random_seed("model.layers.0.mlp.up_proj.weight");
    const float scale = 0.03f;
    kg_begin(k, "random %llu from %llu on", (unsigned long long)n, (unsigned long long)first);
    uint16_t *out = kg_zeros(n, sizeof *out), *want = kg_zeros(n, sizeof *want);
    void *d_out = kg_poisoned(k, n * sizeof *out);
    kg_launched(k, cuda_random(k->stream, d_out, seed, first, n, scale));
    kg_take(k, out, d_out, n * sizeof *out);
    model_random(want, MAT_BF16, seed, first, n, scale);
    for (uint64_t i = 0; i < n; i++)
        kg_same(k, "element", i, out[i], want[i]);
    kg_end(k);
    free(want);
    free(out);
}

void kg_random(struct kg *k)
{
    random_values(k, 1, 0);
    random_values(k, 257, 1ull << 33);
    if (!k->small)
        random_values(k, 4096 * 256 + 1, 12345);
}
