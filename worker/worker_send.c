/* worker_send.c - what a rank says to its coordinator: heartbeats, results, a fault. */
#include "worker/worker_internal.h"

#include <stdlib.h>
#include <string.h>

#define NO_BEAT_MS 60000 /* between looks of a sender that has no more heartbeats to send */

void worker_control_send(struct worker_control *c, Tandem__V1__RankMessage *m)
{
    struct status st = STATUS_INIT;
    m->epoch = c->epoch;
    if (rpc_stream_send(c->stream, &m->base, WORKER_SEND_TIMEOUT_MS, &st) != ST_OK)
        worker_control_break(c, &st);
}

static void send_heartbeat(struct worker_control *c, int64_t now_us)
{
    Tandem__V1__Heartbeat h = TANDEM__V1__HEARTBEAT__INIT;
    h.last_step = atomic_load_explicit(&c->last_step, memory_order_relaxed);
    h.monotonic_us = (uint64_t)now_us;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_HEARTBEAT;
    m.heartbeat = &h;
    worker_control_send(c, &m);
}

/* Messages for n scores, pointers and structs in one allocation; NULL: out of memory. */
static Tandem__V1__Scores **make_scores(const struct engine_score *score, uint32_t n)
{
    Tandem__V1__Scores **list = malloc(n * (sizeof(Tandem__V1__Scores *) + sizeof(Tandem__V1__Scores)));
    if (!list)
        return NULL;
    Tandem__V1__Scores *m = (Tandem__V1__Scores *)(void *)(list + n);
    for (uint32_t i = 0; i < n; i++) {
        const struct sample_scores *s = &score[i].scores;
        tandem__v1__scores__init(&m[i]);
        m[i].index = score[i].index;
        m[i].token_id = s->token;
        m[i].logprob = s->logprob;
        m[i].rank = s->rank;
        m[i].n_top_ids = m[i].n_top_logprobs = s->n;
        m[i].top_ids = (uint32_t *)s->top; /* packing only reads */
        m[i].top_logprobs = (float *)s->top_logprob;
        list[i] = &m[i];
    }
    return list;
}

static void fill_kv(Tandem__V1__KvStats *m, const struct kv_stats *s)
{
    tandem__v1__kv_stats__init(m);
    m->total_pages = s->total_pages;
    m->mapped_pages = s->mapped_pages;
    m->fenced_pages = s->fenced_pages;
    m->free_pages = s->free_pages;
    m->parked_pages = s->parked_pages;
    m->shared_pages = s->shared_pages;
    m->given_pages = s->given_pages;
    m->wasted_bytes = s->wasted_bytes;
    m->map_calls = s->map_calls;
    m->clear_calls = s->clear_calls;
    m->driver_us = s->map_ns / 1000;
    m->exposed_us = s->exposed_ns / 1000;
    m->failed_ahead = s->failed_ahead;
}

static void send_result(struct worker_control *c, const struct worker_result *result)
{
    Tandem__V1__Scores **sample = NULL, **prompt = NULL;
    if ((result->n_sample_scores && !(sample = make_scores(result->sample_scores, result->n_sample_scores))) ||
        (result->n_prompt_scores && !(prompt = make_scores(result->prompt_scores, result->n_prompt_scores)))) {
        struct status st = STATUS_INIT;
        status_nomem(&st, "scores of a result",
                     (result->n_sample_scores + result->n_prompt_scores) * sizeof(Tandem__V1__Scores));
        worker_control_break(c, &st);
        free(sample);
        return;
    }
    Tandem__V1__StepResult r = TANDEM__V1__STEP_RESULT__INIT;
    Tandem__V1__KvStats kv;
    fill_kv(&kv, &result->kv);
    r.kv = &kv;
    r.step = result->step;
    r.compute_us = result->compute_us;
    r.used_pages = result->used_pages;
    r.n_token_ids = result->n_tokens;
    r.token_ids = result->tokens;
    r.n_sample_scores = result->n_sample_scores;
    r.sample_scores = sample;
    r.n_prompt_scores = result->n_prompt_scores;
    r.prompt_scores = prompt;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_RESULT;
    m.result = &r;
    worker_control_send(c, &m);
    free(sample);
    free(prompt);
}

