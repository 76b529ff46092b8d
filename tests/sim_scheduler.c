#include "tests/sim_scheduler.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/scheduler_internal.h" /* who was preempted */

#define MAX_LIVE    4096
#define MAX_CONTEXT 512
#define MAX_STOPS   2
#define MAX_SLOTS   64

enum sim_stage { STAGE_QUEUED, STAGE_RUNNING, STAGE_PREEMPTED, STAGE_DRAINING };

/* What is known beforehand of a request, and what became of it. */
struct sim_req {
    uint64_t id, seed;
    uint32_t n_prompt, max_new, stop[MAX_STOPS], n_stop;
    uint32_t n_expected; /* tokens until it stops by itself */
    bool expect_stop;
    int64_t deadline_us, arrived_us;
    enum status_code cancelled; /* ST_OK: not */
    enum sim_stage stage;
    uint32_t slot;
    uint32_t n_sampled; /* in plans */
    uint32_t n_out;
    bool suspended; /* PREEMPTED, but its slot is its own */
    uint32_t preemptions, replays;
    uint32_t losses; /* groups since its last token */
    uint64_t pages;  /* that the scheduler counts for it */
    bool started;
    bool scores;
    uint32_t n_scored;       /* prompt rows whose scores came */
    uint32_t n_scored_plans; /* in plans */
    uint64_t submit_step, max_steps;
    uint64_t tenant;
    int32_t priority;
    int64_t ttft_target_us;
};

struct sim_flight {
    uint64_t step;
    uint32_t n;
    uint32_t tokens[MAX_SLOTS];
    uint64_t id[MAX_SLOTS];
    /* of each chunk with scored rows */
    struct {
        uint64_t id;
        uint32_t position, rows, index;
    } score[MAX_SLOTS];
    uint32_t n_scores, score_rows;
};

struct sim {
    const struct sim_options *o;
    uint64_t random;
    int64_t now_us;
    struct sched *sched;
    struct sched_config cfg;
    struct kv_account kv; /* what the scheduler counts with; page_bytes 0: nothing yet */
    uint32_t max_context;
    uint32_t budget, min_budget;
    bool host_memory;   /* groups have some for suspended slots */
    bool elastic;       /* pages are taken from groups and given again while they serve */
    uint64_t came_with; /* pages of the group at first */
    bool fair;          /* tenants, classes, targets, short prompts first: who is next is not told from age alone */
    bool attached;
    bool replay;          /* the next group goes on with what the last one left */
    bool losing, joining; /* a detach or attach is under way: the failures it brings are expected */
    struct sim_ranks ranks;
    struct sim_req *live[MAX_LIVE]; /* by age */
    uint32_t n_live;
    uint64_t next_id;
    uint64_t slot_id[MAX_SLOTS]; /* what the slot works for; 0: none */
    bool release_due[MAX_SLOTS]; /* its request has ended or needs it no more */
    bool suspend_due[MAX_SLOTS];
    bool preempted[MAX_SLOTS];   /* release_due for that reason: it is not kept */
    bool kept[MAX_SLOTS];        /* for requests that begin as its own did */
    struct sim_flight flight[2]; /* step % 2 */
    uint32_t in_flight;
    uint64_t result_step; /* whose result was taken last */
    uint64_t next_step, steps, wasted, generated, preemptions, replays;
    struct sim_report *report;
};

static uint64_t draw(struct sim *m)
{
    return sim_hash(m->random++);
}

/* lo to hi, both included */
static uint32_t between(struct sim *m, uint32_t lo, uint32_t hi)
{
    return lo + (uint32_t)(draw(m) % ((uint64_t)hi - lo + 1));
}

static bool chance(struct sim *m, uint32_t in_1024)
{
    return draw(m) % 1024 < in_1024;
}

static struct sim_req *find(const struct sim *m, uint64_t id)
{
    for (uint32_t i = 0; i < m->n_live; i++) {
        if (m->live[i]->id == id)
            return m->live[i];
    }
    return NULL;
}

/* ---- groups ---- */

static void draw_group(struct sim *m, struct sim_group *g)
{
    static const uint32_t page_of_token[] = {2, 3, 10, 47, 160, 400}; /* page bytes, tens of token bytes */
    uint32_t token_bytes = between(m, 90, 1100);
    uint64_t page_bytes = (uint64_t)token_bytes * page_of_token[between(m, 0, 5)] / 10 + between(m, 0, 3);
    g->n_ranks = between(m, 1, SIM_MAX_RANKS);
    g->slots = chance(m, 200) ? between(m, 1, 2) : between(m, 1, MAX_SLOTS / (chance(m, 700) ? 4 : 1));
    g->max_context = between(m, m->o->context / 4, m->o->context);
    struct kv_account worst = {.page_bytes = page_bytes, .token_bytes = token_bytes};
    uint64_t full = kv_pages_for(&worst, g->max_context);
    uint64_t lo = full * m->o->min_context_fits, hi = full * m->o->max_context_fits;
    uint64_t total = between(m, (uint32_t)lo, (uint32_t)hi);
    if (m->o->min_context_fits == 0 && total == 0)
        total = 1;
    uint32_t weakest = between(m, 0, g->n_ranks - 1);
    for (uint32_t i = 0; i < g->n_ranks; i++) {
        g->kv[i] = (struct kv_account){.page_bytes = page_bytes};
        g->kv[i].token_bytes = i == weakest ? token_bytes : token_bytes - between(m, 0, token_bytes / 2);
        g->kv[i].total_pages = total + (i == weakest ? 0 : between(m, 0, 3));
        g->host_pages[i] = m->host_memory ? between(m, 0, (uint32_t)(full * 4)) : 0;
        g->most_pages[i] = m->elastic && chance(m, 200) ? between(m, 1, (uint32_t)total) : g->kv[i].total_pages;
    }
    if (chance(m, 30)) { /* ranks without KV heads */
        for (uint32_t i = 0; i < g->n_ranks; i++)
            g->kv[i].token_bytes = 0;
    }
}

