/* scheduler.c - life of a request: submit, results, end; attach and detach of a group. Plans: scheduler_plan.c. */
#include "coordinator/scheduler_internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* A generated token costs about as much as so many of a prompt: each has a step of its own. */
#define DECODE_WEIGHT   2
#define BACKLOG_FADE_US 5e6

#define MAX_SLOTS       65536
#define MAX_PAGE_BYTES  (1ull << 40)
#define MAX_TOKEN_BYTES ((1ull << 31) - 1)

static enum status_code check_group(uint32_t slots, uint32_t max_context, const struct kv_account *kv,
                                    struct status *st)
{
    if (slots < 1 || slots > MAX_SLOTS)
        return status_set(st, ST_INVALID_ARGUMENT, "max_slots: %u, expected 1 to %d", slots, MAX_SLOTS);
    if (max_context < 1 || max_context > INT32_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "max_context: %u, expected 1 to %d", max_context, INT32_MAX);
    if (kv->page_bytes < 1 || kv->page_bytes > MAX_PAGE_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "kv.page_bytes: %llu, expected 1 to %llu",
                          (unsigned long long)kv->page_bytes, MAX_PAGE_BYTES);
    if (kv->token_bytes > MAX_TOKEN_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "kv.token_bytes: %llu, expected at most %llu",
                          (unsigned long long)kv->token_bytes, MAX_TOKEN_BYTES);
    return ST_OK;
}

static enum status_code check_config(const struct sched_config *cfg, struct status *st)
{
    struct kv_account kv = cfg->kv;
    if (kv.page_bytes == 0) /* not known before the first attach */
        kv.page_bytes = 1;
    enum status_code rc = check_group(cfg->max_slots, cfg->max_context, &kv, st);
    if (rc != ST_OK)
        return rc;
    if (cfg->step_token_budget < 1 || cfg->step_token_budget > INT32_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "step_token_budget: %u, expected 1 to %d", cfg->step_token_budget,
                          INT32_MAX);
    if (cfg->max_queued < 1)
        return status_set(st, ST_INVALID_ARGUMENT, "max_queued: 0, expected at least 1");
    if (cfg->max_queued_tokens < 1)
        return status_set(st, ST_INVALID_ARGUMENT, "max_queued_tokens: 0, expected at least 1");
    if (cfg->policy > SCHED_PREFILL_FIRST)
        return status_set(st, ST_INVALID_ARGUMENT, "policy: %d, expected 0 to %d", cfg->policy, SCHED_PREFILL_FIRST);
    if (cfg->ttft_target_us < 0 || cfg->tbt_target_us < 0)
        return status_set(st, ST_INVALID_ARGUMENT, "targets: %lld and %lld us, expected none under 0",
                          (long long)cfg->ttft_target_us, (long long)cfg->tbt_target_us);
    if (cfg->depth < 1 || cfg->depth > SCHED_MAX_DEPTH)
        return status_set(st, ST_INVALID_ARGUMENT, "depth: %u, expected 1 to %d", cfg->depth, SCHED_MAX_DEPTH);
    return ST_OK;
}

enum status_code sched_create(struct sched **out, const struct sched_config *cfg, struct status *st)
{
    enum status_code rc = check_config(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct sched *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "scheduler", sizeof *s);
    s->cfg = *cfg;
    s->slots = cfg->max_slots;
    s->max_context = cfg->max_context;
    s->kv = cfg->kv;
    s->step_budget = cfg->step_token_budget;
    if (!cfg->book && (rc = sched_book_create(&s->own_book, st)) != ST_OK) {
        free(s);
        return rc;
    }
    s->book = cfg->book ? cfg->book : s->own_book;
    s->margin = 1;
    cost_init(&s->cost, cfg->cost.pure.fixed_us > 0 ? &cfg->cost : &cost_default);
    s->plan_tokens = malloc(cfg->step_token_budget * sizeof *s->plan_tokens);
    if (!s->plan_tokens) {
        sched_destroy(s);
        return status_nomem(st, "tokens of a step", cfg->step_token_budget * sizeof *s->plan_tokens);
    }
    *out = s;
    return ST_OK;
}

