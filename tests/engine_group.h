/* engine_group.h - R ranks of one tensor-parallel group as threads of a test, and a small scheduler that drives them.
 * Prefix group_.
 *
 * The ranks are joined by a comm back end over shared memory and a barrier: everything but MPI is the real thing.
 */
#ifndef TANDEM_TESTS_ENGINE_GROUP_H
#define TANDEM_TESTS_ENGINE_GROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"
#include "worker/engine.h"

struct group;

/* cfg->comm is not looked at; threads 0 means 1. The first rank that fails gives the error. */
enum status_code group_create(struct group **out, const struct engine_config *cfg, uint32_t ranks, struct status *st);
void group_destroy(struct group *g); /* NULL is fine */
uint32_t group_size(const struct group *g);
struct engine *group_engine(struct group *g, uint32_t rank);
void group_reset(struct group *g);
/* All ranks run the plan. INTERNAL when their tokens differ. result is rank 0's. */
enum status_code group_step(struct group *g, const Tandem__V1__StepPlan *plan, struct engine_result *result,
                            struct status *st);

struct group_request {
    const uint32_t *prompt;
    uint32_t prompt_tokens;
    uint32_t max_new; /* at least 1 */
    float temperature, top_p;
    uint32_t top_k;
    uint64_t seed;
    const Tandem__V1__SampleParams *params; /* instead of the four before; NULL: they count */
    uint32_t *out;                          /* [max_new] */
    uint32_t top;                           /* of scores: so many likeliest tokens */
    struct sample_scores *scores;           /* [max_new]; NULL: none */
    struct sample_scores *prompt_scores;    /* [prompt_tokens - 1]; NULL: none */
    uint32_t arrival;                       /* step before which it is not admitted */

    /* the scheduler's own */
    uint32_t slot, fed, made, scored;
    bool running, done;
};

struct group_schedule {
    uint32_t rows_per_step; /* decodes first, then prompts in chunks of what is left */
    uint32_t concurrent;    /* requests at a time */
    uint64_t first_step;    /* of the first plan; 0 means 1, after a reset */
    uint64_t steps;         /* out: how many plans it took */
};

enum status_code group_run(struct group *g, struct group_request *req, uint32_t n, struct group_schedule *sched,
                           struct status *st);

#endif
