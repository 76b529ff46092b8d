/* simulate.c - virtual time: arrivals, steps that end, and what requests see of them. */
#include "coordinator/simulate.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH 2
/* Tokens behind the shared prefix in which prompts differ: more than a page of any model. */
#define DIFFER 1024
/* A running request weighs as much as so many prompt tokens when a group is chosen. */
#define RUNNING_TOKENS 64

/* A step under way. */
struct step {
    uint64_t number;
    uint32_t samples;
    int64_t start_us, end_us;
};

struct group {
    struct sched *sched;
    struct step step[DEPTH]; /* the first one runs */
    uint32_t n_steps;
    int64_t free_us;         /* when the last of them has ended */
    uint64_t waiting_tokens; /* of prompts without a first token */
    uint32_t live;
    uint32_t at; /* in the heap; UINT32_MAX: not there */
};

struct run {
    const struct simulate_config *cfg;
    struct simulate_result *result;
    struct bench_request *request;
    struct sched_book *book; /* of all groups */
    struct group *group;
    uint32_t *home; /* of each request: its group */
    /* groups with a step under way, the first to end on top */
    uint32_t *heap, n_heap;
    uint32_t *tokens; /* of a prompt */
    uint32_t *zero;   /* the tokens of results: nobody reads them */
    uint32_t next;    /* request */
    uint32_t ended;
    double last_arrival_s;
    /* gaps are the same for most tokens of a step */
    double gap_s;
    uint64_t gap_times;
};

static uint64_t mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

static double uniform(uint64_t x)
{
    return ((double)(mix(x) >> 11) + 0.5) * 0x1p-53;
}

/* ---- the heap of groups ---- */

static bool sooner(const struct run *run, uint32_t a, uint32_t b)
{
    int64_t ta = run->group[a].step[0].end_us, tb = run->group[b].step[0].end_us;
    return ta != tb ? ta < tb : a < b;
}

static void put(struct run *run, uint32_t at, uint32_t group)
{
    run->heap[at] = group;
    run->group[group].at = at;
}

