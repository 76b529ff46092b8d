/* Regular expressions of tokenizer.json on PCRE2.
 *
 * The library compiles them with Oniguruma in Ruby's syntax; most, not all, of it means the same in PCRE2. translate()
 * lets through what does, rewrites what has another spelling, and refuses the rest by name: a pattern that splits
 * slightly otherwise would give wrong ids silently.
 *
 *   \s \S        White_Space; PCRE2's own \s also takes U+180E
 *   \w           Alphabetic, M, Nd, Pc and six of Latin-1; PCRE2's \w is L, N and _
 *   \p{Han}      the script; PCRE2 means Script_Extensions, hence \p{sc:Han}
 *   \v           U+000B; any vertical space in PCRE2
 *   \h           a hex digit in Oniguruma: refused         ^ $ \b \G \R ...   refused
 *   x{2}+ x{2}?  not possessive, not lazy in Ruby: refused  (?i) &&, back-references, some nested classes: refused
 */
#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* Backtracking steps before a match is given up, and how many more for each byte of the text: a pattern like \s*\n
 * takes a step for every blank of a stretch. A pattern that explodes needs more for any limit. */
#define MATCH_LIMIT     10000000u
#define STEPS_PER_BYTE  4u
#define HEAP_LIMIT_KIB  65536u /* of the interpreter */
#define MAX_PATTERN_LEN 65536u

struct tok_regex {
    pcre2_code *code;
    bool jit;
    bool stand_ins; /* newer characters are searched as older ones of their kind */
};

struct tok_match {
    pcre2_match_data *data;
    pcre2_match_context *limits;
};

#define SPACE_ITEM  "\\p{White_Space}"
#define WORD_ITEMS  "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"
#define WORD_LATIN1 "\\xb2\\xb3\\xb9\\xbc-\\xbe" /* Oniguruma outside of a class, not in one */

struct translation {
    const char *p;
    size_t len, i;
    struct tok_buf out;
    bool in_class, nomem;
};

static void put(struct translation *tr, const char *s, size_t n)
{
    if (!tok_buf_add(&tr->out, s, n))
        tr->nomem = true;
}

static void puts_text(struct translation *tr, const char *s)
{
    put(tr, s, strlen(s));
}

static enum status_code refuse(const struct translation *tr, const char *what, struct status *st)
{
    return status_set(st, ST_UNIMPLEMENTED, "regex: %s at byte %zu is not supported", what, tr->i);
}

static char peek(const struct translation *tr, size_t ahead)
{
    return tr->i + ahead < tr->len ? tr->p[tr->i + ahead] : '\0';
}

static bool is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

/* \x{...}, \xHH below 0x80, \uHHHH; tr->i is at the x or u. */
static enum status_code translate_hex(struct translation *tr, struct status *st)
{
    char digits[9];
    size_t n = 0, i = tr->i + 1;
    bool braced = tr->p[tr->i] == 'x' && peek(tr, 1) == '{';
    size_t max = braced ? 8 : tr->p[tr->i] == 'u' ? 4 : 2;
    i += braced;
    while (n < max && i < tr->len && is_hex(tr->p[i]))
        digits[n++] = tr->p[i++];
    digits[n] = '\0';
    if (n == 0 || (braced && (i >= tr->len || tr->p[i] != '}')) || (tr->p[tr->i] == 'u' && n != 4))
        return refuse(tr, "this \\x or \\u", st);
    if (!braced && tr->p[tr->i] == 'x' && strtoul(digits, NULL, 16) >= 0x80)
        return refuse(tr, "\\xHH of a byte above 7F", st);
    tr->i = i + braced;
    puts_text(tr, "\\x{");
    puts_text(tr, digits);
    puts_text(tr, "}");
    return ST_OK;
}

/* \p{...}: one or two letters are a general category, a longer name is taken for a script. tr->i is at the p. */
static enum status_code translate_property(struct translation *tr, struct status *st)
{
    const char *name = tr->p + tr->i + 2;
    const char *close = peek(tr, 1) == '{' ? memchr(tr->p + tr->i, '}', tr->len - tr->i) : NULL;
    if (!close)
        return refuse(tr, "\\p without {name}", st);
    size_t n = (size_t)(close - name);
    bool negated = n && name[0] == '^';
    put(tr, (char[]){'\\', tr->p[tr->i], '{'}, 3);
    if (negated)
        put(tr, "^", 1);
    if (n - negated > 2)
        puts_text(tr, "sc:");
    put(tr, name + negated, n - negated);
    put(tr, "}", 1);
    tr->i = (size_t)(close + 1 - tr->p);
    return ST_OK;
}

