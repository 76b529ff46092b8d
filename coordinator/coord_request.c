/* The request table and the life of requests. Engine thread.
 *
 *     NEW --submit--> LIVE --last event--> FINISHED --all text handed over--> CLOSING --closed--> GONE
 *      '--refused--> GONE      '--failed----------------------------------------^
 *
 * With keep_ms LIVE and FINISHED outlive their client, and KEPT comes before CLOSING (coord_attach.c). What the journal brings
 * is HELD until a group serves, then LIVE (coord_journal.c).
 *
 * A request has n answers (struct choice), each a request of its own to the scheduler; it fails as a whole.
 * What a client has not taken waits in the choices (text, ids), not in its sink: at most one message is there at a time, so
 * a slow client gets fewer and larger messages, and what is held for it is bounded by its max_tokens. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

/* ---- the table ---- */

static uint32_t name_hash(const char *s)
{
    uint32_t h = 2166136261u; /* FNV-1a */
    for (; *s; s++)
        h = (h ^ (unsigned char)*s) * 16777619u;
    return h;
}

enum status_code requests_init(struct engine *e, struct status *st)
{
    e->name_mask = 4095;
    e->by_name = calloc((size_t)e->name_mask + 1, sizeof(struct request *));
    return e->by_name ? ST_OK
                      : status_nomem(st, "request table", ((size_t)e->name_mask + 1) * sizeof(struct request *));
}

void requests_fini(struct engine *e)
{
    free(e->table);
    free(e->generation);
    free(e->free_index);
    free(e->by_name);
}

static enum status_code table_grow(struct engine *e, struct status *st)
{
    uint32_t cap = e->table_cap ? 2 * e->table_cap : 256;
    struct choice **table = realloc(e->table, cap * sizeof(struct choice *));
    if (table)
        e->table = table;
    uint32_t *generation = realloc(e->generation, cap * sizeof *generation);
    if (generation)
        e->generation = generation;
    uint32_t *free_index = realloc(e->free_index, cap * sizeof *free_index);
    if (free_index)
        e->free_index = free_index;
    if (!table || !generation || !free_index)
        return status_nomem(st, "request table", cap * sizeof(struct choice *));
    for (uint32_t i = cap; i-- > e->table_cap;) {
        table[i] = NULL;
        generation[i] = 0;
        free_index[e->n_free++] = i;
    }
    e->table_cap = cap;
    return ST_OK;
}

static enum status_code table_add(struct engine *e, struct choice *c, struct status *st)
{
    if (e->n_free == 0) {
        enum status_code rc = table_grow(e, st);
        if (rc != ST_OK)
            return rc;
    }
    c->table_index = e->free_index[--e->n_free];
    e->table[c->table_index] = c;
    c->id = (uint64_t)++e->generation[c->table_index] << 32 | c->table_index;
    return ST_OK;
}

static void table_remove(struct engine *e, struct choice *c)
{
    if (!c->id)
        return;
    e->table[c->table_index] = NULL;
    e->free_index[e->n_free++] = c->table_index;
    c->id = 0;
}

void requests_name_add(struct engine *e, struct request *r)
{
    struct request **bucket = &e->by_name[name_hash(r->name) & e->name_mask];
    r->hash_next = *bucket;
    *bucket = r;
}

void requests_name_remove(struct engine *e, struct request *r)
{
    struct request **p = &e->by_name[name_hash(r->name) & e->name_mask];
    while (*p != r)
        p = &(*p)->hash_next;
    *p = r->hash_next;
}

struct request *request_by_name(struct engine *e, const char *name)
{
    struct request *r = e->by_name[name_hash(name) & e->name_mask];
    while (r && strcmp(r->name, name) != 0)
        r = r->hash_next;
    return r;
}

static struct choice *choice_by_id(struct engine *e, uint64_t id)
{
    uint32_t i = (uint32_t)id;
    struct choice *c = i < e->table_cap ? e->table[i] : NULL;
    return c && c->id == id ? c : NULL;
}

/* ---- ends ---- */

/* When it is worth to ask this server again; 0: no more, it drains. */
static uint32_t retry_after_ms(const struct engine *e)
{
    return e->draining ? 0 : COORD_RETRY_AFTER_MS;
}

