/* The engine: the one thread that decides. It sleeps until mail comes or the next time limit is due.
 *
 * A turn: mail, time limits, plans to ranks, then writing to clients until a rank has something to say. Where writing takes
 * longer than a step, the tokens that come meanwhile join the message that waits: ranks are not kept waiting by clients. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/coord_internal.h"

#define TURN_MAX_US     250000  /* it turns at least so often, to be seen alive */
#define DRAIN_TURN_US   10000   /* while draining: live requests may end outside of this thread */
#define PAUSE_US        1000000 /* a turn this much late: the whole process was stopped or starved */
#define MAIL_BATCH      256     /* nodes taken between two looks at the clock */
#define MAIL_BESIDE     32      /* of clients, while there is something to write to clients */
#define PUBLISH_US      20000   /* between two looks at the scheduler for whoever scrapes */
#define CLIENTS_WAIT_US 1000000 /* for calls that were failed at the end of a drain */

static int state_of(const struct engine *e)
{
    bool had_one = false;
    if (e->draining)
        return TANDEM__V1__SERVER_INFO__STATE__DRAINING;
    if (groups_others_serve(e, NULL))
        return TANDEM__V1__SERVER_INFO__STATE__READY;
    for (uint32_t i = 0; i < e->n_groups; i++)
        had_one |= e->group[i].had_one;
    return had_one ? TANDEM__V1__SERVER_INFO__STATE__RECOVERING : TANDEM__V1__SERVER_INFO__STATE__STARTING;
}

/* A group will be there, as far as anybody knows. */
static bool awaits_group(const struct engine *e)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->group[i].wait_until_us || e->group[i].draining)
            return true;
    return false;
}

void engine_publish(struct engine *e, const char *reason)
{
    struct coord *c = e->coord;
    int old = atomic_load(&c->state), state = state_of(e);
    bool ready = state == TANDEM__V1__SERVER_INFO__STATE__READY;
    if (e->draining)
        reason = "draining: the server will stop";
    pthread_mutex_lock(&c->pub_mu);
    snprintf(c->reason, sizeof c->reason, "%s", ready ? "" : reason);
    pthread_mutex_unlock(&c->pub_mu);
    atomic_store_explicit(&c->state, state, memory_order_release);
    bool waits = state == TANDEM__V1__SERVER_INFO__STATE__RECOVERING && awaits_group(e);
    atomic_store_explicit(&c->accepting, ready || waits, memory_order_release);
    rpc_health_set(c->health, "tandem.v1.Inference", ready);
    rpc_health_set(c->health, "readiness", ready);
    if (ready || state == TANDEM__V1__SERVER_INFO__STATE__STARTING)
        rpc_health_set(c->health, "startup", ready); /* once started, always */
    metrics_set(&c->metrics.ready, ready);
    if (state != old)
        log_line(&c->log, LOG_DEBUG, "state %d: %s", state, reason);
}

void engine_events(struct engine *e, int64_t now_us)
{
    struct sched_event ev;
    for (uint32_t i = 0; i < e->n_groups; i++)
        while (e->group[i].sched && sched_next_event(e->group[i].sched, &ev))
            request_event(e, &ev, now_us);
}

/* A rank that is far behind the others gets no further plans; if it does not catch up, its step is overdue in the end
 * (coord_group.c). Ranks that reduce together are never more than a step apart. */
static bool may_send(const struct group *g)
{
    if (!g->serving)
        return false;
    for (uint32_t r = 0; r < g->size; r++)
        if (g->last_sent - g->rank[r]->last_step >= COORD_STEP_RING - 1)
            return false;
    return true;
}

