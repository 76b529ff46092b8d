/* Expressions to values. */
#include <math.h>
#include <string.h>

#include "coordinator/jinja_internal.h"

/* ---- names ---- */

static struct jj_value look_up(struct jj_render *r, struct jj_str name)
{
    for (const struct jj_frame *f = r->frame; f; f = f->up) {
        jj_step(&r->job, f->names->n / 8);
        const struct jj_value *v = jj_dict_get(f->names, name);
        if (v)
            return *v;
    }
    const struct jj_builtin *g = jj_find_global(name);
    if (!g)
        return jj_undefined(name.s, name.n);
    struct jj_callable *f = jj_alloc(&r->job, sizeof *f);
    *f = (struct jj_callable){.name = name, .fn = g->fn};
    return (struct jj_value){.type = JJ_CALLABLE, .u.call = f};
}

void jj_set_name(struct jj_render *r, struct jj_str name, struct jj_value v)
{
    jj_dict_set(&r->job, r->frame->names, name, v);
}

/* ---- parts of a value ---- */

static struct jj_value loop_part(struct jj_render *r, const struct jj_loop *l, struct jj_str name)
{
    int64_t n = (int64_t)l->items->n, i = (int64_t)l->index;
    if (jj_str_is(name, "index"))
        return jj_int(i + 1);
    if (jj_str_is(name, "index0"))
        return jj_int(i);
    if (jj_str_is(name, "revindex"))
        return jj_int(n - i);
    if (jj_str_is(name, "revindex0"))
        return jj_int(n - i - 1);
    if (jj_str_is(name, "first"))
        return jj_bool(i == 0);
    if (jj_str_is(name, "last"))
        return jj_bool(i == n - 1);
    if (jj_str_is(name, "length"))
        return jj_int(n);
    if (jj_str_is(name, "depth"))
        return jj_int(1); /* of a loop that is not recursive */
    if (jj_str_is(name, "depth0"))
        return jj_int(0);
    if (jj_str_is(name, "previtem"))
        return i > 0 ? l->items->v[i - 1] : jj_undefined("loop.previtem", 13);
    if (jj_str_is(name, "nextitem"))
        return i < n - 1 ? l->items->v[i + 1] : jj_undefined("loop.nextitem", 13);
    (void)r;
    return jj_undefined(name.s, name.n);
}

static _Noreturn void is_undefined(struct jj_render *r, const struct jj_value *v, struct jj_str part)
{
    jj_fail(&r->job, ST_INVALID_ARGUMENT, "'%.*s' is undefined, so it has no '%.*s'",
            (int)(v->u.str.n < 60 ? v->u.str.n : 60), v->u.str.s, (int)(part.n < 60 ? part.n : 60), part.s);
}

/* a.name: a method comes before an element, as in Python. */
struct jj_value jj_attribute(struct jj_render *r, struct jj_value of, struct jj_str name)
{
    bool known = false;
    if (of.type == JJ_UNDEFINED)
        is_undefined(r, &of, name);
    const struct jj_builtin *m = jj_find_method(&of, name, &known);
    if (m) {
        struct jj_callable *f = jj_alloc(&r->job, sizeof *f);
        *f = (struct jj_callable){.name = name, .fn = m->fn, .self = of};
        return (struct jj_value){.type = JJ_CALLABLE, .u.call = f};
    }
    if (known)
        jj_fail(&r->job, ST_UNIMPLEMENTED, "the method \"%.*s\" of a %s is not supported", (int)name.n, name.s,
                jj_type_name(&of));
    if (of.type == JJ_LOOP)
        return loop_part(r, of.u.loop, name);
    if (of.type == JJ_DICT || of.type == JJ_NAMESPACE) {
        jj_step(&r->job, of.u.dict->n / 8);
        const struct jj_value *v = jj_dict_get(of.u.dict, name);
        if (v)
            return *v;
    }
    return jj_undefined(name.s, name.n);
}

static struct jj_value sequence_item(struct jj_render *r, struct jj_value of, int64_t i)
{
    size_t n = of.type == JJ_LIST ? of.u.list->n : jj_char_count(of.u.str);
    if (i < 0)
        i += (int64_t)n;
    if (i < 0 || i >= (int64_t)n)
        return jj_undefined("an index past the end", 21);
    if (of.type == JJ_LIST)
        return of.u.list->v[i];
    size_t at = 0, bytes = 0;
    jj_step(&r->job, n / 16);
    for (jj_char_at(of.u.str, at, &bytes); i > 0; i--, jj_char_at(of.u.str, at, &bytes))
        at += bytes;
    return jj_string(of.u.str.s + at, bytes);
}

