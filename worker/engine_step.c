/* engine_step.c - plans carried out: up to info.depth steps under way, of which the results are collected in order.
 *
 *   submit(plan k+1)   while step k runs: its decodes take the tokens that step k samples from the device's memory
 *   collect            waits for step k; its tokens are known to the host from then on
 *
 * What a step may not do while the one in front runs waits for it first (must_wait). Pages that plan k+1 releases are free
 * once step k is done: what k reads, k+1 may not write.
 */
#include <string.h>
#include <time.h>

#include "worker/engine_internal.h"

/* ---- results ---- */

static struct engine_flight *oldest(struct engine *e)
{
    return &e->flight[e->first_flight];
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

/* Of the host it was computed from its submission until now. */
static void keep_time(struct engine *e, struct engine_flight *f)
{
    struct engine_timing *t = &f->timing;
    *t = (struct engine_timing){.begin_us = f->submitted_us, .end_us = now_us(), .pages_us = f->pages_us};
    if (e->info.depth > 1)
        e->ops->time_of(e->forward, &t->begin_us, &t->end_us);
    if (e->ended_us > 0) {
        const double from_us = f->submitted_us > e->ended_us ? f->submitted_us : e->ended_us;
        t->idle_us = from_us - e->ended_us;
        t->gap_us = t->begin_us > from_us ? t->begin_us - from_us : 0;
    }
    e->ended_us = t->end_us;
}

/* The step's tokens are known: to its slots too, unless they have gone on or belong to somebody else. */
static void keep_tokens(struct engine *e, struct engine_flight *f)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < f->samples; i++) {
        if (f->sampled_slot[i] == FORWARD_NO_SLOT)
            continue;
        struct engine_slot *s = &e->slot[f->sampled_slot[i]];
        f->token[n++] = f->token[i];
        if (!s->live || s->sampled_by != f->step)
            continue;
        s->last_token = f->token[n - 1];
        s->pending = false;
    }
    f->finished = true;
    e->done = f->step;
    if (e->timed)
        keep_time(e, f);
}

/* Waits for the steps under way, but collects none. */
static enum status_code finish_all(struct engine *e, struct status *st)
{
    for (uint32_t i = 0; i < e->in_flight; i++) {
        struct engine_flight *f = &e->flight[(e->first_flight + i) % e->info.depth];
        if (f->finished)
            continue;
        enum status_code rc = e->ops->finish(e->forward, st);
        if (rc != ST_OK)
            return status_prefix(st, "step %llu", (unsigned long long)f->step);
        keep_tokens(e, f);
    }
    return ST_OK;
}

enum status_code engine_drop_flights(struct engine *e, struct status *st)
{
    enum status_code rc = finish_all(e, st);
    if (rc == ST_OK)
        e->in_flight = e->first_flight = 0;
    return rc;
}

/* ---- a plan becomes a batch ---- */

/* Whether the plan needs what the steps under way are still making: pages that a slot begins with, or that go to host memory,
 * or tokens of slots whose options look at all tokens, on the host. */
static bool must_wait(const struct engine *e, const Tandem__V1__StepPlan *plan)
{
    if (plan->n_suspend_slots)
        return true;
    for (size_t i = 0; i < plan->n_admits; i++)
        if (plan->admits[i]->from_tokens)
            return true;
    for (size_t i = 0; i < plan->n_decode_slots; i++) {
        const struct engine_slot *s = &e->slot[plan->decode_slots[i]];
        if (s->pending && engine_options_wait(s->options))
            return true;
    }
    return false;
}

/* A device that has room keeps the slot's options, and its history. */
static enum status_code hand_over(struct engine *e, const Tandem__V1__AdmitSlot *admit, struct status *st)
{
    struct engine_slot *s = &e->slot[admit->slot];
    bool kept = false;
    if (!admit->sample) /* then there are no options */
        return ST_OK;
    const struct sample_adjust *all = engine_options_at(s->options, 0); /* tokens that are banned at first, too */
    enum status_code rc = e->ops->begin(e->forward, admit->slot, all, admit->sample->output_at, &kept, st);
    if (kept)
        engine_options_kept(s->options);
    return rc;
}

