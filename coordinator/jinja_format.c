/* str.format: "{}", "{0}", "{name}", each with ".attribute" and "[item]" behind it and with "!r" or "!s". How wide or how
 * exact a value is to be ("{:>8}") is not supported, and is refused by what stands there. */
#include <string.h>

#include "coordinator/jinja_internal.h"

struct field {
    struct jj_render *r;
    const struct jj_args *args;
    size_t next;         /* the argument of the next {} */
    bool counted, named; /* there was a {}, there was a {0} */
};

static bool digits(struct jj_str s)
{
    for (size_t i = 0; i < s.n; i++)
        if (s.s[i] < '0' || s.s[i] > '9')
            return false;
    return s.n > 0;
}

/* A number of up to 9 digits; more is past any list. */
static size_t number(struct jj_str s)
{
    size_t n = 0;
    if (s.n > 9)
        return SIZE_MAX;
    for (size_t i = 0; i < s.n; i++)
        n = n * 10 + (size_t)(s.s[i] - '0');
    return n;
}

static struct jj_value by_place(struct field *f, size_t i)
{
    if (i >= f->args->n)
        jj_fail(&f->r->job, ST_INVALID_ARGUMENT, "format: there are %zu values, none for {%zu}", f->args->n, i);
    return f->args->v[i];
}

/* What stands before the first "." or "[". */
static struct jj_value first(struct field *f, struct jj_str name)
{
    bool place = name.n == 0 || digits(name);
    f->counted = f->counted || name.n == 0;
    f->named = f->named || (place && name.n > 0);
    if (f->counted && f->named)
        jj_fail(&f->r->job, ST_INVALID_ARGUMENT, "format: {} and {0} in one text");
    if (place)
        return by_place(f, name.n ? number(name) : f->next++);
    for (size_t i = 0; i < f->args->n_kw; i++)
        if (jj_str_eq(f->args->kw[i].key, name))
            return f->args->kw[i].value;
    jj_fail(&f->r->job, ST_INVALID_ARGUMENT, "format: no value for {%.*s}", (int)(name.n < 60 ? name.n : 60), name.s);
}

static bool one_of(char c, const char *set)
{
    return c && strchr(set, c);
}

static size_t until(struct jj_str s, size_t at, const char *ends)
{
    while (at < s.n && !one_of(s.s[at], ends))
        at++;
    return at;
}

/* name.attribute[item] ... */
static struct jj_value look_up(struct field *f, struct jj_str path)
{
    size_t at = until(path, 0, ".[");
    struct jj_value v = first(f, (struct jj_str){path.s, at});
    while (at < path.n) {
        bool item = path.s[at] == '[';
        size_t end = item ? until(path, at + 1, "]") : until(path, at + 1, ".[");
        struct jj_str part = {path.s + at + 1, end - at - 1};
        if (part.n == 0 || (item && (end == path.n || (end + 1 < path.n && !one_of(path.s[end + 1], ".[")))))
            jj_fail(&f->r->job, ST_INVALID_ARGUMENT, "format: {%.*s}, expected {name.attribute[item]}",
                    (int)(path.n < 60 ? path.n : 60), path.s);
        struct jj_value key = item && digits(part) ? jj_int((int64_t)number(part)) : jj_string(part.s, part.n);
        v = item ? jj_item(f->r, v, key) : jj_attribute(f->r, v, part);
        at = end + item;
    }
    return v;
}

/* What stands between { and }. */
static void put_field(struct field *f, struct jj_buf *b, struct jj_str s)
{
    struct jj *c = &f->r->job;
    size_t end = until(s, 0, "!:");
    struct jj_value v = look_up(f, (struct jj_str){s.s, end});
    bool repr = end + 1 < s.n && s.s[end] == '!' && s.s[end + 1] == 'r';
    bool plain = end + 1 < s.n && s.s[end] == '!' && s.s[end + 1] == 's';
    size_t rest = end + (repr || plain ? 2 : 0);
    rest += rest < s.n && s.s[rest] == ':';
    if (rest < s.n)
        jj_fail(c, ST_UNIMPLEMENTED, "format: \"%.*s\" in {%.*s} is not supported",
                (int)(s.n - end < 60 ? s.n - end : 60), s.s + end, (int)(s.n < 60 ? s.n : 60), s.s);
    if (repr)
        jj_put_repr(c, b, &v);
    else
        jj_put_str(c, b, &v);
}

struct jj_value jj_format(struct jj_render *r, struct jj_value self, const struct jj_args *args)
{
    struct jj_str s = self.u.str;
    struct jj_buf b = {0};
    struct field f = {.r = r, .args = args};
    if (self.safe)
        jj_fail(&r->job, ST_UNIMPLEMENTED, "the method \"format\" of a safe string is not supported");
    for (size_t at = 0, end; at < s.n; at = end) {
        end = until(s, at, "{}");
        jj_put(&r->job, &b, s.s + at, end - at);
        if (end == s.n)
            break;
        if (end + 1 < s.n && s.s[end + 1] == s.s[end]) { /* {{ and }} */
            jj_put(&r->job, &b, s.s + end, 1);
            end += 2;
            continue;
        }
        size_t close = until(s, end + 1, "}");
        if (s.s[end] == '}' || close == s.n || until(s, end + 1, "{") < close)
            jj_fail(&r->job, ST_INVALID_ARGUMENT, "format: a single %c", s.s[end]);
        put_field(&f, &b, (struct jj_str){s.s + end + 1, close - end - 1});
        end = close + 1;
        jj_step(&r->job, 1);
    }
    return jj_buf_value(&b);
}
