/* attention_host.c - plain first version: one item per row and KV head. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention_internal.h"

struct host {
    struct attn_executor exec;
    uint32_t threads;
    uint32_t scratch_floats; /* per worker: scores, one row of K or V */
    float *scratch;
};

static void host_destroy(void *state)
{
    struct host *h = state;
    if (!h)
        return;
    free(h->scratch);
    free(h);
}

static enum status_code host_create(void **state, const struct attn_config *cfg, struct status *st)
{
    struct host *h = calloc(1, sizeof *h);
    if (!h)
        return status_nomem(st, "attention", sizeof *h);
    h->exec = cfg->exec;
    h->threads = cfg->exec.parallel_for && cfg->exec.threads ? cfg->exec.threads : 1;
    h->scratch_floats = cfg->max_kv_len + ATTN_MAX_HEAD_DIM;
    size_t bytes = (size_t)h->threads * h->scratch_floats * sizeof(float);
    h->scratch = malloc(bytes);
    if (!h->scratch) {
        host_destroy(h);
        return status_nomem(st, "attention scratch", bytes);
    }
    *state = h;
    return ST_OK;
}

static float f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, mag = x & 0x7fff;
    float f;
    if (mag >= 0x7c00) {
        uint32_t u = sign | 0x7f800000 | (mag & 0x3ff) << 13;
        memcpy(&f, &u, 4);
        return f;
    }
    uint32_t u = mag << 13;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    return sign ? -f : f;
}

static void widen(float *dst, const void *src, uint32_t n, enum attn_dtype dtype)
{
    const uint16_t *h = src;
    if (dtype == ATTN_F32)
        memcpy(dst, src, n * sizeof(float));
    for (uint32_t i = 0; i < n && dtype != ATTN_F32; i++) {
        uint32_t u = (uint32_t)h[i] << 16;
        if (dtype == ATTN_BF16)
            memcpy(&dst[i], &u, 4);
        else
            dst[i] = f16_to_f32(h[i]);
    }
}

struct job {
    struct host *h;
    const struct attn_batch *b;
};

static void one_row(struct host *h, const struct attn_batch *b, const struct attn_seq *s, uint32_t row, uint32_t head,
                    float *scores)
{
    float *wide = scores + h->scratch_floats - ATTN_MAX_HEAD_DIM;
    uint32_t D = b->head_dim, keys = s->kv_len - s->rows + row + 1;
    uint64_t head_off = head / (b->heads / b->kv_heads) * b->head_stride;
    uint64_t at = ((uint64_t)(s->first_row + row) * b->heads + head) * D;
    const float *q = (const float *)b->q + at;
    float *out = (float *)b->out + at;
    float max = -INFINITY, sum = 0;
    for (uint32_t t = 0; t < keys; t++) {
        widen(wide, (const char *)s->k + head_off + t * b->token_stride, D, b->kv_dtype);
        float dot = 0;
        for (uint32_t d = 0; d < D; d++)
            dot += q[d] * wide[d];
        scores[t] = dot * b->scale;
        max = scores[t] > max ? scores[t] : max;
    }
    memset(out, 0, D * sizeof *out);
    for (uint32_t t = 0; t < keys; t++) {
        widen(wide, (const char *)s->v + head_off + t * b->token_stride, D, b->kv_dtype);
        float p = expf(scores[t] - max);
        sum += p;
        for (uint32_t d = 0; d < D; d++)
            out[d] += p * wide[d];
    }
    for (uint32_t d = 0; d < D; d++)
        out[d] /= sum;
}

static void one_seq(void *arg, uint32_t i, uint32_t worker)
{
    struct job *j = arg;
    const struct attn_batch *b = j->b;
    const struct attn_seq *s = &b->seq[i / b->heads];
    for (uint32_t r = 0; r < s->rows; r++)
        one_row(j->h, b, s, r, i % b->heads, j->h->scratch + (size_t)worker * j->h->scratch_floats);
}

static enum status_code host_run(void *state, const struct attn_batch *b, struct status *st)
{
    (void)st;
    struct host *h = state;
    struct job j = {h, b};
    uint32_t n = b->seqs * b->heads;
    if (h->threads > 1) {
        h->exec.parallel_for(h->exec.ctx, n, one_seq, &j);
        return ST_OK;
    }
    for (uint32_t i = 0; i < n; i++)
        one_seq(&j, i, 0);
    return ST_OK;
}

const struct attn_ops attn_ops_host = {
    .name = "host",
    .create = host_create,
    .destroy = host_destroy,
    .run = host_run,
};
