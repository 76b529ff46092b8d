/* Values as Python sees them: truth, equality, order, iteration. */
#include <math.h>
#include <string.h>

#include "coordinator/jinja_internal.h"

struct jj_value jj_bool(bool b)
{
    return (struct jj_value){.type = JJ_BOOL, .u.b = b};
}

struct jj_value jj_int(int64_t i)
{
    return (struct jj_value){.type = JJ_INT, .u.i = i};
}

struct jj_value jj_none(void)
{
    return (struct jj_value){.type = JJ_NONE};
}

struct jj_value jj_string(const char *s, size_t n)
{
    return (struct jj_value){.type = JJ_STRING, .u.str = {s, n}};
}

struct jj_value jj_text(const char *s)
{
    return jj_string(s, strlen(s));
}

struct jj_value jj_undefined(const char *s, size_t n)
{
    return (struct jj_value){.type = JJ_UNDEFINED, .u.str = {s, n}};
}

struct jj_value jj_list(struct jj *c, size_t n)
{
    struct jj_list *l = jj_alloc(c, sizeof *l);
    l->n = n;
    l->v = jj_alloc(c, n * sizeof *l->v);
    return (struct jj_value){.type = JJ_LIST, .u.list = l};
}

struct jj_value jj_pair_value(struct jj *c, struct jj_value a, struct jj_value b)
{
    struct jj_value out = jj_list(c, 2);
    out.u.list->v[0] = a;
    out.u.list->v[1] = b;
    out.u.list->tuple = true;
    return out;
}

struct jj_value jj_dict(struct jj *c)
{
    return (struct jj_value){.type = JJ_DICT, .u.dict = jj_alloc(c, sizeof(struct jj_dict))};
}

bool jj_str_eq(struct jj_str a, struct jj_str b)
{
    return a.n == b.n && (a.n == 0 || memcmp(a.s, b.s, a.n) == 0);
}

bool jj_str_is(struct jj_str s, const char *text)
{
    return s.n == strlen(text) && memcmp(s.s, text, s.n) == 0;
}

const struct jj_value *jj_dict_get(const struct jj_dict *d, struct jj_str key)
{
    for (size_t i = 0; i < d->n; i++)
        if (!d->pair[i].whole && jj_str_eq(d->pair[i].key, key))
            return &d->pair[i].value;
    return NULL;
}

static int64_t whole_key(const struct jj_pair *p)
{
    uint64_t n = 0;
    size_t i = p->key.s[0] == '-';
    for (; i < p->key.n; i++)
        n = n * 10 + (uint64_t)(p->key.s[i] - '0');
    return (int64_t)(p->key.s[0] == '-' ? -n : n);
}

struct jj_value jj_dict_key(const struct jj_dict *d, size_t i)
{
    const struct jj_pair *p = &d->pair[i];
    return p->whole ? jj_int(whole_key(p)) : jj_string(p->key.s, p->key.n);
}

/* Of an integer, which True and False are too. */
static struct jj_value *find_whole(struct jj *c, const struct jj_dict *d, const struct jj_value *key)
{
    int64_t n = jj_integer(c, key, "a key");
    for (size_t i = 0; i < d->n; i++)
        if (d->pair[i].whole && whole_key(&d->pair[i]) == n)
            return &d->pair[i].value;
    return NULL;
}

const struct jj_value *jj_dict_find(struct jj *c, const struct jj_dict *d, const struct jj_value *key)
{
    jj_step(c, d->n / 8);
    if (key->type == JJ_INT || key->type == JJ_BOOL)
        return find_whole(c, d, key);
    return key->type == JJ_STRING ? jj_dict_get(d, key->u.str) : NULL;
}

/* Behind the last pair; the key is new. */
static void dict_add(struct jj *c, struct jj_dict *d, struct jj_str key, struct jj_value v)
{
    if (d->n == d->cap) {
        size_t cap = d->cap ? 2 * d->cap : 8;
        struct jj_pair *p = jj_alloc(c, cap * sizeof *p);
        if (d->n)
            memcpy(p, d->pair, d->n * sizeof *p);
        d->pair = p;
        d->cap = cap;
    }
    d->pair[d->n++] = (struct jj_pair){key, v, false};
}

void jj_dict_set(struct jj *c, struct jj_dict *d, struct jj_str key, struct jj_value v)
{
    jj_step(c, d->n);
    for (size_t i = 0; i < d->n; i++)
        if (!d->pair[i].whole && jj_str_eq(d->pair[i].key, key)) {
            d->pair[i].value = v;
            return;
        }
    dict_add(c, d, key, v);
}

