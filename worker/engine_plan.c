/* engine_plan.c - a plan is checked as a whole before any of it is carried out: a rank that refuses a plan has not
 * changed its slots or pages, and says which of the plan's facts is wrong. */
#include "worker/engine_internal.h"

struct check {
    struct engine *e;
    uint64_t step;
    uint64_t number; /* of this check */
    uint64_t rows;
    /* In use after the plan; less, perhaps below 0, when a slot is released whose pages others share: then the pool itself
     * refuses what is too much, as the plan is carried out. */
    int64_t pages;
    uint64_t host_pages; /* of suspended slots */
};

/* NULL and INVALID_ARGUMENT when there is no such slot. */
static struct engine_slot *find_slot(const struct check *c, const char *what, uint32_t slot, struct status *st)
{
    if (slot < c->e->info.max_slots)
        return &c->e->slot[slot];
    status_set(st, ST_INVALID_ARGUMENT, "step %llu: %s slot %u, expected 0 to %u", (unsigned long long)c->step, what,
               slot, c->e->info.max_slots - 1);
    return NULL;
}

static enum status_code contradiction(const struct check *c, const char *what, uint32_t slot, const char *why,
                                      struct status *st)
{
    return status_set(st, ST_INTERNAL, "step %llu: %s slot %u: %s", (unsigned long long)c->step, what, slot, why);
}

static bool live_after_admits(const struct check *c, const struct engine_slot *s)
{
    return s->admitted_by == c->number || (s->live && s->released_by != c->number);
}

static enum status_code check_releases(struct check *c, const Tandem__V1__StepPlan *plan, struct status *st)
{
    for (size_t i = 0; i < plan->n_release_slots; i++) {
        uint32_t slot = plan->release_slots[i];
        struct engine_slot *s = find_slot(c, "release of", slot, st);
        if (!s)
            return ST_INVALID_ARGUMENT;
        if (!s->live)
            return contradiction(c, "release of", slot, "it is free", st);
        if (s->released_by == c->number)
            return contradiction(c, "release of", slot, "named twice", st);
        s->released_by = c->number;
        uint64_t pages = kv_pages_for(&c->e->info.kv, s->length);
        if (s->suspended)
            c->host_pages -= pages;
        else
            c->pages -= (int64_t)pages;
    }
    return ST_OK;
}

/* A slot that is taken before and after this plan, and named once. */
static enum status_code check_moved(struct check *c, const char *what, uint32_t slot, bool suspended, struct status *st)
{
    struct engine_slot *s = find_slot(c, what, slot, st);
    if (!s)
        return ST_INVALID_ARGUMENT;
    if (!s->live || s->released_by == c->number)
        return contradiction(c, what, slot, "it is free, or released", st);
    if (s->moved_by == c->number)
        return contradiction(c, what, slot, "named twice", st);
    if (s->suspended != suspended || s->length == 0)
        return contradiction(c, what, slot, suspended ? "it is not suspended" : "it is suspended already, or empty",
                             st);
    s->moved_by = c->number;
    return ST_OK;
}

static enum status_code check_suspensions(struct check *c, const Tandem__V1__StepPlan *plan, struct status *st)
{
    const struct engine_info *info = &c->e->info;
    for (size_t i = 0; i < plan->n_suspend_slots; i++) {
        uint32_t slot = plan->suspend_slots[i];
        enum status_code rc = check_moved(c, "suspension of", slot, false, st);
        if (rc != ST_OK)
            return rc;
        uint64_t pages = kv_pages_for(&info->kv, c->e->slot[slot].length);
        c->pages -= (int64_t)pages;
        c->host_pages += pages;
        if (c->host_pages > info->suspend_pages)
            return status_set(st, ST_RESOURCE_EXHAUSTED,
                              "step %llu: suspension of slot %u: %llu pages of host memory needed, but there are %llu",
                              (unsigned long long)c->step, slot, (unsigned long long)c->host_pages,
                              (unsigned long long)info->suspend_pages);
    }
    for (size_t i = 0; i < plan->n_resume_slots; i++) {
        uint32_t slot = plan->resume_slots[i];
        enum status_code rc = check_moved(c, "resumption of", slot, true, st);
        if (rc != ST_OK)
            return rc;
        c->pages += (int64_t)kv_pages_for(&info->kv, c->e->slot[slot].length);
    }
    return ST_OK;
}

