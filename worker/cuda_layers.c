/* cuda_layers.c - the layers of a model on a device: embedding, attention and MLP of each, launched one by one or as the bucket's graph.
 */
#include "worker/cuda_internal.h"

/* q, k and v of f->h: q rotated in f->qkv, K and V in the slots. */
static enum status_code project(struct forward *f, const struct cuda_rope *rope, uint32_t layer, uint32_t rows,
                                struct status *st)
{
    const struct layer_weights *w = &f->cfg.weights->layer[layer];
    const struct cuda_product qkv = cuda_product_of(&w->qkv, f->h, f->qkv, CUDA_OUT_BF16, rows);
    if (cuda_gemm_is_few(f->gemm, &qkv) && !rope->q_norm && !rope->k_norm)
        return cuda_check(cuda_few_rope(f->stream, rope, f->h, w->qkv.data, rows, w->qkv.cols), st,
                          "q, k and v of few rows");
    enum status_code rc = cuda_gemm_run(f->gemm, &qkv, st);
    return rc == ST_OK ? cuda_check(cuda_rope_kv(f->stream, rope, rows), st, "rotation") : rc;
}

static enum status_code attention(struct forward *f, const struct attn_gpu_step *step, uint32_t layer,
                                  struct status *st)
{
    const struct model_config *m = f->cfg.model;
    const struct layer_weights *w = &f->cfg.weights->layer[layer];
    const struct shard *s = f->cfg.shard;
    uint64_t head_bytes = 2ull * m->head_dim, half = s->kv_heads.count * head_bytes;
    const struct cuda_rope rope = {
        .qkv = f->qkv,
        .row = f->row,
        .cosine = f->cosine,
        .sine = f->sine,
        .bias = w->qkv_bias,
        .q_norm = w->q_norm,
        .k_norm = w->k_norm,
        .eps = m->norm_eps,
        .heads = s->heads.count,
        .kv_heads = s->kv_heads.count,
        .head_dim = m->head_dim,
        .layer_offset = layer * 2 * half, /* memory.h: [token][layer][K|V][kv head][D] */
        .v_offset = half,
        .head_stride = head_bytes,
    };
    if (s->heads.count == 0)
        return ST_OK;
    enum status_code rc = project(f, &rope, layer, step->max_rows, st);
    if (rc != ST_OK)
        return rc;
    const struct attn_gpu_io io = {
        .q = f->qkv,
        .out = f->att,
        .q_row_stride = s->heads.count * head_bytes + 2 * half,
        .out_row_stride = s->heads.count * head_bytes,
        .kv_offset = rope.layer_offset,
    };
    return attn_gpu_run(f->attn[model_window(m, layer) ? 1 : 0], step, &io, st);
}

/* act = silu(gate) * up of f->h */
static struct cuda_product gated(struct forward *f, const struct layer_weights *w, uint32_t rows)
{
    struct cuda_product p = cuda_product_of(&w->gate_up, f->h, f->act, CUDA_OUT_SWIGLU, rows);
    p.bias = w->gate_up_bias;
    p.gate_up = f->gate_up;
    return p;
}

enum { PART_ATTENTION, PART_MLP, PART_EMBEDDING }; /* in turn, as comm.h wants it */

static enum status_code add_parts(struct forward *f, uint32_t part, bool set, const float *bias, const float *weight,
                                  uint32_t rows, struct status *st)
{
    const struct comm_gpu_sum sum = {
        .part = part,
        .rows = rows,
        .set = set,
        .x = f->x,
        .bias = bias,
        .weight = weight,
        .eps = f->cfg.model->norm_eps,
        .h = f->h,
        .stream = f->stream,
    };
    return comm_gpu_sum(f->group, &sum, st);
}

