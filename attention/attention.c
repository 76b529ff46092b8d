/* attention.c - checks what comes in, so that back ends can trust it, and hands it on. */
#include "attention/attention.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention_internal.h"

#define NO_OWNER UINT32_MAX

struct attn {
    struct attn_config cfg;
    void *state;     /* of the back end */
    uint32_t *owner; /* [max_rows] the sequence of each row, while a batch whose rows are not in order is checked */
};

static enum status_code check_config(const struct attn_config *cfg, struct status *st)
{
    if (!cfg->ops)
        return status_set(st, ST_INVALID_ARGUMENT, "ops: NULL, expected a back end");
    if (cfg->max_rows == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "max_rows: 0, expected at least 1");
    if (cfg->max_kv_len == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "max_kv_len: 0, expected at least 1");
    if ((uint64_t)cfg->max_rows * cfg->max_heads > INT32_MAX) /* back ends count heads of rows in 32 bits */
        return status_set(st, ST_INVALID_ARGUMENT, "max_rows: %u with max_heads %u, expected a product below 2^31",
                          cfg->max_rows, cfg->max_heads);
    if (cfg->max_heads > 0 && (cfg->max_head_dim == 0 || cfg->max_head_dim > ATTN_MAX_HEAD_DIM))
        return status_set(st, ST_INVALID_ARGUMENT, "max_head_dim: %u, expected 1 to %d", cfg->max_head_dim,
                          ATTN_MAX_HEAD_DIM);
    return ST_OK;
}

enum status_code attn_create(struct attn **out, const struct attn_config *cfg, struct status *st)
{
    enum status_code rc = check_config(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct attn *a = calloc(1, sizeof *a);
    if (!a)
        return status_nomem(st, "attention", sizeof *a);
    a->cfg = *cfg;
    a->owner = malloc(cfg->max_rows * sizeof *a->owner);
    if (!a->owner) {
        rc = status_nomem(st, "attention row map", cfg->max_rows * sizeof *a->owner);
        goto fail;
    }
    rc = cfg->ops->create(&a->state, &a->cfg, st);
    if (rc != ST_OK)
        goto fail;
    *out = a;
    return ST_OK;
fail:
    attn_destroy(a);
    return rc;
}

void attn_destroy(struct attn *a)
{
    if (!a)
        return;
    a->cfg.ops->destroy(a->state);
    free(a->owner);
    free(a);
}

static enum status_code check_heads(const struct attn *a, const struct attn_batch *b, struct status *st)
{
    if (b->heads > a->cfg.max_heads)
        return status_set(st, ST_INVALID_ARGUMENT, "heads: %u, expected at most %u", b->heads, a->cfg.max_heads);
    if (b->heads % b->kv_heads)
        return status_set(st, ST_INVALID_ARGUMENT, "heads: %u, expected a multiple of kv_heads (%u)", b->heads,
                          b->kv_heads);
    if (b->head_dim == 0 || b->head_dim % ATTN_HEAD_DIM_UNIT || b->head_dim > a->cfg.max_head_dim)
        return status_set(st, ST_INVALID_ARGUMENT, "head_dim: %u, expected a multiple of %d up to %u", b->head_dim,
                          ATTN_HEAD_DIM_UNIT, a->cfg.max_head_dim);
    if (!isfinite(b->scale))
        return status_set(st, ST_INVALID_ARGUMENT, "scale: %g, expected a finite number", (double)b->scale);
    if (!isfinite(b->soft_cap) || b->soft_cap < 0)
        return status_set(st, ST_INVALID_ARGUMENT, "soft_cap: %g, expected 0 or a positive number",
                          (double)b->soft_cap);
    return ST_OK;
}

static enum status_code check_layout(const struct attn_batch *b, struct status *st)
{
    if (b->kv_dtype != ATTN_F32 && b->kv_dtype != ATTN_BF16 && b->kv_dtype != ATTN_F16)
        return status_set(st, ST_INVALID_ARGUMENT, "kv_dtype: %d, expected 0 (f32), 1 (bf16) or 2 (f16)",
                          (int)b->kv_dtype);
    uint32_t elem = attn_elem_bytes(b->kv_dtype);
    uint64_t head_bytes = (uint64_t)b->head_dim * elem;
    if (b->token_stride < head_bytes || b->token_stride % elem)
        return status_set(st, ST_INVALID_ARGUMENT, "token_stride: %llu, expected a multiple of %u from %llu on",
                          (unsigned long long)b->token_stride, elem, (unsigned long long)head_bytes);
    if (b->kv_heads > 1 && (b->head_stride < head_bytes || b->head_stride % elem))
        return status_set(st, ST_INVALID_ARGUMENT, "head_stride: %llu, expected a multiple of %u from %llu on",
                          (unsigned long long)b->head_stride, elem, (unsigned long long)head_bytes);
    if (!b->q || !b->out)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: NULL, expected %u rows", b->q ? "out" : "q", b->rows);
    return ST_OK;
}

static enum status_code check_seq(const struct attn *a, const struct attn_batch *b, uint32_t i, struct status *st)
{
    const struct attn_seq *s = &b->seq[i];
    uintptr_t unaligned = attn_elem_bytes(b->kv_dtype) - 1;
    if (s->rows == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].rows: 0, expected at least 1", i);
    if (s->first_row >= b->rows || s->rows > b->rows - s->first_row)
        return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].rows: %u from row %u on, but the batch has %u rows", i,
                          s->rows, s->first_row, b->rows);
    if (s->kv_len < s->rows)
        return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].kv_len: %u, expected at least its rows (%u)", i, s->kv_len,
                          s->rows);
    if (s->kv_len > a->cfg.max_kv_len)
        return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].kv_len: %u, expected at most %u", i, s->kv_len,
                          a->cfg.max_kv_len);
    if (!s->k || !s->v)
        return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].%s: NULL, expected %u keys", i, s->k ? "v" : "k",
                          s->kv_len);
    if (((uintptr_t)s->k | (uintptr_t)s->v) & unaligned)
        return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].%s: not aligned to its elements", i,
                          (uintptr_t)s->k & unaligned ? "k" : "v");
    return ST_OK;
}

