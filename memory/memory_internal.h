/* memory_internal.h - what a back end of the KV pool gives. Other folders never include this.
 *
 * The pool (memory.c) counts pages, slots and fences; a back end only owns memory and addresses. It knows two things by
 * number: physical pages 0 .. total_pages - 1, and ranges 0, 1, 2 ...: virtual addresses for one whole slot each. The
 * pool maps a physical page in at most one place at a time, and unmaps only what no step in flight can read.
 */
#ifndef TANDEM_MEMORY_INTERNAL_H
#define TANDEM_MEMORY_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "memory/memory.h"

/* --- back ends --- */

struct kv_backend; /* a back end's own state */

struct kv_geometry {
    uint32_t slots;       /* ranges that are reserved by open */
    uint64_t range_bytes; /* a multiple of page_bytes */
    uint64_t page_bytes;
    uint64_t total_pages; /* at least 1 */
    int device;           /* CUDA: ordinal */
    const char *driver;   /* CUDA: the driver's library; NULL: libcuda.so.1 */
};

/* Two threads call these at the same time, the step loop and the mapper, never for the same addresses: open, close and
 * range come from the step loop alone. `calls` is raised by the calls made into the kernel or driver. */
struct kv_ops {
    const char *name;
    bool new_pages_are_zero; /* else whatever the machine left in them */
    bool close_unmaps;       /* else the pool unmaps everything before close */

    /* Reserves the first `slots` ranges and creates all pages. Nothing is left behind on failure. INVALID_ARGUMENT when
     * page_bytes is no multiple of what the machine can map; UNAVAILABLE when there is no such device. */
    enum status_code (*open)(struct kv_backend **out, const struct kv_geometry *geo, struct status *st);
    void (*close)(struct kv_backend *be); /* NULL is fine */

    /* Called once by each thread but the one of open, before its other calls. Optional. */
    enum status_code (*enter)(struct kv_backend *be, struct status *st);

    /* How many pages can be mapped at the same time, those that are mapped twice counted twice. */
    uint64_t (*mappings)(const struct kv_backend *be);

    /* The address of a range, a multiple of page_bytes. Reserves addresses when index is not one of the first `slots`;
     * called once per index, in ascending order. */
    enum status_code (*range)(struct kv_backend *be, uint32_t index, uint8_t **base, struct status *st);

    /* Maps n physical pages side by side from `at` on. The addresses are reserved and hold no page; a page may be mapped
     * elsewhere too. On failure none of them is mapped here. */
    enum status_code (*map)(struct kv_backend *be, uint8_t *at, const uint32_t *pages, uint32_t n, uint64_t *calls,
                            struct status *st);

    /* Takes the n pages at `at` out again; the addresses stay reserved. On failure all stay mapped. */
    enum status_code (*unmap)(struct kv_backend *be, uint8_t *at, uint32_t n, uint64_t *calls, struct status *st);

    /* Write mapped memory; `host` is memory of host_alloc. They may return before it has happened: sync waits for all
     * that this thread has started. */
    enum status_code (*clear)(struct kv_backend *be, uint8_t *at, uint64_t bytes, struct status *st);
    enum status_code (*copy)(struct kv_backend *be, uint8_t *to, const uint8_t *from, uint64_t bytes,
                             struct status *st);
    enum status_code (*save)(struct kv_backend *be, void *host, const uint8_t *from, uint64_t bytes, struct status *st);
    enum status_code (*load)(struct kv_backend *be, uint8_t *to, const void *host, uint64_t bytes, struct status *st);
    enum status_code (*sync)(struct kv_backend *be, struct status *st);

    /* Host memory that save and load are fast with. */
    enum status_code (*host_alloc)(struct kv_backend *be, void **out, uint64_t bytes, struct status *st);
    void (*host_free)(struct kv_backend *be, void *p, uint64_t bytes);

    /* Gives a page, mapped nowhere, back to the machine, and takes it again, as a new page. A failed drop
     * has kept the page. */
    enum status_code (*drop)(struct kv_backend *be, uint32_t page, struct status *st);
    enum status_code (*restore)(struct kv_backend *be, uint32_t page, struct status *st);
};

/* --- the pool --- */

#define NO_PAGE UINT32_MAX

/* RANGE_IDLE has no slot; all others have one, or (FENCED) had one that a step in flight may still read. A SUSPENDED range
 * keeps its address for a slot whose content is in host memory: it holds no page. */
