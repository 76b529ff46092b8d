/* UTF-8, and values as text: Python's str(), repr() and json.dumps(). */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "coordinator/jinja_internal.h"

/* ---- UTF-8 ---- */

uint32_t jj_char_at(struct jj_str s, size_t at, size_t *bytes)
{
    const unsigned char *p = (const unsigned char *)s.s + at;
    size_t left = s.n - at;
    if (p[0] >= 0xf0 && left >= 4) {
        *bytes = 4;
        return (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    }
    if (p[0] >= 0xe0 && p[0] < 0xf0 && left >= 3) {
        *bytes = 3;
        return (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    }
    if (p[0] >= 0xc0 && p[0] < 0xe0 && left >= 2) {
        *bytes = 2;
        return (p[0] & 31u) << 6 | (p[1] & 63u);
    }
    *bytes = 1;
    return p[0];
}

size_t jj_put_char(char out[4], uint32_t code)
{
    return (size_t)utf8proc_encode_char((utf8proc_int32_t)code, (utf8proc_uint8_t *)out);
}

bool jj_is_space(uint32_t ch)
{
    return (ch >= 9 && ch <= 13) || (ch >= 28 && ch <= 32) || ch == 0x85 || ch == 0xa0 || ch == 0x1680 ||
           (ch >= 0x2000 && ch <= 0x200a) || ch == 0x2028 || ch == 0x2029 || ch == 0x202f || ch == 0x205f ||
           ch == 0x3000;
}

size_t jj_char_count(struct jj_str s)
{
    size_t n = 0;
    for (size_t i = 0; i < s.n; i++)
        n += ((unsigned char)s.s[i] & 0xc0) != 0x80;
    return n;
}

static bool strips(uint32_t ch, const struct jj_str *chars)
{
    size_t bytes;
    if (!chars)
        return jj_is_space(ch);
    for (size_t i = 0; i < chars->n; i += bytes)
        if (jj_char_at(*chars, i, &bytes) == ch)
            return true;
    return false;
}

struct jj_str jj_strip(struct jj_str s, unsigned sides, const struct jj_str *chars)
{
    size_t bytes = 0;
    while (sides & JJ_LEFT && s.n > 0 && strips(jj_char_at(s, 0, &bytes), chars)) {
        s.s += bytes;
        s.n -= bytes;
    }
    while (sides & JJ_RIGHT && s.n > 0) {
        size_t last = s.n - 1;
        while (last > 0 && ((unsigned char)s.s[last] & 0xc0) == 0x80)
            last--;
        if (!strips(jj_char_at(s, last, &bytes), chars))
            break;
        s.n = last;
    }
    return s;
}

/* ---- numbers ---- */

/* The shortest decimal that reads back as the same number, as Python writes it: 1.0, 0.1, 1e+16, 1e-05, inf, nan. */
static void put_float(struct jj *c, struct jj_buf *b, double f)
{
    char e[40], digits[24], text[64];
    int precision = 0, n = 0;
    if (isnan(f) || isinf(f)) {
        jj_puts(c, b, isnan(f) ? "nan" : f < 0 ? "-inf" : "inf");
        return;
    }
    do
        snprintf(e, sizeof e, "%.*e", precision, f);
    while (strtod(e, NULL) != f && ++precision < 17);
    int exponent = atoi(strchr(e, 'e') + 1);
    for (const char *p = e; *p != 'e'; p++)
        if (*p >= '0' && *p <= '9')
            digits[n++] = *p;
    digits[n] = '\0';
    const char *sign = e[0] == '-' ? "-" : "";
    if (exponent < -4 || exponent >= 16)
        snprintf(text, sizeof text, "%s%c%s%se%+03d", sign, digits[0], n > 1 ? "." : "", digits + 1, exponent);
    else if (exponent < 0)
        snprintf(text, sizeof text, "%s0.%.*s%s", sign, -exponent - 1, "0000", digits);
    else if (n <= exponent + 1)
        snprintf(text, sizeof text, "%s%s%.*s.0", sign, digits, exponent + 1 - n, "0000000000000000");
    else
        snprintf(text, sizeof text, "%s%.*s.%s", sign, exponent + 1, digits, digits + exponent + 1);
    jj_puts(c, b, text);
}

static void put_int(struct jj *c, struct jj_buf *b, int64_t i)
{
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, i);
    jj_puts(c, b, text);
}

/* ---- repr ---- */

static bool prints(uint32_t ch)
{
    switch (utf8proc_category((utf8proc_int32_t)ch)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
        return false;
    case UTF8PROC_CATEGORY_ZS:
        return ch == ' ';
    default:
        return true;
    }
}

static void put_quoted(struct jj *c, struct jj_buf *b, struct jj_str s)
{
    char quote = memchr(s.s, '\'', s.n) && !memchr(s.s, '"', s.n) ? '"' : '\'', text[16];
    size_t bytes = 0;
    jj_put(c, b, &quote, 1);
    for (size_t i = 0; i < s.n; i += bytes) {
        uint32_t ch = jj_char_at(s, i, &bytes);
        if (ch == (unsigned char)quote || ch == '\\')
            snprintf(text, sizeof text, "\\%c", (char)ch);
        else if (ch == '\n' || ch == '\r' || ch == '\t')
            snprintf(text, sizeof text, "\\%c", ch == '\n' ? 'n' : ch == '\r' ? 'r' : 't');
        else if (prints(ch))
            text[0] = '\0';
        else
            snprintf(text, sizeof text,
                     ch < 0x100     ? "\\x%02" PRIx32
                     : ch < 0x10000 ? "\\u%04" PRIx32
                                    : "\\U%08" PRIx32,
                     ch);
        if (text[0])
            jj_puts(c, b, text);
        else
            jj_put(c, b, s.s + i, bytes);
    }
    jj_put(c, b, &quote, 1);
}

static void put_dict_repr(struct jj *c, struct jj_buf *b, const struct jj_dict *d)
{
    jj_puts(c, b, "{");
    for (size_t i = 0; i < d->n; i++) {
        jj_puts(c, b, i ? ", " : "");
        if (d->pair[i].whole)
            jj_put(c, b, d->pair[i].key.s, d->pair[i].key.n);
        else
            put_quoted(c, b, d->pair[i].key);
        jj_puts(c, b, ": ");
        jj_put_repr(c, b, &d->pair[i].value);
    }
    jj_puts(c, b, "}");
}

void jj_put_repr(struct jj *c, struct jj_buf *b, const struct jj_value *v)
{
    jj_step(c, 1);
    jj_enter(c);
    switch (v->type) {
    case JJ_STRING:
        put_quoted(c, b, v->u.str);
        break;
    case JJ_LIST:
        jj_puts(c, b, v->u.list->tuple ? "(" : "[");
        for (size_t i = 0; i < v->u.list->n; i++) {
            jj_puts(c, b, i ? ", " : "");
            jj_put_repr(c, b, &v->u.list->v[i]);
        }
        jj_puts(c, b, !v->u.list->tuple ? "]" : v->u.list->n == 1 ? ",)" : ")");
        break;
    case JJ_DICT:
        put_dict_repr(c, b, v->u.dict);
        break;
    case JJ_UNDEFINED:
        jj_puts(c, b, "Undefined");
        break;
    case JJ_NAMESPACE:
    case JJ_LOOP:
    case JJ_CALLABLE:
        jj_fail(c, ST_INVALID_ARGUMENT, "a %s has no text", jj_type_name(v));
    default:
        jj_put_str(c, b, v);
    }
    c->depth--;
}

void jj_put_str(struct jj *c, struct jj_buf *b, const struct jj_value *v)
{
    switch (v->type) {
    case JJ_UNDEFINED:
        return;
    case JJ_NONE:
        jj_puts(c, b, "None");
        return;
    case JJ_BOOL:
        jj_puts(c, b, v->u.b ? "True" : "False");
        return;
    case JJ_INT:
        put_int(c, b, v->u.i);
        return;
    case JJ_FLOAT:
        put_float(c, b, v->u.f);
        return;
    case JJ_STRING:
        jj_put(c, b, v->u.str.s, v->u.str.n);
        return;
    default:
        jj_put_repr(c, b, v);
    }
}

struct jj_str jj_to_str(struct jj *c, const struct jj_value *v)
{
    struct jj_buf b = {0};
    if (v->type == JJ_STRING)
        return v->u.str;
    jj_put_str(c, &b, v);
    return jj_buf_value(&b).u.str;
}

/* ---- JSON ---- */

static void put_json_string(struct jj *c, struct jj_buf *b, struct jj_str s)
{
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    char text[8];
    size_t plain = 0;
    jj_puts(c, b, "\"");
    for (size_t i = 0; i < s.n; i++) {
        unsigned char ch = (unsigned char)s.s[i];
        const char *known = ch ? strchr(from, ch) : NULL;
        if (!known && ch >= 0x20)
            continue;
        jj_put(c, b, s.s + plain, i - plain);
        plain = i + 1;
        if (known)
            snprintf(text, sizeof text, "\\%c", to[known - from]);
        else
            snprintf(text, sizeof text, "\\u%04x", ch);
        jj_puts(c, b, text);
    }
    jj_put(c, b, s.s + plain, s.n - plain);
    jj_puts(c, b, "\"");
}

static void new_line(struct jj *c, struct jj_buf *b, int indent, unsigned level)
{
    if (indent < 0)
        return;
    jj_puts(c, b, "\n");
    for (unsigned i = 0; i < level * (unsigned)indent; i++)
        jj_puts(c, b, " ");
}

static void put_json(struct jj *c, struct jj_buf *b, const struct jj_value *v, int indent, unsigned level)
{
    const char *comma = indent < 0 ? ", " : ",";
    bool list = v->type == JJ_LIST;
    size_t n = 0;
    jj_step(c, 1);
    jj_enter(c);
    switch (v->type) {
    case JJ_NONE:
        jj_puts(c, b, "null");
        break;
    case JJ_BOOL:
        jj_puts(c, b, v->u.b ? "true" : "false");
        break;
    case JJ_FLOAT:
        if (isnan(v->u.f) || isinf(v->u.f))
            jj_puts(c, b, isnan(v->u.f) ? "NaN" : v->u.f < 0 ? "-Infinity" : "Infinity");
        else
            put_float(c, b, v->u.f);
        break;
    case JJ_INT:
        put_int(c, b, v->u.i);
        break;
    case JJ_STRING:
        put_json_string(c, b, v->u.str);
        break;
    case JJ_LIST:
    case JJ_DICT:
        n = list ? v->u.list->n : v->u.dict->n;
        jj_puts(c, b, list ? "[" : "{");
        for (size_t i = 0; i < n; i++) {
            jj_puts(c, b, i ? comma : "");
            new_line(c, b, indent, level + 1);
            if (!list) {
                put_json_string(c, b, v->u.dict->pair[i].key);
                jj_puts(c, b, ": ");
            }
            put_json(c, b, list ? &v->u.list->v[i] : &v->u.dict->pair[i].value, indent, level + 1);
        }
        if (n)
            new_line(c, b, indent, level);
        jj_puts(c, b, list ? "]" : "}");
        break;
    default:
        jj_fail(c, ST_INVALID_ARGUMENT, "tojson: %s cannot be written as JSON", jj_type_name(v));
    }
    c->depth--;
}

void jj_put_json(struct jj *c, struct jj_buf *b, const struct jj_value *v, int indent, bool ascii)
{
    struct jj_buf wide = {0};
    put_json(c, ascii ? &wide : b, v, indent, 0);
    for (size_t i = 0; i < wide.n;) { /* only strings have such characters */
        char text[16];
        size_t from = i, bytes;
        uint32_t ch = jj_char_at((struct jj_str){wide.s, wide.n}, i, &bytes);
        i += bytes;
        if (ch < 0x7F)
            jj_put(c, b, wide.s + from, i - from);
        else if (ch < 0x10000)
            jj_put(c, b, text, (size_t)snprintf(text, sizeof text, "\\u%04x", (unsigned)ch));
        else
            jj_put(c, b, text,
                   (size_t)snprintf(text, sizeof text, "\\u%04x\\u%04x", (unsigned)(0xD7C0 + (ch >> 10)),
                                    (unsigned)(0xDC00 + (ch & 0x3FF))));
    }
}

/* ---- HTML ---- */

struct jj_value jj_escape(struct jj *c, struct jj_str s)
{
    static const char from[] = "&<>'\"";
    static const char *const to[] = {"&amp;", "&lt;", "&gt;", "&#39;", "&#34;"};
    struct jj_buf b = {0};
    for (size_t i = 0; i < s.n; i++) {
        const char *p = s.s[i] ? strchr(from, s.s[i]) : NULL;
        if (p)
            jj_puts(c, &b, to[p - from]);
        else
            jj_put(c, &b, s.s + i, 1);
    }
    struct jj_value out = jj_buf_value(&b);
    out.safe = true;
    return out;
}
