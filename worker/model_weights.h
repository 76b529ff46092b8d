/* model_weights.h - one rank's share of the weights, in memory in the dtype of the file. Prefix model_weights_.
 *
 * Rows that are multiplied with the same input are stacked, so that a layer is four products:
 *
 *   qkv      (H_loc + 2 HK_loc) * D  x  hidden        q rows, then k rows, then v rows
 *   o        hidden                  x  H_loc * D     a slice of columns: partial sums, added up by the all-reduce
 *   gate_up  2 * inner_loc           x  hidden        gate rows, then up rows
 *   down     hidden                  x  inner_loc     a slice of columns
 *
 * Biases are stacked like the rows they belong to. Those of o and down are on rank 0 only: it adds them to its partial sums.
 * Parts of one stack that differ in dtype are widened to F32; so are norms and biases, always.
 */
#ifndef TANDEM_MODEL_WEIGHTS_H
#define TANDEM_MODEL_WEIGHTS_H

#include "worker/gemm.h"
#include "worker/model_config.h"
#include "worker/shard.h"

struct layer_weights {
    const float *attn_norm; /* [hidden] */
    const float *mlp_norm;  /* [hidden] */
    struct mat qkv;
    struct mat o;
    struct mat gate_up;
    struct mat down;
    /* NULL where the model has none */
    const float *qkv_bias;        /* [(H_loc + 2 HK_loc) * D] */
    const float *o_bias;          /* [hidden], rank 0 */
    const float *gate_up_bias;    /* [2 * inner_loc] */
    const float *down_bias;       /* [hidden], rank 0 */
    const float *q_norm, *k_norm; /* [D] */
};

struct model_weights {
    struct mat embed; /* vocab_loc x hidden */
    struct mat head;  /* vocab_loc x hidden; the same memory as embed when tied */
    const float *final_norm;
    struct layer_weights *layer;
    uint64_t bytes; /* in memory */
    void *arena;
};

struct model_progress {
    void (*fn)(void *ctx, uint64_t done_bytes, uint64_t total_bytes); /* NULL: none */
    void *ctx;
};

/* Reads this rank's share from the folder. NOT_FOUND, DATA_LOSS (names file, tensor, expected and found shape),
 * UNIMPLEMENTED (dtype), RESOURCE_EXHAUSTED. */
STATUS_MUST_CHECK enum status_code model_weights_load(struct model_weights *out, const char *dir,
                                                      const struct model_config *m, const struct shard *shard,
                                                      struct model_progress progress, struct status *st);
void model_weights_unload(struct model_weights *w); /* fine on zeroed memory */

#endif
