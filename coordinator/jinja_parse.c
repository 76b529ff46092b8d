/* Statements. */
#include <string.h>

#include "coordinator/jinja_internal.h"

static struct jj_node *body(struct jj_parser *p, const char *const *ends);

/* The names that end a body; the tag's name is not read, what follows is up to who asked. */
#define ENDS(...) ((const char *const[]){__VA_ARGS__, NULL})

static void end_tag(struct jj_parser *p, const char *name)
{
    jj_expect(p, TOK_NAME, name, "");
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the tag");
}

static struct jj_node *names(struct jj_parser *p, const char *what)
{
    struct jj_node *first = NULL, **end = &first;
    bool bracket = jj_skip(p, TOK_OP, "(");
    do {
        if (first && p->t->kind != TOK_NAME)
            break; /* a comma behind the last */
        *end = jj_node(p, N_NAME);
        (*end)->name = jj_expect_name(p, what);
        end = &(*end)->next;
    } while (jj_skip(p, TOK_OP, ","));
    if (bracket)
        jj_expect(p, TOK_OP, ")", "at the end of the names");
    return first;
}

static struct jj_node *parse_for(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_FOR);
    n->named = names(p, "the name of the loop's variable");
    jj_expect(p, TOK_NAME, "in", "behind the loop's variable");
    n->a = jj_parse_tuple(p, false);
    if (jj_skip(p, TOK_NAME, "if"))
        n->b = jj_parse_expr(p);
    if (jj_at(p, TOK_NAME, "recursive"))
        jj_fail(&p->job, ST_UNIMPLEMENTED, "a recursive loop is not supported");
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the for");
    p->loops++;
    n->list = body(p, ENDS("else", "endfor"));
    p->loops--;
    if (jj_skip(p, TOK_NAME, "else")) {
        jj_expect(p, TOK_TAG_END, NULL, "behind else");
        n->other = body(p, ENDS("endfor"));
    }
    end_tag(p, "endfor");
    return n;
}

/* Behind `if` or `elif`. */
static struct jj_node *parse_if(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_IF);
    jj_enter(&p->job);
    p->ifs++;
    n->a = jj_parse_tuple(p, false);
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the if");
    n->list = body(p, ENDS("elif", "else", "endif"));
    if (jj_skip(p, TOK_NAME, "elif")) {
        n->other = parse_if(p);
    } else {
        if (jj_skip(p, TOK_NAME, "else")) {
            jj_expect(p, TOK_TAG_END, NULL, "behind else");
            n->other = body(p, ENDS("endif"));
        }
        end_tag(p, "endif");
    }
    p->ifs--;
    p->job.depth--;
    return n;
}

static struct jj_node *parse_set(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_SET);
    if (p->t->kind == TOK_NAME && p->t[1].kind == TOK_OP && jj_str_is(p->t[1].text, ".")) {
        n->kind = N_SET_ATTR;
        n->name = jj_expect_name(p, "a namespace");
        p->t++;
        struct jj_str attribute = jj_expect_name(p, "the name of an attribute");
        n->value = jj_string(attribute.s, attribute.n);
    } else {
        n->named = names(p, "the name to set");
    }
    if (jj_skip(p, TOK_OP, "=")) {
        n->a = jj_parse_tuple(p, true);
        jj_expect(p, TOK_TAG_END, NULL, "at the end of the set");
        return n;
    }
    if (n->kind == N_SET_ATTR || n->named->next)
        jj_unexpected(p, "\"=\"");
    n->kind = N_SET_BLOCK;
    if (jj_skip(p, TOK_OP, "|"))
        n->a = jj_parse_filters(p, NULL, true);
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the set");
    n->list = body(p, ENDS("endset"));
    end_tag(p, "endset");
    return n;
}

static struct jj_node *parse_macro(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_MACRO), **end = &n->named;
    n->name = jj_expect_name(p, "the name of the macro");
    jj_expect(p, TOK_OP, "(", "behind the macro's name");
    while (!jj_skip(p, TOK_OP, ")")) {
        *end = jj_node(p, N_NAMED);
        (*end)->name = jj_expect_name(p, "the name of a parameter");
        if (jj_skip(p, TOK_OP, "="))
            (*end)->a = jj_parse_expr(p);
        end = &(*end)->next;
        if (!jj_skip(p, TOK_OP, ",") && !jj_at(p, TOK_OP, ")"))
            jj_unexpected(p, "\",\" or \")\"");
    }
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the macro's head");
    uint32_t loops = p->loops;
    p->loops = 0;
    n->list = body(p, ENDS("endmacro"));
    p->loops = loops;
    if (p->t[1].kind == TOK_NAME) /* {% endmacro name %} */
        p->t++;
    p->t++;
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the macro");
    return n;
}

