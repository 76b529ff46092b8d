/* memory_suspend.c - slots in host memory, and pages given back to the machine.
 *
 * Host memory for suspended slots comes in extents of EXTENT_PAGES blocks, a block for each position of a slot. Extents
 * are allocated when they are needed first and kept: pinned memory is slow to get.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "memory/memory_internal.h"

#define EXTENT_PAGES 16

/* --- host memory --- */

static enum status_code add_extent(struct kv_pool *p, struct status *st)
{
    const uint64_t bytes = EXTENT_PAGES * p->account.page_bytes;
    void **extents = realloc(p->extents, (p->n_extents + 1) * sizeof *extents);
    if (!extents)
        return status_nomem(st, "blocks for suspended slots", (p->n_extents + 1) * sizeof *extents);
    p->extents = extents;
    void **blocks = realloc(p->blocks, (size_t)(p->n_extents + 1) * EXTENT_PAGES * sizeof *blocks);
    if (!blocks)
        return status_nomem(st, "blocks for suspended slots", (p->n_extents + 1) * EXTENT_PAGES * sizeof *blocks);
    p->blocks = blocks;
    enum status_code rc = p->ops->host_alloc(p->be, &p->extents[p->n_extents], bytes, st);
    if (rc != ST_OK)
        return rc;
    for (uint32_t i = 0; i < EXTENT_PAGES; i++)
        p->blocks[p->n_blocks++] = (uint8_t *)p->extents[p->n_extents] + i * p->account.page_bytes;
    p->n_extents++;
    return ST_OK;
}

