/* The Control service: answers from the engine's own state. Engine thread. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

static void done(struct engine *e, struct control_call *cc, const struct status *st)
{
    if (st)
        rpc_call_finish(cc->call, st, st->code == ST_UNAVAILABLE && !e->draining ? COORD_RETRY_AFTER_MS : 0);
    atomic_fetch_sub(&e->coord->live_control, 1);
    control_unref(cc);
}

static Tandem__V1__ServerInfo__State group_state(const struct group *g)
{
    if (g->draining)
        return TANDEM__V1__SERVER_INFO__STATE__DRAINING;
    if (g->serving)
        return TANDEM__V1__SERVER_INFO__STATE__READY;
    return g->had_one ? TANDEM__V1__SERVER_INFO__STATE__RECOVERING : TANDEM__V1__SERVER_INFO__STATE__STARTING;
}

static void fill_group(Tandem__V1__GroupInfo *m, struct group *g)
{
    static char starting[] = "its ranks attach or load", draining[] = "drained by Control.Drain", none[] = "";
    tandem__v1__group_info__init(m);
    m->name = g->name;
    m->state = group_state(g);
    m->reason = g->draining ? draining : g->serving ? none : g->live ? starting : g->lost_reason;
    m->epoch = g->epoch;
    m->tensor_parallel_size = g->size;
    m->ready_ranks = g->live ? g->n_ready : 0;
    if (!g->serving)
        return;
    m->max_running_requests = g->slots;
    m->step_token_budget = g->step_tokens;
    m->max_context_tokens = g->context;
}

static void fill_rank(Tandem__V1__RankInfo *info, struct rank_conn *conn, int64_t now_us)
{
    int64_t age_us = now_us - atomic_load(&conn->heard_us);
    tandem__v1__rank_info__init(info);
    info->rank = conn->rank;
    info->host = conn->host;
    info->pid = conn->pid;
    info->device = conn->device;
    info->heartbeat_age_ms = age_us > 0 ? (uint64_t)age_us / 1000 : 0;
    info->last_step = conn->last_step;
    info->group = conn->group->name;
}

struct info_lists {
    Tandem__V1__GroupInfo group[COORD_MAX_GROUPS], *group_ptr[COORD_MAX_GROUPS];
    Tandem__V1__RankInfo rank[COORD_MAX_CONNS], *rank_ptr[COORD_MAX_CONNS];
};

/* Groups and their ranks; what is the server's as a whole. */
static void fill_lists(struct engine *e, Tandem__V1__ServerInfo *m, struct info_lists *l, int64_t now_us)
{
    m->groups = l->group_ptr;
    m->ranks = l->rank_ptr;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = &e->group[i];
        l->group_ptr[m->n_groups] = &l->group[m->n_groups];
        fill_group(&l->group[m->n_groups++], g);
        if (g->live && m->n_ranks == 0)
            m->tensor_parallel_size = g->size;
        for (uint32_t r = 0; g->live && r < g->size; r++)
            if (g->rank[r] && m->n_ranks < COORD_MAX_CONNS) {
                l->rank_ptr[m->n_ranks] = &l->rank[m->n_ranks];
                fill_rank(&l->rank[m->n_ranks++], g->rank[r], now_us);
            }
        if (!g->serving)
            continue;
        m->max_running_requests += g->slots;
        if (g->step_tokens > m->step_token_budget)
            m->step_token_budget = g->step_tokens;
    }
}

