/* scheduler_queue.c - requests that wait for their first admission: which is next, and which is not taken at all.
 *
 * Next is, in this order:
 *
 *     preempted ones      oldest first
 *     class               the highest with requests; but of all tokens admitted from a class, each lower one that waits gets
 *                         a credit of 1/RESERVE, and goes first as soon as it can pay for its request with that
 *     tenant              the one that was served least: prompt tokens and, heavier, generated ones (a virtual token
 *                         counter, arXiv 2401.00588). A tenant that comes back after a pause starts at the least of those
 *                         that are there, so that nobody saves up
 *     key                 arrival + age_us_per_token x prompt tokens, but at most + TTFT target: shorter prompts pass longer
 *                         ones that came not too long before them. Keys do not change, so the order is a heap, and whoever
 *                         waited long enough cannot be passed any more
 *
 * Whoever is next waits for room, and all others with it, so that large requests get theirs.
 */
#include <stdlib.h>

#include "coordinator/scheduler_internal.h"

#define RESERVE      8
#define RETRY_MIN_MS 50
#define RETRY_MAX_MS 60000
#define RETRY_MS     1000 /* while the pace is not known */
/* Waits are predicted from what is there; what comes later and goes first (other tenants, shorter prompts) and memory that
 * is not free yet make them longer. The margin follows the quantile of actual over predicted waits. */
#define MARGIN_QUANTILE 0.98
#define MARGIN_RATE     0.1
#define MARGIN_MAX      8.0
#define MARGIN_FROM_US  100000 /* shorter predictions teach nothing */

/* ---- a pairing heap through the requests themselves ---- */

static bool before(const struct req *a, const struct req *b)
{
    return a->key_us != b->key_us ? a->key_us < b->key_us : a->seq < b->seq;
}

static struct req *meld(struct req *a, struct req *b)
{
    if (!a || !b)
        return a ? a : b;
    if (before(b, a)) {
        struct req *t = a;
        a = b;
        b = t;
    }
    b->heap_next = a->heap_child;
    if (b->heap_next)
        b->heap_next->heap_prev = b;
    b->heap_prev = a;
    a->heap_child = b;
    return a;
}

/* The children of a removed top: melded in pairs, then from the last pair back. */
static struct req *meld_children(struct req *first)
{
    struct req *pairs = NULL, *top = NULL;
    while (first) {
        struct req *a = first, *b = a->heap_next;
        first = b ? b->heap_next : NULL;
        a->heap_next = a->heap_prev = NULL;
        if (b)
            b->heap_next = b->heap_prev = NULL;
        a = meld(a, b);
        a->heap_next = pairs;
        pairs = a;
    }
    while (pairs) {
        struct req *next = pairs->heap_next;
        pairs->heap_next = NULL;
        top = meld(top, pairs);
        pairs = next;
    }
    return top;
}

static void heap_take(struct req **top, struct req *r)
{
    struct req *rest = meld_children(r->heap_child);
    if (r == *top) {
        *top = rest;
    } else {
        if (r->heap_prev->heap_child == r)
            r->heap_prev->heap_child = r->heap_next;
        else
            r->heap_prev->heap_next = r->heap_next;
        if (r->heap_next)
            r->heap_next->heap_prev = r->heap_prev;
        *top = meld(*top, rest);
    }
    r->heap_child = r->heap_next = r->heap_prev = NULL;
}

void queue_charge(struct req *r, uint64_t tokens)
{
    r->tenant->account->served += tokens;
}

/* ---- in and out ---- */

int64_t prefill_key_us(const struct sched *s, const struct req *r, int64_t arrived_us, uint32_t tokens)
{
    int64_t behind_us = (int64_t)s->cfg.age_us_per_token * tokens;
    if (r->ttft_target_us && behind_us > r->ttft_target_us)
        behind_us = r->ttft_target_us;
    return arrived_us + behind_us;
}

void queue_add(struct sched *s, struct req *r, int64_t now_us)
{
    struct tenant *t = r->tenant;
    /* without ageing not even by a clock that stands still: by age */
    r->key_us = s->cfg.age_us_per_token ? prefill_key_us(s, r, now_us, r->n_prompt) : 0;
    run_insert(&s->queued, r); /* at the end, unless it comes from another group */
    t->queue[r->cls] = meld(t->queue[r->cls], r);
    tenant_queue(s, t, r->n_prompt);
    s->n_class_queued[r->cls]++;
}

