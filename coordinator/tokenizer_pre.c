/* The pre-tokenizer: splits a segment into the words that BPE works on. Each step hands its pieces straight to the next
 * one; steps that change the text write into a buffer of their own, which stays as it is until all pieces are done. */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <string.h>

/* GPT-2's, built into ByteLevel. */
#define GPT2_SPLIT "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

static enum status_code add_split(struct tokenizer *t, const char *s, size_t n, enum tok_regex_syntax syntax,
                                  enum tok_behavior behavior, bool invert, const char *where, struct status *st)
{
    if (t->n_pres == TOK_MAX_STEPS)
        return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d pre-tokenizers", where, TOK_MAX_STEPS);
    struct tok_pre *pre = &t->pres[t->n_pres];
    pre->type = TOK_PRE_SPLIT;
    pre->behavior = behavior;
    pre->invert = invert;
    enum status_code rc = tok_regex_create(&pre->re, s, n, syntax, st);
    if (rc != ST_OK)
        status_prefix(st, "%s.pattern", where);
    else
        t->n_pres++;
    return rc;
}

static enum status_code get_behavior(const json_t *obj, const char *where, enum tok_behavior *out, struct status *st)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *s;
    size_t n;
    enum status_code rc = tok_json_string(obj, where, "behavior", &s, &n, st);
    if (rc != ST_OK)
        return rc;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(s, names[i]) == 0) {
            *out = (enum tok_behavior)i;
            return ST_OK;
        }
    return status_set(st, ST_UNIMPLEMENTED, "%s.behavior: '%s' is not supported", where, s);
}

static enum status_code load_split(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    const char *s;
    size_t n;
    bool is_regex, invert;
    enum tok_behavior behavior = TOK_ISOLATED;
    enum status_code rc = tok_json_pattern(obj, where, &s, &n, &is_regex, st);
    if (rc == ST_OK)
        rc = get_behavior(obj, where, &behavior, st);
    if (rc == ST_OK)
        rc = tok_json_bool(obj, where, "invert", &invert, st);
    if (rc != ST_OK)
        return rc;
    return add_split(t, s, n, is_regex ? TOK_REGEX_ONIG : TOK_REGEX_LITERAL, behavior, invert, where, st);
}

static enum status_code load_byte_level(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    bool prefix_space, use_regex = true;
    enum status_code rc = tok_json_bool(obj, where, "add_prefix_space", &prefix_space, st);
    if (rc == ST_OK)
        rc = tok_json_bool_opt(obj, where, "use_regex", &use_regex, st);
    if (rc != ST_OK)
        return rc;
    t->byte_level = true;
    if (prefix_space) {
        if (t->n_pres == TOK_MAX_STEPS)
            return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d pre-tokenizers", where, TOK_MAX_STEPS);
        t->pres[t->n_pres++].type = TOK_PRE_PREFIX_SPACE;
    }
    if (!use_regex)
        return ST_OK;
    return add_split(t, GPT2_SPLIT, sizeof GPT2_SPLIT - 1, TOK_REGEX_ONIG, TOK_ISOLATED, false, where, st);
}