/* What the slot begins with must be there, from before this plan. */
static enum status_code check_begin(struct check *c, const Tandem__V1__AdmitSlot *a, struct engine_slot *s,
                                    struct status *st)
{
    s->begins = a->from_tokens;
    if (a->from_tokens == 0)
        return ST_OK;
    const struct engine_slot *from = find_slot(c, "beginning as", a->from_slot, st);
    if (!from)
        return ST_INVALID_ARGUMENT;
    if (!from->live || from->released_by == c->number || from->admitted_by == c->number || from->suspended ||
        from->moved_by == c->number || from->length < a->from_tokens)
        return contradiction(c, "beginning as", a->from_slot, "it has not so many tokens, or is released or suspended",
                             st);
    if (engine_options_history(a->sample))
        return status_set(
            st, ST_INVALID_ARGUMENT,
            "step %llu: admission to slot %u: penalties look at all tokens, but %u of them were never sent",
            (unsigned long long)c->step, a->slot, a->from_tokens);
    const struct kv_account *kv = &c->e->info.kv;
    c->pages += (int64_t)kv_pages_added(kv, a->from_tokens, a->from_tokens);
    return ST_OK;
}

static enum status_code check_admits(struct check *c, const Tandem__V1__StepPlan *plan, struct status *st)
{
    for (size_t i = 0; i < plan->n_admits; i++) {
        uint32_t slot = plan->admits[i]->slot;
        struct engine_slot *s = find_slot(c, "admission to", slot, st);
        if (!s)
            return ST_INVALID_ARGUMENT;
        if (s->admitted_by == c->number)
            return contradiction(c, "admission to", slot, "named twice", st);
        if (live_after_admits(c, s))
            return contradiction(c, "admission to", slot, "it is taken", st);
        s->admitted_by = c->number;
        enum status_code rc = check_begin(c, plan->admits[i], s, st);
        if (rc != ST_OK)
            return rc;
        rc = engine_options_check(plan->admits[i]->sample, c->e->info.vocab_size, c->e->ops->options, st);
        if (rc != ST_OK) {
            status_prefix(st, "step %llu: admission to slot %u", (unsigned long long)c->step, slot);
            return rc;
        }
    }
    return ST_OK;
}

/* n rows more for the slot. */
static enum status_code check_rows(struct check *c, const char *what, uint32_t slot, struct engine_slot *s, uint64_t n,
                                   struct status *st)
{
    const struct engine_info *info = &c->e->info;
    if (!live_after_admits(c, s))
        return contradiction(c, what, slot, "it was not admitted", st);
    if (s->admitted_by != c->number && (s->suspended || s->moved_by == c->number))
        return contradiction(c, what, slot, "it is suspended, or resumed by this plan", st);
    if (s->run_by == c->number)
        return contradiction(c, what, slot, "it has rows already in this plan", st);
    s->run_by = c->number;
    c->rows += n;
    if (c->rows > info->max_step_tokens)
        return status_set(st, ST_INVALID_ARGUMENT, "step %llu: more than %u rows", (unsigned long long)c->step,
                          info->max_step_tokens);
    uint64_t length = s->admitted_by == c->number ? s->begins : s->length;
    if (length + n > info->max_context)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "step %llu: %s slot %u: %llu tokens and %llu more, expected at most %u",
                          (unsigned long long)c->step, what, slot, (unsigned long long)length, (unsigned long long)n,
                          info->max_context);
    c->pages += (int64_t)(kv_pages_for(&info->kv, length + n) - kv_pages_for(&info->kv, length));
    return ST_OK;
}

static enum status_code check_decodes(struct check *c, const Tandem__V1__StepPlan *plan, struct status *st)
{
    for (size_t i = 0; i < plan->n_decode_slots; i++) {
        uint32_t slot = plan->decode_slots[i];
        struct engine_slot *s = find_slot(c, "decode of", slot, st);
        if (!s)
            return ST_INVALID_ARGUMENT;
        enum status_code rc = check_rows(c, "decode of", slot, s, 1, st);
        if (rc != ST_OK)
            return rc;
        if (s->admitted_by == c->number || !s->has_token)
            return contradiction(c, "decode of", slot, "it has no sampled token to go on with", st);
    }
    return ST_OK;
}

