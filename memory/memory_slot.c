/* memory_slot.c - slots: grow, share, release; steps and epochs. Counts pages; memory_range.c moves them. */
#include <inttypes.h>

#include "memory/memory_internal.h"

uint64_t kv_free_pages(const struct kv_pool *p)
{
    return p->be ? p->total_pages - p->used_pages - p->fenced_pages : 0;
}

void kv_page_soil(struct kv_pool *p, uint32_t page, uint64_t bytes)
{
    if (bytes > p->page[page].dirty && !p->no_clear)
        p->page[page].dirty = (uint32_t)bytes;
}

/* Positions up to `want` of the slot, in its range or a new one, the first of them being another's. */
static enum status_code take(struct kv_pool *p, struct kv_slot *s, const uint32_t *prefix, uint32_t n_prefix,
                             uint32_t want, struct status *st)
{
    struct kv_range *r = s->range;
    uint64_t begin = kv_now_ns();
    enum status_code rc = r ? ST_OK : kv_range_pick(p, prefix, n_prefix, want, &r, st);
    if (rc == ST_OK)
        rc = kv_range_take(p, r, prefix, n_prefix, want, st);
    if (rc == ST_OK)
        s->range = r;
    p->exposed_ns += kv_now_ns() - begin;
    return rc;
}

static void set_tokens(struct kv_pool *p, struct kv_slot *s, uint32_t tokens)
{
    p->used_bytes += ((uint64_t)tokens - s->tokens) * p->account.token_bytes;
    s->tokens = tokens;
}

enum status_code kv_slot_grow(struct kv_pool *p, uint32_t slot, uint32_t tokens, struct status *st)
{
    if (slot >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u, the pool has %u", slot, p->slots);
    if (tokens > p->max_tokens)
        return status_set(st, ST_OUT_OF_RANGE, "tokens: %u in slot %u, at most %u (max_tokens)", tokens, slot,
                          p->max_tokens);
    struct kv_slot *s = &p->slot[slot];
    if (s->saved_tokens)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: suspended, expected to be resumed first", slot);
    if (tokens <= s->tokens)
        return ST_OK;

    kv_mapper_reap(p);
    uint32_t want = (uint32_t)kv_pages_for(&p->account, tokens);
    uint32_t have = s->range ? s->range->used : 0;
    if (want > have) {
        if (want - have > kv_free_pages(p))
            return status_set(st, ST_RESOURCE_EXHAUSTED,
                              "slot %u: %u tokens take %u more pages, free are %" PRIu64 " of %" PRIu64 " (%" PRIu64
                              " are fenced)",
                              slot, tokens, want - have, kv_free_pages(p), p->total_pages, p->fenced_pages);
        enum status_code rc = take(p, s, NULL, 0, want, st);
        if (rc != ST_OK) {
            status_prefix(st, "slot %u, %u tokens", slot, tokens);
            return rc;
        }
    }
    set_tokens(p, s, tokens);
    if (p->mapper && s->range) {
        uint64_t next = (uint64_t)tokens + p->ahead_tokens;
        kv_mapper_prepare(p, s->range,
                          (uint32_t)kv_pages_for(&p->account, next < p->max_tokens ? next : p->max_tokens));
    }
    return ST_OK;
}

/* --- sharing --- */

/* What the tokens fill of a page that they do not fill to its end, in each lane. */
static enum status_code copy_rest(struct kv_pool *p, struct kv_range *to, const struct kv_range *from, uint32_t first,
                                  uint32_t tokens, struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t i = first; i < to->used && rc == ST_OK; i++) {
        p->cost.clears++;
        rc = p->ops->copy(p->be, kv_position_at(p, to, i), kv_position_at(p, from, i), kv_position_bytes(p, i, tokens),
                          st);
    }
    enum status_code end = p->ops->sync(p->be, rc == ST_OK ? st : NULL);
    return rc == ST_OK ? end : rc;
}

