/* The rpc callbacks of WorkerControl: one rank_conn per stream. They run on poll threads. Heartbeats end here (an atomic
 * store); everything else is mail for the engine, bounded per stream. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

void conn_ref(struct rank_conn *conn)
{
    atomic_fetch_add_explicit(&conn->refs, 1, memory_order_relaxed);
}

void conn_unref(struct rank_conn *conn)
{
    if (!conn || atomic_fetch_sub_explicit(&conn->refs, 1, memory_order_acq_rel) != 1)
        return;
    atomic_fetch_sub(&conn->coord->live_conns, 1);
    for (struct conn_msg *m = conn->msg_head, *next; m; m = next) {
        next = m->next;
        protobuf_c_message_free_unpacked(&m->m->base, NULL);
        free(m);
    }
    rpc_call_unref(conn->call);
    free(conn);
}

static void conn_post(struct rank_conn *conn, uint32_t flags)
{
    mailbox_post(&conn->coord->box, &conn->mail, flags, &conn->refs);
}

static void attach_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    (void)msg;
    (void)len;
    struct coord *c = ctx;
    struct status st = STATUS_INIT;
    struct rank_conn *conn = NULL;
    if (atomic_fetch_add(&c->live_conns, 1) >= COORD_MAX_CONNS)
        status_set(&st, ST_RESOURCE_EXHAUSTED, "%d ranks are connected: the limit", COORD_MAX_CONNS);
    else if (!(conn = calloc(1, sizeof *conn)))
        status_nomem(&st, "rank", sizeof *conn);
    if (!conn) {
        atomic_fetch_sub(&c->live_conns, 1);
        rpc_call_finish(call, &st, COORD_RETRY_AFTER_MS);
        return;
    }
    conn->mail.kind = MAIL_CONN;
    conn->coord = c;
    conn->call = rpc_call_ref(call);
    conn->msg_tail = &conn->msg_head;
    atomic_init(&conn->refs, 1);
    atomic_init(&conn->heard_us, coord_now_us());
    atomic_init(&conn->beat_step, 0);
    rpc_call_set_data(call, conn);
    conn_post(conn, CONN_OPENED);
}

/* False: the rank sends faster than its protocol allows. */
static bool conn_queue(struct rank_conn *conn, struct conn_msg *m)
{
    struct mailbox *box = &conn->coord->box;
    pthread_mutex_lock(&box->mu);
    bool ok = conn->n_msg < COORD_MAX_CONN_MAIL;
    if (ok) {
        *conn->msg_tail = m;
        conn->msg_tail = &m->next;
        conn->n_msg++;
    }
    pthread_mutex_unlock(&box->mu);
    return ok;
}

Tandem__V1__RankMessage *conn_next_message(struct rank_conn *conn)
{
    struct mailbox *box = &conn->coord->box;
    pthread_mutex_lock(&box->mu);
    struct conn_msg *m = conn->msg_head;
    if (m) {
        conn->msg_head = m->next;
        if (!m->next)
            conn->msg_tail = &conn->msg_head;
        conn->n_msg--;
    }
    pthread_mutex_unlock(&box->mu);
    if (!m)
        return NULL;
    Tandem__V1__RankMessage *msg = m->m;
    free(m);
    return msg;
}

static void attach_message(struct rpc_call *call, const void *data, size_t len, void *ctx)
{
    (void)ctx;
    struct rank_conn *conn = rpc_call_data(call);
    struct status st = STATUS_INIT;
    if (!conn || conn->refused) /* what comes until the stream is closed is not looked at */
        return;
    Tandem__V1__RankMessage *m =
        (Tandem__V1__RankMessage *)rpc_unpack(&tandem__v1__rank_message__descriptor, data, len);
    if (!m || m->body_case == TANDEM__V1__RANK_MESSAGE__BODY__NOT_SET) {
        status_set(&st, ST_INVALID_ARGUMENT, "not a valid tandem.v1.RankMessage");
        goto fail;
    }
    atomic_store_explicit(&conn->heard_us, coord_now_us(), memory_order_relaxed);
    if (m->body_case == TANDEM__V1__RANK_MESSAGE__BODY_HEARTBEAT) {
        atomic_store_explicit(&conn->beat_step, m->heartbeat->last_step, memory_order_relaxed);
        protobuf_c_message_free_unpacked(&m->base, NULL);
        return;
    }
    struct conn_msg *node = calloc(1, sizeof *node);
    if (!node) {
        status_nomem(&st, "rank message", sizeof *node);
        goto fail;
    }
    node->m = m;
    if (!conn_queue(conn, node)) {
        free(node);
        status_set(&st, ST_RESOURCE_EXHAUSTED, "%d messages of this rank wait already", COORD_MAX_CONN_MAIL);
        goto fail;
    }
    conn_post(conn, CONN_MESSAGE);
    return;
fail:
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
    log_line(&conn->coord->log, LOG_ERROR, "a rank's stream from %s: %s", rpc_call_peer(call), st.message);
    conn->refused = true;
    rpc_call_finish(call, &st, 0); /* on_close follows, and with it the loss of the group */
    conn_post(conn, CONN_HALF_CLOSED);
}

static void attach_half_close(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    struct rank_conn *conn = rpc_call_data(call);
    if (conn)
        conn_post(conn, CONN_HALF_CLOSED);
}

static void attach_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    (void)cancelled;
    (void)ctx;
    struct rank_conn *conn = rpc_call_data(call);
    if (!conn)
        return;
    conn_post(conn, CONN_CLOSED);
    conn_unref(conn);
}

void conn_methods(struct coord *c, struct rpc_method *m)
{
    *m = (struct rpc_method){.path = "/tandem.v1.WorkerControl/Attach",
                             .kind = RPC_BIDI,
                             .on_open = attach_open,
                             .on_message = attach_message,
                             .on_half_close = attach_half_close,
                             .on_close = attach_close,
                             .ctx = c};
}
