/* attention_gpu.c - checks what the host knows of a step on a GPU and hands it to a back end. Knows no CUDA. */
#include <math.h>
#include <stdlib.h>

#include "attention/attention_internal.h"

enum { GPU_ALIGN = 16 };

struct attn_gpu {
    struct attn_gpu_config cfg;
    void *state; /* of the back end */
};

static enum status_code check_shape(const struct attn_gpu_config *c, struct status *st)
{
    if (c->dtype != ATTN_BF16 && c->dtype != ATTN_F16)
        return status_set(st, ST_INVALID_ARGUMENT, "dtype: %d, expected 1 (bf16) or 2 (f16)", (int)c->dtype);
    if (c->kv_heads == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "kv_heads: 0, expected at least 1");
    if (c->heads == 0 || c->heads % c->kv_heads)
        return status_set(st, ST_INVALID_ARGUMENT, "heads: %u, expected a multiple of kv_heads (%u)", c->heads,
                          c->kv_heads);
    if (c->head_dim == 0 || c->head_dim % ATTN_HEAD_DIM_UNIT || c->head_dim > ATTN_MAX_HEAD_DIM)
        return status_set(st, ST_INVALID_ARGUMENT, "head_dim: %u, expected a multiple of %d up to %d", c->head_dim,
                          ATTN_HEAD_DIM_UNIT, ATTN_MAX_HEAD_DIM);
    if (!isfinite(c->scale))
        return status_set(st, ST_INVALID_ARGUMENT, "scale: %g, expected a finite number", (double)c->scale);
    if (!isfinite(c->soft_cap) || c->soft_cap < 0)
        return status_set(st, ST_INVALID_ARGUMENT, "soft_cap: %g, expected 0 or a positive number",
                          (double)c->soft_cap);
    uint64_t head_bytes = (uint64_t)c->head_dim * attn_elem_bytes(c->dtype);
    if (c->token_stride < head_bytes || c->token_stride % GPU_ALIGN)
        return status_set(st, ST_INVALID_ARGUMENT, "token_stride: %llu, expected a multiple of %d from %llu on",
                          (unsigned long long)c->token_stride, GPU_ALIGN, (unsigned long long)head_bytes);
    if (c->kv_heads > 1 && (c->head_stride < head_bytes || c->head_stride % GPU_ALIGN))
        return status_set(st, ST_INVALID_ARGUMENT, "head_stride: %llu, expected a multiple of %d from %llu on",
                          (unsigned long long)c->head_stride, GPU_ALIGN, (unsigned long long)head_bytes);
    return ST_OK;
}

static enum status_code check_maxima(const struct attn_gpu_config *c, struct status *st)
{
    if (c->max_seqs == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "max_seqs: 0, expected at least 1");
    if (c->max_rows < c->max_seqs)
        return status_set(st, ST_INVALID_ARGUMENT, "max_rows: %u, expected at least max_seqs (%u)", c->max_rows,
                          c->max_seqs);
    if ((uint64_t)c->max_rows * c->heads > INT32_MAX) /* back ends count heads of rows in 32 bits */
        return status_set(st, ST_INVALID_ARGUMENT, "max_rows: %u with %u heads, expected a product below 2^31",
                          c->max_rows, c->heads);
    if (c->max_kv_len == 0 || c->max_kv_len > INT32_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "max_kv_len: %u, expected 1 to 2^31 - 1", c->max_kv_len);
    if (c->fixed_split_keys % 64)
        return status_set(st, ST_INVALID_ARGUMENT, "fixed_split_keys: %u, expected a multiple of 64",
                          c->fixed_split_keys);
    if (c->batch_invariant && c->fixed_split_keys)
        return status_set(st, ST_INVALID_ARGUMENT, "fixed_split_keys: %u, expected 0 with batch_invariant",
                          c->fixed_split_keys);
    if (c->batch_invariant && c->window)
        return status_set(st, ST_UNIMPLEMENTED, "window: %u, expected 0 with batch_invariant", c->window);
    if ((unsigned)c->policy > ATTN_GPU_STREAMS)
        return status_set(st, ST_INVALID_ARGUMENT, "policy: %d, expected 0 to %d", (int)c->policy, ATTN_GPU_STREAMS);
    return ST_OK;
}

