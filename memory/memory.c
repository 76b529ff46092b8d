/* memory.c - the KV pool: who holds which page. Knows nothing of the machine; a back end (kv_ops) maps and clears.
 *
 * Slots are numbers, ranges are addresses: memory_range.c has the picture.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "memory/memory_internal.h"

#define SLOTS_MAX       65536u
#define PAGE_BYTES_MAX  UINT64_C(1073741824)
#define PAGES_MAX       UINT64_C(2147483648) /* page numbers are uint32_t */
#define TOKEN_BYTES_MAX UINT64_C(2147483647)

/* --- creation --- */

static enum status_code check_field(const char *name, uint64_t value, uint64_t min, uint64_t max, struct status *st)
{
    if (value >= min && value <= max)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "%s: %" PRIu64 ", expected %" PRIu64 " to %" PRIu64, name, value, min,
                      max);
}

static enum status_code check_config(const struct kv_pool_config *cfg, struct status *st)
{
    if (!cfg->ops)
        return status_set(st, ST_INVALID_ARGUMENT, "ops: none, expected a back end such as kv_ops_host");
    enum status_code rc = check_field("slots", cfg->slots, 1, SLOTS_MAX, st);
    if (rc == ST_OK)
        rc = check_field("max_tokens", cfg->max_tokens, 1, UINT32_MAX, st);
    if (rc == ST_OK)
        rc = check_field("layers", cfg->layers, 1, UINT32_MAX, st);
    if (rc == ST_OK)
        rc = check_field("head_dim", cfg->head_dim, 1, UINT32_MAX, st);
    if (rc == ST_OK)
        rc = check_field("page_bytes", cfg->page_bytes, 1, PAGE_BYTES_MAX, st);
    if (rc == ST_OK)
        rc = check_field("total_pages", cfg->total_pages, cfg->kv_heads ? 1 : 0, PAGES_MAX, st);
    if (rc != ST_OK)
        return rc;
    if (cfg->elem_bytes != 2 && cfg->elem_bytes != 4)
        return status_set(st, ST_INVALID_ARGUMENT, "elem_bytes: %u, expected 2 or 4", cfg->elem_bytes);
    if (cfg->page_bytes & (cfg->page_bytes - 1))
        return status_set(st, ST_INVALID_ARGUMENT, "page_bytes: %" PRIu64 ", expected a power of two", cfg->page_bytes);
    return ST_OK;
}

/* Sizes of a token and of a range. The factors are 32 bits each, so every step is checked. */
static enum status_code set_geometry(struct kv_pool *p, const struct kv_pool_config *cfg, struct status *st)
{
    uint64_t token;
    p->head_bytes = (uint64_t)cfg->head_dim * cfg->elem_bytes;
    if (__builtin_mul_overflow(p->head_bytes, cfg->kv_heads, &p->half_bytes) ||
        __builtin_mul_overflow(p->half_bytes, 2ull * cfg->layers, &token) || token > TOKEN_BYTES_MAX)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "layers: %u layers * 2 * %u kv_heads * %u head_dim * %u elem_bytes, expected at most %" PRIu64
                          " bytes per token",
                          cfg->layers, cfg->kv_heads, cfg->head_dim, cfg->elem_bytes, TOKEN_BYTES_MAX);
    p->account =
        (struct kv_account){.page_bytes = cfg->page_bytes, .token_bytes = token, .total_pages = cfg->total_pages};
    uint64_t pages = kv_pages_for(&p->account, cfg->max_tokens);
    if (pages > PAGES_MAX)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "max_tokens: %u tokens of %" PRIu64 " bytes are %" PRIu64 " pages, expected at most %" PRIu64,
                          cfg->max_tokens, token, pages, PAGES_MAX);
    p->pages_per_slot = (uint32_t)pages;
    return ST_OK;
}

static void *array(size_t n, size_t size, const char *what, enum status_code *rc, struct status *st)
{
    void *a = *rc == ST_OK ? calloc(n, size) : NULL;
    if (*rc == ST_OK && !a)
        *rc = status_nomem(st, what, n * size);
    return a;
}