/* The arrays whose size is the number of slots. */
static void free_slot_arrays(struct sched *s)
{
    free(s->owner);
    free(s->free_slot);
    free(s->pending);
    free(s->plan_release);
    free(s->plan_suspend);
    free(s->plan_resume);
    free(s->suspending);
    free(s->plan_decode);
    free(s->plan_admit);
    free(s->plan_chunk);
    free(s->decodable);
    free(s->prefilling);
    free(s->holders);
    free(s->slot_holder);
    free(s->source_step);
    s->holders = s->free_holder = NULL;
    s->slot_holder = NULL;
    s->source_step = NULL;
    s->owner = s->decodable = s->prefilling = NULL;
    s->free_slot = s->pending = s->plan_release = s->plan_decode = NULL;
    s->suspending = s->plan_suspend = s->plan_resume = NULL;
    s->plan_admit = NULL;
    s->plan_chunk = NULL;
    for (int i = 0; i < SCHED_MAX_DEPTH; i++) {
        free(s->flight[i].sample);
        free(s->flight[i].score);
        s->flight[i].sample = NULL;
        s->flight[i].score = NULL;
    }
}

static enum status_code alloc_slot_arrays(struct sched *s, size_t slots, struct status *st)
{
    free_slot_arrays(s);
    s->owner = calloc(slots, sizeof(struct req *));
    s->free_slot = malloc(slots * sizeof *s->free_slot);
    s->pending = malloc(slots * sizeof *s->pending);
    s->plan_release = malloc(slots * sizeof *s->plan_release);
    s->plan_suspend = malloc(slots * sizeof *s->plan_suspend);
    s->plan_resume = malloc(slots * sizeof *s->plan_resume);
    s->suspending = malloc(slots * sizeof *s->suspending);
    s->plan_decode = malloc(slots * sizeof *s->plan_decode);
    s->plan_admit = malloc(slots * sizeof *s->plan_admit);
    s->plan_chunk = malloc(slots * sizeof *s->plan_chunk);
    s->decodable = malloc(slots * sizeof(struct req *));
    s->prefilling = malloc(slots * sizeof(struct req *));
    s->holders = malloc(2 * slots * sizeof *s->holders);
    s->slot_holder = calloc(slots, sizeof(struct holder *));
    s->source_step = calloc(slots, sizeof *s->source_step);
    bool ok = s->holders && s->slot_holder && s->source_step && s->owner && s->free_slot && s->pending &&
              s->plan_release && s->plan_suspend && s->plan_resume && s->suspending && s->plan_decode &&
              s->plan_admit && s->plan_chunk && s->decodable && s->prefilling;
    for (int i = 0; i < SCHED_MAX_DEPTH; i++) {
        s->flight[i].sample = malloc(slots * sizeof *s->flight[i].sample);
        s->flight[i].score = malloc(slots * sizeof *s->flight[i].score);
        ok = ok && s->flight[i].sample && s->flight[i].score;
    }
    if (!ok) {
        free_slot_arrays(s);
        return status_nomem(st, "scheduler arrays", slots * 200);
    }
    for (uint32_t i = 0; i < slots; i++)
        s->free_slot[i] = i;
    return ST_OK;
}

void sched_destroy(struct sched *s)
{
    if (!s)
        return;
    cache_detach(s);
    free_slot_arrays(s);
    free(s->plan_tokens);
    tenants_fini(s);
    sched_book_destroy(s->own_book);
    req_pool_fini(&s->pool);
    free(s->map.cell);
    free(s->heap.item);
    free(s->events.item);
    free(s);
}