/* a[key] */
struct jj_value jj_item(struct jj_render *r, struct jj_value of, struct jj_value key)
{
    struct jj_str name = jj_to_str(&r->job, &key);
    if (of.type == JJ_UNDEFINED)
        is_undefined(r, &of, name);
    if ((of.type == JJ_LIST || of.type == JJ_STRING) && (key.type == JJ_INT || key.type == JJ_BOOL))
        return sequence_item(r, of, jj_integer(&r->job, &key, "index"));
    const struct jj_value *v = of.type == JJ_DICT ? jj_dict_find(&r->job, of.u.dict, &key) : NULL;
    if (v)
        return *v;
    if (key.type != JJ_STRING)
        return jj_undefined(name.s, name.n);
    return jj_attribute(r, of, name);
}

static int64_t bound(struct jj_render *r, const struct jj_node *n, int64_t length, bool back, int64_t fallback)
{
    struct jj_value v = n ? jj_eval(r, n) : jj_none();
    if (v.type == JJ_NONE)
        return fallback;
    int64_t i = jj_integer(&r->job, &v, "slice");
    if (i < 0)
        i = i < -length ? -1 : i + length;
    if (i < 0)
        return back ? -1 : 0;
    return i > length ? (back ? length - 1 : length) : back && i == length ? length - 1 : i;
}

static struct jj_value slice(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value of = jj_eval(r, n->a), step_value = n->y ? jj_eval(r, n->y) : jj_none();
    if (of.type != JJ_LIST && of.type != JJ_STRING && of.type != JJ_UNDEFINED)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "a slice of a %s, expected a list or a string", jj_type_name(&of));
    const struct jj_list *all = jj_iterate(&r->job, &of);
    int64_t step = step_value.type == JJ_NONE ? 1 : jj_integer(&r->job, &step_value, "slice"), count = 0;
    int64_t length = (int64_t)all->n;
    if (step == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "a slice with step 0");
    bool back = step < 0;
    int64_t from = bound(r, n->b, length, back, back ? length - 1 : 0);
    int64_t to = bound(r, n->x, length, back, back ? -1 : length);
    if (back ? from > to : from < to) /* unsigned: -INT64_MIN is no int64_t */
        count =
            (int64_t)(((uint64_t)(back ? from - to : to - from) - 1) / (back ? -(uint64_t)step : (uint64_t)step)) + 1;
    struct jj_value out = jj_list(&r->job, (size_t)count);
    for (int64_t i = 0; i < count; i++)
        out.u.list->v[i] = all->v[from + i * step];
    jj_step(&r->job, (uint64_t)count);
    out.u.list->tuple = all->tuple;
    if (of.type != JJ_STRING)
        return out;
    struct jj_buf b = {0};
    for (int64_t i = 0; i < count; i++)
        jj_put(&r->job, &b, out.u.list->v[i].u.str.s, out.u.list->v[i].u.str.n);
    return jj_buf_value(&b);
}

/* ---- calls ---- */

static void evaluate_args(struct jj_render *r, const struct jj_node *n, struct jj_args *args)
{
    for (const struct jj_node *a = n->list; a; a = a->next)
        args->n++;
    for (const struct jj_node *a = n->named; a; a = a->next)
        args->n_kw++;
    args->v = jj_alloc(&r->job, args->n * sizeof *args->v);
    args->kw = jj_alloc(&r->job, args->n_kw * sizeof *args->kw);
    size_t i = 0;
    for (const struct jj_node *a = n->list; a; a = a->next)
        args->v[i++] = jj_eval(r, a);
    i = 0;
    for (const struct jj_node *a = n->named; a; a = a->next)
        args->kw[i++] = (struct jj_pair){.key = a->name, .value = jj_eval(r, a->a)};
}

struct jj_value jj_arg(const struct jj_args *args, size_t index, const char *name, struct jj_value fallback)
{
    if (index < args->n)
        return args->v[index];
    for (size_t i = 0; name && i < args->n_kw; i++)
        if (jj_str_is(args->kw[i].key, name))
            return args->kw[i].value;
    return fallback;
}

bool jj_has_arg(const struct jj_args *args, size_t index, const char *name)
{
    struct jj_value none = {.type = JJ_CALLABLE, .u.call = NULL};
    struct jj_value v = jj_arg(args, index, name, none);
    return !(v.type == JJ_CALLABLE && !v.u.call);
}

void jj_arg_count(struct jj_render *r, const struct jj_args *args, size_t max, const char *of)
{
    if (args->n > max)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "%s: %zu arguments, expected at most %zu", of, args->n, max);
}

