/* memory.c - the KV pool: creation, geometry, what others see of it, and the check of its books.
 *
 * Slots are numbers, ranges are addresses: memory_range.c has the picture. Knows nothing of the machine; a back end
 * (kv_ops) maps and clears.
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
    p->group_layers = cfg->group_layers ? cfg->group_layers : cfg->layers;
    p->apart = cfg->apart;
    if (p->group_layers == 0 || cfg->layers % p->group_layers)
        return status_set(st, ST_INVALID_ARGUMENT, "group_layers: %u, expected a divisor of layers (%u)",
                          cfg->group_layers, cfg->layers);
    p->lanes = cfg->layers / p->group_layers * (cfg->apart ? 2 : 1);
    if (p->lanes == 0) /* 2^31 lanes twice */
        return status_set(st, ST_INVALID_ARGUMENT, "layers: %u in lanes of K and V apart, expected fewer", cfg->layers);
    p->lane_bytes = token / p->lanes;
    p->account = (struct kv_account){.page_bytes = cfg->page_bytes,
                                     .token_bytes = token,
                                     .total_pages = cfg->total_pages,
                                     .lanes = p->lanes == 1 ? 0 : p->lanes};
    uint64_t pages = kv_pages_for(&p->account, cfg->max_tokens);
    if (pages > PAGES_MAX)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "max_tokens: %u tokens of %" PRIu64 " bytes are %" PRIu64 " pages, expected at most %" PRIu64,
                          cfg->max_tokens, token, pages, PAGES_MAX);
    p->pages_per_slot = (uint32_t)pages;
    p->lane_range_bytes = pages / p->lanes * cfg->page_bytes;
    return ST_OK;
}

static void *array(size_t n, size_t size, const char *what, enum status_code *rc, struct status *st)
{
    void *a = *rc == ST_OK ? calloc(n, size) : NULL;
    if (*rc == ST_OK && !a)
        *rc = status_nomem(st, what, n * size);
    return a;
}

static enum status_code open_backend(struct kv_pool *p, const struct kv_pool_config *cfg, struct status *st)
{
    const struct kv_geometry geo = {.slots = cfg->slots,
                                    .range_bytes = p->pages_per_slot * cfg->page_bytes,
                                    .page_bytes = cfg->page_bytes,
                                    .total_pages = cfg->total_pages,
                                    .device = cfg->device,
                                    .driver = cfg->driver};
    for (uint64_t page = 0; page < p->total_pages; page++) {
        p->page[page].dirty = cfg->ops->new_pages_are_zero || p->no_clear ? 0 : (uint32_t)cfg->page_bytes;
        kv_cold_put(p, (uint32_t)page);
    }
    enum status_code rc = p->ops->open(&p->be, &geo, st);
    if (rc == ST_OK)
        p->mappings = p->ops->mappings(p->be);
    return rc;
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
    p->ahead_tokens = cfg->ahead_tokens;
    p->arrival_tokens = cfg->arrival_tokens < cfg->max_tokens ? cfg->arrival_tokens : cfg->max_tokens;
    p->suspend_bytes = cfg->suspend_bytes;
    p->no_clear = cfg->no_clear;
    rc = set_geometry(p, cfg, st);
    if (rc != ST_OK)
        goto fail;
    /* Without KV heads there is nothing to hold; the account still says total_pages, so that it bounds no other rank. */
    p->max_pages = p->total_pages = p->account.token_bytes ? cfg->total_pages : 0;
    p->cap_ranges = cfg->slots;
    uint64_t words = (p->total_pages + 63) / 64;
    p->slot = array(cfg->slots, sizeof *p->slot, "KV slots", &rc, st);
    p->ranges = array(cfg->slots, sizeof *p->ranges, "KV ranges", &rc, st);
    p->page = array(p->total_pages + 1, sizeof *p->page, "KV pages", &rc, st);
    p->target = array(p->pages_per_slot + 1ull, sizeof *p->target, "KV pages", &rc, st);
    p->cold = array(words + 1, sizeof *p->cold, "KV pages", &rc, st);
    if (rc == ST_OK && p->total_pages)
        rc = open_backend(p, cfg, st);
    if (rc == ST_OK)
        rc = kv_blocks_create(p, st);
    if (rc == ST_OK && p->be && cfg->background)
        rc = kv_mapper_start(p, st);
    if (rc != ST_OK)
        goto fail;
    *out = p;
    return ST_OK;
fail:
    kv_pool_destroy(p);
    return rc;
}