enum status_code kv_pool_create(struct kv_pool **out, const struct kv_pool_config *cfg, struct status *st)
{
    enum status_code rc = check_config(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct kv_pool *p = calloc(1, sizeof *p);
    if (!p)
        return status_nomem(st, "a KV pool", sizeof *p);
    p->ops = cfg->ops;
    p->slots = cfg->slots;
    p->max_tokens = cfg->max_tokens;
    p->layers = cfg->layers;
    rc = set_geometry(p, cfg, st);
    if (rc != ST_OK)
        goto fail;
    /* Without KV heads there is nothing to hold; the account still says total_pages, so that it bounds no other rank. */
    p->total_pages = p->account.token_bytes ? cfg->total_pages : 0;
    p->cap_ranges = cfg->slots;
    uint64_t words = (p->total_pages + 63) / 64;
    p->slot = array(cfg->slots, sizeof *p->slot, "KV slots", &rc, st);
    p->ranges = array(cfg->slots, sizeof *p->ranges, "KV ranges", &rc, st);
    p->dirty = array(p->total_pages + 1, sizeof *p->dirty, "KV pages", &rc, st);
    p->cold = array(words + 1, sizeof *p->cold, "KV pages", &rc, st);
    if (rc != ST_OK)
        goto fail;
    for (uint64_t page = 0; page < p->total_pages; page++) {
        p->dirty[page] = cfg->ops->new_pages_are_zero ? 0 : (uint32_t)cfg->page_bytes;
        kv_cold_put(p, (uint32_t)page);
    }
    if (p->total_pages) {
        struct kv_geometry geo = {.slots = cfg->slots,
                                  .range_bytes = p->pages_per_slot * cfg->page_bytes,
                                  .page_bytes = cfg->page_bytes,
                                  .total_pages = cfg->total_pages,
                                  .device = cfg->device,
                                  .driver = cfg->driver};
        rc = p->ops->open(&p->be, &geo, st);
        if (rc != ST_OK)
            goto fail;
    }
    *out = p;
    return ST_OK;
fail:
    kv_pool_destroy(p);
    return rc;
}

void kv_pool_destroy(struct kv_pool *p)
{
    if (!p)
        return;
    for (uint32_t i = 0; i < p->n_ranges && p->be && !p->ops->close_unmaps; i++)
        if (p->ranges[i]->mapped)
            (void)p->ops->unmap(p->be, p->ranges[i]->base, p->ranges[i]->mapped, &p->map_calls, NULL);
    if (p->be)
        p->ops->close(p->be);
    for (uint32_t i = 0; i < p->n_ranges; i++)
        free(p->ranges[i]);
    free(p->cold);
    free(p->dirty);
    free(p->ranges);
    free(p->slot);
    free(p);
}

/* --- slots --- */

static uint64_t free_pages(const struct kv_pool *p)
{
    return p->total_pages - p->used_pages - p->fenced_pages;
}

enum status_code kv_slot_grow(struct kv_pool *p, uint32_t slot, uint32_t tokens, struct status *st)
{
    if (slot >= p->slots)
        return status_set(st, ST_OUT_OF_RANGE, "slot: %u, the pool has %u", slot, p->slots);
    if (tokens > p->max_tokens)
        return status_set(st, ST_OUT_OF_RANGE, "tokens: %u in slot %u, at most %u (max_tokens)", tokens, slot,
                          p->max_tokens);
    struct kv_slot *s = &p->slot[slot];
    if (tokens <= s->tokens)
        return ST_OK;

    struct kv_range *r = s->range;
    uint32_t want = (uint32_t)kv_pages_for(&p->account, tokens);
    uint32_t have = r ? r->used : 0;
    if (want > have) {
        if (want - have > free_pages(p))
            return status_set(st, ST_RESOURCE_EXHAUSTED,
                              "slot %u: %u tokens take %u more pages, free are %" PRIu64 " of %" PRIu64 " (%" PRIu64
                              " are fenced)",
                              slot, tokens, want - have, free_pages(p), p->total_pages, p->fenced_pages);
        enum status_code rc = r ? ST_OK : kv_range_pick(p, &r, st);
        if (rc == ST_OK)
            rc = kv_range_fill(p, r, want, st);
        if (rc == ST_OK)
            rc = kv_range_adopt(p, r, want, st);
        if (rc != ST_OK) {
            status_prefix(st, "slot %u, %u tokens", slot, tokens);
            return rc;
        }
        p->used_pages += want - have;
        s->range = r;
    }
    p->used_bytes += (uint64_t)(tokens - s->tokens) * p->account.token_bytes;
    s->tokens = tokens;
    return ST_OK;
}

void kv_slot_release(struct kv_pool *p, uint32_t slot, uint64_t step)
{
    if (slot >= p->slots)
        return;
    struct kv_slot *s = &p->slot[slot];
    struct kv_range *r = s->range;
    uint64_t bytes = s->tokens * p->account.token_bytes;
    s->range = NULL;
    s->tokens = 0;
    p->used_bytes -= bytes;
    if (!r)
        return;
    for (uint32_t i = 0; i < r->used; i++) {
        uint64_t n = bytes < p->account.page_bytes ? bytes : p->account.page_bytes;
        p->dirty[r->pages[i]] = (uint32_t)n;
        bytes -= n;
    }
    p->used_pages -= r->used;
    if (p->any_completed && step <= p->completed) {
        kv_range_idle(p, r);
        return;
    }
    p->fenced_pages += r->used;
    kv_range_fence(p, r, step);
}

void kv_pool_complete(struct kv_pool *p, uint64_t step)
{
    if (p->any_completed && step < p->completed)
        return;
    p->any_completed = true;
    p->completed = step;
    for (struct kv_range *r = p->fenced.first, *next; r; r = next) {
        next = r->next;
        if (r->fence > step)
            continue;
        p->fenced_pages -= r->used;
        kv_range_unfence(p, r);
    }
}

void kv_pool_reset(struct kv_pool *p)
{
    for (uint32_t i = 0; i < p->slots; i++)
        kv_slot_release(p, i, 0);
    kv_pool_complete(p, UINT64_MAX);
    p->any_completed = false;
    p->completed = 0;
}

/* --- what others see --- */

struct kv_account kv_pool_account(const struct kv_pool *p)
{
    return p->account;
}

uint32_t kv_slot_tokens(const struct kv_pool *p, uint32_t slot)
{
    return slot < p->slots ? p->slot[slot].tokens : 0;
}

struct kv_view kv_slot_view(const struct kv_pool *p, uint32_t slot, uint32_t layer)
{
    struct kv_view v = {.token_stride = p->account.token_bytes, .head_stride = p->head_bytes};
    if (slot >= p->slots || layer >= p->layers || !p->slot[slot].range)
        return v;
    v.k = p->slot[slot].range->base + layer * 2 * p->half_bytes;
    v.v = v.k + p->half_bytes;
    return v;
}

struct kv_stats kv_pool_stats(const struct kv_pool *p)
{
    return (struct kv_stats){
        .total_pages = p->total_pages,
        .mapped_pages = p->used_pages,
        .fenced_pages = p->fenced_pages,
        .free_pages = free_pages(p),
        .wasted_bytes = p->used_pages * p->account.page_bytes - p->used_bytes,
        .map_calls = p->map_calls,
        .map_ns = p->map_ns,
    };
}
