/* memory_mapper.c - the background thread: maps, clears and unmaps ahead of time.
 *
 *   step loop   job[posted++ % JOBS] = ...; sem_post(&todo)          sem_trywait(&done) -> reap job[reaped++ % JOBS]
 *   mapper                       sem_wait(&todo) -> run job[taken++ % JOBS]; sem_post(&done)
 *
 * One ring, filled by one thread and worked off by one, in order. The two semaphores are all the hand-over: their counts
 * say which entries are whose, a post is one atomic addition, and the kernel is asked only when somebody sleeps. There is
 * no flag beside them, so none can be read too early.
 *
 * The mapper decides nothing and keeps no books. The step loop chooses range, positions and pages; until it has reaped
 * the job it touches none of these: range->job is set, and the pages are busy. The mapper reads range->pages and the dirty
 * bytes of these positions, and writes the job's result.
 *
 * Pages that a job has made ready are free as before: the account knows nothing of the future. A job that fails has only
 * failed to help; the step loop makes the same calls again when it needs them, and reports their error.
 */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>

#include "memory/memory_internal.h"

struct kv_mapper {
    struct kv_pool *pool; /* what does not change after create */
    pthread_t thread;
    sem_t todo, done;
    struct kv_job job[JOBS];
    /* of the step loop */
    uint64_t posted, reaped;
    uint64_t held; /* of those posted: the thread has not been told */
    bool holds;
    /* of the mapper */
    uint64_t taken;
};

static void wait_for(sem_t *s)
{
    while (sem_wait(s) && errno == EINTR)
        ;
}

/* --- the thread --- */

#define BATCH 64

/* What was put in a moment ago; if that fails, nobody knows what is mapped. */
static void take_out(struct kv_pool *p, struct kv_job *j)
{
    if (kv_span_unmap(p, j->range, j->from, j->to, &j->cost, NULL) != ST_OK)
        abort();
}

/* Starts the job; clears go on until the batch is finished. */
static enum status_code run_job(struct kv_pool *p, struct kv_job *j)
{
    if (j->kind == JOB_UNMAP)
        return kv_span_unmap(p, j->range, j->from, j->to, &j->cost, NULL);
    if (j->kind == JOB_CLEAR)
        return kv_span_clear(p, j->range, j->from, j->to, &j->cost, NULL);
    enum status_code rc = kv_span_map(p, j->range, j->from, j->to, &j->cost, NULL);
    if (rc != ST_OK)
        return rc;
    rc = kv_span_clear(p, j->range, j->from, j->to, &j->cost, NULL);
    if (rc != ST_OK)
        take_out(p, j);
    return rc;
}

/* Waits once for the clears of all n jobs. A device full of one step's work gets to them when that ends: a wait for each
 * of them would be a job a step. */
static void finish(struct kv_mapper *m, struct kv_job **job, uint32_t n, bool cleared)
{
    struct kv_pool *p = m->pool;
    enum status_code rc = cleared ? p->ops->sync(p->be, NULL) : ST_OK;
    for (uint32_t i = 0; i < n; i++) {
        if (rc != ST_OK && job[i]->rc == ST_OK && job[i]->kind != JOB_UNMAP) {
            job[i]->rc = rc;
            if (job[i]->kind == JOB_MAP)
                take_out(p, job[i]);
        }
        sem_post(&m->done);
    }
}

static void *mapper_main(void *arg)
{
    struct kv_mapper *m = arg;
    struct kv_pool *p = m->pool;
    enum status_code rc = p->ops->enter ? p->ops->enter(p->be, NULL) : ST_OK;
    for (bool stop = false; !stop;) {
        struct kv_job *batch[BATCH];
        uint32_t n = 0;
        bool cleared = false;
        wait_for(&m->todo);
        do {
            struct kv_job *j = &m->job[m->taken++ % JOBS];
            stop = j->kind == JOB_STOP;
            if (stop)
                break;
            j->rc = rc == ST_OK ? run_job(p, j) : rc;
            cleared = cleared || j->cost.clears;
            batch[n++] = j;
        } while (n < BATCH && sem_trywait(&m->todo) == 0);
        finish(m, batch, n, cleared);
    }
    return NULL;
}

enum status_code kv_mapper_start(struct kv_pool *p, struct status *st)
{
    struct kv_mapper *m = calloc(1, sizeof *m);
    if (!m)
        return status_nomem(st, "the KV pool's thread", sizeof *m);
    m->pool = p;
    sem_init(&m->todo, 0, 0);
    sem_init(&m->done, 0, 0);
    int rc = pthread_create(&m->thread, NULL, mapper_main, m);
    if (rc == 0) {
        p->mapper = m;
        return ST_OK;
    }
    sem_destroy(&m->todo);
    sem_destroy(&m->done);
    free(m);
    return status_errno(st, ST_RESOURCE_EXHAUSTED, rc, "the KV pool's thread");
}

