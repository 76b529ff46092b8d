/* A request that came over HTTP: the sink of its answers, and the response that the daemon reads them from.
 *
 * Back-pressure: of a stream at most one message lies here at a time. `pending` falls to 0 when the daemon, which asks for
 * more only when the socket took what it had, finds nothing; then the next message is larger. An answer in one body is
 * gathered here: its max_tokens bounds it. */
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/coord_http_internal.h"

/* ---- the sink: any thread ---- */

/* The HTTP thread is to look at it. */
static void notify(struct exchange *x)
{
    struct http *h = x->http;
    bool wake = false;
    pthread_mutex_lock(&h->mu);
    if (!x->listed) {
        x->listed = true;
        atomic_fetch_add_explicit(&x->refs, 1, memory_order_relaxed);
        wake = !h->ready;
        x->ready_next = h->ready;
        h->ready = x;
    }
    pthread_mutex_unlock(&h->mu);
    uint64_t one = 1;
    if (wake && write(h->wake_fd, &one, sizeof one) < 0)
        return; /* full: it is awake already */
}

static enum status_code sink_decode(void *sink, const void *raw, size_t len, Tandem__V1__GenerateRequest **out,
                                    struct status *st)
{
    struct exchange *x = sink;
    struct openai_form form;
    enum status_code rc = openai_parse(x->kind, raw, len, &form, out, st);
    if (rc != ST_OK)
        return rc;
    pthread_mutex_lock(&x->mu);
    x->form = form;
    pthread_mutex_unlock(&x->mu);
    return ST_OK;
}

static uint32_t sink_pending(void *sink)
{
    struct exchange *x = sink;
    return atomic_load(&x->pending);
}

static enum status_code sink_send(void *sink, const Tandem__V1__GenerateResponse *m, struct status *st)
{
    struct exchange *x = sink;
    uint32_t len = (uint32_t)protobuf_c_message_get_packed_size(&m->base);
    enum status_code rc = ST_OK;
    bool stream;
    pthread_mutex_lock(&x->mu);
    stream = x->form.stream;
    if (x->closed || x->ended) {
        rc = status_set(st, ST_CANCELLED, "the client is gone");
    } else if (!json_text_reserve(&x->queue, sizeof len + len)) {
        x->queue.failed = false; /* the request ends with this error, and what is here goes out before it */
        rc = status_nomem(st, "message to a client", len);
    } else {
        json_text_add(&x->queue, &len, sizeof len);
        protobuf_c_message_pack(&m->base, (uint8_t *)x->queue.p + x->queue.n);
        x->queue.n += len;
        atomic_store(&x->pending, stream);
    }
    pthread_mutex_unlock(&x->mu);
    if (rc == ST_OK && stream)
        notify(x);
    return rc;
}

static void end(struct exchange *x, const struct status *st, uint32_t retry_after_ms, bool cut)
{
    pthread_mutex_lock(&x->mu);
    if (!x->ended) {
        x->ended = true;
        x->retry_after_ms = retry_after_ms;
        if (st)
            x->end = *st;
    }
    x->cut = x->cut || cut;
    pthread_mutex_unlock(&x->mu);
    notify(x);
}

static void sink_finish(void *sink, const struct status *st, uint32_t retry_after_ms)
{
    end(sink, st, retry_after_ms, false);
}

static void sink_cancel(void *sink, const struct status *st)
{
    end(sink, st, 0, true);
}

static const char *sink_peer(const void *sink)
{
    return ((const struct exchange *)sink)->peer;
}

static void sink_release(void *sink)
{
    exchange_unref(sink);
}

