/* scheduler_resize.c - KV memory that the ranks give back, or take again, while they serve.
 *
 * Fewer: free pages leave the account first, and the next plan tells the ranks, which then have them free too (its releases and
 * suspensions come before). More: a plan asks for them, and they count when all ranks have said what they got.
 */
#include "coordinator/scheduler_internal.h"

/* In one plan: the ranks unmap and give back, or take and map, at 20 to 500 us a page on a step's way. */
#define RESIZE_PAGES 64

static uint64_t less(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

void resize_forget(struct sched *s)
{
    s->goal_pages = s->asked_step = 0;
    s->told_pages = s->kv.total_pages;
}

void sched_set_pages(struct sched *s, uint64_t pages)
{
    s->goal_pages = s->attached ? pages : 0;
}

uint64_t resize_limit(const struct sched *s)
{
    return s->goal_pages ? less(s->goal_pages, s->kv.total_pages) : s->kv.total_pages;
}

/* What the largest live request needs to run alone, whatever it shares. */
static uint64_t least_pages(const struct sched *s)
{
    uint64_t most = 1;
    for (uint32_t i = 0; s->map.cell && i <= s->map.mask; i++) {
        const struct req *r = s->map.cell[i];
        uint64_t pages = r ? kv_pages_for(&s->kv, (uint64_t)r->n_total - 1) : 0;
        most = pages > most ? pages : most;
    }
    return most;
}

void resize_take(struct sched *s)
{
    uint64_t total = s->kv.total_pages;
    if (s->goal_pages == 0 || s->asked_step || total <= s->goal_pages)
        return;
    uint64_t least = least_pages(s), to = s->goal_pages > least ? s->goal_pages : least;
    if (total <= to)
        return;
    uint64_t want = less(total - to, RESIZE_PAGES);
    while (want > s->free_pages + s->pending_pages + s->fenced_pages && cache_evict(s, SCHED_NO_SLOT))
        ;
    sched_settle_pending(s);
    uint64_t n = less(want, s->free_pages);
    s->free_pages -= n;
    s->kv.total_pages -= n;
}

bool resize_due(const struct sched *s)
{
    return !s->asked_step && (s->goal_pages > s->kv.total_pages || s->told_pages != s->kv.total_pages);
}

uint64_t resize_tell(struct sched *s)
{
    uint64_t total = s->kv.total_pages;
    if (!resize_due(s))
        return 0;
    if (s->goal_pages > total) {
        s->asked_step = s->next_step;
        s->told_pages = total + less(s->goal_pages - total, RESIZE_PAGES);
    } else {
        s->told_pages = total;
    }
    return s->told_pages;
}

uint64_t sched_pages_asked(const struct sched *s)
{
    return s->asked_step;
}

bool sched_pages_are(struct sched *s, uint64_t pages)
{
    bool fewer = pages < s->told_pages;
    if (!s->asked_step)
        return false;
    s->asked_step = 0;
    pages = less(pages, s->told_pages);
    if (pages > s->kv.total_pages) {
        s->free_pages += pages - s->kv.total_pages;
        s->kv.total_pages = pages;
    }
    if (fewer && s->goal_pages > s->kv.total_pages)
        s->goal_pages = s->kv.total_pages;
    return fewer;
}
