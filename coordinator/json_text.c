#include "coordinator/json_text.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void json_text_free(struct json_text *t)
{
    free(t->p);
    *t = (struct json_text){0};
}

bool json_text_reserve(struct json_text *t, size_t more)
{
    if (t->failed || more <= t->cap - t->n)
        return !t->failed;
    size_t cap = 2 * (t->n + more) + 64;
    char *p = realloc(t->p, cap);
    if (!p) {
        t->failed = true;
        return false;
    }
    t->p = p;
    t->cap = cap;
    return true;
}

void json_text_add(struct json_text *t, const void *bytes, size_t n)
{
    if (n == 0 || !json_text_reserve(t, n))
        return;
    memcpy(t->p + t->n, bytes, n);
    t->n += n;
}

void json_text_put(struct json_text *t, const char *literal)
{
    json_text_add(t, literal, strlen(literal));
}

void json_text_format(struct json_text *t, const char *fmt, ...)
{
    va_list list;
    va_start(list, fmt);
    int n = vsnprintf(NULL, 0, fmt, list);
    va_end(list);
    if (n < 0 || !json_text_reserve(t, (size_t)n + 1)) {
        t->failed = true;
        return;
    }
    va_start(list, fmt);
    vsnprintf(t->p + t->n, (size_t)n + 1, fmt, list);
    va_end(list);
    t->n += (size_t)n;
}

void json_text_string(struct json_text *t, const void *text, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    const unsigned char *s = text;
    size_t begin = 0;
    json_text_add(t, "\"", 1);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = s[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f)
            continue;
        json_text_add(t, s + begin, i - begin);
        begin = i + 1;
        if (c == '"' || c == '\\')
            json_text_add(t, (char[]){'\\', (char)c}, 2);
        else if (c == '\n')
            json_text_add(t, "\\n", 2);
        else
            json_text_add(t, (char[]){'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]}, 6);
    }
    json_text_add(t, s + begin, n - begin);
    json_text_add(t, "\"", 1);
}

void json_text_number(struct json_text *t, double v)
{
    if (!isfinite(v))
        v = -9999;
    json_text_format(t, "%.9g", v);
}
