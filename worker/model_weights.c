#include "worker/model_weights_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/memory.h"
#include "worker/model_convert.h"

#define ALIGN_BYTES 64

/* A tensor of a stack: its name and the rows and columns that this rank takes. */
struct part {
    const char *name;
    uint32_t full_rows; /* 0: the tensor has one dimension */
    struct shard_span rows;
};

static struct shard_span whole(uint32_t n)
{
    return (struct shard_span){0, n};
}

static struct shard_span times(struct shard_span s, uint32_t factor)
{
    return (struct shard_span){s.first * factor, s.count * factor};
}

static enum status_code get_checked(struct model_tensor *t, const struct model_loader *l, const char *name,
                                    uint32_t full_rows, uint32_t full_cols, struct status *st)
{
    if (!l->source) {
        *t = (struct model_tensor){.dtype = MAT_BF16};
        return ST_OK;
    }
    enum status_code rc = model_source_get(t, l->source, name, st);
    if (rc != ST_OK)
        return rc;
    char expected[32], found[SAFETENSORS_MAX_DIMS * 21 + 3] = "[";
    uint32_t dims = full_rows ? 2 : 1;
    if (t->dims == dims && t->shape[dims - 1] == full_cols && (dims == 1 || t->shape[0] == full_rows))
        return ST_OK;
    size_t n = 1;
    for (uint32_t i = 0; i < t->dims; i++)
        n += (size_t)snprintf(found + n, sizeof found - n, "%s%llu", i ? ", " : "", (unsigned long long)t->shape[i]);
    if (full_rows)
        snprintf(expected, sizeof expected, "[%u, %u]", full_rows, full_cols);
    else
        snprintf(expected, sizeof expected, "[%u]", full_cols);
    return status_set(st, ST_DATA_LOSS, "%s: tensor %s: shape %s], expected %s by the model's configuration", t->file,
                      t->name, found, expected);
}

/* Never 0, which stands for ones. */
static uint64_t random_seed(const struct model_loader *l, const char *tensor)
{
    uint64_t seed = model_random_seed(tensor) ^ (l->seed - 1ull) * 0x9E3779B97F4A7C15ull;
    return seed ? seed : 1;
}

