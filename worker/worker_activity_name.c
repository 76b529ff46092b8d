/* worker_activity_name.c - short names of kernels, out of what a C++ compiler made of them (the Itanium ABI's mangling). Reads the
 * part of it that names of functions use; at the first thing that it does not know it ends with what it has. */
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "worker/worker_activity.h"

#define LITERAL_DIGITS_MAX 9 /* longer numbers are limits and masks: they tell nobody anything */
#define DEPTH_MAX          32

struct reader {
    const char *p; /* what is left */
    char *out;
    size_t n; /* may be more than there is room for */
    unsigned depth;
};

static void put(struct reader *r, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++, r->n++)
        if (r->n < ACTIVITY_NAME_MAX)
            r->out[r->n] = text[i];
}

static void put_text(struct reader *r, const char *text)
{
    put(r, text, strlen(text));
}

static bool template_args(struct reader *r);
static bool type(struct reader *r);

static bool digits(struct reader *r, size_t *value)
{
    size_t v = 0;
    if (!isdigit((unsigned char)*r->p))
        return false;
    for (; isdigit((unsigned char)*r->p); r->p++)
        if ((v = v * 10 + (size_t)(*r->p - '0')) > 4096)
            return false;
    *value = v;
    return true;
}

/* 4name */
static bool source_name(struct reader *r, bool *unnamed)
{
    size_t n;
    if (!digits(r, &n) || n == 0 || strnlen(r->p, n) < n)
        return false;
    *unnamed = n >= 8 && memcmp(r->p, "_GLOBAL_", 8) == 0;
    if (!*unnamed)
        put(r, r->p, n);
    r->p += n;
    return true;
}

/* S_, S12_, St, Sa ...: what it stands for is not kept. */
static bool substitution(struct reader *r)
{
    r->p++;
    if (islower((unsigned char)*r->p)) {
        r->p++;
        return true;
    }
    while (isdigit((unsigned char)*r->p) || isupper((unsigned char)*r->p))
        r->p++;
    return *r->p == '_' && *r->p++;
}

/* N..E. Of a type only what stands last is kept, of the function's own name all. */
static bool nested_name(struct reader *r, bool whole)
{
    size_t start = r->n;
    bool unnamed = true, any = false;
    for (r->p++; *r->p == 'K' || *r->p == 'V' || *r->p == 'r'; r->p++)
        ;
    while (*r->p != 'E') {
        if (*r->p == 'I') {
            if (!template_args(r))
                return false;
            continue;
        }
        if (*r->p == 'L' && isdigit((unsigned char)r->p[1]))
            r->p++;
        if (*r->p == 'S') {
            if (!substitution(r))
                return false;
            continue;
        }
        size_t before = r->n;
        if (!whole)
            r->n = before = start;
        else if (any)
            put_text(r, "::");
        if (!source_name(r, &unnamed)) {
            r->n = before;
            return false;
        }
        any = any || !unnamed;
        if (unnamed)
            r->n = before;
    }
    r->p++;
    return true;
}

static bool unscoped_name(struct reader *r)
{
    bool unnamed;
    if (r->p[0] == 'S' && r->p[1] == 't')
        r->p += 2;
    if (*r->p == 'L')
        r->p++;
    return source_name(r, &unnamed) && (*r->p != 'I' || template_args(r));
}

static bool builtin(struct reader *r)
{
    static const struct {
        char letter;
        const char *name;
    } types[] = {{'v', "void"},  {'b', "bool"},   {'c', "char"},   {'a', "int8"},  {'h', "uint8"},
                 {'s', "int16"}, {'t', "uint16"}, {'i', "int"},    {'j', "uint"},  {'l', "long"},
                 {'m', "ulong"}, {'x', "int64"},  {'y', "uint64"}, {'f', "float"}, {'d', "double"}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].letter == *r->p) {
            put_text(r, types[i].name);
            r->p++;
            return true;
        }
    return false;
}

