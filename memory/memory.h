/* memory.h - the KV pool: contiguous in virtual memory, paged in physical memory (vAttention, arXiv 2405.04437). Prefix kv_.
 *
 *   slot 0 |######......|  slot 1 |###.........|  ...        # mapped page-group   . reserved address only
 *
 * Every slot is a virtual range for max_tokens tokens, reserved once. Physical page-groups (2 MiB) are created once, the
 * whole budget, and mapped under a slot as it grows; slots that begin alike have the same pages under them. Inside a slot
 * the layout is token-major:
 *
 *   [token][layer][K|V][kv head][D]     token_bytes = L * 2 * HK_loc * D * elem_bytes
 *
 * or, by configuration, cut into lanes (groups of layers, K and V apart), each contiguous of its own. A kernel sees base
 * addresses and strides and no tables (struct kv_view).
 *
 *     struct kv_pool *pool;
 *     kv_pool_create(&pool, &(struct kv_pool_config){ .ops = &kv_ops_host, ... }, st);
 *     kv_slot_grow(pool, slot, 17, st);           // tokens 0..16 may be written now
 *     struct kv_view v = kv_slot_view(pool, slot, layer);
 *     kv_slot_share(pool, other, slot, 16, st);   // other begins with the same 16 tokens: whole pages are not copied
 *     kv_slot_release(pool, slot, step);          // after the plan `step` nobody reads the slot
 *     kv_pool_complete(pool, step);               // plan `step` has finished: its pages are free
 *
 * A page-group is FREE, or MAPPED in one slot or several, or FENCED: released, but a step in flight may still read it.
 * Content of memory that a slot gets anew is zero: stale NaNs never reach a result; or, with `no_clear`, anything. A shared page is full of tokens that
 * all its slots have in common, so nobody writes to it.
 *
 * Threads: one, the step loop, calls every function here. With `background` a second thread of the pool's own maps and
 * clears ahead of time. Kernels in flight only touch mapped memory.
 */
#ifndef TANDEM_MEMORY_H
#define TANDEM_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/kv_account.h"
#include "proto/status.h"

struct kv_pool;
struct kv_ops; /* a back end; defined in memory_internal.h */

extern const struct kv_ops kv_ops_host; /* memfd pages under mmap'd ranges */
extern const struct kv_ops kv_ops_cuda; /* the driver's virtual memory calls; in the library tandem_memory_cuda */

#define KV_PAGE_BYTES_DEFAULT (2u << 20)

struct kv_pool_config {
    const struct kv_ops *ops;
    uint32_t slots;       /* 1 to 65536 */
    uint32_t max_tokens;  /* of one slot, at least 1 */
    uint32_t layers;      /* L */
    uint32_t kv_heads;    /* HK_loc; 0 is legal: a rank without heads, a pool without pages */
    uint32_t head_dim;    /* D */
    uint32_t elem_bytes;  /* 2 or 4 */
    uint64_t page_bytes;  /* power of two, a multiple of the back end's granularity (host: the system's page size) */
    uint64_t total_pages; /* the physical budget */
    int device;           /* CUDA: which one */
    const char *driver;   /* CUDA: the driver's library, as dlopen takes it; NULL: libcuda.so.1 */

    /* layout */
    uint32_t group_layers; /* layers that lie side by side for each token, a divisor of layers; 0: all of them */
    bool apart;            /* K and V in lanes of their own */

    /* work ahead of time */
    bool background; /* a thread that maps and clears what will be needed; without it grow does everything */
    bool
        no_clear; /* nobody reads past a slot's length, not even to multiply by 0: memory is given as earlier owners left it */
    uint32_t ahead_tokens;   /* background: every slot has pages ready for so many tokens more */
    uint32_t arrival_tokens; /* background: an empty range has pages ready for a slot of so many tokens */

    /* Host memory for suspended slots, taken with the pool (CUDA: pinned), in units of 16 pages; 0: none can be suspended. */
    uint64_t suspend_bytes;
};

/* K and V of one layer of one slot. Element (token t, head h, d) of K stands at
 * k + t * token_stride + h * head_stride + d * elem_bytes (bytes); V alike. Valid for t < the length that was grown. */
struct kv_view {
    uint8_t *k;
    uint8_t *v;
    uint64_t token_stride; /* bytes */
    uint64_t head_stride;  /* bytes */
    uint32_t tokens;       /* the length that was grown */
};

struct kv_stats {
    uint64_t total_pages;  /* = mapped + fenced + free */
    uint64_t mapped_pages; /* held by slots, shared ones counted once */
    uint64_t fenced_pages;
    uint64_t free_pages;
    uint64_t shared_pages; /* of mapped_pages: held by two slots or more */
    uint64_t saved_pages;  /* what sharing saves: pages that slots hold, each slot counted alone, less mapped_pages */
    uint64_t parked_pages; /* of free_pages: still mapped somewhere, ready to be used there */
    uint64_t given_pages;  /* given back to the machine, not in total_pages */
    uint64_t wasted_bytes; /* mapped, but past the length of the slot */
    uint64_t suspended_bytes; /* of host memory */
    uint64_t map_calls;       /* calls into the kernel or driver that map, give access or unmap, since creation */
    uint64_t clear_calls;     /* that clear, copy, save or load */
    uint64_t map_ns;          /* in all these calls, both threads */
    uint64_t exposed_ns;      /* of the step loop: in these calls, or waiting for the background thread */
    uint64_t failed_ahead; /* calls that failed in the background; the step loop tries again when it needs the page */
};