/* Whether a request can ever run, as far as the scheduler can know. */
static bool fits(const struct sim *m, uint32_t n_prompt, uint32_t max_new)
{
    if (n_prompt + max_new > m->max_context)
        return false;
    uint64_t total = m->sched->kv.total_pages, goal = m->sched->goal_pages;
    return m->kv.page_bytes == 0 ||
           kv_pages_for(&m->kv, n_prompt + max_new - 1) <= (goal && goal < total ? goal : total);
}

/* ---- events ---- */

static void check_terminal(struct sim *m, const struct sim_req *r, const struct sched_event *ev)
{
    unsigned long long id = r->id;
    if (ev->n_prompt != r->n_prompt || ev->n_new != r->n_out || ev->preemptions != r->preemptions ||
        ev->replays != r->replays)
        sim_fail("request %llu: ended with %u + %u tokens, %u preemptions, %u replays; expected %u + %u, %u, %u", id,
                 ev->n_prompt, ev->n_new, ev->preemptions, ev->replays, r->n_prompt, r->n_out, r->preemptions,
                 r->replays);
    if (ev->arrived_us != r->arrived_us || (ev->started_us != 0) != r->started ||
        (ev->first_token_us != 0) != (r->n_out > 0) || ev->last_token_us < ev->first_token_us)
        sim_fail("request %llu: wrong times", id);
    if (ev->kind == SCHED_FINISHED) {
        if (r->n_scored != (r->scores ? r->n_prompt - 1 : 0))
            sim_fail("request %llu: %u of %u prompt tokens have scores", id, r->n_scored, r->n_prompt);
        if (r->n_out != r->n_expected || ev->stopped != r->expect_stop)
            sim_fail("request %llu: finished after %u tokens%s, expected %u%s", id, r->n_out,
                     ev->stopped ? " by stop" : "", r->n_expected, r->expect_stop ? " by stop" : "");
        if (ev->stopped && ev->token != sim_token(r->seed, r->n_prompt + r->n_out - 1))
            sim_fail("request %llu: wrong stop token", id);
        uint32_t wasted = r->n_sampled - r->n_expected;
        if (wasted > m->cfg.depth - 1 || (!r->expect_stop && wasted > 0))
            sim_fail("request %llu: %u rows wasted", id, wasted);
        m->report->finished++;
        return;
    }
    m->report->failed++;
    m->report->unfit += ev->code == ST_INVALID_ARGUMENT;
    bool right = ev->code == ST_DEADLINE_EXCEEDED ? r->deadline_us <= m->now_us
                 : ev->code == ST_UNAVAILABLE     ? m->losing && !m->replay && r->started
                 : ev->code == ST_ABORTED         ? m->losing && m->replay && r->losses > m->cfg.replay_limit
                 : ev->code == ST_INVALID_ARGUMENT
                     ? m->joining && (m->replay || !r->started) && !fits(m, r->n_prompt, r->max_new)
                     : ev->code == r->cancelled && r->cancelled != ST_OK;
    if (!right)
        sim_fail("request %llu: failed with %s for no reason", id, status_name(ev->code));
}

static void end(struct sim *m, struct sim_req *r)
{
    uint64_t took = m->steps - r->submit_step;
    if (took > r->max_steps && !m->fair)
        sim_fail("request %llu: starved: %llu steps, at most %llu expected", (unsigned long long)r->id,
                 (unsigned long long)took, (unsigned long long)r->max_steps);
    double part = (double)took / (double)r->max_steps;
    if (part > m->report->worst_wait && !m->fair)
        m->report->worst_wait = part;
    if (r->stage == STAGE_RUNNING || r->suspended)
        m->release_due[r->slot] = true;
    if (r->suspended) { /* nobody begins as such a slot */
        m->preempted[r->slot] = true;
        m->suspend_due[r->slot] = false;
    }
    for (uint32_t i = 0; i < m->n_live; i++) {
        if (m->live[i] == r) {
            memmove(&m->live[i], &m->live[i + 1], (m->n_live - i - 1) * sizeof(struct sim_req *));
            break;
        }
    }
    m->n_live--;
    free(r);
}

/* Of the step whose result came last. */
static void take_scores(struct sim *m, struct sim_req *r, const struct sched_event *ev)
{
    const struct sim_flight *f = &m->flight[m->result_step % 2];
    for (uint32_t i = 0; i < f->n_scores; i++)
        if (f->score[i].id == r->id && f->score[i].index == ev->index && f->score[i].rows == ev->count &&
            f->score[i].position == r->n_scored) {
            r->n_scored += ev->count;
            return;
        }
    sim_fail("request %llu: %u scores from the %u-th on of step %llu, %u are known", (unsigned long long)r->id,
             ev->count, ev->index, (unsigned long long)f->step, r->n_scored);
}

