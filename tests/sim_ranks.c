#include "tests/sim_ranks.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void sim_fail(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("sim: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    abort();
}

void sim_ranks_init(struct sim_ranks *r, const struct sim_group *group)
{
    memset(r, 0, sizeof *r);
    r->group = *group;
    r->slot = calloc(group->slots, sizeof *r->slot);
    if (!r->slot)
        sim_fail("out of memory");
    for (uint32_t i = 0; i < group->n_ranks; i++)
        r->rank[i].free_pages = group->kv[i].total_pages;
    r->next_step = 1;
}

void sim_ranks_fini(struct sim_ranks *r)
{
    free(r->slot);
    r->slot = NULL;
}

/* What was fenced by a step that has ended is free. */
static void lift_fences(struct sim_ranks *r, uint64_t completed)
{
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        struct sim_rank *k = &r->rank[i];
        for (int f = 0; f < 2; f++) {
            if (k->fence_step[f] <= completed) {
                k->free_pages += k->fenced_pages[f];
                k->fenced_pages[f] = 0;
            }
        }
    }
}

static struct sim_slot *slot_at(struct sim_ranks *r, uint32_t slot, uint64_t step)
{
    if (slot >= r->group.slots)
        sim_fail("step %llu: slot %u of %u", (unsigned long long)step, slot, r->group.slots);
    return &r->slot[slot];
}

static void release(struct sim_ranks *r, struct sim_slot *s, uint64_t step)
{
    if (!s->active)
        sim_fail("step %llu: release of slot %d, which is free", (unsigned long long)step, (int)(s - r->slot));
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        r->rank[i].fenced_pages[step % 2] += kv_pages_for(&r->group.kv[i], s->len);
        r->rank[i].fence_step[step % 2] = step - 1;
    }
    memset(s, 0, sizeof *s);
}

static void extend(struct sim_ranks *r, struct sim_slot *s, uint32_t n, uint64_t step)
{
    if (s->last_step == step)
        sim_fail("step %llu: request %llu has rows twice", (unsigned long long)step, (unsigned long long)s->id);
    s->last_step = step;
    if (n > r->group.max_context - s->len)
        sim_fail("step %llu: request %llu: %u tokens at %u, the context holds %u", (unsigned long long)step,
                 (unsigned long long)s->id, n, s->len, r->group.max_context);
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        const struct kv_account *kv = &r->group.kv[i];
        uint64_t need = kv_pages_for(kv, (uint64_t)s->len + n) - kv_pages_for(kv, s->len);
        if (need > r->rank[i].free_pages)
            sim_fail("step %llu: rank %u is out of pages: request %llu at %u needs %llu, %llu are free",
                     (unsigned long long)step, i, (unsigned long long)s->id, s->len, (unsigned long long)need,
                     (unsigned long long)r->rank[i].free_pages);
        r->rank[i].free_pages -= need;
    }
    s->len += n;
}

static void chunk(struct sim_ranks *r, const struct sched_chunk *c, uint64_t step)
{
    struct sim_slot *s = slot_at(r, c->slot, step);
    unsigned long long id = c->id;
    if (!s->active || s->id != c->id)
        sim_fail("step %llu: chunk of request %llu in slot %u of request %llu", (unsigned long long)step, id, c->slot,
                 (unsigned long long)s->id);
    if (s->sampled)
        sim_fail("step %llu: request %llu: a chunk behind a sample", (unsigned long long)step, id);
    if (c->position != s->len || c->n_tokens == 0)
        sim_fail("step %llu: request %llu: %u tokens at %u, the slot has %u", (unsigned long long)step, id, c->n_tokens,
                 c->position, s->len);
    for (uint32_t i = 0; i < c->n_tokens; i++) {
        if (c->tokens[i] != sim_token(s->seed, s->len + i))
            sim_fail("step %llu: request %llu: token %u at %u, expected %u", (unsigned long long)step, id, c->tokens[i],
                     s->len + i, sim_token(s->seed, s->len + i));
    }
    extend(r, s, c->n_tokens, step);
    s->sampled = c->sample;
}

void sim_ranks_step(struct sim_ranks *r, const struct sched_plan *plan, uint64_t completed, uint32_t *tokens)
{
    uint64_t step = plan->step;
    if (step != r->next_step++)
        sim_fail("plan %llu, expected %llu", (unsigned long long)step, (unsigned long long)r->next_step - 1);
    lift_fences(r, completed);
    for (uint32_t i = 0; i < plan->n_release; i++)
        release(r, slot_at(r, plan->release[i], step), step);
    lift_fences(r, completed);
    for (uint32_t i = 0; i < plan->n_admit; i++) {
        struct sim_slot *s = slot_at(r, plan->admit[i].slot, step);
        if (s->active)
            sim_fail("step %llu: slot %u is taken", (unsigned long long)step, plan->admit[i].slot);
        *s = (struct sim_slot){.active = true, .id = plan->admit[i].id, .seed = plan->admit[i].sample.seed};
    }
    uint32_t n = 0, rows = 0;
    for (uint32_t i = 0; i < plan->n_decode; i++) {
        struct sim_slot *s = slot_at(r, plan->decode[i], step);
        if (!s->active || !s->sampled)
            sim_fail("step %llu: decode of slot %u, which has no sampled token", (unsigned long long)step,
                     plan->decode[i]);
        extend(r, s, 1, step);
        tokens[n++] = sim_token(s->seed, s->len);
        rows++;
    }
    for (uint32_t i = 0; i < plan->n_chunk; i++) {
        chunk(r, &plan->chunk[i], step);
        rows += plan->chunk[i].n_tokens;
        if (plan->chunk[i].sample) {
            const struct sim_slot *s = &r->slot[plan->chunk[i].slot];
            tokens[n++] = sim_token(s->seed, s->len);
        }
    }
    if (n != plan->samples || rows != plan->rows)
        sim_fail("step %llu: %u samples and %u rows, the plan says %u and %u", (unsigned long long)step, n, rows,
                 plan->samples, plan->rows);
}

void sim_ranks_check_empty(struct sim_ranks *r)
{
    lift_fences(r, r->next_step - 1);
    for (uint32_t i = 0; i < r->group.slots; i++) {
        if (r->slot[i].active)
            sim_fail("slot %u leaked: request %llu", i, (unsigned long long)r->slot[i].id);
    }
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        if (r->rank[i].free_pages != r->group.kv[i].total_pages)
            sim_fail("rank %u: %llu of %llu pages leaked", i,
                     (unsigned long long)(r->group.kv[i].total_pages - r->rank[i].free_pages),
                     (unsigned long long)r->group.kv[i].total_pages);
    }
}