static void unmap_all(struct kv_pool *p, struct kv_range *r)
{
    for (uint32_t from = 0, to; from < r->mapped; from = to + 1) {
        for (to = from; to < r->mapped && r->pages[to] != NO_PAGE;)
            to++;
        if (to > from)
            (void)!kv_span_unmap(p, r, from, to, &p->cost, NULL);
    }
}

void kv_pool_destroy(struct kv_pool *p)
{
    if (!p)
        return;
    kv_mapper_stop(p);
    for (uint32_t i = 0; i < p->n_ranges && !p->ops->close_unmaps; i++)
        unmap_all(p, p->ranges[i]);
    kv_blocks_destroy(p);
    if (p->be)
        p->ops->close(p->be);
    for (uint32_t i = 0; i < p->n_ranges; i++)
        free(p->ranges[i]);
    free(p->target);
    free(p->cold);
    free(p->page);
    free(p->ranges);
    free(p->slot);
    free(p);
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

uint8_t *kv_position_at(const struct kv_pool *p, const struct kv_range *r, uint32_t i)
{
    return r->base + i % p->lanes * p->lane_range_bytes + i / p->lanes * p->account.page_bytes;
}

uint64_t kv_position_bytes(const struct kv_pool *p, uint32_t i, uint32_t tokens)
{
    uint64_t all = tokens * p->lane_bytes, before = i / p->lanes * p->account.page_bytes;
    if (all <= before)
        return 0;
    return all - before < p->account.page_bytes ? all - before : p->account.page_bytes;
}

struct kv_view kv_slot_view(const struct kv_pool *p, uint32_t slot, uint32_t layer)
{
    struct kv_view v = {.token_stride = p->lane_bytes, .head_stride = p->head_bytes};
    if (slot >= p->slots || layer >= p->layers || !p->slot[slot].range || p->slot[slot].saved_tokens)
        return v;
    uint32_t group = layer / p->group_layers, inner = layer % p->group_layers;
    v.tokens = p->slot[slot].tokens;
    v.k = p->slot[slot].range->base;
    if (p->apart) {
        v.k += 2ull * group * p->lane_range_bytes + inner * p->half_bytes;
        v.v = v.k + p->lane_range_bytes;
    } else {
        v.k += group * p->lane_range_bytes + inner * 2 * p->half_bytes;
        v.v = v.k + p->half_bytes;
    }
    return v;
}

struct kv_stats kv_pool_stats(const struct kv_pool *p)
{
    return (struct kv_stats){
        .total_pages = p->total_pages,
        .mapped_pages = p->used_pages,
        .fenced_pages = p->fenced_pages,
        .free_pages = kv_free_pages(p),
        .shared_pages = p->shared_pages,
        .saved_pages = p->held - p->used_pages,
        .parked_pages = kv_free_pages(p) - p->n_cold,
        .given_pages = p->max_pages - p->total_pages,
        .wasted_bytes = p->be ? p->held * p->account.page_bytes - p->used_bytes : 0,
        .suspended_bytes = p->suspended_pages * p->account.page_bytes,
        .map_calls = p->cost.calls,
        .clear_calls = p->cost.clears,
        .map_ns = p->cost.ns,
        .exposed_ns = p->exposed_ns,
        .failed_ahead = p->failed_jobs,
    };
}
