/* memory.h - the KV pool: contiguous in virtual memory, paged in physical memory (vAttention, arXiv 2405.04437). Prefix kv_.
 *
 *   slot 0 |######......|  slot 1 |###.........|  ...        # mapped page-group   . reserved address only
 *
 * Every slot is a virtual range for max_tokens tokens, reserved once. Physical page-groups (2 MiB) are created once, the
 * whole budget, and mapped under a slot as it grows. Inside a slot the layout is token-major:
 *
 *   [token][layer][K|V][kv head][D]     token_bytes = L * 2 * HK_loc * D * elem_bytes
 *
 * so a kernel sees a base address and strides and no tables (struct kv_view).
 *
 *     struct kv_pool *pool;
 *     kv_pool_create(&pool, &(struct kv_pool_config){ .ops = &kv_ops_host, ... }, st);
 *     kv_slot_grow(pool, slot, 17, st);           // tokens 0..16 may be written now
 *     struct kv_view v = kv_slot_view(pool, slot, layer);
 *     kv_slot_release(pool, slot, step);          // after the plan `step` nobody reads the slot
 *     kv_pool_complete(pool, step);               // plan `step` has finished: its pages are free
 *
 * A page-group is FREE, or MAPPED in one slot, or FENCED: released, but a step in flight may still read it. (Sharing
 * and parking come with prefix reuse.) Content of a page that is mapped anew is zero, or at least finite: a released
 * page is cleared before it is used again, so that stale NaNs never reach a result.
 *
 * Threads: one, the step loop, calls every function here. Kernels in flight only touch mapped memory.
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
};

/* K and V of one layer of one slot. Element (token t, head h, d) of K stands at
 * k + t * token_stride + h * head_stride + d * elem_bytes (bytes); V alike. Valid for t < the length that was grown. */
struct kv_view {
    uint8_t *k;
    uint8_t *v;
    uint64_t token_stride; /* bytes */
    uint64_t head_stride;  /* bytes */
};

struct kv_stats {
    uint64_t total_pages;
    uint64_t mapped_pages;
    uint64_t fenced_pages;
    uint64_t free_pages;
    uint64_t wasted_bytes; /* mapped, but past the length of the slot */
    uint64_t map_calls;    /* calls into the kernel or driver since creation */
    uint64_t map_ns;
};

/* Reserves all slots and creates all pages. Errors: INVALID_ARGUMENT (names the field), RESOURCE_EXHAUSTED (the machine
 * has not that much memory or too few mappings: the message has the arithmetic). */
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

/* Empties the slot. Its pages are fenced until kv_pool_complete(step) or later; the slot itself may be grown again at
 * once. Releasing an empty slot is fine. */
void kv_slot_release(struct kv_pool *pool, uint32_t slot, uint64_t step);

/* All plans up to and including `step` have finished. Steps never go back within an epoch. */
void kv_pool_complete(struct kv_pool *pool, uint64_t step);

/* Forgets all slots (a new epoch). No step may be in flight. */
void kv_pool_reset(struct kv_pool *pool);

uint32_t kv_slot_tokens(const struct kv_pool *pool, uint32_t slot);
struct kv_view kv_slot_view(const struct kv_pool *pool, uint32_t slot, uint32_t layer);
struct kv_stats kv_pool_stats(const struct kv_pool *pool);

/* What this process can still allocate on the host, in bytes, the limits of its control groups included. `why` gets the
 * name of the bound that decides ("MemAvailable", "memory.max of /x"). UINT64_MAX when nothing is known. */
uint64_t kv_host_available(char *why, size_t why_size);

#endif
