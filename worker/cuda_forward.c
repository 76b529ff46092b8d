/* cuda_forward.c - a forward on a device: what it takes, and all that it takes at once. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/cuda_internal.h"
#include "worker/cuda_taken.h"

#define ALIGN_BYTES      256
#define HEAD_LOGIT_BYTES (128u << 20) /* of logits held at a time, by which the rows of the LM head are cut */
#define HEAD_MIN_ROWS    8
#define ADJUSTED_BYTES   (32u << 20) /* of adjusted logits held at a time */
#define VOCAB_MAX        (1u << 18)  /* of cuda_sample_rows */
#define KV_BYTES         2           /* bf16 */

enum status_code cuda_check(cudaError_t err, struct status *st, const char *what)
{
    if (err == cudaSuccess)
        return ST_OK;
    cudaGetLastError();
    return status_set(st, err == cudaErrorMemoryAllocation ? ST_RESOURCE_EXHAUSTED : ST_INTERNAL, "%s: %s (%s)", what,
                      cudaGetErrorString(err), cudaGetErrorName(err));
}

/* ---- layout ---- */

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

/* A slot has rows in a batch once. */
uint32_t cuda_forward_max_seqs(const struct forward_config *cfg)
{
    return cfg->max_samples;
}

static uint32_t head_rows(const struct forward_config *c)
{
    uint64_t rows = HEAD_LOGIT_BYTES / sizeof(float) / c->model->vocab_size;
    if (rows < HEAD_MIN_ROWS)
        rows = HEAD_MIN_ROWS;
    return rows < c->max_rows ? (uint32_t)rows : c->max_rows;
}

static uint32_t adjusted_rows(const struct forward_config *c)
{
    uint64_t rows = ADJUSTED_BYTES / sizeof(float) / c->model->vocab_size;
    if (rows < HEAD_MIN_ROWS)
        rows = HEAD_MIN_ROWS;
    return rows < c->max_samples ? (uint32_t)rows : c->max_samples;
}

static void lay_out(struct forward *f, struct arena *a)
{
    const struct forward_config *c = &f->cfg;
    const struct model_config *m = c->model;
    const struct shard *s = c->shard;
    uint64_t rows = c->max_rows, d = m->head_dim, q_width = s->heads.count * d;
    uint64_t gate_up_bytes = 4ull * s->inner.count, hidden_bytes = 4ull * m->hidden; /* also scratch for either */
    uint64_t qkv_bytes = 2 * (q_width + 2 * s->kv_heads.count * d);
    uint64_t scratch = gate_up_bytes > hidden_bytes ? gate_up_bytes : hidden_bytes;
    f->x = take(a, rows, hidden_bytes);
    f->h = take(a, rows, hidden_bytes / 2);
    f->qkv = take(a, rows, qkv_bytes);
    f->att = take(a, rows, 2 * q_width);
    f->gate_up = take(a, rows, scratch > qkv_bytes ? scratch : qkv_bytes);
    f->act = take(a, rows, gate_up_bytes / 2);
    f->cosine = take(a, (uint64_t)c->max_context * (d / 2), sizeof(float));
    f->sine = take(a, (uint64_t)c->max_context * (d / 2), sizeof(float));
    f->picked = take(a, f->head_rows, hidden_bytes / 2);
    f->logits = take(a, (uint64_t)f->head_rows * m->vocab_size, sizeof(float));
    f->choice = take(a, rows, sizeof *f->choice);
    f->last = take(a, c->max_slots, sizeof *f->last);
    f->adjusted_rows = adjusted_rows(c);
    f->adjusted = take(a, (uint64_t)f->adjusted_rows * m->vocab_size, sizeof *f->adjusted);
    uint64_t tables = cuda_options_tables(c->max_slots, m->vocab_size);
    f->scores = take(a, rows, sizeof *f->scores);
    f->seen = take(a, tables * m->vocab_size, sizeof *f->seen);
    f->lists = take(a, tables * cuda_options_list_words(m->vocab_size), sizeof *f->lists);
}

/* The same on both sides of the bus. */
static void lay_out_step(const struct forward_config *c, struct arena *a, struct cuda_row **row, uint32_t **counts,
                         struct attn_seq **seq, struct cuda_sample **sample, struct cuda_adjust **adjust,
                         struct cuda_fed **fed, struct cuda_score **score)
{
    *row = take(a, c->max_rows, sizeof **row);
    *counts = take(a, 1, sizeof **counts);
    *seq = take(a, cuda_forward_max_seqs(c), sizeof **seq);
    *sample = take(a, c->max_rows, sizeof **sample);
    *adjust = take(a, c->max_samples, sizeof **adjust);
    *fed = take(a, c->max_rows, sizeof **fed);
    *score = take(a, c->max_rows, sizeof **score);
}

