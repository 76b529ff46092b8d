/* Source to tokens. White space is dealt with here, as Jinja does with trim_blocks and lstrip_blocks:
 *
 *   {%- and -%}   eat all white space before and after
 *   {% and {#     eat the blanks before them when nothing else stands on their line; {%+ does not
 *   %} and #}     eat one newline behind them; +%} does not
 *   the newline at the end of the source is dropped, \r\n and \r are newlines */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/jinja_internal.h"

struct lex {
    struct jj *c;
    const char *s;
    size_t n, at;
    struct jj_token *tokens;
    size_t count, cap;
    bool line_starts; /* what was read last ended with a newline */
};

static struct jj_token *push(struct lex *x, enum jj_token_kind kind, const char *s, size_t n)
{
    if (x->count == x->cap) {
        size_t cap = x->cap ? 2 * x->cap : 256;
        struct jj_token *t = jj_alloc(x->c, cap * sizeof *t);
        if (x->count)
            memcpy(t, x->tokens, x->count * sizeof *t);
        x->tokens = t;
        x->cap = cap;
    }
    struct jj_token *t = &x->tokens[x->count++];
    *t = (struct jj_token){.kind = kind, .line = x->c->line, .text = {s, n}};
    return t;
}

static void advance(struct lex *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x->c->line += x->s[x->at + i] == '\n';
    x->at += n;
}

static bool starts(const struct lex *x, size_t at, const char *text)
{
    size_t n = strlen(text);
    return x->n - at >= n && memcmp(x->s + at, text, n) == 0;
}

static size_t spaces_from(const struct lex *x, size_t at)
{
    size_t bytes = 0, from = at;
    while (at < x->n && jj_is_space(jj_char_at((struct jj_str){x->s, x->n}, at, &bytes)))
        at += bytes;
    return at - from;
}

/* The text before a tag at `end`; sign is what stands behind the tag's first two characters. */
static void put_text(struct lex *x, size_t end, char sign, bool variable)
{
    struct jj_str text = {x->s + x->at, end - x->at};
    bool line_starts = x->line_starts;
    if (text.n)
        line_starts = text.s[text.n - 1] == '\n';
    if (sign == '-') {
        text = jj_strip(text, JJ_RIGHT, NULL);
    } else if (sign != '+' && !variable) {
        size_t last = text.n;
        while (last > 0 && text.s[last - 1] != '\n')
            last--;
        bool blank = last > 0 || x->line_starts;
        struct jj_str tail = {text.s + last, text.n - last};
        if (blank && jj_strip(tail, JJ_LEFT, NULL).n == 0)
            text.n = last;
    }
    if (text.n)
        push(x, TOK_TEXT, text.s, text.n);
    advance(x, end - x->at);
    x->line_starts = line_starts;
}

/* Behind the two characters that end a tag or a comment, whose sign was read. */
static void eat_after(struct lex *x, char sign, bool variable)
{
    size_t n = 0;
    if (sign == '-')
        n = spaces_from(x, x->at);
    else if (sign != '+' && !variable && x->at < x->n && x->s[x->at] == '\n')
        n = 1;
    x->line_starts = n > 0 && x->s[x->at + n - 1] == '\n';
    advance(x, n);
}

static void comment(struct lex *x)
{
    size_t end = x->at + 2;
    while (end < x->n && !starts(x, end, "#}"))
        end++;
    if (end == x->n)
        jj_fail(x->c, ST_INVALID_ARGUMENT, "the comment {# does not end with #}");
    char sign = end > x->at + 2 ? x->s[end - 1] : '\0';
    advance(x, end + 2 - x->at);
    eat_after(x, sign == '-' || sign == '+' ? sign : '\0', false);
}

/* Length of `{% word %}` at `at`, 0 when something else stands there. */
static size_t lone_tag(const struct lex *x, size_t at, const char *word, char *before, char *after)
{
    size_t i = at + 2;
    *before = *after = '\0';
    if (!starts(x, at, "{%"))
        return 0;
    if (i < x->n && (x->s[i] == '-' || x->s[i] == '+'))
        *before = x->s[i++];
    i += spaces_from(x, i);
    if (!starts(x, i, word))
        return 0;
    i += strlen(word);
    i += spaces_from(x, i);
    if (i < x->n && (x->s[i] == '-' || x->s[i] == '+'))
        *after = x->s[i++];
    return starts(x, i, "%}") ? i + 2 - at : 0;
}

