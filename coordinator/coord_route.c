/* Which worker group a request goes to, and when it moves. Engine thread.
 *
 *     request ──cheapest──▶ group A: its scheduler: waits, runs
 *                              │ waits too long, or A is lost or to go
 *                              '──▶ group B: goes on, with the tokens that it has
 *
 * Every group has a scheduler of its own, and each request is in one of them from its arrival on. Where is decided by what
 * has to be computed before its first token: prompts that wait or are being computed there, and its own, less what the
 * group's prefix cache has of it; each request that runs there counts as RUNNING_TOKENS more, since it slows down every
 * step. Groups with a slot and pages go before those without, and a group whose step takes long (SLOW_US) goes last, before
 * it is known whether it is lost.
 *
 * What waits is looked over every BALANCE_US: the next of a group that has no room for it goes where there is room, the
 * youngest where it is cheaper by MOVE_TOKENS. A request that holds a slot, or has something in flight, stays.
 *
 * What has lost more groups in a row than half of --replay-limit, without a new token in between, may be what kills them: it
 * waits for the one that it was in, as long as that is awaited, so that the others live.
 *
 * With one group nothing of this happens. */
#include <stdio.h>

#include "coordinator/coord_internal.h"

#define RUNNING_TOKENS 32
#define MOVE_TOKENS    512 /* less is not worth the cached prefix of whoever comes next */
#define BALANCE_US     5000
#define BALANCE_MOVES  32      /* at a time, of each group */
#define SLOW_US        1000000 /* and SLOW_STEPS times its last step */
#define SLOW_STEPS     8

struct fare {
    bool fits, room, slow;
    uint64_t cost; /* tokens */
};

static bool takes(const struct group *g)
{
    return g->serving && !g->draining;
}

static bool is_slow(const struct group *g, int64_t now_us)
{
    int64_t began_us = group_step_began_us(g), limit_us = (int64_t)g->last_step_us * SLOW_STEPS;
    return began_us != INT64_MAX && now_us - began_us > (limit_us > SLOW_US ? limit_us : SLOW_US);
}

/* waits: it is one of those that wait there already. */
static struct fare fare_at(const struct group *g, const struct sched_wish *w, bool waits, int64_t now_us)
{
    struct sched_look look;
    sched_look(g->sched, w, &look);
    struct fare f = {.fits = look.fits, .slow = is_slow(g, now_us)};
    f.room = look.room && !f.slow && (waits || look.waiting == 0);
    f.cost = look.ahead + (waits ? 0 : w->n_tokens) + (uint64_t)look.running * RUNNING_TOKENS;
    f.cost -= f.cost < look.cached ? f.cost : look.cached;
    return f;
}

static bool better(const struct fare *a, const struct fare *b)
{
    if (a->slow != b->slow)
        return b->slow;
    if (a->room != b->room)
        return a->room;
    return a->cost < b->cost;
}

/* The best of the groups that take new requests and can ever run this one; of equal ones that which got least. */
static struct group *best_for(struct engine *e, const struct sched_wish *w, const struct group *except, int64_t now_us,
                              struct fare *fare)
{
    struct group *best = NULL;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = &e->group[i];
        if (g == except || !takes(g))
            continue;
        struct fare f = fare_at(g, w, false, now_us);
        if (!f.fits || (best && better(fare, &f)))
            continue;
        if (best && !better(&f, fare) && g->routed + g->moved >= best->routed + best->moved)
            continue;
        best = g;
        *fare = f;
    }
    return best;
}

/* Nobody serves what it asks for: a group that is awaited and could, else the one with the largest context, whose scheduler
 * will say what is wrong with it. */
static struct group *last_resort(struct engine *e, const struct sched_wish *w)
{
    struct group *largest = NULL;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = &e->group[i];
        struct sched_look look;
        if (!g->sched)
            continue;
        sched_look(g->sched, w, &look);
        if (look.fits && (g->wait_until_us || g->draining || g->serving))
            return g;
        if (!largest || (g->serving && !largest->serving) ||
            (g->serving == largest->serving && g->context > largest->context))
            largest = g;
    }
    return largest;
}

