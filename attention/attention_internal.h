/* attention_internal.h - what stands behind attention.h: the table a back end fills. */
#ifndef TANDEM_ATTENTION_INTERNAL_H
#define TANDEM_ATTENTION_INTERNAL_H

#include "attention/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

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
    /* A back end that does not compute `window` or `soft_cap` says UNIMPLEMENTED where it is not 0. */
    enum status_code (*run)(void *state, const struct attn_batch *batch, struct status *st);
};

/* The first key seen by a row that sees none from `limit` on. */
static inline uint32_t attn_first_key(const struct attn_batch *b, uint32_t limit)
{
    return b->window && limit > b->window ? limit - b->window : 0;
}

/* A back end on a GPU. It sees what attention_gpu.c has let through; sequences are in device memory, so it checks them
 * itself, on the device (attn_gpu_fault). */
struct attn_gpu_ops {
    const char *name;
    /* Whether it can do cfg on cfg->device: ST_OK, or ST_UNIMPLEMENTED with the reason. */
    enum status_code (*query)(const struct attn_gpu_config *cfg, struct status *st);
    /* Only after query has accepted cfg; device is current. *state is set only on ST_OK. */
    enum status_code (*create)(void **state, const struct attn_gpu_config *cfg, struct status *st);
    void (*destroy)(void *state); /* NULL is fine */
    uint64_t (*workspace_bytes)(const void *state);
    const uint32_t *(*fault)(const void *state);
    uint32_t (*ways)(const void *state); /* NULL: one; else of choose, which gives those below it */
    enum attn_gpu_way (*choose)(const void *state, const struct attn_seq *seq, uint32_t seqs);
    /* Also of a step whose max_seqs is 0, for its fault; run is not called for one. */
    enum status_code (*plan)(void *state, const struct attn_gpu_step *step, struct status *st);
    enum status_code (*run)(void *state, const struct attn_gpu_step *step, const struct attn_gpu_io *io,
                            struct status *st);
};

/* Back ends that attn_gpu_pick tries, fastest first; ends with NULL. In attention_pick.c, which knows them all. */
extern const struct attn_gpu_ops *const attn_gpu_back_ends[];

/* attn_gpu_pick among these. */
enum status_code attn_gpu_pick_of(const struct attn_gpu_ops *const *back_ends, struct attn_gpu_config *cfg,
                                  struct status *st);

static inline uint32_t attn_elem_bytes(enum attn_dtype d)
{
    return d == ATTN_F32 ? 4 : 2;
}

#ifdef __cplusplus
}
#endif
#endif
