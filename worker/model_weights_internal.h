/* model_weights_internal.h - model_weights.c, which plans what goes where, and model_weights_copy.c, which brings it there. */
#ifndef TANDEM_MODEL_WEIGHTS_INTERNAL_H
#define TANDEM_MODEL_WEIGHTS_INTERNAL_H

#include "worker/model_source.h"
#include "worker/model_weights.h"

/* A part of a tensor and where it goes. Addresses are offsets into the arena until it exists. */
struct piece {
    struct model_tensor src; /* random weights: without data */
    uint64_t seed;           /* of random weights; 0: ones */
    struct shard_span rows, cols;
    uint64_t src_cols;
    uint64_t at;
    enum mat_dtype dtype; /* there */
};

struct model_loader {
    struct model_source *source; /* NULL: random weights */
    uint32_t seed;               /* of those */
    const struct model_config *m;
    const struct shard *shard;
    const struct weight_store *store;
    struct piece *piece;
    size_t n_pieces, max_pieces;
    uint64_t bytes; /* of the arena, so far */
    struct model_weights w;
};

/* All pieces to the arena. Errors as model_weights_load. */
STATUS_MUST_CHECK enum status_code model_weights_copy(const struct model_loader *l, uint8_t *arena,
                                                      struct thread_pool *pool, struct model_progress progress,
                                                      struct status *st);

#endif