void jj_dict_put(struct jj *c, struct jj_dict *d, const struct jj_value *key, struct jj_value v)
{
    if (key->type == JJ_STRING) {
        jj_dict_set(c, d, key->u.str, v);
        return;
    }
    if (key->type != JJ_INT)
        jj_fail(c, ST_UNIMPLEMENTED, "a dictionary's key that is a %s is not supported, only strings and integers are",
                jj_type_name(key));
    jj_step(c, d->n);
    struct jj_value *has = find_whole(c, d, key);
    if (has) {
        *has = v;
        return;
    }
    dict_add(c, d, jj_to_str(c, key), v);
    d->pair[d->n - 1].whole = true;
}

/* Strings stay in the JSON value, which outlives the job. Keys of a JSON object are unique. */
struct jj_value jj_from_json(struct jj *c, const json_t *j)
{
    struct jj_value out = jj_none();
    jj_enter(c);
    switch (json_typeof(j)) {
    case JSON_NULL:
        break;
    case JSON_TRUE:
    case JSON_FALSE:
        out = jj_bool(json_is_true(j));
        break;
    case JSON_INTEGER:
        out = jj_int((int64_t)json_integer_value(j));
        break;
    case JSON_REAL:
        out = (struct jj_value){.type = JJ_FLOAT, .u.f = json_real_value(j)};
        break;
    case JSON_STRING:
        out = jj_string(json_string_value(j), json_string_length(j));
        break;
    case JSON_ARRAY:
        out = jj_list(c, json_array_size(j));
        for (size_t i = 0; i < out.u.list->n; i++)
            out.u.list->v[i] = jj_from_json(c, json_array_get(j, i));
        break;
    case JSON_OBJECT: {
        const char *key;
        json_t *value;
        out = jj_dict(c);
        json_object_foreach((json_t *)j, key, value)
            dict_add(c, out.u.dict, (struct jj_str){key, strlen(key)}, jj_from_json(c, value));
        break;
    }
    }
    c->depth--;
    return out;
}

const char *jj_type_name(const struct jj_value *v)
{
    static const char *const names[] = {"undefined", "None", "bool",      "int",  "float",   "str",
                                        "list",      "dict", "namespace", "loop", "callable"};
    return names[v->type];
}

bool jj_truth(struct jj *c, const struct jj_value *v)
{
    (void)c;
    switch (v->type) {
    case JJ_UNDEFINED:
    case JJ_NONE:
        return false;
    case JJ_BOOL:
        return v->u.b;
    case JJ_INT:
        return v->u.i != 0;
    case JJ_FLOAT:
        return v->u.f != 0;
    case JJ_STRING:
        return v->u.str.n > 0;
    case JJ_LIST:
        return v->u.list->n > 0;
    case JJ_DICT:
        return v->u.dict->n > 0;
    default:
        return true;
    }
}

static bool is_number(const struct jj_value *v)
{
    return v->type == JJ_BOOL || v->type == JJ_INT || v->type == JJ_FLOAT;
}

double jj_number(struct jj *c, const struct jj_value *v, const char *what)
{
    if (v->type == JJ_FLOAT)
        return v->u.f;
    if (v->type == JJ_INT)
        return (double)v->u.i;
    if (v->type == JJ_BOOL)
        return v->u.b;
    jj_fail(c, ST_INVALID_ARGUMENT, "%s: %s, expected a number", what, jj_type_name(v));
}

int64_t jj_integer(struct jj *c, const struct jj_value *v, const char *what)
{
    if (v->type == JJ_INT)
        return v->u.i;
    if (v->type == JJ_BOOL)
        return v->u.b;
    jj_fail(c, ST_INVALID_ARGUMENT, "%s: %s, expected an integer", what, jj_type_name(v));
}

struct jj_str jj_need_string(struct jj *c, const struct jj_value *v, const char *what)
{
    if (v->type == JJ_UNDEFINED)
        jj_fail(c, ST_INVALID_ARGUMENT, "%s: '%.*s' is undefined", what, (int)(v->u.str.n < 60 ? v->u.str.n : 60),
                v->u.str.s);
    if (v->type != JJ_STRING)
        jj_fail(c, ST_INVALID_ARGUMENT, "%s: %s, expected a string", what, jj_type_name(v));
    return v->u.str;
}

static bool equal_lists(struct jj *c, const struct jj_list *a, const struct jj_list *b)
{
    if (a->n != b->n || a->tuple != b->tuple)
        return false;
    for (size_t i = 0; i < a->n; i++)
        if (!jj_equal(c, &a->v[i], &b->v[i]))
            return false;
    return true;
}

static bool equal_dicts(struct jj *c, const struct jj_dict *a, const struct jj_dict *b)
{
    if (a->n != b->n)
        return false;
    for (size_t i = 0; i < a->n; i++) {
        jj_step(c, b->n);
        struct jj_value key = jj_dict_key(a, i);
        const struct jj_value *other = jj_dict_find(c, b, &key);
        if (!other || !jj_equal(c, &a->pair[i].value, other))
            return false;
    }
    return true;
}

