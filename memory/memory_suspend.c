/* memory_suspend.c - slots in host memory, and pages given back to the machine.
 *
 * Host memory for suspended slots is taken with the pool, in extents of EXTENT_PAGES blocks: a suspension never fails for want
 * of it, and pinned memory is slow to get. A block holds what stands at one position of a slot; the blocks of a slot are a
 * list, in the order of its positions.
 *
 *     block b: extents[b / EXTENT_PAGES] + b % EXTENT_PAGES * page_bytes         next_block[b]: behind it, or NO_BLOCK
 */
#include <inttypes.h>
#include <stdlib.h>

#include "memory/memory_internal.h"

#define EXTENT_PAGES 16
#define NO_BLOCK     UINT32_MAX
#define BLOCKS_MAX   UINT64_C(2147483648)

/* --- host memory --- */

static enum status_code check_available(const struct kv_pool *p, uint64_t bytes, struct status *st)
{
    char why[128];
    uint64_t available = kv_host_available(why, sizeof why);
    if (bytes <= available)
        return ST_OK;
    return status_set(st, ST_RESOURCE_EXHAUSTED,
                      "suspend_bytes: %" PRIu64 " MiB for suspended slots, but %s leaves %" PRIu64 " MiB",
                      p->suspend_bytes >> 20, why, available >> 20);
}

enum status_code kv_blocks_create(struct kv_pool *p, struct status *st)
{
    const uint64_t bytes = EXTENT_PAGES * p->account.page_bytes, n = p->suspend_bytes / bytes;
    if (n > BLOCKS_MAX / EXTENT_PAGES)
        return status_set(st, ST_INVALID_ARGUMENT, "suspend_bytes: %" PRIu64 ", expected at most %" PRIu64,
                          p->suspend_bytes, BLOCKS_MAX * p->account.page_bytes);
    p->suspend_pages = n * EXTENT_PAGES;
    p->free_block = NO_BLOCK;
    if (!p->be || n == 0)
        return ST_OK;
    enum status_code rc = check_available(p, n * bytes, st);
    if (rc != ST_OK)
        return rc;
    p->extents = calloc(n, sizeof *p->extents);
    p->next_block = calloc(p->suspend_pages, sizeof *p->next_block);
    if (!p->extents || !p->next_block)
        return status_nomem(st, "blocks for suspended slots", p->suspend_pages * sizeof *p->next_block);
    for (; p->n_extents < n; p->n_extents++) {
        rc = p->ops->host_alloc(p->be, &p->extents[p->n_extents], bytes, st);
        if (rc == ST_OK)
            continue;
        status_prefix(st, "suspend_bytes: %" PRIu64 " MiB", p->suspend_bytes >> 20);
        return rc;
    }
    for (uint32_t i = (uint32_t)p->suspend_pages; i-- > 0;) {
        p->next_block[i] = p->free_block;
        p->free_block = i;
    }
    return ST_OK;
}

void kv_blocks_destroy(struct kv_pool *p)
{
    for (uint64_t i = 0; i < p->n_extents; i++)
        p->ops->host_free(p->be, p->extents[i], EXTENT_PAGES * p->account.page_bytes);
    free(p->extents);
    free(p->next_block);
}

static void *block_at(const struct kv_pool *p, uint32_t block)
{
    return (uint8_t *)p->extents[block / EXTENT_PAGES] + block % EXTENT_PAGES * p->account.page_bytes;
}

/* The blocks are free, and the slot is suspended no more. */
void kv_saved_free(struct kv_pool *p, struct kv_slot *s)
{
    uint64_t n = kv_pages_for(&p->account, s->saved_tokens);
    p->suspended_pages -= n;
    if (n) {
        uint32_t last = s->first_block;
        while (p->next_block[last] != NO_BLOCK)
            last = p->next_block[last];
        p->next_block[last] = p->free_block;
        p->free_block = s->first_block;
    }
    s->saved_tokens = 0;
}

