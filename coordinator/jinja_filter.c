/* Filters: what stands behind `|`. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/jinja_internal.h"

#define FILTER(name) static struct jj_value name(struct jj_render *r, struct jj_value v, const struct jj_args *args)

static struct jj_value real(double f)
{
    return (struct jj_value){.type = JJ_FLOAT, .u.f = f};
}

/* ---- text ---- */

FILTER(f_trim)
{
    struct jj_value chars = jj_arg(args, 0, "chars", jj_none());
    struct jj_str s = jj_to_str(&r->job, &v), set = {0};
    jj_arg_count(r, args, 1, "trim");
    if (chars.type != JJ_NONE)
        set = jj_need_string(&r->job, &chars, "trim");
    s = jj_strip(s, JJ_LEFT | JJ_RIGHT, chars.type == JJ_NONE ? NULL : &set);
    return jj_string(s.s, s.n);
}

static struct jj_value change_case(struct jj_render *r, struct jj_value v, const struct jj_args *args, char how)
{
    jj_arg_count(r, args, 0, "a filter of case");
    return jj_str_case(&r->job, jj_to_str(&r->job, &v), how);
}

FILTER(f_upper)
{
    return change_case(r, v, args, 'u');
}

FILTER(f_lower)
{
    return change_case(r, v, args, 'l');
}

FILTER(f_capitalize)
{
    return change_case(r, v, args, 'c');
}

/* Jinja's title, unlike str.title(), begins words behind white space and -([{< only. */
FILTER(f_title)
{
    struct jj_str s = jj_to_str(&r->job, &v);
    struct jj_buf b = {0};
    size_t bytes = 0, start = 0;
    jj_arg_count(r, args, 0, "title");
    for (size_t i = 0; i < s.n; i += bytes) {
        uint32_t ch = jj_char_at(s, i, &bytes);
        bool border = jj_is_space(ch) || (ch < 0x80 && ch && strchr("-([{<", (int)ch));
        if (!border && i + bytes < s.n)
            continue;
        struct jj_value word = jj_str_case(&r->job, (struct jj_str){s.s + start, i + bytes - start}, 'c');
        jj_put(&r->job, &b, word.u.str.s, word.u.str.n);
        start = i + bytes;
    }
    return jj_buf_value(&b);
}

FILTER(f_replace)
{
    struct jj_value from = jj_arg(args, 0, "old", jj_undefined("old", 3));
    struct jj_value to = jj_arg(args, 1, "new", jj_undefined("new", 3)), count = jj_arg(args, 2, "count", jj_none());
    struct jj_str s = jj_to_str(&r->job, &v);
    jj_arg_count(r, args, 3, "replace");
    return jj_str_replace(&r->job, s, jj_need_string(&r->job, &from, "replace"),
                          jj_need_string(&r->job, &to, "replace"),
                          count.type == JJ_NONE ? -1 : jj_integer(&r->job, &count, "replace"));
}

FILTER(f_string)
{
    struct jj_str s = jj_to_str(&r->job, &v);
    struct jj_value out = jj_string(s.s, s.n);
    jj_arg_count(r, args, 0, "string");
    out.safe = v.safe;
    return out;
}

FILTER(f_safe)
{
    struct jj_value out = f_string(r, v, args);
    out.safe = true;
    return out;
}

FILTER(f_escape)
{
    struct jj_str s = jj_to_str(&r->job, &v);
    jj_arg_count(r, args, 0, "escape");
    return v.safe ? v : jj_escape(&r->job, s);
}