/* The scheduler forgets what it still has of the request; the events of that find no choice any more. */
static void leave_scheduler(struct engine *e, struct request *r, enum status_code code, int64_t now_us)
{
    for (uint32_t i = 0; r->choice && i < r->n_choices; i++) {
        struct choice *c = &r->choice[i];
        if (c->live)
            (void)!sched_cancel(c->group->sched, now_us, c->id, code, NULL);
        c->live = false;
        table_remove(e, c);
    }
    r->n_live = 0;
}

static bool is_known(const struct request *r)
{
    return r->state == REQUEST_LIVE || r->state == REQUEST_FINISHED || r->state == REQUEST_HELD ||
           r->state == REQUEST_KEPT;
}

/* The call was finished or cancelled; what is left is request_closed. */
void request_to_closing(struct engine *e, struct request *r, enum status_code code, int64_t now_us)
{
    if (is_known(r)) {
        if (!r->told_end)
            record_end(e->coord, r, code, now_us);
        coord_journal_end(e, r, code);
        leave_scheduler(e, r, code, now_us);
        requests_name_remove(e, r);
        attach_forget(e, r);
    }
    list_remove(&r->stalled_link);
    if (r->closed) {
        r->state = REQUEST_GONE;
        request_unref(r); /* the engine's */
        return;
    }
    r->state = REQUEST_CLOSING;
    r->stalled_us = now_us;
    list_append(&e->stalled, &r->stalled_link);
}

/* The next choice that has something to say, in turns; NULL: none has. */
static struct choice *next_choice(struct request *r)
{
    for (uint32_t i = 0; i < r->n_choices; i++) {
        struct choice *c = &r->choice[(r->turn + i) % r->n_choices];
        if (choice_has_output(c)) {
            r->turn = (c->index + 1) % r->n_choices;
            return c;
        }
    }
    return NULL;
}

/* Its client has all of it. */
static void finish_well(struct engine *e, struct request *r, int64_t now_us)
{
    r->ops->finish(r->sink, NULL, 0);
    if (r->kept)
        attach_keep(e, r, now_us);
    else
        request_to_closing(e, r, ST_OK, now_us);
}

/* Before an early end: what came already, as far as the client takes it at once. */
static void send_rest(struct request *r)
{
    struct status st = STATUS_INIT;
    struct choice *c = NULL;
    if (r->state != REQUEST_LIVE && r->state != REQUEST_FINISHED)
        return;
    while (r->ops->pending(r->sink) == 0 && (c = next_choice(r))) {
        if (choice_send(c, &st) != ST_OK)
            return;
        r->n_done += c->done;
    }
}

static void fail(struct engine *e, struct request *r, const struct status *st, uint32_t retry_after_ms, int64_t now_us)
{
    if (!r->closed) {
        send_rest(r);
        if (r->state == REQUEST_FINISHED && r->n_done == r->n_choices) { /* that was all: nothing failed */
            finish_well(e, r, now_us);
            return;
        }
        r->ops->finish(r->sink, st, retry_after_ms);
    }
    metrics_error(&e->coord->metrics, st->code);
    log_request(&e->coord->log, LOG_DEBUG, r->name, "%s: %s", status_name(st->code), st->message);
    request_to_closing(e, r, st->code, now_us);
}

/* ---- to the client ---- */

/* True when a message sent now goes out at once. Otherwise request_writable will post mail: set the wish, then look again,
 * because the queue may have run empty in between. */
static bool writable(struct request *r)
{
    if (r->ops->pending(r->sink) == 0)
        return true;
    atomic_store(&r->want_writable, true);
    if (r->ops->pending(r->sink) != 0)
        return false;
    atomic_store(&r->want_writable, false);
    return true;
}

static bool has_output(const struct request *r)
{
    for (uint32_t i = 0; i < r->n_choices; i++)
        if (choice_has_output(&r->choice[i]))
            return true;
    return false;
}

