/* scheduler_internal.h - what the scheduler's own files share: state of a request, lists, tables.
 *
 * Every live request is in one list, by its state:
 *
 *     queued --admit--> run --last sample planned--> draining          run, preempted: by age (submission)
 *                        ^ '--preempt--> preempted                     queued: by age, and in the heap of its
 *                        '--admit-----------'                                  tenant and class (scheduler_queue.c)
 *
 * Preempted ones are admitted before all queued ones, oldest first; who is next of the queued ones is scheduler_queue.c's.
 * The oldest running request is never preempted.
 *
 * A request whose last token is sampled in a plan already sent needs no slot any more: it gives it back in the next plan
 * and waits in `draining` for its samples.
 */
#ifndef TANDEM_SCHEDULER_INTERNAL_H
#define TANDEM_SCHEDULER_INTERNAL_H

#include "coordinator/cost.h"
#include "coordinator/prefix.h"
#include "coordinator/scheduler.h"

#define SCHED_MAX_DEPTH 2
#define SCHED_NO_SLOT   UINT32_MAX
#define SCHED_CLASSES   3 /* of priority: 0 is the highest */

enum req_state {
    REQ_QUEUED,    /* never admitted; counted against max_queued */
    REQ_PREEMPTED, /* lost its slot or its group, or is suspended; waits to be admitted again; samples may be in flight */
    REQ_RUNNING,   /* has a slot */
    REQ_DRAINING, /* all tokens sampled, slot given back, samples in flight */
};

/* The tokens of a request: prompt, then generated ones. What a rank holds and what is known here differ:
 *
 *     0 ........ n_prompt ........ n_known ...... n_known + n_unknown ........ n_total
 *     |  prompt  |   generated     |  sampled in flight  |
 *     0 ..................... n_fed                          length of the slot after all plans made so far
 */
struct req {
    struct req *next, *prev; /* the list of its state, or free list (next only) */
    /* while it is queued: the heap of its tenant and class */
    struct req *heap_child, *heap_next, *heap_prev; /* heap_prev: left sibling, or parent of the first child */
    int64_t key_us;                                 /* the least goes first; see scheduler_queue.c */
    struct tenant *tenant;
    uint32_t cls;
    int64_t ttft_target_us, tbt_target_us; /* 0: none */
    uint64_t plan_seq;                     /* the last plan that has rows of it, or in which it waits for pages */
    uint64_t seq;                          /* order of submission, from 1; 0: the struct is free */
    enum req_state state;
    uint32_t slot;
    uint32_t n_known;
    uint32_t n_unknown;
    uint32_t n_fed;
    uint32_t n_total;    /* n_prompt + max_new */
    uint32_t cap_tokens; /* tokens that `pages` hold */
    bool decoding;       /* the last known token has been sampled from in this slot: n_fed = n_known + n_unknown - 1 */
    uint64_t pages;      /* under its slot, shared ones too; 0 without a slot */
    /* PREEMPTED with a slot: suspended (scheduler_suspend.c) */
    uint64_t host_pages;  /* 0: it is not */
    uint64_t resume_step; /* the first plan that may resume it */
    uint32_t *tokens;     /* n_total, then the stop ids: one allocation */
    uint32_t n_prompt;
    uint32_t n_stop;
    bool scores, cache_read, cache_write;
    uint64_t salt;
    uint32_t n_indexed; /* tokens of the slot that were last told to the prefix index */
    uint32_t n_cached;
    /* while it waits: the last answer of the index, and of which version */
    uint64_t match_version;
    uint32_t n_match, match_slot;
    uint32_t
        n_scored; /* prompt rows that are scored in plans made so far; their results come, whatever becomes of the slot */
    uint32_t n_scores_known; /* of them, those whose results came: the rest is lost with a group */
    uint32_t n_fed_max;      /* the furthest n_fed of all its slots: what is below is computed again */
    uint32_t preemptions, replays;
    uint32_t losses;     /* groups lost since the last new token */
    uint32_t heap_index; /* in the deadline heap; UINT32_MAX: not there */
    uint64_t id;
    int64_t deadline_us;
    int64_t arrived_us, started_us, first_token_us, last_token_us;
    int64_t predicted_us; /* wait for the first token as it looked at arrival; 0: nobody waited then */
    struct sched_sample sample;
};

