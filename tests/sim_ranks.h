/* sim_ranks.h - R ranks that take step plans literally, without a model. Prefix sim_.
 *
 * What is checked is what would break a real rank: releases and admits of slots, positions, a decode without a sampled
 * token, rows past the context, and pages counted with each rank's own account. A rank maps the pages of plan k as soon
 * as the plan is made; pages of a slot released in plan k come free when step k-1 has ended, and the only steps that are
 * known to have ended are those whose result the scheduler had seen. Slots that are suspended give pages back in the same
 * way, and take host memory. No rank may ever lack a page of either.
 *
 * The "model": the token at a position is a hash of the request's seed and the position. Whatever is preempted, replayed
 * or in flight, the stream of a request is known beforehand.
 */
#ifndef TANDEM_SIM_RANKS_H
#define TANDEM_SIM_RANKS_H

#include "coordinator/scheduler.h"

#define SIM_VOCAB     64
#define SIM_MAX_RANKS 4

/* splitmix64 */
static inline uint64_t sim_hash(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* The token at a position, of a prompt or generated. Three in four requests begin as all of one of four families do. */
static inline uint32_t sim_token(uint64_t seed, uint32_t position)
{
    if ((seed >> 20 & 3) != 0 && position < (seed >> 22 & 127))
        seed = seed >> 30 & 3;
    return (uint32_t)(sim_hash(seed + position) % SIM_VOCAB);
}

/* Requests of different salts share nothing. */
static inline uint64_t sim_salt(uint64_t seed)
{
    return seed >> 40 & 1;
}

struct sim_slot {
    bool active;
    bool suspended;
    bool sampled; /* the token at position `len` is on the rank */
    uint32_t len;
    uint64_t id, seed;
    uint32_t *page[SIM_MAX_RANKS]; /* numbers of its pages */
    uint32_t n_pages[SIM_MAX_RANKS];
    uint64_t last_step; /* that had rows of this slot: one run of rows in a step */
};

struct sim_group {
    uint32_t n_ranks, slots, max_context;
    struct kv_account kv[SIM_MAX_RANKS];
    uint64_t host_pages[SIM_MAX_RANKS]; /* for suspended slots */
    uint64_t most_pages[SIM_MAX_RANKS]; /* that the machine has, of those that the rank came with */
};

struct sim_rank {
    uint32_t *refs;  /* of each page: slots that have it */
    uint32_t *spare; /* numbers of pages that no slot has, fenced ones too */
    uint64_t n_spare;
    uint64_t free_pages;
    uint64_t host_pages;                     /* taken by suspended slots */
    uint64_t fenced_pages[2], fence_step[2]; /* of the last two plans: come free when fence_step has ended */
};

struct sim_ranks {
    struct sim_group group;
    struct sim_rank rank[SIM_MAX_RANKS];
    struct sim_slot *slot;
    uint64_t next_step;
};

/* Prints "sim: ..." and aborts. */
void sim_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));

void sim_ranks_init(struct sim_ranks *r, const struct sim_group *group);
void sim_ranks_fini(struct sim_ranks *r);
uint64_t sim_ranks_pages(const struct sim_ranks *r); /* what the rank with the fewest has */
/* Runs a plan; tokens (plan->samples of them) are what its result will hold. completed: last step known to have ended. */
void sim_ranks_step(struct sim_ranks *r, const struct sched_plan *plan, uint64_t completed, uint32_t *tokens);
/* Host pages of suspended slots on the rank that takes most. */
uint64_t sim_ranks_suspended(const struct sim_ranks *r);
/* All steps have ended: only the slots that are kept are taken, and no rank holds more than so many pages; just as many if
 * all ranks are alike. */
void sim_ranks_check_idle(struct sim_ranks *r, const bool *kept, uint64_t pages);

#endif
