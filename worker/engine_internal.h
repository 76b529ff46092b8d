/* engine_internal.h - the state of an engine, shared by engine.c (create, step) and engine_plan.c (is the plan right?). */
#ifndef TANDEM_ENGINE_INTERNAL_H
#define TANDEM_ENGINE_INTERNAL_H

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

struct engine_slot {
    bool live;
    bool has_token;  /* last_token was sampled at position length and not fed yet */
    uint32_t length; /* tokens in the KV pool */
    uint32_t last_token;
    struct sample_params sample;
    /* number of the check that saw the slot last in this role: finds what a plan names twice, and needs no clearing */
    uint64_t released_by, admitted_by, run_by;
};

struct engine {
    struct engine_info info;
    struct model_config model;
    struct shard shard;
    struct comm *comm;
    struct thread_pool *pool;
    struct model_weights weights;
    struct kv_pool *kv;
    const struct backend_parts *parts; /* NULL: the host */
    const struct forward_ops *ops;
    struct forward *forward;

    uint64_t step; /* last done */
    uint64_t checks;
    struct engine_slot *slot; /* [max_slots] */

    /* of the step under way */
    uint32_t *row_token;           /* [max_step_tokens] */
    struct forward_seq *seq;       /* [max_step_tokens] */
    struct forward_sample *sample; /* [max_slots] */
    uint32_t *sampled_slot;        /* [max_slots] */
    uint32_t *token;               /* [max_slots] */
};

/* Whether the plan fits the state; changes nothing that counts. INVALID_ARGUMENT: a value that no state allows.
 * INTERNAL: it contradicts the state. RESOURCE_EXHAUSTED: more pages than there are. */
STATUS_MUST_CHECK enum status_code engine_plan_check(struct engine *e, const Tandem__V1__StepPlan *plan,
                                                     struct status *st);
/* Absent: greedy. */
struct sample_params engine_sample_params(const Tandem__V1__SampleParams *p);

#endif
