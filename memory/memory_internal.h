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

/* --- the pool: memory.c, memory_range.c --- */

enum range_state { RANGE_IDLE, RANGE_ACTIVE, RANGE_FENCED };

struct kv_range {
    struct kv_range *prev, *next; /* in the list of its state: pool->idle or pool->fenced; ACTIVE is in none */
    struct kv_range *warm_prev, *warm_next; /* in pool->warm while it has free pages (used < mapped) */
    uint8_t *base;
    uint64_t fence; /* FENCED: the step that may read it last */
    enum range_state state;
    uint32_t used;    /* 0 when IDLE */
    uint32_t mapped;  /* pages[0 .. mapped - 1] are mapped, in this order */
    uint32_t pages[]; /* pages_per_slot entries: numbers of physical pages */
};

struct range_list {
    struct kv_range *first, *last;
};

struct kv_slot {
    struct kv_range *range; /* NULL: holds no page */
    uint32_t tokens;
};

struct kv_pool {
    const struct kv_ops *ops;
    struct kv_backend *be; /* NULL without KV heads */
    struct kv_account account;
    uint64_t head_bytes; /* of one layer of one token: one head of K */
    uint64_t half_bytes; /* K alone, or V alone */
    uint32_t slots;
    uint32_t max_tokens;
    uint32_t layers;
    uint32_t pages_per_slot;

    struct kv_slot *slot;
    struct kv_range **ranges; /* all that exist, to free them */
    uint32_t n_ranges;
    uint32_t cap_ranges;
    struct range_list idle; /* first: released last */
    struct range_list fenced;
    struct range_list warm; /* first: taken from first */

    uint32_t *dirty;    /* per page: bytes from its start that may be other than zero; counts while it is free */
    uint64_t *cold;     /* bitmap of the pages that are mapped nowhere */
    uint64_t cold_hint; /* no bit is set in words before this one */
    uint64_t n_cold;

    uint64_t total_pages;
    uint64_t used_pages; /* of ACTIVE ranges */
    uint64_t fenced_pages;
    uint64_t used_bytes; /* tokens * token_bytes over all slots */
    uint64_t map_calls;
    uint64_t map_ns;
    bool any_completed; /* since create or reset */
    uint64_t completed; /* this step and all before it have finished */
};

/* A range to start a slot in: an idle one, the one used last (its pages are warm), or a new one. It stays IDLE until
 * kv_range_adopt. */
enum status_code kv_range_pick(struct kv_pool *p, struct kv_range **out, struct status *st);

/* Maps free pages behind those of the range until it has `want`; as many pages must be free. On failure free pages may
 * have moved, and no more than that. */
enum status_code kv_range_fill(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st);

/* The slot takes pages used .. want - 1, which are mapped, with all content cleared. The range becomes ACTIVE. */
enum status_code kv_range_adopt(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st);

void kv_range_idle(struct kv_pool *p, struct kv_range *r);                 /* ACTIVE -> IDLE: its pages are free */
void kv_range_fence(struct kv_pool *p, struct kv_range *r, uint64_t step); /* ACTIVE -> FENCED */
void kv_range_unfence(struct kv_pool *p, struct kv_range *r);              /* FENCED -> IDLE */

void kv_cold_put(struct kv_pool *p, uint32_t page); /* the page is mapped nowhere */

#endif
