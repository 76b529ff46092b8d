/* journal_state.c - the requests that live, as the records make them: the mirror of the writer, the result of the reader. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/journal_internal.h"

static struct journal_entry **bucket_of(struct journal_state *s, uint64_t number)
{
    return &s->bucket[number % JOURNAL_BUCKETS];
}

static struct journal_entry *find(struct journal_state *s, uint64_t number)
{
    struct journal_entry *e = *bucket_of(s, number);
    while (e && e->accept.number != number)
        e = e->hash_next;
    return e;
}

static uint64_t entry_bytes(const struct journal_entry *e)
{
    uint64_t bytes = JOURNAL_FRAME_BYTES + e->payload_len;
    for (uint32_t i = 0; i < e->accept.n_choices; i++)
        bytes += e->choice[i].n ? JOURNAL_FRAME_BYTES + JOURNAL_TOKENS_BYTES + (uint64_t)e->choice[i].n * 4 : 0;
    return bytes;
}

static void entry_free(struct journal_entry *e)
{
    for (uint32_t i = 0; e->choice && i < e->accept.n_choices; i++)
        free(e->choice[i].id);
    free(e->choice);
    free(e->payload);
    free(e);
}

static void list_add(struct journal_list *l, struct journal_entry *e)
{
    e->next = NULL;
    e->prev = l->tail;
    *(l->tail ? &l->tail->next : &l->head) = e;
    l->tail = e;
}

static void list_take(struct journal_list *l, struct journal_entry *e)
{
    *(e->prev ? &e->prev->next : &l->head) = e->next;
    *(e->next ? &e->next->prev : &l->tail) = e->prev;
}

struct journal_entry *journal_first(const struct journal_state *s)
{
    return s->ended.head ? s->ended.head : s->live.head;
}

struct journal_entry *journal_next(const struct journal_state *s, const struct journal_entry *e)
{
    return e->next || !e->until_us ? e->next : s->live.head;
}

static void entry_remove(struct journal_state *s, struct journal_entry *e)
{
    struct journal_entry **p = bucket_of(s, e->accept.number);
    while (*p != e)
        p = &(*p)->hash_next;
    *p = e->hash_next;
    list_take(e->until_us ? &s->ended : &s->live, e);
    s->n--;
    s->bytes -= entry_bytes(e);
    entry_free(e);
}

/* Those that have ended make room, the first that did first. */
static bool make_room(struct journal_state *s, uint64_t bytes)
{
    while (s->bytes + bytes > s->max_bytes) {
        if (!s->ended.head)
            return false;
        entry_remove(s, s->ended.head);
    }
    return true;
}

static enum journal_applied apply_accept(struct journal_state *s, const uint8_t *payload, size_t n)
{
    struct journal_accept a;
    if (n < JOURNAL_ACCEPT_BYTES)
        return JOURNAL_IGNORED;
    struct journal_entry *e = calloc(1, sizeof *e);
    if (!e || !(e->payload = malloc(n))) {
        free(e);
        return JOURNAL_NOMEM;
    }
    memcpy(e->payload, payload, n);
    e->payload_len = n;
    enum journal_applied rc = JOURNAL_IGNORED;
    if (!journal_get_accept(e->payload, n, &a) || find(s, a.number))
        goto fail;
    if (!make_room(s, JOURNAL_FRAME_BYTES + n)) {
        rc = JOURNAL_OVER;
        goto fail;
    }
    e->accept = a;
    e->choice = calloc(a.n_choices, sizeof *e->choice);
    if (!e->choice) {
        rc = JOURNAL_NOMEM;
        goto fail;
    }
    struct journal_entry **bucket = bucket_of(s, a.number);
    e->hash_next = *bucket;
    *bucket = e;
    list_add(&s->live, e);
    s->n++;
    s->bytes += entry_bytes(e);
    if (a.number >= s->next_number)
        s->next_number = a.number + 1;
    return JOURNAL_DONE;
fail:
    entry_free(e);
    return rc;
}

