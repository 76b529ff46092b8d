#include "worker/forward.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "worker/forward_internal.h"

#define ALIGN_BYTES      64
#define HEAD_LOGIT_BYTES (32u << 20) /* of logits held at a time, by which the rows of the LM head are cut */
#define HEAD_MIN_ROWS    8

/* ---- create ---- */

/* Counts on the first pass (base NULL), hands out addresses on the second. */
struct arena {
    uint8_t *base;
    uint64_t at;
};

static void *take(struct arena *a, uint64_t count, uint64_t size)
{
    void *p = a->base ? a->base + a->at : NULL;
    a->at += (count * size + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    return p;
}

static void lay_out(struct forward *f, struct arena *a)
{
    const struct forward_config *c = &f->cfg;
    const struct model_config *m = c->model;
    const struct shard *s = c->shard;
    uint64_t rows = c->max_rows, d = m->head_dim;
    uint64_t vocab_max = shard_even(m->vocab_size, 0, f->ranks).count; /* rank 0 has the most */
    f->x = take(a, rows * m->hidden, sizeof(float));
    f->h = take(a, rows * m->hidden, sizeof(float));
    f->qkv = take(a, rows * (s->heads.count + 2 * s->kv_heads.count) * d, sizeof(float));
    f->q = take(a, rows * s->heads.count * d, sizeof(float));
    f->att = take(a, rows * s->heads.count * d, sizeof(float));
    f->gate_up = take(a, rows * 2 * s->inner.count, sizeof(float));
    f->act = take(a, rows * s->inner.count, sizeof(float));
    f->cosine = take(a, (uint64_t)c->max_context * (d / 2), sizeof(float));
    f->sine = take(a, (uint64_t)c->max_context * (d / 2), sizeof(float));
    f->row_seq = take(a, rows, sizeof *f->row_seq);
    f->attn_seq = take(a, rows, sizeof *f->attn_seq);

    f->picked = take(a, (uint64_t)f->head_rows * m->hidden, sizeof(float));
    f->logits = take(a, f->head_rows * vocab_max, sizeof(float));
    f->order = take(a, rows, sizeof *f->order);
    f->row_rc = take(a, f->head_rows, sizeof *f->row_rc);
    f->best = take(a, rows, sizeof *f->best);
    f->bests = take(a, rows * f->ranks, sizeof *f->bests);
    f->gather_bytes = take(a, f->ranks, sizeof *f->gather_bytes);
    f->sampler = take(a, threads_count(c->pool), sizeof *f->sampler);
    f->full_row = take(a, (uint64_t)threads_count(c->pool) * m->vocab_size, sizeof(float));
    if (f->ranks > 1)
        f->gathered = take(a, (uint64_t)f->head_rows * m->vocab_size, sizeof(float));
}

static void run_threads(void *ctx, uint32_t n, void (*fn)(void *arg, uint32_t i, uint32_t worker), void *arg)
{
    threads_for(ctx, n, fn, arg);
}

static enum status_code create_parts(struct forward *f, struct status *st)
{
    const struct forward_config *c = &f->cfg;
    const struct shard *s = c->shard;
    uint32_t widest = c->model->hidden, threads = threads_count(c->pool);
    enum status_code rc;
    if (s->inner.count > widest)
        widest = s->inner.count;
    if (s->heads.count * c->model->head_dim > widest)
        widest = s->heads.count * c->model->head_dim;
    if ((rc = gemm_create(&f->gemm, c->pool, widest, st)) != ST_OK)
        return rc;
    for (uint32_t i = 0; i < threads; i++)
        if ((rc = sampler_create(&f->sampler[i], c->model->vocab_size, st)) != ST_OK)
            return rc;
    if (s->heads.count == 0)
        return ST_OK;
    const struct attn_config attn = {
        .ops = &attn_ops_host,
        .exec = {.threads = threads, .parallel_for = run_threads, .ctx = c->pool},
        .max_rows = c->max_rows,
        .max_heads = s->heads.count,
        .max_head_dim = c->model->head_dim,
        .max_kv_len = c->max_context,
    };
    return attn_create(&f->attn, &attn, st);
}

static void host_destroy(struct forward *f)
{
    if (!f)
        return;
    attn_destroy(f->attn);
    if (f->arena)
        for (uint32_t i = 0; i < threads_count(f->cfg.pool); i++)
            sampler_destroy(f->sampler[i]);
    gemm_destroy(f->gemm);
    free(f->arena);
    free(f);
}

static enum status_code host_create(struct forward **out, const struct forward_config *cfg, struct status *st)
{
    struct forward *f = calloc(1, sizeof *f);
    if (!f)
        return status_nomem(st, "forward", sizeof *f);
    enum status_code rc;
    f->cfg = *cfg;
    f->rank = comm_rank(cfg->comm);
    f->ranks = comm_size(cfg->comm);
    uint64_t head_rows = HEAD_LOGIT_BYTES / sizeof(float) / cfg->model->vocab_size;
    if (head_rows < HEAD_MIN_ROWS)
        head_rows = HEAD_MIN_ROWS;
    f->head_rows = head_rows < cfg->max_rows ? (uint32_t)head_rows : cfg->max_rows;

    struct arena arena = {NULL, 0};
    lay_out(f, &arena);
    f->arena = aligned_alloc(ALIGN_BYTES, arena.at);
    if (!f->arena) {
        rc = status_nomem(st, "activations", arena.at);
        goto fail;
    }
    arena = (struct arena){f->arena, 0};
    lay_out(f, &arena);
    memset(f->sampler, 0, threads_count(cfg->pool) * sizeof *f->sampler);
    if ((rc = create_parts(f, st)) != ST_OK)
        goto fail;
    rope_table(f->cosine, f->sine, &cfg->model->rope, cfg->model->head_dim, cfg->max_context);
    *out = f;
    return ST_OK;
fail:
    host_destroy(f);
    return rc;
}

/* ---- run ---- */

struct row_job {
    struct forward *f;
    const struct forward_batch *b;
    uint32_t layer;
    const float *norm;
    const float *bias;
};

static void embed_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct row_job *j = arg;
    const struct shard_span vocab = j->f->cfg.shard->vocab;
    uint32_t hidden = j->f->cfg.model->hidden;
    for (uint32_t r = first; r < end; r++) {
        float *x = j->f->x + (uint64_t)r * hidden;
        uint32_t local = j->b->token[r] - vocab.first; /* wraps to a large number below first */
        if (local < vocab.count)
            gemm_row(x, &j->f->cfg.weights->embed, local);
        else
            memset(x, 0, hidden * sizeof *x);
    }
}

