/* Methods of strings, dictionaries, lists and loops; the functions that every template knows. */
#include <string.h>
#include <time.h>
#include <utf8proc.h>

#include "coordinator/jinja_internal.h"

#define STR(v) ((v).u.str)

static struct jj_str string_arg(struct jj_render *r, const struct jj_args *args, size_t i, const char *name,
                                const char *of)
{
    struct jj_value v = jj_arg(args, i, name, jj_undefined(of, strlen(of)));
    return jj_need_string(&r->job, &v, of);
}

/* ---- str ---- */

static struct jj_value strip(struct jj_render *r, struct jj_value self, const struct jj_args *args, unsigned sides)
{
    struct jj_value chars = jj_arg(args, 0, NULL, jj_none());
    jj_arg_count(r, args, 1, "strip");
    struct jj_str set = chars.type == JJ_NONE ? (struct jj_str){0} : jj_need_string(&r->job, &chars, "strip");
    struct jj_str s = jj_strip(STR(self), sides, chars.type == JJ_NONE ? NULL : &set);
    return jj_string(s.s, s.n);
}

static struct jj_value m_strip(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    return strip(r, self, args, JJ_LEFT | JJ_RIGHT);
}

static struct jj_value m_lstrip(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    return strip(r, self, args, JJ_LEFT);
}

static struct jj_value m_rstrip(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    return strip(r, self, args, JJ_RIGHT);
}

/* Any of a list (a tuple in Python), or one. */
static bool has_affix(struct jj_render *r, struct jj_str s, const struct jj_value *v, bool end)
{
    if (v->type == JJ_LIST) {
        for (size_t i = 0; i < v->u.list->n; i++)
            if (has_affix(r, s, &v->u.list->v[i], end))
                return true;
        return false;
    }
    struct jj_str part = jj_need_string(&r->job, v, end ? "endswith" : "startswith");
    return part.n <= s.n && (part.n == 0 || memcmp(end ? s.s + s.n - part.n : s.s, part.s, part.n) == 0);
}

static struct jj_value m_startswith(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value v = jj_arg(args, 0, NULL, jj_undefined("prefix", 6));
    jj_arg_count(r, args, 1, "startswith");
    return jj_bool(has_affix(r, STR(self), &v, false));
}

static struct jj_value m_endswith(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value v = jj_arg(args, 0, NULL, jj_undefined("suffix", 6));
    jj_arg_count(r, args, 1, "endswith");
    return jj_bool(has_affix(r, STR(self), &v, true));
}

/* Appends to a list whose room grows. */
static void append(struct jj *c, struct jj_list *l, size_t *cap, struct jj_value v)
{
    if (l->n == *cap) {
        size_t more = *cap ? 2 * *cap : 8;
        struct jj_value *to = jj_alloc(c, more * sizeof *to);
        if (l->n)
            memcpy(to, l->v, l->n * sizeof *to);
        l->v = to;
        *cap = more;
    }
    l->v[l->n++] = v;
    jj_step(c, 1);
}

static size_t find(struct jj_str s, struct jj_str part, size_t from)
{
    if (part.n == 0)
        return from;
    const char *p = from <= s.n ? memmem(s.s + from, s.n - from, part.s, part.n) : NULL;
    return p ? (size_t)(p - s.s) : SIZE_MAX;
}

static void split_spaces(struct jj *c, struct jj_str s, int64_t most, struct jj_list *out, size_t *cap)
{
    s = jj_strip(s, JJ_LEFT, NULL);
    while (s.n > 0) {
        size_t end = 0, bytes = 0;
        if (most >= 0 && (int64_t)out->n == most) {
            s = jj_strip(s, JJ_RIGHT, NULL);
            append(c, out, cap, jj_string(s.s, s.n));
            return;
        }
        while (end < s.n && !jj_is_space(jj_char_at(s, end, &bytes)))
            end += bytes;
        append(c, out, cap, jj_string(s.s, end));
        s.s += end;
        s.n -= end;
        s = jj_strip(s, JJ_LEFT, NULL);
    }
}

static void split_by(struct jj *c, struct jj_str s, struct jj_str by, int64_t most, struct jj_list *out, size_t *cap)
{
    for (size_t at = 0; most < 0 || (int64_t)out->n < most;) {
        at = find(s, by, 0);
        if (at == SIZE_MAX)
            break;
        append(c, out, cap, jj_string(s.s, at));
        s.s += at + by.n;
        s.n -= at + by.n;
    }
    append(c, out, cap, jj_string(s.s, s.n));
}