static void server_info(struct engine *e, struct control_call *cc, int64_t now_us)
{
    struct coord *c = e->coord;
    struct status st = STATUS_INIT;
    Tandem__V1__ServerInfo m = TANDEM__V1__SERVER_INFO__INIT;
    struct info_lists *lists = malloc(sizeof *lists);
    char version[] = TANDEM_VERSION;
    if (!lists) {
        (void)!status_nomem(&st, "groups and ranks", sizeof *lists);
        done(e, cc, &st);
        return;
    }
    m.version = version;
    m.state = (Tandem__V1__ServerInfo__State)atomic_load(&c->state);
    m.reason = c->reason; /* written by this thread only */
    m.uptime_ms = (uint64_t)(now_us - c->started_us) / 1000;
    m.epoch = e->epoch;
    m.tensor_parallel_size = c->opt.tp;
    fill_lists(e, &m, lists, now_us);
    if (m.step_token_budget == 0) { /* no group serves */
        m.max_running_requests = c->opt.max_running;
        m.step_token_budget = c->opt.step_tokens;
    }
    m.max_queued_requests = c->opt.max_queued;
    m.default_max_tokens = c->opt.default_max_tokens;
    m.max_message_bytes = c->opt.max_message_bytes;
    rpc_call_reply(cc->call, &m.base);
    free(lists);
    done(e, cc, NULL);
}

static void model_info(struct engine *e, struct control_call *cc)
{
    struct coord *c = e->coord;
    if (!e->ready) {
        struct status st = STATUS_INIT;
        status_set(&st, ST_UNAVAILABLE, "the model is not known yet: %s", c->reason);
        done(e, cc, &st);
        return;
    }
    Tandem__V1__ModelInfo m = *e->ready->ready->model; /* the arrays stay the message's */
    Tandem__V1__Defaults d = TANDEM__V1__DEFAULTS__INIT;
    d.temperature = c->model.temperature;
    d.top_k = c->model.top_k;
    d.top_p = c->model.top_p;
    d.min_p = c->model.min_p;
    d.typical_p = c->model.typical_p;
    d.repetition_penalty = c->model.repetition_penalty;
    d.max_tokens = c->opt.default_max_tokens;
    m.name = c->opt.served_name;
    m.vocab_size = c->model.vocab_size;
    m.max_context_tokens = c->model.max_context;
    m.defaults = &d;
    rpc_call_reply(cc->call, &m.base);
    done(e, cc, NULL);
}

static void fill_group_load(Tandem__V1__GroupLoad *m, struct group *g)
{
    tandem__v1__group_load__init(m);
    m->name = g->name;
    m->serving = g->serving;
    m->total_slots = g->serving ? g->slots : 0;
    m->last_step_us = g->last_step_us;
    m->routed_requests = g->routed;
    m->moved_requests = g->moved;
    if (!g->sched)
        return;
    struct sched_load l = sched_load(g->sched);
    m->queued_requests = l.queued;
    m->queued_tokens = l.queued_tokens;
    m->running_requests = l.running;
    m->used_pages = l.used_pages;
    m->total_pages = l.total_pages;
    m->steps = l.steps;
    m->generated_tokens = l.generated_tokens;
    m->cached_tokens = l.cached_tokens;
    m->replays = l.replays;
    m->goal_pages = l.goal_pages;
}

static void load(struct engine *e, struct control_call *cc)
{
    Tandem__V1__Load m = TANDEM__V1__LOAD__INIT;
    Tandem__V1__GroupLoad group[COORD_MAX_GROUPS], *group_ptr[COORD_MAX_GROUPS];
    Tandem__V1__KvStats all, kv[COORD_MAX_GROUPS];
    struct sched_load l = engine_load(e);
    m.queued_requests = l.queued;
    m.queued_tokens = l.queued_tokens;
    m.running_requests = l.running;
    m.used_pages = l.used_pages;
    m.total_pages = l.total_pages;
    m.steps = l.steps;
    m.prompt_tokens = l.prompt_tokens;
    m.generated_tokens = l.generated_tokens;
    m.finished_requests = l.finished;
    m.preemptions = l.preemptions;
    m.kept_pages = l.kept_pages;
    m.kept_slots = l.kept_slots;
    m.shared_pages = l.shared_pages;
    m.cache_hits = l.cache_hits;
    m.cached_tokens = l.cached_tokens;
    m.cache_evictions = l.cache_evictions;
    m.replays = l.replays;
    m.suspended_slots = l.suspended_slots;
    m.suspended_pages = l.suspended_pages;
    m.suspend_pages = l.suspend_pages;
    m.suspensions = l.suspensions;
    m.resumptions = l.resumptions;
    kv_of_all(e, &all);
    m.kv = &all;
    m.groups = group_ptr;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        Tandem__V1__GroupLoad *g = group_ptr[m.n_groups++] = &group[i];
        fill_group_load(g, &e->group[i]);
        kv_of_group(&e->group[i], &kv[i]);
        g->kv = &kv[i];
        m.total_slots += g->total_slots;
        m.last_step_us = g->last_step_us > m.last_step_us ? g->last_step_us : m.last_step_us;
    }
    rpc_call_reply(cc->call, &m.base);
    done(e, cc, NULL);
}

