/* jinja_internal.h - between the files of the template engine. Prefix jj_.
 *
 *     jinja_lex.c     source -> tokens, whitespace control      jinja_value.c   values: text, equality, order, truth
 *     jinja_expr.c    tokens -> expressions                     jinja_eval.c    expressions -> values
 *     jinja_parse.c   tokens -> statements                      jinja_exec.c    statements -> output
 *     jinja.c         the public functions, memory, errors      jinja_{filter,test,method}.c   what templates call
 *
 * Errors leave by longjmp to the one setjmp of jinja_compile or jinja_render. That is safe because everything a job
 * makes lies in its arena, which ends with the job; nothing here owns any other resource. */
#ifndef TANDEM_JINJA_INTERNAL_H
#define TANDEM_JINJA_INTERNAL_H

#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/jinja.h"

#define JJ_MAX_DEPTH 400 /* of nesting in the source, of calls, of values */

/* ---- a job: one compile or one render ---- */

struct jj_block;

struct jj {
    jmp_buf out;
    struct status *st;
    struct jj_block *arena;
    size_t arena_bytes, arena_max;
    uint32_t line; /* of the source, for messages */
    uint32_t depth;
    uint64_t steps;
};

_Noreturn __attribute__((format(printf, 3, 4))) void jj_fail(struct jj *c, enum status_code code, const char *fmt, ...);
void *jj_alloc(struct jj *c, size_t bytes); /* zeroed, aligned for anything */
void jj_arena_free(struct jj_block *arena);
void jj_enter(struct jj *c); /* one level deeper; fails at JJ_MAX_DEPTH */
void jj_step(struct jj *c, uint64_t n);

/* ---- values: immutable, but for namespaces ---- */

enum jj_type {
    JJ_UNDEFINED,
    JJ_NONE,
    JJ_BOOL,
    JJ_INT,
    JJ_FLOAT,
    JJ_STRING,
    JJ_LIST,      /* and tuples, which differ in text and equality only */
    JJ_DICT,      /* keys are strings or integers, in order of insertion */
    JJ_NAMESPACE, /* a dict that {% set ns.x = %} changes */
    JJ_LOOP,
    JJ_CALLABLE,
};

struct jj_str {
    const char *s; /* not NUL-terminated */
    size_t n;
};

struct jj_value {
    enum jj_type type;
    bool safe; /* a string out of "safe" or "escape": "+" escapes the other side. Methods and other filters forget it */
    union {
        bool b;
        int64_t i;
        double f;
        struct jj_str str; /* of UNDEFINED: what is undefined */
        struct jj_list *list;
        struct jj_dict *dict;
        struct jj_loop *loop;
        struct jj_callable *call;
    } u;
};

struct jj_list {
    size_t n;
    struct jj_value *v;
    bool tuple;
};

struct jj_pair {
    struct jj_str key;
    struct jj_value value;
    bool whole; /* the key is the integer that is written there */
};

struct jj_dict {
    size_t n, cap;
    struct jj_pair *pair;
};

struct jj_loop {
    const struct jj_list *items;
    size_t index; /* from 0 */
};

struct jj_args {
    size_t n;
    struct jj_value *v;
    size_t n_kw;
    struct jj_pair *kw;
};

struct jj_render;

typedef struct jj_value jj_function(struct jj_render *r, struct jj_value self, const struct jj_args *args);

struct jj_callable {
    struct jj_str name;
    jj_function *fn; /* NULL: a macro */
    struct jj_value self;
    const struct jj_node *macro;
};

struct jj_value jj_bool(bool b);
struct jj_value jj_int(int64_t i);
struct jj_value jj_none(void);
struct jj_value jj_string(const char *s, size_t n); /* not copied */
struct jj_value jj_text(const char *s);             /* not copied */
struct jj_value jj_undefined(const char *s, size_t n);
struct jj_value jj_list(struct jj *c, size_t n);                                   /* of undefined, to be filled */
struct jj_value jj_pair_value(struct jj *c, struct jj_value a, struct jj_value b); /* a tuple of two */
struct jj_value jj_dict(struct jj *c);
void jj_dict_set(struct jj *c, struct jj_dict *d, struct jj_str key, struct jj_value v);
const struct jj_value *jj_dict_get(const struct jj_dict *d, struct jj_str key); /* NULL: not there */
/* The same for any key; set fails unless it is a string or an integer. */
void jj_dict_put(struct jj *c, struct jj_dict *d, const struct jj_value *key, struct jj_value v);
const struct jj_value *jj_dict_find(struct jj *c, const struct jj_dict *d, const struct jj_value *key);
struct jj_value jj_dict_key(const struct jj_dict *d, size_t i);
struct jj_value jj_from_json(struct jj *c, const json_t *j);