enum range_state { RANGE_IDLE, RANGE_ACTIVE, RANGE_FENCED, RANGE_SUSPENDED };

struct kv_page {
    uint32_t active; /* slots that hold it: 2 and more share it */
    uint32_t fenced; /* fenced ranges that hold it */
    uint32_t maps;   /* positions where it is mapped, those of idle ranges too */
    uint32_t dirty;  /* bytes from its start that may be other than zero; counts while nobody holds it */
    bool busy;       /* in a job of the mapper, or claimed by the call under way: nobody else may take it */
    bool gone;       /* given back to the machine */
};

/* A position is a place for a page in a range: number i is page i / lanes of lane i % lanes. */
struct kv_range {
    struct kv_range *prev, *next; /* in the list of its state: pool->idle or pool->fenced; others are in none */
    uint8_t *base;
    uint64_t fence; /* FENCED: the step that may read it last */
    enum range_state state;
    bool job; /* the mapper works on it: on positions from job_from on */
    uint32_t job_from;
    uint32_t used;    /* positions below are held; 0 when IDLE or SUSPENDED */
    uint32_t mapped;  /* no position from here on is mapped */
    uint32_t pages[]; /* pages_per_slot entries: what is mapped at each position, or NO_PAGE */
};

struct range_list {
    struct kv_range *first, *last;
};

struct kv_slot {
    struct kv_range *range; /* NULL: holds no page */
    uint32_t tokens;
    uint32_t saved_tokens; /* suspended, with so many tokens; 0: it is not */
    uint32_t first_block;  /* suspended: of host memory, one for each position */
};

/* What calls into the back end have cost. */
struct kv_cost {
    uint64_t calls, clears, ns;
};

enum job_kind { JOB_MAP, JOB_CLEAR, JOB_UNMAP, JOB_STOP }; /* MAP clears as well */

struct kv_job {
    enum job_kind kind;
    struct kv_range *range;
    uint32_t from, to; /* positions */
    enum status_code rc;
    struct kv_cost cost;
};

#define LONGEST_ONE 16384 /* each release takes that part of `longest`, or lifts it */

#define JOBS 256 /* a full ring: the step loop does the work itself, or leaves it for the next step */

struct kv_mapper; /* the thread and its ring, memory_mapper.c */

struct kv_pool {
    const struct kv_ops *ops;
    struct kv_backend *be; /* NULL without KV heads */
    struct kv_account account;
    uint64_t lane_bytes;       /* of one token in one lane */
    uint64_t lane_range_bytes; /* from one lane of a range to the next */
    uint64_t head_bytes;       /* of one layer of one token: one head of K */
    uint64_t half_bytes;       /* K alone, or V alone */
    uint32_t lanes;
    uint32_t group_layers;
    bool apart;
    uint32_t slots;
    uint32_t max_tokens;
    uint32_t layers;
    uint32_t pages_per_slot;
    bool no_clear;
    uint32_t ahead_tokens;
    uint32_t arrival_tokens;
    uint64_t mappings; /* limit of the back end */
    struct kv_mapper *mapper;
    uint64_t longest;      /* positions of the longest slots released of late, times LONGEST_ONE */
    uint32_t spread_range; /* whose turn it is to be mapped so far */

    struct kv_slot *slot;
    struct kv_range **ranges; /* all that exist, to free them */
    uint32_t n_ranges;
    uint32_t cap_ranges;
    struct range_list idle; /* first: released last */
    struct range_list fenced;

    struct kv_page *page;
    uint32_t *target;   /* [pages_per_slot]: what a take wants at each position */
    uint64_t *cold;     /* bitmap of the pages that are free, here, and mapped nowhere */
    uint64_t cold_hint; /* no bit is set in words before this one */
    uint64_t n_cold;

    uint64_t max_pages;   /* total_pages at creation */
    uint64_t total_pages; /* less those given back */
    uint64_t used_pages;  /* held by slots, shared ones once */
    uint64_t fenced_pages;
    uint64_t shared_pages;
    uint64_t held;       /* positions of slots */
    uint64_t used_bytes; /* tokens * token_bytes over all slots */
    uint64_t positions;  /* mapped, over all ranges */
    struct kv_cost cost;
    uint64_t exposed_ns;
    uint64_t failed_jobs;
    bool any_completed; /* since create or reset */
    uint64_t completed; /* this step and all before it have finished */

