/* memory_range.c - ranges: where pages are mapped, and which pages are free.
 *
 * Slots are numbers, ranges are addresses. A slot that holds tokens owns one range, picked when it first grows and left
 * when it is released, because a step in flight may still read the old addresses while the slot is already grown again:
 *
 *             grow an empty slot            release(step)                 complete(step)
 *   IDLE range ----------------> ACTIVE range -------------> FENCED range --------------> IDLE range
 *
 *   range |########+++-+-....|   # held   + mapped, page is free ("parked")   - mapped, but others hold the page ("stale")
 *                  ^used  ^mapped                                             . nothing
 *
 * Pages stay mapped when they become free, and a free page is taken for another range by mapping it there as well: the
 * old mapping goes stale, which nobody reads, and is taken out in the background or when its position is needed. So
 * nothing is ever unmapped on the way of a step, unless a stale position itself has to be used.
 *
 * A take comes first by what is mapped at its positions already, then claims free pages in the order of
 * kv_pages_claim, then maps, then clears; only then it counts. What fails before has moved free pages and no more.
 */
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "memory/memory_internal.h"

#define CHUNK 64 /* pages that are given to the back end at a time when lanes make them no neighbours in pages[] */

uint64_t kv_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

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

/* --- pages --- */

/* Adds or takes away the page in the counts that it belongs to; around every change of active and fenced. */
static void count(struct kv_pool *p, const struct kv_page *page, uint64_t one)
{
    p->used_pages += page->active ? one : 0;
    p->fenced_pages += !page->active && page->fenced ? one : 0;
    p->shared_pages += page->active > 1 ? one : 0;
}

static void hold(struct kv_pool *p, struct kv_page *page, int active, int fenced)
{
    count(p, page, (uint64_t)-1);
    page->active += (uint32_t)active;
    page->fenced += (uint32_t)fenced;
    count(p, page, 1);
}

static bool held(const struct kv_page *page)
{
    return page->active || page->fenced;
}

bool kv_page_free(const struct kv_page *page)
{
    return !held(page) && !page->busy && !page->gone;
}

