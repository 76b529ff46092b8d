/* coord_live.c - what the page at / shows: the last steps, groups and ranks as the engine published them, and the metrics.
 *
 * The engine writes under live.mu, for some ten nanoseconds a step; the HTTP thread copies under it and writes JSON after. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_http_internal.h"
#include "coordinator/coord_internal.h"

#define LIVE_STEPS  256
#define LIVE_RANKS  256 /* of all groups; those past it are not shown */
#define LIVE_GROUPS 64

struct live_step {
    uint64_t epoch, step, took_us; /* 0: its result is not here */
    uint32_t decodes, chunk_rows;
};

struct live_rank {
    uint32_t group, rank; /* group: an index */
    uint64_t step;
    uint32_t silent_ms;
};

struct live_group {
    char name[COORD_MAX_GROUP_NAME + 1];
    uint64_t epoch, pages_used, pages_total;
    uint32_t size, n_attached, running, queued;
    bool serving;
};

struct live_facts {
    struct live_step step[LIVE_STEPS]; /* a ring */
    uint64_t n_steps;
    struct live_group group[LIVE_GROUPS];
    struct live_rank rank[LIVE_RANKS];
    uint32_t n_groups, n_ranks;
};

struct live {
    pthread_mutex_t mu;
    struct live_facts facts; /* mu */
};

enum status_code live_create(struct live **out, struct status *st)
{
    struct live *l = calloc(1, sizeof *l);
    if (!l)
        return status_nomem(st, "live page", sizeof *l);
    pthread_mutex_init(&l->mu, NULL);
    *out = l;
    return ST_OK;
}

void live_destroy(struct live *l)
{
    if (!l)
        return;
    pthread_mutex_destroy(&l->mu);
    free(l);
}

/* ---- engine thread ---- */

void live_plan(struct live *l, uint64_t epoch, const struct sched_plan *plan)
{
    if (!l || plan->rows == 0)
        return;
    pthread_mutex_lock(&l->mu);
    l->facts.step[l->facts.n_steps++ % LIVE_STEPS] = (struct live_step){
        .epoch = epoch, .step = plan->step, .decodes = plan->n_decode, .chunk_rows = plan->cost.rows};
    pthread_mutex_unlock(&l->mu);
}

void live_result(struct live *l, uint64_t epoch, uint64_t step, uint64_t took_us)
{
    if (!l)
        return;
    pthread_mutex_lock(&l->mu);
    uint64_t n = l->facts.n_steps, oldest = n > LIVE_STEPS ? n - LIVE_STEPS : 0;
    while (n-- > oldest) { /* one of the newest */
        struct live_step *s = &l->facts.step[n % LIVE_STEPS];
        if (s->epoch == epoch && s->step <= step) {
            if (s->step == step)
                s->took_us = took_us ? took_us : 1;
            break;
        }
    }
    pthread_mutex_unlock(&l->mu);
}

static void publish_group(struct live_facts *f, const struct group *g, int64_t now_us)
{
    struct live_group *to = &f->group[f->n_groups];
    struct sched_load load = g->sched ? sched_load(g->sched) : (struct sched_load){0};
    *to = (struct live_group){.epoch = g->epoch,
                              .pages_used = load.used_pages,
                              .pages_total = load.total_pages,
                              .size = g->size,
                              .n_attached = g->live ? g->n_attached : 0,
                              .running = load.running,
                              .queued = load.queued,
                              .serving = g->serving};
    memcpy(to->name, g->name, sizeof to->name);
    for (uint32_t r = 0; g->live && r < g->size && f->n_ranks < LIVE_RANKS; r++) {
        const struct rank_conn *conn = g->rank[r];
        int64_t silent_us = conn ? now_us - atomic_load(&conn->heard_us) : 0;
        if (conn)
            f->rank[f->n_ranks++] = (struct live_rank){.group = f->n_groups,
                                                       .rank = r,
                                                       .step = conn->last_step,
                                                       .silent_ms = silent_us > 0 ? (uint32_t)(silent_us / 1000) : 0};
    }
    f->n_groups++;
}

void live_publish(struct engine *e, int64_t now_us)
{
    struct live *l = e->coord->live;
    if (!l)
        return;
    pthread_mutex_lock(&l->mu);
    l->facts.n_groups = l->facts.n_ranks = 0;
    for (uint32_t i = 0; i < e->n_groups && l->facts.n_groups < LIVE_GROUPS; i++)
        if (e->group[i].name[0])
            publish_group(&l->facts, &e->group[i], now_us);
    pthread_mutex_unlock(&l->mu);
}

/* ---- HTTP thread ---- */

static unsigned long long get(const metrics_counter *c)
{
    return atomic_load_explicit(c, memory_order_relaxed);
}