/* The products whose results are added to x: by themselves, or as this rank's part of a sum. */
static struct cuda_product adding(struct forward *f, const struct mat *w, const void *in, uint32_t part, uint32_t rows)
{
    if (!f->group)
        return cuda_product_of(w, in, f->x, CUDA_OUT_F32_ADD, rows);
    return cuda_product_of(w, in, comm_gpu_part(f->group, part), CUDA_OUT_BF16, rows);
}

static enum status_code run_adding(struct forward *f, const struct cuda_product *p, struct status *st)
{
    if (f->group && p->w->cols == 0) /* more ranks than heads: nothing of the sum is ours */
        return cuda_check(cudaMemsetAsync(p->y, 0, (uint64_t)p->rows * p->w->rows * 2, f->stream), st, "empty part");
    return cuda_gemm_run(f->gemm, p, st);
}

/* From f->h, the normed x, on: x += attention, x += MLP. One rank: the product adds, the bias and the norm of what comes
 * next are a kernel of their own. Several: sum, bias and norm are one. last_bias is what the layer in front has left. */
static enum status_code layer(struct forward *f, const struct attn_gpu_step *step, uint32_t l, struct status *st)
{
    const struct model_config *m = f->cfg.model;
    const struct layer_weights *w = &f->cfg.weights->layer[l], *next = l + 1 < m->layers ? w + 1 : NULL;
    const float *last_bias = l ? w[-1].down_bias : NULL;
    uint32_t rows = step->max_rows;
    const struct cuda_product o = adding(f, &w->o, f->att, PART_ATTENTION, rows), act = gated(f, w, rows),
                              down = adding(f, &w->down, f->act, PART_MLP, rows);
    enum status_code rc = ST_OK;
    if (!f->group)
        rc = cuda_check(cuda_norm(f->stream, f->h, f->x, last_bias, w->attn_norm, m->norm_eps, NULL, rows, m->hidden),
                        st, "norm");
    if (rc != ST_OK || (rc = attention(f, step, l, st)) != ST_OK || (rc = run_adding(f, &o, st)) != ST_OK)
        return rc;
    if (f->group)
        rc = add_parts(f, PART_ATTENTION, false, w->o_bias, w->mlp_norm, rows, st);
    else
        rc = cuda_check(cuda_norm(f->stream, f->h, f->x, w->o_bias, w->mlp_norm, m->norm_eps, NULL, rows, m->hidden),
                        st, "norm");
    if (rc != ST_OK || (rc = cuda_gemm_run(f->gemm, &act, st)) != ST_OK || (rc = run_adding(f, &down, st)) != ST_OK ||
        !f->group)
        return rc;
    return add_parts(f, PART_MLP, false, w->down_bias, next ? next->attn_norm : NULL, rows, st);
}

static enum status_code embed(struct forward *f, uint32_t rows, struct status *st)
{
    const struct cuda_embedding e = {
        .row = f->row,
        .last = f->last,
        .table = f->cfg.weights->embed.data,
        .first = f->cfg.shard->vocab.first,
        .count = f->cfg.shard->vocab.count,
        .rows = rows,
        .hidden = f->cfg.model->hidden,
    };
    if (!f->group)
        return cuda_check(cuda_embed(f->stream, f->x, &e), st, "embedding");
    enum status_code rc =
        cuda_check(cuda_embed_part(f->stream, comm_gpu_part(f->group, PART_EMBEDDING), &e), st, "embedding");
    if (rc != ST_OK)
        return rc;
    return add_parts(f, PART_EMBEDDING, true, NULL, f->cfg.weights->layer[0].attn_norm, rows, st);
}