static void norm_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct row_job *j = arg;
    const struct model_config *m = j->f->cfg.model;
    for (uint32_t r = first; r < end; r++)
        forward_norm_row(j->f->h + (uint64_t)r * m->hidden, j->f->x + (uint64_t)r * m->hidden, j->norm, m->hidden,
                         m->norm_eps);
}

static void add_norm_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct row_job *j = arg;
    const struct model_config *m = j->f->cfg.model;
    for (uint32_t r = first; r < end; r++)
        forward_add_norm_row(j->f->x + (uint64_t)r * m->hidden, j->f->h + (uint64_t)r * m->hidden, j->norm, m->hidden,
                             m->norm_eps);
}

/* Bias, norm of the heads. Then splits qkv: q rotated to its own place, k rotated and v into the slot. */
static void rope_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct row_job *j = arg;
    struct forward *f = j->f;
    const struct layer_weights *w = &f->cfg.weights->layer[j->layer];
    uint32_t d = f->cfg.model->head_dim, heads = f->cfg.shard->heads.count, kv_heads = f->cfg.shard->kv_heads.count;
    uint64_t qkv_width = (uint64_t)(heads + 2 * kv_heads) * d;
    for (uint32_t r = first; r < end; r++) {
        const struct forward_seq *seq = &j->b->seq[f->row_seq[r]];
        const struct kv_view view = kv_slot_view(*f->cfg.kv, seq->slot, j->layer);
        uint32_t position = seq->position + (r - seq->first_row);
        const float *cosine = f->cosine + (uint64_t)position * (d / 2), *sine = f->sine + (uint64_t)position * (d / 2);
        float *q = f->qkv + r * qkv_width, *k = q + (uint64_t)heads * d, *v = k + (uint64_t)kv_heads * d;
        if (w->qkv_bias)
            forward_add_row(q, w->qkv_bias, (uint32_t)qkv_width);
        if (w->q_norm) {
            forward_norm_heads(q, w->q_norm, heads, d, f->cfg.model->norm_eps);
            forward_norm_heads(k, w->k_norm, kv_heads, d, f->cfg.model->norm_eps);
        }
        forward_rope_row(f->q + (uint64_t)r * heads * d, q, cosine, sine, heads, d);
        for (uint32_t h = 0; h < kv_heads; h++) {
            uint64_t at = position * view.token_stride + h * view.head_stride;
            forward_rope_row((float *)(void *)(view.k + at), k + (uint64_t)h * d, cosine, sine, 1, d);
            memcpy(view.v + at, v + (uint64_t)h * d, d * sizeof(float));
        }
    }
}

