#include "worker/worker_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ATTACH_PATH      "/tandem.v1.WorkerControl/Attach"
#define RETRY_FIRST_MS   20
#define RETRY_MAX_MS     500
#define RECV_SLICE_MS    100 /* between looks at the guard while Welcome is awaited */
#define HEARTBEAT_MS     500 /* when Welcome leaves it open */
#define HEARTBEAT_MAX_MS 60000

enum status_code worker_control_init(struct worker_control *c, struct worker_guard *guard, const struct worker_log *log,
                                     struct status *st)
{
    *c = (struct worker_control){.guard = guard, .log = log, .link = WORKER_LINK_DOWN};
    c->hello = (Tandem__V1__Hello)TANDEM__V1__HELLO__INIT;
    atomic_init(&c->last_step, 0);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    int err = pthread_cond_init(&c->changed, &attr);
    if (!err)
        err = pthread_cond_init(&c->to_send, &attr);
    pthread_condattr_destroy(&attr);
    if (err)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "condition variable");
    pthread_mutex_init(&c->lock, NULL);
    return ST_OK;
}

void worker_control_fini(struct worker_control *c)
{
    for (uint32_t i = 0; i < WORKER_QUEUE_MAX; i++) {
        free(c->results[i].tokens);
        free(c->results[i].sample_scores);
        free(c->results[i].prompt_scores);
    }
    pthread_cond_destroy(&c->to_send);
    pthread_cond_destroy(&c->changed);
    pthread_mutex_destroy(&c->lock);
}

