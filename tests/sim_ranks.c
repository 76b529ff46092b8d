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
    for (uint32_t i = 0; i < group->n_ranks; i++) {
        uint64_t n = group->kv[i].total_pages, most = kv_pages_for(&group->kv[i], group->max_context);
        struct sim_rank *k = &r->rank[i];
        k->refs = calloc(n + 1, sizeof *k->refs);
        k->spare = calloc(n + 1, sizeof *k->spare);
        if (!k->refs || !k->spare)
            sim_fail("out of memory");
        for (k->n_spare = 0; k->n_spare < n; k->n_spare++)
            k->spare[k->n_spare] = (uint32_t)k->n_spare;
        k->free_pages = n;
        for (uint32_t j = 0; j < group->slots; j++) {
            r->slot[j].page[i] = malloc((most + 1) * sizeof(uint32_t));
            if (!r->slot[j].page[i])
                sim_fail("out of memory");
        }
    }
    r->next_step = 1;
}

void sim_ranks_fini(struct sim_ranks *r)
{
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        free(r->rank[i].refs);
        free(r->rank[i].spare);
        for (uint32_t j = 0; j < r->group.slots; j++)
            free(r->slot[j].page[i]);
    }
    free(r->slot);
    r->slot = NULL;
}

static void take_pages(struct sim_ranks *r, uint32_t rank, struct sim_slot *s, uint64_t need, uint64_t step)
{
    struct sim_rank *k = &r->rank[rank];
    if (need > k->free_pages)
        sim_fail("step %llu: rank %u is out of pages: request %llu at %u needs %llu, %llu are free",
                 (unsigned long long)step, rank, (unsigned long long)s->id, s->len, (unsigned long long)need,
                 (unsigned long long)k->free_pages);
    k->free_pages -= need;
    for (; need > 0; need--) {
        uint32_t page = k->spare[--k->n_spare];
        k->refs[page] = 1;
        s->page[rank][s->n_pages[rank]++] = page;
    }
}

/* Empties the slot; returns how many pages nobody has any more. */
static uint64_t leave_pages(struct sim_ranks *r, uint32_t rank, struct sim_slot *s)
{
    struct sim_rank *k = &r->rank[rank];
    uint64_t freed = 0;
    for (uint32_t i = 0; i < s->n_pages[rank]; i++) {
        uint32_t page = s->page[rank][i];
        if (--k->refs[page] == 0) {
            k->spare[k->n_spare++] = page;
            freed++;
        }
    }
    s->n_pages[rank] = 0;
    return freed;
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

/* Its pages come free as those of a released slot; what it shared, it shares no more. */
static void suspend(struct sim_ranks *r, struct sim_slot *s, uint64_t step)
{
    if (!s->active || s->suspended || s->len == 0)
        sim_fail("step %llu: suspension of slot %d, which is empty or suspended", (unsigned long long)step,
                 (int)(s - r->slot));
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        struct sim_rank *k = &r->rank[i];
        k->fenced_pages[step % 2] += leave_pages(r, i, s);
        k->fence_step[step % 2] = step - 1;
        k->host_pages += kv_pages_for(&r->group.kv[i], s->len);
        if (k->host_pages > r->group.host_pages[i])
            sim_fail("step %llu: rank %u has %llu pages of host memory, %llu are needed", (unsigned long long)step, i,
                     (unsigned long long)r->group.host_pages[i], (unsigned long long)k->host_pages);
    }
    s->suspended = true;
}

static void resume(struct sim_ranks *r, struct sim_slot *s, uint64_t step)
{
    if (!s->active || !s->suspended)
        sim_fail("step %llu: slot %d is resumed, but not suspended", (unsigned long long)step, (int)(s - r->slot));
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        uint64_t pages = kv_pages_for(&r->group.kv[i], s->len);
        take_pages(r, i, s, pages, step);
        r->rank[i].host_pages -= pages;
    }
    s->suspended = false;
}

uint64_t sim_ranks_suspended(const struct sim_ranks *r)
{
    uint64_t most = 0;
    for (uint32_t i = 0; i < r->group.n_ranks; i++)
        most = r->rank[i].host_pages > most ? r->rank[i].host_pages : most;
    return most;
}

static void release(struct sim_ranks *r, struct sim_slot *s, uint64_t step)
{
    if (!s->active)
        sim_fail("step %llu: release of slot %d, which is free", (unsigned long long)step, (int)(s - r->slot));
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        r->rank[i].fenced_pages[step % 2] += leave_pages(r, i, s);
        r->rank[i].fence_step[step % 2] = step - 1;
        r->rank[i].host_pages -= s->suspended ? kv_pages_for(&r->group.kv[i], s->len) : 0;
    }
    s->active = s->sampled = s->suspended = false;
    s->len = 0;
    s->id = s->seed = s->last_step = 0;
}

