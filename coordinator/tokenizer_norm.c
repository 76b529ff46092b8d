/* The normalizer: what happens to a segment of text (between two added tokens) before it is split into words. */
#include "coordinator/tokenizer_internal.h"

#include <string.h>

static enum status_code load_replace(struct tok_norm *norm, const json_t *obj, const char *where, struct status *st)
{
    const char *s, *text;
    size_t n, text_len;
    bool is_regex;
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

static enum status_code load_prepend(struct tok_norm *norm, const json_t *obj, const char *where, struct status *st)
{
    const char *s;
    size_t n;
    enum status_code rc = tok_json_string(obj, where, "prepend", &s, &n, st);
    if (rc != ST_OK)
        return rc;
    if (n == 0) /* the library has a way of its own with it */
        return status_set(st, ST_UNIMPLEMENTED, "%s.prepend: an empty text is not supported", where);
    return tok_buf_add(&norm->text, s, n) ? ST_OK : status_nomem(st, where, n);
}

static enum status_code load_one(void *arg, const json_t *obj, const char *type, const char *where, struct status *st)
{
    static const char *const names[] = {
        [TOK_NORM_NFC] = "NFC",
        [TOK_NORM_NFD] = "NFD",
        [TOK_NORM_NFKC] = "NFKC",
        [TOK_NORM_NFKD] = "NFKD",
        [TOK_NORM_LOWERCASE] = "Lowercase",
        [TOK_NORM_STRIP_ACCENTS] = "StripAccents",
        [TOK_NORM_NMT] = "Nmt",
        [TOK_NORM_BYTE_LEVEL] = "ByteLevel",
        [TOK_NORM_STRIP] = "Strip",
        [TOK_NORM_PREPEND] = "Prepend",
        [TOK_NORM_REPLACE] = "Replace",
    };
    const size_t n_names = sizeof names / sizeof *names;
    struct tokenizer *t = arg;
    size_t k = 0;
    while (k < n_names && strcmp(type, names[k]) != 0)
        k++;
    if (k == n_names)
        return status_set(st, ST_UNIMPLEMENTED, "%s.type: '%s' is not supported", where, type);
    if (t->n_norms == TOK_MAX_STEPS)
        return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d normalizers", where, TOK_MAX_STEPS);
    struct tok_norm *norm = &t->norms[t->n_norms++];
    norm->type = (enum tok_norm_type)k;
    if (norm->type == TOK_NORM_REPLACE)
        return load_replace(norm, obj, where, st);
    if (norm->type == TOK_NORM_PREPEND)
        return load_prepend(norm, obj, where, st);
    if (norm->type != TOK_NORM_STRIP)
        return ST_OK;
    enum status_code rc = tok_json_bool(obj, where, "strip_left", &norm->left, st);
    return rc == ST_OK ? tok_json_bool(obj, where, "strip_right", &norm->right, st) : rc;
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
    struct tok_buf copy = {0};
    enum status_code rc = ST_OK;
    size_t done = 0;
    const char *subject = s;
    if (!tok_regex_subject(norm->re, &copy, &subject, n)) {
        rc = status_nomem(st, "normalized text", n);
        goto finish;
    }
    struct tok_regex_iter it = {.re = norm->re, .s = subject, .len = n, .last_end = TOK_NO_MATCH};
    while (n) { /* the library never searches an empty text */
        size_t start, end;
        bool found;
        rc = tok_regex_next(&it, m, &start, &end, &found, st);
        if (rc != ST_OK)
            goto finish;
        if (!found)
            break;
        if (!tok_buf_add(out, s + done, start - done) || !tok_buf_add(out, norm->text.data, norm->text.len)) {
            rc = status_nomem(st, "normalized text", out->len);
            goto finish;
        }
        done = end;
    }
    if (!tok_buf_add(out, s + done, n - done))
        rc = status_nomem(st, "normalized text", out->len);
finish:
    tok_buf_free(&copy);
    return rc;
}

/* White space at either end; what is left lies in s itself. */
static void strip(const struct tok_norm *norm, const char **s, size_t *n)
{
    while (norm->left && *n) {
        unsigned len = tok_utf8_len((unsigned char)**s);
        if (!tok_is_space(tok_utf8_get(*s, len)))
            break;
        *s += len;
        *n -= len;
    }
    while (norm->right && *n) {
        size_t i = *n - 1;
        while (i > 0 && ((unsigned char)(*s)[i] & 0xC0) == 0x80)
            i--;
        if (!tok_is_space(tok_utf8_get(*s + i, (unsigned)(*n - i))))
            break;
        *n = i;
    }
}

/* sentencepiece's rules for NMT: control characters go, what is some kind of space becomes one. */
static uint32_t nmt_char(uint32_t c)
{
    if ((c >= 1 && c <= 8) || c == 0xB || (c >= 0xE && c <= 0x1F) || c == 0x7F || c == 0x8F || c == 0x9F)
        return TOK_NONE;
    bool space = c == 9 || c == 0xA || c == 0xC || c == 0xD || c == 0x1680 || (c >= 0x200B && c <= 0x200F) ||
                 c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xFEFF || c == 0xFFFD;
    return space ? ' ' : c;
}

/* ByteLevel: a character for each byte. */
static bool map_bytes(struct tok_buf *out, const char *s, size_t n)
{
    if (!tok_buf_reserve(out, n * 2))
        return false;
    for (size_t i = 0; i < n; i++)
        out->len += tok_utf8_put(out->data + out->len, tok_char_of_byte((unsigned char)s[i]));
    return true;
}

/* Lowercase, StripAccents, Nmt: each character by itself. */
static bool map_chars(enum tok_norm_type type, struct tok_buf *out, const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        unsigned len = tok_utf8_len((unsigned char)s[i]);
        uint32_t c = tok_utf8_get(s + i, len), to;
        if (!tok_buf_reserve(out, 8))
            return false;
        switch (type) {
        case TOK_NORM_LOWERCASE:
            to = c == 0x130 ? 'i' : tok_lower(c);
            break;
        case TOK_NORM_STRIP_ACCENTS:
            to = tok_is_accent(c) ? TOK_NONE : c;
            break;
        default:
            to = nmt_char(c);
        }
        if (to != TOK_NONE)
            out->len += tok_utf8_put(out->data + out->len, to);
        if (c == 0x130 && type == TOK_NORM_LOWERCASE)
            out->len += tok_utf8_put(out->data + out->len, 0x307);
        i += len;
    }
    return true;
}