/* Takes the first n blocks of the free ones, which hold the slot's content by now. */
static void take_blocks(struct kv_pool *p, struct kv_slot *s, uint32_t n)
{
    p->suspended_pages += n;
    s->first_block = p->free_block;
    uint32_t last = p->free_block;
    for (uint32_t i = 1; i < n; i++)
        last = p->next_block[last];
    p->free_block = p->next_block[last];
    p->next_block[last] = NO_BLOCK;
}

/* --- suspend, resume --- */

static enum status_code save_all(struct kv_pool *p, const struct kv_slot *s, struct status *st)
{
    enum status_code rc = ST_OK;
    uint32_t block = p->free_block;
    for (uint32_t i = 0; i < s->range->used && rc == ST_OK; i++, block = p->next_block[block]) {
        p->cost.clears++;
        rc = p->ops->save(p->be, block_at(p, block), kv_position_at(p, s->range, i), kv_position_bytes(p, i, s->tokens),
                          st);
    }
    enum status_code end = p->ops->sync(p->be, rc == ST_OK ? st : NULL);
    return rc == ST_OK ? end : rc;
}

/* Pages, content and blocks. */
static enum status_code move_out(struct kv_pool *p, struct kv_slot *s, struct status *st)
{
    uint64_t begin = kv_now_ns();
    uint32_t n = s->range->used;
    enum status_code rc = save_all(p, s, st);
    if (rc != ST_OK)
        return rc;
    take_blocks(p, s, n);
    for (uint32_t i = 0; i < n; i++)
        kv_page_soil(p, s->range->pages[i], kv_position_bytes(p, i, s->tokens));
    kv_range_leave(p, s->range, RANGE_SUSPENDED, 0);
    p->exposed_ns += kv_now_ns() - begin;
    return ST_OK;
}

enum status_code kv_slot_suspend(struct kv_pool *p, uint32_t slot, struct status *st)
{
    if (slot >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u, the pool has %u", slot, p->slots);
    struct kv_slot *s = &p->slot[slot];
    if (s->tokens == 0)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: %s, nothing to suspend", slot,
                          s->saved_tokens ? "suspended already" : "empty");
    uint64_t pages = s->range ? s->range->used : 0;
    if (pages > p->suspend_pages - p->suspended_pages)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "slot %u: %" PRIu64 " pages to suspend, of %" PRIu64 " in host memory %" PRIu64
                          " are taken; suspend_bytes is %" PRIu64 " MiB",
                          slot, pages, p->suspend_pages, p->suspended_pages, p->suspend_bytes >> 20);
    enum status_code rc = s->range ? move_out(p, s, st) : ST_OK;
    if (rc != ST_OK) {
        status_prefix(st, "slot %u", slot);
        return rc;
    }
    p->used_bytes -= s->tokens * p->account.token_bytes;
    s->saved_tokens = s->tokens;
    s->tokens = 0;
    return ST_OK;
}

static enum status_code load_all(struct kv_pool *p, const struct kv_slot *s, struct status *st)
{
    enum status_code rc = ST_OK;
    uint32_t block = s->first_block;
    for (uint32_t i = 0; i < s->range->used && rc == ST_OK; i++, block = p->next_block[block]) {
        p->cost.clears++;
        rc = p->ops->load(p->be, kv_position_at(p, s->range, i), block_at(p, block),
                          kv_position_bytes(p, i, s->saved_tokens), st);
    }
    enum status_code end = p->ops->sync(p->be, rc == ST_OK ? st : NULL);
    return rc == ST_OK ? end : rc;
}

static enum status_code move_in(struct kv_pool *p, struct kv_slot *s, uint32_t want, struct status *st)
{
    uint64_t begin = kv_now_ns();
    enum status_code rc = kv_range_take(p, s->range, NULL, 0, want, st);
    if (rc == ST_OK && (rc = load_all(p, s, st)) != ST_OK) {
        for (uint32_t i = 0; i < want; i++)
            kv_page_soil(p, s->range->pages[i], p->account.page_bytes);
        kv_range_leave(p, s->range, RANGE_SUSPENDED, 0);
    }
    p->exposed_ns += kv_now_ns() - begin;
    return rc;
}

