/* The pre-tokenizer: splits a segment into the words that BPE works on. Each step hands its pieces straight to the next
 * one; steps that change the text write into a buffer of their own, which stays as it is until all pieces are done. */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <string.h>

/* GPT-2's, built into ByteLevel. */
#define GPT2_SPLIT "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* What a name stands for that has no parameters but perhaps a behaviour: matches of a pattern. */
#define WORD_CLASS "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}"
/* The library knows digits of Unicode 17. */
#define NUMBER "[\\p{N}\\x{11DE0}-\\x{11DE9}\\x{16FF4}-\\x{16FF6}]"
/* Its punctuation is that of Unicode 8 and all of ASCII's symbols. */
#define LATE_PUNCTUATION                                                                                               \
    "[\\x{61D}\\x{9FD}\\x{A76}\\x{C77}\\x{C84}\\x{1B4E}-\\x{1B4F}\\x{1B7D}-\\x{1B7F}\\x{2E43}-\\x{2E5D}\\x{10D6E}"     \
    "\\x{10EAD}\\x{10ED0}\\x{10F55}-\\x{10F59}\\x{10F86}-\\x{10F89}\\x{113D4}-\\x{113D8}\\x{1144B}-\\x{1144F}\\x{"     \
    "1145A}-\\x{1145D}"                                                                                                \
    "\\x{11660}-\\x{1166C}\\x{116B9}\\x{1183B}\\x{11944}-\\x{11946}\\x{119E2}\\x{11A3F}-\\x{11A46}\\x{11A9A}-\\x{"     \
    "11A9C}"                                                                                                           \
    "\\x{11A9E}-\\x{11AA2}\\x{11B00}-\\x{11B09}\\x{11BE1}\\x{11C41}-\\x{11C45}\\x{11C70}-\\x{11C71}\\x{11EF7}-\\x{"    \
    "11EF8}"                                                                                                           \
    "\\x{11F43}-\\x{11F4F}\\x{11FFF}\\x{12FF1}-\\x{12FF2}\\x{16D6D}-\\x{16D6F}\\x{16E97}-\\x{16E9A}\\x{16FE2}\\x{"     \
    "1E5FF}"                                                                                                           \
    "\\x{1E95E}-\\x{1E95F}]"
#define PUNCTUATION "(?!" LATE_PUNCTUATION ")[\\p{P}$+<=>^`|~\\x{166D}\\x{111C9}]"

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
        shifted = shifted || (t->pres[i].type != TOK_PRE_SPLIT && t->pres[i].type != TOK_PRE_LENGTH);
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

static enum status_code add_step(struct tokenizer *t, const struct tok_pre *pre, const char *where, struct status *st)
{
    if (t->n_pres == TOK_MAX_STEPS)
        return status_set(st, ST_UNIMPLEMENTED, "%s: more than %d pre-tokenizers", where, TOK_MAX_STEPS);
    t->pres[t->n_pres++] = *pre;
    return ST_OK;
}

static enum status_code load_digits(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    bool individual;
    enum status_code rc = tok_json_bool(obj, where, "individual_digits", &individual, st);
    if (rc != ST_OK)
        return rc;
    return add_split(t, NUMBER, sizeof NUMBER - 1, TOK_REGEX_PCRE, individual ? TOK_ISOLATED : TOK_CONTIGUOUS, false,
                     where, st);
}

static enum status_code load_punctuation(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    enum tok_behavior behavior = TOK_ISOLATED;
    if (json_object_get(obj, "behavior")) {
        enum status_code rc = get_behavior(obj, where, &behavior, st);
        if (rc != ST_OK)
            return rc;
    }
    return add_split(t, PUNCTUATION, sizeof PUNCTUATION - 1, TOK_REGEX_EXACT, behavior, false, where, st);
}

static enum status_code load_whitespace(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    static const char words[] = "[" WORD_CLASS "]+|[^" WORD_CLASS "\\p{White_Space}]+";
    (void)obj;
    return add_split(t, words, sizeof words - 1, TOK_REGEX_PCRE, TOK_REMOVED, true, where, st);
}

static enum status_code load_spaces(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    (void)obj;
    return add_split(t, "\\s", 2, TOK_REGEX_ONIG, TOK_REMOVED, false, where, st);
}