/* tr->i is at the character behind the backslash. */
static enum status_code translate_escape(struct translation *tr, struct status *st)
{
    char c = peek(tr, 0);
    switch (c) {
    case '\0':
        return refuse(tr, "a backslash at the end", st);
    case 's':
        puts_text(tr, SPACE_ITEM);
        break;
    case 'S':
        puts_text(tr, "\\P{White_Space}");
        break;
    case 'w':
        puts_text(tr, tr->in_class ? WORD_ITEMS : "[" WORD_ITEMS WORD_LATIN1 "]");
        break;
    case 'W':
        if (tr->in_class)
            return refuse(tr, "\\W in a class", st);
        puts_text(tr, "[^" WORD_ITEMS WORD_LATIN1 "]");
        break;
    case 'v':
        puts_text(tr, "\\x0b");
        break;
    case 'd':
    case 'D':
    case 'n':
    case 'r':
    case 't':
    case 'f':
    case 'a':
    case 'e':
        put(tr, (char[]){'\\', c}, 2);
        break;
    case 'A':
    case 'z':
        if (tr->in_class)
            return refuse(tr, "an anchor in a class", st);
        put(tr, (char[]){'\\', c}, 2);
        break;
    case 'p':
    case 'P':
        return translate_property(tr, st);
    case 'x':
    case 'u':
        return translate_hex(tr, st);
    default:
        if ((unsigned char)c >= 0x80 || c < '!' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') ||
            (c >= 'a' && c <= 'z')) {
            char what[TOK_QUOTE_MAX];
            snprintf(what, sizeof what, c >= '!' && c <= '~' ? "\\%c" : "this escape", c);
            return refuse(tr, what, st);
        }
        put(tr, (char[]){'\\', c}, 2);
    }
    tr->i++;
    return ST_OK;
}

/* A class in a class adds its members: its brackets go. tr->i is at either of them; a '-' beside it could become a range
 * that is none. */
static enum status_code translate_inner_bracket(struct translation *tr, struct status *st)
{
    bool open = tr->p[tr->i] == '[';
    if (open && (peek(tr, 1) == '^' || peek(tr, 1) == ']' || peek(tr, 1) == ':'))
        return refuse(tr, "a class in a class that is negated, empty or named", st);
    if (tr->p[tr->i - 1] == '-' || peek(tr, 1) == '-')
        return refuse(tr, "'-' beside a class in a class", st);
    tr->i++;
    return ST_OK;
}

/* tr->i is behind the opening bracket. */
static enum status_code translate_class(struct translation *tr, struct status *st)
{
    enum status_code rc = ST_OK;
    unsigned depth = 1;
    put(tr, "[", 1);
    tr->in_class = true;
    if (peek(tr, 0) == '^') {
        put(tr, "^", 1);
        tr->i++;
    }
    if (peek(tr, 0) == ']')
        return refuse(tr, "']' as first member of a class", st);
    while (rc == ST_OK && tr->i < tr->len) {
        char c = tr->p[tr->i];
        if (c == ']' && --depth == 0)
            break;
        if (c == '[' || c == ']') {
            depth += c == '[';
            rc = translate_inner_bracket(tr, st);
        } else if (c == '&' && peek(tr, 1) == '&') {
            rc = refuse(tr, "'&&' in a class", st);
        } else if (c == '\\') {
            tr->i++;
            rc = translate_escape(tr, st);
        } else {
            put(tr, &c, 1);
            tr->i++;
        }
    }
    if (rc == ST_OK && tr->i == tr->len)
        rc = status_set(st, ST_DATA_LOSS, "regex: a class is not closed");
    if (rc != ST_OK)
        return rc;
    put(tr, "]", 1);
    tr->in_class = false;
    tr->i++;
    return ST_OK;
}