void request_flush(struct engine *e, struct request *r, int64_t now_us)
{
    while ((r->state == REQUEST_LIVE || r->state == REQUEST_FINISHED) && !r->closed && has_output(r)) {
        if (!writable(r)) {
            if (!link_listed(&r->stalled_link)) {
                r->stalled_us = now_us;
                list_append(&e->stalled, &r->stalled_link);
            }
            return;
        }
        list_remove(&r->stalled_link);
        struct status st = STATUS_INIT;
        struct choice *c = next_choice(r);
        enum status_code rc = choice_send(c, &st);
        if (rc == ST_CANCELLED)
            return; /* request_closed is on its way */
        if (rc == ST_OUT_OF_RANGE) {
            attach_refuse(e, r, &st, now_us);
            return;
        }
        if (rc != ST_OK) {
            request_end(e, r, &st, now_us);
            return;
        }
        r->n_done += c->done;
        if (r->n_done == r->n_choices)
            finish_well(e, r, now_us);
    }
}

static void mark_dirty(struct engine *e, struct request *r)
{
    if (r->dirty)
        return;
    r->dirty = true;
    request_ref(r);
    r->dirty_next = NULL;
    *e->dirty_tail = r;
    e->dirty_tail = &r->dirty_next;
}

bool requests_flush_dirty(struct engine *e, int64_t now_us)
{
    uint32_t n = 0;
    for (; e->dirty && (n < COORD_LEAST_WRITES || !mailbox_has_ranks(&e->coord->box)); n++) {
        struct request *r = e->dirty;
        e->dirty = r->dirty_next;
        if (!e->dirty)
            e->dirty_tail = &e->dirty;
        r->dirty = false;
        request_flush(e, r, now_us);
        request_unref(r);
    }
    return n > 0;
}

/* ---- tokens ---- */

/* The log probability that came with a sample of the result under way; NULL: none did. */
static const Tandem__V1__Scores *sample_score(const struct engine *e, uint32_t index)
{
    const Tandem__V1__StepResult *r = e->result;
    size_t low = 0, high = r ? r->n_sample_scores : 0;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (r->sample_scores[mid]->index == index)
            return r->sample_scores[mid];
        if (r->sample_scores[mid]->index < index)
            low = mid + 1;
        else
            high = mid;
    }
    return NULL;
}

static enum status_code take_logprob(struct engine *e, struct choice *c, const struct sched_event *ev,
                                     struct status *st)
{
    if (c->request->top < 0)
        return ST_OK;
    const Tandem__V1__Scores *s = sample_score(e, ev->index);
    if (!s)
        return status_set(st, ST_INTERNAL, "the rank sent no log probability of token %u", c->n_new);
    return scores_add(&c->scores, s, st);
}

static void take_token(struct engine *e, struct choice *c, const struct sched_event *ev, int64_t now_us)
{
    struct request *r = c->request;
    struct status st = STATUS_INIT;
    bool ended = false;
    if (c->matched || r->nothing_new)
        return;
    if (c->token_us)
        metrics_time(&e->coord->metrics.inter_token, now_us - c->token_us);
    else
        metrics_time(&e->coord->metrics.first_token, now_us - r->arrived_us);
    c->token_us = now_us;
    if (take_logprob(e, c, ev, &st) != ST_OK || choice_add(c, &ev->token, &ended, &st) != ST_OK) {
        request_end(e, r, &st, now_us);
        return;
    }
    coord_journal_token(e, c, ev->token);
    if (ended) { /* NOT_FOUND: it has ended by length as well, the event comes next */
        c->matched = true;
        (void)!sched_finish(c->group->sched, now_us, c->id, NULL);
    }
    mark_dirty(e, r);
}

static void take_scores(struct engine *e, struct choice *c, const struct sched_event *ev, int64_t now_us)
{
    struct status st = STATUS_INIT;
    for (uint32_t i = 0; i < ev->count; i++)
        if (scores_add(&c->prompt_scores, e->result->prompt_scores[ev->index + i], &st) != ST_OK) {
            request_end(e, c->request, &st, now_us);
            return;
        }
    mark_dirty(e, c->request);
}

/* A target that is not set is kept by all. */
static bool kept_targets(const struct choice *c, const struct sched_event *ev)
{
    const struct request *r = c->request;
    int64_t between_us = ev->last_token_us - ev->first_token_us, tokens = (int64_t)ev->n_new - 1;
    return ev->first_token_us && (!r->ttft_target_us || ev->first_token_us - r->arrived_us <= r->ttft_target_us) &&
           (!r->tbt_target_us || between_us <= r->tbt_target_us * tokens);
}