/* {% raw %} ... {% endraw %}. */
static void raw(struct lex *x, size_t tag_bytes, char after)
{
    char before = '\0';
    size_t end = 0, n = 0;
    advance(x, tag_bytes);
    if (after == '-')
        advance(x, spaces_from(x, x->at));
    x->line_starts = false;
    for (end = x->at; end < x->n && !(n = lone_tag(x, end, "endraw", &before, &after)); end++)
        ;
    if (n == 0)
        jj_fail(x->c, ST_INVALID_ARGUMENT, "{%% raw %%} does not end with {%% endraw %%}");
    put_text(x, end, before, false);
    advance(x, n);
    eat_after(x, after, false);
}

/* ---- inside a tag ---- */

static void string(struct lex *x)
{
    char quote = x->s[x->at];
    size_t end = x->at + 1;
    struct jj_buf b = {0};
    while (end < x->n && x->s[end] != quote)
        end += x->s[end] == '\\' ? 2 : 1;
    if (end >= x->n)
        jj_fail(x->c, ST_INVALID_ARGUMENT, "a string does not end");
    for (size_t i = x->at + 1; i < end; i++) {
        static const char from[] = "ntr\\'\"abfv\n", to[] = "\n\t\r\\'\"\a\b\f\v";
        if (x->s[i] != '\\') {
            jj_put(x->c, &b, x->s + i, 1);
            continue;
        }
        char e = x->s[++i];
        const char *known = e ? strchr(from, e) : NULL;
        size_t digits = e == 'x' ? 2 : e == 'u' ? 4 : e == 'U' ? 8 : 0;
        if (e == '\n') {
            continue;
        } else if (known) {
            jj_put(x->c, &b, &to[known - from], 1);
        } else if (digits) {
            char hex[9] = "", utf8[4], *stop = NULL;
            if (i + digits < end)
                memcpy(hex, x->s + i + 1, digits);
            unsigned long code = strtoul(hex, &stop, 16);
            if (strlen(hex) != digits || *stop || hex[0] == '-' || hex[0] == '+' || code > 0x10ffff ||
                (code >= 0xd800 && code < 0xe000))
                jj_fail(x->c, ST_INVALID_ARGUMENT, "\\%c in a string, expected %zu hexadecimal digits of a character",
                        e, digits);
            jj_put(x->c, &b, utf8, jj_put_char(utf8, (uint32_t)code));
            i += digits;
        } else if (e >= '0' && e <= '7') {
            jj_fail(x->c, ST_UNIMPLEMENTED, "an octal escape in a string is not supported");
        } else { /* Python keeps the backslash */
            jj_put(x->c, &b, x->s + i - 1, 2);
        }
    }
    struct jj_value v = jj_buf_value(&b);
    push(x, TOK_STR, v.u.str.s, v.u.str.n);
    advance(x, end + 1 - x->at);
}

static bool is_digit(char ch)
{
    return ch >= '0' && ch <= '9';
}

static bool is_name(char ch, bool first)
{
    return (ch >= 'a' && ch <= 'z') || (ch >= 'A' && ch <= 'Z') || ch == '_' || (!first && is_digit(ch));
}

static void number(struct lex *x)
{
    char text[64];
    size_t n = 0, i = x->at;
    bool real = false;
    for (; i < x->n && n < sizeof text - 1; i++) {
        char ch = x->s[i];
        bool digit_next = i + 1 < x->n && is_digit(x->s[i + 1]);
        bool sign_next = i + 2 < x->n && (x->s[i + 1] == '-' || x->s[i + 1] == '+') && is_digit(x->s[i + 2]);
        if (ch == '_' && digit_next)
            continue;
        if (is_digit(ch)) {
            text[n++] = ch;
        } else if (ch == '.' && digit_next && !real) {
            real = true;
            text[n++] = ch;
        } else if ((ch == 'e' || ch == 'E') && (digit_next || sign_next) && !memchr(text, 'e', n)) {
            real = true;
            text[n++] = 'e';
            if (sign_next && n < sizeof text - 1)
                text[n++] = x->s[++i];
        } else {
            break;
        }
    }
    text[n] = '\0';
    errno = 0;
    struct jj_token *t = push(x, real ? TOK_FLOAT : TOK_INT, x->s + x->at, i - x->at);
    if (real)
        t->f = strtod(text, NULL);
    else
        t->i = strtoll(text, NULL, 10);
    if (errno || n == sizeof text - 1 || (i < x->n && is_name(x->s[i], false)))
        jj_fail(x->c, ST_INVALID_ARGUMENT, "\"%.*s\": no number that can be held", (int)(i - x->at), x->s + x->at);
    advance(x, i - x->at);
}

