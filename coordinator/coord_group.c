/* A worker group: who is in it, whether all are alive, when it ends. Engine thread.
 *
 *     (none) --first Hello: new epoch--> attaching --all Hellos--> loading --all Ready--> serving
 *        ^---------------- lost: stream closed, Fault, silence, step overdue, wrong result ------'
 *
 * A group ends as a whole: the survivors get Shutdown{relaunch} and their streams are closed; those who do not go in
 * COORD_CLOSE_MS are cut off. The next group may attach at once: an ending stream belongs to no group. */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "coordinator/coord_internal.h"

/* ---- ends ---- */

/* The stream gets this status after what is queued; if the rank does not take it, it is cut off later. */
void group_end_conn(struct rank_conn *conn, const struct status *st, int64_t now_us)
{
    rpc_call_finish(conn->call, st, 0);
    conn->state = CONN_ENDING;
    conn->until_us = now_us + COORD_CLOSE_MS * 1000;
}

static void send_shutdown(const struct engine *e, struct rank_conn *conn, const char *reason, bool relaunch,
                          int64_t now_us)
{
    Tandem__V1__Shutdown shutdown = TANDEM__V1__SHUTDOWN__INIT;
    Tandem__V1__CoordinatorMessage m = TANDEM__V1__COORDINATOR_MESSAGE__INIT;
    struct status st = STATUS_INIT;
    shutdown.reason = (char *)reason; /* packing only reads */
    shutdown.relaunch = relaunch;
    m.epoch = conn->group->epoch;
    m.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_SHUTDOWN;
    m.shutdown = &shutdown;
    if (rpc_call_send(conn->call, &m.base, &st) != ST_OK) /* the stream's end says enough */
        log_line(&e->coord->log, LOG_DEBUG, "Shutdown to rank %u: %s", conn->rank, st.message);
    group_end_conn(conn, NULL, now_us);
}

static void dissolve(struct engine *e, struct group *g, const char *reason, bool relaunch, int64_t now_us)
{
    for (uint32_t r = 0; r < g->size; r++) {
        struct rank_conn *conn = g->rank[r];
        g->rank[r] = NULL;
        if (conn && conn->state == CONN_MEMBER)
            send_shutdown(e, conn, reason, relaunch, now_us);
        conn_unref(conn);
    }
    g->live = g->serving = g->draining = false;
    g->n_attached = g->n_ready = 0;
}

/* " group=NAME", nothing for the one that every server has. */
const char *group_word(const struct group *g, char *out, size_t cap)
{
    snprintf(out, cap, strcmp(g->name, COORD_DEFAULT_GROUP) == 0 ? "" : " group=%s", g->name);
    return out;
}

void group_lost(struct engine *e, struct group *g, int64_t now_us, bool permanent, const char *fmt, ...)
{
    struct coord *c = e->coord;
    char word[COORD_MAX_GROUP_NAME + 16];
    if (!g->live)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(g->lost_reason, sizeof g->lost_reason, fmt, ap);
    va_end(ap);
    snprintf(e->lost_reason, sizeof e->lost_reason, "%s", g->lost_reason);
    group_word(g, word, sizeof word);
    log_line(&c->log, LOG_ERROR, "the worker group of epoch %" PRIu64 "%s is lost: %s", g->epoch, word, g->lost_reason);
    bool served = g->serving, leaves = g->draining && !g->restart;
    record_lost(c, g->epoch, g->lost_reason, now_us);
    metrics_add(&c->metrics.groups_lost, 1);
    dissolve(e, g, g->lost_reason, !leaves, now_us);
    replay_prepare(e, g, now_us, served, permanent);
    char reason[COORD_REASON_BYTES];
    snprintf(reason, sizeof reason, "%s; waiting for a new worker group", g->lost_reason);
    engine_publish(e, reason);
    replay_group_lost(e, g, now_us, served, permanent);
    if (leaves)
        supervisor_line(c, "group-drained epoch=%" PRIu64 "%s restart=0", g->epoch, word);
    else
        supervisor_line(c, "group-lost epoch=%" PRIu64 "%s permanent=%d reason=%s", g->epoch, word, permanent,
                        g->lost_reason);
}