/* --- the step loop's side --- */

/* The thread takes jobs in order: so many of those held back. */
static void tell(struct kv_mapper *m, uint64_t n)
{
    for (; n; n--, m->held--)
        sem_post(&m->todo);
}

/* Of those held back, up to the range's; 0: it is not among them. */
static uint64_t held_up_to(const struct kv_mapper *m, const struct kv_range *r)
{
    for (uint64_t n = m->held; n; n--)
        if (m->job[(m->posted - m->held + n - 1) % JOBS].range == r)
            return n;
    return 0;
}

static void post(struct kv_mapper *m, enum job_kind kind, struct kv_range *r, uint32_t from, uint32_t to)
{
    m->job[m->posted++ % JOBS] = (struct kv_job){.kind = kind, .range = r, .from = from, .to = to};
    if (r) {
        r->job = true;
        r->job_from = from;
    }
    m->held++;
    if (!m->holds)
        tell(m, m->held);
}

void kv_mapper_stop(struct kv_pool *p)
{
    struct kv_mapper *m = p->mapper;
    if (!m)
        return;
    kv_mapper_drain(p);
    m->holds = false;
    post(m, JOB_STOP, NULL, 0, 0);
    pthread_join(m->thread, NULL);
    sem_destroy(&m->todo);
    sem_destroy(&m->done);
    free(m);
    p->mapper = NULL;
}

static void account_map(struct kv_pool *p, const struct kv_job *j)
{
    struct kv_range *r = j->range;
    for (uint32_t i = j->from; i < j->to; i++) {
        uint32_t page = r->pages[i];
        p->page[page].busy = false;
        if (j->rc == ST_OK) {
            p->page[page].dirty = 0;
            p->page[page].maps += j->kind == JOB_MAP;
            p->positions += j->kind == JOB_MAP;
        } else if (j->kind == JOB_MAP) {
            r->pages[i] = NO_PAGE;
            kv_cold_put(p, page);
        }
    }
    while (r->mapped > 0 && r->pages[r->mapped - 1] == NO_PAGE)
        r->mapped--;
}

/* The job at the ring's end is done. */
static void reap_one(struct kv_pool *p)
{
    struct kv_mapper *m = p->mapper;
    const struct kv_job *j = &m->job[m->reaped++ % JOBS];
    if (j->kind != JOB_UNMAP)
        account_map(p, j);
    else if (j->rc == ST_OK)
        kv_positions_forget(p, j->range, j->from, j->to);
    j->range->job = false;
    p->cost.calls += j->cost.calls;
    p->cost.clears += j->cost.clears;
    p->cost.ns += j->cost.ns;
    p->failed_jobs += j->rc != ST_OK;
}

void kv_mapper_reap(struct kv_pool *p)
{
    while (p->mapper && p->mapper->reaped < p->mapper->posted && sem_trywait(&p->mapper->done) == 0)
        reap_one(p);
}

void kv_mapper_hold(struct kv_pool *p, bool on)
{
    if (!p->mapper)
        return;
    p->mapper->holds = on;
    if (!on)
        tell(p->mapper, p->mapper->held);
}

void kv_mapper_drain(struct kv_pool *p)
{
    if (p->mapper)
        tell(p->mapper, p->mapper->held);
    while (p->mapper && p->mapper->reaped < p->mapper->posted) {
        wait_for(&p->mapper->done);
        reap_one(p);
    }
}

void kv_mapper_wait(struct kv_pool *p, struct kv_range *r)
{
    if (r->job)
        tell(p->mapper, held_up_to(p->mapper, r));
    while (r->job) {
        wait_for(&p->mapper->done);
        reap_one(p);
    }
}

/* --- what to do ahead --- */

enum readiness { READY, DIRTY, EMPTY, STALE, TAKEN };

static enum readiness readiness(const struct kv_pool *p, const struct kv_range *r, uint32_t i)
{
    if (r->pages[i] == NO_PAGE)
        return EMPTY;
    const struct kv_page *page = &p->page[r->pages[i]];
    if (page->busy)
        return TAKEN; /* by a job for another position: it may come free */
    if (!kv_page_free(page))
        return STALE;
    return page->dirty ? DIRTY : READY;
}