/* tr->i is at the opening parenthesis. */
static enum status_code translate_group(struct translation *tr, struct status *st)
{
    static const char *const known[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
    if (peek(tr, 1) == '*')
        return refuse(tr, "'(*'", st);
    if (peek(tr, 1) != '?') {
        put(tr, "(", 1);
        tr->i++;
        return ST_OK;
    }
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        size_t n = strlen(known[k]);
        if (tr->len - tr->i >= n && memcmp(tr->p + tr->i, known[k], n) == 0) {
            put(tr, known[k], n);
            tr->i += n;
            return ST_OK;
        }
    }
    return refuse(tr, "this kind of '(?' group", st);
}

/* tr->i is at the opening brace: an interval, or in both syntaxes a plain character. */
static enum status_code translate_brace(struct translation *tr, struct status *st)
{
    size_t i = tr->i + 1;
    while (i < tr->len && ((tr->p[i] >= '0' && tr->p[i] <= '9') || tr->p[i] == ','))
        i++;
    if (i >= tr->len || tr->p[i] != '}' || i == tr->i + 1)
        return refuse(tr, "'{' that is no interval", st);
    if (tr->p[tr->i + 1] == ',')
        return refuse(tr, "'{,n}'", st);
    if (i + 1 < tr->len && (tr->p[i + 1] == '+' || tr->p[i + 1] == '?' || tr->p[i + 1] == '*'))
        return refuse(tr, "an interval with a quantifier behind it", st);
    put(tr, tr->p + tr->i, i + 1 - tr->i);
    tr->i = i + 1;
    return ST_OK;
}

static enum status_code translate(struct translation *tr, struct status *st)
{
    enum status_code rc = ST_OK;
    while (rc == ST_OK && tr->i < tr->len) {
        char c = tr->p[tr->i];
        switch (c) {
        case '\\':
            tr->i++;
            rc = translate_escape(tr, st);
            break;
        case '[':
            tr->i++;
            rc = translate_class(tr, st);
            break;
        case '(':
            rc = translate_group(tr, st);
            break;
        case '{':
            rc = translate_brace(tr, st);
            break;
        case '^':
        case '$':
            rc = refuse(tr, c == '^' ? "'^'" : "'$'", st);
            break;
        default:
            put(tr, &c, 1);
            tr->i++;
        }
    }
    if (rc == ST_OK && tr->nomem)
        rc = status_nomem(st, "regex", tr->len);
    return rc;
}

static enum status_code compile(struct tok_regex *re, const char *pattern, size_t len, uint32_t options,
                                struct status *st)
{
    enum status_code rc = ST_OK;
    pcre2_compile_context *cc = pcre2_compile_context_create(NULL);
    if (!cc) {
        rc = status_nomem(st, "regex", 0);
        goto done;
    }
    pcre2_set_newline(cc, PCRE2_NEWLINE_LF); /* what '.' stops at */
    int err;
    PCRE2_SIZE at;
    re->code = pcre2_compile((PCRE2_SPTR)pattern, len, options, &err, &at, cc);
    if (!re->code) {
        PCRE2_UCHAR text[128];
        pcre2_get_error_message(err, text, sizeof text);
        char quoted[TOK_QUOTE_MAX];
        rc = status_set(st, err == PCRE2_ERROR_UNKNOWN_UNICODE_PROPERTY ? ST_UNIMPLEMENTED : ST_DATA_LOSS,
                        "regex %s: %s at byte %zu of its PCRE2 form", tok_quote(quoted, pattern, len),
                        (const char *)text, (size_t)at);
        goto done;
    }
    /* Where the system forbids code made at run time, the interpreter does it, some ten times slower. */
    re->jit = pcre2_jit_compile(re->code, PCRE2_JIT_COMPLETE) == 0;
done:
    pcre2_compile_context_free(cc);
    return rc;
}