static enum status_code load_metaspace(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    struct tok_pre pre = {.type = TOK_PRE_METASPACE, .scheme = TOK_PREPEND_ALWAYS};
    const char *mark, *scheme = "always";
    size_t n, scheme_len;
    bool split = true, prefix_space = true;
    enum status_code rc = tok_json_string(obj, where, "replacement", &mark, &n, st);
    if (rc == ST_OK && json_object_get(obj, "prepend_scheme"))
        rc = tok_json_string(obj, where, "prepend_scheme", &scheme, &scheme_len, st);
    if (rc == ST_OK)
        rc = tok_json_bool_opt(obj, where, "split", &split, st);
    if (rc == ST_OK)
        rc = tok_json_bool_opt(obj, where, "add_prefix_space", &prefix_space, st);
    if (rc != ST_OK)
        return rc;
    if (n == 0 || n != tok_utf8_len((unsigned char)mark[0]))
        return status_set(st, ST_DATA_LOSS, "%s.replacement: expected one character", where);
    if (strcmp(scheme, "first") == 0)
        pre.scheme = TOK_PREPEND_FIRST;
    else if (strcmp(scheme, "never") == 0)
        pre.scheme = TOK_PREPEND_NEVER;
    else if (strcmp(scheme, "always") != 0)
        return status_set(st, ST_UNIMPLEMENTED, "%s.prepend_scheme: '%s' is not supported", where, scheme);
    if (!prefix_space && pre.scheme != TOK_PREPEND_NEVER)
        return status_set(st, ST_DATA_LOSS, "%s.add_prefix_space: false, but prepend_scheme is '%s'", where, scheme);
    /* What counts as first is the place in the text as given: steps that put something in front would shift it. */
    bool shifted = t->n_norms > 0;
    for (size_t i = 0; i < t->n_pres; i++)
        shifted = shifted || t->pres[i].type != TOK_PRE_SPLIT;
    if (pre.scheme == TOK_PREPEND_FIRST && shifted)
        return status_set(st, ST_UNIMPLEMENTED, "%s.prepend_scheme: 'first' behind steps that change the text", where);
    if (t->n_pres == TOK_MAX_STEPS)
        return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d pre-tokenizers", where, TOK_MAX_STEPS);
    memcpy(pre.mark, mark, n);
    pre.mark_len = (unsigned)n;
    t->pres[t->n_pres++] = pre;
    if (!split)
        return ST_OK;
    return add_split(t, mark, n, TOK_REGEX_LITERAL, TOK_MERGED_WITH_NEXT, false, where, st);
}

static enum status_code load_one(void *arg, const json_t *obj, const char *type, const char *where, struct status *st)
{
    struct tokenizer *t = arg;
    /* ByteLevel turns every byte into a character; here words stay raw bytes and BPE knows. That holds for the last
     * step only: another one behind it would have to see the characters. */
    if (t->byte_level)
        return status_set(st, ST_UNIMPLEMENTED, "%s: '%s' behind ByteLevel is not supported", where, type);
    if (strcmp(type, "Split") == 0)
        return load_split(t, obj, where, st);
    if (strcmp(type, "ByteLevel") == 0)
        return load_byte_level(t, obj, where, st);
    if (strcmp(type, "Metaspace") == 0)
        return load_metaspace(t, obj, where, st);
    if (strcmp(type, "Digits") == 0) {
        bool individual;
        enum status_code rc = tok_json_bool(obj, where, "individual_digits", &individual, st);
        if (rc != ST_OK)
            return rc;
        return add_split(t, "\\p{N}", 5, TOK_REGEX_ONIG, individual ? TOK_ISOLATED : TOK_CONTIGUOUS, false, where, st);
    }
    if (strcmp(type, "WhitespaceSplit") == 0)
        return add_split(t, "\\s", 2, TOK_REGEX_ONIG, TOK_REMOVED, false, where, st);
    return status_set(st, ST_UNIMPLEMENTED, "%s.type: '%s' is not supported", where, type);
}

enum status_code tok_pre_load(struct tokenizer *t, const json_t *obj, struct status *st)
{
    if (!obj || json_is_null(obj))
        return ST_OK;
    return tok_json_flatten(obj, "pre_tokenizer", "pretokenizers", load_one, t, st);
}

void tok_pre_free(struct tok_pre *pre)
{
    tok_regex_free(pre->re);
}

/* --- running ---------------------------------------------------------------------------------------------------- */

/* The pieces of one text in order, matches and what lies between; joined as the behaviour wants and handed on. */
struct splitter {
    const struct tokenizer *t;
    struct tok_ctx *ctx;
    size_t step;
    const char *s;
    bool at_start;
    size_t from, to; /* a piece held back; from == to: none, unless held */
    bool held, last_match;
};

static enum status_code hand_on(struct splitter *sp, size_t from, size_t to, struct status *st)
{
    if (from == to)
        return ST_OK; /* empty pieces vanish */
    return tok_pre_run(sp->t, sp->ctx, sp->step + 1, sp->s + from, to - from, sp->at_start && from == 0, st);
}

static enum status_code release(struct splitter *sp, struct status *st)
{
    bool held = sp->held;
    sp->held = false;
    return held ? hand_on(sp, sp->from, sp->to, st) : ST_OK;
}