void req_drop_slot(struct sched *s, struct req *r)
{
    s->owner[r->slot] = NULL;
    cache_forget(s, r->slot);
    s->pending[s->n_pending++] = r->slot;
    s->pending_pages += holder_drop(s, r->slot);
    s->n_running--;
    r->n_indexed = 0;
    r->slot = SCHED_NO_SLOT;
    r->pages = 0;
    r->cap_tokens = 0;
    r->decoding = false;
}

static struct req_list *list_of(struct sched *s, const struct req *r)
{
    return r->state == REQ_RUNNING ? &s->run : r->state == REQ_PREEMPTED ? &s->preempted : &s->draining;
}

/* The last event of a request; the request is gone afterwards. */
static void end_request(struct sched *s, struct req *r, enum sched_event_kind kind, bool stopped, enum status_code code)
{
    struct sched_event *ev = event_ring_push(&s->events);
    ev->id = r->id;
    ev->kind = kind;
    ev->stopped = stopped;
    ev->token = stopped ? r->tokens[r->n_known - 1] : 0;
    ev->code = code;
    ev->n_prompt = r->n_prompt;
    ev->n_new = r->n_known - r->n_prompt;
    ev->preemptions = r->preemptions;
    ev->replays = r->replays;
    ev->n_cached = r->n_cached;
    ev->arrived_us = r->arrived_us;
    ev->started_us = r->started_us;
    ev->first_token_us = r->first_token_us;
    ev->last_token_us = r->last_token_us;
    if (kind == SCHED_FINISHED)
        s->total.finished++;
    else
        s->total.failed++;

    if (r->state == REQ_RUNNING && !cache_park(s, r))
        req_drop_slot(s, r);
    if (r->host_pages)
        suspend_drop(s, r);
    if (r->state == REQ_QUEUED)
        queue_remove(s, r);
    else
        req_list_remove(list_of(s, r), r);
    tenant_put(s, r->tenant);
    req_heap_remove(&s->heap, r);
    req_map_remove(&s->map, r);
    s->n_live--;
    req_pool_put(&s->pool, r);
}

/* Why the request can never run in this group, or ST_OK. The last token sampled is never fed, hence the - 1. */
static enum status_code check_fit(const struct sched *s, uint32_t n_prompt, uint32_t max_new, struct status *st)
{
    uint64_t total = (uint64_t)n_prompt + max_new;
    if (total > s->max_context)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "prompt and max_tokens: %u prompt tokens + %u new = %llu, the context holds %u", n_prompt,
                          max_new, (unsigned long long)total, s->max_context);
    if (s->kv.page_bytes == 0)
        return ST_OK;
    uint64_t pages = kv_pages_for(&s->kv, total - 1);
    if (pages > resize_limit(s))
        return status_set(st, ST_INVALID_ARGUMENT,
                          "prompt and max_tokens: %u prompt tokens + %u new need %llu tokens x %llu bytes = %llu pages "
                          "of %llu bytes, the KV memory has %llu",
                          n_prompt, max_new, (unsigned long long)total - 1, (unsigned long long)s->kv.token_bytes,
                          (unsigned long long)pages, (unsigned long long)s->kv.page_bytes,
                          (unsigned long long)resize_limit(s));
    return ST_OK;
}

