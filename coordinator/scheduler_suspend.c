/* scheduler_suspend.c - preempted requests whose slot's content waits in the ranks' host memory instead of being computed
 * again.
 *
 * Such a request is PREEMPTED and keeps its slot, and with it all that the ranks know: tokens in the slot, the token that was
 * sampled last, the history of its options. So it goes on where it stopped, even while samples of it are in flight.
 *
 *     preempt, suspend is cheaper        plan k: the ranks move the slot to host memory; its pages come free as released ones
 *     next in line, and there is room    plan j > k: they move it back, into pages of its own; its rows come after j
 *     it ends, or an older one needs a slot       its slot is released
 *
 * Host memory is counted in pages of the worst account, as KV pages are. What a plan resumes is free for the plans after it:
 * ranks take releases, then suspensions, then resumptions.
 */
#include "coordinator/scheduler_internal.h"

#include <assert.h>

void sched_set_suspension(struct sched *s, uint64_t pages, uint64_t bytes_per_s)
{
    s->suspend_pages = s->attached && s->kv.token_bytes ? pages : 0;
    s->suspend_page_us = bytes_per_s ? 2e6 * (double)s->kv.page_bytes / (double)bytes_per_s : 0;
}

void suspend_forget_all(struct sched *s)
{
    s->n_suspending = s->n_suspended = 0;
    s->suspended_pages = s->suspend_pages = 0;
}

/* Whether there and back takes less than computing the rows again that no other slot has. While nobody knows what rows cost,
 * who was given host memory uses it. */
static bool is_cheaper(const struct sched *s, const struct req *r, uint64_t pages)
{
    if (!cost_known(&s->cost))
        return true;
    const uint32_t shared = s->slot_holder[r->slot]->shared, rows = r->n_fed - shared;
    const struct cost_step none = {0}, again = {.rows = rows, .pairs = cost_pairs(shared, rows)};
    return (double)pages * s->suspend_page_us <= cost_predict_us(&s->cost, &again) - cost_predict_us(&s->cost, &none);
}

bool suspend_begin(struct sched *s, struct req *r)
{
    uint64_t pages = kv_pages_for(&s->kv, r->n_fed);
    if (pages == 0 || s->suspended_pages >= s->suspend_pages || pages > s->suspend_pages - s->suspended_pages ||
        !is_cheaper(s, r, pages))
        return false;
    s->owner[r->slot] = NULL;
    cache_forget(s, r->slot);
    s->suspending[s->n_suspending++] = r->slot;
    s->pending_pages += holder_drop(s, r->slot);
    s->n_running--;
    s->n_suspended++;
    s->suspended_pages += pages;
    s->total.suspensions++;
    r->host_pages = pages;
    r->resume_step = s->next_step + 1;
    r->n_indexed = 0;
    r->pages = 0;
    r->cap_tokens = 0;
    return true;
}

void suspend_drop(struct sched *s, struct req *r)
{
    assert(r->host_pages && r->state == REQ_PREEMPTED);
    for (uint32_t i = 0; i < s->n_suspending; i++) /* the ranks were not told yet: it is released from where it is */
        if (s->suspending[i] == r->slot) {
            s->suspending[i] = s->suspending[--s->n_suspending];
            break;
        }
    s->pending[s->n_pending++] = r->slot;
    s->n_suspended--;
    s->suspended_pages -= r->host_pages;
    r->host_pages = 0;
    r->slot = SCHED_NO_SLOT;
    r->n_fed = 0;
    r->decoding = false;
}

bool suspend_give_way(struct sched *s, const struct req *older)
{
    for (struct req *r = s->preempted.tail; r && r->seq > older->seq; r = r->prev)
        if (r->host_pages) {
            suspend_drop(s, r);
            return true;
        }
    return false;
}

uint32_t suspend_tokens(const struct req *r)
{
    uint32_t all = r->n_known + r->n_unknown;
    return all < r->n_total - 1 ? all + !r->decoding : r->n_total - 1;
}

void suspend_end(struct sched *s, struct req *r)
{
    uint64_t pages = kv_pages_for(&s->kv, suspend_tokens(r));
    s->owner[r->slot] = r;
    s->n_running++;
    s->n_suspended--;
    s->free_pages -= pages;
    holder_take(s, r->slot, 0, 0, pages);
    s->total.resumptions++;
    r->host_pages = 0; /* suspended_pages: at the end of the plan */
    r->match_version = UINT64_MAX;
}