/* A call over several pages costs the GPU little more than one over one. So while most pages are cold, a few behind those
 * that are wanted are mapped with them. */
#define BATCH_PAGES 4

static uint32_t with_batch(const struct kv_pool *p, const struct kv_range *r, uint32_t from, uint32_t to)
{
    uint32_t end = to;
    while (end < from + BATCH_PAGES && end < p->pages_per_slot && r->pages[end] == NO_PAGE)
        end++;
    return p->n_cold > p->total_pages / 4 + (end - from) ? end : to;
}

static void post_map(struct kv_pool *p, struct kv_range *r, uint32_t from, uint32_t to)
{
    if (p->positions + (to - from) > p->mappings)
        return;
    uint32_t got = kv_pages_claim(p, r, r->mapped, true, to - from, &p->target[from]);
    if (got == 0)
        return;
    to = from + got;
    memcpy(&r->pages[from], &p->target[from], got * sizeof *r->pages);
    if (r->mapped < to)
        r->mapped = to;
    post(p->mapper, JOB_MAP, r, from, to);
}

void kv_mapper_prepare(struct kv_pool *p, struct kv_range *r, uint32_t to)
{
    struct kv_mapper *m = p->mapper;
    if (!m || r->job || m->posted - m->reaped >= JOBS - 1)
        return;
    uint32_t i = r->used;
    enum readiness what = READY;
    while (i < to && (what = readiness(p, r, i)) == READY)
        i++;
    uint32_t end = i;
    while (end < to && readiness(p, r, end) == what)
        end++;
    if (i == end || what == TAKEN)
        return;
    if (what == EMPTY) {
        post_map(p, r, i, end == to ? with_batch(p, r, i, end) : end);
    } else if (what == STALE) {
        post(m, JOB_UNMAP, r, i, end);
    } else {
        uint32_t n = 0; /* a page may stand at two positions */
        for (; i + n < end && !p->page[r->pages[i + n]].busy; n++)
            p->page[r->pages[i + n]].busy = true;
        post(m, JOB_CLEAR, r, i, i + n);
    }
}

/* Of one range that lay idle longest: what others hold at its end. */
static void unmap_stale(struct kv_pool *p)
{
    for (struct kv_range *r = p->idle.last; r; r = r->prev) {
        uint32_t from = r->mapped;
        while (!r->job && from > 0 && readiness(p, r, from - 1) == STALE)
            from--;
        if (r->job || from == r->mapped || p->mapper->posted - p->mapper->reaped >= JOBS - 1)
            continue;
        post(p->mapper, JOB_UNMAP, r, from, r->mapped);
        return;
    }
}

/* Cold pages go to ranges that are mapped less far than slots were long of late, a few in each step in which there is nothing
 * else to do: at the end a slot finds all its pages in whatever range it takes, and no call is made any more. No range gets more
 * than its share of all pages: what a range has too much, another would have to take from it. */
#define SPREAD_PAGES 16

static void spread(struct kv_pool *p)
{
    struct kv_mapper *m = p->mapper;
    /* with what is prepared behind the longest */
    uint64_t far = (p->longest + LONGEST_ONE - 1) / LONGEST_ONE + kv_pages_for(&p->account, p->ahead_tokens);
    uint64_t share = p->n_ranges ? p->total_pages / p->n_ranges : 0;
    if (far > share)
        far = share;
    if (far > p->pages_per_slot)
        far = p->pages_per_slot;
    if (m->posted != m->reaped || p->n_cold < SPREAD_PAGES)
        return;
    for (uint32_t n = 0; n < p->n_ranges; n++) {
        struct kv_range *r = p->ranges[p->spread_range++ % p->n_ranges];
        if (r->state == RANGE_SUSPENDED || r->mapped >= far)
            continue;
        post_map(p, r, r->mapped, far - r->mapped < SPREAD_PAGES ? (uint32_t)far : r->mapped + SPREAD_PAGES);
        return;
    }
}

void kv_mapper_tend(struct kv_pool *p)
{
    if (!p->mapper)
        return;
    kv_mapper_reap(p);
    uint32_t want = (uint32_t)kv_pages_for(&p->account, p->arrival_tokens);
    struct kv_range *r;
    bool any = p->idle.first || p->n_ranges < p->cap_ranges; /* else a range would be made that no slot may ever need */
    for (r = p->idle.first; r && any; r = r->next)
        any = !r->job; /* one is being made ready */
    if (want && any && kv_range_pick(p, NULL, 0, want, &r, NULL) == ST_OK)
        kv_mapper_prepare(p, r, want);
    unmap_stale(p);
    spread(p);
}