uint32_t group_leave(struct engine *e, struct group *g, int64_t now_us)
{
    struct coord *c = e->coord;
    char word[COORD_MAX_GROUP_NAME + 16], reason[COORD_REASON_BYTES];
    bool restart = g->restart, served = g->serving;
    snprintf(g->lost_reason, sizeof g->lost_reason, "the worker group was drained");
    dissolve(e, g, g->lost_reason, restart, now_us);
    uint32_t left = g->sched ? sched_load(g->sched).running : 0;
    log_line(&c->log, LOG_INFO, "the worker group of epoch %" PRIu64 "%s was drained; %u requests go on elsewhere",
             g->epoch, group_word(g, word, sizeof word), left);
    g->replays = true;
    bool others = groups_others_serve(e, g);
    g->wait_until_us = restart || !others ? now_us + (int64_t)c->opt.replay_timeout_ms * 1000 : 0;
    snprintf(reason, sizeof reason, "%s; waiting for it to come back", g->lost_reason);
    engine_publish(e, reason);
    if (served)
        sched_recall(g->sched, now_us);
    engine_events(e, now_us);
    route_leave(e, g, now_us);
    if (!g->wait_until_us) {
        struct status st = STATUS_INIT;
        status_set(&st, ST_UNAVAILABLE, "the worker group was drained, and no other can hold the request");
        requests_end_group(e, g, &st, now_us);
    }
    supervisor_line(c, "group-drained epoch=%" PRIu64 "%s restart=%d", g->epoch, word, restart);
    return left;
}

void group_shutdown(struct engine *e, int64_t now_us, const char *reason)
{
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = &e->group[i];
        if (!g->live)
            continue;
        bool served = g->serving;
        dissolve(e, g, reason, false, now_us);
        snprintf(g->lost_reason, sizeof g->lost_reason, "%s", reason);
        snprintf(e->lost_reason, sizeof e->lost_reason, "%s", reason);
        if (served)
            sched_detach(g->sched, now_us);
    }
    engine_events(e, now_us);
}

/* ---- Hello ---- */

/* g: of this name; NULL: it is new. */
static enum status_code check_hello(const struct engine *e, const struct group *g, const Tandem__V1__Hello *h,
                                    struct status *st)
{
    uint32_t tp = e->coord->opt.tp;
    if (h->protocol != RPC_WORKER_PROTOCOL)
        return status_set(st, ST_FAILED_PRECONDITION,
                          "protocol: %u, this coordinator speaks %d: use binaries of one build", h->protocol,
                          RPC_WORKER_PROTOCOL);
    if (h->group[0] && !group_name_valid(h->group))
        return status_set(st, ST_FAILED_PRECONDITION, "group: expected a name of 1 to %d letters, digits and ._-",
                          COORD_MAX_GROUP_NAME);
    if (h->size < 1 || h->size > COORD_MAX_RANKS || h->rank >= h->size)
        return status_set(st, ST_FAILED_PRECONDITION, "rank %u of %u, expected a size of 1 to %d and a rank below it",
                          h->rank, h->size, COORD_MAX_RANKS);
    if (tp && h->size != tp)
        return status_set(st, ST_FAILED_PRECONDITION,
                          "size: the worker group has %u ranks, the coordinator expects %u (--tp %u)", h->size, tp, tp);
    if (e->stop != STOP_NONE)
        return status_set(st, ST_UNAVAILABLE, "the coordinator is stopping");
    if (g && g->live && g->launch_id != h->launch_id)
        return status_set(st, ST_ALREADY_EXISTS,
                          "a worker group is attached already (\"%s\", epoch %" PRIu64
                          ", %u of %u ranks); only one of a name can be",
                          g->name, g->epoch, g->n_attached, g->size);
    if (g && g->live && g->size != h->size)
        return status_set(st, ST_FAILED_PRECONDITION, "size: %u, the others of this launch say %u", h->size, g->size);
    return ST_OK;
}