static void take_events(struct sim *m)
{
    struct sched_event ev;
    while (sched_next_event(m->sched, &ev)) {
        struct sim_req *r = find(m, ev.id);
        if (!r)
            sim_fail("event of kind %d for request %llu, which has ended", ev.kind, (unsigned long long)ev.id);
        if (ev.kind == SCHED_SCORES) {
            take_scores(m, r, &ev);
            continue;
        }
        if (ev.kind != SCHED_TOKEN) {
            check_terminal(m, r, &ev);
            end(m, r);
            continue;
        }
        m->generated++;
        uint32_t expected = sim_token(r->seed, r->n_prompt + r->n_out);
        if (ev.token != expected || r->n_out == r->n_expected)
            sim_fail("request %llu: token %u is %u, expected %u and %u in all", (unsigned long long)r->id, r->n_out,
                     ev.token, expected, r->n_expected);
        r->n_out++;
        r->losses = 0;
    }
}

/* After every call that changes the scheduler. */
static void check(struct sim *m)
{
    sched_check(m->sched);
    take_events(m);
    struct sched_load l = sched_load(m->sched);
    uint32_t queued = 0;
    uint64_t tokens = 0;
    int64_t deadline_us = INT64_MAX;
    for (uint32_t i = 0; i < m->n_live; i++) {
        const struct sim_req *r = m->live[i];
        if (r->n_out == r->n_expected)
            sim_fail("request %llu: has all its tokens and lives on", (unsigned long long)r->id);
        queued += !r->started;
        tokens += r->started ? 0 : r->n_prompt;
        if (r->deadline_us < deadline_us)
            deadline_us = r->deadline_us;
    }
    if (l.queued != queued || l.running != m->n_live - queued || l.queued_tokens != tokens ||
        l.in_flight != m->in_flight || l.generated_tokens != m->generated || l.wasted_rows != m->wasted)
        sim_fail("load: %u queued, %u running, %llu queued tokens, %u in flight; expected %u, %u, %llu, %u", l.queued,
                 l.running, (unsigned long long)l.queued_tokens, l.in_flight, queued, m->n_live - queued,
                 (unsigned long long)tokens, m->in_flight);
    uint64_t total = m->sched->kv.total_pages;
    if (m->attached && (total == 0 || total > sim_ranks_pages(&m->ranks) || total > m->came_with))
        sim_fail("%llu pages are counted, of %llu and of %llu at first", (unsigned long long)total,
                 (unsigned long long)sim_ranks_pages(&m->ranks), (unsigned long long)m->came_with);
    if (sched_next_deadline_us(m->sched) != deadline_us)
        sim_fail("next deadline: %lld, expected %lld", (long long)sched_next_deadline_us(m->sched),
                 (long long)deadline_us);
}

/* ---- calls ---- */

static uint32_t prefill_share(uint32_t budget)
{
    return budget / 16 > 1 ? budget / 16 : 1;
}

/* The most steps that a request can take while it is the oldest: its prompt gets at least the prefill share of each
 * step. Each token waits for its turn among the slots, and may lose it twice to a fence. A budget of one row goes to
 * prefill first: then a turn may take as long as all the prompts in the slots. */
static uint64_t oldest_steps(const struct sim *m, const struct sim_req *r)
{
    uint32_t limit = m->min_budget - prefill_share(m->min_budget);
    uint64_t turn = limit ? MAX_SLOTS / limit + 1 : MAX_SLOTS * (m->o->context + 2);
    return (r->n_prompt + r->max_new) / prefill_share(m->min_budget) + r->max_new * (3 * turn + 4) + 8;
}

static void expect_requests(struct sim *m, struct sim_req *r)
{
    r->n_expected = r->max_new;
    for (uint32_t i = 0; i < r->max_new; i++) {
        uint32_t token = sim_token(r->seed, r->n_prompt + i);
        for (uint32_t k = 0; k < r->n_stop; k++)
            r->expect_stop |= token == r->stop[k];
        if (r->expect_stop) {
            r->n_expected = i + 1;
            break;
        }
    }
    r->submit_step = m->steps;
    r->max_steps = oldest_steps(m, r);
    for (uint32_t i = 0; i < m->n_live; i++)
        r->max_steps += oldest_steps(m, m->live[i]);
}

static enum status_code expected_refusal(const struct sim *m, const struct sim_req *r)
{
    if (r->n_prompt == 0 || r->max_new == 0 || !fits(m, r->n_prompt, r->max_new))
        return ST_INVALID_ARGUMENT;
    if (find(m, r->id))
        return ST_ALREADY_EXISTS;
    struct sched_load l = sched_load(m->sched);
    uint32_t of_tenant = 0;
    uint64_t tokens = r->n_prompt;
    for (uint32_t i = 0; i < m->n_live; i++) {
        bool waits = !m->live[i]->started && m->live[i]->tenant == r->tenant;
        of_tenant += waits;
        tokens += waits ? m->live[i]->n_prompt : 0;
    }
    bool full = l.queued == m->cfg.max_queued || l.queued_tokens + r->n_prompt > m->cfg.max_queued_tokens ||
                (m->cfg.max_queued_tenant && of_tenant >= m->cfg.max_queued_tenant) ||
                (m->cfg.max_queued_tokens_tenant && of_tenant && tokens > m->cfg.max_queued_tokens_tenant);
    return full ? ST_RESOURCE_EXHAUSTED : ST_OK;
}