FILTER(f_indent)
{
    struct jj_value width = jj_arg(args, 0, "width", jj_int(4)), first = jj_arg(args, 1, "first", jj_bool(false));
    struct jj_value blank = jj_arg(args, 2, "blank", jj_bool(false));
    struct jj_str s = jj_to_str(&r->job, &v), pad;
    struct jj_buf b = {0}, spaces = {0};
    struct jj_args none = {0};
    bool known = false;
    jj_arg_count(r, args, 3, "indent");
    if (width.type == JJ_STRING) {
        pad = width.u.str;
    } else {
        for (int64_t i = jj_integer(&r->job, &width, "indent"); i > 0; i--)
            jj_puts(&r->job, &spaces, " ");
        pad = jj_buf_value(&spaces).u.str;
    }
    bool blanks = jj_truth(&r->job, &blank);
    jj_put(&r->job, &b, s.s, s.n);
    jj_puts(&r->job, &b, "\n"); /* so that a newline at the end makes a last line, which is empty */
    struct jj_value text = jj_buf_value(&b);
    const struct jj_builtin *split = jj_find_method(&text, (struct jj_str){"splitlines", 10}, &known);
    const struct jj_list *lines = split->fn(r, text, &none).u.list;
    b = (struct jj_buf){0};
    for (size_t i = 0; i < lines->n; i++) {
        struct jj_str line = lines->v[i].u.str;
        jj_puts(&r->job, &b, i ? "\n" : "");
        if (i == 0 ? jj_truth(&r->job, &first) : line.n > 0 || blanks)
            jj_put(&r->job, &b, pad.s, pad.n);
        jj_put(&r->job, &b, line.s, line.n);
    }
    return jj_buf_value(&b);
}

FILTER(f_tojson)
{
    struct jj_value indent = jj_arg(args, SIZE_MAX, "indent", jj_none());
    struct jj_value ascii = jj_arg(args, SIZE_MAX, "ensure_ascii", jj_bool(false));
    struct jj_buf b = {0};
    /* ensure_ascii comes first in Hugging Face's function, then indent; both are given by name in practice */
    jj_arg_count(r, args, 0, "tojson (name its arguments)");
    for (size_t i = 0; i < args->n_kw; i++)
        if (!jj_str_is(args->kw[i].key, "indent") && !jj_str_is(args->kw[i].key, "ensure_ascii"))
            jj_fail(&r->job, ST_UNIMPLEMENTED, "tojson: the argument \"%.*s\" is not supported", (int)args->kw[i].key.n,
                    args->kw[i].key.s);
    int64_t n = indent.type == JJ_NONE ? -1 : jj_integer(&r->job, &indent, "tojson: indent");
    if (n > 64)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "tojson: indent %lld, expected at most 64", (long long)n);
    jj_put_json(&r->job, &b, &v, n < -1 ? -1 : (int)n, jj_truth(&r->job, &ascii));
    return jj_buf_value(&b);
}

/* ---- numbers ---- */

FILTER(f_int)
{
    struct jj_value other = jj_arg(args, 0, "default", jj_int(0));
    jj_arg_count(r, args, 2, "int");
    if (jj_has_arg(args, 1, "base"))
        jj_fail(&r->job, ST_UNIMPLEMENTED, "int: the argument \"base\" is not supported");
    if (v.type == JJ_INT || v.type == JJ_BOOL)
        return jj_int(jj_integer(&r->job, &v, "int"));
    double f = NAN;
    if (v.type == JJ_FLOAT) {
        f = v.u.f;
    } else if (v.type == JJ_STRING) {
        struct jj_str s = jj_strip(v.u.str, JJ_LEFT | JJ_RIGHT, NULL);
        char text[64] = "", *end = text;
        if (s.n > 0 && s.n < sizeof text)
            memcpy(text, s.s, s.n);
        errno = 0;
        long long i = strtoll(text, &end, 10);
        if (text[0] && !*end && !errno)
            return jj_int(i);
        f = strtod(text, &end);
        if (!text[0] || *end || strpbrk(text, "xXpP"))
            return other;
    }
    return isnan(f) || fabs(f) >= 9.2e18 ? other : jj_int((int64_t)f);
}

FILTER(f_float)
{
    struct jj_value other = jj_arg(args, 0, "default", real(0.0));
    jj_arg_count(r, args, 1, "float");
    if (v.type == JJ_INT || v.type == JJ_BOOL || v.type == JJ_FLOAT)
        return real(jj_number(&r->job, &v, "float"));
    if (v.type != JJ_STRING)
        return other;
    struct jj_str s = jj_strip(v.u.str, JJ_LEFT | JJ_RIGHT, NULL);
    char text[64] = "", *end = text;
    if (s.n > 0 && s.n < sizeof text)
        memcpy(text, s.s, s.n);
    double f = strtod(text, &end);
    return !text[0] || *end || strpbrk(text, "xXpP(") ? other : real(f);
}

