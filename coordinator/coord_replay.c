/* What becomes of requests whose worker group is lost. Engine thread.
 *
 *     group lost ──another serves──▶ running and queued requests go on there at once (coord_route.c)
 *         '──▶ running requests wait, new ones queue up behind them ──the next group is ready──▶ all go on
 *                         '── no group within --replay-timeout-ms, or none can come ──▶ UNAVAILABLE
 *
 * A client sees a pause and nothing else. What it has is a prefix of what the scheduler knows, and that is what the next
 * group computes again before it samples the next token, with the seed and the position that it would have had: nothing is
 * sent twice, and nothing that was sent is sampled again. The state of stop strings, text and log probabilities is in the
 * choices and is not touched; ranks find penalties and min_tokens again from the tokens and output_at.
 *
 * A request that ran in --replay-limit + 1 lost groups in a row without a new token gets INTERNAL: it may be what kills them. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

static void end_all(struct engine *e, const char *reason, int64_t now_us)
{
    struct status st = STATUS_INIT;
    status_set(&st, ST_UNAVAILABLE, "%s", reason);
    requests_end_live(e, &st, now_us);
}

static uint32_t end_group(struct engine *e, const struct group *g, const char *reason, int64_t now_us)
{
    struct status st = STATUS_INIT;
    status_set(&st, ST_UNAVAILABLE, "%s", reason);
    return requests_end_group(e, g, &st, now_us);
}

/* Before the state is published: it says whether new requests are taken. */
void replay_prepare(struct engine *e, struct group *g, int64_t now_us, bool served, bool permanent)
{
    const struct coord_options *o = &e->coord->opt;
    g->replays = o->replay && !permanent && e->stop == STOP_NONE && g->had_one;
    if (!g->replays)
        g->wait_until_us = 0;
    else if (served)
        g->wait_until_us = now_us + (int64_t)o->replay_timeout_ms * 1000;
}

void replay_group_lost(struct engine *e, struct group *g, int64_t now_us, bool served, bool permanent)
{
    bool goes_on = g->replays || (e->coord->opt.replay && groups_others_serve(e, g));
    if (!g->sched)
        return;
    if (served && goes_on)
        sched_lose(g->sched, now_us);
    else if (served)
        sched_detach(g->sched, now_us);
    engine_events(e, now_us);
    route_leave(e, g, now_us);
    if (permanent && e->coord->opt.replay) /* the next one would fail, too */
        end_group(e, g, g->lost_reason, now_us);
    struct sched_load l = sched_load(g->sched);
    if (served && g->replays && l.running + l.queued)
        log_line(&e->coord->log, LOG_INFO, "%u requests wait for the next worker group, %u of them have begun",
                 l.running + l.queued, l.running);
}

static void wait_is_over(struct engine *e, struct group *g, int64_t now_us)
{
    char reason[COORD_REASON_BYTES];
    snprintf(reason, sizeof reason, "%s; no worker group came within %u ms (--replay-timeout-ms)", g->lost_reason,
             e->coord->opt.replay_timeout_ms);
    g->wait_until_us = 0;
    engine_publish(e, reason);
    route_leave(e, g, now_us); /* what was kept for it */
    uint32_t n = end_group(e, g, reason, now_us);
    if (n || !groups_others_serve(e, g))
        log_line(&e->coord->log, LOG_ERROR, "%s", reason);
}

void replay_check(struct engine *e, int64_t now_us)
{
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->group[i].wait_until_us && now_us >= e->group[i].wait_until_us)
            wait_is_over(e, &e->group[i], now_us);
}

int64_t replay_next_us(const struct engine *e)
{
    int64_t next = INT64_MAX;
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->group[i].wait_until_us)
            next = min_i64(next, e->group[i].wait_until_us);
    return next;
}

/* Of all that Ready says about the model itself; the context also depends on the group. 0: out of memory. */
static uint64_t model_digest(const Tandem__V1__ModelInfo *model)
{
    Tandem__V1__ModelInfo m = *model;
    m.max_context_tokens = 0;
    size_t n = tandem__v1__model_info__get_packed_size(&m);
    uint8_t *bytes = malloc(n ? n : 1);
    if (!bytes)
        return 0;
    tandem__v1__model_info__pack(&m, bytes);
    uint64_t h = UINT64_C(14695981039346656037); /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        h = (h ^ bytes[i]) * UINT64_C(1099511628211);
    free(bytes);
    return h ? h : 1;
}

/* Requests that wait were checked against the model and the abilities of the group that is gone. Where others serve, it is
 * the new one that must go. */
enum status_code replay_group_ready(struct engine *e, struct group *g, int64_t now_us, struct status *st)
{
    uint64_t digest = model_digest(g->ready->ready->model);
    uint32_t lacks = e->coord->model.sample_options & ~g->sample_options; /* only this thread writes it */
    bool other = e->model_digest && (digest == 0 || digest != e->model_digest);
    if (groups_others_serve(e, g) && (other || lacks))
        return status_set(st, ST_FAILED_PRECONDITION,
                          other ? "model: another than the groups serve that are attached"
                                : "sample_options: it lacks options that the groups have that are attached");
    if (e->model_digest && (other || lacks))
        end_all(e,
                lacks ? "the new worker group lacks options of sampling that the one before had"
                      : "the new worker group serves another model than the one before",
                now_us);
    for (uint32_t i = 0; other && i < e->n_groups; i++) /* of that model nobody is awaited any more */
        e->group[i].wait_until_us = 0;
    e->model_digest = digest;
    g->wait_until_us = 0;
    if (!g->sched)
        return ST_OK;
    struct sched_load l = sched_load(g->sched);
    if (l.running)
        log_line(&e->coord->log, LOG_INFO, "epoch %" PRIu64 ": going on with %u requests", g->epoch, l.running);
    return ST_OK;
}