struct group *route_request(struct engine *e, const struct request *r, int64_t now_us)
{
    const struct sched_wish w = {.tokens = r->prompt,
                                 .n_tokens = r->n_prompt,
                                 .n_total = r->n_prompt + r->max_new,
                                 .salt = r->salt,
                                 .cache_read = !r->no_cache_read && r->prompt_top < 0};
    struct fare fare;
    if (e->n_groups == 1)
        return e->group[0].sched ? &e->group[0] : NULL;
    struct group *g = best_for(e, &w, NULL, now_us, &fare);
    return g ? g : last_resort(e, &w);
}

static bool move(struct engine *e, struct group *from, struct group *to, uint64_t id)
{
    if (!sched_move(from->sched, to->sched, id)) /* it stays, and is asked again later */
        return false;
    to->moved++;
    metrics_add(&e->coord->metrics.moved, 1);
    request_moved(e, id, to);
    return true;
}

static bool is_suspect(const struct engine *e, const struct sched_wish *w)
{
    return (uint64_t)w->losses * 2 > e->coord->opt.replay_limit;
}

/* All events of `from` are taken: whoever calls has pumped, or has just lost it. */
void route_leave(struct engine *e, struct group *g, int64_t now_us)
{
    struct sched_wish w;
    struct fare fare;
    uint32_t moved = 0;
    if (!g->sched || !groups_others_serve(e, g))
        return;
    for (uint64_t id = sched_next_waiting(g->sched, 0), next; id; id = next) {
        next = sched_next_waiting(g->sched, id);
        if (!sched_wish_of(g->sched, id, &w) || (is_suspect(e, &w) && g->wait_until_us))
            continue;
        struct group *to = best_for(e, &w, g, now_us, &fare);
        moved += to && move(e, g, to, id);
    }
    if (moved)
        log_line(&e->coord->log, LOG_INFO, "%u requests of group %s go on in others", moved, g->name);
}

/* Somebody else has nobody waiting. */
static bool any_open(const struct engine *e, const struct group *except)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (&e->group[i] != except && takes(&e->group[i]) && sched_queue(e->group[i].sched).requests == 0)
            return true;
    return false;
}

/* One that waits in a group that serves; false: it stays. */
static bool move_one(struct engine *e, struct group *g, uint64_t id, bool next, int64_t now_us)
{
    struct sched_wish w;
    struct fare there = {0};
    if (!id || !sched_wish_of(g->sched, id, &w))
        return false;
    struct fare here = fare_at(g, &w, true, now_us);
    if (next && here.room)
        return false;
    struct group *to = best_for(e, &w, g, now_us, &there);
    if (!to || there.slow || (next ? !there.room : there.cost + MOVE_TOKENS >= here.cost))
        return false;
    return move(e, g, to, id);
}

static void balance_group(struct engine *e, struct group *g, int64_t now_us)
{
    if (!g->sched)
        return;
    if (!takes(g)) {
        route_leave(e, g, now_us);
        return;
    }
    for (int i = 0; i < BALANCE_MOVES; i++) {
        if (!sched_waits(g->sched) || !any_open(e, g))
            return;
        if (!move_one(e, g, sched_first_waiting(g->sched), true, now_us) &&
            !move_one(e, g, sched_last_waiting(g->sched), false, now_us))
            return;
    }
}

/* Somebody waits, and another group is there. */
static bool worth_it(const struct engine *e)
{
    bool waits = false;
    for (uint32_t i = 0; i < e->n_groups; i++)
        waits |= e->group[i].sched && sched_waits(e->group[i].sched);
    return waits && e->n_groups > 1 && groups_others_serve(e, NULL);
}

void route_balance(struct engine *e, int64_t now_us)
{
    if (e->n_groups < 2 || now_us < e->balance_us)
        return;
    e->balance_us = now_us + BALANCE_US;
    if (!worth_it(e))
        return;
    for (uint32_t i = 0; i < e->n_groups; i++)
        balance_group(e, &e->group[i], now_us);
}

int64_t route_next_us(const struct engine *e)
{
    return e->n_groups > 1 && worth_it(e) ? e->balance_us : INT64_MAX;
}