static enum status_code admit(struct engine *e, const Tandem__V1__AdmitSlot *admit, struct status *st)
{
    struct engine_slot *s = &e->slot[admit->slot];
    const Tandem__V1__SampleParams *p = admit->sample;
    s->live = true;
    s->has_token = s->pending = false;
    s->sampled_by = 0;
    s->length = admit->from_tokens;
    s->sample = engine_sample_params(p);
    s->logprobs = p && p->logprobs;
    s->top_logprobs = p ? p->top_logprobs : 0;
    if (admit->from_tokens) { /* the steps that wrote these tokens are over */
        enum status_code rc = kv_slot_share(e->kv, admit->slot, admit->from_slot, admit->from_tokens, st);
        if (rc != ST_OK)
            return rc;
    }
    enum status_code rc = engine_options_create(&s->options, p, e->info.vocab_size, st);
    return rc == ST_OK && s->options && e->ops->begin ? hand_over(e, admit, st) : rc;
}

/* Where a slot is suspended no step is under way. */
static enum status_code suspend_all(struct engine *e, const Tandem__V1__StepPlan *plan, struct status *st)
{
    for (size_t i = 0; i < plan->n_suspend_slots; i++) {
        struct engine_slot *s = &e->slot[plan->suspend_slots[i]];
        enum status_code rc = kv_slot_suspend(e->kv, plan->suspend_slots[i], st);
        if (rc != ST_OK)
            return rc;
        s->suspended = true;
        e->suspended_pages += kv_pages_for(&e->info.kv, s->length);
    }
    return ST_OK;
}

/* A slot that comes back takes pages that no step under way reads. */
static enum status_code resume_all(struct engine *e, const Tandem__V1__StepPlan *plan, struct status *st)
{
    for (size_t i = 0; i < plan->n_resume_slots; i++) {
        struct engine_slot *s = &e->slot[plan->resume_slots[i]];
        enum status_code rc = kv_slot_resume(e->kv, plan->resume_slots[i], st);
        if (rc != ST_OK)
            return rc;
        s->suspended = false;
        e->suspended_pages -= kv_pages_for(&e->info.kv, s->length);
    }
    return ST_OK;
}

/* More pages may not be there any more, and to give some back may fail: the result says how many there are. */
static void resize(struct engine *e, uint64_t pages)
{
    if (pages)
        (void)!kv_pool_resize(e->kv, pages, &e->resized);
    e->info.kv = kv_pool_account(e->kv);
}

static enum status_code release_and_admit(struct engine *e, const Tandem__V1__StepPlan *plan, struct status *st)
{
    for (size_t i = 0; i < plan->n_release_slots; i++) {
        kv_slot_release(e->kv, plan->release_slots[i], plan->step - 1);
        struct engine_slot *s = &e->slot[plan->release_slots[i]];
        e->suspended_pages -= s->suspended ? kv_pages_for(&e->info.kv, s->length) : 0;
        s->live = s->suspended = false;
        engine_drop_options(e, plan->release_slots[i]);
    }
    kv_pool_complete(e->kv, e->done);
    enum status_code rc = suspend_all(e, plan, st);
    if (rc == ST_OK) {
        resize(e, plan->kv_pages);
        rc = resume_all(e, plan, st);
    }
    for (size_t i = 0; i < plan->n_admits && rc == ST_OK; i++)
        rc = admit(e, plan->admits[i], st);
    return rc;
}

