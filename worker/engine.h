/* engine.h - one rank's part of the model: weights, KV pool and the forward pass, behind one step function. Prefix engine_.
 *
 * An engine is a deterministic state machine over a numbered stream of step plans: same plans in, same tokens out. It reads
 * no clock to decide anything. All ranks of a group run the same plan at the same time; the all-reduces inside join them.
 *
 *     engine_create(&e, &cfg, st);  engine_reset(e, st);
 *     engine_step(e, plan, &result, st);          // plan->step is 1, 2, 3 ... since the reset
 *
 * A step is two halves, so that a device has the next one before it has finished this one:
 *
 *     engine_submit(e, plan1, st);  engine_submit(e, plan2, st);       // up to info.depth
 *     engine_collect(e, &result1, st);  engine_submit(e, plan3, st);  ...
 *
 * Threads: one, the step loop. Errors of engine_step mean that the rank cannot go on (a plan that contradicts its state,
 * a lost peer): the state is undefined then.
 */
#ifndef TANDEM_ENGINE_H
#define TANDEM_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "attention/attention.h"
#include "comm/comm.h"
#include "memory/memory.h"
#include "proto/kv_account.h"
#include "proto/status.h"
#include "tandem/v1/worker_control.pb-c.h"
#include "worker/sample.h"

struct engine;
struct backend_parts; /* backend.h */

#define ENGINE_MAX_EOS 16

/* Whether a thread of the KV pool maps pages before steps need them. AUTO: on a device; on the host it has no core of its own,
 * and mapping a warm page is nothing there (memory/README.md). */
enum engine_ahead { ENGINE_AHEAD_AUTO, ENGINE_AHEAD_ON, ENGINE_AHEAD_OFF };

struct engine_config {
    const char *model_dir;
    struct comm *comm;                 /* owned by the caller, outlives the engine */
    const struct backend_parts *parts; /* of a device, outlives the engine; NULL: the host */
    bool eager; /* a device: each kernel is launched by itself, none as part of a graph; for debugging */
    enum attn_gpu_policy attention; /* a device: how prefill and decode share it; AUTO: what is fastest */
    /* A device: a token's logits depend on the tokens before it alone, to the bit, and so do answers: not on what else is in
     * the batch, how the prompt was cut, what was computed again or taken from another slot, nor on an earlier run on the same
     * kind of device. Slower: products are not picked by measurement, and attention does not share long keys among SMs.
     * UNIMPLEMENTED on the host and for models with sliding windows. */
    bool batch_invariant;
    /* Devices: how sums over ranks go. AUTO: what is there, by measurement; PEER or NCCL alone: connect ends with
     * FAILED_PRECONDITION where it cannot be had. batch_invariant wants PEER, and takes it for AUTO. */
    enum comm_gpu_way all_reduce;
    /* A device, for tests: gate and up of more than 4 rows, and products of 5 to 16, go by own kernels wherever they can, measured or
     * not. */
    bool own_first;
    bool timed;           /* results have a timing; a device takes about 1 us more a step */
    const char *tune_dir; /* a device: folder in which the ways of products that were measured are kept; NULL: none */
    uint32_t tune_ms;     /* a device: how long engine_connect measures at most; 0: 500 */
    uint32_t
        random_weights;   /* not 0: a seed; the folder has only its config.json: model_loader_open says what they are */
    uint32_t threads;     /* of this rank; 0: its share of the machine's cores */
    uint32_t max_slots;   /* 0: 256 */
    uint32_t max_context; /* 0: the model's own; more than that is INVALID_ARGUMENT */
    uint32_t max_step_tokens; /* rows of a step; 0: 512 */
    uint64_t kv_bytes;        /* KV budget of this rank; 0: what the slots can use, at most
                                 host: a quarter of the available memory divided by the ranks on it
                                 device: memory_fraction of it less what is in use, the weights and the workspace */
    double memory_fraction;   /* of a device's memory that may be in use, other programs included; 0: 0.9 */
    uint64_t page_bytes;      /* 0: KV_PAGE_BYTES_DEFAULT */
    uint64_t suspend_bytes;   /* host memory for suspended slots; 0: none can be suspended */
    enum engine_ahead kv_ahead;
    /* Called now and then while weights load, on the calling thread. Optional. */
    void (*progress)(void *ctx, uint64_t done_bytes, uint64_t total_bytes);
    void *progress_ctx;
    /* A line for the log. Optional. */
    void (*note)(void *ctx, const char *text);
    void *note_ctx;
};