struct jj_value jj_call(struct jj_render *r, const struct jj_callable *f, const struct jj_args *args)
{
    jj_step(&r->job, 1);
    return f->fn ? f->fn(r, f->self, args) : jj_call_macro(r, f, args);
}

static struct jj_value call(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value f = jj_eval(r, n->a);
    struct jj_args args = {0};
    if (f.type == JJ_UNDEFINED)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "'%.*s' is undefined, it cannot be called",
                (int)(f.u.str.n < 60 ? f.u.str.n : 60), f.u.str.s);
    if (f.type != JJ_CALLABLE)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "a %s cannot be called", jj_type_name(&f));
    evaluate_args(r, n, &args);
    r->job.line = n->line;
    return jj_call(r, f.u.call, &args);
}

struct jj_value jj_filter_apply(struct jj_render *r, const struct jj_node *filter, struct jj_value of)
{
    struct jj_args args = {0};
    if (!filter->builtin)
        jj_not_supported(&r->job, filter);
    if (filter->a) /* the inner ones of a chain come first */
        of = jj_filter_apply(r, filter->a, of);
    evaluate_args(r, filter, &args);
    r->job.line = filter->line;
    return filter->builtin->fn(r, of, &args);
}

static struct jj_value filter(struct jj_render *r, const struct jj_node *n)
{
    struct jj_args args = {0};
    if (!n->builtin)
        jj_not_supported(&r->job, n);
    struct jj_value of = jj_eval(r, n->a);
    evaluate_args(r, n, &args);
    r->job.line = n->line;
    return n->builtin->fn(r, of, &args);
}

/* ---- operators ---- */

static _Noreturn void overflow(struct jj_render *r)
{
    jj_fail(&r->job, ST_INVALID_ARGUMENT, "an integer over 64 bits");
}

static struct jj_value integer_op(struct jj_render *r, enum jj_op op, int64_t a, int64_t b)
{
    int64_t out = 0;
    switch (op) {
    case OP_ADD:
        if (__builtin_add_overflow(a, b, &out))
            overflow(r);
        return jj_int(out);
    case OP_SUB:
        if (__builtin_sub_overflow(a, b, &out))
            overflow(r);
        return jj_int(out);
    case OP_MUL:
        if (__builtin_mul_overflow(a, b, &out))
            overflow(r);
        return jj_int(out);
    case OP_POW:
        if (b < 0)
            return (struct jj_value){.type = JJ_FLOAT, .u.f = pow((double)a, (double)b)};
        for (out = 1; b > 0; b--) {
            jj_step(&r->job, 1);
            if (__builtin_mul_overflow(out, a, &out))
                overflow(r);
        }
        return jj_int(out);
    default:
        break;
    }
    if (b == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "division by zero");
    if (op == OP_DIV)
        return (struct jj_value){.type = JJ_FLOAT, .u.f = (double)a / (double)b};
    if (b == -1) { /* INT64_MIN / -1 traps */
        if (op == OP_FLOOR && a == INT64_MIN)
            overflow(r);
        return jj_int(op == OP_FLOOR ? -a : 0);
    }
    int64_t q = a / b, rest = a % b;
    if (rest != 0 && (rest < 0) != (b < 0)) { /* Python rounds down */
        q--;
        rest += b;
    }
    return jj_int(op == OP_FLOOR ? q : rest);
}

static struct jj_value float_op(struct jj_render *r, enum jj_op op, double a, double b)
{
    double out = 0;
    if (b == 0 && (op == OP_DIV || op == OP_FLOOR || op == OP_MOD))
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "division by zero");
    switch (op) {
    case OP_ADD:
        out = a + b;
        break;
    case OP_SUB:
        out = a - b;
        break;
    case OP_MUL:
        out = a * b;
        break;
    case OP_DIV:
        out = a / b;
        break;
    case OP_FLOOR:
        out = floor(a / b);
        break;
    case OP_MOD:
        out = fmod(a, b);
        if (out != 0 && (out < 0) != (b < 0))
            out += b;
        break;
    default:
        out = pow(a, b);
    }
    return (struct jj_value){.type = JJ_FLOAT, .u.f = out};
}