bool jj_str_is(struct jj_str s, const char *text);
bool jj_str_eq(struct jj_str a, struct jj_str b);
const char *jj_type_name(const struct jj_value *v); /* as Python says it */
bool jj_truth(struct jj *c, const struct jj_value *v);
bool jj_equal(struct jj *c, const struct jj_value *a, const struct jj_value *b);
int jj_order(struct jj *c, const struct jj_value *a, const struct jj_value *b); /* fails when they have no order */
bool jj_contains(struct jj *c, const struct jj_value *item, const struct jj_value *in);
double jj_number(struct jj *c, const struct jj_value *v, const char *what); /* bool, int, float */
int64_t jj_integer(struct jj *c, const struct jj_value *v, const char *what);
struct jj_str jj_need_string(struct jj *c, const struct jj_value *v, const char *what);
/* What a loop or a filter walks: elements, keys, or the characters of a string. */
struct jj_list *jj_iterate(struct jj *c, const struct jj_value *v);

/* ---- text that grows, in the arena ---- */

struct jj_buf {
    char *s;
    size_t n, cap;
    size_t max; /* 0: bounded by the arena only */
};

void jj_put(struct jj *c, struct jj_buf *b, const char *s, size_t n);
void jj_puts(struct jj *c, struct jj_buf *b, const char *s);
struct jj_value jj_buf_value(const struct jj_buf *b);
void jj_put_str(struct jj *c, struct jj_buf *b, const struct jj_value *v);  /* Python's str() */
void jj_put_repr(struct jj *c, struct jj_buf *b, const struct jj_value *v); /* Python's repr() */
/* json.dumps(v, ensure_ascii=False, indent=indent); indent below 0: none */
/* ascii: what is not is written \uXXXX */
void jj_put_json(struct jj *c, struct jj_buf *b, const struct jj_value *v, int indent, bool ascii);
/* For HTML; the result is safe. */
struct jj_value jj_escape(struct jj *c, struct jj_str s);
struct jj_str jj_to_str(struct jj *c, const struct jj_value *v);

/* UTF-8. A string that comes in is valid. */
uint32_t jj_char_at(struct jj_str s, size_t at, size_t *bytes);
size_t jj_put_char(char out[4], uint32_t code); /* bytes written */
bool jj_is_space(uint32_t code);                /* str.isspace() */
size_t jj_char_count(struct jj_str s);
enum jj_side { JJ_LEFT = 1, JJ_RIGHT = 2 };
struct jj_str jj_strip(struct jj_str s, unsigned sides, const struct jj_str *chars); /* NULL: white space */

/* ---- tokens ---- */

enum jj_token_kind {
    TOK_END,
    TOK_TEXT,
    TOK_TAG,
    TOK_TAG_END,
    TOK_VAR,
    TOK_VAR_END,
    TOK_NAME,
    TOK_STR,
    TOK_INT,
    TOK_FLOAT,
    TOK_OP
};

struct jj_token {
    enum jj_token_kind kind;
    uint32_t line;
    struct jj_str text; /* of a string: its value */
    int64_t i;
    double f;
};

/* The last is TOK_END. The texts point into the source or the arena. */
struct jj_token *jj_lex(struct jj *c, const char *source, size_t bytes);

/* ---- the tree ---- */

enum jj_kind {
    /* expressions */
    N_CONST,  /* value */
    N_NAME,   /* name */
    N_LIST,   /* list; a tuple when value is true */
    N_DICT,   /* list: key, value, key, value ... */
    N_ATTR,   /* a.name */
    N_ITEM,   /* a[b] */
    N_SLICE,  /* a[b:x:y] in b, x, y; any NULL */
    N_CALL,   /* a(list, named) */
    N_FILTER, /* name of a (list, named); a NULL in a {% filter %} block */
    N_TEST,   /* a is name(list, named) */
    N_NOT,
    N_NEG,
    N_POS,
    N_AND,
    N_OR,
    N_IF_EXPR, /* a if b else x */
    N_COMPARE, /* a, then list of N_OPERAND */
    N_OPERAND, /* op, a */
    N_BINARY,  /* a op b */
    N_NAMED,   /* name = a: an argument, or a parameter with its default */
    /* statements; a body is a list */
    N_TEXT,         /* name */
    N_PRINT,        /* a */
    N_FOR,          /* targets in named, a: over, b: if; list: body, other: else */
    N_IF,           /* a; list, other */
    N_SET,          /* targets in named, a */
    N_SET_BLOCK,    /* targets in named; a: a chain of N_FILTER or NULL; list */
    N_SET_ATTR,     /* name of the namespace, value.str the attribute, a */
    N_MACRO,        /* name; named: parameters; list */
    N_FILTER_BLOCK, /* a: a chain of N_FILTER; list */
    N_WITH,         /* named: assignments; list */
    N_BREAK,
    N_CONTINUE,
};