/* ---- attention ---- */

static uint32_t window_of(const struct model_config *m)
{
    for (uint32_t l = 0; l < m->layers; l++)
        if (model_window(m, l))
            return model_window(m, l);
    return 0;
}

static bool any_layer_sees_all(const struct model_config *m)
{
    for (uint32_t l = 0; l < m->layers; l++)
        if (!model_window(m, l))
            return true;
    return false;
}

static enum status_code create_attention(struct attn_gpu **out, const struct forward_config *c, uint32_t window,
                                         struct status *st)
{
    const struct model_config *m = c->model;
    uint64_t half = (uint64_t)c->shard->kv_heads.count * m->head_dim * KV_BYTES;
    struct attn_gpu_config cfg = {
        .dtype = ATTN_BF16,
        .heads = c->shard->heads.count,
        .kv_heads = c->shard->kv_heads.count,
        .head_dim = m->head_dim,
        .scale = (float)(1.0 / sqrt((double)m->head_dim)),
        .window = window,
        .token_stride = m->layers * 2 * half, /* memory.h: [token][layer][K|V][kv head][D] */
        .head_stride = (uint64_t)m->head_dim * KV_BYTES,
        .max_seqs = cuda_forward_max_seqs(c),
        .max_rows = c->max_rows,
        .max_kv_len = c->max_context,
        .policy = c->attention,
        .batch_invariant = c->batch_invariant,
    };
    enum status_code rc = cuda_check(cudaGetDevice(&cfg.device), st, "cudaGetDevice");
    if (rc == ST_OK)
        rc = attn_gpu_pick(&cfg, st);
    if (rc == ST_OK)
        rc = attn_gpu_create(out, &cfg, st);
    return rc == ST_OK ? ST_OK : status_prefix(st, "attention");
}

static enum status_code create_attentions(struct attn_gpu *out[2], const struct forward_config *c, struct status *st)
{
    enum status_code rc = ST_OK;
    uint32_t window = window_of(c->model);
    if (c->shard->heads.count == 0)
        return ST_OK; /* more ranks than heads */
    if (any_layer_sees_all(c->model))
        rc = create_attention(&out[0], c, 0, st);
    if (rc == ST_OK && window)
        rc = create_attention(&out[1], c, window, st);
    return rc;
}

/* ---- what is computed, and what it takes ---- */

static enum status_code check_model(const struct forward_config *c, struct status *st)
{
    const struct model_config *m = c->model;
    if (comm_size(c->comm) > COMM_GPU_MAX_RANKS)
        return status_set(st, ST_UNIMPLEMENTED, "%u ranks on CUDA devices, at most %d are joined", comm_size(c->comm),
                          COMM_GPU_MAX_RANKS);
    const struct {
        const char *name;
        uint32_t value, unit, max;
    } size[] = {
        {"hidden_size", m->hidden, 4, UINT32_MAX},
        {"intermediate_size", m->inner, 4, UINT32_MAX},
        {"head_dim", m->head_dim, 8, 256},
        {"vocab_size", m->vocab_size, 1, VOCAB_MAX},
    };
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        if (size[i].value % size[i].unit || size[i].value > size[i].max)
            return status_set(st, ST_UNIMPLEMENTED, "%s: %u; on a CUDA device a multiple of %u up to %u is computed",
                              size[i].name, size[i].value, size[i].unit, size[i].max);
    return ST_OK;
}

/* ---- the ranks ---- */

static struct comm_gpu_config group_config(const struct forward_config *c)
{
    return (struct comm_gpu_config){
        .comm = c->comm,
        .max_rows = c->max_rows,
        .hidden = c->model->hidden,
        .gather_rows = head_rows(c),
        .cols_first = c->shard->vocab.first,
        .cols_count = c->shard->vocab.count,
        .cols_total = c->model->vocab_size,
        .way = c->batch_invariant ? COMM_GPU_PEER : c->all_reduce, /* PEER: one order of the sum for all sizes */
    };
}

static enum status_code create_group(struct comm_gpu **out, const struct forward_config *c, struct status *st)
{
    struct comm_gpu_config cfg = group_config(c);
    if (comm_size(c->comm) == 1)
        return ST_OK;
    enum status_code rc = cuda_check(cudaGetDevice(&cfg.device), st, "cudaGetDevice");
    return rc == ST_OK ? comm_gpu_create(out, &cfg, st) : rc;
}