FILTER(f_abs)
{
    jj_arg_count(r, args, 0, "abs");
    if (v.type == JJ_FLOAT)
        return real(fabs(v.u.f));
    int64_t i = jj_integer(&r->job, &v, "abs");
    return jj_int(i < 0 && i > INT64_MIN ? -i : i);
}

FILTER(f_round)
{
    struct jj_value places = jj_arg(args, 0, "precision", jj_int(0)),
                    how = jj_arg(args, 1, "method", jj_text("common"));
    jj_arg_count(r, args, 2, "round");
    double f = jj_number(&r->job, &v, "round");
    int64_t p = jj_integer(&r->job, &places, "round");
    struct jj_str m = jj_need_string(&r->job, &how, "round");
    if (p < -20 || p > 20)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "round: precision %lld, expected -20 to 20", (long long)p);
    double scale = pow(10, (double)p);
    if (jj_str_is(m, "ceil"))
        return real(ceil(f * scale) / scale);
    if (jj_str_is(m, "floor"))
        return real(floor(f * scale) / scale);
    if (!jj_str_is(m, "common"))
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "round: expected the method common, ceil or floor");
    return real(nearbyint(f * scale) / scale); /* half to even, as Python */
}

/* ---- sequences ---- */

FILTER(f_length)
{
    jj_arg_count(r, args, 0, "length");
    if (v.type == JJ_STRING)
        return jj_int((int64_t)jj_char_count(v.u.str));
    if (v.type == JJ_DICT)
        return jj_int((int64_t)v.u.dict->n);
    return jj_int((int64_t)jj_iterate(&r->job, &v)->n);
}

FILTER(f_first)
{
    const struct jj_list *l = jj_iterate(&r->job, &v);
    jj_arg_count(r, args, 0, "first");
    return l->n ? l->v[0] : jj_undefined("the first of nothing", 20);
}

FILTER(f_last)
{
    const struct jj_list *l = jj_iterate(&r->job, &v);
    jj_arg_count(r, args, 0, "last");
    return l->n ? l->v[l->n - 1] : jj_undefined("the last of nothing", 19);
}

/* "a.b.0" of a value. */
static struct jj_value path(struct jj_render *r, struct jj_value v, const struct jj_value *attribute)
{
    if (attribute->type == JJ_INT)
        return jj_item(r, v, *attribute);
    struct jj_str s = jj_need_string(&r->job, attribute, "attribute");
    while (s.n > 0) {
        const char *dot = memchr(s.s, '.', s.n);
        size_t n = dot ? (size_t)(dot - s.s) : s.n, digits = 0;
        int64_t index = 0;
        while (digits < n && digits < 9 && s.s[digits] >= '0' && s.s[digits] <= '9')
            index = 10 * index + (s.s[digits++] - '0');
        v = jj_item(r, v, n > 0 && digits == n ? jj_int(index) : jj_string(s.s, n));
        s.s += n + (dot != NULL);
        s.n -= n + (dot != NULL);
    }
    return v;
}

FILTER(f_join)
{
    struct jj_value by = jj_arg(args, 0, "d", jj_text("")), attribute = jj_arg(args, 1, "attribute", jj_none());
    const struct jj_list *l = jj_iterate(&r->job, &v);
    struct jj_str sep = jj_to_str(&r->job, &by);
    struct jj_buf b = {0};
    jj_arg_count(r, args, 2, "join");
    for (size_t i = 0; i < l->n; i++) {
        struct jj_value e = attribute.type == JJ_NONE ? l->v[i] : path(r, l->v[i], &attribute);
        if (i)
            jj_put(&r->job, &b, sep.s, sep.n);
        jj_put_str(&r->job, &b, &e);
    }
    return jj_buf_value(&b);
}

