/* The decoder: ids to text, as one state machine fed token by token.
 *
 * What a token's text becomes before byte runs are looked at depends on the token alone (and, with Metaspace, on whether
 * it is the first one), so that it is computed at load for every id. What is left per token is mostly a memcpy.
 *
 * A run of <0xNN> tokens becomes text only if all of its bytes together are well-formed; else every byte of it becomes
 * U+FFFD, the good ones too. So a run is held back until it ends or can no longer be well-formed.
 */
#include "coordinator/tokenizer_internal.h"

#include <stdlib.h>
#include <string.h>

#define REPLACEMENT "\xEF\xBF\xBD"

/* --- load --------------------------------------------------------------------------------------------------------- */

static enum status_code get_char(const json_t *obj, const char *where, const char *key, struct tok_dec_step *step,
                                 struct status *st)
{
    const char *s;
    size_t n;
    enum status_code rc = tok_json_string(obj, where, key, &s, &n, st);
    if (rc != ST_OK)
        return rc;
    if (n == 0 || n != tok_utf8_len((unsigned char)s[0]))
        return status_set(st, ST_DATA_LOSS, "%s.%s: expected one character", where, key);
    memcpy(step->mark, s, n);
    step->mark_len = (unsigned)n;
    return ST_OK;
}

static enum status_code load_replace(struct tok_dec_step *step, const json_t *obj, const char *where, struct status *st)
{
    const char *s, *text;
    size_t n, text_len;
    bool is_regex;
    enum status_code rc = tok_json_pattern(obj, where, &s, &n, &is_regex, st);
    if (rc == ST_OK)
        rc = tok_json_string(obj, where, "content", &text, &text_len, st);
    if (rc != ST_OK)
        return rc;
    if (is_regex || n == 0)
        return status_set(st, ST_UNIMPLEMENTED, "%s.pattern: only a non-empty String is supported", where);
    if (!tok_buf_add(&step->pattern, s, n) || !tok_buf_add(&step->text, text, text_len))
        return status_nomem(st, where, n + text_len);
    return ST_OK;
}

static enum status_code load_metaspace(struct tok_dec_step *step, const json_t *obj, const char *where,
                                       struct status *st)
{
    const char *scheme = "always";
    size_t n;
    bool prefix_space = true;
    enum status_code rc = get_char(obj, where, "replacement", step, st);
    if (rc == ST_OK && json_object_get(obj, "prepend_scheme"))
        rc = tok_json_string(obj, where, "prepend_scheme", &scheme, &n, st);
    if (rc == ST_OK)
        rc = tok_json_bool_opt(obj, where, "add_prefix_space", &prefix_space, st);
    if (rc != ST_OK)
        return rc;
    if (strcmp(scheme, "always") != 0 && strcmp(scheme, "first") != 0 && strcmp(scheme, "never") != 0)
        return status_set(st, ST_UNIMPLEMENTED, "%s.prepend_scheme: '%s' is not supported", where, scheme);
    step->drop_first = strcmp(scheme, "never") != 0;
    if (!prefix_space && step->drop_first)
        return status_set(st, ST_DATA_LOSS, "%s.add_prefix_space: false, but prepend_scheme is '%s'", where, scheme);
    return ST_OK;
}

static enum status_code load_strip(struct tok_dec_step *step, const json_t *obj, const char *where, struct status *st)
{
    const uint32_t max = 1024; /* what a stream holds back */
    enum status_code rc = get_char(obj, where, "content", step, st);
    if (rc == ST_OK)
        rc = tok_json_uint(json_object_get(obj, "start"), where, "start", max, &step->start, st);
    if (rc == ST_OK)
        rc = tok_json_uint(json_object_get(obj, "stop"), where, "stop", max, &step->stop, st);
    return rc;
}

