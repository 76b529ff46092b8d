/* coord_journal.c - the journal of this coordinator: what it is told, and what becomes of what it brings.
 *
 *     accepted ──▶ ACCEPT: image, prompt, seed    a new token ──▶ TOKENS    the end ──▶ END
 *     at the start: found ──▶ HELD ──the first group serves──▶ LIVE behind the tokens that are known, as after the loss of a
 *     group (coord_replay.c) ──▶ its client attaches (coord_attach.c), or it is cancelled after --journal-keep-ms
 *
 * The image is the request as a GenerateRequest that needs no default and no tokenizer any more. With log probabilities no
 * tokens are recorded: those of the journal would have none, so all of them are sampled again.
 *
 * What ended well stays for a while: a client may have missed the end. With keep_ms so long, else for ENDED_MS. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "coordinator/coord_internal.h"

#define ENDED_MS 5000

static int64_t unix_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    return ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* ---- what it is told ---- */

enum status_code coord_journal_image(struct request *r, const Tandem__V1__GenerateRequest *m, struct status *st)
{
    Tandem__V1__GenerateRequest image = *m; /* what it points to stays m's */
    Tandem__V1__Sampling sampling = TANDEM__V1__SAMPLING__INIT;
    Tandem__V1__Stopping stopping = TANDEM__V1__STOPPING__INIT;
    Tandem__V1__TokenIds none = TANDEM__V1__TOKEN_IDS__INIT;
    if (!r->coord->journal || !r->ops->attachable)
        return ST_OK;
    if (m->sampling)
        sampling = *m->sampling;
    if (m->stopping)
        stopping = *m->stopping;
    sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS_SEED;
    sampling.seed = r->params.seed;
    sampling.allowed_token_ids = r->params.allowed_ids; /* taken out of m */
    sampling.n_allowed_token_ids = r->params.n_allowed_ids;
    stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
    stopping.max_tokens = r->nothing_new ? 0 : r->max_new;
    image.sampling = &sampling;
    image.stopping = &stopping;
    if (!r->echo || m->prompt_case != TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT) {
        image.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
        image.token_ids = &none;
    }
    r->image_len = tandem__v1__generate_request__get_packed_size(&image);
    r->image = malloc(r->image_len ? r->image_len : 1);
    if (!r->image)
        return status_nomem(st, "request for the journal", r->image_len);
    tandem__v1__generate_request__pack(&image, r->image);
    return ST_OK;
}

void coord_journal_accept(struct engine *e, struct request *r)
{
    struct journal *j = e->coord->journal;
    if (!j || !r->image)
        return;
    int64_t offset_us = unix_us() - coord_now_us();
    r->number = journal_number(j);
    struct journal_accept a = {.number = r->number,
                               .arrived_us = r->arrived_us + offset_us,
                               .deadline_us = r->deadline_us == INT64_MAX ? INT64_MAX : r->deadline_us + offset_us,
                               .model = e->model_digest,
                               .keep_ms = r->keep_ms,
                               .n_choices = r->n_choices,
                               .name = r->name,
                               .name_len = (uint32_t)strlen(r->name),
                               .prompt = r->prompt,
                               .n_prompt = r->n_prompt,
                               .request = r->image,
                               .request_len = (uint32_t)r->image_len};
    memcpy(a.owner, r->owner, sizeof a.owner);
    journal_accept(j, &a);
    free(r->image);
    r->image = NULL;
}

void coord_journal_token(struct engine *e, const struct choice *c, uint32_t id)
{
    const struct request *r = c->request;
    if (r->number && r->top < 0 && r->prompt_top < 0)
        journal_tokens(e->coord->journal, r->number, c->index, c->n_new - 1, &id, 1);
}

/* A server that stops tells its clients so, and leaves their requests to the next. */
void coord_journal_end(struct engine *e, struct request *r, enum status_code code)
{
    if (!r->number || (e->stop != STOP_NONE && code == ST_UNAVAILABLE))
        return;
    int64_t keep_ms = r->state == REQUEST_KEPT ? 0 : r->keep_ms > ENDED_MS ? r->keep_ms : ENDED_MS;
    journal_end(e->coord->journal, r->number, code == ST_OK && keep_ms ? unix_us() + keep_ms * 1000 : 0);
}

