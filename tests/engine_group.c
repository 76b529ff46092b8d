#include "tests/engine_group.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_internal.h"
#include "proto/ranks.h"

#define GROUP_RANKS (MAX_RANKS + 1) /* one more than an engine takes */

enum job { JOB_CREATE, JOB_STEP, JOB_RESET, JOB_END };

struct rank {
    struct group *group;
    uint32_t number;
    pthread_t thread;
    struct comm *comm;
    struct engine *engine;
    struct engine_result result;
    enum status_code rc;
    struct status st;
};

struct group {
    uint32_t ranks, started;
    struct rank rank[GROUP_RANKS];
    struct engine_config cfg;
    const Tandem__V1__StepPlan *plan;

    pthread_mutex_t lock;
    pthread_cond_t go, idle;
    uint64_t job_number; /* jobs given out */
    enum job job;
    uint32_t busy;

    /* the barrier of the ranks */
    pthread_cond_t met;
    uint32_t waiting;
    uint64_t meeting;
    bool broken; /* a rank failed: nobody waits for it */

    /* what an operation works on */
    float *x[GROUP_RANKS];
    const void *send[GROUP_RANKS];
    float *sum;
    size_t sum_room;
};

static _Thread_local struct rank *joining; /* comm_create has no place for it */

static enum status_code meet(struct comm *c, struct status *st)
{
    struct group *g = ((struct rank *)c->backend)->group;
    pthread_mutex_lock(&g->lock);
    uint64_t meeting = g->meeting;
    if (++g->waiting == g->ranks) {
        g->waiting = 0;
        g->meeting++;
        pthread_cond_broadcast(&g->met);
    }
    while (g->meeting == meeting && !g->broken)
        pthread_cond_wait(&g->met, &g->lock);
    bool met = g->meeting != meeting;
    pthread_mutex_unlock(&g->lock);
    return met ? ST_OK : status_set(st, ST_ABORTED, "another rank failed");
}

static enum status_code threads_open(struct comm *c, struct status *st)
{
    (void)st;
    c->backend = joining;
    c->rank = joining->number;
    c->size = c->local_size = joining->group->ranks;
    return ST_OK;
}

static void threads_close(struct comm *c, bool clean)
{
    (void)c;
    (void)clean;
}

static enum status_code threads_all_reduce(struct comm *c, float *x, size_t n, struct status *st)
{
    struct group *g = ((struct rank *)c->backend)->group;
    enum status_code rc;
    g->x[c->rank] = x;
    if (c->rank == 0 && n > g->sum_room) {
        free(g->sum);
        g->sum = malloc(n * sizeof *g->sum);
        g->sum_room = n;
    }
    if ((rc = meet(c, st)) != ST_OK)
        return rc;
    for (size_t i = n * c->rank / g->ranks; i < n * (c->rank + 1) / g->ranks; i++) {
        float sum = g->x[0][i];
        for (uint32_t r = 1; r < g->ranks; r++)
            sum += g->x[r][i];
        g->sum[i] = sum;
    }
    if ((rc = meet(c, st)) != ST_OK)
        return rc;
    memcpy(x, g->sum, n * sizeof *x);
    return meet(c, st);
}

static enum status_code threads_all_gather(struct comm *c, const void *send, void *recv, const size_t *bytes,
                                           struct status *st)
{
    struct group *g = ((struct rank *)c->backend)->group;
    enum status_code rc;
    g->send[c->rank] = send;
    if ((rc = meet(c, st)) != ST_OK)
        return rc;
    uint8_t *to = recv;
    for (uint32_t r = 0; r < g->ranks; r++) {
        if (bytes[r] && to != g->send[r]) /* send may stand at its place in recv, where others read it */
            memcpy(to, g->send[r], bytes[r]);
        to += bytes[r];
    }
    return meet(c, st);
}

static enum status_code threads_broadcast(struct comm *c, void *x, size_t bytes, uint32_t root, struct status *st)
{
    struct group *g = ((struct rank *)c->backend)->group;
    enum status_code rc;
    g->send[c->rank] = x;
    if ((rc = meet(c, st)) != ST_OK)
        return rc;
    if (c->rank != root)
        memcpy(x, g->send[root], bytes);
    return meet(c, st);
}