static void count_finished(struct metrics *m, const struct choice *c, const struct sched_event *ev, int64_t now_us)
{
    metrics_add(ev->stopped || c->matched ? &m->finished_stop : &m->finished_length, 1);
    metrics_tokens(&m->generation_length, c->n_new);
    metrics_add(&m->within_targets, kept_targets(c, ev));
    metrics_time(&m->whole, now_us - c->request->arrived_us);
    if (ev->started_us)
        metrics_time(&m->queue, ev->started_us - c->request->arrived_us);
    if (ev->first_token_us) {
        metrics_time(&m->prefill, ev->first_token_us - ev->started_us);
        metrics_time(&m->decode, ev->last_token_us - ev->first_token_us);
    }
    if (c->index == 0)
        metrics_tokens(&m->prompt_length, ev->n_prompt);
    metrics_add(&m->cached_tokens, ev->n_cached);
}

static void take_finished(struct engine *e, struct choice *c, const struct sched_event *ev, int64_t now_us)
{
    struct request *r = c->request;
    struct status st = STATUS_INIT;
    bool ended = false;
    c->live = false;
    r->n_live--;
    if (!c->matched && !r->nothing_new && choice_add(c, NULL, &ended, &st) != ST_OK) {
        fail(e, r, &st, 0, now_us);
        return;
    }
    c->matched = c->matched || ended;
    c->end = *ev;
    c->finish_ready = true;
    count_finished(&e->coord->metrics, c, ev, now_us);
    if (r->n_live == 0)
        r->state = REQUEST_FINISHED; /* not closed: a live request is ended when its call closes, or it is kept */
    mark_dirty(e, r);
    log_request(&e->coord->log, LOG_DEBUG, r->name, "%u prompt tokens, %u new, %s", ev->n_prompt, c->n_new,
                ev->stopped || c->matched ? "stop" : "length");
    attach_finished(e, r, true, now_us); /* may drop it, but it is in the dirty list */
}

static void take_failed(struct engine *e, struct choice *c, const struct sched_event *ev, int64_t now_us)
{
    struct request *r = c->request;
    struct status st = STATUS_INIT;
    uint32_t retry = 0;
    c->live = false; /* the others are ended with it */
    r->n_live--;
    switch (ev->code) {
    case ST_UNAVAILABLE:
        status_set(&st, ST_UNAVAILABLE, "%s",
                   c->group->lost_reason[0] ? c->group->lost_reason : "the worker group is gone");
        retry = retry_after_ms(e);
        break;
    case ST_ABORTED:
        status_set(&st, ST_INTERNAL,
                   "%u worker groups in a row were lost while this request ran, without a new token "
                   "(--replay-limit %u): %s",
                   e->coord->opt.replay_limit + 1, e->coord->opt.replay_limit, c->group->lost_reason);
        break;
    case ST_DEADLINE_EXCEEDED:
        status_set(&st, ev->code, "the deadline passed %s, after %u of %u tokens",
                   ev->started_us ? "while running" : "in the queue", ev->n_new, r->max_new);
        break;
    case ST_INVALID_ARGUMENT:
        status_set(&st, ev->code, "prompt of %u and max_tokens of %u: more than the new worker group can hold",
                   r->n_prompt, r->max_new);
        break;
    default:
        status_set(&st, ev->code, "the request was ended (%s)", status_name(ev->code));
    }
    fail(e, r, &st, retry, now_us);
}

void request_event(struct engine *e, const struct sched_event *ev, int64_t now_us)
{
    struct choice *c = choice_by_id(e, ev->id);
    if (!c || !c->live)
        return; /* ended by us: request_end took it out of the table at once */
    if (ev->kind == SCHED_TOKEN)
        take_token(e, c, ev, now_us);
    else if (ev->kind == SCHED_SCORES)
        take_scores(e, c, ev, now_us);
    else if (ev->kind == SCHED_FINISHED)
        take_finished(e, c, ev, now_us);
    else
        take_failed(e, c, ev, now_us);
}

void request_end(struct engine *e, struct request *r, const struct status *st, int64_t now_us)
{
    fail(e, r, st, st->code == ST_UNAVAILABLE ? retry_after_ms(e) : 0, now_us);
}

void requests_end_live(struct engine *e, const struct status *st, int64_t now_us)
{
    for (uint32_t i = 0; i < e->table_cap; i++)
        if (e->table[i] && e->table[i]->request->state == REQUEST_LIVE)
            request_end(e, e->table[i]->request, st, now_us);
}