static enum status_code load_one(void *arg, const json_t *obj, const char *type, const char *where, struct status *st)
{
    static const char *const names[] = {"Replace", "Strip", "Metaspace", "ByteLevel"};
    struct tok_decoder *dec = arg;
    size_t kind = 0;
    while (kind < 4 && strcmp(type, names[kind]) != 0)
        kind++;
    bool byte_run = strcmp(type, "ByteFallback") == 0, fuse = strcmp(type, "Fuse") == 0;
    if (kind == 4 && !byte_run && !fuse)
        return status_set(st, ST_UNIMPLEMENTED, "%s.type: '%s' is not supported", where, type);
    if (dec->fused && !fuse && kind != TOK_DEC_STRIP)
        return status_set(st, ST_UNIMPLEMENTED, "%s: '%s' behind Fuse or ByteLevel is not supported", where, type);
    if (fuse) {
        dec->fused = true;
        return ST_OK;
    }
    if (byte_run) {
        if (dec->byte_fallback)
            return status_set(st, ST_UNIMPLEMENTED, "%s: a second ByteFallback is not supported", where);
        dec->byte_fallback = true;
        return ST_OK;
    }
    if (dec->n_steps == TOK_MAX_STEPS)
        return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d decoders", where, TOK_MAX_STEPS);
    struct tok_dec_step *step = &dec->steps[dec->n_steps++];
    step->type = (enum tok_dec_type)kind;
    if (!dec->fused)
        dec->n_each++;
    if (!dec->byte_fallback)
        dec->n_before++;
    switch (step->type) {
    case TOK_DEC_REPLACE:
        return load_replace(step, obj, where, st);
    case TOK_DEC_STRIP:
        return load_strip(step, obj, where, st);
    case TOK_DEC_METASPACE:
        return load_metaspace(step, obj, where, st);
    default:
        dec->fused = dec->lossy = true;
        return ST_OK;
    }
}

enum status_code tok_decoder_load(struct tokenizer *t, const json_t *obj, struct status *st)
{
    struct tok_decoder *dec = &t->dec;
    if (!obj || json_is_null(obj)) {
        dec->join_space = true; /* the library's way without a decoder */
        return ST_OK;
    }
    enum status_code rc = tok_json_flatten(obj, "decoder", "decoders", load_one, dec, st);
    if (dec->n_before > dec->n_each)
        dec->n_before = dec->n_each;
    for (size_t i = 0; i < dec->n_before; i++)
        dec->first_differs = dec->first_differs || dec->steps[i].drop_first;
    return rc;
}

void tok_decoder_free(struct tok_decoder *dec)
{
    for (size_t i = 0; i < dec->n_steps; i++) {
        tok_buf_free(&dec->steps[i].pattern);
        tok_buf_free(&dec->steps[i].text);
    }
    tok_buf_free(&dec->text);
    free(dec->off);
    free(dec->len);
    free(dec->byte);
    free(dec->clean);
}

/* --- one step on one whole token ------------------------------------------------------------------------------------ */

static bool step_replace(const struct tok_dec_step *step, const char *s, size_t n, struct tok_buf *out)
{
    while (n) {
        const char *hit = memmem(s, n, step->pattern.data, step->pattern.len);
        size_t before = hit ? (size_t)(hit - s) : n;
        if (!tok_buf_add(out, s, before) || (hit && !tok_buf_add(out, step->text.data, step->text.len)))
            return false;
        size_t used = before + (hit ? step->pattern.len : 0);
        s += used;
        n -= used;
    }
    return true;
}

static bool is_mark(const struct tok_dec_step *step, const char *s, size_t n)
{
    return n >= step->mark_len && memcmp(s, step->mark, step->mark_len) == 0;
}

static bool step_strip(const struct tok_dec_step *step, const char *s, size_t n, struct tok_buf *out)
{
    for (uint32_t i = 0; i < step->start && is_mark(step, s, n); i++) {
        s += step->mark_len;
        n -= step->mark_len;
    }
    for (uint32_t i = 0; i < step->stop && n >= step->mark_len && is_mark(step, s + n - step->mark_len, n); i++)
        n -= step->mark_len;
    return tok_buf_add(out, s, n);
}

static bool step_metaspace(const struct tok_dec_step *step, bool first, const char *s, size_t n, struct tok_buf *out)
{
    while (n) {
        bool mark = is_mark(step, s, n);
        unsigned len = tok_utf8_len((unsigned char)*s);
        if (mark ? !(first && step->drop_first) && !tok_buf_add(out, " ", 1) : !tok_buf_add(out, s, len))
            return false;
        s += len;
        n -= len;
    }
    return true;
}

/* Bytes of ByteLevel's characters; a token with any other character stays as it is. */
static bool step_byte_level(const char *s, size_t n, struct tok_buf *out)
{
    size_t start = out->len;
    for (size_t i = 0; i < n;) {
        unsigned len = tok_utf8_len((unsigned char)s[i]);
        int b = tok_byte_of_char(tok_utf8_get(s + i, len));
        if (b < 0) {
            out->len = start;
            return tok_buf_add(out, s, n);
        }
        char c = (char)b;
        if (!tok_buf_add(out, &c, 1))
            return false;
        i += len;
    }
    return true;
}

