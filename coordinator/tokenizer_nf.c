/* Normal forms C, D, KC and KD.
 *
 * Most text is in normal form already, so whole stretches are copied. A stable character is one that the form leaves
 * alone and that nothing before it can change: only the others, with the stable character in front of them, are taken
 * apart, ordered and put together again.
 */
#include "coordinator/tokenizer_internal.h"

#include <stdlib.h>
#include <utf8proc.h>

#define MAX_DECOMPOSED 32 /* of one character; U+FDFA has 18 */

struct nf_chars {
    int32_t *v;
    size_t len, cap;
};

static bool composes(enum tok_norm_type form)
{
    return form == TOK_NORM_NFC || form == TOK_NORM_NFKC;
}

static bool compat(enum tok_norm_type form)
{
    return form == TOK_NORM_NFKC || form == TOK_NORM_NFKD;
}

static unsigned combining_class(int32_t c)
{
    return tok_nf_inert((uint32_t)c) ? 0 : (unsigned)utf8proc_get_property(c)->combining_class;
}

/* Blocks in which all characters are composed and stay so, met often enough to be worth a line. */
static bool known_stable(enum tok_norm_type form, uint32_t c)
{
    if (c < 0xA0)
        return true;
    if (!composes(form))
        return c < 0xC0 && !compat(form);
    if (c < 0x300)
        return !compat(form);
    return (c >= 0x400 && c <= 0x482) || (c >= 0x1E00 && c <= 0x1E99) || (c >= 0x1EA0 && c <= 0x1EF9) ||
           (c >= 0x3041 && c <= 0x3096) || (c >= 0x30A1 && c <= 0x30FA) || (c >= 0xAC00 && c <= 0xD7A3);
}

static utf8proc_option_t decompose_options(enum tok_norm_type form)
{
    return (utf8proc_option_t)(UTF8PROC_DECOMPOSE | (compat(form) ? UTF8PROC_COMPAT : 0));
}

static bool stable(enum tok_norm_type form, uint32_t c)
{
    if (known_stable(form, c) || (c >= 0x4E00 && c <= 0x9FFF) || tok_nf_inert(c))
        return true;
    if (utf8proc_get_property((int32_t)c)->combining_class != 0 || (composes(form) && tok_joins_left(c)))
        return false;
    int32_t parts[MAX_DECOMPOSED];
    int bound = 0;
    utf8proc_ssize_t n = utf8proc_decompose_char((int32_t)c, parts, MAX_DECOMPOSED, decompose_options(form), &bound);
    return n == 1 && parts[0] == (int32_t)c;
}

static bool push(struct nf_chars *chars, uint32_t c, enum tok_norm_type form)
{
    if (chars->cap - chars->len < MAX_DECOMPOSED) {
        size_t cap = chars->cap ? chars->cap * 2 : 4 * MAX_DECOMPOSED;
        int32_t *v = realloc(chars->v, cap * sizeof *v);
        if (!v)
            return false;
        chars->v = v;
        chars->cap = cap;
    }
    int32_t *to = chars->v + chars->len;
    int bound = 0;
    utf8proc_ssize_t n = 0;
    if (!tok_nf_inert(c))
        n = utf8proc_decompose_char((int32_t)c, to, MAX_DECOMPOSED, decompose_options(form), &bound);
    if (n <= 0 || n > MAX_DECOMPOSED) {
        to[0] = (int32_t)c;
        n = 1;
    }
    chars->len += (size_t)n;
    return true;
}

/* Sorts marks v[0..n) by class, those of one class as they were: pass by pass over the classes that occur, so that a
 * hostile run of a million marks costs a fixed number of passes at worst. */
static bool sort_marks(int32_t *v, size_t n)
{
    size_t count[256] = {0}, at = 0;
    bool sorted = true;
    for (size_t i = 0; i < n; i++) {
        unsigned k = combining_class(v[i]) & 255;
        sorted = sorted && (i == 0 || k >= (combining_class(v[i - 1]) & 255));
        count[k]++;
    }
    if (sorted)
        return true;
    int32_t *copy = malloc(n * sizeof *copy);
    if (!copy)
        return false;
    for (unsigned k = 0; k < 256; k++) {
        size_t start = at;
        at += count[k];
        count[k] = start;
    }
    for (size_t i = 0; i < n; i++)
        copy[count[combining_class(v[i]) & 255]++] = v[i];
    for (size_t i = 0; i < n; i++)
        v[i] = copy[i];
    free(copy);
    return true;
}

static bool order(struct nf_chars *chars)
{
    for (size_t i = 0; i < chars->len;) {
        size_t end = i;
        while (end < chars->len && combining_class(chars->v[end]) != 0)
            end++;
        if (end > i + 1 && !sort_marks(chars->v + i, end - i))
            return false;
        i = end + 1;
    }
    return true;
}

/* A stretch that needs work, from one stable character to the next. */
static bool rewrite(enum tok_norm_type form, struct nf_chars *chars, const char *s, size_t n, struct tok_buf *out)
{
    chars->len = 0;
    for (size_t i = 0; i < n;) {
        unsigned len = tok_utf8_len((unsigned char)s[i]);
        if (!push(chars, tok_utf8_get(s + i, len), form))
            return false;
        i += len;
    }
    if (!order(chars))
        return false;
    utf8proc_ssize_t left = (utf8proc_ssize_t)chars->len;
    if (composes(form))
        left = utf8proc_normalize_utf32(chars->v, left, (utf8proc_option_t)(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
    if (left < 0 || !tok_buf_reserve(out, (size_t)left * 4))
        return false;
    for (utf8proc_ssize_t i = 0; i < left; i++)
        out->len += tok_utf8_put(out->data + out->len, (uint32_t)chars->v[i]);
    return true;
}

bool tok_nf_run(enum tok_norm_type form, const char *s, size_t n, struct tok_buf *out)
{
    struct nf_chars chars = {0};
    size_t done = 0, last = 0; /* written up to done; the last stable character begins at last */
    bool ok = true, inert = false;
    for (size_t i = 0; ok && i < n;) {
        unsigned len = tok_utf8_len((unsigned char)s[i]);
        uint32_t c = tok_utf8_get(s + i, len);
        if (len == 1 || stable(form, c)) {
            inert = len > 1 && tok_nf_inert(c); /* composed with nothing behind it either */
            last = i;
            i += len;
            continue;
        }
        size_t from = last < done || inert ? i : last, end = i + len;
        while (end < n) {
            len = tok_utf8_len((unsigned char)s[end]);
            if (len == 1 || stable(form, tok_utf8_get(s + end, len)))
                break;
            end += len;
        }
        ok = tok_buf_add(out, s + done, from - done) && rewrite(form, &chars, s + from, end - from, out);
        done = i = end;
        last = 0;
    }
    ok = ok && tok_buf_add(out, s + done, n - done);
    free(chars.v);
    return ok;
}