/* ---- what it brings ---- */

static uint32_t *copy_known(const struct journal_found *f)
{
    size_t n = COORD_MAX_ANSWERS;
    for (uint32_t i = 0; i < f->accept.n_choices; i++)
        n += f->n_tokens[i];
    uint32_t *known = calloc(n, sizeof *known);
    if (!known)
        return NULL;
    uint32_t *at = known + COORD_MAX_ANSWERS;
    for (uint32_t i = 0; i < f->accept.n_choices; i++) {
        known[i] = f->n_tokens[i];
        if (known[i])
            memcpy(at, f->tokens[i], known[i] * sizeof *at);
        at += known[i];
    }
    return known;
}

static struct request *make_held(struct coord *c, const struct journal_found *f)
{
    const struct journal_accept *a = &f->accept;
    struct request *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    atomic_fetch_add(&c->live_requests, 1);
    atomic_init(&r->refs, 1); /* the engine's */
    r->mail.kind = MAIL_REQUEST;
    r->coord = c;
    r->ops = &no_sink;
    r->prompt = malloc((size_t)a->n_prompt * sizeof *r->prompt);
    r->image = malloc(a->request_len ? a->request_len : 1);
    r->known = copy_known(f);
    if (!r->prompt || !r->image || !r->known) {
        request_unref(r);
        return NULL;
    }
    memcpy(r->prompt, a->prompt, (size_t)a->n_prompt * sizeof *r->prompt);
    memcpy(r->image, a->request, a->request_len);
    memcpy(r->name, a->name, a->name_len);
    memcpy(r->owner, a->owner, sizeof r->owner);
    r->n_prompt = a->n_prompt;
    r->image_len = a->request_len;
    r->number = a->number;
    r->n_choices = a->n_choices;
    r->keep_ms = a->keep_ms > c->opt.journal_keep_ms ? a->keep_ms : c->opt.journal_keep_ms;
    r->kept = r->closed = r->taken_up = true;
    r->state = REQUEST_HELD;
    r->model = a->model;
    return r;
}

static void take_back(void *ctx, const struct journal_found *f)
{
    struct engine *e = ctx;
    struct coord *c = e->coord;
    int64_t now_us = coord_now_us(), offset_us = unix_us() - now_us;
    struct request *r = make_held(c, f);
    if (!r) {
        log_line(&c->log, LOG_ERROR, "journal: out of memory for a request of %u tokens", f->accept.n_prompt);
        return;
    }
    if (request_by_name(e, r->name)) { /* of two with a name the older one had ended */
        struct request *old = request_by_name(e, r->name);
        old->number = 0;
        requests_name_remove(e, old);
        attach_forget(e, old);
        request_unref(old);
    }
    r->arrived_us = f->accept.arrived_us - offset_us;
    r->deadline_us = f->accept.deadline_us == INT64_MAX ? INT64_MAX : f->accept.deadline_us - offset_us;
    r->keep_until_us = f->until_us ? f->until_us - offset_us : now_us + (int64_t)r->keep_ms * 1000;
    requests_name_add(e, r);
    list_append(&e->held, &r->held_link);
    list_append(&e->unclaimed, &r->keep_link);
    e->n_unclaimed++;
    metrics_add(&c->metrics.recovered, 1);
}

/* The answer ended before the crash, or with it. */
static void close_choice(struct choice *c, bool stopped, uint32_t token, int64_t now_us)
{
    const struct request *r = c->request;
    struct status st = STATUS_INIT;
    bool ended = false;
    if (!c->matched && choice_add(c, NULL, &ended, &st) == ST_OK)
        c->matched = ended;
    c->end = (struct sched_event){.kind = SCHED_FINISHED,
                                  .stopped = stopped,
                                  .token = token,
                                  .n_prompt = r->n_prompt,
                                  .n_new = c->n_new,
                                  .replays = 1,
                                  .arrived_us = r->arrived_us,
                                  .started_us = now_us,
                                  .first_token_us = now_us,
                                  .last_token_us = now_us};
    c->finish_ready = true;
}

static bool is_stop(const struct request *r, uint32_t id)
{
    for (uint32_t i = 0; i < r->n_stop; i++)
        if (r->stop[i] == id)
            return true;
    return false;
}