void kv_cold_put(struct kv_pool *p, uint32_t page)
{
    if (!kv_page_free(&p->page[page]) || p->page[page].maps)
        return;
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

/* Free pages at positions from .. of the range, from its end. */
static uint32_t claim_from(struct kv_pool *p, const struct kv_range *r, uint32_t from, uint32_t n, uint32_t *out)
{
    uint32_t got = 0;
    for (uint32_t i = r->mapped; i > from && got < n; i--) {
        uint32_t page = r->pages[i - 1];
        if (page == NO_PAGE || !kv_page_free(&p->page[page]))
            continue;
        p->page[page].busy = true;
        out[got++] = page;
    }
    return got;
}

uint32_t kv_pages_claim(struct kv_pool *p, const struct kv_range *keep, uint32_t keep_from, bool gently, uint32_t n,
                        uint32_t *out)
{
    uint32_t got = 0;
    while (got < n && p->n_cold) {
        out[got] = cold_take(p);
        p->page[out[got++]].busy = true;
    }
    for (struct kv_range *r = p->idle.last; r && got < n; r = r->prev)
        if (r != keep)
            got += claim_from(p, r, 0, n - got, out + got);
    if (gently)
        return got;
    for (uint32_t i = 0; i < p->n_ranges && got < n; i++)
        if (p->ranges[i] != keep && p->ranges[i]->state != RANGE_IDLE)
            got += claim_from(p, p->ranges[i], p->ranges[i]->used, n - got, out + got);
    if (keep)
        got += claim_from(p, keep, keep_from, n - got, out + got);
    return got;
}

void kv_page_unclaim(struct kv_pool *p, uint32_t page)
{
    p->page[page].busy = false;
    kv_cold_put(p, page);
}

/* --- calls into the back end, position by position --- */

/* The part of positions from .. to - 1 that lies in one lane, side by side: false when there is no more. */
struct piece {
    uint32_t lane, from, n; /* positions from, from + lanes, ... */
};

static bool next_piece(const struct kv_pool *p, struct piece *it, uint32_t from, uint32_t to)
{
    if (p->lanes == 1) {
        if (it->n)
            return false;
        *it = (struct piece){0, from, to - from};
        return to > from;
    }
    uint32_t next = it->from + it->n * p->lanes;
    if (it->n == 0 || next >= to) {
        uint32_t lane = it->n ? it->lane + 1 : 0;
        do {
            if (lane == p->lanes)
                return false;
            next = from + (lane + p->lanes - from % p->lanes) % p->lanes;
        } while (next >= to && ++lane);
        it->lane = lane;
    }
    uint32_t n = (to - next + p->lanes - 1) / p->lanes;
    it->from = next;
    it->n = n < CHUNK ? n : CHUNK;
    return true;
}

static enum status_code map_piece(struct kv_pool *p, struct kv_range *r, const struct piece *it, uint64_t *calls,
                                  struct status *st)
{
    uint32_t pages[CHUNK];
    const uint32_t *list = &r->pages[it->from];
    for (uint32_t i = 0; p->lanes > 1 && i < it->n; i++)
        pages[i] = r->pages[it->from + i * p->lanes];
    return p->ops->map(p->be, kv_position_at(p, r, it->from), p->lanes > 1 ? pages : list, it->n, calls, st);
}

enum status_code kv_span_unmap(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to, struct kv_cost *cost,
                               struct status *st)
{
    enum status_code rc = ST_OK;
    uint32_t done = 0;
    uint64_t t = kv_now_ns();
    for (struct piece it = {0}; next_piece(p, &it, from, to); done++)
        if ((rc = p->ops->unmap(p->be, kv_position_at(p, r, it.from), it.n, &cost->calls, st)) != ST_OK)
            break;
    for (struct piece it = {0}; rc != ST_OK && done && next_piece(p, &it, from, to); done--)
        if (map_piece(p, r, &it, &cost->calls, NULL) != ST_OK)
            abort(); /* the machine refuses what it has just had: nobody knows what is mapped */
    cost->ns += kv_now_ns() - t;
    return rc;
}

enum status_code kv_span_map(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to, struct kv_cost *cost,
                             struct status *st)
{
    enum status_code rc = ST_OK;
    uint32_t done = 0;
    uint64_t t = kv_now_ns();
    for (struct piece it = {0}; next_piece(p, &it, from, to); done++)
        if ((rc = map_piece(p, r, &it, &cost->calls, st)) != ST_OK)
            break;
    for (struct piece it = {0}; rc != ST_OK && done && next_piece(p, &it, from, to); done--)
        (void)!p->ops->unmap(p->be, kv_position_at(p, r, it.from), it.n, &cost->calls, NULL);
    cost->ns += kv_now_ns() - t;
    return rc;
}

/* What earlier owners left; pages that lie side by side and are dirty all over with one call. */
enum status_code kv_span_clear(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to, struct kv_cost *cost,
                               struct status *st)
{
    const uint64_t size = p->account.page_bytes;
    enum status_code rc = ST_OK;
    uint64_t t = kv_now_ns();
    for (struct piece it = {0}; rc == ST_OK && next_piece(p, &it, from, to);)
        for (uint32_t i = 0, run; i < it.n && rc == ST_OK; i += run) {
            uint64_t bytes = p->page[r->pages[it.from + i * p->lanes]].dirty;
            for (run = 1; bytes == run * size && i + run < it.n; run++)
                bytes += p->page[r->pages[it.from + (i + run) * p->lanes]].dirty;
            if (bytes == 0)
                continue;
            cost->clears++;
            rc = p->ops->clear(p->be, kv_position_at(p, r, it.from + i * p->lanes), bytes, st);
        }
    cost->ns += kv_now_ns() - t;
    return rc;
}

void kv_positions_forget(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < to; i++) {
        uint32_t page = r->pages[i];
        r->pages[i] = NO_PAGE;
        p->page[page].maps--;
        p->positions--;
        kv_cold_put(p, page);
    }
    while (r->mapped > 0 && r->pages[r->mapped - 1] == NO_PAGE)
        r->mapped--;
}

enum status_code kv_positions_unmap(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to,
                                    struct status *st)
{
    enum status_code rc = kv_span_unmap(p, r, from, to, &p->cost, st);
    if (rc == ST_OK)
        kv_positions_forget(p, r, from, to);
    return rc;
}

/* --- pick --- */

/* How many positions from the first on are as they should be. */
static uint32_t fitting(const struct kv_pool *p, const struct kv_range *r, const uint32_t *prefix, uint32_t n_prefix,
                        uint32_t want)
{
    uint32_t i = 0;
    for (; i < want && i < r->mapped; i++) {
        uint32_t page = r->pages[i];
        if (page == NO_PAGE || (i < n_prefix ? page != prefix[i] : !kv_page_free(&p->page[page])))
            break;
    }
    return i;
}