static enum status_code check_scores(const struct check *c, const Tandem__V1__PrefillChunk *chunk, struct status *st)
{
    uint64_t end = (uint64_t)chunk->score_first + chunk->score_rows,
             most = chunk->n_token_ids - (chunk->sample ? 1 : 0);
    if (chunk->score_rows == 0)
        return ST_OK;
    if (!(c->e->ops->options & SAMPLE_SCORE))
        return status_set(st, ST_UNIMPLEMENTED, "score_rows: this back end has no log probabilities");
    if (end > most)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "step %llu: prefill of slot %u: scored rows end at %llu, expected at most %llu",
                          (unsigned long long)c->step, chunk->slot, (unsigned long long)end, (unsigned long long)most);
    if (end == chunk->n_token_ids && chunk->next_token >= c->e->info.vocab_size)
        return status_set(st, ST_INVALID_ARGUMENT, "step %llu: prefill of slot %u: next_token: %u, expected 0 to %u",
                          (unsigned long long)c->step, chunk->slot, chunk->next_token, c->e->info.vocab_size - 1);
    return ST_OK;
}

static enum status_code check_prefill(struct check *c, const Tandem__V1__PrefillChunk *chunk, struct status *st)
{
    struct engine_slot *s = find_slot(c, "prefill of", chunk->slot, st);
    if (!s)
        return ST_INVALID_ARGUMENT;
    if (chunk->n_token_ids == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "step %llu: prefill of slot %u: no tokens",
                          (unsigned long long)c->step, chunk->slot);
    if (chunk->n_token_ids > c->e->info.max_step_tokens)
        return status_set(st, ST_INVALID_ARGUMENT, "step %llu: prefill of slot %u: %zu tokens, expected at most %u",
                          (unsigned long long)c->step, chunk->slot, chunk->n_token_ids, c->e->info.max_step_tokens);
    enum status_code rc = check_rows(c, "prefill of", chunk->slot, s, chunk->n_token_ids, st);
    if (rc != ST_OK)
        return rc;
    uint32_t length = s->admitted_by == c->number ? s->begins : s->length;
    if (chunk->position != length)
        return status_set(st, ST_INTERNAL, "step %llu: prefill of slot %u: position %u, but the slot has %u tokens",
                          (unsigned long long)c->step, chunk->slot, chunk->position, length);
    for (size_t i = 0; i < chunk->n_token_ids; i++)
        if (chunk->token_ids[i] >= c->e->info.vocab_size)
            return status_set(
                st, ST_INVALID_ARGUMENT, "step %llu: prefill of slot %u: token_ids[%zu]: %u, expected 0 to %u",
                (unsigned long long)c->step, chunk->slot, i, chunk->token_ids[i], c->e->info.vocab_size - 1);
    return check_scores(c, chunk, st);
}

enum status_code engine_plan_check(struct engine *e, const Tandem__V1__StepPlan *plan, struct status *st)
{
    struct check c = {e, plan->step, ++e->checks, 0, (int64_t)kv_pool_stats(e->kv).mapped_pages, e->suspended_pages};
    if (plan->step != e->step + 1)
        return status_set(st, ST_INTERNAL, "step %llu, but the last one done is %llu", (unsigned long long)plan->step,
                          (unsigned long long)e->step);
    enum status_code rc;
    if ((rc = check_releases(&c, plan, st)) != ST_OK || (rc = check_suspensions(&c, plan, st)) != ST_OK ||
        (rc = check_admits(&c, plan, st)) != ST_OK || (rc = check_decodes(&c, plan, st)) != ST_OK)
        return rc;
    for (size_t i = 0; i < plan->n_prefills; i++)
        if ((rc = check_prefill(&c, plan->prefills[i], st)) != ST_OK)
            return rc;
    if (plan->kv_pages > e->info.kv_pages_max)
        return status_set(st, ST_INVALID_ARGUMENT, "step %llu: kv_pages: %llu, expected at most %llu",
                          (unsigned long long)plan->step, (unsigned long long)plan->kv_pages,
                          (unsigned long long)e->info.kv_pages_max);
    uint64_t total = e->info.kv.total_pages;
    if (plan->kv_pages && plan->kv_pages < total)
        total = plan->kv_pages;
    if (c.pages > (int64_t)total)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "step %llu: %llu KV pages needed, but the pool has %llu",
                          (unsigned long long)plan->step, (unsigned long long)c.pages, (unsigned long long)total);
    return ST_OK;
}
