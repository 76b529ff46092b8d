/* scheduler_share.c - who shares pages with whom: each page is counted once, at the holder that it came from.
 *
 * A holder is a slot's worth of pages. One that began as another's holds only what is behind the pages they share:
 *
 *     A |####|####|####|###     |            A: 4 pages, of which B shares 2
 *     B      (2 of A)  |####|#  |            B: kv_pages_added(tokens, shared)
 *
 * When A's slot is given back while B lives, the pages that B shares stay: A is a holder without a slot, a ghost, as
 * long and as large as the furthest of those who share. Ghosts number less than slots: each has a slot that shares.
 */
#include "coordinator/scheduler_internal.h"

#include <assert.h>

void holders_init(struct sched *s)
{
    s->held_pages = 0;
    s->free_holder = NULL;
    for (uint32_t i = 2 * s->slots; i-- > 0;) {
        s->holders[i] = (struct holder){.next = s->free_holder};
        s->free_holder = &s->holders[i];
    }
}

/* What ranks that differ may round otherwise, where a holder's first page is not its own: as in kv_pages_added. */
static uint64_t slack(const struct sched *s, uint32_t shared)
{
    return s->kv.uneven && kv_pages_shared(&s->kv, shared) ? kv_lanes(&s->kv) : 0;
}

/* Pages that the holder shares with others: whole ones up to where the furthest sharer leaves. */
static uint64_t shared_pages(const struct sched *s, const struct holder *h)
{
    uint32_t furthest = 0;
    for (const struct holder *c = h->child; c; c = c->next)
        furthest = c->shared > furthest ? c->shared : furthest;
    return kv_pages_shared(&s->kv, furthest) - kv_pages_shared(&s->kv, h->shared);
}

/* What is left of a holder without a slot. */
static uint64_t ghost_pages(const struct sched *s, const struct holder *h)
{
    return shared_pages(s, h) + slack(s, h->shared);
}

static void link_child(struct holder *parent, struct holder *h)
{
    h->parent = parent;
    h->prev = NULL;
    h->next = parent->child;
    if (parent->child)
        parent->child->prev = h;
    parent->child = h;
}

static void unlink_child(struct holder *h)
{
    if (h->prev)
        h->prev->next = h->next;
    else
        h->parent->child = h->next;
    if (h->next)
        h->next->prev = h->prev;
    h->parent = h->prev = h->next = NULL;
}

/* Of `from` the first `tokens` tokens; where these are not its own, of whom it has them. */
static struct holder *source_of(struct holder *from, uint32_t tokens)
{
    while (from->parent && tokens <= from->shared)
        from = from->parent;
    return from;
}

uint64_t holder_depth(const struct sched *s, uint32_t from, uint32_t tokens)
{
    uint64_t n = 1;
    for (const struct holder *h = source_of(s->slot_holder[from], tokens); h->parent; h = h->parent)
        n++;
    return n;
}

void holder_take(struct sched *s, uint32_t slot, uint32_t from, uint32_t shared, uint64_t pages)
{
    struct holder *h = s->free_holder;
    assert(h);
    s->free_holder = h->next;
    *h = (struct holder){.shared = shared, .pages = pages};
    if (shared)
        link_child(source_of(s->slot_holder[from], shared), h);
    s->slot_holder[slot] = h;
    s->held_pages += pages;
}

void holder_add(struct sched *s, uint32_t slot, uint64_t pages)
{
    s->slot_holder[slot]->pages += pages;
    s->held_pages += pages;
}

void holder_trim(struct sched *s, uint32_t slot, uint64_t pages)
{
    assert(pages <= s->slot_holder[slot]->pages);
    s->slot_holder[slot]->pages -= pages;
    s->held_pages -= pages;
}

static void put(struct sched *s, struct holder *h)
{
    if (h->parent)
        unlink_child(h);
    *h = (struct holder){.next = s->free_holder};
    s->free_holder = h;
}

/* A ghost with one sharer left becomes a part of it: so there are always fewer ghosts than slots. Returns what is saved:
 * there is one holder less that rounds. */
static uint64_t merge_only_child(struct sched *s, struct holder *h)
{
    struct holder *c = h->child, *parent = h->parent;
    uint64_t saved = slack(s, c->shared);
    unlink_child(c);
    c->shared = h->shared;
    c->pages += h->pages - saved;
    put(s, h);
    if (parent)
        link_child(parent, c);
    return saved;
}

/* A ghost nobody shares with any more goes; one with sharers shrinks to what they need. Returns pages that come free. */
static uint64_t settle_ghost(struct sched *s, struct holder *h)
{
    uint64_t freed = 0;
    while (h && h->ghost) {
        struct holder *parent = h->parent;
        uint64_t pages = h->child ? ghost_pages(s, h) : 0;
        assert(pages <= h->pages);
        freed += h->pages - pages;
        h->pages = pages;
        if (h->child) {
            if (!h->child->next)
                freed += merge_only_child(s, h);
            break;
        }
        put(s, h);
        h = parent;
    }
    s->held_pages -= freed;
    return freed;
}

uint64_t holder_drop(struct sched *s, uint32_t slot)
{
    struct holder *h = s->slot_holder[slot];
    s->slot_holder[slot] = NULL;
    h->ghost = true;
    return settle_ghost(s, h);
}

uint64_t holders_running(const struct sched *s)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < s->slots; i++)
        pages += s->owner[i] ? s->slot_holder[i]->pages : 0;
    return pages;
}

uint64_t holders_shared(const struct sched *s)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; s->attached && i < 2 * s->slots; i++)
        pages += s->holders[i].child ? shared_pages(s, &s->holders[i]) : 0;
    return pages;
}