enum status_code tok_regex_create(struct tok_regex **out, const char *pattern, size_t len, enum tok_regex_syntax syntax,
                                  struct status *st)
{
    if (len > MAX_PATTERN_LEN)
        return status_set(st, ST_UNIMPLEMENTED, "regex: %zu bytes, expected at most %u", len, MAX_PATTERN_LEN);
    enum status_code rc = ST_OK;
    struct translation tr = {.p = pattern, .len = len};
    struct tok_regex *re = calloc(1, sizeof *re);
    if (!re)
        return status_nomem(st, "regex", sizeof *re);
    uint32_t options = PCRE2_UTF | PCRE2_NO_UTF_CHECK;
    if (syntax == TOK_REGEX_LITERAL) {
        rc = compile(re, pattern, len, options | PCRE2_LITERAL, st);
    } else {
        options |= PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
        if (syntax == TOK_REGEX_ONIG) {
            struct tok_buf copy = {0};
            const char *same = pattern;
            rc = tok_stand_in(&copy, &same, len) ? translate(&tr, st) : status_nomem(st, "regex", len);
            re->stand_ins = same == pattern; /* a pattern that spells such a character means that one alone */
            tok_buf_free(&copy);
        } else {
            re->stand_ins = syntax == TOK_REGEX_PCRE;
            if (!tok_buf_add(&tr.out, pattern, len))
                rc = status_nomem(st, "regex", len);
        }
        if (rc == ST_OK)
            rc = compile(re, tr.out.data ? tr.out.data : "", tr.out.len, options, st);
    }
    tok_buf_free(&tr.out);
    if (rc != ST_OK) {
        tok_regex_free(re);
        return rc;
    }
    *out = re;
    return ST_OK;
}

void tok_regex_free(struct tok_regex *re)
{
    if (!re)
        return;
    pcre2_code_free(re->code);
    free(re);
}

bool tok_regex_subject(const struct tok_regex *re, struct tok_buf *copy, const char **s, size_t n)
{
    return !re->stand_ins || tok_stand_in(copy, s, n);
}

struct tok_match *tok_match_create(void)
{
    struct tok_match *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->data = pcre2_match_data_create(1, NULL);
    m->limits = pcre2_match_context_create(NULL);
    if (!m->data || !m->limits) {
        tok_match_free(m);
        return NULL;
    }
    pcre2_set_heap_limit(m->limits, HEAP_LIMIT_KIB);
    return m;
}

void tok_match_free(struct tok_match *m)
{
    if (!m)
        return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->limits);
    free(m);
}

static int match_at(const struct tok_regex *re, const char *s, size_t len, size_t pos, struct tok_match *m)
{
    size_t most = (UINT32_MAX - MATCH_LIMIT) / STEPS_PER_BYTE;
    pcre2_set_match_limit(m->limits, MATCH_LIMIT + STEPS_PER_BYTE * (uint32_t)(len < most ? len : most));
    if (re->jit) {
        int rc = pcre2_jit_match(re->code, (PCRE2_SPTR)s, len, pos, 0, m->data, m->limits);
        if (rc != PCRE2_ERROR_JIT_STACKLIMIT)
            return rc;
    }
    /* The interpreter keeps its backtracking on the heap, within the limits. */
    return pcre2_match(re->code, (PCRE2_SPTR)s, len, pos, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->data, m->limits);
}

enum status_code tok_regex_next(struct tok_regex_iter *it, struct tok_match *m, size_t *start, size_t *end, bool *found,
                                struct status *st)
{
    while (it->pos <= it->len) {
        int rc = match_at(it->re, it->s, it->len, it->pos, m);
        if (rc == PCRE2_ERROR_NOMATCH)
            break;
        if (rc == PCRE2_ERROR_NOMEMORY)
            return status_nomem(st, "regex match", 0);
        if (rc < 0)
            return status_set(st, ST_INVALID_ARGUMENT,
                              "text: a regex of tokenizer.json gives up, as it would take too many steps (PCRE2 %d)",
                              rc);
        const PCRE2_SIZE *ov = pcre2_get_ovector_pointer(m->data);
        if (ov[0] == ov[1] && ov[1] == it->last_end) { /* an empty match right behind the last one does not count */
            it->pos += it->pos < it->len ? tok_utf8_len((unsigned char)it->s[it->pos]) : 1;
            continue;
        }
        it->pos = it->last_end = ov[1];
        *start = ov[0];
        *end = ov[1];
        *found = true;
        return ST_OK;
    }
    *found = false;
    return ST_OK;
}
