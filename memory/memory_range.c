/* memory_range.c - ranges: where pages are mapped, and which pages are free.
 *
 * Slots are numbers, ranges are addresses. A slot that holds tokens owns one range, picked when it first grows and left
 * when it is released, because a step in flight may still read the old addresses while the slot is already grown again:
 *
 *             grow an empty slot            release(step)                 complete(step)
 *   IDLE range ----------------> ACTIVE range -------------> FENCED range --------------> IDLE range
 *
 *   range |########++++..........|   # used by the slot   + mapped, but free ("warm")   . no page
 *                  ^used ^mapped
 *
 * Pages stay mapped when they become free. So a grow takes, in this order:
 *   1. warm pages of its own range:  no call into the kernel; the usual case in the long run
 *   2. cold pages (mapped nowhere):  one map call per run of consecutive page numbers
 *   3. warm pages of other ranges, from their ends, the range first that lay idle longest: one unmap, then as 2
 * First all mapping is done, then all counting. Mapping only moves free pages about, so a grow that fails half-way has
 * changed nothing that anyone can see.
 */
#include <assert.h>
#include <stdlib.h>
#include <time.h>

#include "memory/memory_internal.h"

/* --- lists --- */

static void list_push_first(struct range_list *l, struct kv_range *r)
{
    r->prev = NULL;
    r->next = l->first;
    *(l->first ? &l->first->prev : &l->last) = r;
    l->first = r;
}

static void list_remove(struct range_list *l, struct kv_range *r)
{
    *(r->prev ? &r->prev->next : &l->first) = r->next;
    *(r->next ? &r->next->prev : &l->last) = r->prev;
    r->prev = r->next = NULL;
}

static bool in_warm(const struct kv_pool *p, const struct kv_range *r)
{
    return r->warm_prev || p->warm.first == r;
}

static void warm_remove(struct kv_pool *p, struct kv_range *r)
{
    if (!in_warm(p, r))
        return;
    *(r->warm_prev ? &r->warm_prev->warm_next : &p->warm.first) = r->warm_next;
    *(r->warm_next ? &r->warm_next->warm_prev : &p->warm.last) = r->warm_prev;
    r->warm_prev = r->warm_next = NULL;
}

/* Puts the range at the end (it was needed just now), or takes it out if it has no free page. */
static void warm_update(struct kv_pool *p, struct kv_range *r)
{
    warm_remove(p, r);
    if (r->used == r->mapped)
        return;
    r->warm_prev = p->warm.last;
    r->warm_next = NULL;
    *(p->warm.last ? &p->warm.last->warm_next : &p->warm.first) = r;
    p->warm.last = r;
}

/* --- pages that are mapped nowhere --- */

void kv_cold_put(struct kv_pool *p, uint32_t page)
{
    p->cold[page / 64] |= 1ull << (page % 64);
    p->n_cold++;
    if (page / 64 < p->cold_hint)
        p->cold_hint = page / 64;
}

/* The lowest cold page; the caller knows that there is one. Low numbers first, so that runs form again. */
static uint32_t cold_take(struct kv_pool *p)
{
    assert(p->n_cold > 0);
    while (!p->cold[p->cold_hint])
        p->cold_hint++;
    unsigned bit = (unsigned)__builtin_ctzll(p->cold[p->cold_hint]);
    p->cold[p->cold_hint] &= p->cold[p->cold_hint] - 1;
    p->n_cold--;
    return (uint32_t)(p->cold_hint * 64 + bit);
}

/* --- calls into the back end --- */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Unmaps free pages from the ends of other ranges until `pages` are cold. */
static enum status_code reclaim(struct kv_pool *p, const struct kv_range *keep, uint64_t pages, struct status *st)
{
    struct kv_range *r = p->warm.first;
    while (p->n_cold < pages) {
        while (r == keep)
            r = r->warm_next;
        assert(r); /* the caller has counted the free pages */
        struct kv_range *next = r->warm_next;
        uint64_t n = pages - p->n_cold;
        if (n > r->mapped - r->used)
            n = r->mapped - r->used;
        uint64_t t = now_ns();
        enum status_code rc =
            p->ops->unmap(p->be, r->base + (r->mapped - n) * p->account.page_bytes, (uint32_t)n, &p->map_calls, st);
        p->map_ns += now_ns() - t;
        if (rc != ST_OK)
            return rc;
        for (; n > 0; n--)
            kv_cold_put(p, r->pages[--r->mapped]);
        if (r->used == r->mapped)
            warm_remove(p, r);
        r = next;
    }
    return ST_OK;
}

