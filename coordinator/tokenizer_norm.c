/* The normalizer: what happens to a segment of text (between two added tokens) before it is split into words. */
#include "coordinator/tokenizer_internal.h"

#include <string.h>

static enum status_code load_replace(struct tok_norm *norm, const json_t *obj, const char *where, struct status *st)
{
    const char *s, *text;
    size_t n, text_len;
    bool is_regex;
    norm->type = TOK_NORM_REPLACE;
    enum status_code rc = tok_json_pattern(obj, where, &s, &n, &is_regex, st);
    if (rc == ST_OK)
        rc = tok_json_string(obj, where, "content", &text, &text_len, st);
    if (rc != ST_OK)
        return rc;
    if (n == 0)
        return status_set(st, ST_UNIMPLEMENTED, "%s.pattern: an empty pattern is not supported", where);
    if (!tok_buf_add(&norm->text, text, text_len) || (!is_regex && !tok_buf_add(&norm->pattern, s, n)))
        return status_nomem(st, where, n + text_len);
    if (!is_regex)
        return ST_OK;
    rc = tok_regex_create(&norm->re, s, n, TOK_REGEX_ONIG, st);
    if (rc != ST_OK)
        status_prefix(st, "%s.pattern", where);
    return rc;
}

static enum status_code load_one(void *arg, const json_t *obj, const char *type, const char *where, struct status *st)
{
    struct tokenizer *t = arg;
    if (t->n_norms == TOK_MAX_STEPS)
        return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d normalizers", where, TOK_MAX_STEPS);
    struct tok_norm *norm = &t->norms[t->n_norms];
    if (strcmp(type, "Replace") == 0) {
        t->n_norms++;
        return load_replace(norm, obj, where, st);
    }
    if (strcmp(type, "Prepend") == 0) {
        const char *s;
        size_t n;
        enum status_code rc = tok_json_string(obj, where, "prepend", &s, &n, st);
        if (rc != ST_OK)
            return rc;
        if (n == 0) /* the library has a way of its own with it */
            return status_set(st, ST_UNIMPLEMENTED, "%s.prepend: an empty text is not supported", where);
        norm->type = TOK_NORM_PREPEND;
        t->n_norms++;
        return tok_buf_add(&norm->text, s, n) ? ST_OK : status_nomem(st, where, n);
    }
    return status_set(st, ST_UNIMPLEMENTED, "%s.type: '%s' is not supported", where, type);
}

enum status_code tok_norm_load(struct tokenizer *t, const json_t *obj, struct status *st)
{
    if (!obj || json_is_null(obj))
        return ST_OK;
    return tok_json_flatten(obj, "normalizer", "normalizers", load_one, t, st);
}

void tok_norm_free(struct tok_norm *norm)
{
    tok_regex_free(norm->re);
    tok_buf_free(&norm->pattern);
    tok_buf_free(&norm->text);
}

static bool replace_string(const struct tok_norm *norm, struct tok_buf *out, const char *s, size_t n)
{
    const char *p = norm->pattern.data;
    size_t len = norm->pattern.len;
    while (n) {
        const char *hit = len == 1 ? memchr(s, p[0], n) : memmem(s, n, p, len);
        size_t before = hit ? (size_t)(hit - s) : n;
        if (!tok_buf_add(out, s, before) || (hit && !tok_buf_add(out, norm->text.data, norm->text.len)))
            return false;
        size_t used = before + (hit ? len : 0);
        s += used;
        n -= used;
    }
    return true;
}

static enum status_code replace_regex(const struct tok_norm *norm, struct tok_buf *out, struct tok_match *m,
                                      const char *s, size_t n, struct status *st)
{
    struct tok_regex_iter it = {.re = norm->re, .s = s, .len = n, .last_end = TOK_NO_MATCH};
    size_t done = 0;
    while (n) { /* the library never searches an empty text */
        size_t start, end;
        bool found;
        enum status_code rc = tok_regex_next(&it, m, &start, &end, &found, st);
        if (rc != ST_OK)
            return rc;
        if (!found)
            break;
        if (!tok_buf_add(out, s + done, start - done) || !tok_buf_add(out, norm->text.data, norm->text.len))
            return status_nomem(st, "normalized text", out->len);
        done = end;
    }
    return tok_buf_add(out, s + done, n - done) ? ST_OK : status_nomem(st, "normalized text", out->len);
}

enum status_code tok_norm_run(const struct tokenizer *t, struct tok_buf pair[2], struct tok_match *m, const char **s,
                              size_t *n, struct status *st)
{
    for (size_t i = 0; i < t->n_norms; i++) {
        const struct tok_norm *norm = &t->norms[i];
        struct tok_buf *out = &pair[i & 1];
        bool ok = true;
        if (*n == 0)
            continue; /* nothing is put in front of nothing */
        out->len = 0;
        if (norm->type == TOK_NORM_PREPEND) {
            ok = tok_buf_add(out, norm->text.data, norm->text.len) && tok_buf_add(out, *s, *n);
        } else if (norm->re) {
            enum status_code rc = replace_regex(norm, out, m, *s, *n, st);
            if (rc != ST_OK)
                return rc;
        } else {
            ok = replace_string(norm, out, *s, *n);
        }
        if (!ok || !tok_buf_reserve(out, 1)) /* the data of an empty result is no NULL */
            return status_nomem(st, "normalized text", out->len);
        *s = out->data;
        *n = out->len;
        if (*n > TOK_MAX_TEXT_BYTES * 4)
            return status_set(st, ST_RESOURCE_EXHAUSTED, "text: its normalized form exceeds %zu bytes",
                              TOK_MAX_TEXT_BYTES * 4);
    }
    return ST_OK;
}
