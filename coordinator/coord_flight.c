/* coord_flight.c - what the engine tells the flight recorder, and with it the live page and the file of spans. Engine thread; all of it is nothing without a recorder. */
#include <stdio.h>

#include "coordinator/coord_internal.h"
#include "coordinator/flight.h"

#define SILENCE_EVERY_US 500000

static uint32_t cut_u32(uint64_t v)
{
    return v < UINT32_MAX ? (uint32_t)v : UINT32_MAX;
}

void record_plan(struct coord *c, uint64_t epoch, const struct sched_plan *plan, int64_t now_us)
{
    const uint32_t v[] = {plan->rows,    plan->n_decode,  plan->n_chunk, plan->cost.rows,
                          plan->n_admit, plan->n_release, plan->samples, cut_u32(plan->cost.context >> 10)};
    live_plan(c->live, epoch, plan);
    flight_numbers(c->flight, now_us, FLIGHT_PLAN, epoch, FLIGHT_NO_RANK, plan->step, v, sizeof v / sizeof *v);
}

void record_result(struct coord *c, uint64_t epoch, uint32_t rank, const Tandem__V1__StepResult *r, int64_t now_us)
{
    const uint32_t v[] = {cut_u32(r->compute_us), cut_u32(r->n_token_ids)};
    if (rank == 0)
        live_result(c->live, epoch, r->step, r->compute_us);
    flight_numbers(c->flight, now_us, FLIGHT_RESULT, epoch, rank, r->step, v, 2);
}

/* Two heartbeats did not come. Every half a second, as long as it lasts. */
void record_silence(struct coord *c, uint64_t epoch, struct rank_conn *conn, int64_t silent_us, int64_t now_us)
{
    const uint32_t ms = cut_u32((uint64_t)(silent_us / 1000));
    if (silent_us < 2500 * (int64_t)c->opt.heartbeat_interval_ms || now_us - conn->silence_told_us < SILENCE_EVERY_US)
        return;
    conn->silence_told_us = now_us;
    flight_numbers(c->flight, now_us, FLIGHT_SILENT, epoch, conn->rank, 0, &ms, 1);
}

void record_attach(struct coord *c, uint64_t epoch, const struct rank_conn *conn, int64_t now_us)
{
    char text[FLIGHT_TEXT + 1];
    snprintf(text, sizeof text, "pid %u on %.40s, %.30s", conn->pid, conn->host, conn->device);
    flight_text(c->flight, now_us, FLIGHT_ATTACH, epoch, conn->rank, text);
}

void record_ready(struct coord *c, const struct group *g, int64_t now_us)
{
    const uint32_t v[] = {g->size, g->slots, cut_u32(g->kv.total_pages), g->context};
    flight_numbers(c->flight, now_us, FLIGHT_READY, g->epoch, FLIGHT_NO_RANK, 0, v, 4);
}

void record_lost(struct coord *c, uint64_t epoch, const char *reason, int64_t now_us)
{
    flight_text(c->flight, now_us, FLIGHT_LOST, epoch, FLIGHT_NO_RANK, reason);
}

void record_admit(struct coord *c, const struct request *r, int64_t now_us)
{
    const uint32_t v[] = {r->n_prompt, r->max_new, r->n_choices};
    flight_named(c->flight, now_us, FLIGHT_ADMIT, r->name, v, 3);
}

void record_refuse(struct coord *c, const struct request *r, enum status_code code, int64_t now_us)
{
    const uint32_t v[] = {(uint32_t)code, r->n_prompt};
    flight_named(c->flight, now_us, FLIGHT_REFUSE, r->name, v, 2);
}

void record_end(struct coord *c, const struct request *r, enum status_code code, int64_t now_us)
{
    uint32_t tokens = 0;
    span_end(c, r, code, now_us);
    for (uint32_t i = 0; r->choice && i < r->n_choices; i++)
        tokens += r->choice[i].n_new;
    const uint32_t v[] = {(uint32_t)code, r->n_prompt, tokens};
    flight_named(c->flight, now_us, FLIGHT_END, r->name, v, 3);
}