static void send_plans(struct engine *e, struct group *g, int64_t now_us)
{
    struct sched_plan plan;
    struct status st = STATUS_INIT;
    uint32_t bad = 0;
    bool sent = false;
    while (may_send(g) && sched_plan(g->sched, now_us, &plan)) {
        g->last_sent = plan.step;
        sent = true;
        g->sent_us[plan.step % COORD_STEP_RING] = now_us;
        record_plan(e->coord, g->epoch, &plan, now_us);
        metrics_tokens(&e->coord->metrics.step_rows, plan.rows);
        if (plan.rows > plan.n_decode)
            metrics_tokens(&e->coord->metrics.step_chunk, plan.rows - plan.n_decode);
        if (plan_send(e->scratch, g, &plan, &bad, &st) != ST_OK) {
            /* The end of its stream shows here or in its mail, whichever comes first: one wording for one fact. */
            if (st.code == ST_CANCELLED)
                group_lost(e, g, now_us, false, "rank %u was lost: its stream was closed", bad);
            else
                group_lost(e, g, now_us, false, "rank %u was lost: a plan could not be sent: %s", bad, st.message);
        }
    }
    if (sent && e->result)
        metrics_step_time(&e->coord->metrics.host, coord_now_us() - now_us);
}

void engine_pump_group(struct engine *e, struct group *g, int64_t now_us)
{
    send_plans(e, g, now_us); /* first: ranks compute meanwhile */
    engine_events(e, now_us);
}

void engine_pump(struct engine *e, int64_t now_us)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        send_plans(e, &e->group[i], now_us);
    engine_events(e, now_us);
}

static void publish_pools(struct engine *e)
{
    struct metrics *m = &e->coord->metrics;
    Tandem__V1__KvStats kv;
    kv_of_all(e, &kv);
    metrics_set(&m->pool_mapped, kv.mapped_pages);
    metrics_set(&m->pool_fenced, kv.fenced_pages);
    metrics_set(&m->pool_free, kv.free_pages);
    metrics_set(&m->pool_parked, kv.parked_pages);
    metrics_set(&m->pool_shared, kv.shared_pages);
    metrics_set(&m->pool_given, kv.given_pages);
    metrics_set(&m->pool_wasted_bytes, kv.wasted_bytes);
    metrics_set(&m->pool_map_calls, kv.map_calls);
    metrics_set(&m->pool_clear_calls, kv.clear_calls);
    metrics_set(&m->pool_driver_us, kv.driver_us);
    metrics_set(&m->pool_exposed_us, kv.exposed_us);
    metrics_set(&m->pool_failed_ahead, kv.failed_ahead);
}

/* What a scrape reads of the schedulers and the groups. */
static void publish_load(struct engine *e, int64_t now_us)
{
    struct metrics *m = &e->coord->metrics;
    uint64_t ranks = 0, slots = 0, serving = 0;
    if (now_us - e->published_us < PUBLISH_US)
        return;
    e->published_us = now_us;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        ranks += e->group[i].live ? e->group[i].n_attached : 0;
        slots += e->group[i].serving ? e->group[i].slots : 0;
        serving += e->group[i].serving;
    }
    metrics_set(&m->ranks, ranks);
    metrics_set(&m->slots, slots);
    metrics_set(&m->groups_serving, serving);
    struct sched_load l = engine_load(e);
    metrics_set(&m->running, l.running);
    metrics_set(&m->waiting, l.queued);
    metrics_set(&m->waiting_tokens, l.queued_tokens);
    metrics_set(&m->pages_used, l.used_pages);
    metrics_set(&m->pages_total, l.total_pages);
    metrics_set(&m->pages_shared, l.shared_pages);
    metrics_set(&m->pages_kept, l.kept_pages);
    metrics_set(&m->steps, l.steps);
    metrics_set(&m->prompt_tokens, l.prompt_tokens);
    metrics_set(&m->generation_tokens, l.generated_tokens);
    metrics_set(&m->preemptions, l.preemptions);
    metrics_set(&m->suspensions, l.suspensions);
    metrics_set(&m->suspended_pages, l.suspended_pages);
    metrics_set(&m->recomputed_tokens, l.recomputed_tokens);
    metrics_set(&m->wasted_rows, l.wasted_rows);
    metrics_set(&m->replays, l.replays);
    publish_pools(e);
    coord_journal_publish(e);
    live_publish(e, now_us);
}

/* ---- the end ---- */

