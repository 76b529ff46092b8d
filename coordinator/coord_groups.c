/* The table of worker groups by name. An entry stays when its group goes: the next of this name finds its scheduler there, and
 * in it what waits. When the table is full, an entry that is empty in this sense is used again. Engine thread. */
#include <stdio.h>
#include <string.h>

#include "coordinator/coord_internal.h"

bool group_name_valid(const char *name)
{
    size_t n = strlen(name);
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    return n >= 1 && n <= COORD_MAX_GROUP_NAME && strspn(name, allowed) == n;
}

struct group *group_by_name(struct engine *e, const char *name)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (strcmp(e->group[i].name, name) == 0)
            return &e->group[i];
    return NULL;
}

static void add_load(struct sched_load *to, const struct sched_load *l)
{
    to->queued += l->queued;
    to->running += l->running;
    to->in_flight += l->in_flight;
    to->queued_tokens += l->queued_tokens;
    to->used_pages += l->used_pages;
    to->total_pages += l->total_pages;
    to->kept_pages += l->kept_pages;
    to->shared_pages += l->shared_pages;
    to->kept_slots += l->kept_slots;
    to->cache_hits += l->cache_hits;
    to->cached_tokens += l->cached_tokens;
    to->cache_evictions += l->cache_evictions;
    to->steps += l->steps;
    to->prompt_tokens += l->prompt_tokens;
    to->generated_tokens += l->generated_tokens;
    to->finished += l->finished;
    to->failed += l->failed;
    to->preemptions += l->preemptions;
    to->replays += l->replays;
    to->suspended_slots += l->suspended_slots;
    to->suspended_pages += l->suspended_pages;
    to->suspend_pages += l->suspend_pages;
    to->suspensions += l->suspensions;
    to->resumptions += l->resumptions;
    to->recomputed_tokens += l->recomputed_tokens;
    to->wasted_rows += l->wasted_rows;
}

struct sched_load engine_load(const struct engine *e)
{
    struct sched_load sum = e->retired;
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->group[i].sched) {
            struct sched_load l = sched_load(e->group[i].sched);
            add_load(&sum, &l);
        }
    return sum;
}

/* Whoever looks at it later must not find another group: nothing waits in it, and no Control.Drain for it. */
static bool is_idle(const struct engine *e, const struct group *g)
{
    for (const struct link *l = e->drains.next; l != &e->drains; l = l->next)
        if (container_of(l, struct control_call, link)->group == g)
            return false;
    if (g->live || g->wait_until_us)
        return false;
    if (!g->sched)
        return true;
    struct sched_load l = sched_load(g->sched);
    return l.queued + l.running == 0;
}

static void retire(struct engine *e, struct group *g)
{
    if (g->sched) {
        struct sched_load l = sched_load(g->sched);
        add_load(&e->retired, &l);
        sched_destroy(g->sched);
    }
    if (g->ready)
        protobuf_c_message_free_unpacked(&g->ready->base, NULL);
    memset(g, 0, sizeof *g);
}

enum status_code group_get(struct engine *e, struct group **out, const char *name, struct status *st)
{
    struct group *g = group_by_name(e, name);
    if (!g && e->n_groups < COORD_MAX_GROUPS)
        g = &e->group[e->n_groups++];
    for (uint32_t i = 0; !g && i < e->n_groups; i++)
        if (is_idle(e, &e->group[i])) {
            g = &e->group[i];
            retire(e, g);
        }
    if (!g)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "group: %d groups are attached or awaited: the limit",
                          COORD_MAX_GROUPS);
    snprintf(g->name, sizeof g->name, "%s", name);
    *out = g;
    return ST_OK;
}

bool groups_any_live(const struct engine *e)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->group[i].live)
            return true;
    return false;
}

bool groups_others_serve(const struct engine *e, const struct group *g)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (&e->group[i] != g && e->group[i].serving && !e->group[i].draining)
            return true;
    return false;
}

void groups_fini(struct engine *e)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        retire(e, &e->group[i]);
    if (e->ready)
        protobuf_c_message_free_unpacked(&e->ready->base, NULL);
}
