/* scheduler_move.c - requests that hold nothing of their group go to another: how they would fare there, and the move. */
#include <string.h>

#include "coordinator/scheduler_internal.h"

/* No slot, nothing of it in flight or in the ranks' host memory: whatever its group does, it does not change any more. */
static bool movable(const struct req *r)
{
    return (r->state == REQ_QUEUED || r->state == REQ_PREEMPTED) && r->slot == SCHED_NO_SLOT && r->n_unknown == 0 &&
           r->n_scored == r->n_scores_known && r->host_pages == 0;
}

static const struct req *first_movable(const struct req *r)
{
    while (r && !movable(r))
        r = r->next;
    return r;
}

uint64_t sched_next_waiting(const struct sched *s, uint64_t id)
{
    const struct req *r = id ? req_map_find(&s->map, id) : NULL;
    bool queued = r && r->state == REQ_QUEUED;
    const struct req *next = first_movable(r ? r->next : s->preempted.head);
    if (!next && !queued)
        next = first_movable(s->queued.head);
    return next ? next->id : 0;
}

uint64_t sched_first_waiting(const struct sched *s)
{
    const struct req *r = queue_next(s);
    return r && movable(r) ? r->id : 0;
}

bool sched_waits(const struct sched *s)
{
    return s->n_queued > 0 || s->preempted.head;
}

struct sched_queue sched_queue(const struct sched *s)
{
    return (struct sched_queue){s->n_queued, s->queued_tokens};
}

uint32_t sched_runs(const struct sched *s)
{
    return s->n_live - s->n_queued;
}

uint64_t sched_last_waiting(const struct sched *s)
{
    return s->queued.tail ? s->queued.tail->id : 0;
}

/* What can_admit of scheduler_plan.c would find, parked slots out of the way. */
static bool has_room(const struct sched *s, const struct sched_wish *w, uint32_t cached)
{
    uint64_t growth = 0;
    if (s->n_running >= s->slots)
        return false;
    for (const struct req *r = s->run.head; r; r = r->next)
        growth += req_growth(r);
    uint32_t known = w->n_tokens + 1 < w->n_total ? w->n_tokens + 1 : w->n_total - 1;
    uint64_t need = kv_pages_added(&s->kv, known, cached) + kv_pages_for(&s->kv, growth);
    return need <= s->kv.total_pages - holders_running(s);
}

/* Prompt tokens that are computed before one that comes now. */
static uint64_t work_ahead(const struct sched *s)
{
    uint64_t tokens = s->queued_tokens;
    for (const struct req *r = s->preempted.head; r; r = r->next)
        tokens += r->n_known;
    for (const struct req *r = s->run.head; r; r = r->next)
        tokens += r->decoding ? 0 : r->n_known - r->n_fed;
    return tokens;
}

void sched_look(const struct sched *s, const struct sched_wish *w, struct sched_look *out)
{
    uint32_t slot = 0;
    *out = (struct sched_look){.running = s->n_running, .waiting = s->n_queued};
    uint64_t pages = s->kv.page_bytes ? kv_pages_for(&s->kv, (uint64_t)w->n_total - 1) : 0;
    out->fits = w->n_total <= s->max_context && pages <= resize_limit(s);
    if (!s->attached || s->kv.page_bytes == 0 || !out->fits)
        return;
    if (s->prefix && w->cache_read)
        out->cached = prefix_match(s->prefix, w->salt, w->tokens, w->n_tokens - 1, &slot);
    out->ahead = work_ahead(s);
    out->room = has_room(s, w, out->cached);
}

bool sched_wish_of(const struct sched *s, uint64_t id, struct sched_wish *out)
{
    const struct req *r = req_map_find(&s->map, id);
    if (!r)
        return false;
    *out = (struct sched_wish){.tokens = r->tokens,
                               .n_tokens = r->n_known,
                               .n_total = r->n_total,
                               .salt = r->salt,
                               .cache_read = r->cache_read,
                               .losses = r->losses};
    return true;
}

bool sched_move(struct sched *from, struct sched *to, uint64_t id)
{
    struct req *r = req_map_find(&from->map, id), *new = NULL;
    if (!r || !movable(r) || from == to)
        return false;
    if (!req_map_reserve(&to->map) || !req_heap_reserve(&to->heap) ||
        !event_ring_reserve(&to->events, (uint64_t)to->n_live + 1) || !(new = req_pool_get(&to->pool)))
        return false;
    struct tenant *tenant = tenant_get(to, r->tenant->account->id);
    if (!tenant) {
        req_pool_put(&to->pool, new);
        return false;
    }
    bool queued = r->state == REQ_QUEUED;
    if (queued)
        queue_remove(from, r);
    else
        req_list_remove(&from->preempted, r);
    req_heap_remove(&from->heap, r);
    req_map_remove(&from->map, r);
    tenant_put(from, r->tenant);
    from->n_live--;
    *new = *r;
    r->tokens = NULL; /* the new one's now */
    req_pool_put(&from->pool, r);
    new->tenant = tenant;
    new->heap_child = new->heap_next = new->heap_prev = new->next = new->prev = NULL;
    new->heap_index = UINT32_MAX;
    new->n_match = 0;
    new->match_version = UINT64_MAX;
    new->plan_seq = 0;
    if (queued)
        queue_add(to, new, new->arrived_us);
    else
        run_insert(&to->preempted, new);
    req_map_add(&to->map, new);
    if (new->deadline_us != INT64_MAX)
        req_heap_add(&to->heap, new);
    to->n_live++;
    return true;
}