static void add_sample(struct engine *e, struct engine_flight *f, struct forward_batch *b, uint32_t slot)
{
    struct engine_slot *s = &e->slot[slot];
    struct engine_score *score = &f->sample_score[f->n_sample_scores];
    f->sampled_slot[b->samples] = slot;
    f->sample[b->samples++] = (struct forward_sample){
        .row = b->rows - 1,
        .position = s->length,
        .slot = slot,
        .params = s->sample,
        .adjust = engine_options_at(s->options, s->length),
        .scored = s->logprobs,
        .top = s->top_logprobs,
        .scores = &score->scores,
    };
    if (s->logprobs) {
        score->index = f->n_tokens;
        f->n_sample_scores++;
    }
    f->n_tokens++;
    s->has_token = s->pending = true;
    s->sampled_by = f->step;
}

/* Rows first .. first + n - 1 of a chunk, whose following tokens are known. Before its own rows are added to the batch. */
static void add_scores(struct engine *e, struct engine_flight *f, struct forward_batch *b,
                       const Tandem__V1__PrefillChunk *chunk)
{
    for (uint32_t i = chunk->score_first; i < chunk->score_first + chunk->score_rows; i++) {
        f->sampled_slot[b->samples] = FORWARD_NO_SLOT;
        f->sample[b->samples++] = (struct forward_sample){
            .row = b->rows + i,
            .slot = FORWARD_NO_SLOT,
            .given = true,
            .token = i + 1 < chunk->n_token_ids ? chunk->token_ids[i + 1] : chunk->next_token,
            .scored = true,
            .top = e->slot[chunk->slot].top_logprobs,
            .scores = &f->prompt_score[f->n_prompt_scores++].scores,
        };
    }
}

/* Adds a sequence of n rows; its tokens stand in row_token already. */
static enum status_code add_seq(struct engine *e, struct engine_flight *f, struct forward_batch *b, uint32_t slot,
                                uint32_t n, bool sample, struct status *st)
{
    struct engine_slot *s = &e->slot[slot];
    enum status_code rc = kv_slot_grow(e->kv, slot, s->length + n, st);
    if (rc == ST_OK)
        rc = engine_options_feed(s->options, f->row_token + b->rows, n, s->length, st);
    if (rc != ST_OK)
        return rc;
    f->seq[b->seqs++] = (struct forward_seq){.slot = slot, .first_row = b->rows, .rows = n, .position = s->length};
    b->rows += n;
    s->length += n;
    s->has_token = s->pending = false;
    if (sample)
        add_sample(e, f, b, slot);
    return ST_OK;
}

static enum status_code add_all(struct engine *e, struct engine_flight *f, struct forward_batch *b,
                                const Tandem__V1__StepPlan *plan, struct status *st)
{
    enum status_code rc;
    for (size_t i = 0; i < plan->n_decode_slots; i++) {
        uint32_t slot = plan->decode_slots[i];
        const struct engine_slot *s = &e->slot[slot];
        f->row_token[b->rows] = s->pending ? FORWARD_TOKEN_OF_SLOT | slot : s->last_token;
        if ((rc = add_seq(e, f, b, slot, 1, true, st)) != ST_OK)
            return rc;
    }
    for (size_t i = 0; i < plan->n_prefills; i++) {
        const Tandem__V1__PrefillChunk *chunk = plan->prefills[i];
        memcpy(f->row_token + b->rows, chunk->token_ids, chunk->n_token_ids * sizeof *chunk->token_ids);
        add_scores(e, f, b, chunk);
        if ((rc = add_seq(e, f, b, chunk->slot, (uint32_t)chunk->n_token_ids, chunk->sample, st)) != ST_OK)
            return rc;
    }
    return ST_OK;
}

/* ---- steps ---- */

static enum status_code launch(struct engine *e, struct engine_flight *f, const struct forward_batch *b,
                               struct status *st)
{
    if (e->info.depth > 1)
        return e->ops->start(e->forward, b, f->token, st);
    enum status_code rc = e->ops->run(e->forward, b, f->token, st);
    if (rc == ST_OK)
        keep_tokens(e, f);
    return rc;
}

