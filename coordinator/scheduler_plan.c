/* scheduler_plan.c - which rows run in the next step. coordinator/SCHEDULER.md has the rules in one place. */
#include "coordinator/scheduler_internal.h"

#include <assert.h>
#include <string.h>

/* While prefill waits, at least one row of so many is its own: a budget below the number of decodes would starve it. */
#define PREFILL_SHARE 16

/* Where a target leaves prefill no time, it gets so much of what the decodes take, and a few rows at least. */
#define PREFILL_TIME 0.1
#define MIN_ROWS     32
/* While it is not known what a row takes, chunks beside decodes that have a target are of so many rows together. */
#define UNKNOWN_ROWS 512
/* Chunks cut to a target are multiples of TILE: products of other sizes take as long as the next one. A rest under TAIL rows
 * goes with the chunk before it. */
#define TILE 128
#define TAIL 64
/* Prefills that are begun and not done: each holds pages for its whole prompt. */
#define MAX_PARTIAL 4

/* An admission leaves free what the running requests need for so many tokens more, each. Without it a full pool admits
 * and preempts in turns: with 5000 pages of 16 tokens and prompts and completions of 16 to 1000, 23 % of all rows were
 * computed again; with 32 it is 0.3 %, and 2 % fewer requests run at a time (bench_scheduler, pressure). */
#define HEADROOM_TOKENS 32

/* A plan in the making. */
struct build {
    struct flight *flight;
    uint32_t n_decodable, n_prefilling; /* in s->decodable, s->prefilling */
    uint32_t left;                      /* of the budget */
    uint32_t n_decode, n_chunk, n_admit, n_tokens;
    uint32_t n_resume;
    uint64_t resumed_pages;   /* of host memory, for the plans after this one */
    uint32_t n_reused;        /* pending slots that this plan releases and admits again, from the first */
    uint64_t growth;          /* tokens that the running requests may still add, HEADROOM_TOKENS each at most */
    uint64_t owed;            /* pages that decodes, all older than those looked at next, wait for */
    struct cost_step cost;    /* what the plan holds */
    struct cost_step settled; /* a step in which all that run, admitted ones too, decode */
    int64_t target_us;        /* the least time between tokens that anybody wants kept; 0: none */
    double limit_us;          /* what the step may take; 0: any time */
    uint32_t n_partial;       /* prefills that go on in later plans */
    int64_t now_us;
};

static void set_pages(const struct sched *s, struct req *r, uint64_t pages)
{
    r->pages = pages;
    uint64_t cap = s->kv.token_bytes ? pages * s->kv.page_bytes / s->kv.token_bytes : UINT32_MAX;
    r->cap_tokens = cap < UINT32_MAX ? (uint32_t)cap : UINT32_MAX;
}

void sched_settle_pending(struct sched *s)
{
    if (s->in_flight == 0) {
        s->free_pages += s->pending_pages;
        s->pending_pages = 0;
    }
}

uint32_t req_growth(const struct req *r)
{
    return r->n_total - r->n_known < HEADROOM_TOKENS ? r->n_total - r->n_known : HEADROOM_TOKENS;
}

static bool by_targets(const struct sched *s)
{
    return s->cfg.policy == SCHED_TARGETS && cost_known(&s->cost);
}

/* A step is to be so much shorter than the target that the usual error does not pass it. */
static double safe_us(const struct sched *s, int64_t target_us)
{
    double spread = 2 * cost_spread(&s->cost);
    return (double)target_us * (spread < 0.03 ? 0.97 : spread > 0.3 ? 0.7 : 1 - spread);
}

/* Whether r has a target under least_us (0: none) that counts. One that it would miss with the server for itself must not
 * keep all others out. */
static bool wants_less(const struct sched *s, const struct req *r, int64_t least_us)
{
    const struct cost_step alone = {.decodes = 1, .context = r->n_known};
    if (r->tbt_target_us == 0 || (least_us && r->tbt_target_us >= least_us))
        return false;
    return !by_targets(s) || cost_predict_us(&s->cost, &alone) <= safe_us(s, r->tbt_target_us);
}

