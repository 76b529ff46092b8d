/* What a rank's Ready must hold, and what all of them together make of the group. */
#include <string.h>

#include "coordinator/coord_internal.h"

static enum status_code check_ready(const Tandem__V1__Ready *r, struct status *st)
{
    const Tandem__V1__ModelInfo *m = r->model;
    if (r->max_slots < 1 || r->max_slots > 65536)
        return status_set(st, ST_FAILED_PRECONDITION, "max_slots: %u, expected 1 to 65536", r->max_slots);
    if (r->max_context_tokens < 2)
        return status_set(st, ST_FAILED_PRECONDITION, "max_context_tokens: %u, expected at least 2",
                          r->max_context_tokens);
    if (r->page_bytes == 0 || r->total_pages == 0 || r->token_bytes >> 31 || r->page_bytes >> 40)
        return status_set(st, ST_FAILED_PRECONDITION, "KV pool: %llu pages of %llu bytes, %llu bytes a token",
                          (unsigned long long)r->total_pages, (unsigned long long)r->page_bytes,
                          (unsigned long long)r->token_bytes);
    if (r->max_step_tokens == 0)
        return status_set(st, ST_FAILED_PRECONDITION, "max_step_tokens: 0, expected at least 1");
    if (r->vocab_size == 0 || !m)
        return status_set(st, ST_FAILED_PRECONDITION, "vocab_size or model is missing");
    if (m->n_eos_token_ids > COORD_MAX_EOS_IDS)
        return status_set(st, ST_FAILED_PRECONDITION, "model.eos_token_ids: %zu, expected at most %d",
                          m->n_eos_token_ids, COORD_MAX_EOS_IDS);
    return ST_OK;
}

enum status_code group_take_ready(struct group *g, struct rank_conn *conn, const Tandem__V1__Ready *r,
                                  struct status *st)
{
    struct kv_account kv = {.page_bytes = r->page_bytes, .token_bytes = r->token_bytes, .total_pages = r->total_pages};
    uint64_t max = r->max_pages > r->total_pages ? r->max_pages : r->total_pages;
    enum status_code rc = check_ready(r, st);
    if (rc != ST_OK)
        return rc;
    if (conn->ready)
        return status_set(st, ST_FAILED_PRECONDITION, "Ready came twice");
    if (g->n_ready == 0) {
        g->kv = kv;
        g->kv_pages_max = max;
        g->slots = r->max_slots;
        g->context = r->max_context_tokens;
        g->step_tokens = r->max_step_tokens;
        g->vocab_size = r->vocab_size;
        g->sample_options = r->sample_options;
        g->suspend_pages = r->suspend_pages;
        g->suspend_bytes_per_s = r->suspend_bytes_per_s;
    } else {
        if (kv.page_bytes != g->kv.page_bytes)
            return status_set(st, ST_FAILED_PRECONDITION, "page_bytes: %llu here, %llu on another rank",
                              (unsigned long long)kv.page_bytes, (unsigned long long)g->kv.page_bytes);
        if (r->vocab_size != g->vocab_size)
            return status_set(st, ST_FAILED_PRECONDITION, "vocab_size: %u here, %u on another rank", r->vocab_size,
                              g->vocab_size);
        g->kv = kv_account_worst(g->kv, kv);
        if (max < g->kv_pages_max)
            g->kv_pages_max = max;
        g->slots = min_u32(g->slots, r->max_slots);
        g->context = min_u32(g->context, r->max_context_tokens);
        g->sample_options &= r->sample_options;
        g->step_tokens = min_u32(g->step_tokens, r->max_step_tokens);
        if (r->suspend_pages < g->suspend_pages)
            g->suspend_pages = r->suspend_pages;
        /* a rank without KV heads has no rate and needs none */
        if (g->suspend_bytes_per_s == 0 || (r->suspend_bytes_per_s && r->suspend_bytes_per_s < g->suspend_bytes_per_s))
            g->suspend_bytes_per_s = r->suspend_bytes_per_s;
    }
    conn->kv.total_pages = conn->kv.free_pages = r->token_bytes ? r->total_pages : 0;
    if (*r->device)
        text_sanitize(conn->device, sizeof conn->device, r->device, strlen(r->device));
    conn->ready = true;
    g->n_ready++;
    return ST_OK;
}

/* A request is checked against the largest context and what all groups can do that serve or are awaited. */
static void common_facts(const struct engine *e, struct model_facts *f)
{
    for (uint32_t i = 0; i < e->n_groups; i++) {
        const struct group *g = &e->group[i];
        if (!g->serving && !g->wait_until_us)
            continue;
        f->max_context = g->context > f->max_context ? g->context : f->max_context;
        f->sample_options &= g->sample_options;
    }
}

/* value, where it lies over 0 and is at most `most`, and the ranks have the option; else off. */
static float taken_default(const struct engine *e, const char *name, float value, float most, float off, bool supported)
{
    if (!(value > 0.0f && value <= most) || value == off)
        return off;
    if (!supported)
        log_line(&e->coord->log, LOG_WARN,
                 "%s %g of generation_config.json is no default here: the back end has no such option", name,
                 (double)value);
    return supported ? value : off;
}