static enum status_code forward_connect(struct forward *f, struct status *st)
{
    enum status_code rc = ST_OK;
    if (f->group && !comm_gpu_connected(f->group)) {
        char text[400];
        rc = comm_gpu_connect(f->group, st);
        snprintf(text, sizeof text, "sums over ranks: %s", comm_gpu_text(f->group));
        if (rc == ST_OK && f->cfg.note && comm_rank(f->cfg.comm) == 0)
            f->cfg.note(f->cfg.note_ctx, text);
    }
    return rc == ST_OK && !f->warm ? cuda_forward_warm(f, st) : rc;
}

/* What the driver takes for a layer of a graph: with 184 graphs more of 32 layers 154 to 172 MiB were in use, 27 to 30 KiB (H200;
 * h200_2026-11-30_late.txt and _buckets.txt). */
#define GRAPH_LAYER_BYTES (32u << 10)

/* Of each kind and bucket, though not all are made: of decodes alone up to the slots, of as many ways as attention has. */
static uint64_t graph_bytes(const struct forward_config *cfg)
{
    uint32_t rows[CUDA_BUCKETS_MAX];
    const uint64_t graphs = cfg->eager ? 0 : (uint64_t)cuda_bucket_list(cfg->max_rows, rows) * CUDA_KINDS;
    return graphs * cfg->model->layers * GRAPH_LAYER_BYTES;
}

