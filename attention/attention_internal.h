/* attention_internal.h - what stands behind attention.h: the table a back end fills. */
#ifndef TANDEM_ATTENTION_INTERNAL_H
#define TANDEM_ATTENTION_INTERNAL_H

#include "attention/attention.h"

enum {
    ATTN_MAX_HEAD_DIM = 256,
    ATTN_HEAD_DIM_UNIT = 8,
};

/* A back end sees checked arguments only: a config and batches that attention.c has let through, with at least one row
 * and one head. */
struct attn_ops {
    const char *name;
    /* Allocates all that run will need for the largest batch. *state is set only on ST_OK. */
    enum status_code (*create)(void **state, const struct attn_config *cfg, struct status *st);
    void (*destroy)(void *state); /* NULL is fine */
    /* A back end that does not compute `window` says UNIMPLEMENTED where it is not 0. */
    enum status_code (*run)(void *state, const struct attn_batch *batch, struct status *st);
};

/* The first key seen by a row that sees none from `limit` on. */
static inline uint32_t attn_first_key(const struct attn_batch *b, uint32_t limit)
{
    return b->window && limit > b->window ? limit - b->window : 0;
}

static inline uint32_t attn_elem_bytes(enum attn_dtype d)
{
    return d == ATTN_F32 ? 4 : 2;
}

#endif