bool jj_equal(struct jj *c, const struct jj_value *a, const struct jj_value *b)
{
    bool same = false;
    jj_step(c, 1);
    if (is_number(a) && is_number(b)) {
        if (a->type != JJ_FLOAT && b->type != JJ_FLOAT)
            return jj_integer(c, a, "==") == jj_integer(c, b, "==");
        return jj_number(c, a, "==") == jj_number(c, b, "==");
    }
    if (a->type != b->type)
        return false;
    jj_enter(c);
    switch (a->type) {
    case JJ_UNDEFINED:
    case JJ_NONE:
        same = true;
        break;
    case JJ_STRING:
        same = jj_str_eq(a->u.str, b->u.str);
        break;
    case JJ_LIST:
        same = equal_lists(c, a->u.list, b->u.list);
        break;
    case JJ_DICT:
        same = equal_dicts(c, a->u.dict, b->u.dict);
        break;
    default:
        same = a->u.dict == b->u.dict; /* the same object */
    }
    c->depth--;
    return same;
}

int jj_order(struct jj *c, const struct jj_value *a, const struct jj_value *b)
{
    jj_step(c, 1);
    if (is_number(a) && is_number(b)) {
        if (a->type != JJ_FLOAT && b->type != JJ_FLOAT) {
            int64_t x = jj_integer(c, a, "<"), y = jj_integer(c, b, "<");
            return (x > y) - (x < y);
        }
        double x = jj_number(c, a, "<"), y = jj_number(c, b, "<");
        return (x > y) - (x < y);
    }
    if (a->type == JJ_STRING && b->type == JJ_STRING) { /* UTF-8 sorts as its code points do */
        size_t n = a->u.str.n < b->u.str.n ? a->u.str.n : b->u.str.n;
        int d = n ? memcmp(a->u.str.s, b->u.str.s, n) : 0;
        return d ? d : (a->u.str.n > b->u.str.n) - (a->u.str.n < b->u.str.n);
    }
    if (a->type == JJ_LIST && b->type == JJ_LIST) {
        const struct jj_list *x = a->u.list, *y = b->u.list;
        jj_enter(c);
        for (size_t i = 0; i < x->n && i < y->n; i++)
            if (!jj_equal(c, &x->v[i], &y->v[i])) {
                int d = jj_order(c, &x->v[i], &y->v[i]);
                c->depth--;
                return d;
            }
        c->depth--;
        return (x->n > y->n) - (x->n < y->n);
    }
    jj_fail(c, ST_INVALID_ARGUMENT, "%s and %s have no order", jj_type_name(a), jj_type_name(b));
}

static bool str_contains(struct jj_str s, struct jj_str part)
{
    return part.n == 0 || (part.n <= s.n && memmem(s.s, s.n, part.s, part.n) != NULL);
}

bool jj_contains(struct jj *c, const struct jj_value *item, const struct jj_value *in)
{
    switch (in->type) {
    case JJ_UNDEFINED:
        return false;
    case JJ_STRING:
        jj_step(c, in->u.str.n / 64);
        return str_contains(in->u.str, jj_need_string(c, item, "the left side of \"in\" a string"));
    case JJ_LIST:
        for (size_t i = 0; i < in->u.list->n; i++)
            if (jj_equal(c, item, &in->u.list->v[i]))
                return true;
        return false;
    case JJ_DICT:
        jj_step(c, in->u.dict->n);
        return jj_dict_find(c, in->u.dict, item) != NULL;
    default:
        jj_fail(c, ST_INVALID_ARGUMENT, "\"in\" %s, expected a string, a list or a dictionary", jj_type_name(in));
    }
}

struct jj_list *jj_iterate(struct jj *c, const struct jj_value *v)
{
    struct jj_list *out;
    size_t n = 0, at = 0, bytes = 0;
    switch (v->type) {
    case JJ_LIST:
        return v->u.list;
    case JJ_UNDEFINED:
        return jj_list(c, 0).u.list;
    case JJ_DICT:
        out = jj_list(c, v->u.dict->n).u.list;
        for (size_t i = 0; i < out->n; i++)
            out->v[i] = jj_dict_key(v->u.dict, i);
        return out;
    case JJ_STRING:
        out = jj_list(c, jj_char_count(v->u.str)).u.list;
        jj_step(c, out->n);
        for (; at < v->u.str.n; at += bytes) {
            jj_char_at(v->u.str, at, &bytes);
            out->v[n++] = jj_string(v->u.str.s + at, bytes);
        }
        return out;
    default:
        jj_fail(c, ST_INVALID_ARGUMENT, "%s cannot be iterated over", jj_type_name(v));
    }
}