/* By doubling: a character a million times is not a million steps. */
static struct jj_value repeat_text(struct jj_render *r, struct jj_value what, int64_t times)
{
    struct jj_buf b = {0};
    size_t n = what.u.str.n;
    if (n == 0 || times <= 0)
        return jj_buf_value(&b);
    if ((uint64_t)times > JINJA_MAX_MEMORY_BYTES / n)
        jj_fail(&r->job, ST_RESOURCE_EXHAUSTED, "a text of %zu bytes %lld times: more than %u bytes of memory", n,
                (long long)times, JINJA_MAX_MEMORY_BYTES);
    size_t all = n * (size_t)times;
    jj_put(&r->job, &b, what.u.str.s, n);
    while (b.n < all)
        jj_put(&r->job, &b, b.s, b.n < all - b.n ? b.n : all - b.n);
    return jj_buf_value(&b);
}

static struct jj_value repeat(struct jj_render *r, struct jj_value what, int64_t times)
{
    if (what.type == JJ_STRING)
        return repeat_text(r, what, times);
    size_t n = what.u.list->n;
    if (times < 0 || n == 0)
        times = 0;
    jj_step(&r->job, (uint64_t)times < JINJA_MAX_STEPS ? (uint64_t)times * (n < 1000 ? n : 1000) : JINJA_MAX_STEPS + 1);
    struct jj_value out = jj_list(&r->job, n * (size_t)times);
    for (size_t i = 0; i < (size_t)times; i++)
        memcpy(out.u.list->v + i * n, what.u.list->v, n * sizeof *what.u.list->v);
    out.u.list->tuple = what.u.list->tuple;
    return out;
}

static bool is_number(const struct jj_value *v)
{
    return v->type == JJ_BOOL || v->type == JJ_INT || v->type == JJ_FLOAT;
}

static struct jj_value add(struct jj_render *r, const struct jj_value *a, const struct jj_value *b)
{
    struct jj_buf text = {0};
    if (a->type == JJ_STRING) {
        struct jj_str l = a->u.str, m = b->u.str;
        if (a->safe != b->safe) { /* as Python's Markup does, whatever the template's author had in mind */
            l = a->safe ? l : jj_escape(&r->job, l).u.str;
            m = b->safe ? m : jj_escape(&r->job, m).u.str;
        }
        jj_put(&r->job, &text, l.s, l.n);
        jj_put(&r->job, &text, m.s, m.n);
        struct jj_value out = jj_buf_value(&text);
        out.safe = a->safe || b->safe;
        return out;
    }
    const struct jj_list *x = a->u.list, *y = b->u.list;
    struct jj_value out = jj_list(&r->job, x->n + y->n);
    if (x->n)
        memcpy(out.u.list->v, x->v, x->n * sizeof *x->v);
    if (y->n)
        memcpy(out.u.list->v + x->n, y->v, y->n * sizeof *y->v);
    out.u.list->tuple = x->tuple;
    return out;
}

static struct jj_value binary(struct jj_render *r, const struct jj_node *n)
{
    static const char *const text[] = {"+", "-", "*", "/", "//", "%", "**", "~"};
    struct jj_value a = jj_eval(r, n->a), b = jj_eval(r, n->b);
    r->job.line = n->line;
    if (n->op == OP_CAT) {
        struct jj_buf out = {0};
        jj_put_str(&r->job, &out, &a);
        jj_put_str(&r->job, &out, &b);
        return jj_buf_value(&out);
    }
    if (is_number(&a) && is_number(&b)) {
        if (a.type == JJ_FLOAT || b.type == JJ_FLOAT)
            return float_op(r, n->op, jj_number(&r->job, &a, text[n->op]), jj_number(&r->job, &b, text[n->op]));
        return integer_op(r, n->op, jj_integer(&r->job, &a, text[n->op]), jj_integer(&r->job, &b, text[n->op]));
    }
    bool a_many = a.type == JJ_STRING || a.type == JJ_LIST, b_many = b.type == JJ_STRING || b.type == JJ_LIST;
    bool alike = a.type == b.type && (a.type != JJ_LIST || a.u.list->tuple == b.u.list->tuple);
    if (n->op == OP_ADD && a_many && alike)
        return add(r, &a, &b);
    if (n->op == OP_MUL && a_many && (b.type == JJ_INT || b.type == JJ_BOOL))
        return repeat(r, a, jj_integer(&r->job, &b, "*"));
    if (n->op == OP_MUL && b_many && (a.type == JJ_INT || a.type == JJ_BOOL))
        return repeat(r, b, jj_integer(&r->job, &a, "*"));
    if (n->op == OP_MOD && a.type == JJ_STRING)
        jj_fail(&r->job, ST_UNIMPLEMENTED, "formatting a string with %% is not supported");
    for (int side = 0; side < 2; side++) {
        const struct jj_value *v = side ? &b : &a;
        if (v->type == JJ_UNDEFINED)
            jj_fail(&r->job, ST_INVALID_ARGUMENT, "'%.*s' is undefined", (int)(v->u.str.n < 60 ? v->u.str.n : 60),
                    v->u.str.s);
    }
    jj_fail(&r->job, ST_INVALID_ARGUMENT, "%s %s %s: these do not go together", jj_type_name(&a), text[n->op],
            jj_type_name(&b));
}