static void submit(struct sim *m)
{
    struct sim_req *r = calloc(1, sizeof *r);
    if (!r)
        sim_fail("out of memory");
    r->id = ++m->next_id * 0x9e3779b97f4a7c15u; /* odd factor: never twice */
    r->seed = draw(m);
    r->n_prompt = chance(m, 100) ? 1 : between(m, 1, chance(m, 600) ? m->max_context / 16 : m->max_context * 3 / 4);
    r->max_new = chance(m, 100) ? 1 : between(m, 1, m->max_context);
    if (r->n_prompt + r->max_new > m->max_context && !chance(m, m->o->bad_request))
        r->max_new = m->max_context - r->n_prompt;
    r->n_stop = chance(m, 600) ? 0 : between(m, 0, MAX_STOPS);
    for (uint32_t i = 0; i < r->n_stop; i++)
        r->stop[i] = between(m, 0, SIM_VOCAB - 1);
    r->scores = r->seed >> 9 & 1;
    r->deadline_us = chance(m, m->o->deadline) ? m->now_us + between(m, 0, 60000) : INT64_MAX;
    r->arrived_us = m->now_us;
    if (chance(m, m->o->bad_request)) {
        uint32_t what = between(m, 0, 2);
        r->n_prompt = what == 0 ? 0 : r->n_prompt;
        r->max_new = what == 1 ? 0 : r->max_new;
        r->id = what == 2 && m->n_live ? m->live[between(m, 0, m->n_live - 1)]->id : r->id;
    }
    if (m->fair) {
        r->tenant = (r->seed >> 50 & 7) % 5;
        r->priority = (int32_t)((r->seed >> 53 & 7) % 3) - 1;
        r->ttft_target_us = chance(m, 300) ? between(m, 1, 20000) : 0;
    }
    uint32_t prompt[MAX_CONTEXT];
    for (uint32_t i = 0; i < r->n_prompt; i++)
        prompt[i] = sim_token(r->seed, i);
    struct sched_request req = {.id = r->id,
                                .prompt = prompt,
                                .n_prompt = r->n_prompt,
                                .max_new = r->max_new,
                                .stop_ids = r->stop,
                                .n_stop = r->n_stop,
                                .deadline_us = r->deadline_us,
                                .ttft_target_us = r->ttft_target_us,
                                .tbt_target_us = m->fair && chance(m, 300) ? between(m, 1, 3000) : 0,
                                .tenant = r->tenant,
                                .priority = r->priority,
                                .sample = {.seed = r->seed},
                                .scores = r->scores,
                                .salt = sim_salt(r->seed),
                                .no_cache_read = (r->seed >> 41 & 7) == 0,
                                .no_cache_write = (r->seed >> 44 & 7) == 0};
    enum status_code expected = expected_refusal(m, r);
    struct status st = STATUS_INIT;
    enum status_code rc = sched_submit(m->sched, m->now_us, &req, &st);
    bool late = rc == ST_RESOURCE_EXHAUSTED && strncmp(st.message, "overloaded: ", 12) == 0 &&
                (r->deadline_us > m->now_us || m->cfg.refuse_late);
    if (rc != expected && !(late && expected == ST_OK))
        sim_fail("submit: %s (%s), expected %s", status_name(rc), st.message, status_name(expected));
    if (rc == ST_OK) {
        if (m->n_live == MAX_LIVE)
            sim_fail("too many requests for the simulator");
        expect_requests(m, r);
        m->live[m->n_live++] = r;
        m->report->submitted++;
    } else {
        m->report->rejected++;
        free(r);
    }
    check(m);
}

static void cancel(struct sim *m)
{
    if (m->n_live == 0)
        return;
    struct sim_req *r = m->live[between(m, 0, m->n_live - 1)];
    uint64_t id = r->id;
    r->cancelled = chance(m, 512) ? ST_CANCELLED : ST_RESOURCE_EXHAUSTED;
    if (sched_cancel(m->sched, m->now_us, id, r->cancelled, NULL) != ST_OK)
        sim_fail("cancel of request %llu failed", (unsigned long long)id);
    check(m);
    if (find(m, id) || sched_cancel(m->sched, m->now_us, id, ST_CANCELLED, NULL) != ST_NOT_FOUND)
        sim_fail("request %llu survived its cancel", (unsigned long long)id);
}

/* What was in flight is lost; all that the scheduler had said stands. */
static void book_loss(struct sim *m, struct sim_req *r, uint64_t more_steps)
{
    if (r->stage == STAGE_RUNNING || r->stage == STAGE_DRAINING) {
        r->replays++;
        r->losses++;
        m->report->replays++;
    }
    if (r->started)
        r->stage = STAGE_PREEMPTED;
    r->suspended = false;
    r->n_sampled = r->n_out;
    r->n_scored_plans = r->n_scored;
    r->max_steps += more_steps;
}