uint32_t requests_end_group(struct engine *e, const struct group *g, const struct status *st, int64_t now_us)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->table_cap; i++) {
        const struct choice *c = e->table[i];
        if (!c || c->group != g || !c->live || c->request->state != REQUEST_LIVE)
            continue;
        request_end(e, c->request, st, now_us);
        n++;
    }
    return n;
}

void request_moved(struct engine *e, uint64_t id, struct group *to)
{
    struct choice *c = choice_by_id(e, id);
    if (c) /* one that was ended by us is still in the scheduler until its event is taken */
        c->group = to;
}

uint32_t requests_end_all(struct engine *e, const struct status *st, int64_t now_us)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->table_cap; i++) {
        if (!e->table[i])
            continue;
        request_end(e, e->table[i]->request, st, now_us);
        n++;
    }
    return n;
}

/* ---- mail ---- */

/* They look at all tokens of the slot, and a rank knows only those that it was sent. */
static bool has_penalties(const Tandem__V1__SampleParams *p)
{
    bool repetition = p->repetition_penalty != 0.0f && p->repetition_penalty != 1.0f;
    return repetition || p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
}

static enum status_code submit_choice(struct engine *e, struct choice *c, struct group *g, int64_t now_us,
                                      struct status *st)
{
    const struct request *r = c->request;
    bool resumed = r->state == REQUEST_HELD;
    enum status_code rc = table_add(e, c, st);
    if (rc != ST_OK)
        return rc;
    const struct sched_request req = {.id = c->id,
                                      .prompt = r->prompt,
                                      .n_prompt = r->n_prompt,
                                      .max_new = r->max_new,
                                      .stop_ids = r->stop,
                                      .n_stop = r->n_stop,
                                      .deadline_us = r->deadline_us,
                                      .ttft_target_us = r->ttft_target_us,
                                      .tbt_target_us = r->tbt_target_us,
                                      .tenant = r->tenant,
                                      .priority = r->priority,
                                      .sample = {.temperature = r->params.temperature,
                                                 .top_k = r->params.top_k,
                                                 .top_p = r->params.top_p,
                                                 .seed = choice_seed(r->params.seed, c->index),
                                                 .options = &r->params},
                                      .scores = c->index == 0 && r->prompt_top >= 0,
                                      .salt = r->salt,
                                      .no_cache_read = r->no_cache_read || has_penalties(&r->params),
                                      .no_cache_write = r->no_cache_write,
                                      .resumed = resumed,
                                      .output = c->ids,
                                      .n_output = resumed ? c->n_new : 0};
    rc = sched_submit(g->sched, now_us, &req, st);
    c->live = rc == ST_OK;
    c->group = g;
    g->routed += c->live;
    return rc;
}

/* A request that is only kept gives way to its caller's next one of that name. */
static bool name_is_free(struct engine *e, const struct request *r, int64_t now_us)
{
    struct request *old = request_by_name(e, r->name);
    if (old && old->state == REQUEST_KEPT && old->closed && memcmp(old->owner, r->owner, sizeof r->owner) == 0) {
        request_to_closing(e, old, ST_OK, now_us);
        old = NULL;
    }
    return old == NULL;
}

static void to_live(struct engine *e, struct request *r, int64_t now_us)
{
    record_admit(e->coord, r, now_us);
    r->state = REQUEST_LIVE;
    if (!r->echo) {
        free(r->prompt);
        r->prompt = NULL;
    }
}

enum status_code request_resume(struct engine *e, struct request *r, int64_t now_us, struct status *st)
{
    struct group *g = route_request(e, r, now_us);
    if (!g)
        return status_set(st, ST_UNAVAILABLE, "%s", e->coord->reason);
    for (uint32_t i = 0; i < r->n_choices; i++) {
        if (r->choice[i].finish_ready)
            continue;
        enum status_code rc = submit_choice(e, &r->choice[i], g, now_us, st);
        if (rc != ST_OK) {
            leave_scheduler(e, r, ST_CANCELLED, now_us);
            return rc;
        }
        r->n_live++;
    }
    to_live(e, r, now_us);
    if (r->n_live == 0)
        r->state = REQUEST_FINISHED;
    return ST_OK;
}