static enum status_code new_range(struct kv_pool *p, struct kv_range **out, struct status *st)
{
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
    memset(r->pages, 0xff, p->pages_per_slot * sizeof(uint32_t));
    p->ranges[p->n_ranges++] = r;
    list_push_first(&p->idle, r);
    *out = r;
    return ST_OK;
}

/* The least work first: a position to map, a stale one to unmap before. Among equals the one with the fewest pages left
 * over, then the one used last. A range that the mapper works on is passed by: waiting would be exposed. */
enum status_code kv_range_pick(struct kv_pool *p, const uint32_t *prefix, uint32_t n_prefix, uint32_t want,
                               struct kv_range **out, struct status *st)
{
    struct kv_range *best = NULL;
    uint64_t least = UINT64_MAX;
    for (struct kv_range *r = p->idle.first; r && least; r = r->next) {
        if (r->job)
            continue;
        uint64_t fit = fitting(p, r, prefix, n_prefix, want), over = r->mapped > want ? r->mapped - want : 0;
        uint64_t stale = (r->mapped < want ? r->mapped : want) - fit;
        uint64_t work = ((want - fit) * 2 + stale) << 32 | over;
        if (work < least) {
            least = work;
            best = r;
        }
    }
    if (best) {
        *out = best;
        return ST_OK;
    }
    return new_range(p, out, st);
}

/* --- take --- */

/* Makes sure that n positions more can be mapped: takes out what idle ranges have, longest idle first. */
static enum status_code make_room(struct kv_pool *p, const struct kv_range *keep, uint64_t n, struct status *st)
{
    if (p->positions + n <= p->mappings)
        return ST_OK;
    kv_mapper_drain(p);
    for (struct kv_range *r = p->idle.last; r && p->positions + n > p->mappings; r = r->prev)
        for (uint32_t to = r->mapped; r != keep && to > 0 && p->positions + n > p->mappings;) {
            uint32_t from = to - 1;
            while (from > 0 && r->pages[from - 1] != NO_PAGE)
                from--;
            enum status_code rc = kv_positions_unmap(p, r, from, to, st);
            if (rc != ST_OK)
                return rc;
            to = r->mapped;
        }
    if (p->positions + n <= p->mappings)
        return ST_OK;
    return status_set(st, ST_RESOURCE_EXHAUSTED,
                      "%" PRIu64 " pages are mapped, %" PRIu64 " more are needed, the machine allows %" PRIu64
                      " (vm.max_map_count?)",
                      p->positions, n, p->mappings);
}

/* What each position is to hold; claims what lies there already and is free. Returns how many are to be found. */
static uint32_t set_targets(struct kv_pool *p, struct kv_range *r, const uint32_t *prefix, uint32_t n_prefix,
                            uint32_t want)
{
    uint32_t missing = 0;
    for (uint32_t i = r->used; i < want; i++) {
        uint32_t page = i < n_prefix ? prefix[i] : r->pages[i];
        if (i >= n_prefix) {
            if (page != NO_PAGE && kv_page_free(&p->page[page])) {
                p->page[page].busy = true;
            } else {
                page = NO_PAGE;
                missing++;
            }
        }
        p->target[i] = page;
    }
    return missing;
}

static enum status_code find_missing(struct kv_pool *p, struct kv_range *r, uint32_t want, uint32_t missing,
                                     struct status *st)
{
    for (uint32_t i = r->used; missing > 0 && i < want; i++) {
        if (p->target[i] != NO_PAGE)
            continue;
        uint32_t n = 1; /* as many at once as stand side by side */
        while (i + n < want && p->target[i + n] == NO_PAGE)
            n++;
        uint32_t got = kv_pages_claim(p, r, r->used, false, n, &p->target[i]);
        if (got < n) {
            kv_mapper_drain(p); /* the rest is under way in the background */
            got += kv_pages_claim(p, r, r->used, false, n - got, &p->target[i + got]);
        }
        if (got < n)
            return status_set(st, ST_INTERNAL, "%u free pages cannot be found", n - got);
        missing -= n;
        i += n - 1;
    }
    return ST_OK;
}