/* It runs: its decodes are to come, or are there, and it has a target or not. */
static void settle(const struct sched *s, struct build *b, const struct req *r)
{
    b->settled.decodes++;
    b->settled.context += r->n_known;
    if (wants_less(s, r, b->target_us))
        b->target_us = r->tbt_target_us;
}

/* Sorts the running requests. Those whose last token is sampled already give their slot back before its result is here:
 * the ranks take a plan after the one before, so the release cannot overtake the sample. */
static void collect(struct sched *s, struct build *b)
{
    for (struct req *r = s->run.head, *next; r; r = next) {
        next = r->next;
        cache_index(s, r);
        if (r->n_known + r->n_unknown == r->n_total) {
            if (!cache_park(s, r))
                req_drop_slot(s, r);
            req_list_remove(&s->run, r);
            req_list_append(&s->draining, r);
            r->state = REQ_DRAINING;
            continue;
        }
        b->growth += req_growth(r);
        settle(s, b, r);
        if (r->decoding) {
            s->decodable[b->n_decodable++] = r;
        } else {
            s->prefilling[b->n_prefilling++] = r;
        }
    }
    sched_settle_pending(s);
    /* What running requests will ask for next is made free before they wait for it. */
    while (kv_pages_for(&s->kv, b->growth) > s->free_pages + s->pending_pages + s->fenced_pages &&
           cache_evict(s, SCHED_NO_SLOT))
        ;
}

/* Pages of all known tokens and the first decode row. The last token of a request is never fed. */
static uint32_t admission_tokens(const struct req *r)
{
    return r->n_known + 1 < r->n_total ? r->n_known + 1 : r->n_total - 1;
}

/* Whether all that run and r could decode in one step within the least target, with a share left for prefill. */
static bool keeps_target(const struct sched *s, const struct build *b, const struct req *r)
{
    if (!by_targets(s) || b->settled.decodes == 0)
        return true;
    int64_t target_us = b->target_us;
    if (wants_less(s, r, target_us))
        target_us = r->tbt_target_us;
    struct cost_step all = b->settled;
    all.decodes++;
    all.context += r->n_known;
    return !target_us || cost_predict_us(&s->cost, &all) * (1 + PREFILL_TIME) <= safe_us(s, target_us);
}

/* Room for the head of the line, parked slots out of its way where that helps; the one that it begins as goes last. */
static bool can_admit(struct sched *s, const struct build *b, struct req *r)
{
    if (!r || b->owed > 0 || (s->hold && r->state == REQ_QUEUED) || !keeps_target(s, b, r))
        return false;
    if (r->host_pages ? r->resume_step > s->next_step : r->n_unknown > 0)
        return false;
    if (r->host_pages)
        r->n_match = 0;
    else
        cache_match(s, r);
    for (;;) {
        uint64_t need = (r->host_pages ? kv_pages_for(&s->kv, suspend_tokens(r))
                                       : kv_pages_added(&s->kv, admission_tokens(r), r->n_match)) +
                        kv_pages_for(&s->kv, b->growth);
        bool slot = r->host_pages || s->n_free + s->n_pending > b->n_reused;
        if (slot && need <= s->free_pages + s->pending_pages + s->fenced_pages)
            return need <= s->free_pages;
        if (need > s->kv.total_pages - holders_running(s))
            return false;
        if (cache_evict(s, r->n_match ? r->match_slot : SCHED_NO_SLOT))
            continue;
        if (!slot && suspend_give_way(s, r))
            continue;
        if (r->n_match == 0 || !prefix_parked(s->prefix, r->match_slot))
            return false;
        r->n_match = 0; /* until the index changes, which it does now, unless this plan needs the slot */
        if (!cache_evict(s, SCHED_NO_SLOT))
            return false;
    }
}

/* Rows that decodes may take. All that is left, unless prefill waits: then its share is kept for it. */
static uint32_t decode_limit(struct sched *s, const struct build *b)
{
    uint32_t want = 0;
    if (b->n_prefilling > 0)
        want = s->prefilling[0]->n_known - s->prefilling[0]->n_fed;
    else if (can_admit(s, b, queue_next(s)) && !queue_next(s)->host_pages)
        want = queue_next(s)->n_known;
    uint32_t share = b->left < PREFILL_SHARE ? 1 : b->left / PREFILL_SHARE;
    return b->left - (want < share ? want : share);
}