static const char *sink_header(const void *sink, const char *name)
{
    const struct exchange *x = sink;
    return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

static const struct sink_ops exchange_ops = {
    .decode = sink_decode,
    .pending = sink_pending,
    .send = sink_send,
    .finish = sink_finish,
    .cancel = sink_cancel,
    .peer = sink_peer,
    .header = sink_header,
    .release = sink_release,
};

/* ---- begin and end ---- */

static void name_peer(struct exchange *x)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);
    char host[64] = "?", port[8] = "0";
    if (info && info->client_addr)
        (void)!getnameinfo(info->client_addr,
                           info->client_addr->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6)
                                                                    : sizeof(struct sockaddr_in),
                           host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    snprintf(x->peer, sizeof x->peer, "http:%s:%s", host, port);
}

struct exchange *exchange_create(struct http *h, struct MHD_Connection *connection, enum openai_kind kind)
{
    struct exchange *x = calloc(1, sizeof *x);
    if (!x)
        return NULL;
    if (pthread_mutex_init(&x->mu, NULL)) {
        free(x);
        return NULL;
    }
    x->http = h;
    x->connection = connection;
    x->kind = x->form.kind = kind;
    x->watched_fd = -1;
    x->arrived_us = coord_now_us();
    atomic_init(&x->refs, 1);
    atomic_init(&x->pending, 0);
    name_peer(x);
    list_append(&h->exchanges, &x->link);
    return x;
}

void exchange_deny(struct exchange *x, enum status_code code, const char *message)
{
    x->denied = x->ended = true;
    status_set(&x->end, code, "%s", message);
}

void exchange_unref(struct exchange *x)
{
    if (!x || atomic_fetch_sub_explicit(&x->refs, 1, memory_order_acq_rel) != 1)
        return;
    openai_reply_destroy(x->reply);
    json_text_free(&x->queue);
    json_text_free(&x->taken);
    pthread_mutex_destroy(&x->mu);
    free(x);
}

static void drop_body(struct exchange *x)
{
    x->http->body_bytes -= x->body_cap;
    free(x->body);
    x->body = NULL;
    x->body_len = x->body_cap = 0;
}

static void unwatch(struct exchange *x)
{
    if (x->watched_fd >= 0)
        epoll_ctl(x->http->epoll_fd, EPOLL_CTL_DEL, x->watched_fd, NULL);
    x->watched_fd = -1;
}

/* The request is not told of anything any more; it is if it still runs. */
static void leave_request(struct exchange *x, bool cancelled)
{
    pthread_mutex_lock(&x->mu);
    x->closed = true;
    pthread_mutex_unlock(&x->mu);
    if (x->request)
        request_closed(x->request, cancelled);
    x->request = NULL;
}

void exchange_complete(struct exchange *x, bool whole)
{
    unwatch(x);
    drop_body(x);
    leave_request(x, !whole);
    list_remove(&x->link);
    x->connection = NULL;
    exchange_unref(x);
}

/* ---- suspension ---- */

static void suspend(struct exchange *x)
{
    if (x->watched_fd < 0) {
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        struct epoll_event ev = {.events = EPOLLRDHUP, .data.ptr = x};
        if (info && epoll_ctl(x->http->epoll_fd, EPOLL_CTL_ADD, info->connect_fd, &ev) == 0)
            x->watched_fd = info->connect_fd;
    }
    x->suspended = true;
    MHD_suspend_connection(x->connection);
}

static void go_on(struct exchange *x)
{
    if (!x->suspended)
        return;
    x->suspended = false;
    MHD_resume_connection(x->connection);
}

void exchange_hang_up(struct exchange *x)
{
    unwatch(x);
    x->gone = true;
    leave_request(x, true);
    go_on(x);
}

void exchange_resume(struct exchange *x)
{
    bool cut;
    pthread_mutex_lock(&x->mu);
    cut = x->cut;
    pthread_mutex_unlock(&x->mu);
    if (cut && x->connection && !x->gone) {
        /* The daemon waits for the socket to take more: this ends the wait. */
        const union MHD_ConnectionInfo *info =
            MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        x->gone = true;
        if (info)
            shutdown(info->connect_fd, SHUT_RDWR);
    }
    if (x->connection)
        go_on(x);
    exchange_unref(x);
}

/* ---- the body of the request ---- */