/* The last count is of what is past all bounds. */
static void put_histogram(struct json_text *t, const char *name, const struct metrics_histogram *h)
{
    const uint64_t *bounds;
    size_t n = metrics_time_bounds(&bounds);
    json_text_format(t, ",\"%s\":{\"bounds_us\":[", name);
    for (size_t i = 0; i < n; i++)
        json_text_format(t, "%s%llu", i ? "," : "", (unsigned long long)bounds[i]);
    json_text_put(t, "],\"count\":[");
    for (size_t i = 0; i <= n; i++)
        json_text_format(t, "%s%llu", i ? "," : "", get(&h->count[i]));
    json_text_put(t, "]}");
}

static void put_steps(struct json_text *t, const struct live_facts *f)
{
    uint64_t first = f->n_steps > LIVE_STEPS ? f->n_steps - LIVE_STEPS : 0;
    json_text_put(t, ",\"steps\":[");
    for (uint64_t i = first; i < f->n_steps; i++) {
        const struct live_step *s = &f->step[i % LIVE_STEPS];
        json_text_format(t, "%s[%llu,%llu,%u,%u,%llu]", i > first ? "," : "", (unsigned long long)s->epoch,
                         (unsigned long long)s->step, s->decodes, s->chunk_rows, (unsigned long long)s->took_us);
    }
    json_text_put(t, "]");
}

static void put_groups(struct json_text *t, const struct live_facts *f)
{
    json_text_put(t, ",\"groups\":[");
    for (uint32_t i = 0; i < f->n_groups; i++) {
        const struct live_group *g = &f->group[i];
        const char *comma = "";
        json_text_put(t, i ? ",{\"name\":" : "{\"name\":");
        json_text_string(t, g->name, strlen(g->name));
        json_text_format(t,
                         ",\"epoch\":%llu,\"serving\":%s,\"size\":%u,\"attached\":%u,\"running\":%u,\"waiting\":%u,"
                         "\"pages_used\":%llu,\"pages_total\":%llu,\"ranks\":[",
                         (unsigned long long)g->epoch, g->serving ? "true" : "false", g->size, g->n_attached,
                         g->running, g->queued, (unsigned long long)g->pages_used, (unsigned long long)g->pages_total);
        for (uint32_t r = 0; r < f->n_ranks; r++)
            if (f->rank[r].group == i) {
                json_text_format(t, "%s{\"rank\":%u,\"step\":%llu,\"silent_ms\":%u}", comma, f->rank[r].rank,
                                 (unsigned long long)f->rank[r].step, f->rank[r].silent_ms);
                comma = ",";
            }
        json_text_put(t, "]}");
    }
    json_text_put(t, "]");
}

static const char *state_name(int state)
{
    return state == TANDEM__V1__SERVER_INFO__STATE__READY        ? "READY"
           : state == TANDEM__V1__SERVER_INFO__STATE__RECOVERING ? "RECOVERING"
           : state == TANDEM__V1__SERVER_INFO__STATE__DRAINING   ? "DRAINING"
                                                                 : "STARTING";
}

void live_json(struct coord *c, struct json_text *t)
{
    const struct metrics *m = &c->metrics;
    char reason[sizeof c->reason];
    struct live_facts *f = malloc(sizeof *f);
    if (!f) {
        t->failed = true;
        return;
    }
    pthread_mutex_lock(&c->live->mu);
    *f = c->live->facts;
    pthread_mutex_unlock(&c->live->mu);
    pthread_mutex_lock(&c->pub_mu);
    snprintf(reason, sizeof reason, "%s", c->reason);
    pthread_mutex_unlock(&c->pub_mu);
    json_text_put(t, "{\"model\":");
    json_text_string(t, c->opt.served_name, strlen(c->opt.served_name));
    json_text_format(t, ",\"version\":\"%s\",\"state\":\"%s\",\"reason\":", TANDEM_VERSION,
                     state_name(atomic_load(&c->state)));
    json_text_string(t, reason, strlen(reason));
    json_text_format(t, ",\"uptime_s\":%.3f,\"running\":%llu,\"waiting\":%llu,\"waiting_tokens\":%llu,\"slots\":%llu",
                     (double)(coord_now_us() - c->started_us) / 1e6, get(&m->running), get(&m->waiting),
                     get(&m->waiting_tokens), get(&m->slots));
    json_text_format(t, ",\"pages\":{\"total\":%llu,\"used\":%llu,\"shared\":%llu,\"kept\":%llu}", get(&m->pages_total),
                     get(&m->pages_used), get(&m->pages_shared), get(&m->pages_kept));
    json_text_format(t, ",\"prompt_tokens\":%llu,\"generation_tokens\":%llu,\"finished\":%llu,\"preemptions\":%llu",
                     get(&m->prompt_tokens), get(&m->generation_tokens),
                     get(&m->finished_stop) + get(&m->finished_length), get(&m->preemptions));
    put_steps(t, f);
    put_histogram(t, "ttft", &m->first_token);
    put_histogram(t, "tbt", &m->inter_token);
    put_groups(t, f);
    json_text_put(t, "}\n");
    free(f);
}