static struct jj_value m_split(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value by = jj_arg(args, 0, "sep", jj_none()), most = jj_arg(args, 1, "maxsplit", jj_int(-1));
    struct jj_value out = jj_list(&r->job, 0);
    size_t cap = 0;
    jj_arg_count(r, args, 2, "split");
    int64_t n = jj_integer(&r->job, &most, "split");
    if (by.type == JJ_NONE) {
        split_spaces(&r->job, STR(self), n, out.u.list, &cap);
        return out;
    }
    struct jj_str sep = jj_need_string(&r->job, &by, "split");
    if (sep.n == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "split: an empty separator");
    split_by(&r->job, STR(self), sep, n, out.u.list, &cap);
    return out;
}

static struct jj_value m_rsplit(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value most = jj_arg(args, 1, "maxsplit", jj_int(-1)), out = jj_list(&r->job, 0);
    struct jj_str sep = string_arg(r, args, 0, "sep", "rsplit"), s = STR(self);
    int64_t n = jj_integer(&r->job, &most, "rsplit");
    size_t cap = 0;
    if (sep.n == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "rsplit: an empty separator");
    for (size_t at = s.n; s.n >= sep.n && at + 1 > 0 && (n < 0 || (int64_t)out.u.list->n < n);) {
        at = s.n - sep.n + 1;
        while (at > 0 && memcmp(s.s + at - 1, sep.s, sep.n) != 0)
            at--;
        if (at == 0)
            break;
        append(&r->job, out.u.list, &cap, jj_string(s.s + at - 1 + sep.n, s.n - (at - 1) - sep.n));
        s.n = at - 1;
    }
    append(&r->job, out.u.list, &cap, jj_string(s.s, s.n));
    for (size_t i = 0, j = out.u.list->n - 1; i < j; i++, j--) {
        struct jj_value v = out.u.list->v[i];
        out.u.list->v[i] = out.u.list->v[j];
        out.u.list->v[j] = v;
    }
    return out;
}

static struct jj_value m_splitlines(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value keep = jj_arg(args, 0, "keepends", jj_bool(false)), out = jj_list(&r->job, 0);
    struct jj_str s = STR(self);
    size_t cap = 0, start = 0, bytes = 0;
    for (size_t at = 0; at < s.n; at += bytes) {
        uint32_t ch = jj_char_at(s, at, &bytes);
        bool ends = (ch >= 10 && ch <= 13) || (ch >= 28 && ch <= 30) || ch == 0x85 || ch == 0x2028 || ch == 0x2029;
        if (!ends)
            continue;
        size_t n = at - start;
        if (ch == '\r' && at + 1 < s.n && s.s[at + 1] == '\n')
            bytes = 2;
        if (jj_truth(&r->job, &keep))
            n += bytes;
        append(&r->job, out.u.list, &cap, jj_string(s.s + start, n));
        start = at + bytes;
    }
    if (start < s.n)
        append(&r->job, out.u.list, &cap, jj_string(s.s + start, s.n - start));
    return out;
}

/* Simple case mapping, one character for one; ß and its like, whose capital is two letters, stay as they are. */
struct jj_value jj_str_case(struct jj *c, struct jj_str s, char how)
{
    struct jj_buf b = {0};
    bool start = true;
    size_t bytes = 0;
    char text[4];
    jj_step(c, s.n / 8);
    for (size_t i = 0; i < s.n; i += bytes) {
        utf8proc_int32_t ch = (utf8proc_int32_t)jj_char_at(s, i, &bytes);
        bool upper = how == 'u' || ((how == 'c' || how == 't') && start);
        ch = !upper ? utf8proc_tolower(ch) : how == 'u' ? utf8proc_toupper(ch) : utf8proc_totitle(ch);
        jj_put(c, &b, text, jj_put_char(text, (uint32_t)ch));
        utf8proc_category_t cat = utf8proc_category(ch);
        bool letter = cat >= UTF8PROC_CATEGORY_LU && cat <= UTF8PROC_CATEGORY_LT;
        start = how == 't' && !letter;
    }
    return jj_buf_value(&b);
}

static struct jj_value m_upper(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "upper");
    return jj_str_case(&r->job, STR(self), 'u');
}