static enum MHD_Result refuse(struct exchange *x, unsigned code, const struct status *st, uint32_t retry_after_ms)
{
    struct openai_form form;
    x->answering = true;
    pthread_mutex_lock(&x->mu);
    form = x->form;
    pthread_mutex_unlock(&x->mu);
    return http_refuse(x->connection, code, &form, st, retry_after_ms);
}

static enum MHD_Result take_body(struct exchange *x, const char *bytes, size_t *n)
{
    struct http *h = x->http;
    size_t most = h->c->opt.max_message_bytes, len = x->body_len + *n, cap = x->body_cap;
    /* A response cannot be queued while the body comes in, so what is wrong with it ends the connection; its length was
     * looked at before (http_route), and this is for bodies that do not say theirs. */
    if (len > most || coord_now_us() - x->arrived_us > HTTP_BODY_MS * 1000ll)
        return MHD_NO;
    if (x->denied) { /* read and dropped: a connection that is closed on unread bytes loses its answer */
        x->body_len = len;
        *n = 0;
        return MHD_YES;
    }
    if (len > cap) {
        cap = 2 * len < most ? 2 * len : most;
        if (h->body_bytes + cap - x->body_cap > (uint64_t)HTTP_BODIES * most)
            return MHD_NO;
        uint8_t *p = realloc(x->body, cap);
        if (!p)
            return MHD_NO;
        h->body_bytes += cap - x->body_cap;
        x->body = p;
        x->body_cap = cap;
    }
    memcpy(x->body + x->body_len, bytes, *n);
    x->body_len = len;
    *n = 0;
    return MHD_YES;
}

static enum MHD_Result begin(struct exchange *x)
{
    struct status st = STATUS_INIT;
    uint32_t retry = 0;
    x->begun = true;
    metrics_add(&x->http->c->metrics.http_requests, 1);
    atomic_fetch_add_explicit(&x->refs, 1, memory_order_relaxed); /* the request's */
    enum status_code rc =
        request_open(x->http->c, &exchange_ops, x, x->body, x->body_len, INT64_MAX, &x->request, &retry, &st);
    drop_body(x);
    if (rc != ST_OK) {
        atomic_fetch_sub_explicit(&x->refs, 1, memory_order_relaxed); /* never the last: ours is left */
        return refuse(x, 0, &st, retry);
    }
    suspend(x);
    return MHD_YES;
}

/* ---- the response ---- */

static enum status_code make_reply(struct exchange *x, struct status *st)
{
    const struct openai_context ctx = {
        .tok = x->http->c->tok, .model = x->http->c->opt.served_name, .created_s = time(NULL)};
    return x->reply ? ST_OK : openai_reply_create(&x->reply, &x->form, &ctx, st);
}

/* What was queued, into the reply. */
static enum status_code take_messages(struct exchange *x, struct status *st)
{
    enum status_code rc = make_reply(x, st);
    for (size_t at = 0; at < x->taken.n && rc == ST_OK;) {
        uint32_t len;
        memcpy(&len, x->taken.p + at, sizeof len);
        Tandem__V1__GenerateResponse *m = tandem__v1__generate_response__unpack(
            NULL, len, (const uint8_t *)x->taken.p + at + sizeof len); /* our own bytes: only memory can lack */
        rc = m ? openai_reply_add(x->reply, m, st) : status_nomem(st, "message to a client", len);
        if (m)
            tandem__v1__generate_response__free_unpacked(m, NULL);
        at += sizeof len + len;
    }
    x->taken.n = 0;
    return rc;
}

/* Swaps the queue out; what is in `taken` was used up. */
static void take_queue(struct exchange *x, bool *ended, struct status *end_status)
{
    pthread_mutex_lock(&x->mu);
    struct json_text empty = x->taken;
    x->taken = x->queue;
    x->queue = empty;
    *ended = x->ended;
    *end_status = x->end;
    pthread_mutex_unlock(&x->mu);
}