enum status_code sched_attach(struct sched *s, int64_t now_us, uint32_t slots, uint32_t max_context,
                              const struct kv_account *kv, struct status *st)
{
    (void)now_us;
    if (s->attached)
        return status_set(st, ST_FAILED_PRECONDITION, "scheduler: a group is attached already");
    enum status_code rc = check_group(slots, max_context, kv, st);
    if (rc != ST_OK)
        return rc;
    rc = alloc_slot_arrays(s, slots, st);
    if (rc != ST_OK)
        return rc;
    s->slots = slots;
    s->max_context = max_context;
    s->kv = *kv;
    rc = cache_attach(s, st);
    if (rc != ST_OK)
        return rc;
    holders_init(s);
    s->free_first = 0;
    s->n_free = slots;
    s->n_pending = 0;
    s->free_pages = kv->total_pages;
    s->pending_pages = s->fenced_pages = 0;
    resize_forget(s);
    suspend_forget_all(s);
    s->next_step = 1;
    s->in_flight = 0;
    s->rotate_seq = 0;
    s->attached = true;
    s->hold = false;
    for (int i = 0; i < 2; i++) /* nobody has a slot */
        for (struct req *r = i ? s->queued.head : s->preempted.head, *next; r; r = next) {
            next = r->next;
            if (check_fit(s, r->n_prompt, r->n_total - r->n_prompt, NULL) != ST_OK)
                end_request(s, r, SCHED_FAILED, false, ST_INVALID_ARGUMENT);
        }
    return ST_OK;
}

static void forget_group(struct sched *s)
{
    s->attached = false;
    s->in_flight = 0;
    s->n_pending = 0;
    s->pending_pages = s->fenced_pages = 0;
    s->free_pages = s->kv.total_pages;
    s->held_pages = 0;
    resize_forget(s);
    suspend_forget_all(s);
}

void sched_detach(struct sched *s, int64_t now_us)
{
    (void)now_us;
    if (!s->attached)
        return;
    cache_detach(s);
    while (s->draining.head)
        end_request(s, s->draining.head, SCHED_FAILED, false, ST_UNAVAILABLE);
    while (s->run.head)
        end_request(s, s->run.head, SCHED_FAILED, false, ST_UNAVAILABLE);
    while (s->preempted.head)
        end_request(s, s->preempted.head, SCHED_FAILED, false, ST_UNAVAILABLE);
    forget_group(s);
}

/* Its slot, its rows and its samples in flight went with the group; by a fault that it may have caused, or not. */
static void lose(struct sched *s, struct req *r, bool fault)
{
    if (r->state == REQ_RUNNING) {
        s->owner[r->slot] = NULL;
        s->n_running--;
    }
    bool computed = r->state != REQ_PREEMPTED;
    if (computed) {
        req_list_remove(list_of(s, r), r);
        r->state = REQ_PREEMPTED;
        run_insert(&s->preempted, r);
    }
    r->slot = SCHED_NO_SLOT;
    r->pages = r->host_pages = 0;
    r->cap_tokens = r->n_unknown = r->n_fed = r->n_indexed = r->n_match = 0;
    r->match_version = UINT64_MAX;
    r->n_scored = r->n_scores_known;
    r->decoding = false;
    if (!computed)
        return;
    r->replays++;
    s->total.replays++;
    if (fault && r->losses++ >= s->cfg.replay_limit)
        end_request(s, r, SCHED_FAILED, false, ST_ABORTED);
}

static void lose_all(struct sched *s, bool fault)
{
    if (!s->attached)
        return;
    cache_detach(s);
    for (struct req *r = s->preempted.head, *next; r; r = next) { /* before others come to this list */
        next = r->next;
        lose(s, r, fault);
    }
    while (s->draining.head)
        lose(s, s->draining.head, fault);
    while (s->run.head)
        lose(s, s->run.head, fault);
    forget_group(s);
}

void sched_lose(struct sched *s, int64_t now_us)
{
    (void)now_us;
    lose_all(s, true);
}

void sched_recall(struct sched *s, int64_t now_us)
{
    (void)now_us;
    lose_all(s, false);
}