struct req_list {
    struct req *head, *tail;
};

#define TENANT_BUCKETS 256

/* Whoever shares the server with others, in all schedulers of a book: scheduler_tenants.c. It stays for a while after its
 * last request, so that what it has used counts. */
struct account {
    struct account *hash_next;
    struct account *next, *prev; /* of those with live requests */
    uint64_t id;
    uint64_t served; /* weighted tokens; the least is served next */
    uint32_t n_live, n_queued;
    uint64_t queued_tokens;
    uint32_t refs; /* tenants of schedulers */
};

struct sched_book {
    uint64_t next_seq; /* order of submission, from 1 */
    uint32_t n_queued;
    uint64_t queued_tokens;
    struct account *bucket[TENANT_BUCKETS];
    struct account *active; /* with live requests */
};

/* Its requests in one scheduler. */
struct tenant {
    struct tenant *hash_next;
    struct tenant *next, *prev; /* of those with live requests */
    struct account *account;
    uint32_t n_live, n_queued;
    uint64_t queued_tokens;
    struct req *queue[SCHED_CLASSES]; /* tops of pairing heaps */
};

struct tenant_table {
    struct tenant *bucket[TENANT_BUCKETS];
    struct tenant *active; /* with live requests */
    uint32_t n;
};

/* Request structs in slabs, never moved. */
struct req_pool {
    struct req **slab;
    uint32_t n_slabs;
    struct req *free;
};

/* id -> request; open addressing, linear probing, at most half full. */
struct req_map {
    struct req **cell;
    uint32_t mask; /* cells - 1; cells are a power of two */
    uint32_t count;
};

/* Binary min-heap by (deadline, age). */
struct req_heap {
    struct req **item;
    uint32_t count, capacity;
};

/* Ring; room for one terminal event of each live request is kept at all times. */
struct event_ring {
    struct sched_event *item;
    uint32_t first, count, capacity; /* capacity is a power of two, or 0 */
};

/* A sample that a plan in flight will bring. The request may have ended meanwhile: then seq differs. */
struct sample_ref {
    struct req *req;
    uint64_t seq;
};

/* The same of a chunk's scored rows. */
struct score_ref {
    struct req *req;
    uint64_t seq;
    uint32_t rows;
};

struct flight {
    struct sample_ref *sample; /* one for each slot at most */
    uint32_t n_samples;
    struct score_ref *score; /* the same */
    uint32_t n_scores, score_rows;
    struct cost_step cost;
    int64_t planned_us;
    bool backlog; /* more prompt tokens waited than it took */
};

/* What a slot's pages are counted at: scheduler_share.c. */
struct holder {
    struct holder *parent, *child, *next, *prev; /* who it shares its first pages with; first sharer; siblings */
    uint32_t shared;                             /* tokens that are the parent's; 0: no parent */
    bool ghost;                                  /* its slot is given back */
    uint64_t pages;                              /* that it answers for */
};

struct sched {
    struct sched_config cfg;
    /* of the group, or of the configuration before the first attach */
    uint32_t slots, max_context;
    struct kv_account kv;
    uint32_t step_budget;
    bool attached, hold;

    struct req_list run, preempted, queued, draining;
    uint32_t n_live, n_queued, n_running;
    uint64_t queued_tokens;
    uint32_t n_class_queued[SCHED_CLASSES];
    uint64_t class_credit[SCHED_CLASSES]; /* tokens that a class may take before higher ones */
    struct tenant_table tenants;
    struct cost_model cost;
    /* how fast prompts were computed while more of them waited; both fade */
    double backlog_tokens, backlog_us;
    double margin; /* nearly all waits are within so many times of what was predicted */
    int64_t last_result_us;
    uint64_t last_victim_seq; /* preempted last */
    uint64_t plan_seq;        /* calls of sched_plan */
    struct sched_book *book;  /* cfg.book, or own_book */
    struct sched_book *own_book;
    struct req_pool pool;
    struct req_map map;
    struct req_heap heap;
    struct event_ring events;