void queue_remove(struct sched *s, struct req *r)
{
    struct tenant *t = r->tenant;
    req_list_remove(&s->queued, r);
    heap_take(&t->queue[r->cls], r);
    tenant_unqueue(s, t, r->n_prompt);
    if (--s->n_class_queued[r->cls] == 0)
        s->class_credit[r->cls] = 0;
}

void run_insert(struct req_list *l, struct req *r)
{
    struct req *older = l->tail;
    while (older && older->seq > r->seq)
        older = older->prev;
    req_list_insert(l, r, older ? older->next : l->head);
}

static struct req *next_of_class(const struct sched *s, uint32_t cls)
{
    const struct tenant *best = NULL;
    for (const struct tenant *t = s->tenants.active; t; t = t->next) {
        if (!t->queue[cls])
            continue;
        uint64_t served = t->account->served, least = best ? best->account->served : UINT64_MAX;
        if (!best || served < least || (served == least && before(t->queue[cls], best->queue[cls])))
            best = t;
    }
    return best ? best->queue[cls] : NULL;
}

struct req *queue_next(const struct sched *s)
{
    if (s->preempted.head)
        return s->preempted.head;
    if (s->n_queued == 0)
        return NULL;
    uint32_t top = 0;
    while (s->n_class_queued[top] == 0)
        top++;
    for (uint32_t cls = SCHED_CLASSES - 1; cls > top; cls--) {
        struct req *r = s->n_class_queued[cls] ? next_of_class(s, cls) : NULL;
        if (r && s->class_credit[cls] >= r->n_prompt)
            return r;
    }
    return next_of_class(s, top);
}

void queue_admit(struct sched *s, struct req *r)
{
    if (r->state == REQ_PREEMPTED) {
        req_list_remove(&s->preempted, r);
        run_insert(&s->run, r);
        return;
    }
    bool passes = false; /* it goes before a higher class, so it pays */
    for (uint32_t cls = 0; cls < SCHED_CLASSES; cls++) {
        if (cls < r->cls)
            passes |= s->n_class_queued[cls] > 0;
        else if (cls > r->cls && s->n_class_queued[cls] > 0)
            s->class_credit[cls] += (r->n_prompt + RESERVE - 1) / RESERVE;
    }
    if (passes)
        s->class_credit[r->cls] -= r->n_prompt;
    queue_charge(r, r->n_prompt);
    queue_remove(s, r);
    run_insert(&s->run, r);
}

/* ---- what is not taken ---- */

/* Prompt tokens of a tenant that go before one with this key. */
static uint64_t tokens_ahead(const struct sched *s, const struct tenant *t, uint32_t cls, int64_t key_us)
{
    uint64_t tokens = 0;
    for (const struct req *r = t->n_queued ? s->queued.head : NULL; r; r = r->next)
        if (r->tenant == t && r->cls <= cls && r->key_us <= key_us)
            tokens += r->n_prompt;
    return tokens;
}

/* Tokens that are computed before a request submitted now, its own included. Other tenants get as much as this one while
 * it is served, if they ask for as much. */
static uint64_t work_until(const struct sched *s, int64_t now_us, uint64_t tenant, uint32_t cls, uint32_t n_prompt,
                           int64_t ttft_target_us)
{
    const struct tenant *own = tenant_find(s, tenant);
    struct req probe = {.ttft_target_us = ttft_target_us};
    int64_t key_us = s->cfg.age_us_per_token ? prefill_key_us(s, &probe, now_us, n_prompt) : 0;
    uint64_t mine = n_prompt + (own ? tokens_ahead(s, own, cls, key_us) : 0), all = mine;
    for (const struct tenant *t = s->tenants.active; t; t = t->next)
        if (t != own)
            all += t->queued_tokens < mine ? t->queued_tokens : mine;
    for (const struct req *r = s->run.head; r; r = r->next)
        all += r->decoding ? 0 : r->n_known - r->n_fed;
    for (const struct req *r = s->preempted.head; r; r = r->next)
        all += r->host_pages ? (r->n_fed < r->n_known ? r->n_known - r->n_fed : 0) : r->n_known;
    return all;
}

static int64_t wait_us(const struct sched *s, uint64_t tokens)
{
    if (s->backlog_us < 1e5 || s->backlog_tokens < 1) /* too little was seen */
        return 0;
    return (int64_t)((double)tokens * s->backlog_us / s->backlog_tokens);
}