static const struct comm_ops comm_ops_threads = {
    .name = "threads of a test",
    .open = threads_open,
    .close = threads_close,
    .all_reduce = threads_all_reduce,
    .all_gather = threads_all_gather,
    .broadcast = threads_broadcast,
    .barrier = meet,
};

/* ---- ranks ---- */

static void rank_do(struct rank *r, enum job job)
{
    struct group *g = r->group;
    r->rc = ST_OK;
    r->st = (struct status)STATUS_INIT;
    if (job == JOB_CREATE) {
        joining = r;
        r->rc = comm_create(&r->comm, &(struct comm_config){.ops = &comm_ops_threads}, &r->st);
        if (r->rc != ST_OK)
            return;
        struct engine_config cfg = g->cfg;
        cfg.comm = r->comm;
        if (cfg.threads == 0)
            cfg.threads = 1;
        r->rc = engine_create(&r->engine, &cfg, &r->st);
    } else if (job == JOB_STEP) {
        r->rc = engine_step(r->engine, g->plan, &r->result, &r->st);
    } else if (job == JOB_RESET) {
        r->rc = engine_reset(r->engine, &r->st);
    } else {
        engine_destroy(r->engine);
        comm_destroy(r->comm);
    }
}

static void *rank_main(void *arg)
{
    struct rank *r = arg;
    struct group *g = r->group;
    for (uint64_t done = 0;; done++) {
        pthread_mutex_lock(&g->lock);
        while (g->job_number == done)
            pthread_cond_wait(&g->go, &g->lock);
        enum job job = g->job;
        pthread_mutex_unlock(&g->lock);
        rank_do(r, job);
        pthread_mutex_lock(&g->lock);
        if (r->rc != ST_OK) {
            g->broken = true;
            pthread_cond_broadcast(&g->met);
        }
        if (--g->busy == 0)
            pthread_cond_signal(&g->idle);
        pthread_mutex_unlock(&g->lock);
        if (job == JOB_END)
            return NULL;
    }
}

static enum status_code all_do(struct group *g, enum job job, struct status *st)
{
    pthread_mutex_lock(&g->lock);
    g->job = job;
    g->job_number++;
    g->busy = g->started;
    g->broken = false;
    g->waiting = 0;
    pthread_cond_broadcast(&g->go);
    while (g->busy)
        pthread_cond_wait(&g->idle, &g->lock);
    pthread_mutex_unlock(&g->lock);
    const struct rank *first = NULL; /* that failed of itself, if any did */
    for (uint32_t i = 0; i < g->started; i++)
        if (g->rank[i].rc != ST_OK && (!first || first->rc == ST_ABORTED))
            first = &g->rank[i];
    return first ? status_set(st, first->rc, "%s", first->st.message) : ST_OK;
}

enum status_code group_create(struct group **out, const struct engine_config *cfg, uint32_t ranks, struct status *st)
{
    struct group *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "group", sizeof *g);
    g->ranks = ranks;
    g->cfg = *cfg;
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->go, NULL);
    pthread_cond_init(&g->idle, NULL);
    pthread_cond_init(&g->met, NULL);
    for (; g->started < ranks; g->started++) {
        struct rank *r = &g->rank[g->started];
        r->group = g;
        r->number = g->started;
        if (pthread_create(&r->thread, NULL, rank_main, r) != 0)
            abort();
    }
    enum status_code rc = all_do(g, JOB_CREATE, st);
    if (rc != ST_OK) {
        group_destroy(g);
        return rc;
    }
    *out = g;
    return ST_OK;
}

void group_destroy(struct group *g)
{
    if (!g)
        return;
    (void)all_do(g, JOB_END, NULL);
    for (uint32_t i = 0; i < g->started; i++)
        pthread_join(g->rank[i].thread, NULL);
    pthread_cond_destroy(&g->met);
    pthread_cond_destroy(&g->idle);
    pthread_cond_destroy(&g->go);
    pthread_mutex_destroy(&g->lock);
    free(g->sum);
    free(g);
}

uint32_t group_size(const struct group *g)
{
    return g->ranks;
}

struct engine *group_engine(struct group *g, uint32_t rank)
{
    return g->rank[rank].engine;
}

void group_reset(struct group *g)
{
    struct status st = STATUS_INIT;
    if (all_do(g, JOB_RESET, &st) == ST_OK)
        return;
    fprintf(stderr, "engine_reset: %s\n", st.message); /* steps are not under way between two calls here */
    abort();
}

