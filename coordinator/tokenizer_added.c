/* Added tokens: found in the text before anything else looks at it (or, with "normalized", after the normalizer). Of
 * several that match at one place the longest wins, of several places the leftmost. */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORD_CHAR "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}]"

static int compare(const void *a, const void *b)
{
    const struct tok_added *x = a, *y = b;
    int c = memcmp(x->s, y->s, x->len < y->len ? x->len : y->len);
    return c ? c : x->len < y->len ? -1 : x->len > y->len;
}

/* What the loader collects before the strings have their final address. */
struct pending {
    struct tok_added token;
    size_t off;
    bool normalized;
};

/* The id that the library gives a token: its id in the model, else the next one that is free. A file whose own ids
 * differ would mean other ids there and here. */
static enum status_code settle_id(struct tokenizer *t, const char *s, size_t n, uint32_t id, bool special,
                                  uint32_t *next_id, const char *where, struct status *st)
{
    struct tok_vocab *v = &t->vocab;
    char quoted[TOK_QUOTE_MAX];
    uint32_t known = tok_vocab_find(v, s, n);
    if (known != TOK_NONE && (v->flags[known] & TOK_ID_ADDED))
        return status_set(st, ST_DATA_LOSS, "%s: %s is there twice", where, tok_quote(quoted, s, n));
    if (known == TOK_NONE) {
        known = (*next_id)++;
        if (known == id) {
            enum status_code rc = tok_vocab_add(v, id, s, n, 0, where, st);
            if (rc != ST_OK)
                return rc;
        }
    }
    if (known != id)
        return status_set(st, ST_DATA_LOSS, "%s.id: %u for %s, expected %u (%s)", where, id, tok_quote(quoted, s, n),
                          known, known < v->size ? "as in model.vocab" : "the next free id");
    v->flags[id] |= (uint8_t)(TOK_ID_ADDED | (special ? TOK_ID_SPECIAL | TOK_ID_SKIP : 0));
    return ST_OK;
}

/* Appends to added_text what the text is compared with. */
static enum status_code keep_pattern(struct tokenizer *t, struct pending *p, const char *s, size_t n,
                                     struct tok_match *m, const char *where, struct status *st)
{
    struct tok_buf pair[2] = {{0}, {0}};
    enum status_code rc = ST_OK;
    const char *content = s;
    size_t len = n;
    if (p->normalized)
        rc = tok_norm_run(t, pair, m, &s, &n, st);
    if (rc == ST_OK && n == 0)
        rc = status_set(st, ST_DATA_LOSS, "%s.content: the normalizer leaves nothing of it", where);
    if (rc == ST_OK && (n != len || memcmp(s, content, n) != 0))
        t->vocab.flags[p->token.id] |= TOK_ID_RENAMED;
    p->off = t->added_text.len;
    p->token.len = n;
    if (rc == ST_OK && !tok_buf_add(&t->added_text, s, n))
        rc = status_nomem(st, where, n);
    tok_buf_free(&pair[0]);
    tok_buf_free(&pair[1]);
    return rc;
}

static enum status_code load_one(struct tokenizer *t, const json_t *obj, struct pending *p, uint32_t *next_id,
                                 struct tok_match *m, const char *where, struct status *st)
{
    const char *s;
    size_t n;
    bool special = false;
    if (!json_is_object(obj))
        return status_set(st, ST_DATA_LOSS, "%s: expected an object, got %s", where, tok_json_kind(obj));
    enum status_code rc = tok_json_uint(json_object_get(obj, "id"), where, "id", TOK_MAX_VOCAB - 1, &p->token.id, st);
    if (rc == ST_OK)
        rc = tok_json_string(obj, where, "content", &s, &n, st);
    if (rc == ST_OK)
        rc = tok_json_bool(obj, where, "single_word", &p->token.single_word, st);
    if (rc == ST_OK)
        rc = tok_json_bool(obj, where, "lstrip", &p->token.lstrip, st);
    if (rc == ST_OK)
        rc = tok_json_bool(obj, where, "rstrip", &p->token.rstrip, st);
    if (rc == ST_OK)
        rc = tok_json_bool(obj, where, "normalized", &p->normalized, st);
    if (rc == ST_OK)
        rc = tok_json_bool(obj, where, "special", &special, st);
    if (rc != ST_OK || n == 0) /* the library passes over empty ones */
        return rc;
    rc = settle_id(t, s, n, p->token.id, special, next_id, where, st);
    if (rc == ST_OK)
        rc = keep_pattern(t, p, s, n, m, where, st);
    if (rc == ST_OK && p->token.single_word && !t->word_char)
        rc = tok_regex_create(&t->word_char, WORD_CHAR, sizeof WORD_CHAR - 1, TOK_REGEX_PCRE, st);
    return rc;
}

static enum status_code build_set(struct tok_added_set *set, const struct pending *list, size_t n, bool normalized,
                                  const char *text, struct status *st)
{
    set->v = calloc(n ? n : 1, sizeof *set->v);
    if (!set->v)
        return status_nomem(st, "added_tokens", n * sizeof *set->v);
    for (size_t i = 0; i < n; i++) {
        if (list[i].token.len == 0 || list[i].normalized != normalized)
            continue;
        set->v[set->n] = list[i].token;
        set->v[set->n++].s = text + list[i].off;
        set->first[(unsigned char)text[list[i].off]] = true;
    }
    if (set->n)
        qsort(set->v, set->n, sizeof *set->v, compare);
    for (size_t i = 1; i < set->n; i++)
        if (compare(&set->v[i - 1], &set->v[i]) == 0) {
            char quoted[TOK_QUOTE_MAX];
            return status_set(st, ST_DATA_LOSS, "added_tokens: ids %u and %u are both matched as %s", set->v[i - 1].id,
                              set->v[i].id, tok_quote(quoted, set->v[i].s, set->v[i].len));
        }
    return ST_OK;
}