    /* host memory for suspended slots, memory_suspend.c */
    uint64_t suspend_bytes;
    uint64_t suspend_pages, suspended_pages; /* blocks: there are; taken */
    void **extents;                          /* EXTENT_PAGES blocks each */
    uint64_t n_extents;
    uint32_t *next_block, free_block;
};

uint64_t kv_now_ns(void);
uint64_t kv_free_pages(const struct kv_pool *p);
void kv_page_soil(struct kv_pool *p, uint32_t page, uint64_t bytes); /* its first bytes may have been written */
uint8_t *kv_position_at(const struct kv_pool *p, const struct kv_range *r, uint32_t i);
/* Bytes at position i that belong to the first `tokens` tokens. */
uint64_t kv_position_bytes(const struct kv_pool *p, uint32_t i, uint32_t tokens);

/* --- memory_range.c --- */

/* An idle range to start a slot in, the one that takes the least work; or a new one. Stays IDLE until kv_range_take. */
enum status_code kv_range_pick(struct kv_pool *p, const uint32_t *prefix, uint32_t n_prefix, uint32_t want,
                               struct kv_range **out, struct status *st);

/* The range's slot takes positions used .. want - 1: the first of them up to n_prefix get the pages of `prefix`, which
 * others hold, the rest free pages, cleared. So many must be free. On failure free pages may have moved, no more. */
enum status_code kv_range_take(struct kv_pool *p, struct kv_range *r, const uint32_t *prefix, uint32_t n_prefix,
                               uint32_t want, struct status *st);

/* The range leaves its slot: each position is held no more, or until the step has finished. */
void kv_range_leave(struct kv_pool *p, struct kv_range *r, enum range_state to, uint64_t step);
void kv_range_unfence(struct kv_pool *p, struct kv_range *r);
void kv_range_to_idle(struct kv_pool *p, struct kv_range *r); /* SUSPENDED -> IDLE */

/* Up to n free pages, claimed (busy), in the order of memory/README.md; gently: none from behind slots. */
uint32_t kv_pages_claim(struct kv_pool *p, const struct kv_range *keep, uint32_t keep_from, bool gently, uint32_t n,
                        uint32_t *out);
void kv_page_unclaim(struct kv_pool *p, uint32_t page);
bool kv_page_free(const struct kv_page *page);      /* held by nobody, claimed by nobody, here */
void kv_cold_put(struct kv_pool *p, uint32_t page); /* if it is free and mapped nowhere */

/* Unmaps positions from .. to - 1, all of which are mapped. */
enum status_code kv_positions_unmap(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to,
                                    struct status *st);
void kv_positions_forget(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to); /* they were unmapped */
/* The calls alone, no accounts: for the mapper too. On failure nothing is mapped, or all stays. */
enum status_code kv_span_map(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to, struct kv_cost *cost,
                             struct status *st);
enum status_code kv_span_unmap(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to, struct kv_cost *cost,
                               struct status *st);
/* Only starts: sync has to follow. */
enum status_code kv_span_clear(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to, struct kv_cost *cost,
                               struct status *st);

/* --- memory_mapper.c --- */

enum status_code kv_mapper_start(struct kv_pool *p, struct status *st);
void kv_mapper_stop(struct kv_pool *p);          /* waits for its jobs */
void kv_mapper_reap(struct kv_pool *p);          /* takes what is done into the accounts */
void kv_mapper_hold(struct kv_pool *p, bool on); /* jobs posted while it is on wait until it is off, or waited for */
void kv_mapper_drain(struct kv_pool *p);         /* waits for all jobs, and reaps */
void kv_mapper_wait(struct kv_pool *p, struct kv_range *r); /* until the range has no job */
/* Gives the mapper the next piece of work, if any, that makes positions below `to` ready to be taken. */
void kv_mapper_prepare(struct kv_pool *p, struct kv_range *r, uint32_t to);
/* Once per step: a range for the next arrival, and unmaps what is stale. */
void kv_mapper_tend(struct kv_pool *p);

/* --- memory_suspend.c --- */

enum status_code kv_blocks_create(struct kv_pool *p, struct status *st);
void kv_blocks_destroy(struct kv_pool *p);                /* a half-built one is fine */
void kv_saved_free(struct kv_pool *p, struct kv_slot *s); /* of a slot that is not suspended: nothing */

#endif