static void detach(struct sim *m)
{
    uint64_t replays = m->report->replays, more_steps = 0;
    m->losing = true;
    m->in_flight = 0;
    m->attached = false;
    for (uint32_t i = 0; m->replay && i < m->n_live; i++)
        more_steps += oldest_steps(m, m->live[i]);
    for (uint32_t i = 0; m->replay && i < m->n_live; i++)
        book_loss(m, m->live[i], more_steps);
    if (m->replay)
        sched_lose(m->sched, m->now_us);
    else
        sched_detach(m->sched, m->now_us);
    check(m);
    m->losing = false;
    for (uint32_t i = 0; i < m->n_live; i++) {
        struct sim_req *r = m->live[i];
        if (r->started && (!m->replay || r->losses > m->cfg.replay_limit))
            sim_fail("request %llu survived its group", (unsigned long long)r->id);
    }
    m->replays += m->report->replays - replays;
    if (sched_load(m->sched).replays != m->replays)
        sim_fail("%llu replays counted, expected %llu", (unsigned long long)sched_load(m->sched).replays,
                 (unsigned long long)m->replays);
    sim_ranks_fini(&m->ranks);
}

static void attach(struct sim *m)
{
    struct sim_group g;
    draw_group(m, &g);
    struct kv_account kv = g.kv[0];
    for (uint32_t i = 1; i < g.n_ranks; i++)
        kv = kv_account_worst(kv, g.kv[i]);
    sim_ranks_init(&m->ranks, &g);
    memset(m->slot_id, 0, sizeof m->slot_id);
    memset(m->release_due, 0, sizeof m->release_due);
    memset(m->preempted, 0, sizeof m->preempted);
    memset(m->suspend_due, 0, sizeof m->suspend_due);
    memset(m->kept, 0, sizeof m->kept);
    m->kv = kv;
    m->came_with = kv.total_pages;
    m->max_context = g.max_context;
    m->attached = m->joining = true;
    m->next_step = 1;
    struct status st = STATUS_INIT;
    if (sched_attach(m->sched, m->now_us, g.slots, g.max_context, &kv, &st) != ST_OK)
        sim_fail("attach: %s", st.message);
    uint64_t host_pages = g.host_pages[0];
    for (uint32_t i = 1; i < g.n_ranks; i++)
        host_pages = g.host_pages[i] < host_pages ? g.host_pages[i] : host_pages;
    if (m->host_memory)
        sched_set_suspension(m->sched, host_pages, chance(m, 512) ? 0 : between(m, 1, 1u << 31));
    check(m);
    m->joining = false;
    for (uint32_t i = 0; i < m->n_live; i++) {
        if (!fits(m, m->live[i]->n_prompt, m->live[i]->max_new))
            sim_fail("request %llu can never run and waits", (unsigned long long)m->live[i]->id);
    }
    m->report->groups++;
}

/* ---- plans ---- */

/* Books the preemptions of a call of sched_plan, which came with a plan or not: never the oldest running request. */
static uint32_t book_preemptions(struct sim *m)
{
    uint32_t n = 0;
    bool oldest = true;
    for (uint32_t i = 0; i < m->n_live; i++) {
        struct sim_req *r = m->live[i];
        if (r->stage != STAGE_RUNNING)
            continue;
        if (req_map_find(&m->sched->map, r->id)->preemptions != r->preemptions) {
            if (oldest)
                sim_fail("request %llu: preempted, and it is the oldest that runs", (unsigned long long)r->id);
            r->stage = STAGE_PREEMPTED;
            r->preemptions++;
            r->suspended = req_map_find(&m->sched->map, r->id)->host_pages > 0;
            m->suspend_due[r->slot] = r->suspended;
            if (!r->suspended)
                m->release_due[r->slot] = m->preempted[r->slot] = true;
            n++;
        }
        oldest = false;
    }
    m->preemptions += n;
    if (sched_load(m->sched).preemptions != m->preemptions)
        sim_fail("%llu preemptions counted, expected %llu", (unsigned long long)sched_load(m->sched).preemptions,
                 (unsigned long long)m->preemptions);
    return n;
}

/* Suspended requests that lost their slot to an older one. */
static void book_drops(struct sim *m, const struct sched_plan *p)
{
    bool resumed[MAX_SLOTS] = {false};
    for (uint32_t i = 0; p && i < p->n_resume; i++)
        resumed[p->resume[i]] = true;
    for (uint32_t i = 0; i < m->n_live; i++) {
        struct sim_req *r = m->live[i];
        if (!r->suspended || resumed[r->slot] || req_map_find(&m->sched->map, r->id)->host_pages)
            continue;
        r->suspended = false;
        m->suspend_due[r->slot] = false;
        m->release_due[r->slot] = m->preempted[r->slot] = true;
    }
}

/* Each suspension in the plan after it was decided; each resumption in its turn, of a slot that the ranks have suspended. */
static void check_suspensions(struct sim *m, const struct sched_plan *p)
{
    uint32_t due = 0;
    for (uint32_t i = 0; i < m->ranks.group.slots; i++)
        due += m->suspend_due[i];
    for (uint32_t i = 0; i < p->n_suspend; i++)
        if (p->suspend[i] >= m->ranks.group.slots || !m->suspend_due[p->suspend[i]])
            sim_fail("step %llu: suspension of slot %u", (unsigned long long)p->step, p->suspend[i]);
    if (due != p->n_suspend)
        sim_fail("step %llu: %u suspensions, %u are due", (unsigned long long)p->step, p->n_suspend, due);
    memset(m->suspend_due, 0, sizeof m->suspend_due);
}