FILTER(f_default)
{
    struct jj_value other = jj_arg(args, 0, "default_value", jj_text(""));
    struct jj_value also_false = jj_arg(args, 1, "boolean", jj_bool(false));
    jj_arg_count(r, args, 2, "default");
    bool absent = v.type == JJ_UNDEFINED || (jj_truth(&r->job, &also_false) && !jj_truth(&r->job, &v));
    return absent ? other : v;
}

FILTER(f_list)
{
    const struct jj_list *l = jj_iterate(&r->job, &v);
    struct jj_value out = jj_list(&r->job, l->n);
    jj_arg_count(r, args, 0, "list");
    if (l->n)
        memcpy(out.u.list->v, l->v, l->n * sizeof *l->v);
    return out;
}

FILTER(f_items)
{
    struct jj_args none = {0};
    bool known = false;
    jj_arg_count(r, args, 0, "items");
    if (v.type == JJ_UNDEFINED)
        return jj_list(&r->job, 0);
    if (v.type != JJ_DICT)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "items: %s, expected a dictionary", jj_type_name(&v));
    return jj_find_method(&v, (struct jj_str){"items", 5}, &known)->fn(r, v, &none);
}

FILTER(f_reverse)
{
    const struct jj_list *l = jj_iterate(&r->job, &v);
    struct jj_value out = jj_list(&r->job, l->n);
    struct jj_buf b = {0};
    jj_arg_count(r, args, 0, "reverse");
    for (size_t i = 0; i < l->n; i++)
        out.u.list->v[i] = l->v[l->n - 1 - i];
    if (v.type != JJ_STRING)
        return out;
    for (size_t i = 0; i < l->n; i++)
        jj_put(&r->job, &b, out.u.list->v[i].u.str.s, out.u.list->v[i].u.str.n);
    return jj_buf_value(&b);
}

/* ---- order ---- */

struct sort_key {
    bool fold, down;
    struct jj_value attribute; /* NONE: the element */
};

static struct jj_value key_of(struct jj_render *r, const struct sort_key *k, struct jj_value v)
{
    if (k->attribute.type != JJ_NONE)
        v = path(r, v, &k->attribute);
    return k->fold && v.type == JJ_STRING ? jj_str_case(&r->job, v.u.str, 'l') : v;
}

/* Merge sort: stable, and the comparison may leave by an error. v and keys move together. */
static void sort(struct jj_render *r, struct jj_value *v, struct jj_value *keys, size_t n, bool down)
{
    if (n < 2)
        return;
    size_t half = n / 2, i = 0, j = half;
    struct jj_value *to = jj_alloc(&r->job, 2 * n * sizeof *to), *to_keys = to + n;
    sort(r, v, keys, half, down);
    sort(r, v + half, keys + half, n - half, down);
    for (size_t k = 0; k < n; k++) {
        int d = 0;
        if (i < half && j < n)
            d = jj_order(&r->job, &keys[j], &keys[i]);
        bool right = i == half || (j < n && (down ? d > 0 : d < 0));
        size_t from = right ? j++ : i++;
        to[k] = v[from];
        to_keys[k] = keys[from];
    }
    memcpy(v, to, n * sizeof *v);
    memcpy(keys, to_keys, n * sizeof *keys);
}

static struct jj_value sorted(struct jj_render *r, const struct jj_list *l, const struct sort_key *k)
{
    struct jj_value out = jj_list(&r->job, l->n), keys = jj_list(&r->job, l->n);
    for (size_t i = 0; i < l->n; i++) {
        out.u.list->v[i] = l->v[i];
        keys.u.list->v[i] = key_of(r, k, l->v[i]);
    }
    sort(r, out.u.list->v, keys.u.list->v, l->n, k->down);
    return out;
}

FILTER(f_sort)
{
    struct jj_value down = jj_arg(args, 0, "reverse", jj_bool(false));
    struct jj_value exact = jj_arg(args, 1, "case_sensitive", jj_bool(false));
    struct sort_key k = {.attribute = jj_arg(args, 2, "attribute", jj_none())};
    jj_arg_count(r, args, 3, "sort");
    k.down = jj_truth(&r->job, &down);
    k.fold = !jj_truth(&r->job, &exact);
    return sorted(r, jj_iterate(&r->job, &v), &k);
}

