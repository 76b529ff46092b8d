/* memory_check.c - do the pool's books agree? Counts everything anew from the ranges, which say what is mapped where. */
#include <inttypes.h>
#include <stdlib.h>

#include "memory/memory_internal.h"

struct books {
    struct kv_page *page; /* active, fenced, maps: counted anew */
    uint64_t positions, held;
};

static enum status_code check_range(const struct kv_pool *p, const struct kv_range *r, struct books *b,
                                    struct status *st)
{
    bool holds = r->state == RANGE_ACTIVE || r->state == RANGE_FENCED;
    if (r->job || r->used > r->mapped || (!holds && r->used))
        return status_set(st, ST_INTERNAL, "a range in state %d has %u of %u positions in use", (int)r->state, r->used,
                          r->mapped);
    for (uint32_t i = 0; i < p->pages_per_slot; i++) {
        uint32_t page = r->pages[i];
        if (page == NO_PAGE && i >= r->used)
            continue;
        if (page >= p->max_pages || i >= r->mapped || p->page[page].gone)
            return status_set(st, ST_INTERNAL, "page %u at position %u, %u in use, %u mapped", page, i, r->used,
                              r->mapped);
        b->page[page].maps++;
        b->positions++;
        b->page[page].active += i < r->used && r->state == RANGE_ACTIVE;
        b->page[page].fenced += i < r->used && r->state == RANGE_FENCED;
        b->held += i < r->used && r->state == RANGE_ACTIVE;
    }
    return ST_OK;
}

static enum status_code check_slot(const struct kv_pool *p, uint32_t i, struct status *st)
{
    const struct kv_slot *s = &p->slot[i];
    uint64_t want = p->be ? kv_pages_for(&p->account, s->tokens) : 0;
    enum range_state state = s->saved_tokens ? RANGE_SUSPENDED : RANGE_ACTIVE;
    if ((s->range ? s->range->used : 0) != want || (s->range && s->range->state != state) ||
        (s->saved_tokens && (s->tokens || (p->be && !s->range))))
        return status_set(st, ST_INTERNAL, "slot %u: %u tokens in %u pages, expected %" PRIu64, i, s->tokens,
                          s->range ? s->range->used : 0, want);
    return ST_OK;
}

static enum status_code check_page(const struct kv_pool *p, uint32_t i, const struct books *b, struct kv_stats *n,
                                   struct status *st)
{
    const struct kv_page *has = &p->page[i], *want = &b->page[i];
    if (has->active != want->active || has->fenced != want->fenced || has->maps != want->maps || has->busy)
        return status_set(st, ST_INTERNAL,
                          "page %u: %u slots, %u fenced, %u mappings in the books; %u, %u, %u in the ranges", i,
                          has->active, has->fenced, has->maps, want->active, want->fenced, want->maps);
    bool cold = !has->gone && !has->active && !has->fenced && !has->maps;
    if (cold != ((p->cold[i / 64] >> (i % 64) & 1) != 0))
        return status_set(st, ST_INTERNAL, "page %u: %s the list of cold pages", i, cold ? "not on" : "on");
    n->mapped_pages += has->active > 0;
    n->shared_pages += has->active > 1;
    n->fenced_pages += !has->active && has->fenced;
    n->given_pages += has->gone;
    n->free_pages += !has->gone && !has->active && !has->fenced;
    n->parked_pages += !has->gone && !has->active && !has->fenced && has->maps;
    return ST_OK;
}

enum status_code kv_pool_check(struct kv_pool *p, struct status *st)
{
    kv_mapper_drain(p);
    enum status_code rc = ST_OK;
    struct books b = {.page = calloc(p->max_pages + 1, sizeof *b.page)};
    struct kv_stats n = {0}, has = kv_pool_stats(p);
    if (!b.page)
        return status_nomem(st, "a check of the KV pool", (p->max_pages + 1) * sizeof *b.page);
    for (uint32_t i = 0; i < p->n_ranges && rc == ST_OK; i++)
        rc = check_range(p, p->ranges[i], &b, st);
    for (uint32_t i = 0; i < p->slots && rc == ST_OK; i++)
        rc = check_slot(p, i, st);
    for (uint32_t i = 0; i < p->max_pages && rc == ST_OK; i++)
        rc = check_page(p, i, &b, &n, st);
    uint64_t blocks = 0;
    for (uint32_t i = 0; i < p->slots; i++)
        blocks += kv_pages_for(&p->account, p->slot[i].saved_tokens);
    if (rc == ST_OK && (blocks != p->suspended_pages || blocks > p->suspend_pages))
        rc = status_set(st, ST_INTERNAL, "%" PRIu64 " pages suspended, %" PRIu64 " in the books, room for %" PRIu64,
                        blocks, p->suspended_pages, p->suspend_pages);
    if (rc == ST_OK &&
        (b.positions != p->positions || b.held != p->held || n.mapped_pages != has.mapped_pages ||
         n.fenced_pages != has.fenced_pages || n.shared_pages != has.shared_pages || n.free_pages != has.free_pages ||
         n.parked_pages != has.parked_pages || n.given_pages != has.given_pages ||
         n.mapped_pages + n.fenced_pages + n.free_pages != has.total_pages))
        rc = status_set(st, ST_INTERNAL,
                        "counted %" PRIu64 " mapped, %" PRIu64 " fenced, %" PRIu64 " free, %" PRIu64 " shared, %" PRIu64
                        " parked; the books have %" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64,
                        n.mapped_pages, n.fenced_pages, n.free_pages, n.shared_pages, n.parked_pages, has.mapped_pages,
                        has.fenced_pages, has.free_pages, has.shared_pages, has.parked_pages);
    free(b.page);
    return rc;
}