enum status_code group_step(struct group *g, const Tandem__V1__StepPlan *plan, struct engine_result *result,
                            struct status *st)
{
    g->plan = plan;
    enum status_code rc = all_do(g, JOB_STEP, st);
    if (rc != ST_OK)
        return rc;
    const struct engine_result *a = &g->rank[0].result;
    for (uint32_t r = 1; r < g->ranks; r++) {
        const struct engine_result *b = &g->rank[r].result;
        if (a->n_tokens != b->n_tokens || memcmp(a->tokens, b->tokens, a->n_tokens * sizeof *a->tokens) != 0)
            return status_set(st, ST_INTERNAL, "step %llu: the tokens of rank %u differ from those of rank 0",
                              (unsigned long long)plan->step, r);
    }
    *result = *a;
    return ST_OK;
}

/* ---- scheduler ---- */

/* A plan with its own memory. */
struct draft {
    Tandem__V1__StepPlan plan;
    Tandem__V1__AdmitSlot *admit;
    Tandem__V1__SampleParams *params;
    Tandem__V1__PrefillChunk *chunk;
    struct group_request **sampled; /* in the order of the result's tokens */
    uint32_t n_sampled;
    struct group_request **scored; /* of each chunk; NULL: it has no scored rows */
};

static void draft_init(struct draft *d, uint32_t n)
{
    *d = (struct draft){.plan = TANDEM__V1__STEP_PLAN__INIT};
    d->admit = calloc(n, sizeof *d->admit);
    d->params = calloc(n, sizeof *d->params);
    d->chunk = calloc(n, sizeof *d->chunk);
    d->sampled = calloc(n, sizeof *d->sampled);
    d->scored = calloc(n, sizeof *d->scored);
    d->plan.release_slots = calloc(n, sizeof *d->plan.release_slots);
    d->plan.decode_slots = calloc(n, sizeof *d->plan.decode_slots);
    d->plan.admits = calloc(n, sizeof *d->plan.admits);
    d->plan.prefills = calloc(n, sizeof *d->plan.prefills);
}

static void draft_fini(struct draft *d)
{
    free(d->admit);
    free(d->params);
    free(d->chunk);
    free(d->sampled);
    free(d->scored);
    free(d->plan.release_slots);
    free(d->plan.decode_slots);
    free(d->plan.admits);
    free(d->plan.prefills);
}

static void draft_admit(struct draft *d, const struct group_request *r)
{
    size_t i = d->plan.n_admits++;
    tandem__v1__sample_params__init(&d->params[i]);
    d->params[i].temperature = r->temperature;
    d->params[i].top_p = r->top_p;
    d->params[i].top_k = r->top_k;
    d->params[i].seed = r->seed;
    if (r->params)
        d->params[i] = *r->params;
    d->params[i].logprobs = r->scores != NULL;
    d->params[i].top_logprobs = r->top;
    tandem__v1__admit_slot__init(&d->admit[i]);
    d->admit[i].slot = r->slot;
    d->admit[i].sample = &d->params[i];
    d->plan.admits[i] = &d->admit[i];
}

static void draft_chunk(struct draft *d, struct group_request *r, uint32_t n)
{
    size_t i = d->plan.n_prefills++;
    tandem__v1__prefill_chunk__init(&d->chunk[i]);
    d->chunk[i].slot = r->slot;
    d->chunk[i].position = r->fed;
    d->chunk[i].token_ids = (uint32_t *)r->prompt + r->fed;
    d->chunk[i].n_token_ids = n;
    r->fed += n;
    d->chunk[i].sample = r->fed == r->prompt_tokens;
    d->scored[i] = r->prompt_scores ? r : NULL;
    if (r->prompt_scores) {
        d->chunk[i].score_rows = n - d->chunk[i].sample;
        d->chunk[i].next_token = d->chunk[i].sample ? 0 : r->prompt[r->fed];
    }
    if (d->chunk[i].sample)
        d->sampled[d->n_sampled++] = r;
    d->plan.prefills[i] = &d->chunk[i];
}

