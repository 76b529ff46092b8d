/* Expressions, by recursive descent. Precedence is Jinja's own, not Python's: filters and tests bind tighter than unary
 * minus' operand would suggest, ~ stands between + and *, and ** is left-associative.
 *
 *   tuple > if-else > or > and > not > compare > + - > ~ > * / // % > ** > unary > primary, postfix, filters, tests */
#include <stdio.h>
#include <string.h>

#include "coordinator/jinja_internal.h"

struct jj_node *jj_node(struct jj_parser *p, enum jj_kind kind)
{
    struct jj_node *n = jj_alloc(&p->job, sizeof *n);
    n->kind = kind;
    n->line = p->t->line;
    return n;
}

/* ---- tokens ---- */

bool jj_at(const struct jj_parser *p, enum jj_token_kind kind, const char *text)
{
    return p->t->kind == kind && (!text || jj_str_is(p->t->text, text));
}

bool jj_skip(struct jj_parser *p, enum jj_token_kind kind, const char *text)
{
    if (!jj_at(p, kind, text))
        return false;
    p->t++;
    p->job.line = p->t->line;
    return true;
}

void jj_unexpected(struct jj_parser *p, const char *expected)
{
    static const char *const kinds[] = {
        "the end of the template", "text", "{%", "%}", "{{", "}}", NULL, "a string", NULL, NULL, NULL};
    const struct jj_token *t = p->t;
    const char *kind = kinds[t->kind];
    p->job.line = t->line;
    if (kind)
        jj_fail(&p->job, ST_INVALID_ARGUMENT, "%s, expected %s", kind, expected);
    jj_fail(&p->job, ST_INVALID_ARGUMENT, "\"%.*s\", expected %s", (int)(t->text.n < 60 ? t->text.n : 60), t->text.s,
            expected);
}

void jj_expect(struct jj_parser *p, enum jj_token_kind kind, const char *text, const char *where)
{
    char expected[96] = "";
    struct jj_buf b = {.s = expected, .cap = sizeof expected, .max = sizeof expected - 1};
    if (jj_skip(p, kind, text))
        return;
    jj_puts(&p->job, &b, kind == TOK_TAG_END ? "%}" : kind == TOK_VAR_END ? "}}" : text ? text : "a name");
    jj_puts(&p->job, &b, " ");
    jj_puts(&p->job, &b, where);
    jj_unexpected(p, expected);
}

struct jj_str jj_expect_name(struct jj_parser *p, const char *what)
{
    struct jj_str name = p->t->text;
    if (!jj_skip(p, TOK_NAME, NULL))
        jj_unexpected(p, what);
    return name;
}

/* ---- small parts ---- */

static struct jj_node *constant(struct jj_parser *p, struct jj_value v)
{
    struct jj_node *n = jj_node(p, N_CONST);
    n->value = v;
    p->t++;
    return n;
}

/* Behind the opening bracket, up to and with the closing one. */
static struct jj_node *list_until(struct jj_parser *p, const char *close)
{
    struct jj_node *first = NULL, **end = &first;
    while (!jj_skip(p, TOK_OP, close)) {
        *end = jj_parse_expr(p);
        end = &(*end)->next;
        if (!jj_skip(p, TOK_OP, ",") && !jj_at(p, TOK_OP, close))
            jj_unexpected(p, strcmp(close, "]") == 0 ? "\",\" or \"]\"" : "\",\" or \")\"");
    }
    return first;
}

static struct jj_node *dict(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_DICT), **end = &n->list;
    while (!jj_skip(p, TOK_OP, "}")) {
        *end = jj_parse_expr(p);
        end = &(*end)->next;
        jj_expect(p, TOK_OP, ":", "behind the key of a dictionary");
        *end = jj_parse_expr(p);
        end = &(*end)->next;
        if (!jj_skip(p, TOK_OP, ",") && !jj_at(p, TOK_OP, "}"))
            jj_unexpected(p, "\",\" or \"}\"");
    }
    return n;
}

static struct jj_node *parenthesis(struct jj_parser *p)
{
    struct jj_node *n;
    if (jj_skip(p, TOK_OP, ")")) {
        n = jj_node(p, N_LIST);
        n->value = jj_bool(true);
        return n;
    }
    n = jj_parse_tuple(p, true);
    jj_expect(p, TOK_OP, ")", "at the end of the parenthesis");
    return n;
}