/* Stacks the rows of n parts, columns cols of full_cols, into one matrix. */
static enum status_code plan_stack(struct model_loader *l, struct mat *out, const struct part *part, uint32_t n,
                                   uint32_t full_cols, struct shard_span cols, struct status *st)
{
    enum status_code rc;
    struct mat mat = {.cols = cols.count};
    size_t first = l->n_pieces;
    for (uint32_t i = 0; i < n; i++) {
        struct piece *p = &l->piece[l->n_pieces];
        if ((rc = get_checked(&p->src, l, part[i].name, part[i].full_rows, full_cols, st)) != ST_OK)
            return rc;
        p->seed = part[i].full_rows ? random_seed(l, part[i].name) : 0;
        p->rows = part[i].rows;
        p->cols = cols;
        p->src_cols = full_cols;
        if (i == 0)
            mat.dtype = l->store ? MAT_BF16 : p->src.dtype;
        else if (mat.dtype != p->src.dtype && !l->store)
            mat.dtype = MAT_F32;
        if (part[i].full_rows == 0)
            mat.dtype = MAT_F32;
        mat.rows += part[i].rows.count;
        l->n_pieces++;
    }
    uint64_t row_bytes = (uint64_t)cols.count * mat_elem_bytes(mat.dtype), at = l->bytes;
    for (size_t i = first; i < l->n_pieces; i++) {
        l->piece[i].at = at;
        l->piece[i].dtype = mat.dtype;
        at += l->piece[i].rows.count * row_bytes;
    }
    if (at != l->bytes)
        mat.data = (const void *)(uintptr_t)(l->bytes + 1); /* offset + 1, until the arena exists: not NULL */
    l->bytes = (at + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    *out = mat;
    return ST_OK;
}

static enum status_code plan_norm(struct model_loader *l, const float **out, const char *name, uint32_t n,
                                  struct status *st)
{
    struct mat mat;
    enum status_code rc = plan_stack(l, &mat, &(struct part){name, 0, {0, 1}}, 1, n, whole(n), st);
    if (rc == ST_OK)
        *out = mat.data;
    return rc;
}

/* Stacks spans of n vectors; full_rows is the length of each. Nothing of all of them: *out stays NULL. */
static enum status_code plan_vector(struct model_loader *l, const float **out, const struct part *part, uint32_t n,
                                    struct status *st)
{
    uint64_t at = l->bytes;
    for (uint32_t i = 0; i < n; i++) {
        struct piece *p = &l->piece[l->n_pieces];
        enum status_code rc = get_checked(&p->src, l, part[i].name, 0, part[i].full_rows, st);
        if (rc != ST_OK)
            return rc;
        p->seed = random_seed(l, part[i].name);
        p->rows = whole(1);
        p->cols = part[i].rows;
        p->src_cols = part[i].full_rows;
        if (p->src.quant)
            return status_set(st, ST_UNIMPLEMENTED, "%s: tensor %s: quantised biases are not supported", p->src.file,
                              p->src.name);
        if (p->src.paired_rows) { /* a matrix of one column, whose rows stand in another order in the file */
            p->rows = part[i].rows;
            p->cols = whole(1);
            p->src_cols = 1;
        }
        p->at = at;
        p->dtype = MAT_F32;
        at += part[i].rows.count * sizeof(float);
        l->n_pieces++;
    }
    if (at != l->bytes)
        *out = (const void *)(uintptr_t)(l->bytes + 1); /* as in plan_stack */
    l->bytes = (at + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    return ST_OK;
}

/* Biases, and norms of heads, of those that the model has. */
static enum status_code plan_layer_vectors(struct model_loader *l, struct layer_weights *w, uint32_t layer,
                                           struct status *st)
{
    const struct model_config *m = l->m;
    static const char *const suffix[] = {
        "self_attn.q_proj.bias", "self_attn.k_proj.bias",   "self_attn.v_proj.bias",
        "self_attn.o_proj.bias", "mlp.gate_proj.bias",      "mlp.up_proj.bias",
        "mlp.down_proj.bias",    "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    };
    enum { Q, K, V, O, GATE, UP, DOWN, Q_NORM, K_NORM, N };
    char name[N][80];
    for (int i = 0; i < N; i++)
        snprintf(name[i], sizeof name[i], "model.layers.%u.%s", layer, suffix[i]);

    uint32_t q_rows = m->heads * m->head_dim, kv_rows = m->kv_heads * m->head_dim;
    struct shard_span q = times(l->shard->heads, m->head_dim), kv = times(l->shard->kv_heads, m->head_dim);
    const struct part qkv[] = {{name[Q], q_rows, q}, {name[K], kv_rows, kv}, {name[V], kv_rows, kv}};
    const struct part gate_up[] = {{name[GATE], m->inner, l->shard->inner}, {name[UP], m->inner, l->shard->inner}};
    const struct part o = {name[O], m->hidden, whole(m->hidden)}, down = {name[DOWN], m->hidden, whole(m->hidden)};
    enum status_code rc = ST_OK;
    if (m->qkv_bias)
        rc = plan_vector(l, &w->qkv_bias, qkv, 3, st);
    if (rc == ST_OK && m->o_bias)
        rc = plan_vector(l, &w->o_bias, &o, 1, st);
    if (rc == ST_OK && m->mlp_bias)
        rc = plan_vector(l, &w->gate_up_bias, gate_up, 2, st);
    if (rc == ST_OK && m->mlp_bias)
        rc = plan_vector(l, &w->down_bias, &down, 1, st);
    if (rc == ST_OK && m->qk_norm)
        rc = plan_norm(l, &w->q_norm, name[Q_NORM], m->head_dim, st);
    if (rc == ST_OK && m->qk_norm)
        rc = plan_norm(l, &w->k_norm, name[K_NORM], m->head_dim, st);
    return rc;
}

static enum status_code plan_layer(struct model_loader *l, struct layer_weights *w, uint32_t layer, struct status *st)
{
    const struct model_config *m = l->m;
    static const char *const suffix[] = {
        "input_layernorm",          "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj",
    };
    enum { ATTN_NORM, Q, K, V, O, MLP_NORM, GATE, UP, DOWN, N };
    char name[N][80];
    for (int i = 0; i < N; i++)
        snprintf(name[i], sizeof name[i], "model.layers.%u.%s.weight", layer, suffix[i]);

    uint32_t q_rows = m->heads * m->head_dim, kv_rows = m->kv_heads * m->head_dim;
    struct shard_span q = times(l->shard->heads, m->head_dim), kv = times(l->shard->kv_heads, m->head_dim);
    struct shard_span inner = l->shard->inner, hidden = whole(m->hidden);
    const struct part qkv[] = {{name[Q], q_rows, q}, {name[K], kv_rows, kv}, {name[V], kv_rows, kv}};
    const struct part gate_up[] = {{name[GATE], m->inner, inner}, {name[UP], m->inner, inner}};
    const struct part o = {name[O], m->hidden, hidden}, down = {name[DOWN], m->hidden, hidden};
    enum status_code rc;
    if ((rc = plan_norm(l, &w->attn_norm, name[ATTN_NORM], m->hidden, st)) != ST_OK ||
        (rc = plan_stack(l, &w->qkv, qkv, 3, m->hidden, hidden, st)) != ST_OK ||
        (rc = plan_stack(l, &w->o, &o, 1, q_rows, q, st)) != ST_OK ||
        (rc = plan_norm(l, &w->mlp_norm, name[MLP_NORM], m->hidden, st)) != ST_OK ||
        (rc = plan_stack(l, &w->gate_up, gate_up, 2, m->hidden, hidden, st)) != ST_OK)
        return rc;
    if ((rc = plan_stack(l, &w->down, &down, 1, m->inner, inner, st)) != ST_OK)
        return rc;
    return plan_layer_vectors(l, w, layer, st);
}

static enum status_code plan_all(struct model_loader *l, struct model_weights *w, struct status *st)
{
    const struct model_config *m = l->m;
    const struct part embed = {"model.embed_tokens.weight", m->vocab_size, l->shard->vocab};
    const struct part head = {"lm_head.weight", m->vocab_size, l->shard->vocab};
    enum status_code rc = plan_stack(l, &w->embed, &embed, 1, m->hidden, whole(m->hidden), st);
    for (uint32_t i = 0; rc == ST_OK && i < m->layers; i++)
        rc = plan_layer(l, &w->layer[i], i, st);
    if (rc == ST_OK)
        rc = plan_norm(l, &w->final_norm, "model.norm.weight", m->hidden, st);
    if (rc == ST_OK && !m->tied)
        rc = plan_stack(l, &w->head, &head, 1, m->hidden, whole(m->hidden), st);
    return rc;
}

static enum status_code allocate_arena(struct model_weights *w, uint64_t bytes, struct status *st)
{
    /* Memory is given out at the first touch: without this look the kernel would kill the rank while it reads. */
    char why[128];
    uint64_t available = kv_host_available(why, sizeof why);
    if (bytes > available)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "weights: %llu bytes on this rank, but %s leaves %llu: use more ranks on more machines",
                          (unsigned long long)bytes, why, (unsigned long long)available);
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "weights: %llu bytes on this rank",
                            (unsigned long long)bytes);
    madvise(map, bytes, MADV_HUGEPAGE); /* decode walks all of it every step: fewer TLB misses; only a hint */
    w->arena = map;
    return ST_OK;
}

/* Offsets become addresses. */
static void place(struct mat *m, const uint8_t *arena)
{
    m->data = m->data ? arena + ((uintptr_t)m->data - 1) : NULL;
}

static void place_vector(const float **v, const uint8_t *arena)
{
    *v = *v ? (const float *)(const void *)(arena + ((uintptr_t)*v - 1)) : NULL;
}

static void place_all(struct model_weights *w, const struct model_config *m)
{
    place(&w->embed, w->arena);
    place(&w->head, w->arena);
    place_vector(&w->final_norm, w->arena);
    for (uint32_t i = 0; i < m->layers; i++) {
        struct layer_weights *l = &w->layer[i];
        const float **const vectors[] = {&l->attn_norm,    &l->mlp_norm,  &l->qkv_bias, &l->o_bias,
                                         &l->gate_up_bias, &l->down_bias, &l->q_norm,   &l->k_norm};
        for (size_t k = 0; k < sizeof vectors / sizeof *vectors; k++)
            place_vector(vectors[k], w->arena);
        place(&l->qkv, w->arena);
        place(&l->o, w->arena);
        place(&l->gate_up, w->arena);
        place(&l->down, w->arena);
    }
    if (m->tied)
        w->head = w->embed;
}

enum status_code model_loader_open(struct model_loader **out, const char *path, uint32_t seed,
                                   const struct model_config *m, const struct shard *shard,
                                   const struct weight_store *store, struct status *st)
{
    struct model_loader *l = calloc(1, sizeof *l);
    if (!l)
        return status_nomem(st, "loader of weights", sizeof *l);
    *l = (struct model_loader){
        .m = m, .shard = shard, .store = store, .seed = seed, .max_pieces = 3 + 18ull * m->layers};
    enum status_code rc;
    if (path && (rc = model_source_open(&l->source, path, m, st)) != ST_OK)
        goto fail;
    l->piece = calloc(l->max_pieces, sizeof *l->piece);
    l->w.layer = calloc(m->layers, sizeof *l->w.layer);
    if (!l->piece || !l->w.layer) {
        rc = status_nomem(st, "list of weights", l->max_pieces * sizeof *l->piece);
        goto fail;
    }
    if ((rc = plan_all(l, &l->w, st)) != ST_OK)
        goto fail;
    *out = l;
    return ST_OK;
fail:
    model_loader_close(l);
    return rc;
}

uint64_t model_loader_bytes(const struct model_loader *l)
{
    return l->bytes;
}

void model_loader_close(struct model_loader *l)
{
    if (!l)
        return;
    model_weights_unload(&l->w);
    free(l->piece);
    model_source_close(l->source);
    free(l);
}

enum status_code model_weights_load(struct model_weights *out, struct model_loader *l, struct thread_pool *pool,
                                    struct model_progress progress, struct status *st)
{
    struct model_weights *w = &l->w;
    enum status_code rc =
        l->store ? l->store->alloc(l->store->ctx, &w->arena, l->bytes, st) : allocate_arena(w, l->bytes, st);
    if (rc != ST_OK)
        return rc;
    w->bytes = l->bytes;
    w->store = l->store;
    if ((rc = model_weights_copy(l, w->arena, pool, progress, st)) != ST_OK)
        return rc;
    place_all(w, l->m);
    *out = *w;
    *w = (struct model_weights){0}; /* given away */
    return ST_OK;
}

void model_weights_unload(struct model_weights *w)
{
    if (w->arena && w->store)
        w->store->release(w->store->ctx, w->arena);
    else if (w->arena)
        munmap(w->arena, w->bytes);
    free(w->layer);
    *w = (struct model_weights){0};
}