FILTER(f_dictsort)
{
    struct jj_value exact = jj_arg(args, 0, "case_sensitive", jj_bool(false)),
                    by = jj_arg(args, 1, "by", jj_text("key"));
    struct jj_value down = jj_arg(args, 2, "reverse", jj_bool(false));
    struct jj_args none = {0};
    jj_arg_count(r, args, 3, "dictsort");
    bool value = jj_str_is(jj_need_string(&r->job, &by, "dictsort"), "value");
    struct sort_key k = {.fold = !jj_truth(&r->job, &exact), .down = jj_truth(&r->job, &down)};
    k.attribute = jj_int(value);
    struct jj_value pairs = f_items(r, v, &none);
    return sorted(r, pairs.u.list, &k);
}

FILTER(f_unique)
{
    struct jj_value exact = jj_arg(args, 0, "case_sensitive", jj_bool(false));
    const struct jj_list *l = jj_iterate(&r->job, &v);
    struct sort_key k = {.attribute = jj_arg(args, 1, "attribute", jj_none())};
    struct jj_value out = jj_list(&r->job, l->n), keys = jj_list(&r->job, l->n);
    size_t n = 0;
    jj_arg_count(r, args, 2, "unique");
    k.fold = !jj_truth(&r->job, &exact);
    for (size_t i = 0; i < l->n; i++) {
        struct jj_value key = key_of(r, &k, l->v[i]);
        size_t j = 0;
        while (j < n && !jj_equal(&r->job, &keys.u.list->v[j], &key))
            j++;
        if (j < n)
            continue;
        out.u.list->v[n] = l->v[i];
        keys.u.list->v[n++] = key;
    }
    out.u.list->n = n;
    return out;
}

static struct jj_value extreme(struct jj_render *r, struct jj_value v, const struct jj_args *args, int sign)
{
    struct jj_value exact = jj_arg(args, 0, "case_sensitive", jj_bool(false)), best = jj_undefined("of nothing", 10);
    struct sort_key k = {.attribute = jj_arg(args, 1, "attribute", jj_none())};
    const struct jj_list *l = jj_iterate(&r->job, &v);
    k.fold = !jj_truth(&r->job, &exact);
    for (size_t i = 0; i < l->n; i++) {
        struct jj_value a = key_of(r, &k, l->v[i]), b = i ? key_of(r, &k, best) : a;
        if (i == 0 || jj_order(&r->job, &a, &b) * sign > 0)
            best = l->v[i];
    }
    return best;
}

FILTER(f_max)
{
    return extreme(r, v, args, 1);
}

FILTER(f_min)
{
    return extreme(r, v, args, -1);
}

FILTER(f_sum)
{
    struct jj_value attribute = jj_arg(args, 0, "attribute", jj_none()), start = jj_arg(args, 1, "start", jj_int(0));
    const struct jj_list *l = jj_iterate(&r->job, &v);
    int64_t total = 0;
    double total_real = jj_number(&r->job, &start, "sum");
    bool whole = start.type != JJ_FLOAT;
    if (whole)
        total = jj_integer(&r->job, &start, "sum");
    for (size_t i = 0; i < l->n; i++) {
        struct jj_value e = attribute.type == JJ_NONE ? l->v[i] : path(r, l->v[i], &attribute);
        whole = whole && e.type != JJ_FLOAT;
        total_real += jj_number(&r->job, &e, "sum");
        if (whole && __builtin_add_overflow(total, jj_integer(&r->job, &e, "sum"), &total))
            jj_fail(&r->job, ST_INVALID_ARGUMENT, "sum: an integer over 64 bits");
    }
    return whole ? jj_int(total) : real(total_real);
}

/* ---- filters over sequences ---- */

static const struct jj_builtin *named(struct jj_render *r, const struct jj_value *name, bool test)
{
    struct jj_str s = jj_need_string(&r->job, name, test ? "the name of a test" : "the name of a filter");
    const struct jj_builtin *b = test ? jj_find_test(s) : jj_find_filter(s);
    if (!b)
        jj_fail(&r->job, ST_UNIMPLEMENTED, "the %s \"%.*s\" is not supported", test ? "test" : "filter",
                (int)(s.n < 60 ? s.n : 60), s.s);
    return b;
}