/* Each row in exactly one sequence. Sequences in the order of their rows need no map. */
static enum status_code check_rows(const struct attn *a, const struct attn_batch *b, struct status *st)
{
    uint32_t next = 0;
    bool in_order = true;
    for (uint32_t i = 0; i < b->seqs && in_order; i++) {
        in_order = b->seq[i].first_row == next;
        next += b->seq[i].rows;
    }
    if (in_order && next == b->rows)
        return ST_OK;

    for (uint32_t r = 0; r < b->rows; r++)
        a->owner[r] = NO_OWNER;
    for (uint32_t i = 0; i < b->seqs; i++) {
        const struct attn_seq *s = &b->seq[i];
        for (uint32_t r = s->first_row; r < s->first_row + s->rows; r++) {
            if (a->owner[r] != NO_OWNER)
                return status_set(st, ST_INVALID_ARGUMENT, "seq[%u].first_row: row %u belongs to seq[%u] too", i, r,
                                  a->owner[r]);
            a->owner[r] = i;
        }
    }
    for (uint32_t r = 0; r < b->rows; r++) {
        if (a->owner[r] == NO_OWNER)
            return status_set(st, ST_INVALID_ARGUMENT, "rows: row %u of %u belongs to no sequence", r, b->rows);
    }
    return ST_OK;
}

static enum status_code check_batch(const struct attn *a, const struct attn_batch *b, struct status *st)
{
    enum status_code rc = check_heads(a, b, st);
    if (rc != ST_OK)
        return rc;
    rc = check_layout(b, st);
    if (rc != ST_OK)
        return rc;
    for (uint32_t i = 0; i < b->seqs; i++) {
        rc = check_seq(a, b, i, st);
        if (rc != ST_OK)
            return rc;
    }
    return check_rows(a, b, st);
}

enum status_code attn_run(struct attn *a, const struct attn_batch *batch, struct status *st)
{
    if (batch->rows > a->cfg.max_rows)
        return status_set(st, ST_INVALID_ARGUMENT, "rows: %u, expected at most %u", batch->rows, a->cfg.max_rows);
    if (batch->seqs > batch->rows)
        return status_set(st, ST_INVALID_ARGUMENT, "seqs: %u, more than rows (%u)", batch->seqs, batch->rows);
    if (batch->rows == 0 || batch->heads == 0 || batch->kv_heads == 0)
        return ST_OK; /* nothing was asked, or a rank without heads */
    enum status_code rc = check_batch(a, batch, st);
    return rc == ST_OK ? a->cfg.ops->run(a->state, batch, st) : rc;
}