static void new_epoch(struct engine *e, struct group *g, const Tandem__V1__Hello *h, int64_t now_us)
{
    g->live = true;
    g->draining = g->restart = false;
    g->launch_id = h->launch_id;
    g->size = h->size;
    g->epoch = ++e->epoch;
    g->started_us = now_us;
    g->attach_until_us = now_us + COORD_ATTACH_MS * 1000;
    g->last_sent = 0;
    char word[COORD_MAX_GROUP_NAME + 16];
    supervisor_line(e->coord, "attaching epoch=%" PRIu64 "%s", g->epoch, group_word(g, word, sizeof word));
    if (e->coord->opt.tp == 0)
        log_line(&e->coord->log, LOG_INFO, "epoch %" PRIu64 ": a group of %u ranks attaches", g->epoch, g->size);
}

static enum status_code send_welcome(struct engine *e, struct rank_conn *conn, struct status *st)
{
    Tandem__V1__Welcome welcome = TANDEM__V1__WELCOME__INIT;
    Tandem__V1__CoordinatorMessage m = TANDEM__V1__COORDINATOR_MESSAGE__INIT;
    welcome.heartbeat_interval_ms = e->coord->opt.heartbeat_interval_ms;
    m.epoch = conn->group->epoch;
    m.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_WELCOME;
    m.welcome = &welcome;
    return rpc_call_send(conn->call, &m.base, st);
}

static void take_hello(struct engine *e, struct rank_conn *conn, const Tandem__V1__Hello *h, int64_t now_us)
{
    struct status st = STATUS_INIT;
    char word[COORD_MAX_GROUP_NAME + 16];
    const char *name = h->group[0] ? h->group : COORD_DEFAULT_GROUP;
    struct group *g = group_by_name(e, name);
    /* Its old stream broke and we did not see it yet. */
    if (g && g->live && g->launch_id == h->launch_id && h->rank < g->size && g->rank[h->rank])
        group_lost(e, g, now_us, false, "rank %u was lost: it attached again", h->rank);
    if (check_hello(e, g, h, &st) != ST_OK || (!g && group_get(e, &g, name, &st) != ST_OK)) {
        log_line(&e->coord->log, LOG_WARN, "refused a rank from %s: %s", rpc_call_peer(conn->call), st.message);
        group_end_conn(conn, &st, now_us);
        return;
    }
    if (!g->live)
        new_epoch(e, g, h, now_us);
    conn->state = CONN_MEMBER;
    conn->group = g;
    conn->rank = h->rank;
    conn->pid = h->pid;
    conn->progress_us = now_us;
    text_sanitize(conn->host, sizeof conn->host, h->host, strlen(h->host));
    text_sanitize(conn->device, sizeof conn->device, h->device, strlen(h->device));
    conn_ref(conn);
    g->rank[h->rank] = conn;
    g->n_attached++;
    log_line(&e->coord->log, LOG_INFO, "rank %u of %u%s attached: pid %u on %s, %s", conn->rank, g->size,
             group_word(g, word, sizeof word), conn->pid, conn->host, conn->device);
    record_attach(e->coord, g->epoch, conn, now_us);
    if (g->n_attached == g->size)
        supervisor_line(e->coord, "loading epoch=%" PRIu64 "%s", g->epoch, group_word(g, word, sizeof word));
    if (send_welcome(e, conn, &st) != ST_OK)
        group_lost(e, g, now_us, false, "rank %u was lost: %s", conn->rank, st.message);
}

/* ---- the rest of its messages ---- */

static void take_loading(struct engine *e, struct rank_conn *conn, const Tandem__V1__Loading *l, int64_t now_us)
{
    if (l->done_bytes > conn->loaded_bytes) {
        conn->loaded_bytes = l->done_bytes;
        conn->progress_us = now_us;
    }
    if (l->total_bytes == 0)
        return;
    double share = (double)l->done_bytes / (double)l->total_bytes;
    unsigned tenths = share >= 1.0 ? 10 : (unsigned)(share * 10.0);
    if (tenths <= conn->progress)
        return;
    conn->progress = tenths;
    log_line(&e->coord->log, tenths == 10 ? LOG_INFO : LOG_DEBUG, "rank %u loads: %u %% of %.1f MB", conn->rank,
             10 * tenths, (double)l->total_bytes / 1e6);
}