enum status_code tok_added_load(struct tokenizer *t, const json_t *list, struct status *st)
{
    if (!list || json_is_null(list))
        return ST_OK;
    if (!json_is_array(list))
        return status_set(st, ST_DATA_LOSS, "added_tokens: expected an array, got %s", tok_json_kind(list));
    size_t n = json_array_size(list);
    enum status_code rc = ST_OK;
    struct pending *all = calloc(n ? n : 1, sizeof *all);
    struct tok_match *m = tok_match_create();
    if (!all || !m) {
        rc = status_nomem(st, "added_tokens", n * sizeof *all);
        goto done;
    }
    uint32_t next_id = t->vocab.n_model;
    for (size_t i = 0; i < n; i++) {
        char where[64];
        snprintf(where, sizeof where, "added_tokens[%zu]", i);
        rc = load_one(t, json_array_get(list, i), &all[i], &next_id, m, where, st);
        if (rc != ST_OK)
            goto done;
    }
    rc = build_set(&t->added_raw, all, n, false, t->added_text.data, st);
    if (rc == ST_OK)
        rc = build_set(&t->added_normalized, all, n, true, t->added_text.data, st);
done:
    tok_match_free(m);
    free(all);
    return rc;
}

/* First index in [lo, hi) whose byte number depth is at least b; all in the range are longer than depth. */
static size_t lower_bound(const struct tok_added *v, size_t lo, size_t hi, size_t depth, unsigned b)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if ((unsigned char)v[mid].s[depth] < b)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest token that s begins with. */
static const struct tok_added *longest(const struct tok_added_set *set, const char *s, size_t n)
{
    const struct tok_added *best = NULL;
    size_t lo = 0, hi = set->n;
    for (size_t depth = 0; depth < n && lo < hi; depth++) {
        unsigned b = (unsigned char)s[depth];
        lo = lower_bound(set->v, lo, hi, depth, b);
        hi = lower_bound(set->v, lo, hi, depth, b + 1);
        /* The shortest of those with a common beginning sorts first. */
        if (lo < hi && set->v[lo].len == depth + 1)
            best = &set->v[lo++];
    }
    return best;
}

static size_t char_before(const char *s, size_t i)
{
    do
        i--;
    while (i > 0 && ((unsigned char)s[i] & 0xC0) == 0x80);
    return i;
}

static enum status_code is_word_char(const struct tokenizer *t, struct tok_match *m, const char *s, size_t n, bool *yes,
                                     struct status *st)
{
    char same[4]; /* where a newer character's stand-in lies */
    struct tok_buf copy = {.data = same, .cap = sizeof same};
    size_t start, end;
    if (!tok_regex_subject(t->word_char, &copy, &s, n))
        return status_nomem(st, "added_tokens", n);
    struct tok_regex_iter it = {.re = t->word_char, .s = s, .len = n, .last_end = TOK_NO_MATCH};
    return tok_regex_next(&it, m, &start, &end, yes, st);
}

/* *yes: no letter, digit or the like touches s[start, end). */
static enum status_code stands_alone(const struct tokenizer *t, struct tok_match *m, const char *s, size_t len,
                                     size_t start, size_t end, bool *yes, struct status *st)
{
    bool left = false, right = false;
    enum status_code rc = ST_OK;
    if (start > 0) {
        size_t i = char_before(s, start);
        rc = is_word_char(t, m, s + i, start - i, &left, st);
    }
    if (rc == ST_OK && end < len)
        rc = is_word_char(t, m, s + end, tok_utf8_len((unsigned char)s[end]), &right, st);
    *yes = !left && !right;
    return rc;
}

enum status_code tok_added_next(const struct tokenizer *t, const struct tok_added_set *set, struct tok_added_iter *it,
                                struct tok_match *m, size_t *start, size_t *end, uint32_t *id, bool *found,
                                struct status *st)
{
    *found = false;
    while (set->n) {
        while (it->pos < it->len && !set->first[(unsigned char)it->s[it->pos]])
            it->pos++;
        if (it->pos >= it->len)
            break;
        const struct tok_added *a = longest(set, it->s + it->pos, it->len - it->pos);
        if (!a) {
            it->pos++;
            continue;
        }
        size_t from = it->pos, to = it->pos + a->len;
        it->pos = to; /* a match that is discarded below is passed over whole */
        if (a->single_word) {
            bool alone;
            enum status_code rc = stands_alone(t, m, it->s, it->len, from, to, &alone, st);
            if (rc != ST_OK)
                return rc;
            if (!alone)
                continue;
        }
        while (a->lstrip && from > it->covered) {
            size_t i = char_before(it->s, from);
            if (!tok_is_space(tok_utf8_get(it->s + i, (unsigned)(from - i))))
                break;
            from = i;
        }
        if (a->lstrip && from < it->covered)
            from = it->covered; /* the token before took the space already */
        while (a->rstrip && to < it->len) {
            unsigned len = tok_utf8_len((unsigned char)it->s[to]);
            if (!tok_is_space(tok_utf8_get(it->s + to, len)))
                break;
            to += len;
        }
        *start = from;
        *end = it->covered = to;
        *id = a->id;
        *found = true;
        break;
    }
    return ST_OK;
}