static enum status_code check_request(const struct sched *s, int64_t now_us, const struct sched_request *req,
                                      struct status *st)
{
    if (req->n_prompt == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "prompt: no tokens, expected at least 1");
    if (req->max_new == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "max_tokens: 0, expected at least 1");
    if (req->priority < -1 || req->priority > 1)
        return status_set(st, ST_INVALID_ARGUMENT, "priority: %d, expected -1, 0 or 1", req->priority);
    if (req->ttft_target_us < 0 || req->tbt_target_us < 0)
        return status_set(st, ST_INVALID_ARGUMENT, "targets: %lld and %lld us, expected none under 0",
                          (long long)req->ttft_target_us, (long long)req->tbt_target_us);
    enum status_code rc = check_fit(s, req->n_prompt, req->max_new, st);
    if (rc != ST_OK)
        return rc;
    if (req->n_prompt > s->cfg.max_queued_tokens && !req->resumed)
        return status_set(st, ST_INVALID_ARGUMENT, "prompt: %u tokens, the queue takes at most %llu", req->n_prompt,
                          (unsigned long long)s->cfg.max_queued_tokens);
    if (req_map_find(&s->map, req->id))
        return status_set(st, ST_ALREADY_EXISTS, "request_id: a request with this id is running");
    if (req->n_output && (!req->resumed || req->n_output >= req->max_new))
        return status_set(st, ST_INVALID_ARGUMENT, "output: %u tokens, expected less than max_tokens, %u",
                          req->n_output, req->max_new);
    return req->resumed ? ST_OK : queue_check(s, now_us, req, st);
}

enum status_code sched_submit(struct sched *s, int64_t now_us, const struct sched_request *req, struct status *st)
{
    enum status_code rc = check_request(s, now_us, req, st);
    if (rc != ST_OK)
        return rc;
    /* All memory that the request can ever need, now: nothing later can fail for want of it. */
    uint32_t n_total = req->n_prompt + req->max_new;
    size_t bytes = ((size_t)n_total + req->n_stop) * sizeof(uint32_t);
    struct req *r = NULL;
    if (!req_map_reserve(&s->map) || !req_heap_reserve(&s->heap) ||
        !event_ring_reserve(&s->events, (uint64_t)s->n_live + 1) || !(r = req_pool_get(&s->pool)))
        return status_nomem(st, "tables of requests", sizeof *r);
    struct tenant *tenant = tenant_get(s, req->tenant);
    uint32_t *tokens = tenant ? malloc(bytes) : NULL;
    if (!tokens) {
        if (tenant)
            tenant_put(s, tenant);
        req_pool_put(&s->pool, r);
        return status_nomem(st, "tokens of a request", bytes);
    }
    r->tokens = tokens;
    r->tenant = tenant;
    memcpy(tokens, req->prompt, req->n_prompt * sizeof(uint32_t));
    if (req->n_output)
        memcpy(tokens + req->n_prompt, req->output, req->n_output * sizeof(uint32_t));
    if (req->n_stop)
        memcpy(tokens + n_total, req->stop_ids, req->n_stop * sizeof(uint32_t));
    r->id = req->id;
    r->seq = s->book->next_seq++;
    r->state = REQ_QUEUED;
    r->n_prompt = req->n_prompt;
    r->n_known = req->n_prompt + req->n_output;
    r->n_total = n_total;
    r->n_stop = req->n_stop;
    r->deadline_us = req->deadline_us;
    r->arrived_us = now_us;
    r->sample = req->sample;
    r->scores = req->scores;
    r->salt = req->salt;
    r->cache_read = !req->no_cache_read && !req->scores;
    r->cache_write = !req->no_cache_write;
    r->match_version = UINT64_MAX;
    r->cls = (uint32_t)(1 - req->priority);
    r->ttft_target_us = req->ttft_target_us ? req->ttft_target_us : s->cfg.ttft_target_us;
    r->tbt_target_us = req->tbt_target_us ? req->tbt_target_us : s->cfg.tbt_target_us;
    r->predicted_us = s->cfg.refuse_late && !req->resumed ? queue_predict_us(s, now_us, req) : 0;
    if (req->resumed) {
        r->state = REQ_PREEMPTED;
        r->replays = 1;
        s->total.replays++;
        run_insert(&s->preempted, r);
    } else {
        queue_add(s, r, now_us);
    }
    req_map_add(&s->map, r);
    if (r->deadline_us != INT64_MAX)
        req_heap_add(&s->heap, r);
    s->n_live++;
    return ST_OK;
}