/* Takes m over when it keeps it. */
static bool take_ready(struct engine *e, struct rank_conn *conn, Tandem__V1__RankMessage *m, int64_t now_us)
{
    struct group *g = conn->group;
    struct status st = STATUS_INIT;
    bool kept = false;
    if (group_take_ready(g, conn, m->ready, &st) != ST_OK) {
        group_lost(e, g, now_us, true, "rank %u: Ready: %s", conn->rank, st.message);
        return false;
    }
    if (conn->rank == 0) {
        if (g->ready)
            protobuf_c_message_free_unpacked(&g->ready->base, NULL);
        g->ready = m;
        kept = true;
    }
    if (g->n_ready == g->size && group_serve(e, g, now_us, &st) != ST_OK)
        group_lost(e, g, now_us, true, "the group cannot serve: %s", st.message);
    return kept;
}

static enum status_code check_score(const struct group *g, const Tandem__V1__Scores *s, struct status *st)
{
    bool ok = s->token_id < g->vocab_size && s->rank >= 1 && s->rank <= g->vocab_size &&
              s->n_top_ids == s->n_top_logprobs && !isnan(s->logprob);
    for (size_t i = 0; ok && i < s->n_top_ids; i++)
        ok = s->top_ids[i] < g->vocab_size && !isnan(s->top_logprobs[i]);
    return ok ? ST_OK : status_set(st, ST_INTERNAL, "a log probability of token %u that cannot be", s->token_id);
}

/* Whether each is sound, and those of samples are in order. */
static enum status_code check_scores(const struct group *g, const Tandem__V1__StepResult *r, struct status *st)
{
    for (size_t i = 0; i < r->n_sample_scores; i++) {
        const Tandem__V1__Scores *s = r->sample_scores[i];
        if (s->index >= r->n_token_ids || s->token_id != r->token_ids[s->index] ||
            (i && s->index <= r->sample_scores[i - 1]->index))
            return status_set(st, ST_INTERNAL, "log probability %zu is that of no sample", i);
        if (check_score(g, s, st) != ST_OK)
            return st->code;
    }
    for (size_t i = 0; i < r->n_prompt_scores; i++)
        if (check_score(g, r->prompt_scores[i], st) != ST_OK)
            return st->code;
    return ST_OK;
}

static void take_result(struct engine *e, struct rank_conn *conn, const Tandem__V1__StepResult *r, int64_t now_us)
{
    struct group *g = conn->group;
    struct status st = STATUS_INIT;
    if (!g->serving || r->step != conn->last_step + 1 || r->step > g->last_sent) {
        group_lost(e, g, now_us, false, "rank %u was lost: it answered step %" PRIu64 ", expected %" PRIu64, conn->rank,
                   r->step, conn->last_step + 1);
        return;
    }
    conn->last_step = r->step;
    conn->last_result_us = now_us;
    record_result(e->coord, g->epoch, conn->rank, r, now_us);
    kv_take(e, conn, r);
    if (conn->rank != 0)
        return; /* the engine looks for plans to send after each batch of mail */
    for (size_t i = 0; i < r->n_token_ids; i++)
        if (r->token_ids[i] >= g->vocab_size) {
            group_lost(e, g, now_us, false, "rank 0 was lost: step %" PRIu64 " sampled id %u, the vocabulary has %u",
                       r->step, r->token_ids[i], g->vocab_size);
            return;
        }
    sched_step_took(g->sched, r->step, r->compute_us); /* what rows cost, against what a suspension costs */
    if (check_scores(g, r, &st) != ST_OK ||
        sched_result(g->sched, now_us, r->step, r->token_ids, (uint32_t)r->n_token_ids, (uint32_t)r->n_prompt_scores,
                     &st) != ST_OK) {
        group_lost(e, g, now_us, false, "rank 0 was lost: step %" PRIu64 ": %s", r->step, st.message);
        return;
    }
    g->last_step_us = r->compute_us;
    e->result = r; /* the events of its tokens are taken before pump returns */
    metrics_step_time(&e->coord->metrics.step, (int64_t)r->compute_us);
    engine_pump_group(e, g, now_us);
    e->result = NULL;
}

static void take_fault(struct engine *e, struct rank_conn *conn, const Tandem__V1__Fault *f, int64_t now_us)
{
    char text[STATUS_MESSAGE_MAX];
    text_sanitize(text, sizeof text, f->message, strlen(f->message));
    group_lost(e, conn->group, now_us, f->permanent, "rank %u: %s (%s)", conn->rank, text,
               status_name((enum status_code)f->code));
}