static void swiglu_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct row_job *j = arg;
    uint32_t n = j->f->cfg.shard->inner.count;
    const float *bias = j->f->cfg.weights->layer[j->layer].gate_up_bias;
    for (uint32_t r = first; r < end; r++) {
        float *gate = j->f->gate_up + (uint64_t)r * 2 * n;
        if (bias)
            forward_add_row(gate, bias, 2 * n);
        forward_swiglu_row(j->f->act + (uint64_t)r * n, gate, gate + n, n);
    }
}

static void bias_rows(void *arg, uint32_t first, uint32_t end, uint32_t worker)
{
    (void)worker;
    const struct row_job *j = arg;
    uint32_t hidden = j->f->cfg.model->hidden;
    for (uint32_t r = first; r < end; r++)
        forward_add_row(j->f->h + (uint64_t)r * hidden, j->bias, hidden);
}

/* h += bias, on rank 0: the sum over the ranks takes it up once. */
static void add_bias(struct forward *f, const struct forward_batch *b, const float *bias)
{
    struct row_job job = {.f = f, .b = b, .bias = bias};
    if (bias && f->rank == 0)
        forward_rows(f->cfg.pool, b->rows, f->cfg.model->hidden, bias_rows, &job);
}

static enum status_code all_reduce(struct forward *f, float *x, uint32_t rows, struct status *st)
{
    return f->ranks == 1 ? ST_OK : comm_all_reduce(f->cfg.comm, x, (size_t)rows * f->cfg.model->hidden, st);
}

static enum status_code attend(struct forward *f, const struct forward_batch *b, uint32_t layer, struct status *st)
{
    const struct model_config *m = f->cfg.model;
    struct kv_view view = {0};
    for (uint32_t i = 0; i < b->seqs; i++) {
        const struct forward_seq *s = &b->seq[i];
        view = kv_slot_view(*f->cfg.kv, s->slot, layer);
        f->attn_seq[i] = (struct attn_seq){
            .k = view.k,
            .v = view.v,
            .first_row = s->first_row,
            .rows = s->rows,
            .kv_len = s->position + s->rows,
        };
    }
    const struct attn_batch batch = {
        .seqs = b->seqs,
        .seq = f->attn_seq,
        .rows = b->rows,
        .heads = f->cfg.shard->heads.count,
        .kv_heads = f->cfg.shard->kv_heads.count,
        .head_dim = m->head_dim,
        .scale = (float)(1.0 / sqrt((double)m->head_dim)),
        .window = model_window(m, layer),
        .kv_dtype = ATTN_F32,
        .token_stride = view.token_stride,
        .head_stride = view.head_stride,
        .q = f->q,
        .out = f->att,
    };
    return attn_run(f->attn, &batch, st);
}