static void preempt(struct sched *s, struct req *r)
{
    if (!suspend_begin(s, r)) {
        req_drop_slot(s, r);
        r->n_fed = 0;
    }
    req_list_remove(&s->run, r);
    r->state = REQ_PREEMPTED;
    run_insert(&s->preempted, r);
    r->preemptions++;
    s->last_victim_seq = r->seq;
    s->total.preemptions++;
    sched_settle_pending(s);
}

/* Whom it costs least: by the rows that are computed again, without those that another slot has; those that were twice
 * preempted last. Not the oldest, nobody who has rows in this plan or waits for pages in it, and not the last victim, unless
 * there is nobody else. */
static struct req *victim_for(struct sched *s, struct req *r)
{
    struct req *best = NULL, *again = r;
    uint64_t best_cost = 0;
    for (struct req *v = s->run.head->next; v; v = v->next) {
        if (v->plan_seq == s->plan_seq)
            continue;
        if (v->seq == s->last_victim_seq && v != r) {
            again = v;
            continue;
        }
        uint64_t cost = v->n_fed - s->slot_holder[v->slot]->shared + (v->preemptions >= 2 ? UINT64_C(1) << 32 : 0);
        if (!best || cost <= best_cost) { /* of equals the youngest */
            best = v;
            best_cost = cost;
        }
    }
    return best ? best : again;
}

/* Pages for one more token; false: not in this step (it waits for pages that come free, or was preempted itself). */
static bool grow(struct sched *s, struct build *b, struct req *r)
{
    uint64_t pages = kv_pages_for(&s->kv, (uint64_t)r->n_fed + 1);
    uint64_t need = pages - r->pages;
    for (;;) {
        if (b->owed + need <= s->free_pages) {
            s->free_pages -= need;
            holder_add(s, r->slot, need);
            set_pages(s, r, pages);
            return true;
        }
        if (b->owed + need <= s->free_pages + s->pending_pages + s->fenced_pages) {
            b->owed += need;
            r->plan_seq = s->plan_seq;
            return false;
        }
        if (cache_evict(s, SCHED_NO_SLOT))
            continue;
        struct req *victim = victim_for(s, r);
        preempt(s, victim);
        if (victim == r)
            return false;
    }
}

/* Rows [n_fed, n_fed + n) of r are in the plan; with sample also a token that only the ranks know for now. */
static void feed(struct sched *s, struct build *b, struct req *r, uint32_t n, bool sample)
{
    r->n_fed += n;
    r->plan_seq = s->plan_seq;
    if (r->n_fed > r->n_fed_max) {
        uint32_t fresh = r->n_fed - r->n_fed_max;
        s->total.recomputed_tokens += n - fresh;
        if (r->n_fed_max < r->n_prompt)
            s->total.prompt_tokens += r->n_fed < r->n_prompt ? fresh : r->n_prompt - r->n_fed_max;
        r->n_fed_max = r->n_fed;
    } else {
        s->total.recomputed_tokens += n;
    }
    if (sample) {
        r->n_unknown++;
        b->flight->sample[b->flight->n_samples++] = (struct sample_ref){r, r->seq};
    }
    b->left -= n;
}

/* One row for each decode, older ones first in memory; when there are too many they take turns by age. */
static void plan_decodes(struct sched *s, struct build *b)
{
    uint32_t all = b->n_decodable;
    uint32_t limit = decode_limit(s, b);
    uint32_t n = all < limit ? all : limit;
    if (n == 0)
        return;
    uint32_t first = 0;
    if (n < all) {
        while (first < all && s->decodable[first]->seq <= s->rotate_seq)
            first++;
        first %= all;
        s->rotate_seq = s->decodable[(first + n - 1) % all]->seq;
    }
    uint32_t wrapped = first + n > all ? first + n - all : 0; /* the turn is [first, all) and [0, wrapped) */
    for (uint32_t k = 0; k < n; k++) {
        struct req *r = s->decodable[k < wrapped ? k : first + k - wrapped];
        if (r->state != REQ_RUNNING) /* preempted by an older one */
            continue;
        if (r->n_fed >= r->cap_tokens && !grow(s, b, r))
            continue;
        s->plan_decode[b->n_decode++] = r->slot;
        b->cost.decodes++;
        b->cost.context += r->n_fed + 1;
        feed(s, b, r, 1, true);
    }
}