static struct jj_value m_lower(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "lower");
    return jj_str_case(&r->job, STR(self), 'l');
}

static struct jj_value m_capitalize(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "capitalize");
    return jj_str_case(&r->job, STR(self), 'c');
}

static struct jj_value m_title(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "title");
    return jj_str_case(&r->job, STR(self), 't');
}

struct jj_value jj_str_replace(struct jj *c, struct jj_str s, struct jj_str from, struct jj_str to, int64_t count)
{
    struct jj_buf b = {0};
    size_t bytes = 0;
    while (count != 0) {
        size_t at = find(s, from, 0);
        if (at == SIZE_MAX)
            break;
        jj_step(c, 1);
        jj_put(c, &b, s.s, at);
        jj_put(c, &b, to.s, to.n);
        s.s += at + from.n;
        s.n -= at + from.n;
        count -= count > 0;
        if (from.n > 0)
            continue;
        if (s.n == 0)
            return jj_buf_value(&b);
        jj_char_at(s, 0, &bytes); /* an empty one stands between all characters */
        jj_put(c, &b, s.s, bytes);
        s.s += bytes;
        s.n -= bytes;
    }
    jj_put(c, &b, s.s, s.n);
    return jj_buf_value(&b);
}

static struct jj_value m_replace(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_str from = string_arg(r, args, 0, "old", "replace"), to = string_arg(r, args, 1, "new", "replace");
    struct jj_value count = jj_arg(args, 2, "count", jj_int(-1));
    jj_arg_count(r, args, 3, "replace");
    return jj_str_replace(&r->job, STR(self), from, to, jj_integer(&r->job, &count, "replace"));
}

static struct jj_value m_join(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value of = jj_arg(args, 0, NULL, jj_undefined("the list", 8));
    const struct jj_list *l = jj_iterate(&r->job, &of);
    struct jj_buf b = {0};
    for (size_t i = 0; i < l->n; i++) {
        struct jj_str s = jj_need_string(&r->job, &l->v[i], "join");
        if (i)
            jj_put(&r->job, &b, STR(self).s, STR(self).n);
        jj_put(&r->job, &b, s.s, s.n);
    }
    return jj_buf_value(&b);
}

static struct jj_value m_find(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    size_t at = find(STR(self), string_arg(r, args, 0, NULL, "find"), 0);
    jj_arg_count(r, args, 1, "find");
    return jj_int(at == SIZE_MAX ? -1 : (int64_t)jj_char_count((struct jj_str){STR(self).s, at}));
}

static struct jj_value m_count_str(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_str part = string_arg(r, args, 0, NULL, "count"), s = STR(self);
    int64_t n = 0;
    jj_arg_count(r, args, 1, "count");
    if (part.n == 0)
        return jj_int((int64_t)jj_char_count(s) + 1);
    for (size_t at = 0; (at = find(s, part, at)) != SIZE_MAX; at += part.n)
        n++;
    return jj_int(n);
}

static struct jj_value all_chars(struct jj_str s, bool (*is)(uint32_t ch))
{
    size_t bytes = 0;
    for (size_t i = 0; i < s.n; i += bytes)
        if (!is(jj_char_at(s, i, &bytes)))
            return jj_bool(false);
    return jj_bool(s.n > 0);
}

static bool is_decimal(uint32_t ch)
{
    return utf8proc_category((utf8proc_int32_t)ch) == UTF8PROC_CATEGORY_ND;
}

static bool is_letter(uint32_t ch)
{
    utf8proc_category_t cat = utf8proc_category((utf8proc_int32_t)ch);
    return cat >= UTF8PROC_CATEGORY_LU && cat <= UTF8PROC_CATEGORY_LO;
}

static struct jj_value m_isspace(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "isspace");
    return all_chars(STR(self), jj_is_space);
}

static struct jj_value m_isdigit(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "isdigit");
    return all_chars(STR(self), is_decimal);
}

static struct jj_value m_isalpha(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    jj_arg_count(r, args, 0, "isalpha");
    return all_chars(STR(self), is_letter);
}

/* ---- dict, list, loop ---- */