enum status_code sched_cancel(struct sched *s, int64_t now_us, uint64_t id, enum status_code code, struct status *st)
{
    (void)now_us;
    assert(code != ST_OK);
    struct req *r = req_map_find(&s->map, id);
    if (!r)
        return status_set(st, ST_NOT_FOUND, "request_id: no such request, or it has ended");
    end_request(s, r, SCHED_FAILED, false, code);
    return ST_OK;
}

enum status_code sched_finish(struct sched *s, int64_t now_us, uint64_t id, struct status *st)
{
    (void)now_us;
    struct req *r = req_map_find(&s->map, id);
    if (!r)
        return status_set(st, ST_NOT_FOUND, "request_id: no such request, or it has ended");
    end_request(s, r, SCHED_FINISHED, false, ST_OK);
    return ST_OK;
}

static bool is_stop(const struct req *r, uint32_t token)
{
    const uint32_t *stop = r->tokens + r->n_total;
    for (uint32_t i = 0; i < r->n_stop; i++) {
        if (stop[i] == token)
            return true;
    }
    return false;
}

static void take_token(struct sched *s, struct req *r, uint32_t token, uint32_t index, int64_t now_us)
{
    r->n_unknown--;
    r->losses = 0;
    r->tokens[r->n_known++] = token;
    if (r->n_known == r->n_prompt + 1 || r->first_token_us == 0) {
        r->first_token_us = now_us;
        queue_learn(s, r, now_us);
    }
    r->last_token_us = now_us;
    s->total.generated_tokens++;
    queue_charge(r, DECODE_WEIGHT);
    struct sched_event *ev = event_ring_push(&s->events);
    ev->id = r->id;
    ev->kind = SCHED_TOKEN;
    ev->token = token;
    ev->index = index;
    bool stopped = is_stop(r, token);
    if (stopped || r->n_known == r->n_total)
        end_request(s, r, SCHED_FINISHED, stopped, ST_OK);
}

/* Scores come before the tokens of the same result: a request's last event stays its last. */
static void take_scores(struct sched *s, const struct flight *f)
{
    uint32_t first = 0;
    for (uint32_t i = 0; i < f->n_scores; first += f->score[i++].rows) {
        if (f->score[i].req->seq != f->score[i].seq)
            continue;
        struct sched_event *ev = event_ring_push(&s->events);
        ev->id = f->score[i].req->id;
        ev->kind = SCHED_SCORES;
        ev->index = first;
        ev->count = f->score[i].rows;
        f->score[i].req->n_scores_known += f->score[i].rows;
    }
}

void sched_step_took(struct sched *s, uint64_t step, uint64_t took_us)
{
    uint64_t first = s->next_step - s->in_flight;
    if (s->attached && step >= first && step < s->next_step)
        cost_observe(&s->cost, &s->flight[step % SCHED_MAX_DEPTH].cost, (double)took_us);
}

/* What a backlog of prompts goes at, all that slows it down included: from the result before, or from the plan. */
static void take_pace(struct sched *s, const struct flight *f, int64_t now_us)
{
    int64_t from_us = s->last_result_us > f->planned_us ? s->last_result_us : f->planned_us;
    double took_us = now_us > from_us ? (double)(now_us - from_us) : 0;
    s->last_result_us = now_us;
    if (!f->backlog)
        return;
    double keep = took_us < BACKLOG_FADE_US / 2 ? 1 - took_us / BACKLOG_FADE_US : 0.5;
    s->backlog_tokens = s->backlog_tokens * keep + f->cost.rows;
    s->backlog_us = s->backlog_us * keep + took_us;
}