/* Tokens go the way that they went the first time: text, stop strings, the end. */
static enum status_code feed(struct choice *c, const uint32_t *id, uint32_t n, int64_t now_us, struct status *st)
{
    const struct request *r = c->request;
    uint32_t vocab = r->coord->model.vocab_size;
    for (uint32_t i = 0; i < n && !c->finish_ready; i++) {
        if (id[i] >= vocab)
            return status_set(st, ST_DATA_LOSS, "the journal's token %u is %u, expected below %u", i, id[i], vocab);
        enum status_code rc = choice_add(c, &id[i], &c->matched, st);
        if (rc != ST_OK)
            return rc;
        bool stopped = is_stop(r, id[i]);
        if (stopped || c->matched || c->n_new == r->max_new)
            close_choice(c, stopped, id[i], now_us);
    }
    return ST_OK;
}

static enum status_code resume(struct engine *e, struct request *r, int64_t now_us, struct status *st)
{
    const uint32_t *id = r->known + COORD_MAX_ANSWERS;
    if (r->model != e->model_digest)
        return status_set(st, ST_UNAVAILABLE, "the worker group serves another model than the one before");
    enum status_code rc = intake_restore(e->coord, r, st);
    bool scored = r->top >= 0 || r->prompt_top >= 0;
    for (uint32_t i = 0; rc == ST_OK && i < r->n_choices; i++) {
        if (!scored)
            rc = feed(&r->choice[i], id, r->known[i], now_us, st);
        id += r->known[i];
    }
    free(r->image);
    free(r->known);
    r->image = NULL;
    r->known = NULL;
    return rc == ST_OK ? request_resume(e, r, now_us, st) : rc;
}

void coord_journal_resume(struct engine *e, int64_t now_us)
{
    uint32_t n = 0;
    if (list_empty(&e->held))
        return;
    while (!list_empty(&e->held)) {
        struct request *r = container_of(e->held.next, struct request, held_link);
        struct status st = STATUS_INIT;
        if (resume(e, r, now_us, &st) != ST_OK) {
            log_request(&e->coord->log, LOG_WARN, r->name, "of the journal, cannot go on: %s", st.message);
            request_end(e, r, &st, now_us);
            continue;
        }
        list_remove(&r->held_link);
        attach_begin(e, r, now_us);
        n++;
    }
    log_line(&e->coord->log, LOG_INFO, "journal: going on with %u requests", n);
}

/* ---- life ---- */

/* From the journal's thread. */
static void on_report(void *ctx, bool failed, const char *text)
{
    const struct coord *c = ctx;
    log_line(&c->log, failed ? LOG_ERROR : LOG_INFO, "%s", text);
}

enum status_code coord_journal_open(struct coord *c, struct status *st)
{
    const struct coord_options *o = &c->opt;
    if (!o->journal_dir)
        return ST_OK;
    struct journal_config cfg = {.dir = o->journal_dir,
                                 .max_bytes = o->journal_bytes,
                                 .sync_ms = o->journal_sync_ms,
                                 .report = on_report,
                                 .report_ctx = c};
    if (journal_open(&c->journal, &cfg, st) != ST_OK)
        return status_prefix(st, "--journal");
    journal_each(c->journal, take_back, &c->engine);
    uint32_t n = c->engine.n_unclaimed;
    if (n)
        log_line(&c->log, LOG_INFO, "journal: %u requests wait for the first worker group", n);
    return journal_start(c->journal, st);
}

void coord_journal_close(struct coord *c)
{
    journal_close(c->journal);
    c->journal = NULL;
}

void coord_journal_publish(struct engine *e)
{
    struct metrics *m = &e->coord->metrics;
    struct journal_stats s;
    metrics_set(&m->unclaimed, e->n_unclaimed);
    if (!e->coord->journal)
        return;
    journal_get_stats(e->coord->journal, &s);
    metrics_set(&m->journal_degraded, s.degraded);
    metrics_set(&m->journal_errors, s.errors);
    metrics_set(&m->journal_bytes, s.bytes);
    metrics_set(&m->journal_file_bytes, s.file_bytes);
    metrics_set(&m->journal_dropped, s.dropped + s.skipped);
    metrics_set(&m->journal_syncs, s.syncs);
    metrics_set(&m->journal_requests, s.live);
}