enum jj_op {
    OP_ADD,
    OP_SUB,
    OP_MUL,
    OP_DIV,
    OP_FLOOR,
    OP_MOD,
    OP_POW,
    OP_CAT,
    OP_EQ,
    OP_NE,
    OP_LT,
    OP_LE,
    OP_GT,
    OP_GE,
    OP_IN,
    OP_NOT_IN
};

struct jj_node {
    enum jj_kind kind;
    enum jj_op op;
    uint32_t line;
    struct jj_str name;
    struct jj_value value;
    const struct jj_builtin *builtin; /* of N_FILTER, N_TEST */
    struct jj_node *a, *b, *x, *y;
    struct jj_node *list, *other, *named;
    struct jj_node *next; /* in the list it stands in */
};

struct jj_parser {
    struct jj job;
    struct jj_token *t;  /* the next one */
    uint32_t loops;      /* we are inside of; break and continue need one */
    uint32_t ifs;        /* we are inside of: what is not supported there may never be reached */
    struct jj_str lacks; /* the first such thing, as a sentence */
};

struct jj_node *jj_parse(struct jj_parser *p);                         /* the whole template */
struct jj_node *jj_parse_expr(struct jj_parser *p);                    /* with `if else` */
struct jj_node *jj_parse_tuple(struct jj_parser *p, bool conditional); /* a, b: a list; one alone: itself */
struct jj_node *jj_parse_filters(struct jj_parser *p, struct jj_node *of, bool first);
struct jj_node *jj_parse_primary(struct jj_parser *p);
struct jj_node *jj_node(struct jj_parser *p, enum jj_kind kind);
bool jj_at(const struct jj_parser *p, enum jj_token_kind kind, const char *text); /* text NULL: any */
bool jj_skip(struct jj_parser *p, enum jj_token_kind kind, const char *text);
void jj_expect(struct jj_parser *p, enum jj_token_kind kind, const char *text, const char *where);
struct jj_str jj_expect_name(struct jj_parser *p, const char *what);
_Noreturn void jj_unexpected(struct jj_parser *p, const char *expected);
_Noreturn void jj_not_supported(struct jj *c, const struct jj_node *n); /* a filter or test without a builtin */

/* ---- a render ---- */

struct jj_frame { /* of names; the last one set wins */
    struct jj_frame *up;
    struct jj_dict *names;
};

struct jj_render {
    struct jj job;
    struct jj_buf *out;
    struct jj_frame *top; /* of the template */
    struct jj_frame *frame;
};

struct jj_value jj_eval(struct jj_render *r, const struct jj_node *n);
struct jj_value jj_attribute(struct jj_render *r, struct jj_value of, struct jj_str name);
struct jj_value jj_item(struct jj_render *r, struct jj_value of, struct jj_value key);
struct jj_value jj_call(struct jj_render *r, const struct jj_callable *f, const struct jj_args *args);
struct jj_value jj_filter_apply(struct jj_render *r, const struct jj_node *filter, struct jj_value of);
struct jj_value jj_call_macro(struct jj_render *r, const struct jj_callable *f, const struct jj_args *args);
void jj_set_name(struct jj_render *r, struct jj_str name, struct jj_value v);
void jj_exec(struct jj_render *r, const struct jj_node *list);

/* ---- what templates call ---- */

struct jj_builtin {
    const char *name;
    jj_function *fn;
};

const struct jj_builtin *jj_find_filter(struct jj_str name); /* NULL: not supported */
const struct jj_builtin *jj_find_test(struct jj_str name);
const struct jj_builtin *jj_find_global(struct jj_str name);
/* A method of the value; NULL: it has none of this name that is supported. *known: Python has it. */
const struct jj_builtin *jj_find_method(const struct jj_value *of, struct jj_str name, bool *known);

/* Argument by place or by name; fallback where there is none. */
struct jj_value jj_arg(const struct jj_args *args, size_t index, const char *name, struct jj_value fallback);
bool jj_has_arg(const struct jj_args *args, size_t index, const char *name);
/* Fails when there are more than max arguments by place. */
void jj_arg_count(struct jj_render *r, const struct jj_args *args, size_t max, const char *of);
struct jj_value jj_str_replace(struct jj *c, struct jj_str s, struct jj_str from, struct jj_str to, int64_t count);
jj_function jj_format;                                                /* str.format */
struct jj_value jj_str_case(struct jj *c, struct jj_str s, char how); /* 'u', 'l', 'c'apitalize, 't'itle */

#endif
