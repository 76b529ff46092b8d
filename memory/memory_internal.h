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

struct kv_backend; /* a back end's own state */

struct kv_geometry {
    uint32_t slots;       /* ranges that are reserved by open */
    uint64_t range_bytes; /* a multiple of page_bytes */
    uint64_t page_bytes;
    uint64_t total_pages; /* at least 1 */
};

struct kv_ops {
    const char *name;

    /* page_bytes must be a multiple of this (a power of two). */
    uint64_t (*granularity)(void);

    /* Reserves the first `slots` ranges and creates all pages. Nothing is left behind on failure. */
    enum status_code (*open)(struct kv_backend **out, const struct kv_geometry *geo, struct status *st);
    void (*close)(struct kv_backend *be); /* NULL is fine */

    /* The address of a range, a multiple of page_bytes. Reserves addresses when index is not one of the first `slots`;
     * called once per index, in ascending order. */
    enum status_code (*range)(struct kv_backend *be, uint32_t index, uint8_t **base, struct status *st);

    /* Maps physical pages first_page .. + pages - 1 at `at` with one call into the kernel or driver. The address is
     * reserved and holds no page. On failure none of them is mapped. Content of a page that was never mapped is zero. */
    enum status_code (*map)(struct kv_backend *be, uint8_t *at, uint64_t first_page, uint64_t pages, struct status *st);

    /* Takes the pages at `at` out again, with one call; the addresses stay reserved. On failure all stay mapped. */
    enum status_code (*unmap)(struct kv_backend *be, uint8_t *at, uint64_t pages, struct status *st);

    /* Writes zeros over mapped memory. Ends before the next step can read it. */
    void (*clear)(struct kv_backend *be, uint8_t *at, uint64_t bytes);
};

/* What this process can still allocate, in bytes, the limits of its control groups included. `why` gets the name of the
 * bound that decides ("MemAvailable", "memory.max of /x"). UINT64_MAX when nothing is known. */
uint64_t kv_host_available(char *why, size_t why_size);

#endif