void *worker_control_sender(void *arg)
{
    struct worker_control *c = arg;
    int64_t beat_us = worker_now_us();
    pthread_mutex_lock(&c->lock);
    while (c->link == WORKER_LINK_UP) {
        int64_t now_us = worker_now_us();
        bool beat = now_us >= beat_us && !c->closing;
        if (!beat && !c->result_count) {
            worker_control_wait(c, &c->to_send, c->closing ? now_us + NO_BEAT_MS * 1000 : beat_us);
            continue;
        }
        const struct worker_result *result = c->result_count ? &c->results[c->result_head] : NULL;
        c->sending = true;
        pthread_mutex_unlock(&c->lock);
        if (beat) {
            beat_us = now_us + (int64_t)c->heartbeat_ms * 1000;
            send_heartbeat(c, now_us);
        }
        if (result)
            send_result(c, result);
        pthread_mutex_lock(&c->lock);
        c->sending = false;
        if (result) {
            c->result_head = (c->result_head + 1) % WORKER_QUEUE_MAX;
            c->result_count--;
        }
        if (c->flushing)
            pthread_cond_broadcast(&c->changed);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

bool worker_control_await_sender(struct worker_control *c, uint32_t most)
{
    c->flushing = true;
    while (c->link == WORKER_LINK_UP && c->result_count > most)
        pthread_cond_wait(&c->changed, &c->lock);
    c->flushing = false;
    return c->link == WORKER_LINK_UP;
}

/* Copies n elements into an array that is kept and reused; false without memory for them. */
static bool keep(void *array, uint32_t *capacity, const void *from, uint32_t n, size_t size)
{
    void **kept = array;
    if (n > *capacity) {
        void *grown = realloc(*kept, 2 * n * size);
        if (!grown)
            return false;
        *kept = grown;
        *capacity = 2 * n;
    }
    if (n)
        memcpy(*kept, from, n * size);
    return true;
}

/* Puts the result into the queue for the sender; false without memory for what it holds. Called with the lock. */
static bool queue_result(struct worker_control *c, const struct worker_result *result)
{
    struct worker_result *to = &c->results[(c->result_head + c->result_count) % WORKER_QUEUE_MAX];
    if (!keep(&to->tokens, &to->capacity, result->tokens, result->n_tokens, sizeof *to->tokens) ||
        !keep(&to->sample_scores, &to->sample_scores_capacity, result->sample_scores, result->n_sample_scores,
              sizeof *to->sample_scores) ||
        !keep(&to->prompt_scores, &to->prompt_scores_capacity, result->prompt_scores, result->n_prompt_scores,
              sizeof *to->prompt_scores))
        return false;
    to->step = result->step;
    to->compute_us = result->compute_us;
    to->used_pages = result->used_pages;
    to->kv = result->kv;
    to->n_tokens = result->n_tokens;
    to->n_sample_scores = result->n_sample_scores;
    to->n_prompt_scores = result->n_prompt_scores;
    c->result_count++;
    return true;
}

/* To write a message takes 20-100 us of system calls. While the next plan waits the sender does it, beside the next step;
 * when none waits, this thread has nothing better to do, and waking the other would only delay the result. */
void worker_control_result(struct worker_control *c, uint64_t step, uint64_t compute_us,
                           const struct engine_result *result)
{
    const struct worker_result r = {
        .step = step,
        .compute_us = compute_us,
        .used_pages = result->used_pages,
        .kv = result->kv,
        .tokens = (uint32_t *)result->tokens, /* packed or copied from where it lies, not written to */
        .n_tokens = c->hello.rank == 0 ? result->n_tokens : 0,
        .sample_scores = (struct engine_score *)result->sample_scores,
        .n_sample_scores = result->n_sample_scores,
        .prompt_scores = (struct engine_score *)result->prompt_scores,
        .n_prompt_scores = result->n_prompt_scores,
    };
    pthread_mutex_lock(&c->lock);
    if (c->link != WORKER_LINK_UP || !worker_control_await_sender(c, WORKER_QUEUE_MAX - 1)) {
        pthread_mutex_unlock(&c->lock);
        return;
    }
    bool queued = (c->count || c->result_count) && queue_result(c, &r);
    if (queued)
        pthread_cond_signal(&c->to_send);
    else
        worker_control_await_sender(c, 0); /* after a lack of memory: results leave in order */
    pthread_mutex_unlock(&c->lock);
    if (!queued)
        send_result(c, &r);
}

/* No heartbeats behind a half-close: the first would fail, and cancel the stream. Called with the lock; false: the link is
 * not up, or one is still being written then. */
static bool stop_sender(struct worker_control *c, uint32_t wait_ms)
{
    c->closing = true;
    if (!worker_control_await_sender(c, 0))
        return false;
    const int64_t until_us = worker_now_us() + (int64_t)wait_ms * 1000;
    c->flushing = true;
    while (c->link == WORKER_LINK_UP && c->sending && worker_control_wait(c, &c->changed, until_us))
        ;
    c->flushing = false;
    return c->link == WORKER_LINK_UP && !c->sending;
}

/* To exit or to cancel the stream can lose what was just sent: the peer drops what it has not read when a stream breaks.
 * So the stream is half-closed, and the coordinator's answer says that all has arrived: the stream's end, or Shutdown, an exit
 * that was not asked for before (`asked`). Its own ends the stream right behind Shutdown, and drops what comes after it.
 * Called with the lock, which it gives up meanwhile. */
static enum status_code finish_stream(struct worker_control *c, int asked, struct status *st)
{
    if (c->link != WORKER_LINK_UP || worker_guard_exit_code(c->guard) != asked)
        return ST_OK; /* answered already */
    pthread_mutex_unlock(&c->lock);
    int64_t until_us = worker_now_us() + WORKER_FINISH_MS * 1000;
    enum status_code rc = rpc_stream_half_close(c->stream, WORKER_FINISH_MS, st);
    pthread_mutex_lock(&c->lock);
    while (rc == ST_OK && c->link == WORKER_LINK_UP && worker_guard_exit_code(c->guard) == asked &&
           worker_control_wait(c, &c->changed, until_us))
        ;
    return rc;
}

void worker_control_finish(struct worker_control *c)
{
    struct status st = STATUS_INIT;
    if (stop_sender(c, WORKER_FINISH_MS) && finish_stream(c, worker_guard_exit_code(c->guard), &st) != ST_OK)
        worker_log(c->log, WORKER_LOG_DEBUG, "the coordinator did not take the stream's end: %s", st.message);
}

void worker_control_fault(struct worker_control *c, const struct status *why, bool permanent)
{
    const int asked = worker_guard_exit_code(c->guard);
    pthread_mutex_lock(&c->lock);
    stop_sender(c, WORKER_FINISH_MS);
    bool up = c->link == WORKER_LINK_UP;
    pthread_mutex_unlock(&c->lock);
    if (!up)
        return;
    Tandem__V1__Fault f = TANDEM__V1__FAULT__INIT;
    f.code = why->code;
    f.message = (char *)why->message;
    f.permanent = permanent;
    Tandem__V1__RankMessage m = TANDEM__V1__RANK_MESSAGE__INIT;
    m.epoch = c->epoch;
    m.body_case = TANDEM__V1__RANK_MESSAGE__BODY_FAULT;
    m.fault = &f;
    struct status st = STATUS_INIT;
    enum status_code rc = rpc_stream_send(c->stream, &m.base, WORKER_FAULT_SEND_MS, &st);
    pthread_mutex_lock(&c->lock);
    if (rc == ST_OK)
        rc = finish_stream(c, asked, &st);
    pthread_mutex_unlock(&c->lock);
    if (rc != ST_OK)
        worker_log(c->log, WORKER_LOG_WARNING, "the coordinator did not take the fault: %s", st.message);
}