static void submit(struct engine *e, struct request *r, int64_t now_us)
{
    struct status st = STATUS_INIT;
    uint32_t retry = COORD_RETRY_AFTER_MS;
    struct coord *c = e->coord;
    int state = atomic_load(&c->state);
    if (!atomic_load(&c->accepting)) {
        if (state == TANDEM__V1__SERVER_INFO__STATE__DRAINING)
            retry = 0;
        status_set(&st, ST_UNAVAILABLE, "%s", c->reason); /* only this thread writes it */
        goto refuse;
    }
    if (r->arrived_us <= e->abort_all_us) {
        status_set(&st, ST_CANCELLED, "aborted by Control.Abort");
        goto refuse;
    }
    if (!name_is_free(e, r, now_us)) {
        status_set(&st, ST_ALREADY_EXISTS, "request_id: \"%s\" is live already, expected a new one", r->name);
        goto refuse;
    }
    struct group *g = route_request(e, r, now_us); /* all answers: they begin with the same tokens */
    if (!g) {
        status_set(&st, ST_UNAVAILABLE, "%s", c->reason);
        goto refuse;
    }
    for (uint32_t i = 0; i < r->n_choices; i++)
        if (submit_choice(e, &r->choice[i], g, now_us, &st) != ST_OK) {
            leave_scheduler(e, r, ST_CANCELLED, now_us);
            retry = st.code == ST_RESOURCE_EXHAUSTED ? sched_retry_ms(g->sched) : retry;
            goto refuse;
        }
    requests_name_add(e, r);
    r->n_live = r->n_choices;
    coord_journal_accept(e, r);
    to_live(e, r, now_us);
    request_ref(r); /* the engine's */
    return;
refuse:
    record_refuse(c, r, st.code, now_us);
    metrics_error(&c->metrics, st.code);
    r->ops->finish(r->sink, &st, st.code == ST_UNAVAILABLE || st.code == ST_RESOURCE_EXHAUSTED ? retry : 0);
    r->state = REQUEST_GONE;
}

/* The call of request_open has ended. */
static void client_left(struct engine *e, struct request *r, int64_t now_us)
{
    struct status st = STATUS_INIT;
    status_set(&st, ST_CANCELLED, "the client cancelled or went away");
    if (is_known(r) && r->kept) { /* in this order: kept is the intake's until the request is known */
        attach_detach(e, r, now_us);
        return;
    }
    r->closed = true;
    if (r->state == REQUEST_LIVE || r->state == REQUEST_FINISHED)
        request_end(e, r, &st, now_us);
    else if (r->state == REQUEST_CLOSING)
        request_to_closing(e, r, ST_CANCELLED, now_us);
}

void request_handle_mail(struct engine *e, struct request *r, uint32_t flags, int64_t now_us)
{
    if ((flags & REQUEST_CLOSED) && !r->closed && !r->taken_up)
        client_left(e, r, now_us);
    if ((flags & REQUEST_SUBMIT) && !r->closed)
        submit(e, r, now_us);
    if (flags & REQUEST_WRITABLE)
        request_flush(e, r, now_us);
}

void requests_check_slow(struct engine *e, int64_t now_us)
{
    int64_t limit_us = (int64_t)e->coord->opt.slow_client_timeout_ms * 1000;
    while (!list_empty(&e->stalled)) {
        struct request *r = container_of(e->stalled.next, struct request, stalled_link);
        if (r->stalled_us + limit_us > now_us)
            return;
        struct status st = STATUS_INIT;
        status_set(&st, ST_RESOURCE_EXHAUSTED, "the client read nothing for %u ms (--slow-client-timeout-ms)",
                   e->coord->opt.slow_client_timeout_ms);
        log_request(&e->coord->log, LOG_INFO, r->name, "from %s: %s", r->ops->peer(r->sink), st.message);
        r->ops->cancel(r->sink, &st);
        if (r->state == REQUEST_CLOSING || r->state == REQUEST_KEPT) { /* cancelled now; request_closed comes */
            list_remove(&r->stalled_link);
            r->stalled_us = now_us;
            list_append(&e->stalled, &r->stalled_link);
        } else if (r->kept) {
            attach_detach(e, r, now_us);
        } else {
            request_end(e, r, &st, now_us);
        }
    }
}