static bool ids_reserve(struct journal_ids *l, uint32_t more)
{
    if (l->cap - l->n >= more)
        return true;
    uint64_t cap = (uint64_t)l->n + more + l->n / 2 + 8;
    uint32_t *p = cap <= UINT32_MAX ? realloc(l->id, cap * sizeof *p) : NULL;
    if (!p)
        return false;
    l->id = p;
    l->cap = (uint32_t)cap;
    return true;
}

static enum journal_applied apply_tokens(struct journal_state *s, const uint8_t *p, size_t n)
{
    uint64_t number;
    uint32_t from;
    uint16_t count;
    memcpy(&count, p + 2, sizeof count);
    memcpy(&from, p + 4, sizeof from);
    memcpy(&number, p + 8, sizeof number);
    struct journal_entry *e = find(s, number);
    if (!e || e->until_us || count == 0 || n != JOURNAL_TOKENS_BYTES + (size_t)count * 4 || p[1] >= e->accept.n_choices)
        return JOURNAL_IGNORED;
    struct journal_ids *l = &e->choice[p[1]];
    if (from != l->n) /* a record before it is missing: its tokens are sampled again, and these with them */
        return JOURNAL_IGNORED;
    uint64_t bytes = (uint64_t)count * 4 + (l->n ? 0 : JOURNAL_FRAME_BYTES + JOURNAL_TOKENS_BYTES);
    if (!make_room(s, bytes))
        return JOURNAL_OVER;
    if (!ids_reserve(l, count))
        return JOURNAL_NOMEM;
    memcpy(l->id + l->n, p + JOURNAL_TOKENS_BYTES, (size_t)count * 4);
    l->n += count;
    s->bytes += bytes;
    return JOURNAL_DONE;
}

static enum journal_applied apply_end(struct journal_state *s, const uint8_t *p)
{
    uint64_t number;
    int64_t until_us;
    memcpy(&number, p + 8, sizeof number);
    memcpy(&until_us, p + 16, sizeof until_us);
    struct journal_entry *e = find(s, number);
    if (!e)
        return JOURNAL_IGNORED;
    if (until_us <= 0) {
        entry_remove(s, e);
        return JOURNAL_DONE;
    }
    if (!e->until_us) {
        list_take(&s->live, e);
        list_add(&s->ended, e);
    }
    e->until_us = until_us;
    return JOURNAL_DONE;
}

enum journal_applied journal_apply(struct journal_state *s, const uint8_t *payload, size_t n)
{
    if (n == 0)
        return JOURNAL_IGNORED;
    switch (payload[0]) {
    case JOURNAL_ACCEPT:
        return apply_accept(s, payload, n);
    case JOURNAL_TOKENS:
        return n < JOURNAL_TOKENS_BYTES ? JOURNAL_IGNORED : apply_tokens(s, payload, n);
    case JOURNAL_END:
        return n != JOURNAL_END_BYTES ? JOURNAL_IGNORED : apply_end(s, payload);
    case JOURNAL_SNAPSHOT: {
        uint64_t next;
        if (n != JOURNAL_SNAP_BYTES)
            return JOURNAL_IGNORED;
        memcpy(&next, payload + 8, sizeof next);
        if (next > s->next_number)
            s->next_number = next;
        return JOURNAL_DONE;
    }
    default:
        return JOURNAL_IGNORED;
    }
}

void journal_expire(struct journal_state *s, int64_t now_us)
{
    for (struct journal_entry *e = s->ended.head, *next; e; e = next) {
        next = e->next;
        if (e->until_us <= now_us)
            entry_remove(s, e);
    }
}

static void free_list(struct journal_list *l)
{
    for (struct journal_entry *e = l->head, *next; e; e = next) {
        next = e->next;
        entry_free(e);
    }
}

void journal_state_fini(struct journal_state *s)
{
    free_list(&s->ended);
    free_list(&s->live);
    memset(s, 0, sizeof *s);
}

void journal_found_of(const struct journal_entry *e, struct journal_found *out)
{
    *out = (struct journal_found){.accept = e->accept, .until_us = e->until_us};
    for (uint32_t i = 0; i < e->accept.n_choices; i++) {
        out->tokens[i] = e->choice[i].id;
        out->n_tokens[i] = e->choice[i].n;
    }
}