/* All that is due and nothing else. */
static void check_releases(struct sim *m, const struct sched_plan *p)
{
    for (uint32_t i = 0; i < p->n_release; i++) {
        uint32_t slot = p->release[i];
        if (slot >= m->ranks.group.slots || (!m->release_due[slot] && !m->kept[slot]))
            sim_fail("step %llu: release of slot %u, which is in use", (unsigned long long)p->step, slot);
        m->release_due[slot] = m->preempted[slot] = m->kept[slot] = false;
        m->slot_id[slot] = 0;
    }
    for (uint32_t i = 0; i < m->ranks.group.slots; i++) {
        if (m->release_due[i] && m->cfg.prefix_cache && !m->preempted[i]) {
            m->kept[i] = true;
            m->release_due[i] = false;
            m->slot_id[i] = 0;
        }
        if (m->release_due[i])
            sim_fail("step %llu: slot %u should be released", (unsigned long long)p->step, i);
    }
}

/* Decodes first: one is left out only for want of a page, or in its turn when all do not fit beside the prefill share.
 * While one waits for pages nobody younger takes any. */
static void check_decodes(struct sim *m, const struct sched_plan *p, uint32_t preempted)
{
    bool in_plan[MAX_SLOTS] = {false};
    for (uint32_t i = 0; i < p->n_decode; i++) {
        if (m->slot_id[p->decode[i]] == 0)
            sim_fail("step %llu: decode of slot %u, which works for nobody", (unsigned long long)p->step, p->decode[i]);
        in_plan[p->decode[i]] = true;
    }
    uint32_t left_out = 0, stuck = 0, limit = m->budget - prefill_share(m->budget);
    bool younger_took = false;
    for (uint32_t i = 0; i < m->n_live; i++) {
        struct sim_req *r = m->live[i];
        if (r->stage != STAGE_RUNNING || !m->ranks.slot[r->slot].sampled)
            continue;
        uint64_t pages = kv_pages_for(&m->kv, m->ranks.slot[r->slot].len + 1);
        bool grows = pages > r->pages;
        if (in_plan[r->slot]) {
            younger_took |= grows && stuck > 0;
            r->pages = grows ? pages : r->pages;
        } else {
            stuck += grows;
            left_out += !grows;
        }
    }
    if (left_out > 0 && p->n_decode + stuck + preempted < limit)
        sim_fail("step %llu: %u decodes left out, %u planned, budget %u, %u rows", (unsigned long long)p->step,
                 left_out, p->n_decode, m->budget, p->rows);
    bool all_had_a_turn = p->n_decode + stuck + left_out + preempted <= limit;
    if (all_had_a_turn && stuck > 0 && (younger_took || p->n_admit > 0))
        sim_fail("step %llu: pages went to a younger request while an older one waits", (unsigned long long)p->step);
}

/* The preempted ones by age, then all others: by age, or nobody before another of his tenant and class that came earlier
 * with no more tokens. */
static struct sim_req *expect_admit(struct sim *m, uint64_t id)
{
    struct sim_req *r = find(m, id), *first = NULL;
    if (!r || r->stage == STAGE_RUNNING || r->stage == STAGE_DRAINING)
        sim_fail("request %llu is admitted, but does not wait", (unsigned long long)id);
    for (uint32_t i = 0; i < m->n_live && !first; i++)
        first = m->live[i]->stage == STAGE_PREEMPTED ? m->live[i] : NULL;
    for (uint32_t i = 0; i < m->n_live && !first; i++) {
        struct sim_req *o = m->live[i];
        bool goes_first = !m->fair || (o->tenant == r->tenant && o->priority == r->priority &&
                                       o->ttft_target_us == r->ttft_target_us && o->n_prompt <= r->n_prompt);
        first = o->stage == STAGE_QUEUED && goes_first ? o : NULL;
    }
    if (first != r)
        sim_fail("request %llu is admitted before request %llu", (unsigned long long)id,
                 first ? (unsigned long long)first->id : 0);
    return r;
}

/* Of two that wait, the first of them preempted. */
static bool goes_before(const struct sim *m, uint64_t a, uint64_t b)
{
    for (uint32_t i = 0; i < m->n_live; i++)
        if (m->live[i]->id == a || (m->live[i]->id == b && m->live[i]->stage == STAGE_PREEMPTED))
            return m->live[i]->id == a;
    return false;
}

static void check_resumption(struct sim *m, const struct sched_plan *p, uint32_t slot)
{
    struct sim_req *r = expect_admit(m, m->slot_id[slot]);
    if (!r->suspended || r->slot != slot)
        sim_fail("step %llu: request %llu is resumed, but not suspended", (unsigned long long)p->step,
                 (unsigned long long)r->id);
    r->stage = STAGE_RUNNING;
    r->suspended = false;
    r->pages = kv_pages_for(&m->kv, m->ranks.slot[slot].len + 1);
}

static void check_admits(struct sim *m, const struct sched_plan *p)
{
    uint32_t resumed = 0;
    for (uint32_t i = 0; i < p->n_admit; i++) {
        while (resumed < p->n_resume && goes_before(m, m->slot_id[p->resume[resumed]], p->admit[i].id))
            check_resumption(m, p, p->resume[resumed++]);
        struct sim_req *r = expect_admit(m, p->admit[i].id);
        if (m->slot_id[p->admit[i].slot] != 0 || m->kept[p->admit[i].slot])
            sim_fail("step %llu: slot %u is taken", (unsigned long long)p->step, p->admit[i].slot);
        r->stage = STAGE_RUNNING;
        r->started = true;
        r->slot = p->admit[i].slot;
        uint32_t total = r->n_prompt + r->max_new, next = r->n_prompt + r->n_out + 1;
        r->pages = kv_pages_for(&m->kv, next < total ? next : total - 1);
        m->slot_id[r->slot] = r->id;
    }
    while (resumed < p->n_resume)
        check_resumption(m, p, p->resume[resumed++]);
}