static enum status_code check_config(const struct attn_gpu_config *c, struct status *st)
{
    enum status_code rc = check_shape(c, st);
    return rc == ST_OK ? check_maxima(c, st) : rc;
}

enum status_code attn_gpu_pick_of(const struct attn_gpu_ops *const *back_ends, struct attn_gpu_config *cfg,
                                  struct status *st)
{
    enum status_code rc = check_config(cfg, st);
    if (rc != ST_OK)
        return rc;
    rc = status_set(st, ST_UNIMPLEMENTED, "this build has no back end");
    for (uint32_t i = 0; back_ends[i] && rc == ST_UNIMPLEMENTED; i++) { /* the last one's reason stays */
        rc = back_ends[i]->query(cfg, st);
        if (rc == ST_OK)
            cfg->ops = back_ends[i];
    }
    return rc;
}

enum status_code attn_gpu_create(struct attn_gpu **out, const struct attn_gpu_config *cfg, struct status *st)
{
    if (!cfg->ops)
        return status_set(st, ST_INVALID_ARGUMENT, "ops: NULL, expected a back end");
    enum status_code rc = check_config(cfg, st);
    if (rc == ST_OK)
        rc = cfg->ops->query(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct attn_gpu *a = calloc(1, sizeof *a);
    if (!a)
        return status_nomem(st, "attention", sizeof *a);
    a->cfg = *cfg;
    if (a->cfg.max_kv_tokens == 0)
        a->cfg.max_kv_tokens = (uint64_t)cfg->max_seqs * cfg->max_kv_len;
    rc = cfg->ops->create(&a->state, &a->cfg, st);
    if (rc != ST_OK) {
        free(a);
        return rc;
    }
    *out = a;
    return ST_OK;
}

void attn_gpu_destroy(struct attn_gpu *a)
{
    if (!a)
        return;
    a->cfg.ops->destroy(a->state);
    free(a);
}

const char *attn_gpu_name(const struct attn_gpu *a)
{
    return a->cfg.ops->name;
}

uint64_t attn_gpu_workspace_bytes(const struct attn_gpu *a)
{
    return a->cfg.ops->workspace_bytes(a->state);
}

const uint32_t *attn_gpu_fault(const struct attn_gpu *a)
{
    return a->cfg.ops->fault(a->state);
}

enum status_code attn_gpu_fault_status(const struct attn_gpu *a, uint32_t fault, struct status *st)
{
    const struct attn_gpu_config *c = &a->cfg;
    switch (fault) {
    case 0:
        return ST_OK;
    case ATTN_FAULT_KV_TOKENS:
        return status_set(st, ST_INTERNAL, "attention: the batch has more keys than max_kv_tokens (%llu)",
                          (unsigned long long)c->max_kv_tokens);
    case ATTN_FAULT_ROWS:
        return status_set(st, ST_INTERNAL, "attention: the sequences have more rows than max_rows (%u)", c->max_rows);
    case ATTN_FAULT_SEQS:
        return status_set(st, ST_INTERNAL, "attention: more sequences than max_seqs of the step (at most %u)",
                          c->max_seqs);
    default:
        return status_set(st, ST_INTERNAL,
                          "attention: seq[%u] breaks a rule: rows 1 to max_seq_rows, kv_len from rows to %u", fault - 1,
                          c->max_kv_len);
    }
}

static enum status_code check_step(const struct attn_gpu *a, const struct attn_gpu_step *s, struct status *st)
{
    const struct attn_gpu_config *c = &a->cfg;
    if (!s->seq || (uintptr_t)s->seq % _Alignof(struct attn_seq))
        return status_set(st, ST_INVALID_ARGUMENT, "seq: %p, expected device memory aligned to %zu",
                          (const void *)s->seq, _Alignof(struct attn_seq));
    if (!s->counts || (uintptr_t)s->counts % sizeof *s->counts)
        return status_set(st, ST_INVALID_ARGUMENT, "counts: %p, expected device memory aligned to %zu",
                          (const void *)s->counts, sizeof *s->counts);
    if (s->max_seqs > c->max_seqs)
        return status_set(st, ST_INVALID_ARGUMENT, "max_seqs: %u, expected at most %u", s->max_seqs, c->max_seqs);
    if (s->max_rows > c->max_rows || s->max_rows < s->max_seqs)
        return status_set(st, ST_INVALID_ARGUMENT, "max_rows: %u, expected %u (max_seqs) to %u", s->max_rows,
                          s->max_seqs, c->max_rows);
    if (s->max_seq_rows > s->max_rows || (s->max_seq_rows == 0 && s->max_rows > 0))
        return status_set(st, ST_INVALID_ARGUMENT, "max_seq_rows: %u, expected 1 to %u (max_rows)", s->max_seq_rows,
                          s->max_rows);
    if ((unsigned)s->way >= ATTN_GPU_WAYS)
        return status_set(st, ST_INVALID_ARGUMENT, "way: %d, expected 0 to %d", (int)s->way, ATTN_GPU_WAYS - 1);
    return ST_OK;
}

uint32_t attn_gpu_ways(const struct attn_gpu *a)
{
    const struct attn_gpu_config *c = &a->cfg;
    return c->policy == ATTN_GPU_AUTO && !c->fixed_split_keys && c->ops->ways ? c->ops->ways(a->state) : 1;
}

enum attn_gpu_way attn_gpu_choose(const struct attn_gpu *a, const struct attn_seq *seq, uint32_t seqs)
{
    const uint32_t ways = attn_gpu_ways(a);
    const enum attn_gpu_way way = ways > 1 ? a->cfg.ops->choose(a->state, seq, seqs) : ATTN_WAY_APART;
    return (uint32_t)way < ways ? way : ATTN_WAY_APART; /* there is a graph of it */
}

enum status_code attn_gpu_plan(struct attn_gpu *a, const struct attn_gpu_step *step, struct status *st)
{
    enum status_code rc = check_step(a, step, st);
    return rc == ST_OK ? a->cfg.ops->plan(a->state, step, st) : rc;
}

static enum status_code check_io(const struct attn_gpu *a, const struct attn_gpu_io *io, struct status *st)
{
    uint64_t row = (uint64_t)a->cfg.heads * a->cfg.head_dim * attn_elem_bytes(a->cfg.dtype);
    if (!io->q || (uintptr_t)io->q % GPU_ALIGN)
        return status_set(st, ST_INVALID_ARGUMENT, "q: %p, expected device memory aligned to %d", io->q, GPU_ALIGN);
    if (!io->out || (uintptr_t)io->out % GPU_ALIGN)
        return status_set(st, ST_INVALID_ARGUMENT, "out: %p, expected device memory aligned to %d", io->out, GPU_ALIGN);
    if (io->q_row_stride < row || io->q_row_stride % GPU_ALIGN)
        return status_set(st, ST_INVALID_ARGUMENT, "q_row_stride: %llu, expected a multiple of %d from %llu on",
                          (unsigned long long)io->q_row_stride, GPU_ALIGN, (unsigned long long)row);
    if (io->out_row_stride < row || io->out_row_stride % GPU_ALIGN)
        return status_set(st, ST_INVALID_ARGUMENT, "out_row_stride: %llu, expected a multiple of %d from %llu on",
                          (unsigned long long)io->out_row_stride, GPU_ALIGN, (unsigned long long)row);
    if (io->kv_offset % GPU_ALIGN)
        return status_set(st, ST_INVALID_ARGUMENT, "kv_offset: %llu, expected a multiple of %d",
                          (unsigned long long)io->kv_offset, GPU_ALIGN);
    return ST_OK;
}

enum status_code attn_gpu_run(struct attn_gpu *a, const struct attn_gpu_step *step, const struct attn_gpu_io *io,
                              struct status *st)
{
    enum status_code rc = check_step(a, step, st);
    if (rc != ST_OK || step->max_seqs == 0)
        return rc;
    rc = check_io(a, io, st);
    return rc == ST_OK ? a->cfg.ops->run(a->state, step, io, st) : rc;
}
