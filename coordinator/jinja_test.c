/* Tests: what stands behind `is`. */
#include "coordinator/jinja_internal.h"

#define TEST(name) static struct jj_value name(struct jj_render *r, struct jj_value v, const struct jj_args *args)

TEST(t_defined)
{
    jj_arg_count(r, args, 0, "is defined");
    return jj_bool(v.type != JJ_UNDEFINED);
}

TEST(t_undefined)
{
    jj_arg_count(r, args, 0, "is undefined");
    return jj_bool(v.type == JJ_UNDEFINED);
}

TEST(t_none)
{
    jj_arg_count(r, args, 0, "is none");
    return jj_bool(v.type == JJ_NONE);
}

TEST(t_string)
{
    jj_arg_count(r, args, 0, "is string");
    return jj_bool(v.type == JJ_STRING);
}

TEST(t_mapping)
{
    jj_arg_count(r, args, 0, "is mapping");
    return jj_bool(v.type == JJ_DICT);
}

TEST(t_iterable)
{
    jj_arg_count(r, args, 0, "is iterable");
    return jj_bool(v.type == JJ_STRING || v.type == JJ_LIST || v.type == JJ_DICT || v.type == JJ_UNDEFINED ||
                   v.type == JJ_LOOP);
}

TEST(t_sequence)
{
    jj_arg_count(r, args, 0, "is sequence");
    return jj_bool(v.type == JJ_STRING || v.type == JJ_LIST || v.type == JJ_DICT || v.type == JJ_UNDEFINED);
}

TEST(t_number)
{
    jj_arg_count(r, args, 0, "is number");
    return jj_bool(v.type == JJ_INT || v.type == JJ_FLOAT || v.type == JJ_BOOL);
}

TEST(t_integer)
{
    jj_arg_count(r, args, 0, "is integer");
    return jj_bool(v.type == JJ_INT);
}

TEST(t_float)
{
    jj_arg_count(r, args, 0, "is float");
    return jj_bool(v.type == JJ_FLOAT);
}

TEST(t_boolean)
{
    jj_arg_count(r, args, 0, "is boolean");
    return jj_bool(v.type == JJ_BOOL);
}

TEST(t_true)
{
    jj_arg_count(r, args, 0, "is true");
    return jj_bool(v.type == JJ_BOOL && v.u.b);
}

TEST(t_false)
{
    jj_arg_count(r, args, 0, "is false");
    return jj_bool(v.type == JJ_BOOL && !v.u.b);
}

TEST(t_callable)
{
    jj_arg_count(r, args, 0, "is callable");
    return jj_bool(v.type == JJ_CALLABLE);
}

TEST(t_even)
{
    jj_arg_count(r, args, 0, "is even");
    return jj_bool(jj_integer(&r->job, &v, "is even") % 2 == 0);
}

TEST(t_odd)
{
    jj_arg_count(r, args, 0, "is odd");
    return jj_bool(jj_integer(&r->job, &v, "is odd") % 2 != 0);
}

static struct jj_value other(struct jj_render *r, const struct jj_args *args, const char *of)
{
    jj_arg_count(r, args, 1, of);
    if (args->n != 1)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "%s: expected a value behind it", of);
    return args->v[0];
}

TEST(t_divisible)
{
    struct jj_value by = other(r, args, "is divisibleby");
    int64_t d = jj_integer(&r->job, &by, "is divisibleby"), i = jj_integer(&r->job, &v, "is divisibleby");
    if (d == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "is divisibleby 0");
    return jj_bool(d == -1 || i % d == 0);
}

TEST(t_eq)
{
    struct jj_value o = other(r, args, "is eq");
    return jj_bool(jj_equal(&r->job, &v, &o));
}

TEST(t_ne)
{
    struct jj_value o = other(r, args, "is ne");
    return jj_bool(!jj_equal(&r->job, &v, &o));
}

TEST(t_lt)
{
    struct jj_value o = other(r, args, "is lt");
    return jj_bool(jj_order(&r->job, &v, &o) < 0);
}

TEST(t_le)
{
    struct jj_value o = other(r, args, "is le");
    return jj_bool(jj_order(&r->job, &v, &o) <= 0);
}

TEST(t_gt)
{
    struct jj_value o = other(r, args, "is gt");
    return jj_bool(jj_order(&r->job, &v, &o) > 0);
}

TEST(t_ge)
{
    struct jj_value o = other(r, args, "is ge");
    return jj_bool(jj_order(&r->job, &v, &o) >= 0);
}

TEST(t_in)
{
    struct jj_value o = other(r, args, "is in");
    return jj_bool(jj_contains(&r->job, &v, &o));
}

/* Python's `is`: sure for what there is one of, and for containers. */
TEST(t_same)
{
    struct jj_value o = other(r, args, "is sameas");
    if (v.type != o.type)
        return jj_bool(false);
    if (v.type == JJ_LIST || v.type == JJ_DICT || v.type == JJ_NAMESPACE)
        return jj_bool(v.u.list == o.u.list);
    return jj_bool(jj_equal(&r->job, &v, &o));
}

TEST(t_lower)
{
    struct jj_str s = jj_to_str(&r->job, &v), low = jj_str_case(&r->job, s, 'l').u.str;
    jj_arg_count(r, args, 0, "is lower");
    return jj_bool(jj_str_eq(s, low) && !jj_str_eq(s, jj_str_case(&r->job, s, 'u').u.str));
}

TEST(t_upper)
{
    struct jj_str s = jj_to_str(&r->job, &v), up = jj_str_case(&r->job, s, 'u').u.str;
    jj_arg_count(r, args, 0, "is upper");
    return jj_bool(jj_str_eq(s, up) && !jj_str_eq(s, jj_str_case(&r->job, s, 'l').u.str));
}

static const struct jj_builtin tests[] = {
    {"defined", t_defined},
    {"undefined", t_undefined},
    {"none", t_none},
    {"string", t_string},
    {"mapping", t_mapping},
    {"iterable", t_iterable},
    {"sequence", t_sequence},
    {"number", t_number},
    {"integer", t_integer},
    {"float", t_float},
    {"boolean", t_boolean},
    {"true", t_true},
    {"false", t_false},
    {"callable", t_callable},
    {"even", t_even},
    {"odd", t_odd},
    {"divisibleby", t_divisible},
    {"eq", t_eq},
    {"equalto", t_eq},
    {"ne", t_ne},
    {"lt", t_lt},
    {"lessthan", t_lt},
    {"le", t_le},
    {"gt", t_gt},
    {"greaterthan", t_gt},
    {"ge", t_ge},
    {"in", t_in},
    {"sameas", t_same},
    {"lower", t_lower},
    {"upper", t_upper},
};

const struct jj_builtin *jj_find_test(struct jj_str name)
{
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (jj_str_is(name, tests[i].name))
            return &tests[i];
    return NULL;
}