    /* Slots: with a request (owner), pending, or free. Free ones are taken in the order they came, so that a slot rests
     * as long as can be before its addresses are used again. */
    struct req **owner;
    uint32_t *free_slot; /* ring of `slots` */
    uint32_t free_first, n_free;
    uint32_t *pending; /* given back, the ranks do not know it yet: released in the next plan */
    uint32_t n_pending;

    /* Pages: total = free + pending + fenced + held. */
    uint64_t free_pages;
    uint64_t held_pages;    /* of all holders: running requests and parked slots */
    uint64_t pending_pages; /* of the pending slots, and of those to be suspended */
    uint64_t fenced_pages;  /* released in the newest plan while the one before it was in flight */

    /* The pool's size on its way to another: scheduler_resize.c. */
    uint64_t goal_pages; /* 0: none */
    uint64_t told_pages; /* that the ranks were told last, or came with */
    uint64_t asked_step; /* the plan that told them to take more, until they have answered; 0: none */

    /* Host memory of the ranks. */
    uint64_t suspend_pages, suspended_pages; /* there are; taken */
    double suspend_page_us;                  /* a page, there and back; 0: not known */
    uint32_t n_suspended;                    /* requests */
    uint32_t *suspending;                    /* slots that the ranks are told about in the next plan */
    uint32_t n_suspending;

    uint64_t next_step; /* of the next plan */
    uint32_t in_flight;
    struct flight flight[SCHED_MAX_DEPTH]; /* step % SCHED_MAX_DEPTH */
    uint64_t rotate_seq;                   /* the last decode served when not all could be */

    /* of the newest plan */
    uint32_t *plan_release, *plan_suspend, *plan_resume, *plan_decode, *plan_tokens;
    struct sched_admit *plan_admit;
    struct sched_chunk *plan_chunk;
    struct req **decodable, **prefilling; /* scratch of sched_plan, by age */

    struct sched_load total; /* the counters in it */

    /* Parked slots have no owner and are neither pending nor free. NULL: no prefix cache, or no group. */
    struct prefix_index *prefix;
    uint64_t prefix_first_version;        /* of the next one */
    struct holder *holders, *free_holder; /* 2 x slots */
    struct holder **slot_holder;          /* NULL: the slot is pending or free */
    uint64_t *source_step; /* the last plan in which another slot begins as this one: it stays till after */
    uint32_t block_tokens;
};

/* scheduler_table.c */
struct req *req_pool_get(struct req_pool *p); /* zeroed; NULL: out of memory */
void req_pool_put(struct req_pool *p, struct req *r);
void req_pool_fini(struct req_pool *p);
bool req_map_reserve(struct req_map *m); /* for one more; false: out of memory */
struct req *req_map_find(const struct req_map *m, uint64_t id);
void req_map_add(struct req_map *m, struct req *r);
void req_map_remove(struct req_map *m, const struct req *r);
bool req_heap_reserve(struct req_heap *h);
void req_heap_add(struct req_heap *h, struct req *r);
void req_heap_remove(struct req_heap *h, struct req *r); /* not in it: nothing */
bool event_ring_reserve(struct event_ring *e, uint64_t more);
struct sched_event *event_ring_push(struct event_ring *e); /* zeroed; room was reserved */
void req_list_append(struct req_list *l, struct req *r);
void req_list_insert(struct req_list *l, struct req *r, struct req *before); /* NULL: at the end */
void req_list_remove(struct req_list *l, struct req *r);

/* scheduler_tenants.c */
struct account *account_find(const struct sched_book *b, uint64_t id); /* NULL: not known */
struct tenant *tenant_find(const struct sched *s, uint64_t id);        /* the same */
struct tenant *tenant_get(struct sched *s, uint64_t id); /* with one live request more; NULL: out of memory */
void tenant_put(struct sched *s, struct tenant *t);      /* with one less */
void tenant_queue(struct sched *s, struct tenant *t,
                  uint32_t tokens); /* counts one more that waits, of so many tokens */
void tenant_unqueue(struct sched *s, struct tenant *t, uint32_t tokens);
void tenants_fini(struct sched *s);

