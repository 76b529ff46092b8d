/* model_weights.h - one rank's share of the weights, in memory in the dtype of the file (quantised ones in F32); or in
 * the memory of a device. Prefix model_weights_.
 *
 *     model_loader_open(&l, path, 0, &model, &shard, NULL, st);     // looks at names, shapes and dtypes, copies nothing yet
 *     model_weights_load(&weights, l, progress, st);            // model_loader_bytes(l) of memory
 *     model_loader_close(l);
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
#include "worker/threads.h"

struct layer_weights {
    const float *attn_norm; /* [hidden] */
    const float *mlp_norm;  /* [hidden] */
    struct mat qkv;
    struct mat o;
    struct mat gate_up;
    struct mat down;
    /* NULL where the model has none */
    const float *qkv_bias;        /* [(H_loc + 2 HK_loc) * D] */
    const float *o_bias;          /* [hidden], whole on each rank; added once to the sum over ranks */
    const float *gate_up_bias;    /* [2 * inner_loc] */
    const float *down_bias;       /* [hidden], the same */
    const float *q_norm, *k_norm; /* [D] */
};

struct model_weights {
    struct mat embed; /* vocab_loc x hidden */
    struct mat head;  /* vocab_loc x hidden; the same memory as embed when tied */
    const float *final_norm;
    struct layer_weights *layer;
    uint64_t bytes; /* in memory */
    void *arena;
    const struct weight_store *store; /* NULL: arena is the host's */
};

#define WEIGHT_STAGE_BYTES (8u << 20)
#define WEIGHT_LANES       8 /* threads that copy at once */

/* Memory that is not the host's. Addresses in it are only handed on. Every matrix is stored as BF16 there, whatever the
 * file holds, and every vector as F32. */
struct weight_store {
    void *ctx;
    /* RESOURCE_EXHAUSTED when there is not so much. */
    enum status_code (*alloc)(void *ctx, void **arena, uint64_t bytes, struct status *st);
    void (*release)(void *ctx, void *arena);
    /* Memory of the host for the next `bytes` of a lane, at most WEIGHT_STAGE_BYTES, once its last ones have gone ... */
    enum status_code (*stage)(void *ctx, uint32_t lane, void **host, uint64_t bytes, struct status *st);
    /* ... and that go to `to`, in the arena. May return before they are there. Lanes, 0 to WEIGHT_LANES - 1, are used by
     * several threads at once, each by one. */
    enum status_code (*store)(void *ctx, uint32_t lane, void *to, uint64_t bytes, struct status *st);
    /* As model_random to BF16, made where they stay. Optional: they are made on the host then. */
    enum status_code (*random)(void *ctx, void *to, uint64_t seed, uint64_t first, uint64_t n, float scale,
                               struct status *st);
    /* All that was stored is there. */
    enum status_code (*finish)(void *ctx, struct status *st);
};

struct model_progress {
    /* NULL: none. By any thread of the pool, one at a time, and never less than before. */
    void (*fn)(void *ctx, uint64_t done_bytes, uint64_t total_bytes);
    void *ctx;
};

struct model_loader;

/* Finds this rank's share in the folder or GGUF file. path NULL: no files, but random weights that depend on
 * the seed, the same for any number of ranks and in any memory: BF16, evenly spread with a variance of 1 / columns; norms are 1. The pointers outlive the loader.
 * NOT_FOUND, DATA_LOSS (names file, tensor, expected and found shape), UNIMPLEMENTED (dtype). */
STATUS_MUST_CHECK enum status_code model_loader_open(struct model_loader **out, const char *path, uint32_t seed,
                                                     const struct model_config *m, const struct shard *shard,
                                                     const struct weight_store *store, struct status *st);
uint64_t model_loader_bytes(const struct model_loader *l);
void model_loader_close(struct model_loader *l); /* NULL is fine */

/* Once per loader, with up to WEIGHT_LANES threads of the pool (NULL: the caller alone). DATA_LOSS (the file changes or
 * cannot be read), RESOURCE_EXHAUSTED. */
STATUS_MUST_CHECK enum status_code model_weights_load(struct model_weights *out, struct model_loader *l,
                                                      struct thread_pool *pool, struct model_progress progress,
                                                      struct status *st);
void model_weights_unload(struct model_weights *w); /* fine on zeroed memory */

#endif