static void take_defaults(const struct engine *e, struct model_facts *f, const Tandem__V1__Defaults *d)
{
    uint32_t o = f->sample_options;
    f->temperature = d->temperature >= 0.0f && d->temperature <= 100.0f ? d->temperature : 1.0f;
    f->top_k = d->top_k;
    f->top_p = taken_default(e, "top_p", d->top_p, 1.0f, 1.0f, true);
    f->min_p = taken_default(e, "min_p", d->min_p, 1.0f, 0.0f, o & TANDEM__V1__SAMPLE_OPTION__MIN_P);
    f->typical_p = taken_default(e, "typical_p", d->typical_p, 1.0f, 1.0f, o & TANDEM__V1__SAMPLE_OPTION__TYPICAL_P);
    f->repetition_penalty = taken_default(e, "repetition_penalty", d->repetition_penalty, 100.0f, 1.0f,
                                          o & TANDEM__V1__SAMPLE_OPTION__ADJUST);
}

static void set_facts(struct engine *e, const struct group *g)
{
    const Tandem__V1__ModelInfo *m = e->ready->ready->model;
    struct model_facts f = {.vocab_size = g->vocab_size,
                            .max_context = g->context,
                            .temperature = 1.0f,
                            .top_p = 1.0f,
                            .typical_p = 1.0f,
                            .repetition_penalty = 1.0f,
                            .sample_options = g->sample_options};
    common_facts(e, &f);
    if (m->defaults)
        take_defaults(e, &f, m->defaults);
    f.n_eos = (uint32_t)m->n_eos_token_ids;
    if (f.n_eos)
        memcpy(f.eos, m->eos_token_ids, f.n_eos * sizeof *f.eos);
    pthread_mutex_lock(&e->coord->pub_mu);
    e->coord->model = f;
    pthread_mutex_unlock(&e->coord->pub_mu);
}

/* The scheduler is made with the first group of a name and outlives it, and queued requests with it. */
static enum status_code make_scheduler(struct engine *e, struct group *g, struct status *st)
{
    const struct coord_options *o = &e->coord->opt;
    if (g->sched)
        return ST_OK;
    struct sched_config cfg = {.max_slots = g->slots,
                               .max_context = g->context,
                               .step_token_budget = o->step_tokens,
                               .max_queued = o->max_queued,
                               .max_queued_tokens = o->max_queued_tokens,
                               .max_queued_tenant = o->max_queued_tenant,
                               .max_queued_tokens_tenant = o->max_queued_tokens_tenant,
                               .depth = o->pipeline_depth,
                               .kv = g->kv,
                               .prefix_cache = o->prefix_cache,
                               .policy = SCHED_TARGETS,
                               .refuse_late = o->refuse_late,
                               .age_us_per_token = o->short_first_us,
                               .replay_limit = o->replay_limit,
                               .book = e->book};
    return sched_create(&g->sched, &cfg, st);
}

static uint32_t all_slots(const struct engine *e)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < e->n_groups; i++)
        n += e->group[i].serving || e->group[i].wait_until_us ? e->group[i].slots : 0;
    return n;
}

/* What rank 0 said of the model is the engine's now: groups come and go. */
static void keep_ready(struct engine *e, struct group *g)
{
    if (e->ready)
        protobuf_c_message_free_unpacked(&e->ready->base, NULL);
    e->ready = g->ready;
    g->ready = NULL;
}

enum status_code group_serve(struct engine *e, struct group *g, int64_t now_us, struct status *st)
{
    struct coord *c = e->coord;
    char word[COORD_MAX_GROUP_NAME + 16];
    if (c->opt.max_running)
        g->slots = min_u32(g->slots, c->opt.max_running);
    enum status_code rc = replay_group_ready(e, g, now_us, st);
    if (rc == ST_OK)
        rc = make_scheduler(e, g, st);
    if (rc == ST_OK)
        rc = sched_attach(g->sched, now_us, g->slots, g->context, &g->kv, st);
    if (rc != ST_OK)
        return rc;
    sched_set_suspension(g->sched, g->suspend_pages, g->suspend_bytes_per_s);
    kv_group_ready(g);
    g->step_tokens = min_u32(g->step_tokens, c->opt.step_tokens);
    sched_set_step_budget(g->sched, g->step_tokens);
    keep_ready(e, g);
    g->serving = true;
    g->had_one = true;
    set_facts(e, g);
    metrics_add(&c->metrics.groups, 1);
    record_ready(c, g, now_us);
    g->last_sent = 0;
    /* a slot's worth of requests may have ended and wait for their clients to read the rest */
    atomic_store(&c->max_live, c->opt.max_queued + 2 * all_slots(e) + 64);
    for (uint32_t r = 0; r < g->size; r++)
        g->rank[r]->last_result_us = now_us;
    log_line(
        &c->log, LOG_INFO,
        "ready: epoch %llu%s, %u ranks, %u slots, context %u, %llu pages of %llu bytes, steps of %u tokens, %.1f s "
        "after the first rank",
        (unsigned long long)g->epoch, group_word(g, word, sizeof word), g->size, g->slots, g->context,
        (unsigned long long)g->kv.total_pages, (unsigned long long)g->kv.page_bytes, g->step_tokens,
        (double)(now_us - g->started_us) / 1e6);
    if (tok_vocab_size(c->tok) > g->vocab_size)
        log_line(&c->log, LOG_WARN, "the tokenizer has %u ids, the model %u: prompts with one of the rest are refused",
                 tok_vocab_size(c->tok), g->vocab_size);
    engine_publish(e, "");
    supervisor_line(c, "ready epoch=%llu%s", (unsigned long long)g->epoch, word);
    e->balance_us = 0; /* what waits for a group that is gone comes here at once */
    route_balance(e, now_us);
    coord_journal_resume(e, now_us);
    engine_pump(e, now_us);
    return ST_OK;
}