static uint32_t free_slot(const struct group_request *req, uint32_t n, uint32_t slots)
{
    for (uint32_t s = slots; s-- > 0;) { /* from above, so that slots and rows do not go in step */
        bool taken = false;
        for (uint32_t i = 0; i < n; i++)
            taken |= req[i].running && req[i].slot == s;
        if (!taken)
            return s;
    }
    return UINT32_MAX;
}

static void fill_draft(struct draft *d, struct group *g, struct group_request *req, uint32_t n,
                       const struct group_schedule *sched, uint64_t step)
{
    uint32_t rows = sched->rows_per_step, running = 0;
    d->plan.n_release_slots = d->plan.n_admits = d->plan.n_decode_slots = d->plan.n_prefills = 0;
    d->n_sampled = 0;
    d->plan.step = step;
    for (uint32_t i = 0; i < n; i++) {
        if (req[i].running && req[i].done) {
            d->plan.release_slots[d->plan.n_release_slots++] = req[i].slot;
            req[i].running = false;
        }
        running += req[i].running;
    }
    for (uint32_t i = 0; i < n; i++)
        if (req[i].running && req[i].fed == req[i].prompt_tokens && rows) {
            d->plan.decode_slots[d->plan.n_decode_slots++] = req[i].slot;
            d->sampled[d->n_sampled++] = &req[i];
            rows--;
        }
    for (uint32_t i = 0; i < n && rows; i++) {
        struct group_request *r = &req[i];
        if (!r->running && !r->done && running < sched->concurrent && step > r->arrival) {
            r->slot = free_slot(req, n, engine_info(group_engine(g, 0)).max_slots);
            r->running = true;
            running++;
            draft_admit(d, r);
        }
        if (r->running && r->fed < r->prompt_tokens) {
            uint32_t left = r->prompt_tokens - r->fed, chunk = left < rows ? left : rows;
            draft_chunk(d, r, chunk);
            rows -= chunk;
        }
    }
}

static enum status_code take_scores(const struct draft *d, const struct engine_result *result, struct status *st)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < d->n_sampled; i++) {
        struct group_request *r = d->sampled[i];
        if (!r->scores)
            continue;
        if (n >= result->n_sample_scores || result->sample_scores[n].index != i)
            return status_set(st, ST_INTERNAL, "no score for sample %u", i);
        r->scores[r->made] = result->sample_scores[n++].scores;
    }
    if (n != result->n_sample_scores)
        return status_set(st, ST_INTERNAL, "%u scores for %u samples", result->n_sample_scores, n);
    n = 0;
    for (size_t i = 0; i < d->plan.n_prefills; i++)
        for (uint32_t k = 0; d->scored[i] && k < d->chunk[i].score_rows && n < result->n_prompt_scores; k++)
            d->scored[i]->prompt_scores[d->scored[i]->scored++] = result->prompt_scores[n++].scores;
    if (n != result->n_prompt_scores)
        return status_set(st, ST_INTERNAL, "%u scores of prompts", result->n_prompt_scores);
    return ST_OK;
}

enum status_code group_run(struct group *g, struct group_request *req, uint32_t n, struct group_schedule *sched,
                           struct status *st)
{
    struct draft d;
    draft_init(&d, n);
    enum status_code rc = ST_OK;
    uint64_t step = sched->first_step ? sched->first_step : 1, begin = step;
    for (uint32_t i = 0; i < n; i++) {
        req[i].fed = req[i].made = req[i].scored = 0;
        req[i].running = req[i].done = false;
    }
    for (bool busy = true; busy; step++) {
        fill_draft(&d, g, req, n, sched, step);
        struct engine_result result = {0};
        if ((rc = group_step(g, &d.plan, &result, st)) != ST_OK)
            break;
        if (result.n_tokens != d.n_sampled) {
            rc = status_set(st, ST_INTERNAL, "%u tokens for %u samples", result.n_tokens, d.n_sampled);
            break;
        }
        if ((rc = take_scores(&d, &result, st)) != ST_OK)
            break;
        for (uint32_t i = 0; i < d.n_sampled; i++) {
            struct group_request *r = d.sampled[i];
            r->out[r->made++] = result.tokens[i];
            r->done = r->made == r->max_new;
        }
        busy = false;
        for (uint32_t i = 0; i < n; i++)
            busy |= req[i].running || !req[i].done;
    }
    sched->steps = step - begin;
    draft_fini(&d);
    return rc;
}