#define ENGINE_PHASES_MAX 8

/* Of the start, in order. */
struct engine_phase {
    const char *name;
    double ms;
};

struct engine_info {
    uint32_t depth; /* steps under way at most: 1 on the host, which works in engine_submit */
    uint32_t max_slots, max_context, max_step_tokens, vocab_size;
    struct kv_account kv;
    uint64_t kv_pages_max; /* what kv.total_pages was at first: plans may lower it, and raise it up to this */
    uint64_t suspend_pages, suspend_bytes_per_s;  /* as Ready has them */
    uint64_t weight_bytes;                        /* of this rank, in memory */
    uint32_t sample_options;                      /* enum sample_option that this back end has */
    struct engine_phase phase[ENGINE_PHASES_MAX]; /* of create and connect */
    uint32_t phases;
    char device[64]; /* "host, 2 threads" */
    /* of the model, the same on all ranks */
    char architecture[64];
    uint32_t layers, hidden, heads, kv_heads, head_dim;
    int64_t bos_id;                          /* -1: none */
    uint32_t eos_ids[ENGINE_MAX_EOS], n_eos; /* of generation_config.json, else config.json */
    /* what generation_config.json says for sampling; 1, but top_k and min_p 0, where it says nothing; greedy
     * (temperature 0) when it says do_sample false */
    float temperature, top_p, min_p, typical_p, repetition_penalty;
    uint32_t top_k;
};

/* Where a step was computed, in microseconds of CLOCK_MONOTONIC; all 0 where nobody asked for it. */
struct engine_timing {
    double begin_us, end_us;
    /* Since the end of the step in front; 0 for the first. */
    double idle_us;  /* until this one was submitted: there was nothing to do */
    double gap_us;   /* from then on */
    double pages_us; /* of its submission: until the KV pool had its pages, mapped on the way or waited for */
};

struct engine_score {
    uint32_t index; /* of a sample: in tokens */
    struct sample_scores scores;
};

/* tokens: of all samples of the plan in order; the scores as StepResult has them (worker_control.proto), on rank 0 only.
 * Valid until the next submission. */
struct engine_result {
    uint64_t step;
    uint32_t rows, decodes;
    struct engine_timing timing;
    const uint32_t *tokens;
    uint32_t n_tokens;
    const struct engine_score *sample_scores, *prompt_scores;
    uint32_t n_sample_scores, n_prompt_scores;
    uint64_t used_pages;
    struct kv_stats kv;        /* now, with what was submitted since */
    const char *resize_failed; /* why the pool has not the size that a plan has asked for, told once; else NULL */
};

/* NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED (names the architecture, dtype or option), DATA_LOSS (damaged file: names the
 * file and the tensor), RESOURCE_EXHAUSTED (with the arithmetic; INVALID_ARGUMENT where the device would be too small even if
 * nothing else used it). Uses comm for rank and size only: nothing is exchanged before engine_connect, so a rank that fails here leaves
 * nobody waiting. */
STATUS_MUST_CHECK enum status_code engine_create(struct engine **out, const struct engine_config *cfg,
                                                 struct status *st);
void engine_destroy(struct engine *e); /* NULL is fine */
struct engine_info engine_info(const struct engine *e);

/* Collective: the ranks find out whether they fit together (all on the same kind of back end), and their devices find each
 * other, which may take seconds, and prepare all that steps will launch. The first step does it where nobody has. FAILED_PRECONDITION names ranks and facts; else
 * what comm says. */
STATUS_MUST_CHECK enum status_code engine_connect(struct engine *e, struct status *st);

/* Forgets all slots, once the steps under way have ended; the next plan is step 1. Fails where one of them does: the rank
 * cannot go on then. */
STATUS_MUST_CHECK enum status_code engine_reset(struct engine *e, struct status *st);
STATUS_MUST_CHECK enum status_code engine_submit(struct engine *e, const Tandem__V1__StepPlan *plan, struct status *st);
uint32_t engine_in_flight(const struct engine *e);
/* Whether engine_collect would not wait. */
STATUS_MUST_CHECK enum status_code engine_poll(struct engine *e, bool *done, struct status *st);
/* The result of the oldest step under way. */
STATUS_MUST_CHECK enum status_code engine_collect(struct engine *e, struct engine_result *result, struct status *st);
/* Both, for one at a time. */
STATUS_MUST_CHECK enum status_code engine_step(struct engine *e, const Tandem__V1__StepPlan *plan,
                                               struct engine_result *result, struct status *st);

#endif
