/* scheduler.h - which rows run in the next step: a pure function of state, events and time. Prefix sched_.
 *
 * No clock, thread, random number or I/O in here: the caller passes the time, so a test or a simulator replays exactly
 * what a server does. Stall-free batching (Sarathi-Serve, arXiv 2403.02310) within a token budget:
 *
 *     all running decodes (one row each), then chunks of unfinished prefills, then new requests, oldest first
 *
 *     QUEUED --admit--> PREFILL --last chunk--> DECODE --stop--> finished        (slot and pages are held in between)
 *        ^------------preempt, group lost------------'           any --cancel, deadline, group lost too often--> failed
 *
 * Memory: pages are counted with proto/kv_account.h, exactly as the ranks do. A request is accepted only if it can ever
 * fit alone. It is admitted when the pages of all its known tokens and the next are free, and some more for the running
 * requests to grow into. A decode that needs a page when none is free preempts the running request with least to lose (perhaps
 * itself): its slot is released and its tokens, prompt and generated, are computed again later, or the ranks move the slot to
 * host memory and back (sched_set_suspension); it keeps its place in the order. The oldest running one is never preempted, so every request finishes.
 *
 * Pipeline: up to `depth` plans are in flight; a decode row's input may be the token of the step before, which only the
 * rank knows yet. Its stop is then seen one step late: one wasted row, whose result is dropped. Pages released in plan k
 * count as free in plans made after the result of k-1 has arrived: no earlier step can read them then.
 *
 *     sched_submit(s, now, &req, st);
 *     while (sched_plan(s, now, &plan)) send(plan);
 *     ... sched_result(s, now, step, tokens, n, st);  while (sched_next_event(s, &ev)) ...
 *
 * One thread. Time in microseconds of one monotonic clock.
 */
#ifndef TANDEM_SCHEDULER_H
#define TANDEM_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "coordinator/cost.h"
#include "proto/kv_account.h"
#include "proto/status.h"

struct sched;
struct sched_book;

/* What a step is made of. */
enum sched_policy {
    SCHED_CHUNKED,       /* all decodes, then chunks up to the budget: Sarathi-Serve's fixed chunk */
    SCHED_TARGETS,       /* the same, but beside whom has a token-time target chunks are cut to what that leaves them */
    SCHED_PREFILL_FIRST, /* whole prompts before any decode, as vLLM began; to compare with */
};

struct sched_config {
    uint32_t max_slots;         /* running requests at most: 1 to 65536 */
    uint32_t max_context;       /* tokens of one request, prompt and completion */
    uint32_t step_token_budget; /* rows of a step at most; at least max_slots is advised: less starves prefill */
    uint32_t max_queued; /* requests that wait to be admitted for the first time, in all schedulers of the book */
    uint64_t max_queued_tokens; /* their prompt tokens together */
    uint32_t depth;             /* plans in flight: 1 or 2 */
    struct kv_account kv;       /* page_bytes 0: not known before the first attach, requests are not measured by it */
    bool prefix_cache;          /* slots of ended requests stay for others that begin with the same tokens */
    enum sched_policy policy;
    struct cost_profile cost;  /* SCHED_TARGETS: where the fit of step times starts; all zero: cost_default */
    int64_t ttft_target_us;    /* of requests that name none; 0: none */
    int64_t tbt_target_us;     /* time between two tokens, the same */
    bool refuse_late;          /* a request whose first token cannot come within its TTFT target is refused */
    uint32_t age_us_per_token; /* a prompt shorter by a token may pass one that came so much earlier; 0: by age alone */
    uint32_t max_queued_tenant; /* max_queued of each tenant; 0: none */
    uint64_t max_queued_tokens_tenant;
    uint32_t replay_limit;   /* groups that a request may lose without a new token in between: sched_lose */
    struct sched_book *book; /* NULL: its own. See sched_book_create */
};

struct sched_sample {
    float temperature; /* 0: greedy */
    uint32_t top_k;    /* 0: all */
    float top_p;
    uint64_t seed;
    const void *options; /* the caller's, handed on in sched_admit; not looked at */
};

