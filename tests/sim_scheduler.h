/* sim_scheduler.h - a server without model, network and clock around the scheduler: arrivals, cancels, deadlines, lost
 * groups, slow results, all drawn from one seed. Prefix sim_.
 *
 * Ranks are those of sim_ranks.h. After every call the scheduler's own sched_check and these must hold, else the process
 * aborts with a message:
 *   - events: tokens of a request are the ones its seed says, in order; one terminal event, with right counts and reason
 *   - budget kept; decodes first; turns when the budget is less than the decodes; releases in the very next plan
 *   - admission by age, preempted requests before all others; in some runs there are tenants, classes, targets and short
 *     prompts that pass long ones: then by age among those of one tenant and class with no more tokens
 *   - the oldest running request is never preempted
 *   - preempted requests are suspended to host memory, where the run has some and that is cheaper: told to the ranks in the
 *     very next plan, never more than there is, given back when they end
 *   - in some runs pages are taken from the group and given again: ranks have free what they give, and nothing else changes
 *   - a lost group's requests go on in the next, as if they were preempted, or fail, as the run was drawn
 *   - at most depth - 1 rows computed for nothing when a stop token ends a request, none when its length does
 *   - as long as a request lives there is a plan or a step in flight, and each ends within a number of steps that follows
 *     from the work of those before it
 *   - queue limits, and every refusal with the code it ought to have
 *   - when all is over, no slot, page or request is left
 */
#ifndef TANDEM_SIM_SCHEDULER_H
#define TANDEM_SIM_SCHEDULER_H

#include "tests/sim_ranks.h"

struct sim_options {
    uint64_t seed;
    uint64_t steps; /* results, before it drains */
    /* chances in 1/1024: of a call per tick, of a request to have a deadline */
    uint32_t arrival, cancel, deadline, group_loss;
    uint32_t context;          /* tokens of a request at most, up to 512 */
    uint32_t bad_request;      /* of an arrival to be one that must be refused */
    uint32_t min_context_fits; /* KV memory, in requests of full context: from this (at least 1) ... */
    uint32_t max_context_fits; /* ... to this */
};

struct sim_report {
    uint64_t steps, submitted, finished, failed, rejected, groups;
    uint64_t unfit;      /* failed because the group that came could never run them */
    uint64_t cache_hits; /* of the last group */
    uint64_t replays;
    uint64_t suspensions, resumptions;
    uint64_t resizes, short_of_pages; /* sizes of the pool that were asked for; ranks that could not have so much */
    uint64_t preemptions, generated, prompt, recomputed, wasted;
    double worst_wait; /* steps that a request took, as a part of its bound */
};

void sim_run(const struct sim_options *o, struct sim_report *report);

#endif
