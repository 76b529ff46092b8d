#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/gguf_internal.h"

static const char *const kind_names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
#define KINDS (sizeof kind_names / sizeof *kind_names)

uint32_t gguf_kind_bytes(uint32_t kind)
{
    static const uint8_t bytes[KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return kind < KINDS ? bytes[kind] : 0;
}

const char *gguf_path(const struct gguf *g)
{
    return g->path;
}

int gguf_fd(const struct gguf *g)
{
    return g->fd;
}

/* ---- values ---- */

static int compare_key(const void *key, const void *value)
{
    return strcmp(key, ((const struct gguf_value *)value)->key);
}

static const struct gguf_value *find(const struct gguf *g, const char *key)
{
    return g->values ? bsearch(key, g->value, g->values, sizeof *g->value, compare_key) : NULL;
}

bool gguf_has(const struct gguf *g, const char *key)
{
    return find(g, key) != NULL;
}

enum status_code gguf_need(const struct gguf *g, const char *key, struct status *st)
{
    return gguf_has(g, key) ? ST_OK : status_set(st, ST_INVALID_ARGUMENT, "%s: %s is missing", g->path, key);
}

static enum status_code wrong_kind(const struct gguf *g, const struct gguf_value *v, const char *expected,
                                   struct status *st)
{
    return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %s%s, expected %s", g->path, v->key,
                      v->kind == GGUF_ARRAY ? "an array of " : "",
                      kind_names[v->kind == GGUF_ARRAY ? v->elements : v->kind], expected);
}

static uint64_t bits_of(const uint8_t *p, uint32_t bytes)
{
    uint64_t x = 0;
    for (uint32_t i = 0; i < bytes; i++)
        x |= (uint64_t)p[i] << 8 * i;
    return x;
}

/* Whether the value is an integer; negative ones have *negative and their size in *out. */
static bool integer(const struct gguf *g, const struct gguf_value *v, uint64_t *out, bool *negative)
{
    uint32_t bytes = gguf_kind_bytes(v->kind);
    *negative = false;
    switch (v->kind) {
    case GGUF_UINT8:
    case GGUF_UINT16:
    case GGUF_UINT32:
    case GGUF_UINT64:
        *out = bits_of(g->header + v->at, bytes);
        return true;
    case GGUF_INT8:
    case GGUF_INT16:
    case GGUF_INT32:
    case GGUF_INT64:
        *out = bits_of(g->header + v->at, bytes);
        if (*out >> (8 * bytes - 1)) {
            *negative = true;
            *out = (~*out + 1) & (UINT64_MAX >> (64 - 8 * bytes));
        }
        return true;
    default:
        return false;
    }
}

enum status_code gguf_read_uint(const struct gguf *g, const char *key, uint32_t min, uint32_t max, uint32_t *out,
                                struct status *st)
{
    const struct gguf_value *v = find(g, key);
    uint64_t n;
    bool negative;
    if (!v)
        return ST_OK;
    if (!integer(g, v, &n, &negative))
        return wrong_kind(g, v, "an integer", st);
    if (negative || n < min || n > max)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %s%llu, expected %u to %u", g->path, key,
                          negative ? "-" : "", (unsigned long long)n, min, max);
    *out = (uint32_t)n;
    return ST_OK;
}

enum status_code gguf_read_double(const struct gguf *g, const char *key, double min, double max, double *out,
                                  struct status *st)
{
    const struct gguf_value *v = find(g, key);
    if (!v)
        return ST_OK;
    double x;
    uint64_t n;
    bool negative;
    if (v->kind == GGUF_FLOAT32) {
        uint32_t bits = (uint32_t)bits_of(g->header + v->at, 4);
        float f;
        memcpy(&f, &bits, 4);
        x = (double)f;
    } else if (v->kind == GGUF_FLOAT64) {
        n = bits_of(g->header + v->at, 8);
        memcpy(&x, &n, 8);
    } else if (integer(g, v, &n, &negative)) {
        x = negative ? -(double)n : (double)n;
    } else {
        return wrong_kind(g, v, "a number", st);
    }
    if (!(x >= min && x <= max))
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s: %g, expected %g to %g", g->path, key, x, min, max);
    *out = x;
    return ST_OK;
}