static void operator(struct lex *x)
{
    static const char *const two[] = {"==", "!=", "<=", ">=", "//", "**"};
    for (size_t i = 0; i < sizeof two / sizeof *two; i++)
        if (starts(x, x->at, two[i])) {
            push(x, TOK_OP, two[i], 2);
            advance(x, 2);
            return;
        }
    char ch = x->s[x->at];
    if (!ch || !strchr("+-*/%~<>=|.,:()[]{}", ch))
        jj_fail(x->c, ST_INVALID_ARGUMENT, "\"%.*s\" in a tag: not part of the language",
                (int)((unsigned char)ch >= 0x80 ? 4 : 1), x->s + x->at);
    push(x, TOK_OP, x->s + x->at, 1);
    advance(x, 1);
}

static void inside(struct lex *x, bool variable)
{
    const char *end = variable ? "}}" : "%}";
    uint32_t opened = x->c->line, depth = 0;
    push(x, variable ? TOK_VAR : TOK_TAG, x->s + x->at, 2);
    advance(x, 2);
    if (x->at < x->n && (x->s[x->at] == '-' || x->s[x->at] == '+'))
        advance(x, 1);
    for (;;) {
        advance(x, spaces_from(x, x->at));
        if (x->at >= x->n) {
            x->c->line = opened;
            jj_fail(x->c, ST_INVALID_ARGUMENT, "a tag does not end with %s", end);
        }
        char ch = x->s[x->at];
        bool sign = (ch == '-' || (ch == '+' && !variable)) && starts(x, x->at + 1, end);
        /* inside of brackets }} ends dictionaries */
        if (depth == 0 && (sign || starts(x, x->at, end))) {
            push(x, variable ? TOK_VAR_END : TOK_TAG_END, x->s + x->at, 2);
            advance(x, sign ? 3 : 2);
            eat_after(x, sign ? ch : '\0', variable);
            return;
        }
        if (ch == '\'' || ch == '"') {
            string(x);
        } else if (is_digit(ch)) {
            number(x);
        } else if (is_name(ch, true)) {
            size_t i = x->at;
            while (i < x->n && is_name(x->s[i], false))
                i++;
            push(x, TOK_NAME, x->s + x->at, i - x->at);
            advance(x, i - x->at);
        } else {
            depth += ch == '(' || ch == '[' || ch == '{';
            depth -= depth > 0 && (ch == ')' || ch == ']' || ch == '}');
            operator(x);
        }
    }
}

/* ---- the whole ---- */

static void normalize(struct lex *x, const char *source, size_t bytes)
{
    char *s = jj_alloc(x->c, bytes + 1);
    size_t n = 0;
    for (size_t i = 0; i < bytes; i++) {
        if (source[i] == '\r') {
            s[n++] = '\n';
            i += i + 1 < bytes && source[i + 1] == '\n';
        } else {
            s[n++] = source[i];
        }
    }
    if (n > 0 && s[n - 1] == '\n')
        n--;
    x->s = s;
    x->n = n;
}

struct jj_token *jj_lex(struct jj *c, const char *source, size_t bytes)
{
    struct lex x = {.c = c, .line_starts = true};
    normalize(&x, source, bytes);
    while (x.at < x.n) {
        size_t at = x.at;
        while (at < x.n && !(x.s[at] == '{' && at + 1 < x.n && strchr("%{#", x.s[at + 1]) && x.s[at + 1]))
            at++;
        char sign = at + 2 < x.n ? x.s[at + 2] : '\0', before = '\0', after = '\0';
        bool variable = at < x.n && x.s[at + 1] == '{';
        put_text(&x, at, at < x.n ? sign : '+', variable);
        if (at == x.n)
            break;
        size_t n = 0;
        if (x.s[at + 1] == '#')
            comment(&x);
        else if (!variable && (n = lone_tag(&x, at, "raw", &before, &after)))
            raw(&x, n, after);
        else
            inside(&x, variable);
    }
    push(&x, TOK_END, "", 0);
    return x.tokens;
}