static bool type_inner(struct reader *r)
{
    while (*r->p && strchr("PROKV", *r->p))
        r->p++;
    if (*r->p == 'N')
        return nested_name(r, false);
    if (*r->p == 'S' && r->p[1] != 't')
        return substitution(r) && (*r->p != 'I' || template_args(r));
    if (*r->p == 'D' && r->p[1] == 'h') {
        r->p += 2;
        put_text(r, "half");
        return true;
    }
    if (isdigit((unsigned char)*r->p) || *r->p == 'S')
        return unscoped_name(r);
    return builtin(r);
}

static bool type(struct reader *r)
{
    bool known = r->depth++ < DEPTH_MAX && type_inner(r);
    r->depth--;
    return known;
}

/* Lj128E, Lb1E, LN1a1bE3E */
static bool literal(struct reader *r)
{
    size_t start = r->n;
    r->p++;
    if (*r->p == '_' || !type(r))
        return false;
    r->n = start; /* 128 is enough */
    const char *from = r->p;
    r->p += *r->p == 'n';
    size_t n = strspn(r->p, "0123456789");
    r->p += n;
    if (*r->p != 'E' || n == 0)
        return false;
    if (n <= LITERAL_DIGITS_MAX) {
        put_text(r, *from == 'n' ? "-" : "");
        put(r, r->p - n, n);
    }
    r->p++;
    return true;
}

/* Arguments until E. Those of which nothing is kept leave no comma. */
static bool arguments(struct reader *r, bool *any)
{
    while (*r->p != 'E') {
        size_t before = r->n;
        if (*r->p == 'J') {
            r->p++;
            if (!arguments(r, any))
                return false;
            continue;
        }
        if (*any)
            put_text(r, ",");
        size_t start = r->n;
        if (!(*r->p == 'L' ? literal(r) : type(r)))
            return false;
        if (r->n == start)
            r->n = before;
        else
            *any = true;
    }
    r->p++;
    return true;
}

static bool template_args(struct reader *r)
{
    size_t start = r->n;
    bool any = false;
    r->p++;
    put_text(r, "<");
    bool known = r->depth++ < DEPTH_MAX && arguments(r, &any);
    r->depth--;
    if (known && any)
        put_text(r, ">");
    else
        r->n = start;
    return known;
}

static uint32_t hash(const char *text)
{
    uint32_t h = 2166136261u;
    for (; *text; text++)
        h = (h ^ (uint8_t)*text) * 16777619u;
    return h;
}

const char *activity_name_short(char out[ACTIVITY_NAME_MAX], const char *mangled)
{
    struct reader r = {.p = mangled, .out = out};
    if (strncmp(mangled, "_Z", 2) == 0) {
        r.p += 2;
        if (*r.p == 'N')
            nested_name(&r, true);
        else
            unscoped_name(&r);
    }
    if (r.n == 0)
        put_text(&r, mangled);
    if (r.n < ACTIVITY_NAME_MAX) {
        out[r.n] = '\0';
        return out;
    }
    enum { TAIL = 11 }; /* "..0123abcd" and the NUL */
    snprintf(out + ACTIVITY_NAME_MAX - TAIL, TAIL, "..%08x", hash(mangled));
    return out;
}

const char *activity_name_json(char out[ACTIVITY_JSON_MAX], const char *name)
{
    size_t n = 0;
    for (const char *p = name; *p && n + 7 < ACTIVITY_JSON_MAX; p++) {
        const uint8_t c = (uint8_t)*p;
        if (c < 0x20 || c == 0x7f)
            n += (size_t)snprintf(out + n, ACTIVITY_JSON_MAX - n, "\\u%04x", c);
        else if (c == '"' || c == '\\')
            n += (size_t)snprintf(out + n, ACTIVITY_JSON_MAX - n, "\\%c", c);
        else
            out[n++] = c < 0x80 ? *p : '?';
    }
    out[n] = '\0';
    return out;
}
