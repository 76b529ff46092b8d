/* scheduler_check.c - sched_check: what must be true of the scheduler's state between any two calls. */
#include "coordinator/scheduler_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static void broken(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn, cold));
static void broken(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("scheduler invariant broken: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    abort();
}

#define require(ok, ...)                                                                                               \
    do {                                                                                                               \
        if (!(ok))                                                                                                     \
            broken(__VA_ARGS__);                                                                                       \
    } while (0)

struct tally {
    uint32_t live, queued, running, timed;
    uint32_t suspended;
    uint64_t queued_tokens, pages, unknown, host_pages;
};

static void check_running(const struct sched *s, const struct req *r)
{
    unsigned long long id = r->id;
    require(r->slot < s->slots && s->owner[r->slot] == r, "request %llu: slot %u is not its own", id, r->slot);
    const struct holder *h = s->slot_holder[r->slot];
    uint64_t saved = kv_pages_shared(&s->kv, h->shared);
    require(h->pages == r->pages - saved + (s->kv.uneven && saved ? kv_lanes(&s->kv) : 0),
            "request %llu: %llu pages, %u tokens shared, counted %llu", id, (unsigned long long)r->pages, h->shared,
            (unsigned long long)h->pages);
    require(r->pages >= kv_pages_for(&s->kv, r->n_fed), "request %llu: %u tokens fed, %llu pages", id, r->n_fed,
            (unsigned long long)r->pages);
    if (r->decoding)
        require(r->n_fed == r->n_known + r->n_unknown - 1, "request %llu: decodes at %u, knows %u and %u", id, r->n_fed,
                r->n_known, r->n_unknown);
    else
        require(r->n_fed < r->n_known && r->n_unknown == 0, "request %llu: prefills at %u, knows %u and %u", id,
                r->n_fed, r->n_known, r->n_unknown);
}

static void check_suspended(const struct sched *s, const struct req *r)
{
    unsigned long long id = r->id;
    require(r->state == REQ_PREEMPTED && r->pages == 0 && r->slot < s->slots && !s->owner[r->slot] &&
                !s->slot_holder[r->slot],
            "request %llu: suspended in state %d, slot %u", id, (int)r->state, r->slot);
    require(r->host_pages == kv_pages_for(&s->kv, r->n_fed), "request %llu: %llu pages of host memory for %u tokens",
            id, (unsigned long long)r->host_pages, r->n_fed);
    require(r->decoding ? r->n_fed == r->n_known + r->n_unknown - 1 : r->n_fed < r->n_known && r->n_unknown == 0,
            "request %llu: suspended at %u, knows %u and %u", id, r->n_fed, r->n_known, r->n_unknown);
}

static void check_request(const struct sched *s, const struct req *r, struct tally *t)
{
    unsigned long long id = r->id;
    require(r->seq > 0 && r->seq < s->book->next_seq, "request %llu: age %llu", id, (unsigned long long)r->seq);
    require(req_map_find(&s->map, r->id) == r, "request %llu: not found by its id", id);
    require(r->n_known >= r->n_prompt && r->n_known < r->n_total && r->n_known + r->n_unknown <= r->n_total,
            "request %llu: %u prompt, %u known, %u in flight of %u", id, r->n_prompt, r->n_known, r->n_unknown,
            r->n_total);
    require(r->n_unknown <= s->in_flight, "request %llu: %u samples, %u plans in flight", id, r->n_unknown,
            s->in_flight);
    if (r->heap_index != UINT32_MAX) {
        require(r->heap_index < s->heap.count && s->heap.item[r->heap_index] == r, "request %llu: lost deadline", id);
        t->timed++;
    } else {
        require(r->deadline_us == INT64_MAX, "request %llu: its deadline is not watched", id);
    }
    if (r->state == REQ_RUNNING)
        check_running(s, r);
    else if (r->host_pages)
        check_suspended(s, r);
    else
        require(r->slot == SCHED_NO_SLOT && r->pages == 0, "request %llu: waits with slot or pages", id);
    if (r->state == REQ_QUEUED) {
        require(r->n_known == r->n_prompt && r->n_unknown == 0, "request %llu: never admitted, has tokens", id);
        t->queued++;
        t->queued_tokens += r->n_prompt;
    }
    if (r->state == REQ_DRAINING)
        require(r->n_known + r->n_unknown == r->n_total, "request %llu: drains too early", id);
    t->live++;
    t->running += r->state == REQ_RUNNING;
    t->pages += r->pages;
    t->suspended += r->host_pages > 0;
    t->host_pages += r->host_pages;
    t->unknown += r->n_unknown;
}

static void check_list(const struct sched *s, const struct req_list *l, enum req_state state, bool by_age,
                       struct tally *t)
{
    uint64_t seq = 0;
    const struct req *prev = NULL;
    for (const struct req *r = l->head; r; prev = r, r = r->next) {
        unsigned long long id = r->id;
        require(r->state == state, "request %llu: state %d in the list of %d", id, r->state, state);
        require(r->prev == prev && (!by_age || r->seq > seq), "request %llu: out of order", id);
        seq = r->seq;
        check_request(s, r, t);
    }
    require(l->tail == prev, "list of state %d: wrong tail", state);
}

/* Requests of a heap; keys never less than their parent's. */
static uint32_t check_heap(const struct tenant *t, uint32_t cls, const struct req *top)
{
    uint32_t n = 0;
    for (const struct req *r = top; r; r = r->heap_next) {
        n += 1;
        require(r->tenant == t && r->cls == cls && r->state == REQ_QUEUED, "request %llu: in another's queue",
                (unsigned long long)r->id);
        for (const struct req *c = r->heap_child; c; c = c->heap_next)
            require(c->key_us >= r->key_us && (c->heap_prev == r || c->heap_prev->heap_next == c),
                    "request %llu: out of order in its queue", (unsigned long long)c->id);
        n += r->heap_child ? check_heap(t, cls, r->heap_child) : 0;
    }
    return n;
}

static void check_tenants(const struct sched *s)
{
    uint32_t live = 0, queued = 0, of_class[SCHED_CLASSES] = {0};
    uint64_t tokens = 0;
    for (const struct tenant *t = s->tenants.active; t; t = t->next) {
        uint32_t own = 0;
        require(t->n_live > 0, "tenant %llu: active without a request", (unsigned long long)t->account->id);
        for (uint32_t cls = 0; cls < SCHED_CLASSES; cls++) {
            uint32_t n = check_heap(t, cls, t->queue[cls]);
            of_class[cls] += n;
            own += n;
        }
        require(t->n_live <= t->account->n_live && own <= t->account->n_queued &&
                    t->queued_tokens <= t->account->queued_tokens,
                "tenant %llu: fewer requests in all than here", (unsigned long long)t->account->id);
        require(own == t->n_queued, "tenant %llu: %u queued, %u found", (unsigned long long)t->account->id, t->n_queued,
                own);
        live += t->n_live;
        queued += own;
        tokens += t->queued_tokens;
    }
    require(live == s->n_live && queued == s->n_queued && tokens == s->queued_tokens,
            "tenants: %u live, %u queued, %llu tokens; %u, %u, %llu counted", live, queued, (unsigned long long)tokens,
            s->n_live, s->n_queued, (unsigned long long)s->queued_tokens);
    for (uint32_t cls = 0; cls < SCHED_CLASSES; cls++)
        require(of_class[cls] == s->n_class_queued[cls] && (of_class[cls] || s->class_credit[cls] == 0),
                "class %u: %u counted, %u found", cls, s->n_class_queued[cls], of_class[cls]);
}

static void check_book(const struct sched *s)
{
    const struct sched_book *b = s->book;
    const struct sched_config *cfg = &s->cfg;
    uint32_t queued = 0;
    uint64_t tokens = 0;
    for (const struct account *a = b->active; a; a = a->next) {
        require(a->n_live > 0 && a->refs > 0 && account_find(b, a->id) == a, "account %llu: %u requests, %u schedulers",
                (unsigned long long)a->id, a->n_live, a->refs);
        require(!cfg->max_queued_tenant || a->n_queued <= cfg->max_queued_tenant, "account %llu: queue over its limit",
                (unsigned long long)a->id);
        queued += a->n_queued;
        tokens += a->queued_tokens;
    }
    require(queued == b->n_queued && tokens == b->queued_tokens, "book: %u queued, %u found", b->n_queued, queued);
    require(queued <= cfg->max_queued && tokens <= cfg->max_queued_tokens, "queue: over its limit");
}

static void check_lists(const struct sched *s, struct tally *t)
{
    check_list(s, &s->run, REQ_RUNNING, true, t);
    check_list(s, &s->preempted, REQ_PREEMPTED, true, t);
    check_list(s, &s->queued, REQ_QUEUED, true, t);
    check_list(s, &s->draining, REQ_DRAINING, false, t);
    check_tenants(s);
    check_book(s);
}

/* Every slot is in exactly one place, every page is counted once. */
static void check_memory(const struct sched *s, const struct tally *t)
{
    if (!s->attached) {
        require(t->running == 0 && s->in_flight == 0 && s->n_pending == 0, "no group, but slots or plans");
        return;
    }
    uint8_t *seen = calloc(s->slots, 1);
    require(seen, "out of memory");
    uint32_t owned = 0;
    for (uint32_t i = 0; i < s->slots; i++) {
        if (s->owner[i]) {
            require(s->owner[i]->seq && s->owner[i]->slot == i, "slot %u: wrong owner", i);
            seen[i]++;
            owned++;
        }
    }
    for (uint32_t i = 0; i < s->n_free; i++)
        seen[s->free_slot[(s->free_first + i) % s->slots]]++;
    for (uint32_t i = 0; i < s->n_pending; i++)
        seen[s->pending[i]]++;
    for (const struct req *r = s->preempted.head; r; r = r->next)
        if (r->host_pages)
            seen[r->slot]++;
    require(t->suspended == s->n_suspended && s->n_suspending <= s->n_suspended &&
                t->host_pages == s->suspended_pages && s->suspended_pages <= s->suspend_pages,
            "%u requests suspended in %llu pages, %u in %llu counted", t->suspended, (unsigned long long)t->host_pages,
            s->n_suspended, (unsigned long long)s->suspended_pages);
    uint64_t held = 0;
    for (uint32_t i = 0; i < s->slots; i++) {
        bool parked = s->prefix && prefix_parked(s->prefix, i);
        seen[i] += parked;
        require((s->slot_holder[i] != NULL) == (parked || s->owner[i]), "slot %u: wrong holder", i);
        require(!s->prefix || s->slot_holder[i] || prefix_tokens(s->prefix, i) == 0, "slot %u: indexed, but empty", i);
    }
    for (uint32_t i = 0; i < 2 * s->slots; i++) {
        const struct holder *h = &s->holders[i];
        held += h->pages;
        require(!h->ghost || (h->child && h->child->next), "a ghost without two sharers");
        for (const struct holder *c = h->child; c; c = c->next)
            require(c->parent == h && c->shared > h->shared, "a sharer of %u tokens, its parent shares %u", c->shared,
                    h->shared);
    }
    require(held == s->held_pages, "pages: %llu held, %llu counted", (unsigned long long)held,
            (unsigned long long)s->held_pages);
    for (uint32_t i = 0; i < s->slots; i++)
        require(seen[i] == 1, "slot %u: in %u places", i, seen[i]);
    free(seen);
    require(owned == t->running && owned == s->n_running, "%u slots owned, %u requests run", owned, t->running);
    require(s->free_pages + s->pending_pages + s->fenced_pages + s->held_pages == s->kv.total_pages,
            "pages: %llu free + %llu pending + %llu fenced + %llu held, of %llu", (unsigned long long)s->free_pages,
            (unsigned long long)s->pending_pages, (unsigned long long)s->fenced_pages,
            (unsigned long long)s->held_pages, (unsigned long long)s->kv.total_pages);
    require(s->in_flight <= s->cfg.depth, "%u plans in flight", s->in_flight);
    require(s->in_flight > 0 || (s->fenced_pages == 0 && s->draining.head == NULL),
            "fence or draining requests without a step in flight");
}

static void check_flight(const struct sched *s, const struct tally *t)
{
    uint64_t unknown = 0;
    for (uint64_t step = s->next_step - s->in_flight; s->attached && step < s->next_step; step++) {
        const struct flight *f = &s->flight[step % SCHED_MAX_DEPTH];
        for (uint32_t i = 0; i < f->n_samples; i++)
            unknown += f->sample[i].req->seq == f->sample[i].seq;
    }
    require(unknown == t->unknown, "%llu samples in flight, requests wait for %llu", (unsigned long long)unknown,
            (unsigned long long)t->unknown);
}

void sched_check(const struct sched *s)
{
    struct tally t = {0};
    check_lists(s, &t);
    require(t.live == s->n_live && t.live == s->map.count, "%u requests live, %u counted, %u mapped", t.live, s->n_live,
            s->map.count);
    require(t.queued == s->n_queued && t.queued_tokens == s->queued_tokens, "queue: %u counted, %u found", s->n_queued,
            t.queued);
    require(t.timed == s->heap.count, "%u deadlines, %u requests have one", s->heap.count, t.timed);
    for (uint32_t i = 1; i < s->heap.count; i++)
        require(s->heap.item[(i - 1) / 2]->deadline_us <= s->heap.item[i]->deadline_us, "deadline heap: order");
    require(s->events.count + (uint64_t)s->n_live <= s->events.capacity, "no room for terminal events");
    check_memory(s, &t);
    check_flight(s, &t);
}