static struct jj_value m_items(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    const struct jj_dict *d = self.u.dict;
    struct jj_value out = jj_list(&r->job, d->n);
    jj_arg_count(r, args, 0, "items");
    jj_step(&r->job, d->n);
    for (size_t i = 0; i < d->n; i++)
        out.u.list->v[i] = jj_pair_value(&r->job, jj_dict_key(d, i), d->pair[i].value);
    return out;
}

static struct jj_value m_keys(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value out = {.type = JJ_LIST};
    jj_arg_count(r, args, 0, "keys");
    out.u.list = jj_iterate(&r->job, &self);
    return out;
}

static struct jj_value m_values(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value out = jj_list(&r->job, self.u.dict->n);
    jj_arg_count(r, args, 0, "values");
    for (size_t i = 0; i < out.u.list->n; i++)
        out.u.list->v[i] = self.u.dict->pair[i].value;
    return out;
}

static struct jj_value m_get(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value key = jj_arg(args, 0, NULL, jj_undefined("key", 3)), other = jj_arg(args, 1, NULL, jj_none());
    jj_arg_count(r, args, 2, "get");
    const struct jj_value *v = jj_dict_find(&r->job, self.u.dict, &key);
    return v ? *v : other;
}

static struct jj_value m_index(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value what = jj_arg(args, 0, NULL, jj_undefined("value", 5));
    for (size_t i = 0; i < self.u.list->n; i++)
        if (jj_equal(&r->job, &self.u.list->v[i], &what))
            return jj_int((int64_t)i);
    jj_fail(&r->job, ST_INVALID_ARGUMENT, "index: the value is not in the list");
}

static struct jj_value m_count_list(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value what = jj_arg(args, 0, NULL, jj_undefined("value", 5));
    int64_t n = 0;
    for (size_t i = 0; i < self.u.list->n; i++)
        n += jj_equal(&r->job, &self.u.list->v[i], &what);
    return jj_int(n);
}

static struct jj_value m_cycle(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    if (args->n == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "loop.cycle: no values");
    return args->v[self.u.loop->index % args->n];
}

static const struct jj_builtin string_methods[] = {
    {"strip", m_strip},
    {"lstrip", m_lstrip},
    {"rstrip", m_rstrip},
    {"startswith", m_startswith},
    {"endswith", m_endswith},
    {"split", m_split},
    {"rsplit", m_rsplit},
    {"splitlines", m_splitlines},
    {"upper", m_upper},
    {"lower", m_lower},
    {"capitalize", m_capitalize},
    {"title", m_title},
    {"replace", m_replace},
    {"join", m_join},
    {"find", m_find},
    {"count", m_count_str},
    {"isspace", m_isspace},
    {"isdigit", m_isdigit},
    {"isalpha", m_isalpha},
    {"casefold", NULL},
    {"center", NULL},
    {"encode", NULL},
    {"expandtabs", NULL},
    {"format", jj_format},
    {"format_map", NULL},
    {"index", NULL},
    {"isalnum", NULL},
    {"isdecimal", NULL},
    {"islower", NULL},
    {"isnumeric", NULL},
    {"istitle", NULL},
    {"isupper", NULL},
    {"ljust", NULL},
    {"partition", NULL},
    {"removeprefix", NULL},
    {"removesuffix", NULL},
    {"rfind", NULL},
    {"rindex", NULL},
    {"rjust", NULL},
    {"rpartition", NULL},
    {"swapcase", NULL},
    {"translate", NULL},
    {"zfill", NULL},
    {NULL, NULL},
};
static const struct jj_builtin dict_methods[] = {
    {"items", m_items}, {"keys", m_keys}, {"values", m_values}, {"get", m_get},    {"copy", NULL}, {"pop", NULL},
    {"update", NULL},   {"clear", NULL},  {"setdefault", NULL}, {"popitem", NULL}, {NULL, NULL},
};
static const struct jj_builtin list_methods[] = {
    {"index", m_index}, {"count", m_count_list}, {"append", NULL}, {"insert", NULL}, {"pop", NULL},  {"remove", NULL},
    {"extend", NULL},   {"reverse", NULL},       {"sort", NULL},   {"clear", NULL},  {"copy", NULL}, {NULL, NULL},
};
static const struct jj_builtin loop_methods[] = {{"cycle", m_cycle}, {"changed", NULL}, {NULL, NULL}};