struct sched_request {
    uint64_t id;              /* the caller's; unique among live requests */
    const uint32_t *prompt;   /* copied */
    uint32_t n_prompt;        /* at least 1 */
    uint32_t max_new;         /* at least 1; n_prompt + max_new <= max_context */
    const uint32_t *stop_ids; /* copied; eos ids included by the caller */
    uint32_t n_stop;
    int64_t deadline_us;                   /* INT64_MAX: none */
    int64_t ttft_target_us, tbt_target_us; /* 0: those of the configuration */
    uint64_t tenant;                       /* tenants share what there is evenly, counted in tokens */
    int32_t priority;                      /* 1 goes before 0, and 0 before -1, but lower ones keep a share */
    struct sched_sample sample;
    bool scores; /* of the prompt's tokens are wanted: rows are marked for it, each once whatever is computed again */
    /* with a prefix cache; requests with scores compute all rows in any case */
    uint64_t salt;       /* only requests of one salt share */
    bool no_cache_read;  /* computes its whole prompt */
    bool no_cache_write; /* nobody begins with its tokens */
    /* One that went on elsewhere before: it waits like one that lost its group, before all that never ran, and the bounds of
     * the queue do not count. n_output less than max_new; the last token is no stop id. */
    bool resumed;
    const uint32_t *output; /* new tokens that are known, copied */
    uint32_t n_output;
};

enum sched_event_kind {
    SCHED_TOKEN,    /* a new token */
    SCHED_SCORES,   /* scores of the prompt's next tokens */
    SCHED_FINISHED, /* by length or stop; the last event of the request */
    SCHED_FAILED, /* code says why: CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE (sched_detach), ABORTED (sched_lose); the
                       last event of the request */
};

struct sched_event {
    uint64_t id;
    enum sched_event_kind kind;
    uint32_t index;        /* TOKEN: in the result's tokens; SCORES: of the first, in the result's scores */
    uint32_t count;        /* SCORES: how many */
    uint32_t token;        /* TOKEN; FINISHED by stop: the stop token (which came as TOKEN before) */
    bool stopped;          /* FINISHED: by a stop id, else by length */
    enum status_code code; /* FAILED */
    /* FINISHED and FAILED: */
    uint32_t n_prompt, n_new, preemptions, replays;
    uint32_t n_cached; /* prompt tokens that were there at its first admission */
    int64_t arrived_us, started_us, first_token_us, last_token_us; /* 0 where it did not come to that */
};

/* What one step does; the arrays belong to the scheduler and stay until the next call of sched_plan, sched_attach or
 * sched_destroy. */
struct sched_chunk {
    uint64_t id;
    uint32_t slot;
    uint32_t position;
    const uint32_t *tokens; /* valid like the arrays */
    uint32_t n_tokens;
    bool sample; /* reaches the last known token: the rank samples the next */
    /* rows [score_first, score_first + score_rows) of the chunk are scored; next_token follows the chunk when it is known */
    uint32_t score_first, score_rows, next_token;
};
struct sched_admit {
    uint64_t id;
    uint32_t slot;
    uint32_t from, from_tokens; /* begins with so many tokens of slot `from`, which stays taken; 0: empty */
    struct sched_sample sample;
};
struct sched_plan {
    uint64_t step; /* 1, 2, 3 ... since sched_attach */
    const uint32_t *release;
    uint32_t n_release;
    const uint32_t
        *suspend; /* slots to host memory, after the releases; their pages come free as those of released ones */
    uint32_t n_suspend;
    const uint32_t *resume; /* slots back from there, before the admissions; they have no rows in this plan */
    uint32_t n_resume;
    uint64_t
        kv_pages; /* so many each rank's pool is to have from now on; after releases and suspensions; 0: as it is */
    const struct sched_admit *admit;
    uint32_t n_admit;
    const uint32_t *decode; /* slots */
    uint32_t n_decode;
    const struct sched_chunk *chunk;
    uint32_t n_chunk;
    uint32_t rows;         /* decodes and chunk tokens */
    uint32_t samples;      /* tokens that the result will hold: decodes first, then chunks with sample, in order */
    uint32_t scores;       /* rows that are scored, in the order of chunks */
    struct cost_step cost; /* the same as the cost model counts it */
};

