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

static void server_info(struct engine *e, struct control_call *cc, int64_t now_us)
{
    struct coord *c = e->coord;
    const struct group *g = &e->group;
    Tandem__V1__ServerInfo m = TANDEM__V1__SERVER_INFO__INIT;
    Tandem__V1__RankInfo rank[COORD_MAX_RANKS], *ptr[COORD_MAX_RANKS];
    char version[] = TANDEM_VERSION;
    m.version = version;
    m.state = (Tandem__V1__ServerInfo__State)atomic_load(&c->state);
    m.reason = c->reason; /* written by this thread only */
    m.uptime_ms = (uint64_t)(now_us - c->started_us) / 1000;
    m.epoch = g->epoch;
    m.tensor_parallel_size = g->live ? g->size : c->opt.tp;
    m.ranks = ptr;
    for (uint32_t r = 0; g->live && r < g->size; r++) {
        struct rank_conn *conn = g->rank[r];
        if (!conn)
            continue;
        Tandem__V1__RankInfo *info = ptr[m.n_ranks] = &rank[m.n_ranks];
        int64_t age_us = now_us - atomic_load(&conn->heard_us);
        tandem__v1__rank_info__init(info);
        info->rank = r;
        info->host = conn->host;
        info->pid = conn->pid;
        info->device = conn->device;
        info->heartbeat_age_ms = age_us > 0 ? (uint64_t)age_us / 1000 : 0;
        info->last_step = conn->last_step;
        m.n_ranks++;
    }
    m.max_running_requests = g->live && g->serving ? g->slots : c->opt.max_running;
    m.max_queued_requests = c->opt.max_queued;
    m.step_token_budget = g->serving ? g->step_tokens : c->opt.step_tokens;
    m.default_max_tokens = c->opt.default_max_tokens;
    m.max_message_bytes = c->opt.max_message_bytes;
    rpc_call_reply(cc->call, &m.base);
    done(e, cc, NULL);
}

static void model_info(struct engine *e, struct control_call *cc)
{
    struct coord *c = e->coord;
    const struct group *g = &e->group;
    if (!g->had_one) {
        struct status st = STATUS_INIT;
        status_set(&st, ST_UNAVAILABLE, "the model is not known yet: %s", c->reason);
        done(e, cc, &st);
        return;
    }
    Tandem__V1__ModelInfo m = *g->ready->ready->model; /* the arrays stay the message's */
    Tandem__V1__Defaults d = TANDEM__V1__DEFAULTS__INIT;
    d.temperature = c->model.temperature;
    d.top_k = c->model.top_k;
    d.top_p = c->model.top_p;
    d.max_tokens = c->opt.default_max_tokens;
    m.name = c->opt.served_name;
    m.vocab_size = c->model.vocab_size;
    m.max_context_tokens = c->model.max_context;
    m.defaults = &d;
    rpc_call_reply(cc->call, &m.base);
    done(e, cc, NULL);
}

static void load(struct engine *e, struct control_call *cc)
{
    Tandem__V1__Load m = TANDEM__V1__LOAD__INIT;
    if (e->sched) {
        struct sched_load l = sched_load(e->sched);
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
    }
    m.total_slots = e->group.serving ? e->group.slots : 0;
    m.last_step_us = e->group.last_step_us;
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
    m.remaining_requests = atomic_load(&e->coord->live_requests);
    list_remove(&cc->link);
    rpc_call_reply(cc->call, &m.base);
    done(e, cc, NULL);
}

static void drain(struct engine *e, struct control_call *cc, int64_t now_us)
{
    const Tandem__V1__DrainRequest *req = (const Tandem__V1__DrainRequest *)cc->request;
    uint64_t limit_ms = UINT64_C(86400000);
    uint64_t timeout_ms = req->timeout_ms < limit_ms ? req->timeout_ms : limit_ms;
    if (!e->draining) {
        e->draining = true;
        log_line(&e->coord->log, LOG_INFO, "draining: asked by %s", rpc_call_peer(cc->call));
        engine_publish(e, TANDEM__V1__SERVER_INFO__STATE__DRAINING, "draining: the server will stop");
    }
    cc->until_us = now_us + (int64_t)timeout_ms * 1000;
    list_append(&e->drains, &cc->link);
    control_check_drains(e, now_us);
}

void control_check_drains(struct engine *e, int64_t now_us)
{
    if (!e->draining)
        return;
    bool empty = atomic_load(&e->coord->live_requests) == 0;
    for (struct link *l = e->drains.next, *next; l != &e->drains; l = next) {
        struct control_call *cc = container_of(l, struct control_call, link);
        next = l->next;
        if (empty || cc->until_us <= now_us || atomic_load(&cc->closed))
            answer_drain(e, cc);
    }
    if (empty && !e->drained_told) {
        e->drained_told = true;
        log_line(&e->coord->log, LOG_INFO, "drained: no request is live");
        supervisor_line(e->coord, "drained");
    }
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
    }
}
