/* From the scheduler's plan to the message. The arrays are kept between steps: in steady state nothing is allocated. */
#include <stdlib.h>

#include "coordinator/coord_internal.h"

struct plan_scratch {
    Tandem__V1__AdmitSlot *admit, **admit_ptr;
    Tandem__V1__SampleParams *sample;
    size_t admit_cap;
    Tandem__V1__PrefillChunk *chunk, **chunk_ptr;
    size_t chunk_cap;
};

enum status_code plan_scratch_create(struct plan_scratch **out, struct status *st)
{
    *out = calloc(1, sizeof **out);
    return *out ? ST_OK : status_nomem(st, "plan", sizeof **out);
}

void plan_scratch_destroy(struct plan_scratch *p)
{
    if (!p)
        return;
    free(p->admit);
    free(p->admit_ptr);
    free(p->sample);
    free(p->chunk);
    free(p->chunk_ptr);
    free(p);
}

static bool grow(void *array, size_t n, size_t size)
{
    void **slot = array;
    void *p = realloc(*slot, n * size);
    if (p)
        *slot = p;
    return p != NULL;
}

static enum status_code reserve(struct plan_scratch *p, const struct sched_plan *plan, struct status *st)
{
    size_t n = plan->n_admit;
    if (n > p->admit_cap) {
        if (!grow(&p->admit, n, sizeof *p->admit) || !grow(&p->admit_ptr, n, sizeof(Tandem__V1__AdmitSlot *)) ||
            !grow(&p->sample, n, sizeof *p->sample))
            return status_nomem(st, "plan", n * sizeof *p->admit);
        p->admit_cap = n;
    }
    n = plan->n_chunk;
    if (n > p->chunk_cap) {
        if (!grow(&p->chunk, n, sizeof *p->chunk) || !grow(&p->chunk_ptr, n, sizeof(Tandem__V1__PrefillChunk *)))
            return status_nomem(st, "plan", n * sizeof *p->chunk);
        p->chunk_cap = n;
    }
    return ST_OK;
}

static void fill(struct plan_scratch *p, const struct sched_plan *plan, Tandem__V1__StepPlan *m)
{
    m->step = plan->step;
    m->n_release_slots = plan->n_release;
    m->release_slots = (uint32_t *)plan->release; /* protobuf-c has no const; packing only reads */
    m->n_suspend_slots = plan->n_suspend;
    m->suspend_slots = (uint32_t *)plan->suspend;
    m->n_resume_slots = plan->n_resume;
    m->resume_slots = (uint32_t *)plan->resume;
    m->kv_pages = plan->kv_pages;
    m->n_decode_slots = plan->n_decode;
    m->decode_slots = (uint32_t *)plan->decode;
    for (uint32_t i = 0; i < plan->n_admit; i++) {
        const struct sched_admit *a = &plan->admit[i];
        p->sample[i] = *(const Tandem__V1__SampleParams *)a->sample.options; /* of the request, which lives */
        p->sample[i].seed = a->sample.seed;
        tandem__v1__admit_slot__init(&p->admit[i]);
        p->admit[i].slot = a->slot;
        p->admit[i].sample = &p->sample[i];
        p->admit[i].from_slot = a->from_tokens ? a->from : 0;
        p->admit[i].from_tokens = a->from_tokens;
        p->admit_ptr[i] = &p->admit[i];
    }
    m->n_admits = plan->n_admit;
    m->admits = p->admit_ptr;
    for (uint32_t i = 0; i < plan->n_chunk; i++) {
        const struct sched_chunk *c = &plan->chunk[i];
        tandem__v1__prefill_chunk__init(&p->chunk[i]);
        p->chunk[i].slot = c->slot;
        p->chunk[i].position = c->position;
        p->chunk[i].token_ids = (uint32_t *)c->tokens;
        p->chunk[i].n_token_ids = c->n_tokens;
        p->chunk[i].sample = c->sample;
        p->chunk[i].score_first = c->score_first;
        p->chunk[i].score_rows = c->score_rows;
        p->chunk[i].next_token = c->next_token;
        p->chunk_ptr[i] = &p->chunk[i];
    }
    m->n_prefills = plan->n_chunk;
    m->prefills = p->chunk_ptr;
}

enum status_code plan_send(struct plan_scratch *p, const struct group *g, const struct sched_plan *plan,
                           uint32_t *bad_rank, struct status *st)
{
    *bad_rank = 0;
    enum status_code rc = reserve(p, plan, st);
    if (rc != ST_OK)
        return rc;
    Tandem__V1__StepPlan step = TANDEM__V1__STEP_PLAN__INIT;
    fill(p, plan, &step);
    Tandem__V1__CoordinatorMessage m = TANDEM__V1__COORDINATOR_MESSAGE__INIT;
    m.epoch = g->epoch;
    m.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_PLAN;
    m.plan = &step;
    for (uint32_t r = 0; r < g->size; r++) {
        rc = rpc_call_send_in_place(g->rank[r]->call, &m.base, st);
        if (rc != ST_OK) {
            *bad_rank = r;
            return rc;
        }
    }
    return ST_OK;
}