/* steps[from..to) on s; the result is s or lies in one of the scratch buffers. */
static bool run_steps(const struct tok_decoder *dec, size_t from, size_t to, bool first, struct tok_buf scratch[2],
                      const char **s, size_t *n)
{
    for (size_t i = from; i < to; i++) {
        const struct tok_dec_step *step = &dec->steps[i];
        struct tok_buf *out = &scratch[i & 1];
        bool ok;
        out->len = 0;
        switch (step->type) {
        case TOK_DEC_REPLACE:
            ok = step_replace(step, *s, *n, out);
            break;
        case TOK_DEC_STRIP:
            ok = step_strip(step, *s, *n, out);
            break;
        case TOK_DEC_METASPACE:
            ok = step_metaspace(step, first, *s, *n, out);
            break;
        default:
            ok = step_byte_level(*s, *n, out);
            break;
        }
        if (!ok || !tok_buf_reserve(out, 1))
            return false;
        *s = out->data;
        *n = out->len;
    }
    return true;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* <0xNN>, and <0x+N>, which the library's number parser takes too. */
static int byte_token(const char *s, size_t n)
{
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    int hi = s[3] == '+' ? 0 : hex_digit(s[3]), lo = hex_digit(s[4]);
    return hi < 0 || lo < 0 ? -1 : hi << 4 | lo;
}

/* What decoding starts from: the token's content, but for added tokens with "normalized" their normalized form. */
static const char *source_text(const struct tokenizer *t, uint32_t id, size_t *n)
{
    if (t->vocab.flags[id] & TOK_ID_RENAMED)
        for (size_t i = 0; i < t->added_normalized.n; i++)
            if (t->added_normalized.v[i].id == id) {
                *n = t->added_normalized.v[i].len;
                return t->added_normalized.v[i].s;
            }
    *n = t->vocab.len[id];
    return tok_vocab_text(&t->vocab, id);
}

/* The library tells special tokens by that text too: a renamed one is no longer known for one, unless there is another
 * special token of its new name. */
static void settle_skip(struct tokenizer *t, uint32_t id)
{
    size_t n;
    const char *s = source_text(t, id, &n);
    uint32_t same = tok_vocab_find(&t->vocab, s, n);
    t->vocab.flags[id] &= (uint8_t)~TOK_ID_SKIP;
    if (same != TOK_NONE && (t->vocab.flags[same] & TOK_ID_SPECIAL))
        t->vocab.flags[id] |= TOK_ID_SKIP;
}

enum status_code tok_decoder_finish(struct tokenizer *t, struct status *st)
{
    struct tok_decoder *dec = &t->dec;
    uint32_t size = t->vocab.size;
    struct tok_buf scratch[2] = {{0}, {0}};
    enum status_code rc = ST_OK;
    dec->off = calloc(size, sizeof *dec->off);
    dec->len = calloc(size, sizeof *dec->len);
    dec->byte = calloc(size, sizeof *dec->byte);
    dec->clean = calloc(size, sizeof *dec->clean);
    if (!dec->off || !dec->len || !dec->byte || !dec->clean)
        goto nomem;
    for (uint32_t id = 0; id < size; id++) {
        dec->byte[id] = -1;
        if (!t->vocab.flags[id])
            continue;
        if (t->vocab.flags[id] & TOK_ID_RENAMED)
            settle_skip(t, id);
        size_t n;
        const char *s = source_text(t, id, &n);
        if (!run_steps(dec, 0, dec->n_before, false, scratch, &s, &n))
            goto nomem;
        if (dec->text.len + n > UINT32_MAX) {
            rc = status_set(st, ST_UNIMPLEMENTED, "decoder: the decoded vocabulary exceeds 4 GiB");
            goto done;
        }
        dec->off[id] = (uint32_t)dec->text.len;
        dec->len[id] = (uint32_t)n;
        dec->clean[id] = tok_utf8_check(s, n) == n;
        if (dec->byte_fallback)
            dec->byte[id] = (int16_t)byte_token(s, n);
        if (!tok_buf_add(&dec->text, s, n))
            goto nomem;
    }
    if (!tok_buf_reserve(&dec->text, 1))
        goto nomem;
    goto done;
nomem:
    rc = status_nomem(st, "decoder tables", (size_t)size * 11);
done:
    tok_buf_free(&scratch[0]);
    tok_buf_free(&scratch[1]);
    return rc;
}

/* --- the state machine ---------------------------------------------------------------------------------------------- */

/* Text of the whole, through strip number k and those behind it. Pieces are whole characters. */
static bool whole_out(const struct tok_decoder *dec, struct tok_dec_state *st, size_t k, const char *s, size_t n,
                      struct tok_buf *out)
{
    if (k == dec->n_steps)
        return tok_buf_add(out, s, n);
    const struct tok_dec_step *step = &dec->steps[k];
    while (n && !st->strip[k].started) {
        if (st->strip[k].n_cut < step->start && is_mark(step, s, n)) {
            st->strip[k].n_cut++;
            s += step->mark_len;
            n -= step->mark_len;
        } else {
            st->strip[k].started = true;
        }
    }
    if (step->stop == 0 || n == 0)
        return n == 0 || whole_out(dec, st, k + 1, s, n, out);
    /* The last `stop` marks so far may turn out to be the end: count them instead of passing them on. */
    size_t tail = 0, len = n;
    while (tail < step->stop && len >= step->mark_len && is_mark(step, s + len - step->mark_len, len)) {
        len -= step->mark_len;
        tail++;
    }
    size_t give = st->strip[k].n_held;
    if (len == 0) {
        size_t all = st->strip[k].n_held + tail;
        give = all > step->stop ? all - step->stop : 0;
        tail = all - give;
    }
    for (; give; give--)
        if (!whole_out(dec, st, k + 1, step->mark, step->mark_len, out))
            return false;
    st->strip[k].n_held = (uint32_t)tail;
    return len == 0 || whole_out(dec, st, k + 1, s, len, out);
}

/* Bytes of the fused text: whole characters go on, bad bytes as U+FFFD (one for each maximal part of a character). */
static bool lossy_out(const struct tok_decoder *dec, struct tok_dec_state *st, const char *s, size_t n,
                      struct tok_buf *out)
{
    for (size_t i = 0; i < n;) {
        if (st->utf8.n_held == 0) {
            size_t good = tok_utf8_check(s + i, n - i);
            if (good && !whole_out(dec, st, dec->n_each, s + i, good, out))
                return false;
            i += good;
            if (i == n)
                break;
        }
        unsigned len, held = st->utf8.n_held;
        switch (tok_utf8_feed(&st->utf8, (unsigned char)s[i], &len)) {
        case TOK_UTF8_CHAR:
            if (!whole_out(dec, st, dec->n_each, (const char *)st->utf8.held, len, out))
                return false;
            i++;
            break;
        case TOK_UTF8_MORE:
            i++;
            break;
        case TOK_UTF8_BAD: /* what was held is done with; the byte itself may begin a character */
            st->utf8.n_held = 0;
            if (!whole_out(dec, st, dec->n_each, REPLACEMENT, 3, out))
                return false;
            i += held == 0;
            break;
        }
    }
    return true;
}

/* A token behind the byte runs; steps[n_before..n_each) are still to come. */
static bool token_out(const struct tok_decoder *dec, struct tok_dec_state *st, const char *s, size_t n, bool clean,
                      struct tok_buf *out)
{
    bool first = st->n_joined++ == 0;
    if (dec->n_before < dec->n_each) {
        if (!run_steps(dec, dec->n_before, dec->n_each, first, st->scratch, &s, &n))
            return false;
        clean = false;
    }
    if (dec->join_space && !first && !whole_out(dec, st, dec->n_each, " ", 1, out))
        return false;
    if (dec->lossy && (!clean || st->utf8.n_held))
        return lossy_out(dec, st, s, n, out);
    return whole_out(dec, st, dec->n_each, s, n, out);
}

static bool bad_bytes(const struct tok_decoder *dec, struct tok_dec_state *st, size_t count, struct tok_buf *out)
{
    while (count--)
        if (!token_out(dec, st, REPLACEMENT, 3, true, out))
            return false;
    return true;
}

static bool run_end(const struct tok_decoder *dec, struct tok_dec_state *st, struct tok_buf *out)
{
    bool ok = true;
    if (st->run.len)
        ok = st->run_utf8.n_held ? bad_bytes(dec, st, st->run.len, out)
                                 : token_out(dec, st, st->run.data, st->run.len, true, out);
    st->run.len = 0;
    st->run_utf8.n_held = 0;
    st->run_bad = false;
    return ok;
}

static bool run_byte(const struct tok_decoder *dec, struct tok_dec_state *st, char byte, struct tok_buf *out)
{
    unsigned len;
    if (st->run_bad)
        return bad_bytes(dec, st, 1, out);
    if (!tok_buf_add(&st->run, &byte, 1))
        return false;
    if (tok_utf8_feed(&st->run_utf8, (unsigned char)byte, &len) != TOK_UTF8_BAD)
        return true;
    bool ok = bad_bytes(dec, st, st->run.len, out);
    st->run.len = 0;
    st->run_utf8.n_held = 0;
    st->run_bad = true;
    return ok;
}

bool tok_dec_push(const struct tokenizer *t, struct tok_dec_state *st, uint32_t id, unsigned flags, struct tok_buf *out)
{
    const struct tok_decoder *dec = &t->dec;
    unsigned skip = (flags & TOK_SKIP_SPECIAL) ? TOK_ID_SKIP : 0;
    if (id >= t->vocab.size || !t->vocab.flags[id] || (t->vocab.flags[id] & skip))
        return true;
    bool first = st->n_tokens++ == 0;
    const char *s = dec->text.data + dec->off[id];
    size_t n = dec->len[id];
    bool clean = dec->clean[id];
    int byte = dec->byte[id];
    if (first && dec->first_differs) {
        s = source_text(t, id, &n);
        /* token_out uses the scratch buffers again: what lies there is read before it is overwritten only if the
         * steps go on in the same alternation, which run_steps keeps by its index. */
        if (!run_steps(dec, 0, dec->n_before, true, st->scratch, &s, &n))
            return false;
        clean = false;
        byte = dec->byte_fallback ? byte_token(s, n) : -1;
    }
    if (byte >= 0)
        return run_byte(dec, st, (char)byte, out);
    return run_end(dec, st, out) && token_out(dec, st, s, n, clean, out);
}

bool tok_dec_settle(const struct tokenizer *t, struct tok_dec_state *st, struct tok_buf *out)
{
    size_t whole = st->run.len - st->run_utf8.n_held;
    if (whole && !token_out(&t->dec, st, st->run.data, whole, true, out))
        return false;
    if (whole)
        memmove(st->run.data, st->run.data + whole, st->run_utf8.n_held);
    st->run.len = st->run_utf8.n_held;
    for (size_t k = t->dec.n_each; k < t->dec.n_steps; k++) {
        for (; st->strip[k].n_held; st->strip[k].n_held--)
            if (!whole_out(&t->dec, st, k + 1, t->dec.steps[k].mark, t->dec.steps[k].mark_len, out))
                return false;
    }
    return true;
}

bool tok_dec_finish(const struct tokenizer *t, struct tok_dec_state *st, struct tok_buf *out)
{
    if (!run_end(&t->dec, st, out))
        return false;
    bool cut = st->utf8.n_held > 0;
    st->utf8.n_held = 0;
    return !cut || whole_out(&t->dec, st, t->dec.n_each, REPLACEMENT, 3, out);
}

void tok_dec_fini(struct tok_dec_state *st)
{
    tok_buf_free(&st->run);
    tok_buf_free(&st->scratch[0]);
    tok_buf_free(&st->scratch[1]);
}

enum status_code tok_decode(const struct tokenizer *t, const uint32_t *ids, size_t n, unsigned flags, char **text,
                            size_t *len, struct status *st)
{
    struct tok_buf out = {0};
    struct tok_dec_state state = {0};
    enum status_code rc = ST_OK;
    if (t->none)
        return status_set(st, ST_OUT_OF_RANGE, "there is no tokenizer, ids have no text");
    for (size_t i = 0; i < n; i++) {
        if (ids[i] >= t->vocab.size || !t->vocab.flags[ids[i]]) {
            rc = status_set(st, ST_OUT_OF_RANGE, "ids[%zu]: %u is not in the vocabulary (%s %u)", i, ids[i],
                            ids[i] < t->vocab.size ? "a gap; its size is" : "expected less than", t->vocab.size);
            goto done;
        }
        if (!tok_dec_push(t, &state, ids[i], flags, &out))
            goto nomem;
    }
    if (!tok_dec_finish(t, &state, &out) || !tok_buf_reserve(&out, 1))
        goto nomem;
    out.data[out.len] = '\0';
    *text = out.data;
    *len = out.len;
    out.data = NULL;
    goto done;
nomem:
    rc = status_nomem(st, "decoded text", out.len);
done:
    free(out.data);
    tok_dec_fini(&state);
    return rc;
}