/* Reserves all slots and creates all pages. Errors: INVALID_ARGUMENT (names the field), RESOURCE_EXHAUSTED (the machine
 * has not that much memory, for pages or for suspended slots, or too few mappings: the message has the arithmetic). */
STATUS_MUST_CHECK enum status_code kv_pool_create(struct kv_pool **out, const struct kv_pool_config *cfg,
                                                  struct status *st);
void kv_pool_destroy(struct kv_pool *pool); /* NULL is fine */

/* What the coordinator plans with. */
struct kv_account kv_pool_account(const struct kv_pool *pool);

/* Makes the slot hold `tokens` tokens (never shrinks). Maps kv_pages_for(tokens) pages in all; when that takes fenced
 * pages it is an error of the caller. RESOURCE_EXHAUSTED when no page is free: nothing has changed then. OUT_OF_RANGE
 * over max_tokens. */
STATUS_MUST_CHECK enum status_code kv_slot_grow(struct kv_pool *pool, uint32_t slot, uint32_t tokens,
                                                struct status *st);

/* The slot, which is empty, gets the first `tokens` tokens of another: pages that these fill are shared, the rest of them
 * (less than a page in each lane) is copied. Takes kv_pages_added(tokens, tokens) pages. The steps that wrote these tokens
 * have finished. Fork is sharing all of a slot: from then on each side writes to pages of its own. Errors as for grow,
 * and FAILED_PRECONDITION when the slot is not empty or the other has not so many tokens. */
STATUS_MUST_CHECK enum status_code kv_slot_share(struct kv_pool *pool, uint32_t slot, uint32_t from, uint32_t tokens,
                                                 struct status *st);

/* Moves the slot's content to host memory; its pages are free at once, so no step in flight may touch the slot. Until
 * kv_slot_resume, which needs as many pages as a grow from empty, it can only be released. The address stays the same;
 * what was shared is shared no more. A page of host memory for each page that the slot has. FAILED_PRECONDITION,
 * RESOURCE_EXHAUSTED (kv_pool_suspend_pages): nothing has changed. */
STATUS_MUST_CHECK enum status_code kv_slot_suspend(struct kv_pool *pool, uint32_t slot, struct status *st);
STATUS_MUST_CHECK enum status_code kv_slot_resume(struct kv_pool *pool, uint32_t slot, struct status *st);
uint32_t kv_slot_suspended(const struct kv_pool *pool, uint32_t slot); /* its tokens; 0: it is not suspended */
/* Pages of host memory that there are. A rank without KV heads says what it was configured with. */
uint64_t kv_pool_suspend_pages(const struct kv_pool *pool);
/* How fast slots go there or come back, the slower of both: moves one of up to 16 pages. All slots are empty, and no step is
 * in flight. 0: nothing can be suspended. */
STATUS_MUST_CHECK enum status_code kv_pool_suspend_rate(struct kv_pool *pool, uint64_t *bytes_per_s, struct status *st);

/* Empties the slot. Its pages are fenced until kv_pool_complete(step) or later; the slot itself may be grown again at
 * once. Releasing an empty slot is fine. */
void kv_slot_release(struct kv_pool *pool, uint32_t slot, uint64_t step);

/* All plans up to and including `step` have finished. Steps never go back within an epoch. */
void kv_pool_complete(struct kv_pool *pool, uint64_t step);

/* Gives free pages back to the machine, and takes some of them again; the account changes with it. The coordinator plans
 * with fewer pages before the first, with more after the second. Steps may be in flight: what they read is not free. On failure
 * total_pages says how far it came. */
STATUS_MUST_CHECK enum status_code kv_pool_shrink(struct kv_pool *pool, uint64_t pages, struct status *st);
STATUS_MUST_CHECK enum status_code kv_pool_extend(struct kv_pool *pool, uint64_t pages, struct status *st);

/* The one or the other, or nothing, so that there are `pages`, at most as many as at creation. A pool without KV heads only
 * says so in its account. */
STATUS_MUST_CHECK enum status_code kv_pool_resize(struct kv_pool *pool, uint64_t pages, struct status *st);

/* While it is on, the background thread is not told of new work, but for what the step loop waits for: what a step maps on its way does
 * not take turns with it in the driver, unless earlier work lasts until then. On while a step's slots are grown, off when the step is launched. */
void kv_pool_hold(struct kv_pool *pool, bool on);

/* Waits until the background thread has nothing to do. */
void kv_pool_settle(struct kv_pool *pool);

/* Whether all books agree with each other; INTERNAL with the first that does not. Slow; waits as kv_pool_settle does. */
STATUS_MUST_CHECK enum status_code kv_pool_check(struct kv_pool *pool, struct status *st);

/* Forgets all slots (a new epoch). No step may be in flight. */
void kv_pool_reset(struct kv_pool *pool);

uint32_t kv_slot_tokens(const struct kv_pool *pool, uint32_t slot);
struct kv_view kv_slot_view(const struct kv_pool *pool, uint32_t slot, uint32_t layer);
struct kv_stats kv_pool_stats(const struct kv_pool *pool);

/* What this process can still allocate on the host, in bytes, the limits of its control groups included. `why` gets the
 * name of the bound that decides ("MemAvailable", "memory.max of /x"). UINT64_MAX when nothing is known. */
uint64_t kv_host_available(char *why, size_t why_size);

#endif