static void abort_requests(struct engine *e, struct control_call *cc, int64_t now_us)
{
    const Tandem__V1__AbortRequest *req = (const Tandem__V1__AbortRequest *)cc->request;
    Tandem__V1__AbortResponse m = TANDEM__V1__ABORT_RESPONSE__INIT;
    struct status st = STATUS_INIT, why = STATUS_INIT;
    uint32_t missing = 0;
    char first[COORD_MAX_NAME + 1] = "";
    status_set(&why, ST_CANCELLED, "aborted by Control.Abort");
    if (req->n_request_ids > COORD_MAX_ABORT_IDS) {
        status_set(&st, ST_INVALID_ARGUMENT, "request_ids: %zu, expected at most %d", req->n_request_ids,
                   COORD_MAX_ABORT_IDS);
    } else if (req->n_request_ids == 0 && !req->all) {
        status_set(&st, ST_INVALID_ARGUMENT, "request_ids: empty, expected ids, or all = true");
    } else if (req->all) {
        e->abort_all_us = now_us; /* those still in intake too */
        m.aborted = requests_end_all(e, &why, now_us);
    } else {
        for (size_t i = 0; i < req->n_request_ids; i++) {
            struct request *r = request_by_name(e, req->request_ids[i]);
            if (r) {
                request_end(e, r, &why, now_us);
                m.aborted++;
            } else if (missing++ == 0) {
                text_sanitize(first, sizeof first, req->request_ids[i], strlen(req->request_ids[i]));
            }
        }
    }
    if (missing)
        status_set(&st, ST_NOT_FOUND, "request_ids: \"%s\" names no live request (%u of %zu ids; %u were aborted)",
                   first, missing, req->n_request_ids, m.aborted);
    if (st.code == ST_OK)
        rpc_call_reply(cc->call, &m.base);
    done(e, cc, st.code == ST_OK ? NULL : &st);
}

static void answer_drain(struct engine *e, struct control_call *cc)
{
    Tandem__V1__DrainResponse m = TANDEM__V1__DRAIN_RESPONSE__INIT;
    m.remaining_requests = cc->group ? cc->moved : atomic_load(&e->coord->live_requests);
    list_remove(&cc->link);
    rpc_call_reply(cc->call, &m.base);
    done(e, cc, NULL);
}

static enum status_code check_drain(const struct engine *e, const struct group *g, const Tandem__V1__DrainRequest *req,
                                    struct status *st)
{
    char name[COORD_MAX_GROUP_NAME + 1];
    text_sanitize(name, sizeof name, req->group, strlen(req->group));
    if (!g || !g->live)
        return status_set(st, ST_NOT_FOUND, "group: \"%s\" is not attached", name);
    if (!req->restart && !groups_others_serve(e, g))
        return status_set(st, ST_FAILED_PRECONDITION,
                          "group: no other than \"%s\" serves; drain the server (no group), or set restart", name);
    return ST_OK;
}