static enum status_code load_bert(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    enum status_code rc = load_spaces(t, obj, where, st);
    if (rc != ST_OK)
        return rc;
    return add_split(t, PUNCTUATION, sizeof PUNCTUATION - 1, TOK_REGEX_EXACT, TOK_ISOLATED, false, where, st);
}

static enum status_code load_delimiter(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    const char *s;
    size_t n;
    enum status_code rc = tok_json_string(obj, where, "delimiter", &s, &n, st);
    if (rc == ST_OK && (n == 0 || n != tok_utf8_len((unsigned char)s[0])))
        rc = status_set(st, ST_DATA_LOSS, "%s.delimiter: expected one character", where);
    return rc == ST_OK ? add_split(t, s, n, TOK_REGEX_LITERAL, TOK_REMOVED, false, where, st) : rc;
}

static enum status_code load_length(struct tokenizer *t, const json_t *obj, const char *where, struct status *st)
{
    struct tok_pre pre = {.type = TOK_PRE_LENGTH};
    enum status_code rc = tok_json_uint(json_object_get(obj, "length"), where, "length", UINT32_MAX, &pre.length, st);
    if (rc == ST_OK && pre.length == 0)
        rc = status_set(st, ST_DATA_LOSS, "%s.length: 0, expected 1 at least", where);
    return rc == ST_OK ? add_step(t, &pre, where, st) : rc;
}

static enum status_code load_one(void *arg, const json_t *obj, const char *type, const char *where, struct status *st)
{
    typedef enum status_code loader(struct tokenizer *, const json_t *, const char *, struct status *);
    static const struct {
        const char *type;
        loader *load;
    } loaders[] = {
        {"Split", load_split},           {"ByteLevel", load_byte_level},
        {"Metaspace", load_metaspace},   {"Digits", load_digits},
        {"Whitespace", load_whitespace}, {"WhitespaceSplit", load_spaces},
        {"BertPreTokenizer", load_bert}, {"Punctuation", load_punctuation},
        {"FixedLength", load_length},    {"CharDelimiterSplit", load_delimiter},
    };
    struct tokenizer *t = arg;
    size_t k = 0;
    while (k < sizeof loaders / sizeof *loaders && strcmp(type, loaders[k].type) != 0)
        k++;
    if (k == sizeof loaders / sizeof *loaders)
        return status_set(st, ST_UNIMPLEMENTED, "%s.type: '%s' is not supported", where, type);
    /* ByteLevel turns every byte into a character; behind the last step words stay raw bytes instead and BPE knows. A
     * step behind it has to see the characters. */
    if (t->byte_level) {
        const struct tok_pre chars = {.type = TOK_PRE_BYTE_CHARS};
        enum status_code rc = add_step(t, &chars, where, st);
        if (rc != ST_OK)
            return rc;
        t->byte_level = false;
    }
    return loaders[k].load(t, obj, where, st);
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

static enum status_code run_length(const struct tokenizer *t, struct tok_ctx *ctx, size_t step, const char *s, size_t n,
                                   bool at_start, struct status *st)
{
    enum status_code rc = ST_OK;
    for (size_t i = 0; rc == ST_OK && i < n;) {
        size_t end = i;
        for (uint32_t k = 0; k < t->pres[step].length && end < n; k++)
            end += tok_utf8_len((unsigned char)s[end]);
        rc = tok_pre_run(t, ctx, step + 1, s + i, end - i, at_start && i == 0, st);
        i = end;
    }
    return rc;
}

static enum status_code run_byte_chars(const struct tokenizer *t, struct tok_ctx *ctx, size_t step, const char *s,
                                       size_t n, bool at_start, struct status *st)
{
    struct tok_buf *b = &ctx->step[step];
    b->len = 0;
    if (!tok_buf_reserve(b, n * 2))
        return status_nomem(st, "tokenizer scratch", n * 2);
    for (size_t i = 0; i < n; i++)
        b->len += tok_utf8_put(b->data + b->len, tok_char_of_byte((unsigned char)s[i]));
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
    case TOK_PRE_LENGTH:
        return run_length(t, ctx, step, s, n, at_start, st);
    case TOK_PRE_BYTE_CHARS:
        return run_byte_chars(t, ctx, step, s, n, at_start, st);
    case TOK_PRE_PREFIX_SPACE:
        return run_prefix_space(t, ctx, step, s, n, at_start, st);
    default:
        return run_metaspace(t, ctx, step, s, n, at_start, st);
    }
}