const struct jj_builtin *jj_find_method(const struct jj_value *of, struct jj_str name, bool *known)
{
    const struct jj_builtin *table = of->type == JJ_STRING ? string_methods
                                     : of->type == JJ_DICT ? dict_methods
                                     : of->type == JJ_LIST ? list_methods
                                     : of->type == JJ_LOOP ? loop_methods
                                                           : NULL;
    for (; table && table->name; table++)
        if (jj_str_is(name, table->name)) {
            *known = true;
            return table->fn ? table : NULL;
        }
    return NULL;
}

/* ---- functions ---- */

static struct jj_value g_range(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value a = jj_arg(args, 0, NULL, jj_undefined("stop", 4)), b = jj_arg(args, 1, NULL, jj_none());
    struct jj_value c = jj_arg(args, 2, NULL, jj_int(1));
    (void)self;
    jj_arg_count(r, args, 3, "range");
    int64_t from = b.type == JJ_NONE ? 0 : jj_integer(&r->job, &a, "range");
    int64_t to = jj_integer(&r->job, b.type == JJ_NONE ? &a : &b, "range"), step = jj_integer(&r->job, &c, "range");
    if (step == 0)
        jj_fail(&r->job, ST_INVALID_ARGUMENT, "range: a step of 0");
    uint64_t n = 0;
    if (step > 0 ? from < to : from > to)
        n = (step > 0 ? (uint64_t)to - (uint64_t)from - 1 : (uint64_t)from - (uint64_t)to - 1) /
                (step > 0 ? (uint64_t)step : -(uint64_t)step) +
            1;
    if (n > 100000)
        jj_fail(&r->job, ST_RESOURCE_EXHAUSTED, "range: %llu values, expected at most 100000", (unsigned long long)n);
    struct jj_value out = jj_list(&r->job, (size_t)n);
    for (size_t i = 0; i < n; i++)
        out.u.list->v[i] = jj_int(from + (int64_t)i * step);
    jj_step(&r->job, n);
    return out;
}

static struct jj_value new_dict(struct jj_render *r, const struct jj_args *args, enum jj_type type, const char *of)
{
    struct jj_value out = jj_dict(&r->job);
    jj_arg_count(r, args, 1, of);
    if (args->n == 1) {
        if (args->v[0].type != JJ_DICT)
            jj_fail(&r->job, ST_INVALID_ARGUMENT, "%s: %s, expected a dictionary or names", of, jj_type_name(args->v));
        for (size_t i = 0; i < args->v[0].u.dict->n; i++) {
            struct jj_value key = jj_dict_key(args->v[0].u.dict, i);
            jj_dict_put(&r->job, out.u.dict, &key, args->v[0].u.dict->pair[i].value);
        }
    }
    for (size_t i = 0; i < args->n_kw; i++)
        jj_dict_set(&r->job, out.u.dict, args->kw[i].key, args->kw[i].value);
    out.type = type;
    return out;
}

static struct jj_value g_namespace(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    (void)self;
    return new_dict(r, args, JJ_NAMESPACE, "namespace");
}

static struct jj_value g_dict(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    (void)self;
    return new_dict(r, args, JJ_DICT, "dict");
}

static struct jj_value g_raise(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_value v = jj_arg(args, 0, NULL, jj_text("the template refuses these messages"));
    struct jj_str s = jj_to_str(&r->job, &v);
    (void)self;
    jj_fail(&r->job, ST_INVALID_ARGUMENT, "%.*s", (int)(s.n < 400 ? s.n : 400), s.s);
}

static struct jj_value g_strftime(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_str format = string_arg(r, args, 0, NULL, "strftime_now");
    char *text = jj_alloc(&r->job, 512), *copy = jj_alloc(&r->job, format.n + 1);
    time_t now = time(NULL);
    struct tm tm;
    (void)self;
    memcpy(copy, format.s, format.n);
    localtime_r(&now, &tm);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral" /* the format is the template's */
    size_t n = strftime(text, 512, copy, &tm);
#pragma GCC diagnostic pop
    return jj_string(text, n);
}

static const struct jj_builtin globals[] = {
    {"range", g_range},           {"namespace", g_namespace},   {"dict", g_dict},
    {"raise_exception", g_raise}, {"strftime_now", g_strftime},
};

const struct jj_builtin *jj_find_global(struct jj_str name)
{
    for (size_t i = 0; i < sizeof globals / sizeof *globals; i++)
        if (jj_str_is(name, globals[i].name))
            return &globals[i];
    return NULL;
}