static void extend(struct sim_ranks *r, struct sim_slot *s, uint32_t n, uint64_t step)
{
    if (s->suspended)
        sim_fail("step %llu: request %llu is suspended and has rows", (unsigned long long)step,
                 (unsigned long long)s->id);
    if (s->last_step == step)
        sim_fail("step %llu: request %llu has rows twice", (unsigned long long)step, (unsigned long long)s->id);
    s->last_step = step;
    if (n > r->group.max_context - s->len)
        sim_fail("step %llu: request %llu: %u tokens at %u, the context holds %u", (unsigned long long)step,
                 (unsigned long long)s->id, n, s->len, r->group.max_context);
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        const struct kv_account *kv = &r->group.kv[i];
        take_pages(r, i, s, kv_pages_for(kv, (uint64_t)s->len + n) - kv_pages_for(kv, s->len), step);
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

/* Whole pages are another's, the rest is copied. All steps before this one have written what they had to. */
static void begin_as(struct sim_ranks *r, struct sim_slot *s, const struct sim_slot *from, uint32_t n, uint64_t step)
{
    unsigned long long id = s->id;
    if (!from->active || from->suspended || from == s || n > from->len)
        sim_fail("step %llu: request %llu begins with %u tokens of a slot that has %u", (unsigned long long)step, id, n,
                 from->len);
    if (from->last_step >= step || sim_salt(from->seed) != sim_salt(s->seed))
        sim_fail("step %llu: request %llu must not begin as another", (unsigned long long)step, id);
    for (uint32_t i = 0; i < n; i++)
        if (sim_token(from->seed, i) != sim_token(s->seed, i))
            sim_fail("step %llu: request %llu begins with a wrong token %u", (unsigned long long)step, id, i);
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        uint64_t shared = kv_pages_shared(&r->group.kv[i], n);
        for (s->n_pages[i] = 0; s->n_pages[i] < shared; s->n_pages[i]++) {
            uint32_t page = from->page[i][s->n_pages[i]];
            s->page[i][s->n_pages[i]] = page;
            r->rank[i].refs[page]++;
        }
        take_pages(r, i, s, kv_pages_for(&r->group.kv[i], n) - shared, step);
    }
    s->len = n;
}

/* Pages that leave are free by now; of those asked for a rank may get fewer than it wants. */
static void resize(struct sim_ranks *r, uint64_t goal, uint64_t step)
{
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        struct sim_rank *k = &r->rank[i];
        uint64_t total = r->group.kv[i].total_pages, most = r->group.most_pages[i], pages = goal;
        if (pages > total && pages > most)
            pages = most > total ? most : total;
        if (pages < total && total - pages > k->free_pages)
            sim_fail("step %llu: rank %u is to give %llu pages back, %llu are free", (unsigned long long)step, i,
                     (unsigned long long)(total - pages), (unsigned long long)k->free_pages);
        k->free_pages += pages - total;
        r->group.kv[i].total_pages = pages;
    }
}

uint64_t sim_ranks_pages(const struct sim_ranks *r)
{
    uint64_t least = r->group.kv[0].total_pages;
    for (uint32_t i = 1; i < r->group.n_ranks; i++)
        least = r->group.kv[i].total_pages < least ? r->group.kv[i].total_pages : least;
    return least;
}

void sim_ranks_step(struct sim_ranks *r, const struct sched_plan *plan, uint64_t completed, uint32_t *tokens)
{
    uint64_t step = plan->step;
    if (step != r->next_step++)
        sim_fail("plan %llu, expected %llu", (unsigned long long)step, (unsigned long long)r->next_step - 1);
    lift_fences(r, completed);
    for (uint32_t i = 0; i < plan->n_release; i++)
        release(r, slot_at(r, plan->release[i], step), step);
    for (uint32_t i = 0; i < plan->n_suspend; i++)
        suspend(r, slot_at(r, plan->suspend[i], step), step);
    lift_fences(r, completed);
    if (plan->kv_pages)
        resize(r, plan->kv_pages, step);
    for (uint32_t i = 0; i < plan->n_resume; i++)
        resume(r, slot_at(r, plan->resume[i], step), step);
    for (uint32_t i = 0; i < plan->n_admit; i++) {
        struct sim_slot *s = slot_at(r, plan->admit[i].slot, step);
        if (s->active)
            sim_fail("step %llu: slot %u is taken", (unsigned long long)step, plan->admit[i].slot);
        s->active = true;
        s->id = plan->admit[i].id;
        s->seed = plan->admit[i].sample.seed;
        if (plan->admit[i].from_tokens)
            begin_as(r, s, slot_at(r, plan->admit[i].from, step), plan->admit[i].from_tokens, step);
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

void sim_ranks_check_idle(struct sim_ranks *r, const bool *kept, uint64_t pages)
{
    bool alike = true;
    lift_fences(r, r->next_step - 1);
    for (uint32_t i = 0; i < r->group.slots; i++) {
        if (r->slot[i].active != kept[i])
            sim_fail("slot %u leaked or was lost: request %llu", i, (unsigned long long)r->slot[i].id);
    }
    for (uint32_t i = 1; i < r->group.n_ranks; i++)
        alike &= r->group.kv[i].token_bytes == r->group.kv[0].token_bytes;
    for (uint32_t i = 0; i < r->group.n_ranks; i++) {
        uint64_t used = r->group.kv[i].total_pages - r->rank[i].free_pages;
        if (r->rank[i].host_pages)
            sim_fail("rank %u: %llu pages of host memory leaked", i, (unsigned long long)r->rank[i].host_pages);
        if (used > pages || (alike && used < pages))
            sim_fail("rank %u: %llu of %llu pages are held, %llu are counted", i, (unsigned long long)used,
                     (unsigned long long)r->group.kv[i].total_pages, (unsigned long long)pages);
    }
}
