/* engine_internal.h - the state of an engine, shared by engine.c (create), engine_kv.c (its KV pool), engine_plan.c (is the plan
 * right?) and engine_step.c (carried out). */
#ifndef TANDEM_ENGINE_INTERNAL_H
#define TANDEM_ENGINE_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>

#include "memory/memory.h"
#include "worker/backend.h"
#include "worker/engine.h"
#include "worker/forward.h"
#include "worker/model_config.h"
#include "worker/model_weights.h"
#include "worker/sample.h"
#include "worker/shard.h"
#include "worker/threads.h"

struct engine_options;  /* engine_options.c */
struct engine_kv_start; /* engine_kv.c */

struct engine_slot {
    bool live;
    bool suspended; /* length and all else stays as it was */
    bool has_token; /* a token was sampled at position length, or will be by a step under way, and is not fed yet */
    bool pending;   /* by a step under way: last_token is not known yet */
    uint64_t sampled_by; /* the last step that samples for it */
    uint32_t length;     /* tokens in the KV pool, those of steps under way included */
    uint32_t last_token;
    struct sample_params sample;
    struct engine_options *options; /* NULL: none */
    bool logprobs;
    uint32_t top_logprobs;
    /* number of the check that saw the slot last in this role: finds what a plan names twice, and needs no clearing */
    uint64_t released_by, admitted_by, run_by, moved_by;
    uint32_t begins; /* of the check that admitted it: tokens that it begins with */
};

#define ENGINE_DEPTH_MAX 2

/* A step from its submission until its result is collected. All arrays [max_step_tokens]. */
struct engine_flight {
    uint64_t step;
    bool finished; /* tokens are known */
    uint32_t *row_token;
    struct forward_seq *seq;
    struct forward_sample *sample;
    uint32_t *sampled_slot; /* FORWARD_NO_SLOT: a given token */
    uint32_t *token;        /* of samples; once finished of slots alone */
    struct engine_score *sample_score, *prompt_score;
    uint32_t rows, decodes;
    double submitted_us, pages_us;
    struct engine_timing timing;
    uint32_t samples, n_tokens, n_sample_scores, n_prompt_scores;
};

struct engine {
    struct engine_info info;
    struct model_config model;
    struct shard shard;
    struct comm *comm;
    struct thread_pool *pool;
    struct model_weights weights;
    struct kv_pool *kv;
    struct engine_kv_start *kv_start;  /* kv is being made; NULL: nobody makes it */
    const struct backend_parts *parts; /* NULL: the host */
    const struct forward_ops *ops;
    struct forward *forward;

    bool connected;
    uint64_t suspended_pages; /* of all suspended slots */

    uint64_t step; /* last submitted */
    uint64_t done; /* last whose tokens are known */
    uint64_t checks;
    struct engine_slot *slot;                      /* [max_slots] */
    struct engine_flight flight[ENGINE_DEPTH_MAX]; /* the first info.depth are used */
    uint32_t first_flight, in_flight;
    struct status resized; /* the last size that a plan has asked for; not OK: no result has told it yet */
    bool timed;
    double ended_us; /* the last step; 0: none has */
    double phase_ms; /* when the last phase of the start ended */
};

/* ---- the KV pool (engine_kv.c) ---- */

/* share: bytes that it may have where cfg does not say. A device's is made by a thread of its own until engine_kv_end; e->kv is not
 * set before. */
STATUS_MUST_CHECK enum status_code engine_kv_begin(struct engine *e, const struct engine_config *cfg, uint64_t share,
                                                   struct status *st);
/* Why it cannot be made, as far as that is known already. */
STATUS_MUST_CHECK enum status_code engine_kv_look(struct engine *e, struct status *st);
STATUS_MUST_CHECK enum status_code engine_kv_end(struct engine *e, struct status *st);
void engine_kv_destroy(struct engine *e); /* at any time */

/* Whether the plan fits the state; changes nothing that counts. INVALID_ARGUMENT: a value that no state allows.
 * INTERNAL: it contradicts the state. RESOURCE_EXHAUSTED: more pages than there are. */
STATUS_MUST_CHECK enum status_code engine_plan_check(struct engine *e, const Tandem__V1__StepPlan *plan,
                                                     struct status *st);

/* Waits for the steps under way and forgets them; after an error they are still under way. */
STATUS_MUST_CHECK enum status_code engine_drop_flights(struct engine *e, struct status *st);

/* The slot has no options any more. */
void engine_drop_options(struct engine *e, uint32_t slot);

/* ---- options of a slot (engine_options.c) ---- */

/* Absent: greedy. */
struct sample_params engine_sample_params(const Tandem__V1__SampleParams *p);
/* Whether the choice of a token looks at all tokens before it: each must have been fed. */
bool engine_options_history(const Tandem__V1__SampleParams *p);
/* supported: enum sample_option. INVALID_ARGUMENT and UNIMPLEMENTED name the field. */
STATUS_MUST_CHECK enum status_code engine_options_check(const Tandem__V1__SampleParams *p, uint32_t vocab,
                                                        uint32_t supported, struct status *st);
/* *out is NULL when the parameters ask for nothing beside engine_sample_params. */
STATUS_MUST_CHECK enum status_code engine_options_create(struct engine_options **out, const Tandem__V1__SampleParams *p,
                                                         uint32_t vocab, struct status *st);
void engine_options_destroy(struct engine_options *o); /* NULL is fine, here and below */
/* A device counts what is fed: engine_options_feed has nothing to do. */
void engine_options_kept(struct engine_options *o);
/* Whether a token can only be chosen where the host knows all tokens before it. */
bool engine_options_wait(const struct engine_options *o);
/* These tokens are fed at positions position, position + 1, ... */
STATUS_MUST_CHECK enum status_code engine_options_feed(struct engine_options *o, const uint32_t *tokens, uint32_t n,
                                                       uint32_t position, struct status *st);
/* What is done to the logits of the token at `position`, after all tokens before it were fed; NULL: nothing. Valid until
 * the next call for the slot. */
const struct sample_adjust *engine_options_at(struct engine_options *o, uint32_t position);

#endif