/* Everything at once. */
static enum MHD_Result answer_whole(struct exchange *x)
{
    struct status end_status = STATUS_INIT, st = STATUS_INIT;
    struct json_text body = {0};
    bool ended;
    take_queue(x, &ended, &end_status);
    if (end_status.code != ST_OK)
        return refuse(x, 0, &end_status, x->retry_after_ms);
    if (take_messages(x, &st) != ST_OK || openai_reply_end(x->reply, &st) != ST_OK)
        return refuse(x, 0, &st, 0);
    const char *text;
    size_t len;
    openai_reply_take(x->reply, &text, &len);
    json_text_add(&body, text, len);
    x->answering = true;
    return http_answer(x->connection, 200, "application/json", &body, 0);
}

/* Fills x->out; false when there is nothing to be had now. */
static bool refill(struct exchange *x, bool *over)
{
    struct status end_status = STATUS_INIT, st = STATUS_INIT;
    bool ended;
    *over = false;
    take_queue(x, &ended, &end_status);
    bool news = x->taken.n > 0;
    enum status_code rc = take_messages(x, &st);
    if (!news && ended && x->end_written) {
        *over = true;
        return true;
    }
    if (rc == ST_OK && !news && ended) {
        x->end_written = true;
        rc = end_status.code == ST_OK ? openai_reply_end(x->reply, &st) : openai_reply_fail(x->reply, &end_status, &st);
        news = true;
    }
    if (rc != ST_OK) { /* no memory: the client sees a stream that breaks off */
        x->gone = true;
        return true;
    }
    if (news)
        openai_reply_take(x->reply, &x->out, &x->out_len);
    return news;
}

static ssize_t read_events(void *ctx, uint64_t position, char *to, size_t max)
{
    struct exchange *x = ctx;
    bool over = false;
    (void)position;
    for (;;) {
        if (x->gone)
            return MHD_CONTENT_READER_END_WITH_ERROR;
        if (over)
            return MHD_CONTENT_READER_END_OF_STREAM;
        if (x->out_len > 0) {
            size_t n = x->out_len < max ? x->out_len : max;
            memcpy(to, x->out, n);
            x->out += n;
            x->out_len -= n;
            return (ssize_t)n;
        }
        if (refill(x, &over))
            continue;
        /* All has gone out. The engine may have more, and says so, which lists this exchange again. */
        atomic_store(&x->pending, 0);
        if (x->request)
            request_writable(x->request);
        suspend(x);
        return 0;
    }
}

static enum MHD_Result answer_stream(struct exchange *x)
{
    struct MHD_Response *response =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, HTTP_EVENT_BYTES, read_events, x, NULL);
    if (!response)
        return MHD_NO;
    x->answering = true;
    MHD_add_response_header(response, "Content-Type", "text/event-stream; charset=utf-8");
    MHD_add_response_header(response, "Cache-Control", "no-cache");
    MHD_add_response_header(response, "X-Accel-Buffering", "no"); /* proxies are to hand events on as they come */
    enum MHD_Result rc = MHD_queue_response(x->connection, 200, response);
    MHD_destroy_response(response);
    return rc;
}

enum MHD_Result exchange_advance(struct exchange *x, const char *bytes, size_t *n)
{
    bool waiting, stream, failed;
    if (*n > 0)
        return take_body(x, bytes, n);
    if (x->gone)
        return MHD_NO;
    if (x->answering)
        return MHD_YES;
    if (x->denied)
        return refuse(x, 0, &x->end, 0);
    if (!x->begun)
        return begin(x);
    pthread_mutex_lock(&x->mu);
    stream = x->form.stream;
    failed = x->ended && x->queue.n == 0 && x->end.code != ST_OK;
    waiting = stream ? !x->ended && x->queue.n == 0 : !x->ended;
    pthread_mutex_unlock(&x->mu);
    if (waiting) {
        suspend(x);
        return MHD_YES;
    }
    return stream && !failed ? answer_stream(x) : answer_whole(x);
}