/* A row is scored for the token behind it: the prompt's last row is not, its token is sampled. */
static void score_chunk(struct build *b, struct req *r, struct sched_chunk *chunk)
{
    uint32_t first = r->n_scored > r->n_fed ? r->n_scored : r->n_fed, end = r->n_fed + chunk->n_tokens;
    if (end > r->n_prompt - 1)
        end = r->n_prompt - 1;
    if (first >= end)
        return;
    chunk->score_first = first - r->n_fed;
    chunk->score_rows = end - first;
    chunk->next_token = chunk->sample ? 0 : r->tokens[r->n_fed + chunk->n_tokens];
    r->n_scored = end;
    b->flight->score[b->flight->n_scores++] = (struct score_ref){r, r->seq, end - first};
    b->flight->score_rows += end - first;
}

/* Rows of a chunk of r: what is left of the budget, and of the time. */
static uint32_t chunk_rows(const struct sched *s, const struct build *b, const struct req *r)
{
    uint32_t rest = r->n_known - r->n_fed, most = rest < b->left ? rest : b->left;
    if (b->limit_us <= 0)
        return most;
    uint32_t n = cost_rows_within(&s->cost, &b->cost, r->n_fed, most, b->limit_us);
    if (n >= TILE && n < rest)
        n -= n % TILE;
    if (n >= TAIL && rest - n < TAIL)
        n = rest < most ? rest : most;
    if (b->n_chunk == 0 && n < MIN_ROWS)
        n = MIN_ROWS < most ? MIN_ROWS : most;
    return n;
}

/* False: there is no time left for it. */
static bool plan_chunk(struct sched *s, struct build *b, struct req *r)
{
    uint32_t n = chunk_rows(s, b, r);
    if (n == 0)
        return false;
    b->cost.pairs += cost_pairs(r->n_fed, n);
    b->cost.rows += n;
    uint32_t *tokens = s->plan_tokens + b->n_tokens;
    memcpy(tokens, r->tokens + r->n_fed, n * sizeof *tokens);
    b->n_tokens += n;
    bool sample = r->n_fed + n == r->n_known;
    struct sched_chunk *chunk = &s->plan_chunk[b->n_chunk++];
    *chunk = (struct sched_chunk){
        .id = r->id, .slot = r->slot, .position = r->n_fed, .tokens = tokens, .n_tokens = n, .sample = sample};
    if (r->scores)
        score_chunk(b, r, chunk);
    r->decoding = sample;
    b->n_partial += !sample;
    feed(s, b, r, n, sample);
    return sample || b->limit_us <= 0; /* a part only: the time is up */
}

/* A free slot; else one that this very plan gives back, for releases come first. */
static uint32_t take_slot(struct sched *s, struct build *b)
{
    if (s->n_free == 0)
        return s->pending[b->n_reused++];
    uint32_t slot = s->free_slot[s->free_first];
    s->free_first = s->free_first + 1 == s->slots ? 0 : s->free_first + 1;
    s->n_free--;
    return slot;
}

/* The first n_match tokens are there. */
static void begin_as(struct sched *s, struct req *r)
{
    uint32_t n = r->n_match, of_prompt = n < r->n_prompt ? n : r->n_prompt;
    prefix_hit(s->prefix, r->match_slot, n);
    s->source_step[r->match_slot] = s->next_step;
    if (r->n_fed_max == 0)
        r->n_cached = of_prompt;
    if (of_prompt > r->n_fed_max)
        s->total.prompt_tokens += of_prompt - r->n_fed_max;
    if (n > r->n_fed_max)
        r->n_fed_max = n;
    r->n_fed = n;
}