struct sched_load {
    uint32_t queued;    /* wait for their first admission */
    uint32_t running;   /* all other live requests, preempted ones too */
    uint32_t in_flight; /* plans */
    uint64_t queued_tokens;
    uint64_t used_pages,
        total_pages;       /* fenced ones count as used, those only kept for others do not; 0 without a group */
    uint64_t goal_pages;   /* that total_pages is on its way to; 0: nowhere */
    uint64_t kept_pages;   /* only held for requests to come: free as soon as they are needed */
    uint64_t shared_pages; /* held by two slots or more, each counted once */
    uint32_t kept_slots;
    uint32_t suspended_slots;                            /* of requests among the running: in the ranks' host memory */
    uint64_t suspended_pages;                            /* of host memory that these take */
    uint64_t suspend_pages;                              /* of host memory that there are */
    uint64_t cache_hits, cached_tokens, cache_evictions; /* since the group came; replays hit, too */
    /* since sched_create; prompt tokens count once, however often they are computed */
    uint64_t steps, prompt_tokens, generated_tokens, finished, failed, preemptions, replays;
    uint64_t suspensions,
        resumptions;            /* of the preemptions, those that went to host memory; and those that came back */
    uint64_t recomputed_tokens; /* rows spent again on what preemption or a lost group threw away */
    uint64_t wasted_rows;       /* samples dropped because their request had ended */
};

/* What schedulers between which requests move have in common: the order of submission, the bounds of the queue, what tenants
 * have had. The caller's; it outlives them. */
STATUS_MUST_CHECK enum status_code sched_book_create(struct sched_book **out, struct status *st);
void sched_book_destroy(struct sched_book *b); /* NULL is fine */

STATUS_MUST_CHECK enum status_code sched_create(struct sched **out, const struct sched_config *cfg, struct status *st);
void sched_destroy(struct sched *s); /* NULL is fine */

/* A worker group is there (at first, or a new one; after sched_detach, else FAILED_PRECONDITION): its account and slot count replace the configured ones; steps count
 * from 1 again. Waiting requests that can never fit any more fail (INVALID_ARGUMENT in the event). Before the first attach
 * requests queue up. */
STATUS_MUST_CHECK enum status_code sched_attach(struct sched *s, int64_t now_us, uint32_t slots, uint32_t max_context,
                                                const struct kv_account *kv, struct status *st);
/* What the ranks of the attached group can hold in host memory: `pages` pages each, moved at so many bytes a second in each
 * direction (0: not known). Preempted requests go there while there is room and it is cheaper than computing their rows
 * again. Until the group is gone; without this call nobody is suspended. */
void sched_set_suspension(struct sched *s, uint64_t pages, uint64_t bytes_per_s);
/* The attached group is to have so many pages, until it is gone: fewer or more than it came with, at most as many as its ranks
 * once had; 0: as it is. Pages leave as they come free, a few in each plan (kv_pages), prefixes that are only kept with them,
 * but never more than leave enough for each live request alone. */
void sched_set_pages(struct sched *s, uint64_t pages);
/* The newest plan that asked the ranks for more pages and was not answered; 0: none. When its result, or a later one, has come
 * from all of them, sched_pages_are says how many they have, the least of them. When that is less than they were to have, it
 * stays so: true. */
uint64_t sched_pages_asked(const struct sched *s);
bool sched_pages_are(struct sched *s, uint64_t pages);
/* The group is gone: admitted requests fail with UNAVAILABLE, those that wait for their first admission stay. Nothing is
 * planned until the next sched_attach. */
void sched_detach(struct sched *s, int64_t now_us);
/* The same, but admitted requests stay, too: as if they were preempted, they wait, before all that never ran, for the next
 * group to compute their tokens again and go on behind the last one known. Samples in flight are forgotten: ranks key them
 * by seed and position, so they come again. A request that lost more than cfg.replay_limit groups in a row without a new
 * token fails with ABORTED: it may be what kills them. */
void sched_lose(struct sched *s, int64_t now_us);
/* The same of a group that is well but is to go: it counts against no request. */
void sched_recall(struct sched *s, int64_t now_us);

/* INVALID_ARGUMENT (names the field; also what can never fit), RESOURCE_EXHAUSTED (a queue is full, or deadline or target
 * cannot be met behind what waits: sched_retry_ms), ALREADY_EXISTS (id). */
STATUS_MUST_CHECK enum status_code sched_submit(struct sched *s, int64_t now_us, const struct sched_request *req,
                                                struct status *st);
/* Ends a request with a FAILED event of this code; the slot is released in the next plan. NOT_FOUND. */
STATUS_MUST_CHECK enum status_code sched_cancel(struct sched *s, int64_t now_us, uint64_t id, enum status_code code,
                                                struct status *st);