/* True when m was kept. */
static bool take_message(struct engine *e, struct rank_conn *conn, Tandem__V1__RankMessage *m, int64_t now_us)
{
    if (conn->state == CONN_ENDING)
        return false;
    bool hello = m->body_case == TANDEM__V1__RANK_MESSAGE__BODY_HELLO;
    if (hello != (conn->state == CONN_NEW)) {
        struct status st = STATUS_INIT;
        status_set(&st, ST_FAILED_PRECONDITION, hello ? "Hello came twice" : "expected Hello first");
        if (conn->state == CONN_MEMBER)
            group_lost(e, conn->group, now_us, false, "rank %u was lost: %s", conn->rank, st.message);
        else
            group_end_conn(conn, &st, now_us);
        return false;
    }
    if (hello) {
        take_hello(e, conn, m->hello, now_us);
        return false;
    }
    if (m->epoch != conn->group->epoch) { /* dropped, its step or its Ready would be waited for without an end */
        group_lost(e, conn->group, now_us, false, "rank %u was lost: a message of epoch %" PRIu64 ", expected %" PRIu64,
                   conn->rank, m->epoch, conn->group->epoch);
        return false;
    }
    switch (m->body_case) {
    case TANDEM__V1__RANK_MESSAGE__BODY_LOADING:
        take_loading(e, conn, m->loading, now_us);
        return false;
    case TANDEM__V1__RANK_MESSAGE__BODY_READY:
        return take_ready(e, conn, m, now_us);
    case TANDEM__V1__RANK_MESSAGE__BODY_RESULT:
        take_result(e, conn, m->result, now_us);
        return false;
    case TANDEM__V1__RANK_MESSAGE__BODY_FAULT:
        take_fault(e, conn, m->fault, now_us);
        return false;
    default:
        return false;
    }
}

void group_handle_mail(struct engine *e, struct rank_conn *conn, uint32_t flags, int64_t now_us)
{
    if (flags & CONN_OPENED) {
        conn_ref(conn); /* the engine's */
        list_append(&e->conns, &conn->link);
        conn->until_us = now_us + COORD_HELLO_MS * 1000;
    }
    for (Tandem__V1__RankMessage *m; (m = conn_next_message(conn));)
        if (!take_message(e, conn, m, now_us))
            protobuf_c_message_free_unpacked(&m->base, NULL);
    if (flags & (CONN_HALF_CLOSED | CONN_CLOSED)) {
        if (conn->state == CONN_MEMBER)
            group_lost(e, conn->group, now_us, false, "rank %u was lost: its stream was closed", conn->rank);
        if (conn->state == CONN_NEW) /* one that ends already gets no more time */
            group_end_conn(conn, NULL, now_us);
    }
    if (flags & CONN_CLOSED) {
        list_remove(&conn->link);
        conn_unref(conn);
    }
}

/* ---- time ---- */

/* When the rank began the step that it owes us: it was sent, and the step before was done. INT64_MAX: it owes none. */
static int64_t step_began_us(const struct group *g, const struct rank_conn *conn)
{
    if (!g->serving || conn->last_step == g->last_sent)
        return INT64_MAX;
    int64_t sent = g->sent_us[(conn->last_step + 1) % COORD_STEP_RING];
    return sent > conn->last_result_us ? sent : conn->last_result_us;
}

/* By when the rank must be Ready or have read more of its weights: heartbeats alone do not say that it gets anywhere. */
static int64_t load_until_us(const struct engine *e, const struct rank_conn *conn)
{
    return conn->ready ? INT64_MAX : conn->progress_us + (int64_t)e->coord->opt.load_timeout_ms * 1000;
}

int64_t group_step_began_us(const struct group *g)
{
    int64_t began_us = INT64_MAX;
    for (uint32_t r = 0; g->serving && r < g->size; r++)
        began_us = min_i64(began_us, step_began_us(g, g->rank[r]));
    return began_us;
}