static void admit(struct sched *s, struct build *b, struct req *r)
{
    if (r->state == REQ_QUEUED || r->started_us == 0) /* a resumed one is never queued */
        r->started_us = b->now_us;
    queue_admit(s, r);
    settle(s, b, r);
    r->state = REQ_RUNNING;
    r->slot = take_slot(s, b);
    s->owner[r->slot] = r;
    s->n_running++;
    uint64_t own = kv_pages_added(&s->kv, admission_tokens(r), r->n_match);
    set_pages(s, r, kv_pages_for(&s->kv, admission_tokens(r)));
    s->free_pages -= own;
    holder_take(s, r->slot, r->match_slot, r->n_match, own);
    b->growth += req_growth(r);
    s->plan_admit[b->n_admit++] = (struct sched_admit){
        .id = r->id, .slot = r->slot, .from = r->match_slot, .from_tokens = r->n_match, .sample = r->sample};
    if (r->n_match)
        begin_as(s, r);
    r->match_version = UINT64_MAX;
}

/* Its slot's content comes back, before the rows of this plan; its own rows begin in the next. */
static void resume(struct sched *s, struct build *b, struct req *r)
{
    queue_admit(s, r);
    settle(s, b, r);
    b->growth += req_growth(r);
    b->resumed_pages += r->host_pages;
    r->state = REQ_RUNNING;
    r->plan_seq = s->plan_seq;
    suspend_end(s, r);
    set_pages(s, r, s->slot_holder[r->slot]->pages);
    s->plan_resume[b->n_resume++] = r->slot;
}

/* Moves the slots to be suspended into the plan. */
static uint32_t plan_suspends(struct sched *s)
{
    uint32_t n = s->n_suspending;
    memcpy(s->plan_suspend, s->suspending, n * sizeof *s->suspending);
    s->n_suspending = 0;
    return n;
}

/* Moves the pending slots into the plan. */
static uint32_t plan_releases(struct sched *s, const struct build *b)
{
    uint32_t n = s->n_pending;
    memcpy(s->plan_release, s->pending, n * sizeof *s->pending);
    for (uint32_t i = b->n_reused; i < n; i++) {
        uint64_t at = (uint64_t)s->free_first + s->n_free++;
        s->free_slot[at < s->slots ? at : at - s->slots] = s->pending[i];
    }
    s->n_pending = 0;
    assert(s->fenced_pages == 0 || s->pending_pages == 0);
    s->fenced_pages += s->pending_pages;
    s->pending_pages = 0;
    return n;
}

/* Prefills that run already, the one with the least key first; without ageing by age, as they are. */
static void sort_prefills(struct sched *s, uint32_t n)
{
    for (uint32_t i = 1; s->cfg.age_us_per_token && i < n; i++) {
        struct req *r = s->prefilling[i];
        int64_t key_us = prefill_key_us(s, r, r->arrived_us, r->n_known - r->n_fed);
        uint32_t k = i;
        for (; k > 0; k--) {
            const struct req *o = s->prefilling[k - 1];
            if (prefill_key_us(s, o, o->arrived_us, o->n_known - o->n_fed) <= key_us)
                break;
            s->prefilling[k] = s->prefilling[k - 1];
        }
        s->prefilling[k] = r;
    }
}

/* Whether the one that waits goes before a prefill that runs: it is shorter, and few are begun. */
static bool passes(const struct sched *s, const struct build *b, const struct req *waits, const struct req *runs)
{
    if (!waits || !s->cfg.age_us_per_token || b->n_prefilling + b->n_admit >= MAX_PARTIAL)
        return false;
    return prefill_key_us(s, waits, waits->arrived_us, waits->n_known) <
           prefill_key_us(s, runs, runs->arrived_us, runs->n_known - runs->n_fed);
}