enum status_code sched_result(struct sched *s, int64_t now_us, uint64_t step, const uint32_t *tokens, uint32_t n_tokens,
                              uint32_t n_scores, struct status *st)
{
    uint64_t expected = s->next_step - s->in_flight;
    if (!s->attached || s->in_flight == 0)
        return status_set(st, ST_INTERNAL, "result of step %llu: no step is in flight", (unsigned long long)step);
    if (step != expected)
        return status_set(st, ST_INTERNAL, "result of step %llu: expected step %llu", (unsigned long long)step,
                          (unsigned long long)expected);
    struct flight *f = &s->flight[step % SCHED_MAX_DEPTH];
    if (n_tokens != f->n_samples)
        return status_set(st, ST_INTERNAL, "result of step %llu: %u tokens, %u were planned", (unsigned long long)step,
                          n_tokens, f->n_samples);
    if (n_scores != f->score_rows)
        return status_set(st, ST_INTERNAL, "result of step %llu: %u scores of prompts, %u were planned",
                          (unsigned long long)step, n_scores, f->score_rows);
    if (!event_ring_reserve(&s->events, (uint64_t)n_tokens + f->n_scores + s->n_live))
        return status_nomem(st, "events", n_tokens * sizeof(struct sched_event));
    take_pace(s, f, now_us);
    s->in_flight--;
    s->free_pages += s->fenced_pages; /* of the plan after this one: see scheduler.h, pipeline */
    s->fenced_pages = 0;
    s->total.steps++;
    take_scores(s, f);
    for (uint32_t i = 0; i < n_tokens; i++) {
        struct req *r = f->sample[i].req;
        if (r->seq == f->sample[i].seq)
            take_token(s, r, tokens[i], i, now_us);
        else
            s->total.wasted_rows++;
    }
    return ST_OK;
}

void sched_expire(struct sched *s, int64_t now_us)
{
    while (s->heap.count && s->heap.item[0]->deadline_us <= now_us)
        end_request(s, s->heap.item[0], SCHED_FAILED, false, ST_DEADLINE_EXCEEDED);
}

bool sched_next_event(struct sched *s, struct sched_event *ev)
{
    struct event_ring *e = &s->events;
    if (e->count == 0)
        return false;
    *ev = e->item[e->first];
    e->first = (e->first + 1) & (e->capacity - 1);
    e->count--;
    return true;
}

void sched_set_step_budget(struct sched *s, uint32_t rows)
{
    s->step_budget = rows < 1 ? 1 : rows > s->cfg.step_token_budget ? s->cfg.step_token_budget : rows;
}

void sched_hold(struct sched *s)
{
    s->hold = true;
}

int64_t sched_next_deadline_us(const struct sched *s)
{
    return s->heap.count ? s->heap.item[0]->deadline_us : INT64_MAX;
}

struct cost_profile sched_cost(const struct sched *s)
{
    return cost_get(&s->cost);
}

struct sched_load sched_load(const struct sched *s)
{
    struct sched_load l = s->total;
    l.queued = s->n_queued;
    l.running = s->n_live - s->n_queued;
    l.in_flight = s->in_flight;
    l.queued_tokens = s->queued_tokens;
    l.total_pages = s->attached ? s->kv.total_pages : 0;
    l.goal_pages = s->goal_pages == s->kv.total_pages ? 0 : s->goal_pages;
    l.kept_pages = s->attached ? s->held_pages - holders_running(s) : 0;
    l.used_pages = s->attached ? s->kv.total_pages - s->free_pages - l.kept_pages : 0;
    l.shared_pages = holders_shared(s);
    l.suspended_slots = s->n_suspended;
    l.suspended_pages = s->suspended_pages;
    l.suspend_pages = s->suspend_pages;
    if (s->prefix) {
        struct prefix_stats c = prefix_stats(s->prefix);
        l.kept_slots = c.parked;
        l.cache_hits = c.hits;
        l.cached_tokens = c.hit_tokens;
        l.cache_evictions = c.evictions;
    }
    return l;
}