/* h = norm(x) on entry, h = what is to be added to x on return. */
static enum status_code attention_block(struct forward *f, const struct forward_batch *b, uint32_t layer,
                                        struct status *st)
{
    const struct layer_weights *w = &f->cfg.weights->layer[layer];
    uint32_t hidden = f->cfg.model->hidden;
    struct row_job job = {.f = f, .b = b, .layer = layer};
    enum status_code rc;
    if (f->attn) {
        gemm_run(f->gemm, f->qkv, w->qkv.rows, f->h, hidden, b->rows, &w->qkv);
        forward_rows(f->cfg.pool, b->rows, w->qkv.rows, rope_rows, &job);
        if ((rc = attend(f, b, layer, st)) != ST_OK)
            return rc;
    }
    gemm_run(f->gemm, f->h, hidden, f->att, w->o.cols, b->rows, &w->o);
    add_bias(f, b, w->o_bias);
    return all_reduce(f, f->h, b->rows, st);
}

static enum status_code mlp_block(struct forward *f, const struct forward_batch *b, uint32_t layer, struct status *st)
{
    const struct layer_weights *w = &f->cfg.weights->layer[layer];
    uint32_t hidden = f->cfg.model->hidden;
    struct row_job job = {.f = f, .b = b, .layer = layer};
    gemm_run(f->gemm, f->gate_up, w->gate_up.rows, f->h, hidden, b->rows, &w->gate_up);
    forward_rows(f->cfg.pool, b->rows, 4ull * w->down.cols, swiglu_rows, &job); /* an exp is worth some plain floats */
    gemm_run(f->gemm, f->h, hidden, f->act, w->down.cols, b->rows, &w->down);
    add_bias(f, b, w->down_bias);
    return all_reduce(f, f->h, b->rows, st);
}

static enum status_code host_run(struct forward *f, const struct forward_batch *b, uint32_t *tokens, struct status *st)
{
    if (b->rows == 0)
        return ST_OK;
    const struct model_config *m = f->cfg.model;
    const struct model_weights *w = f->cfg.weights;
    struct row_job job = {.f = f, .b = b};
    enum status_code rc;
    for (uint32_t i = 0; i < b->seqs; i++)
        for (uint32_t r = 0; r < b->seq[i].rows; r++)
            f->row_seq[b->seq[i].first_row + r] = i;

    forward_rows(f->cfg.pool, b->rows, m->hidden, embed_rows, &job);
    if ((rc = all_reduce(f, f->x, b->rows, st)) != ST_OK)
        return rc;
    job.norm = w->layer[0].attn_norm;
    forward_rows(f->cfg.pool, b->rows, m->hidden, norm_rows, &job);
    for (uint32_t l = 0; l < m->layers; l++) {
        if ((rc = attention_block(f, b, l, st)) != ST_OK)
            return rc;
        job.norm = w->layer[l].mlp_norm;
        forward_rows(f->cfg.pool, b->rows, 2ull * m->hidden, add_norm_rows, &job);
        if ((rc = mlp_block(f, b, l, st)) != ST_OK)
            return rc;
        if (l + 1 < m->layers) {
            job.norm = w->layer[l + 1].attn_norm;
            forward_rows(f->cfg.pool, b->rows, 2ull * m->hidden, add_norm_rows, &job);
        }
    }
    return forward_head(f, b, tokens, st); /* adds the last h to the rows that it needs */
}

/* The head keeps the logits of its last block; with one sample that is the one. */
static enum status_code host_logits(struct forward *f, float *out, struct status *st)
{
    (void)st;
    memcpy(out, f->logits, f->cfg.shard->vocab.count * sizeof *out);
    return ST_OK;
}

const struct forward_ops forward_ops_host = {
    .options = SAMPLE_ALL,
    .create = host_create,
    .destroy = host_destroy,
    .run = host_run,
    .logits = host_logits,
};