static enum status_code launch_layers(struct forward *f, uint32_t rows, uint32_t kind, struct status *st)
{
    const struct model_config *m = f->cfg.model;
    uint32_t max_seqs = cuda_forward_max_seqs(&f->cfg);
    const struct attn_gpu_step step = {
        .seq = f->seq,
        .counts = f->counts,
        .max_seqs = rows < max_seqs ? rows : max_seqs,
        .max_rows = rows,
        .max_seq_rows = kind == CUDA_DECODES ? 1 : rows,
        .way = kind == CUDA_DECODES ? ATTN_WAY_APART : (enum attn_gpu_way)kind,
        .stream = f->stream,
    };
    enum status_code rc;
    for (int i = 0; i < 2; i++)
        if (f->attn[i] && (rc = attn_gpu_plan(f->attn[i], &step, st)) != ST_OK)
            return rc;
    rc = embed(f, rows, st);
    for (uint32_t l = 0; rc == ST_OK && l < m->layers; l++)
        if ((rc = layer(f, &step, l, st)) != ST_OK)
            status_prefix(st, "layer %u", l);
    return rc;
}

/* Layers are alike. */
enum status_code cuda_forward_prepare(struct forward *f, struct cuda_bucket *b, struct status *st)
{
    const struct layer_weights *turn[CUDA_GEMM_TURNS], *w = f->cfg.weights->layer;
    for (uint32_t i = 0; i < CUDA_GEMM_TURNS; i++)
        turn[i] = &w[i % f->cfg.model->layers];
    const struct {
        struct cuda_product product;
        const void *w[CUDA_GEMM_TURNS];
    } all[] = {
#define TURNS(field) {turn[0]->field.data, turn[1]->field.data, turn[2]->field.data, turn[3]->field.data}
        {cuda_product_of(&w->qkv, f->h, f->qkv, CUDA_OUT_BF16, b->rows), TURNS(qkv)},
        {adding(f, &w->o, f->att, PART_ATTENTION, b->rows), TURNS(o)},
        {gated(f, w, b->rows), TURNS(gate_up)},
        {adding(f, &w->down, f->act, PART_MLP, b->rows), TURNS(down)},
#undef TURNS
    };
    _Static_assert(CUDA_GEMM_TURNS == 4, "TURNS lists them");
    for (size_t i = 0; !b->prepared && i < sizeof all / sizeof *all; i++) {
        enum status_code rc = cuda_gemm_prepare(f->gemm, &all[i].product, all[i].w, f->gate_up, st);
        if (rc != ST_OK)
            return rc;
    }
    b->prepared = true;
    return ST_OK;
}

static enum status_code capture(cudaGraphExec_t *out, struct forward *f, uint32_t rows, uint32_t kind,
                                struct status *st)
{
    cudaGraph_t graph = NULL;
    enum status_code rc =
        cuda_check(cudaStreamBeginCapture(f->stream, cudaStreamCaptureModeThreadLocal), st, "capture of a graph");
    if (rc != ST_OK)
        return rc;
    rc = launch_layers(f, rows, kind, st);
    cudaError_t err = cudaStreamEndCapture(f->stream, &graph);
    if (rc == ST_OK)
        rc = cuda_check(err, st, "capture of a graph");
    if (rc == ST_OK)
        rc = cuda_check(cudaGraphInstantiate(out, graph, 0), st, "instantiation of a graph");
    if (rc == ST_OK) /* else the first launch, within a step, would do it */
        rc = cuda_check(cudaGraphUpload(*out, f->stream), st, "upload of a graph");
    if (graph)
        cudaGraphDestroy(graph);
    return rc;
}

enum status_code cuda_forward_capture(struct forward *f, struct cuda_bucket *b, uint32_t kind, struct status *st)
{
    enum status_code rc = capture(&b->graph[kind], f, b->rows, kind, st);
    return rc == ST_OK ? rc : status_prefix(st, "graph of %u rows", b->rows);
}

enum status_code cuda_forward_layers(struct forward *f, struct cuda_bucket *b, uint32_t kind, struct status *st)
{
    enum status_code rc = cuda_forward_prepare(f, b, st);
    if (rc != ST_OK || !b->graph[kind])
        return rc == ST_OK ? launch_layers(f, b->rows, kind, st) : rc;
    return cuda_check(cudaGraphLaunch(b->graph[kind], f->stream), st, "graph of the layers");
}