static enum status_code run_one(const struct tok_norm *norm, struct tok_buf *out, struct tok_match *m, const char *s,
                                size_t n, struct status *st)
{
    bool ok;
    out->len = 0;
    switch (norm->type) {
    case TOK_NORM_NFC:
    case TOK_NORM_NFD:
    case TOK_NORM_NFKC:
    case TOK_NORM_NFKD:
        ok = tok_nf_run(norm->type, s, n, out);
        break;
    case TOK_NORM_BYTE_LEVEL:
        ok = map_bytes(out, s, n);
        break;
    case TOK_NORM_PREPEND:
        ok = tok_buf_add(out, norm->text.data, norm->text.len) && tok_buf_add(out, s, n);
        break;
    case TOK_NORM_REPLACE:
        if (norm->re)
            return replace_regex(norm, out, m, s, n, st);
        ok = replace_string(norm, out, s, n);
        break;
    default:
        ok = map_chars(norm->type, out, s, n);
    }
    return ok ? ST_OK : status_nomem(st, "normalized text", out->len);
}

enum status_code tok_norm_run(const struct tokenizer *t, struct tok_buf pair[2], struct tok_match *m, const char **s,
                              size_t *n, struct status *st)
{
    for (size_t i = 0, written = 0; i < t->n_norms && *n; i++) { /* nothing is put in front of nothing */
        const struct tok_norm *norm = &t->norms[i];
        if (norm->type == TOK_NORM_STRIP) {
            strip(norm, s, n);
            continue;
        }
        struct tok_buf *out = &pair[written++ & 1];
        enum status_code rc = run_one(norm, out, m, *s, *n, st);
        if (rc != ST_OK)
            return rc;
        if (!tok_buf_reserve(out, 1)) /* the data of an empty result is no NULL */
            return status_nomem(st, "normalized text", out->len);
        *s = out->data;
        *n = out->len;
        if (*n > TOK_MAX_TEXT_BYTES * 4)
            return status_set(st, ST_RESOURCE_EXHAUSTED, "text: its normalized form exceeds %zu bytes",
                              TOK_MAX_TEXT_BYTES * 4);
    }
    return ST_OK;
}
