/* What becomes of requests whose worker group is lost. Engine thread.
 *
 *     group lost ──▶ running requests wait, new ones queue up behind them ──the next group is ready──▶ all go on
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

/* Before the state is published: it says whether new requests are taken. */
void replay_prepare(struct engine *e, int64_t now_us, bool served, bool permanent)
{
    const struct coord_options *o = &e->coord->opt;
    e->replays = o->replay && !permanent && e->stop == STOP_NONE && e->group.had_one;
    if (!e->replays)
        e->wait_until_us = 0;
    else if (served)
        e->wait_until_us = now_us + (int64_t)o->replay_timeout_ms * 1000;
}

void replay_group_lost(struct engine *e, int64_t now_us, bool served, bool permanent)
{
    if (!e->sched)
        return;
    if (served && e->replays)
        sched_lose(e->sched, now_us);
    else if (served)
        sched_detach(e->sched, now_us);
    engine_events(e, now_us);
    if (permanent && e->coord->opt.replay) /* the next one would fail, too */
        end_all(e, e->lost_reason, now_us);
    struct sched_load l = sched_load(e->sched);
    if (served && e->replays && l.running + l.queued)
        log_line(&e->coord->log, LOG_INFO, "%u requests wait for the next worker group, %u of them have begun",
                 l.running + l.queued, l.running);
}

void replay_check(struct engine *e, int64_t now_us)
{
    if (e->wait_until_us == 0 || now_us < e->wait_until_us)
        return;
    char reason[400];
    snprintf(reason, sizeof reason, "%s; no worker group came within %u ms (--replay-timeout-ms)", e->lost_reason,
             e->coord->opt.replay_timeout_ms);
    e->wait_until_us = 0;
    if (!e->draining)
        engine_publish(e, TANDEM__V1__SERVER_INFO__STATE__RECOVERING, reason);
    log_line(&e->coord->log, LOG_ERROR, "%s", reason);
    end_all(e, reason, now_us);
}

int64_t replay_next_us(const struct engine *e)
{
    return e->wait_until_us ? e->wait_until_us : INT64_MAX;
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

/* Requests that wait were checked against the model and the abilities of the group that is gone. */
void replay_group_ready(struct engine *e, int64_t now_us)
{
    struct group *g = &e->group;
    uint64_t digest = model_digest(g->ready->ready->model);
    uint32_t lacks = e->coord->model.sample_options & ~g->sample_options; /* only this thread writes it */
    if (e->sched && (digest == 0 || digest != g->model_digest || lacks))
        end_all(e,
                lacks ? "the new worker group lacks options of sampling that the one before had"
                      : "the new worker group serves another model than the one before",
                now_us);
    g->model_digest = digest;
    e->wait_until_us = 0;
    if (!e->sched)
        return;
    struct sched_load l = sched_load(e->sched);
    if (l.running)
        log_line(&e->coord->log, LOG_INFO, "epoch %" PRIu64 ": going on with %u requests", g->epoch, l.running);
}