static struct jj_node *strings(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_CONST);
    struct jj_buf b = {0};
    for (; p->t->kind == TOK_STR; p->t++)
        jj_put(&p->job, &b, p->t->text.s, p->t->text.n);
    n->value = jj_buf_value(&b);
    return n;
}

struct jj_node *jj_parse_primary(struct jj_parser *p)
{
    struct jj_str t = p->t->text;
    struct jj_node *n;
    switch (p->t->kind) {
    case TOK_NAME:
        if (jj_str_is(t, "true") || jj_str_is(t, "True") || jj_str_is(t, "false") || jj_str_is(t, "False"))
            return constant(p, jj_bool(t.s[0] == 't' || t.s[0] == 'T'));
        if (jj_str_is(t, "none") || jj_str_is(t, "None"))
            return constant(p, jj_none());
        n = jj_node(p, N_NAME);
        n->name = t;
        p->t++;
        return n;
    case TOK_STR:
        return strings(p);
    case TOK_INT:
        return constant(p, jj_int(p->t->i));
    case TOK_FLOAT:
        return constant(p, (struct jj_value){.type = JJ_FLOAT, .u.f = p->t->f});
    default:
        break;
    }
    if (jj_skip(p, TOK_OP, "("))
        return parenthesis(p);
    if (jj_skip(p, TOK_OP, "[")) {
        n = jj_node(p, N_LIST);
        n->list = list_until(p, "]");
        return n;
    }
    if (jj_skip(p, TOK_OP, "{"))
        return dict(p);
    jj_unexpected(p, "an expression");
}

/* ---- postfix ---- */

static void call_args(struct jj_parser *p, struct jj_node *n)
{
    struct jj_node **end = &n->list, **named = &n->named;
    while (!jj_skip(p, TOK_OP, ")")) {
        if (jj_at(p, TOK_OP, "*") || jj_at(p, TOK_OP, "**"))
            jj_fail(&p->job, ST_UNIMPLEMENTED, "arguments with * and ** are not supported");
        if (p->t->kind == TOK_NAME && p->t[1].kind == TOK_OP && jj_str_is(p->t[1].text, "=")) {
            *named = jj_node(p, N_NAMED);
            (*named)->name = p->t->text;
            p->t += 2;
            (*named)->a = jj_parse_expr(p);
            named = &(*named)->next;
        } else {
            if (n->named)
                jj_unexpected(p, "a named argument behind named ones");
            *end = jj_parse_expr(p);
            end = &(*end)->next;
        }
        if (!jj_skip(p, TOK_OP, ",") && !jj_at(p, TOK_OP, ")"))
            jj_unexpected(p, "\",\" or \")\"");
    }
}

/* Behind [. */
static struct jj_node *subscript(struct jj_parser *p, struct jj_node *of)
{
    struct jj_node *part[3] = {NULL, NULL, NULL}, *n;
    unsigned parts = 0;
    bool slice = false;
    for (;;) {
        if (!jj_at(p, TOK_OP, ":") && !jj_at(p, TOK_OP, "]"))
            part[parts] = jj_parse_expr(p);
        if (!jj_at(p, TOK_OP, ":") || parts == 2)
            break;
        p->t++;
        slice = true;
        parts++;
    }
    n = jj_node(p, slice ? N_SLICE : N_ITEM);
    jj_expect(p, TOK_OP, "]", "at the end of the index");
    if (!slice && !part[0])
        jj_fail(&p->job, ST_INVALID_ARGUMENT, "[]: expected an index");
    n->a = of;
    n->b = part[0];
    n->x = part[1];
    n->y = part[2];
    return n;
}

static struct jj_node *postfix(struct jj_parser *p, struct jj_node *n)
{
    for (;;) {
        struct jj_node *of = n;
        if (jj_skip(p, TOK_OP, ".")) {
            n = jj_node(p, N_ATTR);
            n->a = of;
            if (p->t->kind == TOK_INT) { /* a.0 */
                n->kind = N_ITEM;
                n->b = constant(p, jj_int(p->t->i));
            } else {
                n->name = jj_expect_name(p, "a name behind \".\"");
            }
        } else if (jj_skip(p, TOK_OP, "[")) {
            n = subscript(p, of);
        } else if (jj_at(p, TOK_OP, "(")) {
            n = jj_node(p, N_CALL);
            p->t++;
            n->a = of;
            call_args(p, n);
        } else {
            return n;
        }
    }
}