enum status_code gguf_read_bool(const struct gguf *g, const char *key, bool *out, struct status *st)
{
    const struct gguf_value *v = find(g, key);
    if (!v)
        return ST_OK;
    if (v->kind != GGUF_BOOL)
        return wrong_kind(g, v, "bool", st);
    *out = g->header[v->at] != 0;
    return ST_OK;
}

enum status_code gguf_read_string(const struct gguf *g, const char *key, struct gguf_string *out, struct status *st)
{
    const struct gguf_value *v = find(g, key);
    if (!v)
        return ST_OK;
    if (v->kind != GGUF_STRING)
        return wrong_kind(g, v, "string", st);
    *out = (struct gguf_string){(const char *)g->header + v->at, v->count};
    return ST_OK;
}

enum status_code gguf_read_array(const struct gguf *g, const char *key, enum gguf_kind kind, struct gguf_array *out,
                                 struct status *st)
{
    const struct gguf_value *v = find(g, key);
    if (!v)
        return ST_OK;
    if (v->kind != GGUF_ARRAY || v->elements != (uint32_t)kind) {
        char expected[32];
        snprintf(expected, sizeof expected, "an array of %s", kind_names[kind]);
        return wrong_kind(g, v, expected, st);
    }
    *out = (struct gguf_array){kind, v->count, g->header + v->at};
    return ST_OK;
}

bool gguf_string_is(struct gguf_string s, const char *text)
{
    return strlen(text) == s.bytes && (s.bytes == 0 || memcmp(s.at, text, s.bytes) == 0);
}

struct gguf_string gguf_next_string(struct gguf_array *a)
{
    struct gguf_string s = {(const char *)a->at + 8, bits_of(a->at, 8)};
    a->at += 8 + s.bytes;
    a->count--;
    return s;
}

int32_t gguf_int32_at(const struct gguf_array *a, uint64_t i)
{
    return (int32_t)(uint32_t)bits_of(a->at + 4 * i, 4);
}

float gguf_float32_at(const struct gguf_array *a, uint64_t i)
{
    uint32_t bits = (uint32_t)bits_of(a->at + 4 * i, 4);
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* ---- tensors ---- */

size_t gguf_tensors(const struct gguf *g)
{
    return g->tensors;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i)
{
    return &g->tensor[i];
}

static int compare_name(const void *name, const void *tensor)
{
    return strcmp(name, ((const struct gguf_tensor *)tensor)->name);
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name)
{
    return g->tensors ? bsearch(name, g->tensor, g->tensors, sizeof *g->tensor, compare_name) : NULL;
}

const struct gguf_type_info *gguf_type_find(uint32_t type)
{
    static const struct gguf_type_info types[] = {
        {"F32", GGUF_F32, 1, 4},       {"F16", GGUF_F16, 1, 2},       {"BF16", GGUF_BF16, 1, 2},
        {"Q4_0", GGUF_Q4_0, 32, 18},   {"Q4_1", GGUF_Q4_1, 32, 20},   {"Q5_0", GGUF_Q5_0, 32, 22},
        {"Q5_1", GGUF_Q5_1, 32, 24},   {"Q8_0", GGUF_Q8_0, 32, 34},   {"Q2_K", GGUF_Q2_K, 256, 84},
        {"Q3_K", GGUF_Q3_K, 256, 110}, {"Q4_K", GGUF_Q4_K, 256, 144}, {"Q5_K", GGUF_Q5_K, 256, 176},
        {"Q6_K", GGUF_Q6_K, 256, 210},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if ((uint32_t)types[i].type == type)
            return &types[i];
    return NULL;
}

const char *gguf_type_name(uint32_t type, char room[32])
{
    static const char *const others[] = {
        [9] = "Q8_1",   [15] = "Q8_K",   [16] = "IQ2_XXS", [17] = "IQ2_XS", [18] = "IQ3_XXS",
        [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",   [22] = "IQ2_S",  [23] = "IQ4_XS",
        [24] = "I8",    [25] = "I16",    [26] = "I32",     [27] = "I64",    [28] = "F64",
        [29] = "IQ1_M", [34] = "TQ1_0",  [35] = "TQ2_0",   [39] = "MXFP4",
    };
    const struct gguf_type_info *info = gguf_type_find(type);
    if (info)
        return info->name;
    if (type < sizeof others / sizeof *others && others[type])
        return others[type];
    snprintf(room, 32, "type %u", type);
    return room;
}