/* Maps cold pages behind those of the range until it has `want`. */
static enum status_code map_up_to(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st)
{
    uint32_t n = want - r->mapped, *pages = &r->pages[r->mapped];
    for (uint32_t i = 0; i < n; i++)
        pages[i] = cold_take(p);
    uint64_t t = now_ns();
    enum status_code rc = p->ops->map(p->be, r->base + r->mapped * p->account.page_bytes, pages, n, &p->map_calls, st);
    p->map_ns += now_ns() - t;
    if (rc == ST_OK)
        r->mapped = want;
    while (rc != ST_OK && n > 0)
        kv_cold_put(p, pages[--n]);
    return rc;
}

/* An idle range, the one used last (its pages are warm), or a new one: then as IDLE, in the list. */
enum status_code kv_range_pick(struct kv_pool *p, struct kv_range **out, struct status *st)
{
    if (p->idle.first) {
        *out = p->idle.first;
        return ST_OK;
    }
    if (p->n_ranges == p->cap_ranges) {
        uint32_t cap = 2 * p->cap_ranges;
        struct kv_range **more = realloc(p->ranges, cap * sizeof *more);
        if (!more)
            return status_nomem(st, "KV ranges", cap * sizeof *more);
        p->ranges = more;
        p->cap_ranges = cap;
    }
    size_t bytes = sizeof(struct kv_range) + p->pages_per_slot * sizeof(uint32_t);
    struct kv_range *r = calloc(1, bytes);
    if (!r)
        return status_nomem(st, "a KV range", bytes);
    enum status_code rc = p->ops->range(p->be, p->n_ranges, &r->base, st);
    if (rc != ST_OK) {
        free(r);
        return rc;
    }
    p->ranges[p->n_ranges++] = r;
    list_push_first(&p->idle, r);
    *out = r;
    return ST_OK;
}

enum status_code kv_range_fill(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st)
{
    if (want <= r->mapped)
        return ST_OK;
    enum status_code rc = reclaim(p, r, want - r->mapped, st);
    if (rc == ST_OK)
        rc = map_up_to(p, r, want, st);
    if (rc != ST_OK)
        warm_update(p, r); /* it may have got a part of the pages */
    return rc;
}

/* Clears what earlier owners left in pages used .. want - 1 and gives them to the slot. */
enum status_code kv_range_adopt(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st)
{
    enum status_code rc = ST_OK;
    bool any = false;
    for (uint32_t i = r->used; i < want && rc == ST_OK; i++) {
        uint32_t bytes = p->dirty[r->pages[i]];
        if (bytes)
            rc = p->ops->clear(p->be, r->base + i * p->account.page_bytes, bytes, st);
        any = any || bytes;
    }
    if (any && rc == ST_OK)
        rc = p->ops->sync(p->be, st);
    if (rc != ST_OK) {
        warm_update(p, r);
        return rc;
    }
    for (uint32_t i = r->used; i < want; i++)
        p->dirty[r->pages[i]] = 0;
    if (r->state == RANGE_IDLE) {
        list_remove(&p->idle, r);
        r->state = RANGE_ACTIVE;
    }
    r->used = want;
    warm_update(p, r);
    return ST_OK;
}

/* The range's pages become free where they are. */
void kv_range_idle(struct kv_pool *p, struct kv_range *r)
{
    r->state = RANGE_IDLE;
    r->used = 0;
    list_push_first(&p->idle, r);
    warm_update(p, r);
}

void kv_range_fence(struct kv_pool *p, struct kv_range *r, uint64_t step)
{
    r->state = RANGE_FENCED;
    r->fence = step;
    list_push_first(&p->fenced, r);
}

void kv_range_unfence(struct kv_pool *p, struct kv_range *r)
{
    list_remove(&p->fenced, r);
    kv_range_idle(p, r);
}
