#include "coordinator/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

static bool grow_ids(struct tok_vocab *v, uint32_t size)
{
    if (size <= v->cap)
        return true;
    uint32_t cap = v->cap ? v->cap : 1024;
    while (cap < size)
        cap *= 2;
    uint32_t *off = realloc(v->off, cap * sizeof *off);
    if (!off)
        return false;
    v->off = off;
    uint32_t *len = realloc(v->len, cap * sizeof *len);
    if (!len)
        return false;
    v->len = len;
    uint8_t *flags = realloc(v->flags, cap);
    if (!flags)
        return false;
    v->flags = flags;
    memset(v->off + v->cap, 0, (cap - v->cap) * sizeof *v->off);
    memset(v->len + v->cap, 0, (cap - v->cap) * sizeof *v->len);
    memset(v->flags + v->cap, 0, cap - v->cap);
    v->cap = cap;
    return true;
}

static size_t probe(const struct tok_vocab *v, const char *s, size_t n)
{
    size_t mask = v->n_slots - 1, i = (size_t)tok_hash(s, n) & mask;
    while (v->slots[i]) {
        uint32_t id = v->slots[i] - 1;
        if (v->len[id] == n && memcmp(tok_vocab_text(v, id), s, n) == 0)
            break;
        i = (i + 1) & mask;
    }
    return i;
}

static bool grow_slots(struct tok_vocab *v)
{
    if ((v->n_used + 1) * 2 <= v->n_slots)
        return true;
    size_t old_n = v->n_slots;
    uint32_t *old = v->slots;
    size_t n = old_n ? old_n * 2 : 2048;
    uint32_t *slots = calloc(n, sizeof *slots);
    if (!slots)
        return false;
    v->slots = slots;
    v->n_slots = n;
    for (size_t i = 0; i < old_n; i++)
        if (old[i]) {
            uint32_t id = old[i] - 1;
            slots[probe(v, tok_vocab_text(v, id), v->len[id])] = id + 1;
        }
    free(old);
    return true;
}

enum status_code tok_vocab_add(struct tok_vocab *v, uint32_t id, const char *s, size_t n, unsigned flags,
                               const char *where, struct status *st)
{
    char quoted[TOK_QUOTE_MAX], other[TOK_QUOTE_MAX];
    if (id >= TOK_MAX_VOCAB)
        return status_set(st, ST_DATA_LOSS, "%s: %s has id %u, expected less than %u", where, tok_quote(quoted, s, n),
                          id, TOK_MAX_VOCAB);
    if (id < v->size && v->flags[id])
        return status_set(st, ST_DATA_LOSS, "%s: %s and %s have the same id %u", where,
                          tok_quote(other, tok_vocab_text(v, id), v->len[id]), tok_quote(quoted, s, n), id);
    if (!grow_ids(v, id + 1) || !grow_slots(v))
        return status_nomem(st, "vocabulary", (size_t)id * 9);
    size_t slot = probe(v, s, n);
    if (v->slots[slot])
        return status_set(st, ST_DATA_LOSS, "%s: %s is there twice, with ids %u and %u", where, tok_quote(quoted, s, n),
                          v->slots[slot] - 1, id);
    v->off[id] = (uint32_t)v->text.len; /* a file of at most 256 MiB holds all contents */
    v->len[id] = (uint32_t)n;
    if (!tok_buf_add(&v->text, s, n))
        return status_nomem(st, "vocabulary", v->text.len + n);
    v->flags[id] = (uint8_t)(TOK_ID_USED | flags);
    v->slots[slot] = id + 1;
    v->n_used++;
    v->n_model += (flags & TOK_ID_MODEL) != 0;
    if (id >= v->size)
        v->size = id + 1;
    return ST_OK;
}

uint32_t tok_vocab_find(const struct tok_vocab *v, const char *s, size_t n)
{
    if (!v->n_slots)
        return TOK_NONE;
    size_t slot = probe(v, s, n);
    return v->slots[slot] ? v->slots[slot] - 1 : TOK_NONE;
}

uint32_t tok_vocab_find_model(const struct tok_vocab *v, const char *s, size_t n)
{
    uint32_t id = tok_vocab_find(v, s, n);
    return id != TOK_NONE && (v->flags[id] & TOK_ID_MODEL) ? id : TOK_NONE;
}

void tok_vocab_free(struct tok_vocab *v)
{
    tok_buf_free(&v->text);
    free(v->off);
    free(v->len);
    free(v->flags);
    free(v->slots);
    *v = (struct tok_vocab){0};
}