/* No group may attach any more: what waits for one would wait in vain. */
static void end_without_group(struct engine *e, int64_t now_us)
{
    struct status st = STATUS_INIT;
    bool any = groups_any_live(e);
    if (!any) {
        status_set(&st, ST_UNAVAILABLE, "the server is stopping, and %s",
                   e->lost_reason[0] ? e->lost_reason : "no worker group is there");
        requests_end_live(e, &st, now_us);
        attach_end_held(e, &st, now_us);
    }
    for (uint32_t i = 0; any && i < e->n_groups; i++)
        if (!e->group[i].live) {
            status_set(&st, ST_UNAVAILABLE, "the server is stopping, and %s", e->group[i].lost_reason);
            requests_end_group(e, &e->group[i], &st, now_us);
        }
}

static void stop_advance(struct engine *e, int64_t now_us)
{
    struct coord *c = e->coord;
    struct status st = STATUS_INIT;
    bool empty = atomic_load(&c->live_requests) == 0;
    bool due = now_us >= e->stop_until_us;
    if (e->stop == STOP_DRAINING)
        end_without_group(e, now_us);
    if (e->stop == STOP_DRAINING && (empty || due)) {
        status_set(&st, ST_UNAVAILABLE, "the server is stopping");
        if (!empty)
            log_line(&c->log, LOG_WARN, "stopping with %u live requests", atomic_load(&c->live_requests));
        requests_end_all(e, &st, now_us);
        attach_end_held(e, &st, now_us);
        for (struct link *l = e->drains.next, *next; l != &e->drains; l = next) {
            next = l->next;
            container_of(l, struct control_call, link)->until_us = now_us;
        }
        e->stop = STOP_CLIENTS;
        e->stop_until_us = now_us + CLIENTS_WAIT_US;
    } else if (e->stop == STOP_CLIENTS && (empty || due)) {
        group_shutdown(e, now_us, "the coordinator stops");
        e->stop = STOP_RANKS;
        e->stop_until_us = now_us + COORD_CLOSE_MS * 1000;
    } else if (e->stop == STOP_RANKS && (list_empty(&e->conns) || due)) {
        if (!e->drained_told) {
            e->drained_told = true;
            supervisor_line(c, "drained");
        }
        e->stop = STOP_DONE;
        uint64_t one = 1;
        ssize_t unused = write(c->done_fd, &one, sizeof one);
        (void)unused; /* an eventfd takes it */
    }
}

static void take_stop(struct engine *e, uint32_t flags, int64_t now_us)
{
    struct coord *c = e->coord;
    if ((flags & STOP_DRAIN) && e->stop == STOP_NONE) {
        log_line(&c->log, LOG_INFO, "stopping: %u live requests get %u ms to end (a second signal: none)",
                 atomic_load(&c->live_requests), c->opt.drain_timeout_ms);
        e->stop = STOP_DRAINING;
        e->stop_until_us = now_us + (int64_t)c->opt.drain_timeout_ms * 1000;
        e->draining = true;
        engine_publish(e, "");
    }
    if ((flags & STOP_NOW) && e->stop != STOP_NONE)
        e->stop_until_us = now_us;
    if (flags & STOP_QUIT)
        e->quit = true;
}

/* ---- the loop ---- */

static void take_mail(struct engine *e, struct mail *m, uint32_t flags, int64_t now_us)
{
    switch (m->kind) {
    case MAIL_REQUEST: {
        struct request *r = container_of(m, struct request, mail);
        request_handle_mail(e, r, flags, now_us);
        request_unref(r);
        return;
    }
    case MAIL_CONN: {
        struct rank_conn *conn = container_of(m, struct rank_conn, mail);
        group_handle_mail(e, conn, flags, now_us);
        conn_unref(conn);
        return;
    }
    case MAIL_ATTACH: {
        struct attach *a = container_of(m, struct attach, mail);
        attach_handle(e, a, flags, now_us);
        attach_unref(a);
        return;
    }
    case MAIL_CONTROL:
        control_handle(e, container_of(m, struct control_call, mail), now_us);
        return;
    case MAIL_STOP:
        take_stop(e, flags, now_us);
        return;
    }
}