static enum status_code get_blocks(struct kv_pool *p, uint32_t n, struct status *st)
{
    const uint64_t extent = EXTENT_PAGES * p->account.page_bytes;
    while (p->n_blocks < n) {
        if ((p->n_extents + 1) * extent > p->suspend_bytes)
            return status_set(st, ST_RESOURCE_EXHAUSTED,
                              "%u pages of host memory to suspend into, %u are free; suspend_bytes is %" PRIu64 " MiB",
                              n, p->n_blocks, p->suspend_bytes >> 20);
        enum status_code rc = add_extent(p, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

void kv_saved_free(struct kv_pool *p, struct kv_slot *s)
{
    uint32_t n = s->saved ? (uint32_t)kv_pages_for(&p->account, s->saved_tokens) : 0;
    for (uint32_t i = 0; i < n; i++)
        p->blocks[p->n_blocks++] = s->saved[i];
    free(s->saved);
    s->saved = NULL;
    s->saved_tokens = 0;
}

void kv_extents_free(struct kv_pool *p)
{
    for (uint32_t i = 0; i < p->n_extents; i++)
        p->ops->host_free(p->be, p->extents[i], EXTENT_PAGES * p->account.page_bytes);
    free(p->extents);
    free(p->blocks);
}

/* --- suspend, resume --- */

static enum status_code save_all(struct kv_pool *p, const struct kv_slot *s, void **saved, struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; i < s->range->used && rc == ST_OK; i++) {
        uint64_t n = kv_position_bytes(p, i, s->tokens);
        p->cost.clears++;
        rc = p->ops->save(p->be, saved[i], kv_position_at(p, s->range, i), n, st);
    }
    enum status_code end = p->ops->sync(p->be, rc == ST_OK ? st : NULL);
    return rc == ST_OK ? end : rc;
}

enum status_code kv_slot_suspend(struct kv_pool *p, uint32_t slot, struct status *st)
{
    if (slot >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u, the pool has %u", slot, p->slots);
    struct kv_slot *s = &p->slot[slot];
    if (!s->range || s->saved)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: %s, nothing to suspend", slot,
                          s->saved ? "suspended already" : "empty");
    uint64_t begin = kv_now_ns();
    uint32_t n = s->range->used;
    void **saved = NULL;
    enum status_code rc = get_blocks(p, n, st);
    if (rc == ST_OK && !(saved = calloc(n, sizeof *saved)))
        rc = status_nomem(st, "a suspended slot", n * sizeof *saved);
    for (uint32_t i = 0; saved && i < n; i++)
        saved[i] = p->blocks[p->n_blocks - n + i];
    if (rc == ST_OK && saved)
        rc = save_all(p, s, saved, st);
    if (rc != ST_OK) {
        free(saved);
        status_prefix(st, "slot %u", slot);
        return rc;
    }
    p->n_blocks -= n;
    for (uint32_t i = 0; i < n; i++)
        kv_page_soil(p, s->range->pages[i], kv_position_bytes(p, i, s->tokens));
    kv_range_leave(p, s->range, RANGE_SUSPENDED, 0);
    p->used_bytes -= s->tokens * p->account.token_bytes;
    s->saved = saved;
    s->saved_tokens = s->tokens;
    s->tokens = 0;
    p->exposed_ns += kv_now_ns() - begin;
    return ST_OK;
}

static enum status_code load_all(struct kv_pool *p, const struct kv_slot *s, struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t i = 0; i < s->range->used && rc == ST_OK; i++) {
        uint64_t n = kv_position_bytes(p, i, s->saved_tokens);
        p->cost.clears++;
        rc = p->ops->load(p->be, kv_position_at(p, s->range, i), s->saved[i], n, st);
    }
    enum status_code end = p->ops->sync(p->be, rc == ST_OK ? st : NULL);
    return rc == ST_OK ? end : rc;
}

enum status_code kv_slot_resume(struct kv_pool *p, uint32_t slot, struct status *st)
{
    if (slot >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u, the pool has %u", slot, p->slots);
    struct kv_slot *s = &p->slot[slot];
    if (!s->saved)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: not suspended", slot);
    uint32_t want = (uint32_t)kv_pages_for(&p->account, s->saved_tokens);
    if (want > kv_free_pages(p))
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "slot %u: its %u tokens take %u pages, free are %" PRIu64 " of %" PRIu64, slot,
                          s->saved_tokens, want, kv_free_pages(p), p->total_pages);
    uint64_t begin = kv_now_ns();
    enum status_code rc = kv_range_take(p, s->range, NULL, 0, want, st);
    if (rc == ST_OK && (rc = load_all(p, s, st)) != ST_OK) {
        for (uint32_t i = 0; i < want; i++)
            kv_page_soil(p, s->range->pages[i], p->account.page_bytes);
        kv_range_leave(p, s->range, RANGE_SUSPENDED, 0);
    }
    p->exposed_ns += kv_now_ns() - begin;
    if (rc != ST_OK) {
        status_prefix(st, "slot %u", slot);
        return rc;
    }
    s->tokens = s->saved_tokens;
    p->used_bytes += s->tokens * p->account.token_bytes;
    kv_saved_free(p, s);
    return ST_OK;
}

uint32_t kv_slot_suspended(const struct kv_pool *p, uint32_t slot)
{
    return slot < p->slots ? p->slot[slot].saved_tokens : 0;
}

/* --- giving pages back --- */

/* Takes out all mappings of claimed pages; they are free, so nobody reads them. */
static enum status_code unmap_claimed(struct kv_pool *p, struct status *st)
{
    for (uint32_t n = 0; n < p->n_ranges; n++) {
        struct kv_range *r = p->ranges[n];
        for (uint32_t from = r->used, to; from < r->mapped; from = to + 1) {
            to = from;
            while (to < r->mapped && r->pages[to] != NO_PAGE && p->page[r->pages[to]].busy)
                to++;
            enum status_code rc = to > from ? kv_positions_unmap(p, r, from, to, st) : ST_OK;
            if (rc != ST_OK)
                return rc;
        }
    }
    return ST_OK;
}

static void set_total(struct kv_pool *p, uint64_t total)
{
    p->total_pages = total;
    p->account.total_pages = total;
}

enum status_code kv_pool_shrink(struct kv_pool *p, uint64_t pages, struct status *st)
{
    if (pages > kv_free_pages(p))
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "pages: %" PRIu64 " to give back, free are %" PRIu64 " of %" PRIu64, pages, kv_free_pages(p),
                          p->total_pages);
    if (pages == 0)
        return ST_OK;
    kv_mapper_drain(p);
    uint32_t *list = calloc(pages, sizeof *list);
    if (!list)
        return status_nomem(st, "KV pages to give back", pages * sizeof *list);
    uint32_t got = kv_pages_claim(p, NULL, 0, false, (uint32_t)pages, list);
    enum status_code rc = unmap_claimed(p, st);
    for (uint32_t i = 0; i < got; i++) {
        if (rc == ST_OK && (rc = p->ops->drop(p->be, list[i], st)) == ST_OK) {
            p->page[list[i]].gone = true;
            set_total(p, p->total_pages - 1);
        }
        kv_page_unclaim(p, list[i]);
    }
    free(list);
    return rc;
}

enum status_code kv_pool_extend(struct kv_pool *p, uint64_t pages, struct status *st)
{
    if (pages > p->max_pages - p->total_pages)
        return status_set(st, ST_INVALID_ARGUMENT, "pages: %" PRIu64 " to take again, given back are %" PRIu64, pages,
                          p->max_pages - p->total_pages);
    for (uint32_t i = 0; pages > 0 && i < p->max_pages; i++) {
        if (!p->page[i].gone)
            continue;
        enum status_code rc = p->ops->restore(p->be, i, st);
        if (rc != ST_OK)
            return rc;
        p->page[i].gone = false;
        p->page[i].dirty = p->ops->new_pages_are_zero ? 0 : (uint32_t)p->account.page_bytes;
        set_total(p, p->total_pages + 1);
        kv_cold_put(p, i);
        pages--;
    }
    return ST_OK;
}
