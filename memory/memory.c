/* memory.c - the KV pool: who holds which page. Knows nothing of the machine; a back end (kv_ops) maps and clears.
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
#include <inttypes.h>
#include <stdlib.h>
#include <time.h>

#include "memory/memory_internal.h"

#define SLOTS_MAX       65536u
#define PAGE_BYTES_MAX  UINT64_C(1073741824)
#define PAGES_MAX       UINT64_C(2147483648) /* page numbers are uint32_t */
#define TOKEN_BYTES_MAX UINT64_C(2147483647)

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

static void cold_put(struct kv_pool *p, uint32_t page)
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
        enum status_code rc = p->ops->unmap(p->be, r->base + (r->mapped - n) * p->account.page_bytes, n, st);
        p->map_calls++;
        p->map_ns += now_ns() - t;
        if (rc != ST_OK)
            return rc;
        for (; n > 0; n--)
            cold_put(p, r->pages[--r->mapped]);
        if (r->used == r->mapped)
            warm_remove(p, r);
        r = next;
    }
    return ST_OK;
}

/* Maps cold pages behind those of the range until it has `want`. What was mapped before a failure stays, as warm pages. */
static enum status_code map_up_to(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st)
{
    while (r->mapped < want) {
        uint32_t n = 0;
        uint32_t *run = &r->pages[r->mapped];
        do {
            uint32_t page = cold_take(p);
            if (n && page != run[n - 1] + 1) {
                cold_put(p, page);
                break;
            }
            run[n++] = page;
        } while (r->mapped + n < want);

        uint64_t t = now_ns();
        enum status_code rc = p->ops->map(p->be, r->base + r->mapped * p->account.page_bytes, run[0], n, st);
        p->map_calls++;
        p->map_ns += now_ns() - t;
        if (rc != ST_OK) {
            while (n > 0)
                cold_put(p, run[--n]);
            return rc;
        }
        r->mapped += n;
    }
    return ST_OK;
}

/* An idle range, the one used last (its pages are warm), or a new one: then as IDLE, in the list. */
static enum status_code pick_range(struct kv_pool *p, struct kv_range **out, struct status *st)
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
    uint64_t grain = cfg->ops->granularity();
    enum status_code rc = check_field("slots", cfg->slots, 1, SLOTS_MAX, st);
    if (rc == ST_OK)
        rc = check_field("max_tokens", cfg->max_tokens, 1, UINT32_MAX, st);
    if (rc == ST_OK)
        rc = check_field("layers", cfg->layers, 1, UINT32_MAX, st);
    if (rc == ST_OK)
        rc = check_field("head_dim", cfg->head_dim, 1, UINT32_MAX, st);
    if (rc == ST_OK)
        rc = check_field("page_bytes", cfg->page_bytes, grain, PAGE_BYTES_MAX, st);
    if (rc == ST_OK)
        rc = check_field("total_pages", cfg->total_pages, cfg->kv_heads ? 1 : 0, PAGES_MAX, st);
    if (rc != ST_OK)
        return rc;
    if (cfg->elem_bytes != 2 && cfg->elem_bytes != 4)
        return status_set(st, ST_INVALID_ARGUMENT, "elem_bytes: %u, expected 2 or 4", cfg->elem_bytes);
    if ((cfg->page_bytes & (cfg->page_bytes - 1)) || cfg->page_bytes % grain)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "page_bytes: %" PRIu64 ", expected a power of two and a multiple of %" PRIu64,
                          cfg->page_bytes, grain);
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
    for (uint64_t page = 0; page < p->total_pages; page++)
        cold_put(p, (uint32_t)page);
    if (p->total_pages) {
        struct kv_geometry geo = {.slots = cfg->slots,
                                  .range_bytes = p->pages_per_slot * cfg->page_bytes,
                                  .page_bytes = cfg->page_bytes,
                                  .total_pages = cfg->total_pages};
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

/* Clears what earlier owners left in pages used .. want - 1 and gives them to the slot. Cannot fail. */
static void adopt(struct kv_pool *p, struct kv_range *r, uint32_t want)
{
    for (uint32_t i = r->used; i < want; i++) {
        uint32_t *dirty = &p->dirty[r->pages[i]];
        if (*dirty)
            p->ops->clear(p->be, r->base + i * p->account.page_bytes, *dirty);
        *dirty = 0;
    }
    if (r->state == RANGE_IDLE) {
        list_remove(&p->idle, r);
        r->state = RANGE_ACTIVE;
    }
    p->used_pages += want - r->used;
    r->used = want;
    warm_update(p, r);
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
        enum status_code rc = ST_OK;
        if (!r)
            rc = pick_range(p, &r, st);
        if (rc == ST_OK && want > r->mapped)
            rc = reclaim(p, r, want - r->mapped, st);
        if (rc == ST_OK)
            rc = map_up_to(p, r, want, st);
        if (rc != ST_OK) {
            if (r)
                warm_update(p, r); /* it may have got a part of the pages */
            status_prefix(st, "slot %u, %u tokens", slot, tokens);
            return rc;
        }
        adopt(p, r, want);
        s->range = r;
    }
    p->used_bytes += (uint64_t)(tokens - s->tokens) * p->account.token_bytes;
    s->tokens = tokens;
    return ST_OK;
}

/* The range's pages become free where they are. */
static void make_idle(struct kv_pool *p, struct kv_range *r)
{
    r->state = RANGE_IDLE;
    r->used = 0;
    list_push_first(&p->idle, r);
    warm_update(p, r);
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
        make_idle(p, r);
        return;
    }
    p->fenced_pages += r->used;
    r->state = RANGE_FENCED;
    r->fence = step;
    list_push_first(&p->fenced, r);
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
        list_remove(&p->fenced, r);
        p->fenced_pages -= r->used;
        make_idle(p, r);
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