static void sift(struct run *run, uint32_t at)
{
    uint32_t group = run->heap[at];
    while (at > 0 && sooner(run, group, run->heap[(at - 1) / 2])) {
        put(run, at, run->heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (uint32_t child; (child = 2 * at + 1) < run->n_heap; at = child) {
        if (child + 1 < run->n_heap && sooner(run, run->heap[child + 1], run->heap[child]))
            child++;
        if (!sooner(run, run->heap[child], group))
            break;
        put(run, at, run->heap[child]);
    }
    put(run, at, group);
}

/* After the group's first step has changed. */
static void heap_update(struct run *run, uint32_t group)
{
    struct group *g = &run->group[group];
    if (g->n_steps > 0) {
        if (g->at == UINT32_MAX)
            put(run, run->n_heap++, group);
        sift(run, g->at);
        return;
    }
    if (g->at == UINT32_MAX)
        return;
    uint32_t at = g->at, last = run->heap[--run->n_heap];
    g->at = UINT32_MAX;
    if (last != group) {
        put(run, at, last);
        sift(run, at);
    }
}

/* ---- steps ---- */

static double noisy_us(const struct run *run, uint32_t group, uint64_t step, double us)
{
    double noise = run->cfg->cost->noise;
    if (noise == 0)
        return us;
    uint64_t x = mix(run->cfg->seed ^ 0x6E6F697365ull) ^ ((uint64_t)group << 40 ^ step << 1);
    double z = sqrt(-2 * log(uniform(x))) * cos(2 * M_PI * uniform(x + 1));
    return us * exp(noise * z - noise * noise / 2);
}

static void note_step(struct run *run, const struct cost_step *c, double us)
{
    struct simulate_result *r = run->result;
    r->steps++;
    r->hybrid_steps += c->decodes > 0 && c->rows > 0;
    r->chunk_rows += c->rows;
    r->busy_s += us * 1e-6;
    r->longest_step_s = fmax(r->longest_step_s, us * 1e-6);
}

static void plan_all(struct run *run, uint32_t group, int64_t now_us)
{
    struct group *g = &run->group[group];
    struct sched_plan plan;
    while (sched_plan(g->sched, now_us, &plan)) {
        assert(g->n_steps < DEPTH);
        struct cost_step c = plan.cost;
        double us = plan.rows ? noisy_us(run, group, plan.step, simulate_step_us(run->cfg->cost, &c)) : 0;
        int64_t start_us = g->free_us > now_us ? g->free_us : now_us;
        g->free_us = start_us + (int64_t)ceil(us);
        g->step[g->n_steps++] =
            (struct step){.number = plan.step, .samples = plan.samples, .start_us = start_us, .end_us = g->free_us};
        note_step(run, &c, us);
    }
    heap_update(run, group);
}

/* ---- requests ---- */

static void note_gap(struct run *run, double gap_s)
{
    if (gap_s != run->gap_s) {
        bench_add(&run->result->bench.gap, run->gap_s, run->gap_times);
        run->gap_s = gap_s;
        run->gap_times = 0;
    }
    run->gap_times++;
}

static struct simulate_tenant *tenant_of(const struct run *run, uint32_t request)
{
    return &run->result->tenant[run->request[request].tenant];
}

static void take_token(struct run *run, uint32_t i, double at_s)
{
    struct bench_request *q = &run->request[i];
    if (q->first_s < 0) {
        q->first_s = at_s;
        run->group[run->home[i]].waiting_tokens -= q->prompt_tokens;
    } else {
        double gap_s = at_s - q->end_s;
        note_gap(run, gap_s);
        q->stall_s = fmax(q->stall_s, gap_s);
    }
    q->end_s = at_s;
    if (at_s <= run->last_arrival_s)
        tenant_of(run, i)->served += 1 + (q->tokens == 0 ? q->prompt_tokens : 0);
    q->tokens++;
}

static enum status_code take_events(struct run *run, uint32_t group, int64_t now_us, struct status *st)
{
    struct group *g = &run->group[group];
    struct sched_event ev;
    double at_s = (double)now_us * 1e-6;
    uint32_t tokens = 0;
    while (sched_next_event(g->sched, &ev)) {
        uint32_t i = (uint32_t)(ev.id - 1);
        if (ev.kind == SCHED_TOKEN) {
            take_token(run, i, at_s);
            tokens++;
        } else if (ev.kind == SCHED_FINISHED) {
            run->request[i].code = ST_OK;
            run->result->cached_tokens += ev.n_cached;
            g->live--;
            run->ended++;
        } else {
            return status_set(st, ST_INTERNAL, "request %u ended with %s", i, status_name(ev.code));
        }
    }
    if (tokens)
        bench_note_tokens(&run->result->bench, at_s, tokens);
    return ST_OK;
}

/* The first step of the group on top has ended. */
static enum status_code end_step(struct run *run, struct status *st)
{
    uint32_t group = run->heap[0];
    struct group *g = &run->group[group];
    struct step s = g->step[0];
    memmove(g->step, g->step + 1, (DEPTH - 1) * sizeof *g->step);
    g->n_steps--;
    if (s.end_us > s.start_us)
        sched_step_took(g->sched, s.number, (uint64_t)(s.end_us - s.start_us));
    enum status_code rc = sched_result(g->sched, s.end_us, s.number, run->zero, s.samples, 0, st);
    if (rc == ST_OK) /* plans first, as the server does */
        plan_all(run, group, s.end_us);
    return rc == ST_OK ? take_events(run, group, s.end_us, st) : rc;
}

static uint32_t choose_group(const struct run *run)
{
    uint32_t best = 0;
    uint64_t least = UINT64_MAX;
    for (uint32_t i = 0; i < run->cfg->groups; i++) {
        uint64_t load = run->group[i].waiting_tokens + (uint64_t)run->group[i].live * RUNNING_TOKENS;
        if (load < least) {
            least = load;
            best = i;
        }
    }
    return best;
}

static void make_prompt(struct run *run, uint32_t i, uint32_t n)
{
    uint32_t shared = run->cfg->shared_prefix;
    if (shared == 0) /* nobody compares them */
        return;
    for (uint32_t k = shared; k < n && k < shared + DIFFER; k++)
        run->tokens[k] = bench_prompt_token(run->cfg->seed, i, k, shared, UINT32_MAX);
}

static void note_peaks(struct run *run, uint32_t group)
{
    struct simulate_result *r = run->result;
    struct sched_load l = sched_load(run->group[group].sched);
    r->peak_pages = l.used_pages > r->peak_pages ? l.used_pages : r->peak_pages;
    if (run->cfg->groups == 1) {
        r->peak_queued = l.queued > r->peak_queued ? l.queued : r->peak_queued;
        r->peak_queued_tokens = l.queued_tokens > r->peak_queued_tokens ? l.queued_tokens : r->peak_queued_tokens;
        return;
    }
    uint64_t queued = 0, tokens = 0;
    if (run->next % 64) /* all groups are looked at: not at every arrival */
        return;
    for (uint32_t i = 0; i < run->cfg->groups; i++) {
        l = sched_load(run->group[i].sched);
        queued += l.queued;
        tokens += l.queued_tokens;
    }
    r->peak_queued = queued > r->peak_queued ? queued : r->peak_queued;
    r->peak_queued_tokens = tokens > r->peak_queued_tokens ? tokens : r->peak_queued_tokens;
}

static uint32_t draw_tenant(const struct simulate_config *cfg, uint32_t i)
{
    double u = uniform(mix(cfg->seed ^ 0x74656E616E74ull) ^ i);
    uint32_t t = 0;
    while (t + 1 < cfg->n_tenants && u >= cfg->tenant_share[t])
        u -= cfg->tenant_share[t++];
    return t;
}

/* The next request comes. One that the scheduler does not take has ended. */
static enum status_code arrive(struct run *run, struct status *st)
{
    uint32_t i = run->next++;
    struct bench_request *q = &run->request[i];
    int64_t now_us = (int64_t)llround(q->due_s * 1e6);
    uint32_t group = choose_group(run);
    struct group *g = &run->group[group];
    struct status refusal = STATUS_INIT;
    q->sent_s = q->due_s;
    q->tenant = (uint8_t)draw_tenant(run->cfg, i);
    struct simulate_tenant *t = tenant_of(run, i);
    t->requests++;
    t->demanded += (uint64_t)q->prompt_tokens + q->output_tokens;
    make_prompt(run, i, q->prompt_tokens);
    const struct sched_request req = {.id = (uint64_t)i + 1,
                                      .prompt = run->tokens,
                                      .n_prompt = q->prompt_tokens,
                                      .max_new = q->output_tokens,
                                      .deadline_us = INT64_MAX,
                                      .tenant = q->tenant};
    enum status_code rc = sched_submit(g->sched, now_us, &req, &refusal);
    if (rc == ST_RESOURCE_EXHAUSTED && strncmp(refusal.message, "out of memory", 13) != 0) {
        q->code = (uint8_t)rc;
        q->end_s = q->due_s;
        t->refused++;
        run->ended++;
        return ST_OK;
    }
    if (rc != ST_OK)
        return status_set(st, rc, "request %u: %s", i, refusal.message);
    run->home[i] = group;
    g->waiting_tokens += q->prompt_tokens;
    g->live++;
    plan_all(run, group, now_us);
    note_peaks(run, group);
    return ST_OK;
}

/* ---- the end ---- */

/* What each tenant would have had if all served tokens had been shared by max-min fairness: nobody gets more than it asks
 * for, and what one leaves is the others'. */
static double fairness(const struct simulate_result *r, uint32_t n)
{
    double fair[SIMULATE_MAX_TENANTS] = {0}, left = 0, sum = 0, squares = 0;
    uint32_t counted = 0;
    for (uint32_t i = 0; i < n; i++)
        left += (double)r->tenant[i].served;
    for (uint32_t open = n; left > 0.5 && open > 0;) {
        double each = left / open;
        open = 0;
        for (uint32_t i = 0; i < n; i++) {
            double more = fmin(each, (double)r->tenant[i].demanded - fair[i]);
            fair[i] += more;
            left -= more;
            open += fair[i] + 0.5 < (double)r->tenant[i].demanded;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        if (fair[i] < 0.5)
            continue;
        double x = (double)r->tenant[i].served / fair[i];
        sum += x;
        squares += x * x;
        counted++;
    }
    return squares > 0 ? sum * sum / (counted * squares) : 1;
}

static enum status_code make_group(const struct simulate_config *cfg, struct group *g, struct sched_book *book,
                                   struct status *st)
{
    const struct simulate_cost *c = cfg->cost;
    uint32_t slots = cfg->slots ? cfg->slots : c->slots;
    const struct sched_config sc = {.max_slots = slots,
                                    .max_context = c->max_context,
                                    .step_token_budget = cfg->step_tokens,
                                    .max_queued = cfg->max_queued,
                                    .max_queued_tokens = cfg->max_queued_tokens,
                                    .max_queued_tenant = cfg->max_queued_tenant,
                                    .depth = cfg->depth,
                                    .kv = c->kv,
                                    .prefix_cache = cfg->shared_prefix > 0,
                                    .policy = cfg->policy,
                                    .ttft_target_us = cfg->ttft_target_us,
                                    .tbt_target_us = cfg->tbt_target_us,
                                    .refuse_late = cfg->refuse_late,
                                    .age_us_per_token = cfg->age_us_per_token,
                                    .book = book};
    g->at = UINT32_MAX;
    enum status_code rc = sched_create(&g->sched, &sc, st);
    return rc == ST_OK ? sched_attach(g->sched, 0, slots, c->max_context, &c->kv, st) : rc;
}

static enum status_code prepare(struct run *run, struct status *st)
{
    const struct simulate_config *cfg = run->cfg;
    uint32_t n = run->result->bench.n, longest = 1, slots = cfg->slots ? cfg->slots : cfg->cost->slots;
    for (uint32_t i = 0; i < n; i++)
        longest = run->request[i].prompt_tokens > longest ? run->request[i].prompt_tokens : longest;
    run->group = calloc(cfg->groups, sizeof *run->group);
    run->heap = calloc(cfg->groups, sizeof *run->heap);
    run->home = calloc(n + 1, sizeof *run->home);
    run->tokens = calloc(longest, sizeof *run->tokens);
    run->zero = calloc(slots, sizeof *run->zero);
    if (!run->group || !run->heap || !run->home || !run->tokens || !run->zero)
        return status_nomem(st, "simulation", cfg->groups * sizeof *run->group + n * sizeof *run->home);
    run->last_arrival_s = n ? run->request[n - 1].due_s : 0;
    enum status_code rc = sched_book_create(&run->book, st);
    for (uint32_t i = 0; rc == ST_OK && i < cfg->groups; i++)
        rc = make_group(cfg, &run->group[i], run->book, st);
    return rc;
}

static enum status_code loop(struct run *run, struct status *st)
{
    const uint32_t n = run->result->bench.n;
    enum status_code rc = ST_OK;
    while (rc == ST_OK && run->ended < n) {
        bool arrives = run->next<n, runs = run->n_heap> 0;
        if (!arrives && !runs)
            return status_set(st, ST_INTERNAL, "nothing runs, and %u requests have not ended", n - run->ended);
        int64_t end_us = runs ? run->group[run->heap[0]].step[0].end_us : 0;
        if (arrives && (!runs || llround(run->request[run->next].due_s * 1e6) < end_us))
            rc = arrive(run, st);
        else
            rc = end_step(run, st);
    }
    return rc;
}

enum status_code simulate_run(struct simulate_result *r, struct bench_request *request,
                              const struct simulate_config *cfg, struct status *st)
{
    struct run run = {.cfg = cfg, .result = r, .request = request};
    enum status_code rc;
    if (cfg->groups < 1 || cfg->groups > SIMULATE_MAX_GROUPS)
        return status_set(st, ST_INVALID_ARGUMENT, "groups: %u, expected 1 to %d", cfg->groups, SIMULATE_MAX_GROUPS);
    if (cfg->n_tenants > SIMULATE_MAX_TENANTS)
        return status_set(st, ST_INVALID_ARGUMENT, "tenants: %u, expected at most %d", cfg->n_tenants,
                          SIMULATE_MAX_TENANTS);
    r->bench.slice_s = 0.01;
    rc = prepare(&run, st);
    if (rc == ST_OK)
        rc = loop(&run, st);
    if (rc == ST_OK) {
        bench_add(&r->bench.gap, run.gap_s, run.gap_times);
        for (uint32_t i = 0; i < cfg->groups; i++) {
            struct sched_load l = sched_load(run.group[i].sched);
            r->preemptions += l.preemptions;
            r->recomputed_tokens += l.recomputed_tokens;
        }
        r->fairness = fairness(r, cfg->n_tenants ? cfg->n_tenants : 1);
        bench_sum_up(&r->bench);
    }
    for (uint32_t i = 0; run.group && i < cfg->groups; i++)
        sched_destroy(run.group[i].sched);
    sched_book_destroy(run.book);
    free(run.group);
    free(run.heap);
    free(run.home);
    free(run.tokens);
    free(run.zero);
    return rc;
}