/* Chunks of what runs, then admissions with theirs; but shorter ones first. */
static void plan_prefills(struct sched *s, struct build *b)
{
    sort_prefills(s, b->n_prefilling);
    for (uint32_t i = 0; b->left > 0;) {
        struct req *runs = i < b->n_prefilling ? s->prefilling[i] : NULL, *waits = queue_next(s);
        if (runs && (runs->state != REQ_RUNNING || runs->plan_seq == s->plan_seq)) { /* preempted in this plan */
            i++;
            continue;
        }
        if (runs && !(passes(s, b, waits, runs) && can_admit(s, b, waits))) {
            i++;
            if (!plan_chunk(s, b, runs))
                return;
            continue;
        }
        if (!runs && !can_admit(s, b, waits))
            return;
        if (waits->host_pages) {
            resume(s, b, waits);
            continue;
        }
        if (b->limit_us > 0 && b->n_chunk > 0 && chunk_rows(s, b, waits) == 0) /* slots are for those that begin */
            return;
        admit(s, b, waits);
        if (!plan_chunk(s, b, waits))
            return;
    }
}

/* What the step may take: the least target of those that decode in it, but a share for prefill in any case. */
static void set_limit(struct sched *s, struct build *b)
{
    if (s->cfg.policy != SCHED_TARGETS || b->n_decode == 0 || b->target_us == 0)
        return;
    if (!cost_known(&s->cost)) {
        b->left = b->left < UNKNOWN_ROWS ? b->left : UNKNOWN_ROWS;
        return;
    }
    double decodes_us = cost_predict_us(&s->cost, &b->cost) * (1 + PREFILL_TIME), limit_us = safe_us(s, b->target_us);
    b->limit_us = decodes_us > limit_us ? decodes_us : limit_us;
}

/* Decodes, then prefill; or the other way round, and then only one of both. */
static void plan_rows(struct sched *s, struct build *b)
{
    if (s->cfg.policy == SCHED_PREFILL_FIRST) {
        plan_prefills(s, b);
        if (b->n_chunk == 0)
            plan_decodes(s, b);
        return;
    }
    plan_decodes(s, b);
    set_limit(s, b);
    plan_prefills(s, b);
}

/* Whether prompts are left behind. */
static bool has_backlog(const struct sched *s, const struct build *b)
{
    return b->n_partial > 0 || s->n_queued > 0 || s->preempted.head;
}

bool sched_plan(struct sched *s, int64_t now_us, struct sched_plan *plan)
{
    sched_expire(s, now_us);
    if (!s->attached || s->in_flight == s->cfg.depth)
        return false;
    struct build b = {.flight = &s->flight[s->next_step % SCHED_MAX_DEPTH], .left = s->step_budget, .now_us = now_us};
    b.flight->n_samples = b.flight->n_scores = b.flight->score_rows = 0;
    s->plan_seq++;
    collect(s, &b);
    resize_take(s);
    plan_rows(s, &b);
    uint32_t rows = b.n_decode + b.n_tokens;
    s->suspended_pages -= b.resumed_pages;
    /* Releases, suspensions and another size of the pool alone wait for the step in flight: the ranks could not take them earlier anyhow, and a request that
     * arrives meanwhile finds the pipeline open. */
    bool bare = s->n_pending + s->n_suspending == 0 && !resize_due(s);
    if (rows == 0 && b.n_resume == 0 && (bare || s->in_flight > 0))
        return false;
    uint32_t n_release = plan_releases(s, &b);
    b.flight->cost = b.cost;
    b.flight->planned_us = now_us;
    b.flight->backlog = has_backlog(s, &b);
    uint64_t kv_pages = resize_tell(s);
    *plan = (struct sched_plan){.step = s->next_step++,
                                .release = s->plan_release,
                                .n_release = n_release,
                                .suspend = s->plan_suspend,
                                .n_suspend = plan_suspends(s),
                                .resume = s->plan_resume,
                                .n_resume = b.n_resume,
                                .kv_pages = kv_pages,
                                .admit = s->plan_admit,
                                .n_admit = b.n_admit,
                                .decode = s->plan_decode,
                                .n_decode = b.n_decode,
                                .chunk = s->plan_chunk,
                                .n_chunk = b.n_chunk,
                                .rows = rows,
                                .samples = b.flight->n_samples,
                                .scores = b.flight->score_rows,
                                .cost = b.cost};
    s->in_flight++;
    return true;
}