/* Books one sample of a plan; behind the last one the slot is due for release. */
static void book_sample(struct sim *m, struct sim_flight *f, uint32_t slot)
{
    struct sim_req *r = find(m, m->slot_id[slot]);
    f->id[f->n++] = r->id;
    r->n_sampled++;
    if (r->n_sampled == r->max_new) {
        r->stage = STAGE_DRAINING;
        m->release_due[slot] = true;
    }
}

/* Each row of a prompt but the last is scored once, in order, whatever is computed again. */
static void book_scores(struct sim *m, struct sim_flight *f, const struct sched_chunk *c)
{
    struct sim_req *r = find(m, c->id);
    uint32_t end = c->score_first + c->score_rows, due = 0;
    if (r->scores && c->position + c->n_tokens > r->n_scored_plans && r->n_scored_plans + 1 < r->n_prompt) {
        due = c->position + c->n_tokens - r->n_scored_plans;
        if (r->n_scored_plans + due > r->n_prompt - 1)
            due = r->n_prompt - 1 - r->n_scored_plans;
    }
    if (c->score_rows != due || (due && c->position + c->score_first != r->n_scored_plans) || end > c->n_tokens)
        sim_fail("request %llu: %u rows from %u on of a chunk at %u are scored, expected %u from %u on",
                 (unsigned long long)r->id, c->score_rows, c->score_first, c->position, due, r->n_scored_plans);
    if (due == 0)
        return;
    if (end == c->n_tokens && c->next_token != sim_token(r->seed, c->position + end))
        sim_fail("request %llu: the token behind a chunk is %u", (unsigned long long)r->id, c->next_token);
    f->score[f->n_scores].id = r->id;
    f->score[f->n_scores].position = r->n_scored_plans;
    f->score[f->n_scores].rows = due;
    f->score[f->n_scores++].index = f->score_rows;
    f->score_rows += due;
    r->n_scored_plans += due;
}

static bool plan(struct sim *m)
{
    struct sched_plan p;
    uint32_t in_flight = m->in_flight;
    bool made = sched_plan(m->sched, m->now_us, &p);
    take_events(m); /* of deadlines: they come before the plan */
    uint32_t preempted = book_preemptions(m);
    book_drops(m, made ? &p : NULL);
    if (!made) {
        check(m);
        return false;
    }
    if (p.step != m->next_step++ || p.rows > m->budget || in_flight == m->cfg.depth)
        sim_fail("plan %llu with %u rows, budget %u, %u in flight", (unsigned long long)p.step, p.rows, m->budget,
                 in_flight);
    check_suspensions(m, &p);
    check_releases(m, &p);
    if (m->cfg.policy != SCHED_PREFILL_FIRST)
        check_decodes(m, &p, preempted);
    check_admits(m, &p);
    struct sim_flight *f = &m->flight[p.step % 2];
    sim_ranks_step(&m->ranks, &p, p.step - 1 - in_flight, f->tokens);
    f->step = p.step;
    f->n = f->n_scores = f->score_rows = 0;
    for (uint32_t i = 0; i < p.n_decode; i++)
        book_sample(m, f, p.decode[i]);
    for (uint32_t i = 0; i < p.n_chunk; i++) {
        book_scores(m, f, &p.chunk[i]);
        if (p.chunk[i].sample)
            book_sample(m, f, p.chunk[i].slot);
    }
    m->in_flight++;
    check(m);
    return true;
}

static void result(struct sim *m)
{
    uint64_t step = m->next_step - m->in_flight;
    struct sim_flight *f = &m->flight[step % 2];
    if (chance(m, 8) &&
        (sched_result(m->sched, m->now_us, step + 1, f->tokens, f->n, f->score_rows, NULL) != ST_INTERNAL ||
         sched_result(m->sched, m->now_us, step, f->tokens, f->n, f->score_rows + 1, NULL) != ST_INTERNAL ||
         sched_result(m->sched, m->now_us, step, f->tokens, f->n + 1, f->score_rows, NULL) != ST_INTERNAL))
        sim_fail("a wrong result was taken");
    for (uint32_t i = 0; i < f->n; i++)
        m->wasted += find(m, f->id[i]) == NULL;
    struct status st = STATUS_INIT;
    if (m->fair && chance(m, 900))
        sched_step_took(m->sched, step + chance(m, 10), chance(m, 10) ? draw(m) : 50 + f->n + between(m, 0, 20));
    m->result_step = step;
    if (sched_result(m->sched, m->now_us, step, f->tokens, f->n, f->score_rows, &st) != ST_OK)
        sim_fail("result: %s", st.message);
    m->in_flight--;
    m->steps++;
    uint64_t asked = sched_pages_asked(m->sched);
    if (asked && asked <= step && chance(m, 700) && sched_pages_are(m->sched, sim_ranks_pages(&m->ranks)))
        m->report->short_of_pages++;
    check(m);
}