void group_forgive_silence(struct engine *e, int64_t now_us)
{
    for (struct link *l = e->conns.next; l != &e->conns; l = l->next) {
        struct rank_conn *conn = container_of(l, struct rank_conn, link);
        if (conn->state != CONN_MEMBER)
            continue;
        atomic_store(&conn->heard_us, now_us);
        conn->last_result_us = now_us;
        conn->progress_us = now_us;
    }
}

static void check_rank(struct engine *e, struct rank_conn *conn, int64_t now_us)
{
    const struct coord_options *o = &e->coord->opt;
    struct group *g = conn->group;
    int64_t silent_us = now_us - atomic_load(&conn->heard_us);
    record_silence(e->coord, g->epoch, conn, silent_us, now_us);
    if (silent_us >= (int64_t)o->heartbeat_timeout_ms * 1000) {
        group_lost(e, conn->group, now_us, false, "rank %u was lost: no heartbeat for %.1f s", conn->rank,
                   (double)silent_us / 1e6);
        return;
    }
    if (now_us >= load_until_us(e, conn)) {
        group_lost(e, conn->group, now_us, false,
                   "rank %u was lost: it loads, but got no further for %u ms (--load-timeout-ms)", conn->rank,
                   o->load_timeout_ms);
        return;
    }
    int64_t began_us = step_began_us(g, conn);
    if (began_us != INT64_MAX && now_us - began_us >= (int64_t)o->step_timeout_ms * 1000)
        group_lost(e, conn->group, now_us, false, "rank %u was lost: step %" PRIu64 " takes longer than %u ms",
                   conn->rank, conn->last_step + 1, o->step_timeout_ms);
}

static void check_group(struct engine *e, struct group *g, int64_t now_us)
{
    for (uint32_t r = 0; g->live && r < g->size; r++)
        if (g->rank[r])
            check_rank(e, g->rank[r], now_us);
    if (g->live && g->n_attached < g->size && now_us >= g->attach_until_us)
        group_lost(e, g, now_us, false, "%u of %u ranks attached within %d s", g->n_attached, g->size,
                   COORD_ATTACH_MS / 1000);
}

void group_check(struct engine *e, int64_t now_us)
{
    for (struct link *l = e->conns.next, *next; l != &e->conns; l = next) {
        struct rank_conn *conn = container_of(l, struct rank_conn, link);
        struct status st = STATUS_INIT;
        next = l->next;
        if (conn->state == CONN_MEMBER || conn->until_us > now_us)
            continue;
        if (conn->state == CONN_NEW) {
            status_set(&st, ST_DEADLINE_EXCEEDED, "no Hello within %d ms", COORD_HELLO_MS);
            group_end_conn(conn, &st, now_us);
        } else {
            status_set(&st, ST_ABORTED, "the epoch is over");
            rpc_call_cancel(conn->call, &st);
            conn->until_us = now_us + COORD_CLOSE_MS * 1000;
        }
    }
    for (uint32_t i = 0; i < e->n_groups; i++)
        check_group(e, &e->group[i], now_us);
}

static int64_t next_of_group_us(const struct engine *e, const struct group *g)
{
    const struct coord_options *o = &e->coord->opt;
    int64_t next = INT64_MAX;
    for (uint32_t r = 0; g->live && r < g->size; r++) {
        if (!g->rank[r])
            continue;
        next = min_i64(next, atomic_load(&g->rank[r]->heard_us) + (int64_t)o->heartbeat_timeout_ms * 1000);
        next = min_i64(next, load_until_us(e, g->rank[r]));
        int64_t began_us = step_began_us(g, g->rank[r]);
        if (began_us != INT64_MAX)
            next = min_i64(next, began_us + (int64_t)o->step_timeout_ms * 1000);
    }
    if (g->live && g->n_attached < g->size)
        next = min_i64(next, g->attach_until_us);
    return next;
}

int64_t group_next_us(const struct engine *e)
{
    int64_t next = INT64_MAX;
    for (const struct link *l = e->conns.next; l != &e->conns; l = l->next) {
        const struct rank_conn *conn = container_of(l, struct rank_conn, link);
        if (conn->state != CONN_MEMBER)
            next = min_i64(next, conn->until_us);
    }
    for (uint32_t i = 0; i < e->n_groups; i++)
        next = min_i64(next, next_of_group_us(e, &e->group[i]));
    return next;
}