/* select, reject (attribute NULL), selectattr, rejectattr: those for which the test, or truth, says `keep`. */
static struct jj_value choose(struct jj_render *r, struct jj_value v, const struct jj_args *args, bool by_attribute,
                              bool keep)
{
    if (!jj_truth(&r->job, &v)) /* None, too; and nobody looks at the arguments */
        return jj_list(&r->job, 0);
    const struct jj_list *l = jj_iterate(&r->job, &v);
    struct jj_value out = jj_list(&r->job, l->n);
    size_t first = by_attribute, n = 0;
    if (args->n < first)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "selectattr, rejectattr: expected the name of an attribute");
    const struct jj_builtin *test = args->n > first ? named(r, &args->v[first], true) : NULL;
    struct jj_args rest = {.n = test ? args->n - first - 1 : 0, .v = test ? args->v + first + 1 : NULL};
    for (size_t i = 0; i < l->n; i++) {
        struct jj_value e = by_attribute ? path(r, l->v[i], &args->v[0]) : l->v[i];
        if (test)
            e = test->fn(r, e, &rest);
        if (jj_truth(&r->job, &e) == keep)
            out.u.list->v[n++] = l->v[i];
    }
    out.u.list->n = n;
    return out;
}

FILTER(f_select)
{
    return choose(r, v, args, false, true);
}

FILTER(f_reject)
{
    return choose(r, v, args, false, false);
}

FILTER(f_selectattr)
{
    return choose(r, v, args, true, true);
}

FILTER(f_rejectattr)
{
    return choose(r, v, args, true, false);
}

FILTER(f_map)
{
    if (!jj_truth(&r->job, &v))
        return jj_list(&r->job, 0);
    const struct jj_list *l = jj_iterate(&r->job, &v);
    struct jj_value out = jj_list(&r->job, l->n), attribute = jj_arg(args, SIZE_MAX, "attribute", jj_none());
    struct jj_value other = jj_arg(args, SIZE_MAX, "default", jj_none());
    const struct jj_builtin *f = NULL;
    struct jj_args rest = {0};
    if (attribute.type == JJ_NONE) {
        if (args->n == 0)
            jj_fail(&r->job, ST_INVALID_ARGUMENT, "map: expected attribute= or the name of a filter");
        f = named(r, &args->v[0], false);
        rest = (struct jj_args){args->n - 1, args->v + 1, args->n_kw, args->kw};
    }
    for (size_t i = 0; i < l->n; i++) {
        struct jj_value e = f ? f->fn(r, l->v[i], &rest) : path(r, l->v[i], &attribute);
        out.u.list->v[i] = !f && e.type == JJ_UNDEFINED && other.type != JJ_NONE ? other : e;
    }
    return out;
}

static const struct jj_builtin filters[] = {
    {"abs", f_abs},
    {"capitalize", f_capitalize},
    {"count", f_length},
    {"d", f_default},
    {"default", f_default},
    {"dictsort", f_dictsort},
    {"e", f_escape},
    {"escape", f_escape},
    {"first", f_first},
    {"float", f_float},
    {"indent", f_indent},
    {"int", f_int},
    {"items", f_items},
    {"join", f_join},
    {"last", f_last},
    {"length", f_length},
    {"list", f_list},
    {"lower", f_lower},
    {"map", f_map},
    {"max", f_max},
    {"min", f_min},
    {"reject", f_reject},
    {"rejectattr", f_rejectattr},
    {"replace", f_replace},
    {"reverse", f_reverse},
    {"round", f_round},
    {"safe", f_safe},
    {"select", f_select},
    {"selectattr", f_selectattr},
    {"sort", f_sort},
    {"string", f_string},
    {"sum", f_sum},
    {"title", f_title},
    {"tojson", f_tojson},
    {"trim", f_trim},
    {"unique", f_unique},
    {"upper", f_upper},
};

const struct jj_builtin *jj_find_filter(struct jj_str name)
{
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (jj_str_is(name, filters[i].name))
            return &filters[i];
    return NULL;
}