/* Maps the targets at positions from .. to - 1, none of which is as it should be. */
static enum status_code put_targets(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to,
                                    struct status *st)
{
    enum status_code rc = ST_OK;
    for (uint32_t i = from, n; i < to && rc == ST_OK; i += n) {
        for (n = 0; i + n < to && r->pages[i + n] != NO_PAGE;)
            n++;
        if (n)
            rc = kv_positions_unmap(p, r, i, i + n, st);
        else
            n = 1;
    }
    if (rc != ST_OK)
        return rc;
    memcpy(&r->pages[from], &p->target[from], (to - from) * sizeof *r->pages);
    rc = kv_span_map(p, r, from, to, &p->cost, st);
    if (rc != ST_OK) {
        memset(&r->pages[from], 0xff, (to - from) * sizeof *r->pages);
        return rc;
    }
    for (uint32_t i = from; i < to; i++)
        p->page[r->pages[i]].maps++;
    p->positions += to - from;
    if (r->mapped < to)
        r->mapped = to;
    return ST_OK;
}

static enum status_code map_targets(struct kv_pool *p, struct kv_range *r, uint32_t want, struct status *st)
{
    enum status_code rc = make_room(p, r, want - r->used, st);
    for (uint32_t i = r->used, n; i < want && rc == ST_OK; i += n) {
        for (n = 0; i + n < want && r->pages[i + n] != p->target[i + n];)
            n++;
        if (n)
            rc = put_targets(p, r, i, i + n, st);
        else
            n = 1;
    }
    return rc;
}

/* Dirty pages among those taken; shared ones are as they are. */
static enum status_code clear_targets(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t want,
                                      struct status *st)
{
    uint64_t before = p->cost.clears;
    enum status_code rc = from < want ? kv_span_clear(p, r, from, want, &p->cost, st) : ST_OK;
    if (p->cost.clears == before)
        return rc;
    enum status_code end = p->ops->sync(p->be, rc == ST_OK ? st : NULL);
    return rc == ST_OK ? end : rc;
}

enum status_code kv_range_take(struct kv_pool *p, struct kv_range *r, const uint32_t *prefix, uint32_t n_prefix,
                               uint32_t want, struct status *st)
{
    if (r->job && want > r->job_from)
        kv_mapper_wait(p, r);
    const uint32_t used = r->used, own = used > n_prefix ? used : n_prefix < want ? n_prefix : want;
    uint32_t missing = set_targets(p, r, prefix, n_prefix, want);
    bool moved = missing > 0;
    for (uint32_t i = used; i < own && !moved; i++)
        moved = r->pages[i] != p->target[i];
    enum status_code rc = find_missing(p, r, want, missing, st);
    if (rc == ST_OK && moved)
        rc = map_targets(p, r, want, st);
    if (rc == ST_OK)
        rc = clear_targets(p, r, own, want, st);
    for (uint32_t i = own; i < want; i++)
        if (p->target[i] != NO_PAGE)
            p->page[p->target[i]].busy = false;
    if (rc != ST_OK) {
        for (uint32_t i = own; i < want; i++)
            if (p->target[i] != NO_PAGE)
                kv_cold_put(p, p->target[i]);
        return rc;
    }
    for (uint32_t i = used; i < want; i++) {
        hold(p, &p->page[r->pages[i]], 1, 0);
        if (i >= own)
            p->page[r->pages[i]].dirty = 0;
    }
    if (r->state == RANGE_IDLE)
        list_remove(&p->idle, r);
    r->state = RANGE_ACTIVE;
    r->used = want;
    p->held += want - used;
    return ST_OK;
}

/* --- leave --- */

void kv_range_leave(struct kv_pool *p, struct kv_range *r, enum range_state to, uint64_t step)
{
    const bool fence = to == RANGE_FENCED;
    p->held -= r->used;
    p->longest -= p->longest / LONGEST_ONE;
    if ((uint64_t)r->used * LONGEST_ONE > p->longest)
        p->longest = (uint64_t)r->used * LONGEST_ONE;
    for (uint32_t i = 0; i < r->used; i++)
        hold(p, &p->page[r->pages[i]], -1, fence);
    r->state = to;
    r->fence = step;
    if (!fence)
        r->used = 0;
    if (to != RANGE_SUSPENDED)
        list_push_first(fence ? &p->fenced : &p->idle, r);
}

void kv_range_unfence(struct kv_pool *p, struct kv_range *r)
{
    for (uint32_t i = 0; i < r->used; i++)
        hold(p, &p->page[r->pages[i]], 0, -1);
    list_remove(&p->fenced, r);
    r->used = 0;
    r->state = RANGE_IDLE;
    list_push_first(&p->idle, r);
}

void kv_range_to_idle(struct kv_pool *p, struct kv_range *r)
{
    r->state = RANGE_IDLE;
    list_push_first(&p->idle, r);
}