void worker_control_wake(void *control)
{
    struct worker_control *c = control;
    pthread_mutex_lock(&c->lock);
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

bool worker_control_wait(struct worker_control *c, pthread_cond_t *cond, int64_t until_us)
{
    struct timespec t = {.tv_sec = until_us / 1000000, .tv_nsec = until_us % 1000000 * 1000};
    return pthread_cond_timedwait(cond, &c->lock, &t) != ETIMEDOUT;
}

static bool exit_requested(const struct worker_control *c)
{
    return worker_guard_exit_code(c->guard) >= 0;
}

static void free_message(Tandem__V1__CoordinatorMessage *m)
{
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
}

void worker_control_break(struct worker_control *c, const struct status *why)
{
    pthread_mutex_lock(&c->lock);
    bool first = c->link == WORKER_LINK_UP;
    if (first) {
        c->link = WORKER_LINK_BROKEN;
        c->broken = *why;
        /* Armed under the lock, so that detach, which sees the broken link first, takes it back after this. */
        if (c->in_step && !exit_requested(c))
            worker_guard_limit_step(c->guard, WORKER_STEP_GRACE_MS);
        pthread_cond_broadcast(&c->changed);
        pthread_cond_broadcast(&c->to_send);
    }
    pthread_mutex_unlock(&c->lock);
    if (first)
        rpc_stream_cancel(c->stream);
}

/* ---- receiver ---- */

static void report_violation(struct worker_control *c, const struct status *why)
{
    worker_log(c->log, WORKER_LOG_ERROR, "%s", why->message);
    pthread_mutex_lock(&c->lock);
    if (c->violation.code == ST_OK)
        c->violation = *why;
    if (c->in_step && !exit_requested(c))
        worker_guard_limit_step(c->guard, WORKER_STEP_GRACE_MS); /* nobody listens to Shutdown any more */
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

static bool queue_plan(struct worker_control *c, Tandem__V1__CoordinatorMessage *m)
{
    pthread_mutex_lock(&c->lock);
    bool fits = c->count < WORKER_QUEUE_MAX;
    if (fits) {
        c->queue[(c->head + c->count++) % WORKER_QUEUE_MAX] = m;
        pthread_cond_broadcast(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
    return fits;
}

static void take_shutdown(struct worker_control *c, const Tandem__V1__Shutdown *s)
{
    worker_log(c->log, WORKER_LOG_INFO, "the coordinator ends this group: %s (%s)",
               s->reason && *s->reason ? s->reason : "no reason given", s->relaunch ? "relaunch" : "stop");
    if (s->relaunch) {
        worker_guard_request_exit(c->guard, WORKER_EXIT_RELAUNCH, 0);
        return;
    }
    /* What was planned before the Shutdown is planned on every rank: run it, so that nobody waits in a collective. */
    pthread_mutex_lock(&c->lock);
    c->draining = true;
    pthread_mutex_unlock(&c->lock);
    worker_guard_request_exit(c->guard, WORKER_EXIT_OK, WORKER_STEP_GRACE_MS);
}

/* False: the receiver is to end. */
static bool take_message(struct worker_control *c, const void *data, size_t len)
{
    struct status st = STATUS_INIT;
    Tandem__V1__CoordinatorMessage *m =
        (Tandem__V1__CoordinatorMessage *)rpc_unpack(&tandem__v1__coordinator_message__descriptor, data, len);
    if (!m) {
        status_set(&st, ST_DATA_LOSS, "control stream: a message of %zu bytes is no CoordinatorMessage", len);
        report_violation(c, &st);
        return false;
    }
    if (m->epoch != c->epoch) {
        worker_log(c->log, WORKER_LOG_DEBUG, "dropped a message of epoch %llu, this is %llu",
                   (unsigned long long)m->epoch, (unsigned long long)c->epoch);
        free_message(m);
        return true;
    }
    if (m->body_case == TANDEM__V1__COORDINATOR_MESSAGE__BODY_PLAN) {
        if (queue_plan(c, m))
            return true; /* m belongs to the queue */
        status_set(&st, ST_RESOURCE_EXHAUSTED, "control stream: step %llu is more than %d plans ahead",
                   (unsigned long long)m->plan->step, WORKER_QUEUE_MAX);
        report_violation(c, &st);
        free_message(m);
        return false;
    }
    if (m->body_case == TANDEM__V1__COORDINATOR_MESSAGE__BODY_SHUTDOWN)
        take_shutdown(c, m->shutdown);
    free_message(m);
    return true;
}

static void *receiver_main(void *arg)
{
    struct worker_control *c = arg;
    for (;;) {
        struct status st = STATUS_INIT;
        const void *data;
        size_t len;
        enum status_code rc = rpc_stream_recv(c->stream, &data, &len, 0, NULL, &st);
        if (rc == ST_OK && !data)
            rc = status_set(&st, ST_UNAVAILABLE, "the coordinator ended the stream");
        if (rc != ST_OK) {
            worker_control_break(c, &st);
            return NULL;
        }
        if (!take_message(c, data, len))
            return NULL;
    }
}

/* ---- attach ---- */

static enum status_code send_hello(struct worker_control *c, struct status *st)
{
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_HELLO;
    m.hello = &c->hello;
    return rpc_stream_send(c->stream, &m.base, WORKER_SEND_TIMEOUT_MS, st);
}

static enum status_code take_welcome(struct worker_control *c, const void *data, size_t len, struct status *st)
{
    Tandem__V1__CoordinatorMessage *m =
        (Tandem__V1__CoordinatorMessage *)rpc_unpack(&tandem__v1__coordinator_message__descriptor, data, len);
    enum status_code rc = ST_OK;
    if (m && m->body_case == TANDEM__V1__COORDINATOR_MESSAGE__BODY_WELCOME && m->epoch != 0) {
        uint32_t ms = m->welcome->heartbeat_interval_ms;
        c->epoch = m->epoch;
        c->heartbeat_ms = ms == 0 ? HEARTBEAT_MS : ms > HEARTBEAT_MAX_MS ? HEARTBEAT_MAX_MS : ms;
    } else if (m && m->body_case == TANDEM__V1__COORDINATOR_MESSAGE__BODY_SHUTDOWN) {
        rc = status_set(st, ST_UNAVAILABLE, "refused: %s", m->shutdown->reason);
    } else {
        rc = status_set(st, ST_UNIMPLEMENTED,
                        "its first message is no Welcome with an epoch: is it a tandem-coordinator?");
    }
    free_message(m);
    return rc;
}

static enum status_code await_welcome(struct worker_control *c, int64_t until_us, struct status *st)
{
    for (;;) {
        const void *data;
        size_t len;
        bool timed_out = false;
        enum status_code rc = rpc_stream_recv(c->stream, &data, &len, RECV_SLICE_MS, &timed_out, st);
        if (rc == ST_OK && !data)
            return status_set(st, ST_UNAVAILABLE, "the stream ended before Welcome");
        if (rc == ST_OK)
            return take_welcome(c, data, len, st);
        if (!timed_out)
            return rc;
        if (exit_requested(c))
            return status_set(st, ST_CANCELLED, "ending");
        if (worker_now_us() >= until_us)
            return status_set(st, ST_DEADLINE_EXCEEDED, "no Welcome from the coordinator");
    }
}

static enum status_code start_threads(struct worker_control *c, struct status *st)
{
    int err = pthread_create(&c->receiver, NULL, receiver_main, c);
    if (err)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "receiver thread");
    err = pthread_create(&c->sender, NULL, worker_control_sender, c);
    if (err) {
        rpc_stream_cancel(c->stream);
        pthread_join(c->receiver, NULL);
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "sender thread");
    }
    return ST_OK;
}

static enum status_code attach_once(struct worker_control *c, int64_t until_us, struct status *st)
{
    int64_t welcome_us = worker_now_us() + WORKER_WELCOME_MS * 1000;
    enum status_code rc = rpc_channel_open(&c->channel, c->address, c->security, st);
    if (rc != ST_OK)
        return rc;
    rc = rpc_stream_open(&c->stream, c->channel, ATTACH_PATH, 0, st);
    if (rc != ST_OK)
        goto fail;
    rc = send_hello(c, st);
    if (rc == ST_OK)
        rc = await_welcome(c, welcome_us < until_us ? welcome_us : until_us, st);
    if (rc != ST_OK)
        goto fail;
    atomic_store(&c->last_step, 0);
    pthread_mutex_lock(&c->lock);
    c->link = WORKER_LINK_UP;
    pthread_mutex_unlock(&c->lock);
    rc = start_threads(c, st);
    if (rc == ST_OK)
        return ST_OK;
    pthread_mutex_lock(&c->lock);
    c->link = WORKER_LINK_DOWN;
    pthread_mutex_unlock(&c->lock);
fail:
    rpc_stream_close(c->stream);
    rpc_channel_destroy(c->channel);
    c->stream = NULL;
    c->channel = NULL;
    return rc;
}

/* Whether another try could be answered differently. */
static bool refused_for_good(enum status_code rc)
{
    return rc == ST_INVALID_ARGUMENT || rc == ST_UNIMPLEMENTED || rc == ST_PERMISSION_DENIED ||
           rc == ST_UNAUTHENTICATED || rc == ST_NOT_FOUND; /* of a certificate's or token's file */
}

enum status_code worker_control_attach(struct worker_control *c, uint32_t timeout_ms, struct status *st)
{
    int64_t until_us = worker_now_us() + (int64_t)timeout_ms * 1000;
    uint32_t retry_ms = RETRY_FIRST_MS;
    for (unsigned tries = 0;; tries++) {
        if (exit_requested(c))
            return status_set(st, ST_CANCELLED, "ending");
        struct status why = STATUS_INIT;
        enum status_code rc = attach_once(c, until_us, &why);
        if (rc == ST_OK)
            return ST_OK;
        if (strncmp(why.message, c->address, strlen(c->address)) != 0) /* errors of the connection name it already */
            status_prefix(&why, "%s", c->address);
        if (refused_for_good(rc))
            return status_set(st, rc, "coordinator at %s", why.message);
        int64_t now_us = worker_now_us();
        if (now_us >= until_us)
            return status_set(st, ST_UNAVAILABLE, "not attached within %u ms (--attach-timeout-ms): coordinator at %s",
                              timeout_ms, why.message);
        worker_log(c->log, tries ? WORKER_LOG_DEBUG : WORKER_LOG_INFO, "coordinator at %s; trying again for %lld ms",
                   why.message, (long long)(until_us - now_us) / 1000);
        int64_t next_us = now_us + (int64_t)retry_ms * 1000;
        if (next_us > until_us)
            next_us = until_us;
        pthread_mutex_lock(&c->lock);
        while (!exit_requested(c) && worker_control_wait(c, &c->changed, next_us))
            ;
        pthread_mutex_unlock(&c->lock);
        retry_ms = retry_ms * 2 < RETRY_MAX_MS ? retry_ms * 2 : RETRY_MAX_MS;
    }
}

void worker_control_detach(struct worker_control *c)
{
    pthread_mutex_lock(&c->lock);
    bool attached = c->link != WORKER_LINK_DOWN;
    c->link = WORKER_LINK_DOWN;
    pthread_cond_broadcast(&c->to_send);
    pthread_mutex_unlock(&c->lock);
    if (!attached)
        return;
    rpc_stream_cancel(c->stream);
    pthread_join(c->receiver, NULL);
    pthread_join(c->sender, NULL);
    rpc_stream_close(c->stream);
    rpc_channel_destroy(c->channel);
    c->stream = NULL;
    c->channel = NULL;
    worker_guard_limit_step(c->guard, 0);
    for (; c->count; c->count--)
        free_message(c->queue[c->head++ % WORKER_QUEUE_MAX]);
    c->head = 0;
    c->result_count = 0;
    c->closing = false;
    c->violation.code = ST_OK;
}

/* ---- the step loop's side ---- */

static enum worker_event next(struct worker_control *c, bool wait, Tandem__V1__CoordinatorMessage **message)
{
    enum worker_event event;
    pthread_mutex_lock(&c->lock);
    for (;;) {
        bool ending = exit_requested(c);
        if (c->count && (ending ? c->draining : c->link == WORKER_LINK_UP)) {
            *message = c->queue[c->head];
            c->head = (c->head + 1) % WORKER_QUEUE_MAX;
            c->count--;
            c->in_step++;
            event = WORKER_PLAN;
            break;
        }
        if (ending) {
            if (c->draining && wait)
                worker_control_finish(c);
            event = WORKER_EXIT;
            break;
        }
        if (c->violation.code != ST_OK) {
            event = WORKER_VIOLATION;
            break;
        }
        if (c->link != WORKER_LINK_UP) {
            event = WORKER_BROKEN;
            break;
        }
        if (!wait) {
            event = WORKER_NOTHING;
            break;
        }
        pthread_cond_wait(&c->changed, &c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return event;
}

enum worker_event worker_control_next(struct worker_control *c, Tandem__V1__CoordinatorMessage **message)
{
    return next(c, true, message);
}

enum worker_event worker_control_poll(struct worker_control *c, Tandem__V1__CoordinatorMessage **message)
{
    return next(c, false, message);
}

void worker_control_step_end(struct worker_control *c, Tandem__V1__CoordinatorMessage *message, bool done)
{
    if (done)
        atomic_store_explicit(&c->last_step, message->plan->step, memory_order_relaxed);
    free_message(message);
    pthread_mutex_lock(&c->lock);
    c->in_step--;
    pthread_mutex_unlock(&c->lock);
}