static struct jj_str missing(struct jj *c, const struct jj_node *n)
{
    struct jj_buf b = {0};
    jj_puts(c, &b, n->kind == N_FILTER ? "the filter \"" : "the test \"is ");
    jj_put(c, &b, n->name.s, n->name.n < 60 ? n->name.n : 60);
    jj_puts(c, &b, "\" is not supported");
    return jj_buf_value(&b).u.str;
}

void jj_not_supported(struct jj *c, const struct jj_node *n)
{
    struct jj_str s = missing(c, n);
    c->line = n->line;
    jj_fail(c, ST_UNIMPLEMENTED, "%.*s", (int)s.n, s.s);
}

/* As Jinja2 has it: within an if it is only missed when it is reached. */
static void note_missing(struct jj_parser *p, const struct jj_node *n)
{
    char line[32];
    if (p->ifs == 0)
        jj_not_supported(&p->job, n);
    if (p->lacks.n)
        return;
    struct jj_buf b = {0};
    struct jj_str s = missing(&p->job, n);
    snprintf(line, sizeof line, "line %u: ", n->line);
    jj_puts(&p->job, &b, line);
    jj_put(&p->job, &b, s.s, s.n);
    jj_put(&p->job, &b, "", 1); /* NUL */
    p->lacks = jj_buf_value(&b).u.str;
}

static struct jj_node *filter(struct jj_parser *p, struct jj_node *of)
{
    struct jj_node *n = jj_node(p, N_FILTER);
    n->name = jj_expect_name(p, "the name of a filter");
    n->a = of;
    n->builtin = jj_find_filter(n->name);
    if (!n->builtin)
        note_missing(p, n);
    if (jj_skip(p, TOK_OP, "("))
        call_args(p, n);
    return n;
}

static bool starts_operand(const struct jj_parser *p)
{
    static const char *const words[] = {"else", "or", "and", "is", "if", "in", "not"};
    switch (p->t->kind) {
    case TOK_STR:
    case TOK_INT:
    case TOK_FLOAT:
        return true;
    case TOK_NAME:
        for (size_t i = 0; i < sizeof words / sizeof *words; i++)
            if (jj_str_is(p->t->text, words[i]))
                return false;
        return true;
    default:
        return jj_at(p, TOK_OP, "[") || jj_at(p, TOK_OP, "{");
    }
}

/* Behind `is`. */
static struct jj_node *test(struct jj_parser *p, struct jj_node *of)
{
    struct jj_node *n = jj_node(p, N_TEST);
    bool negated = jj_skip(p, TOK_NAME, "not");
    n->name = jj_expect_name(p, "the name of a test");
    n->a = of;
    n->builtin = jj_find_test(n->name);
    if (!n->builtin)
        note_missing(p, n);
    if (jj_skip(p, TOK_OP, "("))
        call_args(p, n);
    else if (starts_operand(p))
        n->list = postfix(p, jj_parse_primary(p));
    if (!negated)
        return n;
    struct jj_node *inverse = jj_node(p, N_NOT);
    inverse->a = n;
    return inverse;
}

/* Filters, tests and calls behind an operand; first: the name of a filter comes at once, as in {% filter upper %}. */
struct jj_node *jj_parse_filters(struct jj_parser *p, struct jj_node *of, bool first)
{
    if (first)
        of = filter(p, of);
    for (;;) {
        if (jj_skip(p, TOK_OP, "|")) {
            of = filter(p, of);
        } else if (!first && jj_skip(p, TOK_NAME, "is")) {
            of = test(p, of);
        } else if (!first && jj_at(p, TOK_OP, "(")) {
            of = postfix(p, of);
        } else {
            return of;
        }
    }
}

/* ---- operators ---- */

static struct jj_node *unary(struct jj_parser *p, bool with_filters)
{
    struct jj_node *n;
    jj_enter(&p->job);
    if (jj_at(p, TOK_OP, "-") || jj_at(p, TOK_OP, "+")) {
        n = jj_node(p, p->t->text.s[0] == '-' ? N_NEG : N_POS);
        p->t++;
        n->a = unary(p, false);
    } else {
        n = jj_parse_primary(p);
    }
    n = postfix(p, n);
    if (with_filters)
        n = jj_parse_filters(p, n, false);
    p->job.depth--;
    return n;
}