static bool compare_one(struct jj_render *r, enum jj_op op, const struct jj_value *a, const struct jj_value *b)
{
    switch (op) {
    case OP_EQ:
        return jj_equal(&r->job, a, b);
    case OP_NE:
        return !jj_equal(&r->job, a, b);
    case OP_IN:
        return jj_contains(&r->job, a, b);
    case OP_NOT_IN:
        return !jj_contains(&r->job, a, b);
    case OP_LT:
        return jj_order(&r->job, a, b) < 0;
    case OP_LE:
        return jj_order(&r->job, a, b) <= 0;
    case OP_GT:
        return jj_order(&r->job, a, b) > 0;
    default:
        return jj_order(&r->job, a, b) >= 0;
    }
}

static struct jj_value compare(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value left = jj_eval(r, n->a);
    for (const struct jj_node *o = n->list; o; o = o->next) {
        struct jj_value right = jj_eval(r, o->a);
        r->job.line = o->line;
        if (!compare_one(r, o->op, &left, &right))
            return jj_bool(false);
        left = right;
    }
    return jj_bool(true);
}

static struct jj_value list(struct jj_render *r, const struct jj_node *n)
{
    size_t count = 0, i = 0;
    for (const struct jj_node *e = n->list; e; e = e->next)
        count++;
    struct jj_value out = jj_list(&r->job, count);
    for (const struct jj_node *e = n->list; e; e = e->next)
        out.u.list->v[i++] = jj_eval(r, e);
    out.u.list->tuple = n->value.u.b;
    return out;
}

static struct jj_value dict(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value out = jj_dict(&r->job);
    for (const struct jj_node *e = n->list; e; e = e->next->next) {
        struct jj_value key = jj_eval(r, e);
        jj_dict_put(&r->job, out.u.dict, &key, jj_eval(r, e->next));
    }
    return out;
}

static struct jj_value signed_number(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value v = jj_eval(r, n->a);
    if (v.type == JJ_FLOAT)
        return (struct jj_value){.type = JJ_FLOAT, .u.f = n->kind == N_NEG ? -v.u.f : v.u.f};
    int64_t i = jj_integer(&r->job, &v, n->kind == N_NEG ? "-" : "+");
    return n->kind == N_NEG ? integer_op(r, OP_SUB, 0, i) : jj_int(i);
}

static struct jj_value choice(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value v = jj_eval(r, n->b);
    if (jj_truth(&r->job, &v))
        return jj_eval(r, n->a);
    return n->x ? jj_eval(r, n->x) : jj_undefined("an if without else", 18);
}

static struct jj_value eval(struct jj_render *r, const struct jj_node *n)
{
    struct jj_value v;
    switch (n->kind) {
    case N_CONST:
        return n->value;
    case N_NAME:
        return look_up(r, n->name);
    case N_LIST:
        return list(r, n);
    case N_DICT:
        return dict(r, n);
    case N_ATTR:
        v = jj_eval(r, n->a);
        r->job.line = n->line;
        return jj_attribute(r, v, n->name);
    case N_ITEM:
        v = jj_eval(r, n->a);
        r->job.line = n->line;
        return jj_item(r, v, jj_eval(r, n->b));
    case N_SLICE:
        return slice(r, n);
    case N_CALL:
        return call(r, n);
    case N_FILTER:
    case N_TEST:
        return filter(r, n);
    case N_NOT:
        v = jj_eval(r, n->a);
        return jj_bool(!jj_truth(&r->job, &v));
    case N_NEG:
    case N_POS:
        return signed_number(r, n);
    case N_AND:
    case N_OR:
        v = jj_eval(r, n->a);
        return jj_truth(&r->job, &v) == (n->kind == N_OR) ? v : jj_eval(r, n->b);
    case N_IF_EXPR:
        return choice(r, n);
    case N_COMPARE:
        return compare(r, n);
    case N_BINARY:
        return binary(r, n);
    default:
        jj_fail(&r->job, ST_INTERNAL, "node %d is no expression", (int)n->kind);
    }
}

struct jj_value jj_eval(struct jj_render *r, const struct jj_node *n)
{
    jj_step(&r->job, 1);
    jj_enter(&r->job);
    r->job.line = n->line;
    struct jj_value v = eval(r, n);
    r->job.depth--;
    return v;
}
