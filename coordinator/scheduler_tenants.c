/* scheduler_tenants.c - who shares the server with whom, and what each has had.
 *
 *     book: one for all schedulers between which requests move          scheduler of a group
 *       account of a tenant: served tokens, what waits of it anywhere ◀── tenant: its requests there, its queues
 *
 * So a tenant whose requests are in several groups is served as much as one whose requests are all in one, and its queue
 * has one bound. */
#include <stdlib.h>

#include "coordinator/scheduler_internal.h"

#define MAX_TENANTS 4096 /* remembered without a request, at most */

static uint32_t bucket_of(uint64_t id)
{
    return (uint32_t)((id * 0x9e3779b97f4a7c15u) >> 56);
}

/* ---- the book ---- */

enum status_code sched_book_create(struct sched_book **out, struct status *st)
{
    struct sched_book *b = calloc(1, sizeof *b);
    if (!b)
        return status_nomem(st, "book of tenants", sizeof *b);
    b->next_seq = 1;
    *out = b;
    return ST_OK;
}

void sched_book_destroy(struct sched_book *b)
{
    free(b); /* accounts went with the last scheduler that knew them */
}

struct account *account_find(const struct sched_book *b, uint64_t id)
{
    struct account *a = b->bucket[bucket_of(id)];
    while (a && a->id != id)
        a = a->hash_next;
    return a;
}

static struct account *account_get(struct sched_book *b, uint64_t id)
{
    struct account *a = account_find(b, id);
    if (!a) {
        a = calloc(1, sizeof *a);
        if (!a)
            return NULL;
        a->id = id;
        a->hash_next = b->bucket[bucket_of(id)];
        b->bucket[bucket_of(id)] = a;
    }
    a->refs++;
    return a;
}

static void account_put(struct sched_book *b, struct account *a)
{
    if (--a->refs > 0)
        return;
    struct account **at = &b->bucket[bucket_of(a->id)];
    while (*at != a)
        at = &(*at)->hash_next;
    *at = a->hash_next;
    free(a);
}

/* What the least served of those with requests has had. */
static uint64_t least_served(const struct sched_book *b)
{
    uint64_t least = UINT64_MAX;
    for (const struct account *a = b->active; a; a = a->next)
        least = a->served < least ? a->served : least;
    return least == UINT64_MAX ? 0 : least;
}

static void account_begin(struct sched_book *b, struct account *a)
{
    if (a->n_live++ > 0)
        return;
    uint64_t least = least_served(b);
    a->served = a->served > least ? a->served : least;
    a->prev = NULL;
    a->next = b->active;
    if (a->next)
        a->next->prev = a;
    b->active = a;
}

static void account_end(struct sched_book *b, struct account *a, uint32_t n)
{
    a->n_live -= n;
    if (n == 0 || a->n_live > 0)
        return;
    if (a->prev)
        a->prev->next = a->next;
    else
        b->active = a->next;
    if (a->next)
        a->next->prev = a->prev;
}

/* ---- those of one scheduler ---- */

struct tenant *tenant_find(const struct sched *s, uint64_t id)
{
    struct tenant *t = s->tenants.bucket[bucket_of(id)];
    while (t && t->account->id != id)
        t = t->hash_next;
    return t;
}

/* Those without requests, but unless `all` only those whose past does not count any more. */
static void sweep(struct sched *s, bool all)
{
    uint64_t least = least_served(s->book);
    for (int i = 0; i < TENANT_BUCKETS; i++)
        for (struct tenant **at = &s->tenants.bucket[i]; *at;) {
            struct tenant *t = *at;
            if (t->n_live > 0 || (!all && t->account->served > least)) {
                at = &t->hash_next;
                continue;
            }
            *at = t->hash_next;
            s->tenants.n--;
            account_put(s->book, t->account);
            free(t);
        }
}

static struct tenant *tenant_add(struct sched *s, uint64_t id)
{
    if (s->tenants.n >= MAX_TENANTS && s->tenants.n % (MAX_TENANTS / 4) == 0) /* not at every request */
        sweep(s, s->tenants.n >= 2 * MAX_TENANTS);
    struct tenant *t = calloc(1, sizeof *t);
    if (!t || !(t->account = account_get(s->book, id))) {
        free(t);
        return NULL;
    }
    struct tenant **bucket = &s->tenants.bucket[bucket_of(id)];
    t->hash_next = *bucket;
    *bucket = t;
    s->tenants.n++;
    return t;
}

struct tenant *tenant_get(struct sched *s, uint64_t id)
{
    struct tenant *t = tenant_find(s, id);
    if (!t && !(t = tenant_add(s, id)))
        return NULL;
    account_begin(s->book, t->account);
    if (t->n_live++ == 0) {
        t->prev = NULL;
        t->next = s->tenants.active;
        if (t->next)
            t->next->prev = t;
        s->tenants.active = t;
    }
    return t;
}

void tenant_put(struct sched *s, struct tenant *t)
{
    account_end(s->book, t->account, 1);
    if (--t->n_live > 0)
        return;
    if (t->prev)
        t->prev->next = t->next;
    else
        s->tenants.active = t->next;
    if (t->next)
        t->next->prev = t->prev;
}

void tenant_queue(struct sched *s, struct tenant *t, uint32_t tokens)
{
    t->n_queued++;
    t->queued_tokens += tokens;
    t->account->n_queued++;
    t->account->queued_tokens += tokens;
    s->n_queued++;
    s->queued_tokens += tokens;
    s->book->n_queued++;
    s->book->queued_tokens += tokens;
}

static void unqueue(struct sched *s, struct tenant *t, uint32_t n, uint64_t tokens)
{
    t->n_queued -= n;
    t->queued_tokens -= tokens;
    t->account->n_queued -= n;
    t->account->queued_tokens -= tokens;
    s->n_queued -= n;
    s->queued_tokens -= tokens;
    s->book->n_queued -= n;
    s->book->queued_tokens -= tokens;
}

void tenant_unqueue(struct sched *s, struct tenant *t, uint32_t tokens)
{
    unqueue(s, t, 1, tokens);
}

void tenants_fini(struct sched *s)
{
    for (int i = 0; i < TENANT_BUCKETS; i++)
        for (struct tenant *t = s->tenants.bucket[i], *next; t; t = next) {
            next = t->hash_next;
            unqueue(s, t, t->n_queued, t->queued_tokens);
            account_end(s->book, t->account, t->n_live);
            account_put(s->book, t->account);
            free(t);
        }
}
