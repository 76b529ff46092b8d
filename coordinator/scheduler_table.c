/* scheduler_table.c - the containers of the scheduler: request structs, ids, deadlines, events, lists. */
#include "coordinator/scheduler_internal.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define SLAB_REQUESTS 256

struct req *req_pool_get(struct req_pool *p)
{
    if (!p->free) {
        struct req **slab = realloc(p->slab, (p->n_slabs + 1) * sizeof(struct req *));
        if (!slab)
            return NULL;
        p->slab = slab;
        struct req *fresh = calloc(SLAB_REQUESTS, sizeof *fresh);
        if (!fresh)
            return NULL;
        p->slab[p->n_slabs++] = fresh;
        for (int i = SLAB_REQUESTS - 1; i >= 0; i--) {
            fresh[i].next = p->free;
            p->free = &fresh[i];
        }
    }
    struct req *r = p->free;
    p->free = r->next;
    memset(r, 0, sizeof *r);
    r->slot = SCHED_NO_SLOT;
    r->heap_index = UINT32_MAX;
    return r;
}

void req_pool_put(struct req_pool *p, struct req *r)
{
    free(r->tokens);
    r->tokens = NULL;
    r->seq = 0; /* samples in flight that point here find out */
    r->next = p->free;
    p->free = r;
}

void req_pool_fini(struct req_pool *p)
{
    for (uint32_t i = 0; i < p->n_slabs; i++) {
        for (uint32_t k = 0; k < SLAB_REQUESTS; k++)
            free(p->slab[i][k].tokens);
        free(p->slab[i]);
    }
    free(p->slab);
}

/* The finalizer of splitmix64: ids are often consecutive, and linear probing wants them spread. */
static uint32_t hash_id(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(x ^ (x >> 31));
}

static void map_insert(struct req **cell, uint32_t mask, struct req *r)
{
    uint32_t i = hash_id(r->id) & mask;
    while (cell[i])
        i = (i + 1) & mask;
    cell[i] = r;
}

bool req_map_reserve(struct req_map *m)
{
    if (m->cell && 2 * ((uint64_t)m->count + 1) <= (uint64_t)m->mask + 1)
        return true;
    uint64_t cells = m->cell ? 2 * ((uint64_t)m->mask + 1) : 64;
    struct req **cell = calloc(cells, sizeof(struct req *));
    if (!cell)
        return false;
    if (m->cell) {
        for (uint64_t i = 0; i <= m->mask; i++) {
            if (m->cell[i])
                map_insert(cell, (uint32_t)(cells - 1), m->cell[i]);
        }
        free(m->cell);
    }
    m->cell = cell;
    m->mask = (uint32_t)(cells - 1);
    return true;
}

struct req *req_map_find(const struct req_map *m, uint64_t id)
{
    if (!m->cell)
        return NULL;
    for (uint32_t i = hash_id(id) & m->mask; m->cell[i]; i = (i + 1) & m->mask) {
        if (m->cell[i]->id == id)
            return m->cell[i];
    }
    return NULL;
}

void req_map_add(struct req_map *m, struct req *r)
{
    map_insert(m->cell, m->mask, r);
    m->count++;
}

/* Backward-shift deletion: no tombstones, so that look-ups stay short however many requests pass through. */
void req_map_remove(struct req_map *m, const struct req *r)
{
    uint32_t hole = hash_id(r->id) & m->mask;
    while (m->cell[hole] != r)
        hole = (hole + 1) & m->mask;
    for (uint32_t i = (hole + 1) & m->mask; m->cell[i]; i = (i + 1) & m->mask) {
        uint32_t home = hash_id(m->cell[i]->id) & m->mask;
        if (((i - home) & m->mask) >= ((i - hole) & m->mask)) {
            m->cell[hole] = m->cell[i];
            hole = i;
        }
    }
    m->cell[hole] = NULL;
    m->count--;
}

static bool heap_before(const struct req *a, const struct req *b)
{
    return a->deadline_us != b->deadline_us ? a->deadline_us < b->deadline_us : a->seq < b->seq;
}

static void heap_set(struct req_heap *h, uint32_t i, struct req *r)
{
    h->item[i] = r;
    r->heap_index = i;
}

static void heap_up(struct req_heap *h, uint32_t i, struct req *r)
{
    while (i > 0 && heap_before(r, h->item[(i - 1) / 2])) {
        heap_set(h, i, h->item[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    heap_set(h, i, r);
}

static void heap_down(struct req_heap *h, uint32_t i, struct req *r)
{
    for (;;) {
        uint64_t child = 2 * (uint64_t)i + 1;
        if (child >= h->count)
            break;
        if (child + 1 < h->count && heap_before(h->item[child + 1], h->item[child]))
            child++;
        if (!heap_before(h->item[child], r))
            break;
        heap_set(h, i, h->item[child]);
        i = (uint32_t)child;
    }
    heap_set(h, i, r);
}

bool req_heap_reserve(struct req_heap *h)
{
    if (h->count < h->capacity)
        return true;
    uint32_t capacity = h->capacity ? 2 * h->capacity : 64;
    struct req **item = realloc(h->item, capacity * sizeof(struct req *));
    if (!item)
        return false;
    h->item = item;
    h->capacity = capacity;
    return true;
}

void req_heap_add(struct req_heap *h, struct req *r)
{
    heap_up(h, h->count++, r);
}

void req_heap_remove(struct req_heap *h, struct req *r)
{
    uint32_t i = r->heap_index;
    if (i == UINT32_MAX)
        return;
    r->heap_index = UINT32_MAX;
    struct req *last = h->item[--h->count];
    if (last == r)
        return;
    if (i > 0 && heap_before(last, h->item[(i - 1) / 2]))
        heap_up(h, i, last);
    else
        heap_down(h, i, last);
}

bool event_ring_reserve(struct event_ring *e, uint64_t more)
{
    if (e->count + more <= e->capacity)
        return true;
    uint64_t capacity = e->capacity ? e->capacity : 64;
    while (capacity < e->count + more)
        capacity *= 2;
    if (capacity > UINT32_MAX)
        return false;
    struct sched_event *item = malloc(capacity * sizeof *item);
    if (!item)
        return false;
    for (uint32_t i = 0; i < e->count; i++)
        item[i] = e->item[(e->first + i) & (e->capacity - 1)];
    free(e->item);
    e->item = item;
    e->first = 0;
    e->capacity = (uint32_t)capacity;
    return true;
}

struct sched_event *event_ring_push(struct event_ring *e)
{
    assert(e->count < e->capacity);
    struct sched_event *ev = &e->item[(e->first + e->count++) & (e->capacity - 1)];
    memset(ev, 0, sizeof *ev);
    return ev;
}

void req_list_append(struct req_list *l, struct req *r)
{
    r->prev = l->tail;
    r->next = NULL;
    if (l->tail)
        l->tail->next = r;
    else
        l->head = r;
    l->tail = r;
}

void req_list_insert(struct req_list *l, struct req *r, struct req *before)
{
    if (!before) {
        req_list_append(l, r);
        return;
    }
    r->next = before;
    r->prev = before->prev;
    if (before->prev)
        before->prev->next = r;
    else
        l->head = r;
    before->prev = r;
}

void req_list_remove(struct req_list *l, struct req *r)
{
    if (r->prev)
        r->prev->next = r->next;
    else
        l->head = r->next;
    if (r->next)
        r->next->prev = r->prev;
    else
        l->tail = r->prev;
    r->next = r->prev = NULL;
}
