/* The ranks' KV pools: what they count, and memory that they give back or take again while they serve. Engine thread. */
#include <string.h>

#include "coordinator/coord_internal.h"

/* ---- what they count ---- */

static void add(Tandem__V1__KvStats *to, const Tandem__V1__KvStats *s)
{
    to->total_pages += s->total_pages;
    to->mapped_pages += s->mapped_pages;
    to->fenced_pages += s->fenced_pages;
    to->free_pages += s->free_pages;
    to->parked_pages += s->parked_pages;
    to->shared_pages += s->shared_pages;
    to->given_pages += s->given_pages;
    to->wasted_bytes += s->wasted_bytes;
    to->map_calls += s->map_calls;
    to->clear_calls += s->clear_calls;
    to->driver_us += s->driver_us;
    to->exposed_us += s->exposed_us;
    to->failed_ahead += s->failed_ahead;
}

static void add_group(Tandem__V1__KvStats *to, const struct group *g)
{
    for (uint32_t r = 0; g->live && r < g->size; r++)
        if (g->rank[r])
            add(to, &g->rank[r]->kv);
}

void kv_of_group(const struct group *g, Tandem__V1__KvStats *out)
{
    tandem__v1__kv_stats__init(out);
    add_group(out, g);
}

void kv_of_all(const struct engine *e, Tandem__V1__KvStats *out)
{
    tandem__v1__kv_stats__init(out);
    for (uint32_t i = 0; i < e->n_groups; i++)
        add_group(out, &e->group[i]);
}

/* ---- their size ---- */

/* The pages that all ranks have, once each has answered the plan that asked for more. A rank without KV heads has none, and
 * bounds nobody. */
static void check_asked(struct engine *e, struct group *g)
{
    uint64_t asked = sched_pages_asked(g->sched), pages = g->kv_pages_max;
    if (asked == 0)
        return;
    for (uint32_t r = 0; r < g->size; r++) {
        const struct rank_conn *conn = g->rank[r];
        if (conn->last_step < asked)
            return;
        if (conn->kv.total_pages && conn->kv.total_pages < pages)
            pages = conn->kv.total_pages;
    }
    if (!sched_pages_are(g->sched, pages))
        return;
    g->kv_pages_set = sched_load(g->sched).total_pages;
    log_line(&e->coord->log, LOG_WARN,
             "KV memory of group %s: the ranks cannot have more than %llu pages; the machine has no more", g->name,
             (unsigned long long)g->kv_pages_set);
}

void kv_take(struct engine *e, struct rank_conn *conn, const Tandem__V1__StepResult *r)
{
    if (r->kv)
        conn->kv = *r->kv; /* numbers only */
    check_asked(e, conn->group);
}

/* 0: as it is. What it came with may be less than it can have, where only the coordinator is new. */
static void set_pages(struct group *g)
{
    uint64_t most = g->kv_pages_max;
    sched_set_pages(g->sched, g->kv_pages_set < most ? g->kv_pages_set : most);
}

void kv_group_ready(struct group *g)
{
    if (g->kv_pages_set)
        set_pages(g);
}

static enum status_code check_bytes(const struct group *g, uint64_t bytes, struct status *st)
{
    uint64_t page = g->kv.page_bytes, most = g->kv_pages_max * page;
    if (bytes == 0 || (bytes >= page && bytes <= most))
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT,
                      "kv_bytes: %llu, expected %llu (a page) to %llu (what the ranks of group %s came with)",
                      (unsigned long long)bytes, (unsigned long long)page, (unsigned long long)most, g->name);
}

static bool is_meant(const struct group *g, const char *name)
{
    return g->serving && (!name[0] || strcmp(g->name, name) == 0);
}

enum status_code kv_set_memory(struct engine *e, const Tandem__V1__SetKvMemoryRequest *req, const char *peer,
                               Tandem__V1__SetKvMemoryResponse *m, struct status *st)
{
    char name[COORD_MAX_GROUP_NAME + 1];
    uint32_t n = 0;
    text_sanitize(name, sizeof name, req->group, strlen(req->group));
    for (uint32_t i = 0; i < e->n_groups; i++) { /* all or none */
        if (!is_meant(&e->group[i], req->group))
            continue;
        enum status_code rc = check_bytes(&e->group[i], req->kv_bytes, st);
        if (rc != ST_OK)
            return rc;
        n++;
    }
    if (n == 0)
        return name[0] ? status_set(st, ST_NOT_FOUND, "group: \"%s\" does not serve", name)
                       : status_set(st, ST_UNAVAILABLE, "no worker group serves");
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = &e->group[i];
        if (!is_meant(g, req->group))
            continue;
        g->kv_pages_set = req->kv_bytes ? req->kv_bytes / g->kv.page_bytes : g->kv_pages_max;
        set_pages(g);
        m->total_pages += sched_load(g->sched).total_pages;
        m->goal_pages += g->kv_pages_set;
        m->page_bytes = g->kv.page_bytes;
        log_line(&e->coord->log, LOG_INFO, "KV memory of group %s: %llu pages a rank from now on, asked by %s", g->name,
                 (unsigned long long)g->kv_pages_set, peer);
    }
    return ST_OK;
}