/* Now and then to a page, which is less than those that live need. */
static void resize(struct sim *m)
{
    uint64_t goal = chance(m, 300) ? m->came_with : between(m, 1, (uint32_t)m->came_with);
    sched_set_pages(m->sched, goal);
    m->report->resizes++;
    check(m);
}

/* ---- the run ---- */

static void draw_fairness(struct sim *m)
{
    struct sched_config *c = &m->cfg;
    const struct cost_coef cost = {.fixed_us = 50, .decode_us = 1, .kv_us = 0.01, .row_us = 2, .pair_us = 0.01};
    c->policy = chance(m, 700) ? SCHED_TARGETS : chance(m, 512) ? SCHED_CHUNKED : SCHED_PREFILL_FIRST;
    c->cost = (struct cost_profile){.pure = cost, .hybrid = cost, .known = chance(m, 512)};
    c->tbt_target_us = chance(m, 512) ? between(m, 20, 2000) : 0;
    c->ttft_target_us = chance(m, 512) ? between(m, 20, 20000) : 0;
    c->refuse_late = chance(m, 300);
    c->age_us_per_token = chance(m, 700) ? between(m, 1, 30) : 0;
    c->max_queued_tenant = chance(m, 300) ? between(m, 1, c->max_queued) : 0;
    c->max_queued_tokens_tenant = chance(m, 300) ? between(m, 1, 10 * m->o->context) : 0;
}

static void draw_config(struct sim *m)
{
    static const uint32_t budgets[] = {1, 2, 3, 5, 8, 16, 16, 33, 64, 64, 100, 256};
    uint32_t budget = budgets[between(m, 0, 11)];
    m->cfg = (struct sched_config){.max_slots = MAX_SLOTS,
                                   .max_context = m->o->context,
                                   .step_token_budget = budget,
                                   .max_queued = between(m, 1, 40),
                                   .max_queued_tokens = between(m, m->o->context, 20 * m->o->context),
                                   .depth = between(m, 1, 2),
                                   .prefix_cache = chance(m, 512),
                                   .replay_limit = between(m, 0, 3)};
    m->replay = chance(m, 768);
    m->host_memory = chance(m, 512);
    m->elastic = chance(m, 400);
    m->fair = chance(m, 400);
    if (m->fair)
        draw_fairness(m);
    m->max_context = m->o->context;
    m->budget = budget;
    m->min_budget = budget > 4 && chance(m, 300) ? budget / 2 : budget;
}

static void tick(struct sim *m, uint32_t arrival, uint32_t result_chance)
{
    const struct sim_options *o = m->o;
    m->now_us += between(m, 1, 50);
    if (chance(m, arrival)) {
        for (uint32_t n = chance(m, 50) ? between(m, 1, 20) : 1; n > 0; n--)
            submit(m);
    }
    if (chance(m, o->cancel))
        cancel(m);
    if (chance(m, 20)) {
        sched_expire(m->sched, m->now_us);
        check(m);
    }
    if (m->attached && chance(m, o->group_loss))
        detach(m);
    else if (!m->attached && chance(m, 200))
        attach(m);
    if (m->attached && m->elastic && chance(m, 8))
        resize(m);
    if (chance(m, 10)) {
        m->budget = between(m, m->min_budget, m->cfg.step_token_budget);
        sched_set_step_budget(m->sched, m->budget);
    }
    if (!m->attached || chance(m, 900)) { /* else: the caller is late */
        while (plan(m))
            ;
        if (m->attached && m->in_flight == 0 && m->n_live > 0)
            sim_fail("%u requests live and nothing is planned", m->n_live);
    }
    if (m->in_flight > 0 && chance(m, result_chance))
        result(m);
}

void sim_run(const struct sim_options *o, struct sim_report *report)
{
    struct sim m = {.o = o, .random = sim_hash(o->seed), .now_us = 1, .report = report};
    memset(report, 0, sizeof *report);
    draw_config(&m);
    struct status st = STATUS_INIT;
    if (sched_create(&m.sched, &m.cfg, &st) != ST_OK)
        sim_fail("create: %s", st.message);
    uint32_t result_chance = between(&m, 200, 1024);
    uint32_t arrival = o->arrival;
    while (m.steps < o->steps) {
        if (m.steps % 500 == 0) /* from idle to overload */
            arrival = between(&m, 1, o->arrival);
        tick(&m, arrival, result_chance);
    }
    while (m.n_live > 0 || m.in_flight > 0)
        tick(&m, 0, 1024);
    if (m.attached) {
        while (plan(&m))
            result(&m);
        for (uint32_t i = 0; i < m.ranks.group.slots; i++) /* ended without a plan behind it */
            m.kept[i] |= m.cfg.prefix_cache && m.release_due[i] && !m.preempted[i];
        sim_ranks_check_idle(&m.ranks, m.kept, sched_load(m.sched).kept_pages);
        sim_ranks_fini(&m.ranks);
    }
    struct sched_load l = sched_load(m.sched);
    if (l.used_pages != 0 || l.queued_tokens != 0)
        sim_fail("%llu pages are left", (unsigned long long)l.used_pages);
    report->steps = m.steps;
    report->preemptions = l.preemptions;
    report->generated = l.generated_tokens;
    report->prompt = l.prompt_tokens;
    report->recomputed = l.recomputed_tokens;
    report->wasted = l.wasted_rows;
    report->cache_hits = l.cache_hits;
    report->suspensions = l.suspensions;
    report->resumptions = l.resumptions;
    sched_destroy(m.sched);
}