enum status_code engine_submit(struct engine *e, const Tandem__V1__StepPlan *plan, struct status *st)
{
    enum status_code rc = engine_plan_check(e, plan, st);
    if (rc == ST_OK && e->ops->connect && !e->connected)
        rc = engine_connect(e, st);
    if (rc == ST_OK && e->in_flight == e->info.depth)
        rc = status_set(st, ST_INTERNAL, "step %llu: %u steps are under way already", (unsigned long long)plan->step,
                        e->in_flight);
    if (rc == ST_OK && must_wait(e, plan))
        rc = finish_all(e, st);
    if (rc != ST_OK)
        return rc;
    struct engine_flight *f = &e->flight[(e->first_flight + e->in_flight) % e->info.depth];
    struct forward_batch b = {.token = f->row_token, .seq = f->seq, .sample = f->sample};
    f->step = plan->step;
    f->submitted_us = e->timed ? now_us() : 0;
    f->finished = false;
    f->n_tokens = f->n_sample_scores = f->n_prompt_scores = 0;
    const uint64_t exposed_ns = kv_pool_stats(e->kv).exposed_ns;
    kv_pool_hold(e->kv, true);
    rc = release_and_admit(e, plan, st);
    if (rc == ST_OK)
        rc = add_all(e, f, &b, plan, st);
    f->pages_us = (double)(kv_pool_stats(e->kv).exposed_ns - exposed_ns) / 1e3;
    f->samples = b.samples;
    f->rows = b.rows;
    f->decodes = (uint32_t)plan->n_decode_slots;
    if (e->info.depth == 1) /* the launch is the whole step */
        kv_pool_hold(e->kv, false);
    if (rc == ST_OK)
        rc = launch(e, f, &b, st);
    kv_pool_hold(e->kv, false);
    if (rc != ST_OK)
        return status_prefix(st, "step %llu", (unsigned long long)plan->step);
    e->step = plan->step;
    e->in_flight++;
    return ST_OK;
}

uint32_t engine_in_flight(const struct engine *e)
{
    return e->in_flight;
}

enum status_code engine_poll(struct engine *e, bool *done, struct status *st)
{
    struct engine_flight *f = oldest(e);
    *done = e->in_flight == 0 || f->finished;
    if (*done)
        return ST_OK;
    enum status_code rc = e->ops->poll(e->forward, done, st);
    return rc == ST_OK ? ST_OK : status_prefix(st, "step %llu", (unsigned long long)f->step);
}

enum status_code engine_collect(struct engine *e, struct engine_result *result, struct status *st)
{
    struct engine_flight *f = oldest(e);
    if (e->in_flight == 0)
        return status_set(st, ST_INTERNAL, "no step is under way");
    if (!f->finished) {
        enum status_code rc = e->ops->finish(e->forward, st);
        if (rc != ST_OK)
            return status_prefix(st, "step %llu", (unsigned long long)f->step);
        keep_tokens(e, f);
    }
    bool reports = comm_rank(e->comm) == 0;
    struct kv_stats kv = kv_pool_stats(e->kv);
    const char *resize_failed = e->resized.code == ST_OK ? NULL : e->resized.message;
    e->resized.code = ST_OK;
    e->first_flight = (e->first_flight + 1) % e->info.depth;
    e->in_flight--;
    *result = (struct engine_result){
        .step = f->step,
        .rows = f->rows,
        .decodes = f->decodes,
        .timing = f->timing,
        .tokens = f->token,
        .n_tokens = f->n_tokens,
        .sample_scores = f->sample_score,
        .prompt_scores = f->prompt_score,
        .n_sample_scores = reports ? f->n_sample_scores : 0,
        .n_prompt_scores = reports ? f->n_prompt_scores : 0,
        .used_pages = kv.mapped_pages,
        .kv = kv,
        .resize_failed = resize_failed,
    };
    return ST_OK;
}

enum status_code engine_step(struct engine *e, const Tandem__V1__StepPlan *plan, struct engine_result *result,
                             struct status *st)
{
    enum status_code rc = engine_submit(e, plan, st);
    return rc == ST_OK ? engine_collect(e, result, st) : rc;
}