/* What waits in the group goes elsewhere at once, what runs gets its time. */
static void drain_group(struct engine *e, struct control_call *cc, int64_t now_us)
{
    const Tandem__V1__DrainRequest *req = (const Tandem__V1__DrainRequest *)cc->request;
    struct group *g = group_by_name(e, req->group);
    struct status st = STATUS_INIT;
    if (check_drain(e, g, req, &st) != ST_OK) {
        done(e, cc, &st);
        return;
    }
    if (!g->draining) {
        log_line(&e->coord->log, LOG_INFO, "draining group %s: asked by %s", g->name, rpc_call_peer(cc->call));
        g->draining = true;
        engine_publish(e, "the worker group is drained; waiting for it to come back");
        if (g->sched)
            sched_hold(g->sched);
        route_leave(e, g, now_us);
    }
    g->restart |= req->restart;
    cc->group = g;
    cc->epoch = g->epoch;
    list_append(&e->drains, &cc->link);
}

static void drain(struct engine *e, struct control_call *cc, int64_t now_us)
{
    const Tandem__V1__DrainRequest *req = (const Tandem__V1__DrainRequest *)cc->request;
    uint64_t limit_ms = UINT64_C(86400000);
    uint64_t timeout_ms = req->timeout_ms < limit_ms ? req->timeout_ms : limit_ms;
    cc->until_us = now_us + (int64_t)timeout_ms * 1000;
    if (req->group[0]) {
        drain_group(e, cc, now_us);
        return;
    }
    if (!e->draining) {
        e->draining = true;
        log_line(&e->coord->log, LOG_INFO, "draining: asked by %s", rpc_call_peer(cc->call));
        engine_publish(e, "");
    }
    list_append(&e->drains, &cc->link);
    control_check_drains(e, now_us);
}

/* Nothing of it runs, or the time is up; the first call whose time it is ends it for all. */
static void check_group_drain(struct engine *e, struct control_call *cc, int64_t now_us)
{
    struct group *g = cc->group;
    bool gone = !g->live || !g->draining || g->epoch != cc->epoch;
    bool empty = !gone && (!g->sched || sched_runs(g->sched) == 0);
    if (!gone && (empty || cc->until_us <= now_us))
        cc->moved = group_leave(e, g, now_us);
    else if (!gone)
        return;
    answer_drain(e, cc);
}

void control_check_drains(struct engine *e, int64_t now_us)
{
    bool empty = atomic_load(&e->coord->live_requests) == 0;
    for (struct link *l = e->drains.next, *next; l != &e->drains; l = next) {
        struct control_call *cc = container_of(l, struct control_call, link);
        next = l->next;
        if (cc->group)
            check_group_drain(e, cc, now_us);
        else if (empty || cc->until_us <= now_us || atomic_load(&cc->closed))
            answer_drain(e, cc);
    }
    if (e->draining && empty && !e->drained_told) {
        e->drained_told = true;
        log_line(&e->coord->log, LOG_INFO, "drained: no request is live");
        supervisor_line(e->coord, "drained");
    }
}

static void kv_memory(struct engine *e, struct control_call *cc)
{
    Tandem__V1__SetKvMemoryResponse m = TANDEM__V1__SET_KV_MEMORY_RESPONSE__INIT;
    struct status st = STATUS_INIT;
    if (kv_set_memory(e, (const Tandem__V1__SetKvMemoryRequest *)cc->request, rpc_call_peer(cc->call), &m, &st) ==
        ST_OK)
        rpc_call_reply(cc->call, &m.base);
    done(e, cc, st.code == ST_OK ? NULL : &st);
}

int64_t control_next_us(const struct engine *e)
{
    int64_t next = INT64_MAX;
    for (const struct link *l = e->drains.next; l != &e->drains; l = l->next)
        next = min_i64(next, container_of(l, struct control_call, link)->until_us);
    return next;
}

void control_handle(struct engine *e, struct control_call *cc, int64_t now_us)
{
    switch (cc->method) {
    case CONTROL_SERVER_INFO:
        server_info(e, cc, now_us);
        return;
    case CONTROL_MODEL_INFO:
        model_info(e, cc);
        return;
    case CONTROL_LOAD:
        load(e, cc);
        return;
    case CONTROL_ABORT:
        abort_requests(e, cc, now_us);
        return;
    case CONTROL_DRAIN:
        drain(e, cc, now_us);
        return;
    case CONTROL_KV_MEMORY:
        kv_memory(e, cc);
        return;
    }
}