void queue_learn(struct sched *s, const struct req *r, int64_t now_us)
{
    if (r->predicted_us < MARGIN_FROM_US || r->preemptions || r->replays)
        return;
    bool longer = (double)(now_us - r->arrived_us) > s->margin * (double)r->predicted_us;
    s->margin += MARGIN_RATE * (longer ? MARGIN_QUANTILE : MARGIN_QUANTILE - 1);
    s->margin = s->margin < 1 ? 1 : s->margin > MARGIN_MAX ? MARGIN_MAX : s->margin;
}

/* A server that is not behind is not slow: what the last backlog went at says little. */
static bool has_backlog(const struct sched *s)
{
    return s->n_queued > 0 || s->preempted.head;
}

int64_t sched_predict_ttft_us(const struct sched *s, uint64_t tenant, int32_t priority, uint32_t n_prompt)
{
    return wait_us(s, work_until(s, s->last_result_us, tenant, (uint32_t)(1 - priority), n_prompt, 0));
}

uint32_t sched_retry_ms(const struct sched *s)
{
    if (s->backlog_us < 1e5 || s->backlog_tokens < 1)
        return RETRY_MS;
    double ms = (double)s->queued_tokens * s->backlog_us / s->backlog_tokens / 1000 / 2;
    return ms < RETRY_MIN_MS ? RETRY_MIN_MS : ms > RETRY_MAX_MS ? RETRY_MAX_MS : (uint32_t)ms;
}

int64_t queue_predict_us(const struct sched *s, int64_t now_us, const struct sched_request *req)
{
    int64_t target_us = req->ttft_target_us ? req->ttft_target_us : s->cfg.ttft_target_us;
    if (!has_backlog(s))
        return 0;
    return wait_us(s, work_until(s, now_us, req->tenant, (uint32_t)(1 - req->priority), req->n_prompt, target_us));
}

static enum status_code check_time(const struct sched *s, int64_t now_us, const struct sched_request *req,
                                   struct status *st)
{
    int64_t target_us = req->ttft_target_us ? req->ttft_target_us : s->cfg.ttft_target_us;
    bool targeted = s->cfg.refuse_late && target_us > 0;
    if ((!targeted && req->deadline_us == INT64_MAX) || !has_backlog(s))
        return ST_OK;
    int64_t us = queue_predict_us(s, now_us, req);
    if (targeted)
        us = (int64_t)((double)us * s->margin);
    if (targeted && us > target_us)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "overloaded: the first token would take about %lld ms, the target is %lld ms",
                          (long long)us / 1000, (long long)target_us / 1000);
    if (req->deadline_us != INT64_MAX && us > req->deadline_us - now_us && req->deadline_us > now_us)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "overloaded: the first token would take about %lld ms, the deadline is in %lld ms",
                          (long long)us / 1000, (long long)(req->deadline_us - now_us) / 1000);
    return ST_OK;
}

enum status_code queue_check(const struct sched *s, int64_t now_us, const struct sched_request *req, struct status *st)
{
    const struct sched_config *cfg = &s->cfg;
    const struct sched_book *b = s->book;
    const struct account *a = account_find(b, req->tenant);
    if (b->n_queued >= cfg->max_queued)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "the queue is full: %u requests wait (max_queued %u)", b->n_queued,
                          cfg->max_queued);
    if (b->queued_tokens + req->n_prompt > cfg->max_queued_tokens)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "the queue is full: %llu prompt tokens wait, %u more would pass max_queued_tokens %llu",
                          (unsigned long long)b->queued_tokens, req->n_prompt,
                          (unsigned long long)cfg->max_queued_tokens);
    if (a && cfg->max_queued_tenant && a->n_queued >= cfg->max_queued_tenant)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "the tenant's queue is full: %u requests wait (max_queued_tenant %u)", a->n_queued,
                          cfg->max_queued_tenant);
    if (a && cfg->max_queued_tokens_tenant && a->n_queued &&
        a->queued_tokens + req->n_prompt > cfg->max_queued_tokens_tenant)
        return status_set(st, ST_RESOURCE_EXHAUSTED,
                          "the tenant's queue is full: %llu prompt tokens wait, %u more would pass "
                          "max_queued_tokens_tenant %llu",
                          (unsigned long long)a->queued_tokens, req->n_prompt,
                          (unsigned long long)cfg->max_queued_tokens_tenant);
    return check_time(s, now_us, req, st);
}