static struct jj_node *parse_with(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_WITH), **end = &n->named;
    while (!jj_at(p, TOK_TAG_END, NULL)) {
        *end = jj_node(p, N_NAMED);
        (*end)->name = jj_expect_name(p, "a name");
        jj_expect(p, TOK_OP, "=", "behind the name");
        (*end)->a = jj_parse_expr(p);
        end = &(*end)->next;
        if (!jj_skip(p, TOK_OP, ","))
            break;
    }
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the with");
    n->list = body(p, ENDS("endwith"));
    end_tag(p, "endwith");
    return n;
}

static struct jj_node *parse_filter_block(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_FILTER_BLOCK);
    n->a = jj_parse_filters(p, NULL, true);
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the filter");
    n->list = body(p, ENDS("endfilter"));
    end_tag(p, "endfilter");
    return n;
}

/* Marks what a model said, for training; the text is that of its body. */
static struct jj_node *parse_generation(struct jj_parser *p)
{
    struct jj_node *n = jj_node(p, N_WITH);
    jj_expect(p, TOK_TAG_END, NULL, "behind generation");
    uint32_t loops = p->loops;
    p->loops = 0; /* its body is a macro's: no loop around it is left from there */
    n->list = body(p, ENDS("endgeneration"));
    p->loops = loops;
    end_tag(p, "endgeneration");
    return n;
}

static struct jj_node *parse_jump(struct jj_parser *p, enum jj_kind kind)
{
    struct jj_node *n = jj_node(p, kind);
    if (p->loops == 0)
        jj_fail(&p->job, ST_INVALID_ARGUMENT, "{%% %s %%} outside of a loop", kind == N_BREAK ? "break" : "continue");
    jj_expect(p, TOK_TAG_END, NULL, "at the end of the tag");
    return n;
}

static struct jj_node *statement(struct jj_parser *p)
{
    struct jj_str name = jj_expect_name(p, "the name of a statement");
    if (jj_str_is(name, "for"))
        return parse_for(p);
    if (jj_str_is(name, "if"))
        return parse_if(p);
    if (jj_str_is(name, "set"))
        return parse_set(p);
    if (jj_str_is(name, "macro"))
        return parse_macro(p);
    if (jj_str_is(name, "with"))
        return parse_with(p);
    if (jj_str_is(name, "filter"))
        return parse_filter_block(p);
    if (jj_str_is(name, "generation"))
        return parse_generation(p);
    if (jj_str_is(name, "break"))
        return parse_jump(p, N_BREAK);
    if (jj_str_is(name, "continue"))
        return parse_jump(p, N_CONTINUE);
    bool end = (name.n > 3 && memcmp(name.s, "end", 3) == 0) || jj_str_is(name, "else") || jj_str_is(name, "elif");
    if (end)
        jj_fail(&p->job, ST_INVALID_ARGUMENT, "{%% %.*s %%} without a beginning", (int)(name.n < 60 ? name.n : 60),
                name.s);
    jj_fail(&p->job, ST_UNIMPLEMENTED, "{%% %.*s %%} is not supported", (int)(name.n < 60 ? name.n : 60), name.s);
}

static bool ends_body(struct jj_parser *p, const char *const *ends)
{
    if (p->t->kind != TOK_TAG)
        return false;
    for (size_t i = 0; ends[i]; i++)
        if (p->t[1].kind == TOK_NAME && jj_str_is(p->t[1].text, ends[i]))
            return true;
    return false;
}

/* Up to the tag that ends it, whose name is then the next token; ends NULL: the whole template. */
static struct jj_node *body(struct jj_parser *p, const char *const *ends)
{
    struct jj_node *first = NULL, **end = &first;
    uint32_t opened = p->job.line;
    jj_enter(&p->job);
    while (p->t->kind != TOK_END && !(ends && ends_body(p, ends))) {
        p->job.line = p->t->line;
        if (p->t->kind == TOK_TEXT) {
            *end = jj_node(p, N_TEXT);
            (*end)->name = p->t->text;
            p->t++;
        } else if (jj_skip(p, TOK_VAR, NULL)) {
            *end = jj_node(p, N_PRINT);
            (*end)->a = jj_parse_tuple(p, true);
            jj_expect(p, TOK_VAR_END, NULL, "at the end of the expression");
        } else {
            p->t++; /* TOK_TAG: the lexer makes nothing else here */
            *end = statement(p);
        }
        end = &(*end)->next;
    }
    if (ends && p->t->kind == TOK_END) {
        p->job.line = opened;
        jj_fail(&p->job, ST_INVALID_ARGUMENT, "the template ends, expected {%% %s %%}", ends[0]);
    }
    if (ends)
        p->t++;
    p->job.depth--;
    return first;
}

struct jj_node *jj_parse(struct jj_parser *p)
{
    return body(p, NULL);
}
