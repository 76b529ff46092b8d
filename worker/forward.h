/* forward.h - one pass of the model over the rows of a step, on the host or a device. Prefix forward_.
 *
 * Rows of all sequences are packed: decodes first, then chunks. A forward owns the activations for its largest batch and
 * nothing else; weights, KV pool, threads and comm belong to the engine. The host computes in float32; a device's part
 * (backend.h) keeps x in float32 and the rest in bf16.
 *
 *   x  [T][hidden]   the residual stream, the same on all ranks
 *   per layer:  h = norm(x)   qkv = h Wqkv   q, k = rope   k, v -> slots   a = attention   h = a Wo   all-reduce   x += h
 *               h = norm(x)   gu = h Wgu     g = silu(gate) * up           h = g Wd        all-reduce              x += h
 *   rows that are sampled:  norm, logits of this rank's share of the vocabulary, exchange, token
 */
#ifndef TANDEM_FORWARD_H
#define TANDEM_FORWARD_H

#include <stdint.h>

#include "attention/attention.h"
#include "comm/comm.h"
#include "memory/memory.h"
#include "proto/status.h"
#include "worker/model_weights.h"
#include "worker/sample.h"
#include "worker/threads.h"

struct forward;

struct forward_config {
    const struct model_config *model;
    const struct model_weights *weights;
    const struct shard *shard;
    struct comm *comm;
    struct thread_pool *pool;
    struct kv_pool *const *kv; /* where it will be when steps come */
    uint32_t max_slots;
    uint32_t max_rows;    /* T */
    uint32_t max_samples; /* rows of one step whose token is chosen; given ones, of which there may be T, come on top */
    uint32_t max_context; /* of a sequence */
    bool eager;           /* a device: no graphs; for debugging */
    bool timed;           /* time_of is asked */
    enum attn_gpu_policy attention; /* a device */
    bool batch_invariant;           /* the same bits in any batch: engine.h; UNIMPLEMENTED where a back end cannot */
    enum comm_gpu_way all_reduce;   /* devices: engine.h */
    bool own_first;                 /* a device, for tests: engine.h */
    const char *tune_dir;           /* a device: where what was measured is kept; NULL: nowhere */
    uint32_t tune_ms; /* a device: for measuring, in connect; what is left then is taken as the library suggests */
    void (*note)(void *ctx, const char *text); /* something that people may want to know; NULL: nobody does */
    void *note_ctx;
};

/* Rows first_row .. first_row + rows - 1 continue the slot: they stand at positions position, position + 1, ... */
struct forward_seq {
    uint32_t slot;
    uint32_t first_row;
    uint32_t rows;
    uint32_t position;
};

#define FORWARD_NO_SLOT UINT32_MAX
#define FORWARD_TOKEN_OF_SLOT                                                                                          \
    (1u << 31) /* in a batch's token: not an id, but the slot whose last sampled token it is */

/* The token that follows `row`; it will stand at `position`. */
struct forward_sample {
    uint32_t row;
    uint32_t position;
    uint32_t slot; /* whose token it becomes; FORWARD_NO_SLOT: a given one */
    struct sample_params params;
    const struct sample_adjust *adjust; /* NULL: none */
    bool given;                         /* the token is known, nothing is chosen */
    uint32_t token;                     /* when given */
    bool scored;                        /* the same on all ranks; a given row is */
    uint32_t top;                       /* of scores: so many likeliest ones */
    struct sample_scores *scores;       /* when scored: filled on rank 0 */
};

struct forward_batch {
    uint32_t rows;
    const uint32_t
        *token; /* [rows], each below vocab_size; of a back end with start also FORWARD_TOKEN_OF_SLOT | slot */
    uint32_t seqs;
    const struct forward_seq *seq; /* in the order of rows, without gaps */
    uint32_t samples;
    const struct forward_sample *sample;
};

/* A back end. Each has a struct forward of its own. */
struct forward_ops {
    /* enum sample_option: what a batch may ask for beside temperature, top_k and top_p. The engine refuses the rest. */
    uint32_t options;
    /* What create will take of a device's memory; cfg has no kv, and weights are not loaded yet. UNIMPLEMENTED: create
     * would refuse. NULL on the host. */
    enum status_code (*bytes)(uint64_t *out, const struct forward_config *cfg, struct status *st);
    /* Everything a step needs is allocated here. The config's pointers outlive the forward. */
    enum status_code (*create)(struct forward **out, const struct forward_config *cfg, struct status *st);
    void (*destroy)(struct forward *f); /* NULL is fine */
    /* Collective, once before the first run: devices find each other, measure and prepare all that steps launch. NULL: nothing to
     * do. */
    enum status_code (*connect)(struct forward *f, struct status *st);
    /* Slots have grown to position + rows tokens. tokens: [samples], given ones too. INTERNAL when logits are no
     * numbers; what comm says. */
    enum status_code (*run)(struct forward *f, const struct forward_batch *batch, uint32_t *tokens, struct status *st);
    /* Optional, all three or none: a run in halves, two of which may be under way. start launches; what batch points to, and
     * tokens, stay until finish, which waits for the oldest and fills tokens. poll: whether finish would not wait. */
    enum status_code (*start)(struct forward *f, const struct forward_batch *batch, uint32_t *tokens,
                              struct status *st);
    enum status_code (*poll)(struct forward *f, bool *done, struct status *st);
    enum status_code (*finish)(struct forward *f, struct status *st);
    /* With start: microseconds of CLOCK_MONOTONIC at which the device began and ended the step that finish returned last. */
    void (*time_of)(struct forward *f, double *begin_us, double *end_us);
    /* With start, optional, both or none. The slot's tokens are chosen as `a` says from now until end: its lists are copied. kept: the
     * device does it, and counts what is fed to the slot: the tokens at output_at on as its output. It does not look at the
     * samples' adjust then, but for how many tokens are banned. Not kept: there is no room for it. */
    enum status_code (*begin)(struct forward *f, uint32_t slot, const struct sample_adjust *a, uint32_t output_at,
                              bool *kept, struct status *st);
    void (*end)(struct forward *f, uint32_t slot); /* nothing where it did not begin */
    /* For tests: this rank's share of the logits that the first sample of the last run was drawn from. */
    enum status_code (*logits)(struct forward *f, float *out, struct status *st);
};

extern const struct forward_ops forward_ops_host;

#endif