/* scheduler_queue.c: queued requests, and who is next. */
STATUS_MUST_CHECK enum status_code queue_check(const struct sched *s, int64_t now_us, const struct sched_request *req,
                                               struct status *st);
void queue_add(struct sched *s, struct req *r, int64_t now_us);
void queue_remove(struct sched *s, struct req *r);
struct req *queue_next(const struct sched *s);      /* to be admitted, preempted ones first; NULL: nobody waits */
void queue_admit(struct sched *s, struct req *r);   /* takes it out of queued or preempted, into run */
void queue_charge(struct req *r, uint64_t tokens);  /* to its tenant */
void run_insert(struct req_list *l, struct req *r); /* by age */
/* How long it would wait for its first token, submitted now; 0: nobody waits, or not known. */
int64_t queue_predict_us(const struct sched *s, int64_t now_us, const struct sched_request *req);
/* Its first token is here: predictions learn from it. */
void queue_learn(struct sched *s, const struct req *r, int64_t now_us);
/* The order among prefills: the least goes first. */
int64_t prefill_key_us(const struct sched *s, const struct req *r, int64_t arrived_us, uint32_t tokens);

/* scheduler_share.c. `tokens`, `shared`: of the account's; pages are the holder's own. */
void holders_init(struct sched *s);
/* How many holders must round for a slot that begins with so many tokens of another. */
uint64_t holder_depth(const struct sched *s, uint32_t from, uint32_t tokens);
void holder_take(struct sched *s, uint32_t slot, uint32_t from, uint32_t shared, uint64_t pages);
void holder_add(struct sched *s, uint32_t slot, uint64_t pages);
void holder_trim(struct sched *s, uint32_t slot, uint64_t pages);
uint64_t holder_drop(struct sched *s, uint32_t slot); /* returns how many pages nobody holds any more */
uint64_t holders_running(const struct sched *s);      /* pages of slots with a request */
uint64_t holders_shared(const struct sched *s);       /* pages with two slots or more */

/* scheduler_cache.c: slots of ended requests. */
STATUS_MUST_CHECK enum status_code cache_attach(struct sched *s, struct status *st);
void cache_detach(struct sched *s);
/* What the slot holds after all plans made so far is there for others. */
void cache_index(struct sched *s, struct req *r);
/* Keeps the slot of a running request that has ended; false: there is nothing to keep. */
bool cache_park(struct sched *s, struct req *r);
void cache_forget(struct sched *s, uint32_t slot); /* another slot cannot begin as it any more */
/* Gives back the parked slot that was used longest ago, but not `except`; false: there is none. */
bool cache_evict(struct sched *s, uint32_t except);
void cache_match(struct sched *s, struct req *r); /* n_match and match_slot of a waiting request */

/* scheduler_suspend.c */
void suspend_forget_all(struct sched *s);
/* Instead of req_drop_slot: the request keeps its slot, suspended; false: that is not possible, or not worth it. */
bool suspend_begin(struct sched *s, struct req *r);
void suspend_drop(struct sched *s, struct req *r); /* a suspended request's slot is released */
/* The youngest suspended request behind this one loses its slot; false: there is none. */
bool suspend_give_way(struct sched *s, const struct req *older);
uint32_t suspend_tokens(const struct req *r);     /* that it needs pages for when it comes back */
void suspend_end(struct sched *s, struct req *r); /* slot and pages are its own again */

/* scheduler_resize.c */
void resize_forget(struct sched *s);
void resize_take(struct sched *s);            /* before rows are planned: pages that leave */
bool resize_due(const struct sched *s);       /* the ranks are to be told something */
uint64_t resize_tell(struct sched *s);        /* kv_pages of the next plan, which is made */
uint64_t resize_limit(const struct sched *s); /* pages of a request at most */

/* Nothing is in flight: what the next plan releases, no earlier step can read. scheduler_plan.c */
void sched_settle_pending(struct sched *s);
/* Tokens that a running request may still add, as far as an admission looks ahead. scheduler_plan.c */
uint32_t req_growth(const struct req *r);

/* scheduler.c: takes slot and pages from a running request. The ranks learn it from the next plan. */
void req_drop_slot(struct sched *s, struct req *r);

#endif