static enum status_code piece(struct splitter *sp, enum tok_behavior behavior, size_t from, size_t to, bool is_match,
                              struct status *st)
{
    bool join; /* with the piece held back */
    switch (behavior) {
    case TOK_REMOVED:
        return is_match ? ST_OK : hand_on(sp, from, to, st);
    case TOK_ISOLATED:
        return hand_on(sp, from, to, st);
    case TOK_CONTIGUOUS:
        join = is_match == sp->last_match;
        break;
    case TOK_MERGED_WITH_PREVIOUS:
        join = is_match && !sp->last_match;
        break;
    default:
        join = sp->last_match && !is_match;
        break;
    }
    sp->last_match = is_match;
    if (join && sp->held) {
        sp->to = to;
        return ST_OK;
    }
    enum status_code rc = release(sp, st);
    sp->held = true;
    sp->from = from;
    sp->to = to;
    return rc;
}

static enum status_code run_split(const struct tokenizer *t, struct tok_ctx *ctx, size_t step, const char *s, size_t n,
                                  bool at_start, struct status *st)
{
    const struct tok_pre *pre = &t->pres[step];
    struct splitter sp = {.t = t, .ctx = ctx, .step = step, .s = s, .at_start = at_start};
    size_t done = 0, start, end;
    bool found = true;
    enum status_code rc = ST_OK;
    const char *subject = s;
    if (!tok_regex_subject(pre->re, &ctx->step[step], &subject, n))
        return status_nomem(st, "tokenizer scratch", n);
    struct tok_regex_iter it = {.re = pre->re, .s = subject, .len = n, .last_end = TOK_NO_MATCH};
    while (rc == ST_OK) {
        rc = tok_regex_next(&it, ctx->match, &start, &end, &found, st);
        if (rc != ST_OK || !found)
            break;
        if (start != done)
            rc = piece(&sp, pre->behavior, done, start, pre->invert, st);
        if (rc == ST_OK)
            rc = piece(&sp, pre->behavior, start, end, !pre->invert, st);
        done = end;
    }
    if (rc == ST_OK && done != n)
        rc = piece(&sp, pre->behavior, done, n, pre->invert, st);
    return rc == ST_OK ? release(&sp, st) : rc;
}

static enum status_code run_prefix_space(const struct tokenizer *t, struct tok_ctx *ctx, size_t step, const char *s,
                                         size_t n, bool at_start, struct status *st)
{
    struct tok_buf *b = &ctx->step[step];
    if (s[0] == ' ')
        return tok_pre_run(t, ctx, step + 1, s, n, at_start, st);
    b->len = 0;
    if (!tok_buf_add(b, " ", 1) || !tok_buf_add(b, s, n))
        return status_nomem(st, "tokenizer scratch", n);
    return tok_pre_run(t, ctx, step + 1, b->data, b->len, at_start, st);
}

static enum status_code run_metaspace(const struct tokenizer *t, struct tok_ctx *ctx, size_t step, const char *s,
                                      size_t n, bool at_start, struct status *st)
{
    const struct tok_pre *pre = &t->pres[step];
    struct tok_buf *b = &ctx->step[step];
    bool marked = s[0] == ' ' || (n >= pre->mark_len && memcmp(s, pre->mark, pre->mark_len) == 0);
    bool ok = true;
    b->len = 0;
    if (!marked && (pre->scheme == TOK_PREPEND_ALWAYS || (pre->scheme == TOK_PREPEND_FIRST && at_start)))
        ok = tok_buf_add(b, pre->mark, pre->mark_len);
    while (ok && n) {
        const char *space = memchr(s, ' ', n);
        size_t len = space ? (size_t)(space - s) : n;
        ok = tok_buf_add(b, s, len) && (!space || tok_buf_add(b, pre->mark, pre->mark_len));
        s += len + (space != NULL);
        n -= len + (space != NULL);
    }
    if (!ok)
        return status_nomem(st, "tokenizer scratch", b->len + n);
    return tok_pre_run(t, ctx, step + 1, b->data, b->len, at_start, st);
}

enum status_code tok_pre_run(const struct tokenizer *t, struct tok_ctx *ctx, size_t step, const char *s, size_t n,
                             bool at_start, struct status *st)
{
    if (n == 0)
        return ST_OK;
    if (step == t->n_pres)
        return tok_bpe_run(t, ctx, s, n, st);
    switch (t->pres[step].type) {
    case TOK_PRE_SPLIT:
        return run_split(t, ctx, step, s, n, at_start, st);
    case TOK_PRE_PREFIX_SPACE:
        return run_prefix_space(t, ctx, step, s, n, at_start, st);
    default:
        return run_metaspace(t, ctx, step, s, n, at_start, st);
    }
}