/* Ends a request with a FINISHED event, as a length reached; the slot is released in the next plan. NOT_FOUND. */
STATUS_MUST_CHECK enum status_code sched_finish(struct sched *s, int64_t now_us, uint64_t id, struct status *st);
/* How long the ranks took for plan `step`; before its sched_result. May be left out. */
void sched_step_took(struct sched *s, uint64_t step, uint64_t took_us);
/* The tokens of plan `step`, and how many scores came with them; steps come in order. INTERNAL when step or a count is not
 * what was planned. */
STATUS_MUST_CHECK enum status_code sched_result(struct sched *s, int64_t now_us, uint64_t step, const uint32_t *tokens,
                                                uint32_t n_tokens, uint32_t n_scores, struct status *st);
/* Fails what is past its deadline. sched_plan does this too. */
void sched_expire(struct sched *s, int64_t now_us);

/* The next plan; false: nothing to do, or the pipeline is full. A plan may have no rows (releases only): it is sent
 * and answered like any other. */
bool sched_plan(struct sched *s, int64_t now_us, struct sched_plan *plan);
/* Rows of a step at most from the next plan on, 1 to the configured budget (cut to that): what a group's ranks can take,
 * or what a latency target allows. */
void sched_set_step_budget(struct sched *s, uint32_t rows);

/* Takes one event, in order. Events are bounded by live requests plus tokens of one result: take them after each call. */
bool sched_next_event(struct sched *s, struct sched_event *ev);

/* From now on until the next sched_attach nobody is admitted for the first time: a group that is to go empties. */
void sched_hold(struct sched *s);

/* ---- several groups, each with a scheduler of its own ---- */

/* A request on its way to a group. */
struct sched_wish {
    const uint32_t *tokens; /* known ones */
    uint32_t n_tokens;
    uint32_t n_total; /* prompt and completion */
    uint64_t salt;
    bool cache_read;
    uint32_t losses; /* groups lost since its last new token */
};
/* How it would fare there. */
struct sched_look {
    bool fits;       /* it can ever run: else nothing further is filled in */
    bool room;       /* there are a slot and pages for it at once */
    uint32_t cached; /* of its tokens, those that would not be computed */
    uint32_t running, waiting;
    uint64_t ahead; /* prompt tokens that are computed before it */
};
void sched_look(const struct sched *s, const struct sched_wish *w, struct sched_look *out);
/* The wish of a live request; its tokens are the scheduler's, until the next call. False: there is no such request. */
bool sched_wish_of(const struct sched *s, uint64_t id, struct sched_wish *out);
/* Requests that wait with nothing of their group: behind this one (0: the first), preempted ones before queued ones, each by
 * age. 0: none. */
uint64_t sched_next_waiting(const struct sched *s, uint64_t id);
bool sched_waits(const struct sched *s); /* anybody, also who cannot move at the moment */
struct sched_queue {
    uint32_t requests; /* never admitted */
    uint64_t tokens;   /* of their prompts */
};
struct sched_queue sched_queue(const struct sched *s);
uint32_t sched_runs(const struct sched *s);          /* requests that were admitted, preempted ones too */
uint64_t sched_first_waiting(const struct sched *s); /* who is admitted next; 0: nobody, or it cannot move */
uint64_t sched_last_waiting(const struct sched *s);  /* the youngest that never ran; 0: none */
/* Such a request goes on in another scheduler, which must have the same book; the bounds of its queue do not count, age and
 * deadline are kept. Take all events of `from` before. False: it cannot move, or memory is short; nothing has changed. */
STATUS_MUST_CHECK bool sched_move(struct sched *from, struct sched *to, uint64_t id);

/* When it is worth to ask again after RESOURCE_EXHAUSTED: until what waits now is mostly gone, 50 ms to 60 s. */
uint32_t sched_retry_ms(const struct sched *s);
/* Microseconds until a prompt of this tenant would have its first token, were it submitted now; 0: not known yet. */
int64_t sched_predict_ttft_us(const struct sched *s, uint64_t tenant, int32_t priority, uint32_t n_prompt);
/* What the fit of step times has come to. */
struct cost_profile sched_cost(const struct sched *s);

/* Earliest deadline of a live request; INT64_MAX: none. */
int64_t sched_next_deadline_us(const struct sched *s);
struct sched_load sched_load(const struct sched *s);
/* Walks all state; aborts the process with a message when an invariant is broken. For tests and the simulator. */
void sched_check(const struct sched *s);

#endif