struct level {
    const char *text;
    enum jj_op op;
};

/* From the loosest to the tightest. */
static const struct level levels[4][5] = {
    {{"+", OP_ADD}, {"-", OP_SUB}},
    {{"~", OP_CAT}},
    {{"*", OP_MUL}, {"/", OP_DIV}, {"//", OP_FLOOR}, {"%", OP_MOD}},
    {{"**", OP_POW}},
};

static struct jj_node *binary(struct jj_parser *p, unsigned level)
{
    if (level == 4)
        return unary(p, true);
    struct jj_node *left = binary(p, level + 1);
    for (;;) {
        const struct level *l = levels[level];
        while (l->text && !jj_at(p, TOK_OP, l->text))
            l++;
        if (!l->text)
            return left;
        struct jj_node *n = jj_node(p, N_BINARY);
        p->t++;
        n->op = l->op;
        n->a = left;
        n->b = binary(p, level + 1);
        left = n;
    }
}

static bool compare_op(struct jj_parser *p, enum jj_op *op)
{
    static const struct level ops[] = {{"==", OP_EQ}, {"!=", OP_NE}, {"<=", OP_LE},
                                       {">=", OP_GE}, {"<", OP_LT},  {">", OP_GT}};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (jj_skip(p, TOK_OP, ops[i].text)) {
            *op = ops[i].op;
            return true;
        }
    *op = OP_IN;
    if (jj_skip(p, TOK_NAME, "in"))
        return true;
    *op = OP_NOT_IN;
    if (jj_at(p, TOK_NAME, "not") && p->t[1].kind == TOK_NAME && jj_str_is(p->t[1].text, "in")) {
        p->t += 2;
        return true;
    }
    return false;
}

static struct jj_node *compare(struct jj_parser *p)
{
    struct jj_node *first = binary(p, 0), *n = NULL, **end = NULL;
    enum jj_op op;
    while (compare_op(p, &op)) {
        if (!n) {
            n = jj_node(p, N_COMPARE);
            n->a = first;
            end = &n->list;
        }
        *end = jj_node(p, N_OPERAND);
        (*end)->op = op;
        (*end)->a = binary(p, 0);
        end = &(*end)->next;
    }
    return n ? n : first;
}

static struct jj_node *negation(struct jj_parser *p)
{
    struct jj_node *n;
    if (!jj_at(p, TOK_NAME, "not"))
        return compare(p);
    jj_enter(&p->job);
    n = jj_node(p, N_NOT);
    p->t++;
    n->a = negation(p);
    p->job.depth--;
    return n;
}

static struct jj_node *logical(struct jj_parser *p, bool or)
{
    struct jj_node *left = or ? logical(p, false) : negation(p);
    while (jj_skip(p, TOK_NAME, or ? "or" : "and")) {
        struct jj_node *n = jj_node(p, or ? N_OR : N_AND);
        n->a = left;
        n->b = or ? logical(p, false) : negation(p);
        left = n;
    }
    return left;
}

static struct jj_node *conditional(struct jj_parser *p, bool may)
{
    jj_enter(&p->job);
    struct jj_node *n = logical(p, true);
    while (may && jj_skip(p, TOK_NAME, "if")) {
        struct jj_node *choice = jj_node(p, N_IF_EXPR);
        choice->a = n;
        choice->b = logical(p, true);
        if (jj_skip(p, TOK_NAME, "else"))
            choice->x = conditional(p, true);
        n = choice;
    }
    p->job.depth--;
    return n;
}

struct jj_node *jj_parse_expr(struct jj_parser *p)
{
    return conditional(p, true);
}

static bool ends_tuple(const struct jj_parser *p)
{
    return p->t->kind == TOK_TAG_END || p->t->kind == TOK_VAR_END || jj_at(p, TOK_OP, ")");
}

struct jj_node *jj_parse_tuple(struct jj_parser *p, bool may)
{
    struct jj_node *first = conditional(p, may), *n, **end;
    if (!jj_at(p, TOK_OP, ","))
        return first;
    n = jj_node(p, N_LIST);
    n->value = jj_bool(true);
    n->list = first;
    end = &first->next;
    while (jj_skip(p, TOK_OP, ",")) {
        if (ends_tuple(p))
            break;
        *end = conditional(p, may);
        end = &(*end)->next;
    }
    return n;
}