static void check_times(struct engine *e, int64_t now_us)
{
    group_check(e, now_us);
    replay_check(e, now_us);
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct sched *s = e->group[i].sched;
        if (s && sched_next_deadline_us(s) <= now_us)
            sched_expire(s, now_us);
    }
    requests_check_slow(e, now_us);
    attach_check(e, now_us);
    route_balance(e, now_us);
    engine_pump(e, now_us);
    control_check_drains(e, now_us);
    stop_advance(e, now_us);
    publish_load(e, now_us);
}

static int64_t next_wake_us(const struct engine *e, int64_t now_us)
{
    int64_t next = now_us + (e->draining ? DRAIN_TURN_US : TURN_MAX_US);
    next = min_i64(next, group_next_us(e));
    next = min_i64(next, replay_next_us(e));
    next = min_i64(next, control_next_us(e));
    next = min_i64(next, route_next_us(e));
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->group[i].sched)
            next = min_i64(next, sched_next_deadline_us(e->group[i].sched));
    if (!list_empty(&e->stalled)) {
        const struct request *r = container_of(e->stalled.next, struct request, stalled_link);
        next = min_i64(next, r->stalled_us + (int64_t)e->coord->opt.slow_client_timeout_ms * 1000);
    }
    return next;
}

static void *engine_main(void *arg)
{
    struct engine *e = arg;
    struct mailbox *box = &e->coord->box;
    int64_t turned_us = coord_now_us();
    for (;;) {
        uint32_t flags = 0;
        struct mail *m = mailbox_take(box, &flags, e->quit || e->dirty ? 0 : next_wake_us(e, turned_us));
        if (!m && e->quit && !e->dirty)
            return NULL;
        int64_t now_us = coord_now_us();
        if (now_us - turned_us > TURN_MAX_US + PAUSE_US) {
            log_line(&e->coord->log, LOG_WARN, "this process stood still for %.1f s",
                     (double)(now_us - turned_us) / 1e6);
            group_forgive_silence(e, now_us);
        }
        turned_us = now_us;
        atomic_store_explicit(&e->coord->alive_us, now_us, memory_order_relaxed);
        for (unsigned n = 1; m; n++) {
            take_mail(e, m, flags, now_us);
            bool clients_wait = e->dirty && n % MAIL_BESIDE == 0 && !mailbox_has_ranks(box);
            m = n < MAIL_BATCH && !clients_wait ? mailbox_take(box, &flags, 0) : NULL;
        }
        check_times(e, now_us);
        if (requests_flush_dirty(e, now_us))
            engine_pump(e, now_us);
    }
}

enum status_code engine_start(struct coord *c, struct status *st)
{
    struct engine *e = &c->engine;
    e->coord = c;
    list_init(&e->conns);
    list_init(&e->drains);
    list_init(&e->stalled);
    list_init(&e->unclaimed);
    list_init(&e->held);
    e->dirty_tail = &e->dirty;
    enum status_code rc = requests_init(e, st);
    if (rc == ST_OK)
        rc = sched_book_create(&e->book, st);
    if (rc == ST_OK)
        rc = plan_scratch_create(&e->scratch, st);
    if (rc == ST_OK)
        rc = coord_journal_open(c, st);
    if (rc != ST_OK)
        return rc;
    engine_publish(e, "starting: no worker group is ready yet");
    int err = pthread_create(&e->thread, NULL, engine_main, e);
    if (err)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "starting the engine thread");
    e->started = true;
    return ST_OK;
}

void engine_stop(struct coord *c)
{
    struct engine *e = &c->engine;
    if (e->started) {
        mailbox_post(&c->box, &c->stop_mail, STOP_QUIT, NULL);
        pthread_join(e->thread, NULL);
    }
    while (e->coord && !list_empty(&e->drains)) { /* their calls are closed */
        struct control_call *cc = container_of(e->drains.next, struct control_call, link);
        list_remove(&cc->link);
        control_unref(cc);
    }
    if (e->coord)
        attach_drop_kept(e, coord_now_us());
    groups_fini(e);
    sched_book_destroy(e->book);
    plan_scratch_destroy(e->scratch);
    if (e->coord)
        requests_fini(e);
}