static enum status_code forward_bytes(uint64_t *out, const struct forward_config *cfg, struct status *st)
{
    struct forward f = {.cfg = *cfg, .head_rows = head_rows(cfg)};
    struct cuda_row *row;
    uint32_t *counts;
    struct attn_seq *seq;
    struct cuda_sample *sample;
    struct cuda_adjust *adjust;
    struct cuda_fed *fed;
    struct cuda_score *score;
    enum status_code rc = check_model(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct arena a = {NULL, 0};
    lay_out(&f, &a);
    lay_out_step(cfg, &a, &row, &counts, &seq, &sample, &adjust, &fed, &score);
    uint64_t bytes = a.at + CUDA_GEMM_WORKSPACE_BYTES + graph_bytes(cfg);
    if (comm_size(cfg->comm) > 1) {
        const struct comm_gpu_config group = group_config(cfg);
        bytes += comm_gpu_bytes(&group);
    }
    rc = create_attentions(f.attn, cfg, st); /* only its back end knows what it takes */
    for (int i = 0; i < 2; i++) {
        if (f.attn[i])
            bytes += attn_gpu_workspace_bytes(f.attn[i]);
        attn_gpu_destroy(f.attn[i]);
    }
    if (rc == ST_OK)
        *out = bytes;
    return rc;
}

/* ---- create ---- */

static void make_buckets(struct forward *f)
{
    uint32_t rows[CUDA_BUCKETS_MAX];
    f->n_buckets = cuda_bucket_list(f->cfg.max_rows, rows);
    for (uint32_t i = 0; i < f->n_buckets; i++)
        f->bucket[i].rows = rows[i];
}

static enum status_code allocate_flight(struct cuda_flight *l, const struct forward_config *c, uint64_t step_bytes,
                                        struct status *st)
{
    enum status_code rc;
    const uint32_t vocab = c->model->vocab_size;
    uint64_t list_bytes = sizeof *l->lists * cuda_options_tables(c->max_slots, vocab) * cuda_options_list_words(vocab);
    if ((rc = cuda_check(cudaMallocHost(&l->host_step, step_bytes), st, "pinned batch")) != ST_OK ||
        (rc = cuda_check(cudaMallocHost((void **)&l->scores, c->max_rows * sizeof *l->scores), st, "pinned scores")) !=
            ST_OK ||
        (rc = cuda_check(cudaMallocHost((void **)&l->lists, list_bytes), st, "pinned options")) != ST_OK ||
        (rc = cuda_check(cudaMallocHost((void **)&l->choice, c->max_rows * sizeof *l->choice), st, "pinned tokens")) !=
            ST_OK ||
        (rc = cuda_check(cudaMallocHost((void **)&l->drawn, c->max_rows * sizeof *l->drawn), st, "pinned tokens")) !=
            ST_OK ||
        (rc = cuda_check(cudaMallocHost((void **)&l->fault, 2 * sizeof *l->fault), st, "pinned faults")) != ST_OK ||
        (rc = cuda_check(cudaEventCreateWithFlags(&l->done, c->timed ? 0 : cudaEventDisableTiming), st, "event")) !=
            ST_OK ||
        (c->timed && (rc = cuda_check(cudaEventCreate(&l->begin), st, "event")) != ST_OK))
        return rc;
    struct arena a = {l->host_step, 0};
    lay_out_step(c, &a, &l->row, &l->counts, &l->seq, &l->sample, &l->adjust, &l->fed, &l->score);
    return ST_OK;
}

static void free_flight(struct cuda_flight *l)
{
    if (l->done)
        cudaEventDestroy(l->done);
    if (l->begin)
        cudaEventDestroy(l->begin);
    cudaFreeHost(l->fault);
    cudaFreeHost(l->drawn);
    cudaFreeHost(l->choice);
    cudaFreeHost(l->scores);
    cudaFreeHost(l->lists);
    cudaFreeHost(l->host_step);
}

static enum status_code allocate(struct forward *f, struct status *st)
{
    enum status_code rc;
    struct arena a = {NULL, 0}, step = {NULL, 0};
    lay_out(f, &a);
    lay_out_step(&f->cfg, &step, &f->row, &f->counts, &f->seq, &f->sample, &f->adjust, &f->fed, &f->score);
    f->step_bytes = step.at;
    if ((rc = cuda_check(cudaMalloc(&f->arena, a.at), st, "activations")) != ST_OK ||
        (rc = cuda_check(cudaMemset(f->arena, 0, a.at), st, "activations")) != ST_OK ||
        (rc = cuda_check(cudaMalloc(&f->step, step.at), st, "batch")) != ST_OK ||
        (rc = cuda_check(cudaEventCreateWithFlags(&f->waited, cudaEventDisableTiming), st, "event")) != ST_OK ||
        (rc = cuda_check(cudaMallocHost((void **)&f->host_logits, f->cfg.model->vocab_size * sizeof(float)), st,
                         "pinned logits")) != ST_OK)
        return rc;
    for (uint32_t i = 0; i < CUDA_FLIGHTS; i++)
        if ((rc = allocate_flight(&f->flight[i], &f->cfg, step.at, st)) != ST_OK)
            return rc;
    f->host_adjusted = malloc(f->cfg.model->vocab_size * sizeof(float));
    if (!f->host_adjusted)
        return status_nomem(st, "logits", f->cfg.model->vocab_size * sizeof(float));
    a = (struct arena){f->arena, 0};
    lay_out(f, &a);
    step = (struct arena){f->step, 0};
    lay_out_step(&f->cfg, &step, &f->row, &f->counts, &f->seq, &f->sample, &f->adjust, &f->fed, &f->score);
    return sampler_create(&f->sampler, f->cfg.model->vocab_size, st);
}

static enum status_code set_mark(struct forward *f, struct status *st)
{
    struct timespec t;
    enum status_code rc = cuda_check(cudaEventCreate(&f->mark), st, "event");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventRecord(f->mark, f->stream), st, "event");
    if (rc == ST_OK)
        rc = cuda_check(cudaEventSynchronize(f->mark), st, "event");
    clock_gettime(CLOCK_MONOTONIC, &t);
    f->mark_us = (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
    return rc;
}

static enum status_code fill_rope(struct forward *f, struct status *st)
{
    const struct model_config *m = f->cfg.model;
    size_t n = (size_t)f->cfg.max_context * (m->head_dim / 2);
    float *table = malloc(2 * n * sizeof *table);
    if (!table)
        return status_nomem(st, "rotary angles", 2 * n * sizeof *table);
    rope_table(table, table + n, &m->rope, m->head_dim, f->cfg.max_context);
    enum status_code rc =
        cuda_check(cudaMemcpy(f->cosine, table, n * sizeof *table, cudaMemcpyHostToDevice), st, "rotary angles");
    if (rc == ST_OK)
        rc = cuda_check(cudaMemcpy(f->sine, table + n, n * sizeof *table, cudaMemcpyHostToDevice), st, "rotary angles");
    free(table);
    return rc;
}

static void forward_destroy(struct forward *f)
{
    if (!f)
        return;
    if (f->stream)
        cudaStreamSynchronize(f->stream);
    for (uint32_t i = 0; i < f->n_buckets; i++)
        for (int v = 0; v < CUDA_KINDS; v++)
            if (f->bucket[i].graph[v])
                cudaGraphExecDestroy(f->bucket[i].graph[v]);
    comm_gpu_destroy(f->group);
    if (f->waited)
        cudaEventDestroy(f->waited);
    if (f->mark)
        cudaEventDestroy(f->mark);
    for (uint32_t i = 0; i < CUDA_FLIGHTS; i++)
        free_flight(&f->flight[i]);
    attn_gpu_destroy(f->attn[0]);
    attn_gpu_destroy(f->attn[1]);
    cuda_gemm_destroy(f->gemm);
    cuda_options_fini(&f->options);
    sampler_destroy(f->sampler);
    free(f->host_adjusted);
    cudaFreeHost(f->host_logits);
    cudaFree(f->step);
    cudaFree(f->arena);
    if (f->stream)
        cudaStreamDestroy(f->stream);
    free(f);
}

static enum status_code create_products(struct forward *f, struct status *st)
{
    const struct cuda_gemm_config cfg = {
        .stream = f->stream,
        .one_way = f->cfg.batch_invariant,
        .own_first = f->cfg.own_first,
    };
    return cuda_gemm_create(&f->gemm, &cfg, st);
}

static enum status_code forward_create(struct forward **out, const struct forward_config *cfg, struct status *st)
{
    struct forward *f = calloc(1, sizeof *f);
    if (!f)
        return status_nomem(st, "forward", sizeof *f);
    f->cfg = *cfg;
    f->graphs = !cfg->eager;
    f->head_rows = head_rows(cfg);
    make_buckets(f);
    enum status_code rc;
    if ((rc = check_model(cfg, st)) != ST_OK ||
        (rc = cuda_check(cudaStreamCreateWithFlags(&f->stream, cudaStreamNonBlocking), st, "stream")) != ST_OK ||
        (rc = create_products(f, st)) != ST_OK || (rc = allocate(f, st)) != ST_OK ||
        (rc = create_attentions(f->attn, cfg, st)) != ST_OK ||
        (rc = cuda_options_create(&f->options, cfg->max_slots, cfg->model->vocab_size, st)) != ST_OK ||
        (rc = fill_rope(f, st)) != ST_OK || (rc = create_group(&f->group, cfg, st)) != ST_OK ||
        (cfg->tune_dir && (rc = cuda_gemm_remember(f->gemm, cfg->tune_dir, st)) != ST_OK) ||
        (rc = cuda_check(cudaDeviceSynchronize(), st, "preparing the device")) != ST_OK ||
        (cfg->timed && (rc = set_mark(f, st)) != ST_OK)) {
        forward_destroy(f);
        return rc;
    }
    *out = f;
    return ST_OK;
}

static void forward_time_of(struct forward *f, double *begin_us, double *end_us)
{
    *begin_us = f->begin_us;
    *end_us = f->end_us;
}

static enum status_code forward_logits(struct forward *f, float *out, struct status *st)
{
    const float *logits = f->group ? comm_gpu_share(f->group) : f->logits;
    return cuda_check(cudaMemcpy(out, logits, f->cfg.shard->vocab.count * sizeof *out, cudaMemcpyDeviceToHost), st,
                      "logits");
}

/* ---- calls of a step, which take no memory once all is prepared ---- */

static enum status_code left(enum status_code rc)
{
    cuda_taken_forbid(NULL);
    return rc;
}

static enum status_code forward_start(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                      struct status *st)
{
    cuda_taken_forbid(f->warm ? "start of a step" : NULL);
    return left(cuda_forward_start(f, b, tokens, st));
}

static enum status_code forward_poll(struct forward *f, bool *done, struct status *st)
{
    cuda_taken_forbid(f->warm ? "look at a step" : NULL);
    return left(cuda_forward_poll(f, done, st));
}

static enum status_code forward_finish(struct forward *f, struct status *st)
{
    cuda_taken_forbid(f->warm ? "end of a step" : NULL);
    return left(cuda_forward_finish(f, st));
}

static enum status_code forward_run(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                    struct status *st)
{
    enum status_code rc = forward_start(f, b, tokens, st);
    return rc == ST_OK ? forward_finish(f, st) : rc;
}

static enum status_code forward_begin(struct forward *f, uint32_t slot, const struct sample_adjust *a,
                                      uint32_t output_at, bool *kept, struct status *st)
{
    cuda_taken_forbid(f->warm ? "options of a slot" : NULL);
    return left(cuda_forward_begin(f, slot, a, output_at, kept, st));
}

const struct forward_ops forward_ops_cuda = {
    .options = SAMPLE_ALL,
    .bytes = forward_bytes,
    .create = forward_create,
    .destroy = forward_destroy,
    .connect = forward_connect,
    .run = forward_run,
    .start = forward_start,
    .poll = forward_poll,
    .finish = forward_finish,
    .time_of = forward_time_of,
    .begin = forward_begin,
    .end = cuda_forward_end,
    .logits = forward_logits,
};