enum status_code kv_slot_resume(struct kv_pool *p, uint32_t slot, struct status *st)
{
    if (slot >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u, the pool has %u", slot, p->slots);
    struct kv_slot *s = &p->slot[slot];
    if (s->saved_tokens == 0)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: not suspended", slot);
    uint32_t want = (uint32_t)kv_pages_for(&p->account, s->saved_tokens);
    if (want > kv_free_pages(p))
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "slot %u: its %u tokens take %u pages, free are %" PRIu64 " of %" PRIu64, slot,
                          s->saved_tokens, want, kv_free_pages(p), p->total_pages);
    enum status_code rc = s->range ? move_in(p, s, want, st) : ST_OK;
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

uint64_t kv_pool_suspend_pages(const struct kv_pool *p)
{
    return p->suspend_pages;
}

/* There and back once; the slower of both. */
static enum status_code time_once(struct kv_pool *p, uint64_t *ns, struct status *st)
{
    uint64_t t0 = kv_now_ns();
    enum status_code rc = kv_slot_suspend(p, 0, st);
    uint64_t t1 = kv_now_ns();
    if (rc == ST_OK)
        rc = kv_slot_resume(p, 0, st);
    uint64_t t2 = kv_now_ns();
    *ns = t1 - t0 > t2 - t1 ? t1 - t0 : t2 - t1;
    return rc;
}

enum status_code kv_pool_suspend_rate(struct kv_pool *p, uint64_t *bytes_per_s, struct status *st)
{
    *bytes_per_s = 0;
    uint64_t pages = p->suspend_pages < EXTENT_PAGES ? p->suspend_pages : EXTENT_PAGES, ns = 0;
    if (pages > p->total_pages)
        pages = p->total_pages;
    uint64_t tokens = p->be ? pages / p->lanes * p->account.page_bytes / p->lane_bytes : 0;
    if (tokens > p->max_tokens)
        tokens = p->max_tokens;
    if (tokens == 0)
        return ST_OK;
    enum status_code rc = kv_slot_grow(p, 0, (uint32_t)tokens, st);
    if (rc == ST_OK)
        rc = time_once(p, &ns, st); /* first touches */
    if (rc == ST_OK)
        rc = time_once(p, &ns, st);
    if (rc == ST_OK)
        *bytes_per_s = (uint64_t)((double)tokens * (double)p->account.token_bytes * 1e9 / (double)(ns ? ns : 1));
    kv_pool_reset(p);
    return rc;
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
    const uint64_t before = p->total_pages;
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
    if (rc != ST_OK)
        status_prefix(st, "pages: %" PRIu64 " of %" PRIu64 " given back", before - p->total_pages, pages);
    return rc;
}

enum status_code kv_pool_extend(struct kv_pool *p, uint64_t pages, struct status *st)
{
    if (pages > p->max_pages - p->total_pages)
        return status_set(st, ST_INVALID_ARGUMENT, "pages: %" PRIu64 " to take again, given back are %" PRIu64, pages,
                          p->max_pages - p->total_pages);
    const uint64_t goal = p->total_pages + pages;
    for (uint32_t i = 0; p->total_pages < goal && i < p->max_pages; i++) {
        if (!p->page[i].gone)
            continue;
        enum status_code rc = p->ops->restore(p->be, i, st);
        if (rc != ST_OK) {
            status_prefix(st, "pages: %" PRIu64 " of %" PRIu64 " taken again", pages - (goal - p->total_pages), pages);
            return rc;
        }
        p->page[i].gone = false;
        p->page[i].dirty = p->ops->new_pages_are_zero || p->no_clear ? 0 : (uint32_t)p->account.page_bytes;
        set_total(p, p->total_pages + 1);
        kv_cold_put(p, i);
    }
    return ST_OK;
}

enum status_code kv_pool_resize(struct kv_pool *p, uint64_t pages, struct status *st)
{
    uint64_t total = p->total_pages;
    if (p->be)
        return pages < total ? kv_pool_shrink(p, total - pages, st) : kv_pool_extend(p, pages - total, st);
    p->account.total_pages = pages;
    return ST_OK;
}