static enum status_code check_share(const struct kv_pool *p, uint32_t slot, uint32_t from, uint32_t tokens,
                                    struct status *st)
{
    if (slot >= p->slots || from >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u begins as %u, the pool has %u", slot, from, p->slots);
    if (p->slot[slot].tokens || p->slot[slot].saved_tokens)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: it has %u tokens, expected an empty one to share into",
                          slot, p->slot[slot].tokens + p->slot[slot].saved_tokens);
    if (tokens > p->slot[from].tokens)
        return status_set(st, ST_FAILED_PRECONDITION, "slot %u: %u tokens of slot %u, which has %u", slot, tokens, from,
                          p->slot[from].tokens);
    return ST_OK;
}

enum status_code kv_slot_share(struct kv_pool *p, uint32_t slot, uint32_t from, uint32_t tokens, struct status *st)
{
    enum status_code rc = check_share(p, slot, from, tokens, st);
    if (rc != ST_OK || tokens == 0)
        return rc;
    struct kv_slot *s = &p->slot[slot];
    const struct kv_range *source = p->slot[from].range;
    if (!source) { /* a rank without KV heads */
        set_tokens(p, s, tokens);
        return ST_OK;
    }
    kv_mapper_reap(p);
    uint32_t shared = (uint32_t)kv_pages_shared(&p->account, tokens);
    uint32_t want = (uint32_t)kv_pages_for(&p->account, tokens);
    if (want - shared > kv_free_pages(p))
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "slot %u: %u tokens of slot %u take %u more pages, free are %" PRIu64 " of %" PRIu64, slot,
                          tokens, from, want - shared, kv_free_pages(p), p->total_pages);
    rc = take(p, s, source->pages, shared, want, st);
    if (rc == ST_OK && want > shared && (rc = copy_rest(p, s->range, source, shared, tokens, st)) != ST_OK) {
        for (uint32_t i = shared; i < want; i++)
            kv_page_soil(p, s->range->pages[i], p->account.page_bytes);
        kv_range_leave(p, s->range, RANGE_IDLE, 0);
        s->range = NULL;
    }
    if (rc != ST_OK) {
        status_prefix(st, "slot %u, %u tokens of slot %u", slot, tokens, from);
        return rc;
    }
    set_tokens(p, s, tokens);
    return ST_OK;
}

/* --- the end of a slot, a step, an epoch --- */

void kv_slot_release(struct kv_pool *p, uint32_t slot, uint64_t step)
{
    if (slot >= p->slots)
        return;
    struct kv_slot *s = &p->slot[slot];
    struct kv_range *r = s->range;
    const uint32_t tokens = s->tokens;
    const bool suspended = s->saved_tokens > 0;
    s->range = NULL;
    set_tokens(p, s, 0);
    kv_saved_free(p, s);
    if (!r)
        return;
    if (suspended) {
        kv_range_to_idle(p, r);
        return;
    }
    for (uint32_t i = 0; i < r->used; i++)
        kv_page_soil(p, r->pages[i], kv_position_bytes(p, i, tokens));
    bool over = p->any_completed && step <= p->completed;
    kv_range_leave(p, r, over ? RANGE_IDLE : RANGE_FENCED, step);
}

void kv_pool_complete(struct kv_pool *p, uint64_t step)
{
    if (p->any_completed && step < p->completed)
        return;
    p->any_completed = true;
    p->completed = step;
    for (struct kv_range *r = p->fenced.first, *next; r; r = next) {
        next = r->next;
        if (r->fence <= step)
            kv_range_unfence(p, r);
    }
    kv_mapper_tend(p);
}

void kv_pool_reset(struct kv_pool *p)
{
    for (uint32_t i = 0; i < p->slots; i++)
        kv_slot_release(p, i, 0);
    kv_pool_complete(p, UINT64_MAX);
    p->any_completed = false;
    p->completed = 0;
}

void kv_pool_hold(struct kv_pool *p, bool on)
{
    kv_mapper_hold(p, on);
}

void kv_pool_settle(struct kv_pool *p)
{
    kv_mapper_drain(p);
}
