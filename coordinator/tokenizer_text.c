#include "coordinator/tokenizer_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool tok_buf_reserve(struct tok_buf *b, size_t extra)
{
    if (extra <= b->cap - b->len)
        return true;
    if (extra > SIZE_MAX / 4 - b->len)
        return false;
    size_t cap = b->cap ? b->cap * 2 : 64;
    while (cap < b->len + extra)
        cap *= 2;
    char *data = realloc(b->data, cap);
    if (!data)
        return false;
    b->data = data;
    b->cap = cap;
    return true;
}

bool tok_buf_add(struct tok_buf *b, const char *s, size_t n)
{
    if (!tok_buf_reserve(b, n))
        return false;
    if (n)
        memcpy(b->data + b->len, s, n);
    b->len += n;
    return true;
}

void tok_buf_free(struct tok_buf *b)
{
    free(b->data);
    *b = (struct tok_buf){0};
}

bool tok_ids_grow(struct tok_ids *v, size_t extra)
{
    if (extra <= v->cap - v->len)
        return true;
    if (extra > SIZE_MAX / 16 - v->len)
        return false;
    size_t cap = v->cap ? v->cap * 2 : 64;
    while (cap < v->len + extra)
        cap *= 2;
    uint32_t *data = realloc(v->data, cap * sizeof *data);
    if (!data)
        return false;
    v->data = data;
    v->cap = cap;
    return true;
}

/* Length by the first byte, 0 for a byte that begins nothing. */
static unsigned lead_len(unsigned char b)
{
    return b < 0x80 ? 1 : b < 0xC2 ? 0 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : b < 0xF5 ? 4 : 0;
}

/* The second byte carries the rules against overlong forms, surrogates and what lies past U+10FFFF. */
static bool second_fits(unsigned char lead, unsigned char b)
{
    switch (lead) {
    case 0xE0:
        return b >= 0xA0 && b <= 0xBF;
    case 0xED:
        return b >= 0x80 && b <= 0x9F;
    case 0xF0:
        return b >= 0x90 && b <= 0xBF;
    case 0xF4:
        return b >= 0x80 && b <= 0x8F;
    default:
        return (b & 0xC0) == 0x80;
    }
}

enum tok_utf8_step tok_utf8_feed(struct tok_utf8 *u, unsigned char byte, unsigned *n)
{
    if (u->n_held == 0) {
        unsigned len = lead_len(byte);
        if (len == 0)
            return TOK_UTF8_BAD;
        u->held[0] = byte;
        if (len == 1) {
            *n = 1;
            return TOK_UTF8_CHAR;
        }
        u->n_held = 1;
        return TOK_UTF8_MORE;
    }
    if (u->n_held == 1 ? !second_fits(u->held[0], byte) : (byte & 0xC0) != 0x80)
        return TOK_UTF8_BAD;
    u->held[u->n_held++] = byte;
    if (u->n_held < lead_len(u->held[0]))
        return TOK_UTF8_MORE;
    *n = u->n_held;
    u->n_held = 0;
    return TOK_UTF8_CHAR;
}

size_t tok_utf8_check(const char *s, size_t n)
{
    size_t i = 0;
    while (i < n) {
        uint64_t eight;
        if (n - i >= sizeof eight) {
            memcpy(&eight, s + i, sizeof eight);
            if (!(eight & 0x8080808080808080u)) {
                i += sizeof eight;
                continue;
            }
        }
        unsigned char lead = (unsigned char)s[i];
        unsigned len = lead_len(lead);
        if (len == 0 || len > n - i || (len > 1 && !second_fits(lead, (unsigned char)s[i + 1])))
            return i;
        for (unsigned k = 2; k < len; k++)
            if (((unsigned char)s[i + k] & 0xC0) != 0x80)
                return i;
        i += len;
    }
    return n;
}

uint32_t tok_utf8_get(const char *s, unsigned len)
{
    const unsigned char *u = (const unsigned char *)s;
    switch (len) {
    case 1:
        return u[0];
    case 2:
        return (u[0] & 0x1Fu) << 6 | (u[1] & 0x3Fu);
    case 3:
        return (u[0] & 0x0Fu) << 12 | (u[1] & 0x3Fu) << 6 | (u[2] & 0x3Fu);
    default:
        return (u[0] & 0x07u) << 18 | (u[1] & 0x3Fu) << 12 | (u[2] & 0x3Fu) << 6 | (u[3] & 0x3Fu);
    }
}

unsigned tok_utf8_put(char *s, uint32_t c)
{
    if (c < 0x80) {
        s[0] = (char)c;
        return 1;
    }
    unsigned len = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    s[0] = (char)((0xF00u >> len & 0xF0) | c >> 6 * (len - 1));
    for (unsigned k = 1; k < len; k++)
        s[k] = (char)(0x80 | (c >> 6 * (len - 1 - k) & 0x3F));
    return len;
}

bool tok_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

/* Two multiplications per 8 bytes at most; the tables it serves compare the bytes, so it need not be strong. */
uint64_t tok_hash(const char *s, size_t n)
{
    const uint64_t k = 0x9E3779B97F4A7C15u;
    uint64_t h = n * k;
    while (n >= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = (h ^ w) * k;
        h ^= h >> 29;
        s += 8;
        n -= 8;
    }
    if (n) {
        uint64_t w = 0;
        memcpy(&w, s, n);
        h = (h ^ w) * k;
        h ^= h >> 29;
    }
    h *= 0xBF58476D1CE4E5B9u;
    return h ^ h >> 32;
}

const char *tok_quote(char buf[TOK_QUOTE_MAX], const char *s, size_t n)
{
    size_t o = 0, i = 0;
    buf[o++] = '\'';
    while (i < n && o < TOK_QUOTE_MAX - 12) {
        unsigned char c = (unsigned char)s[i];
        unsigned len = tok_utf8_len(c);
        if (c < 0x20 || c == 0x7F) {
            o += (size_t)snprintf(buf + o, TOK_QUOTE_MAX - o, "\\x%02x", c);
        } else if (len <= n - i) {
            memcpy(buf + o, s + i, len);
            o += len;
        }
        i += len;
    }
    if (i < n) {
        memcpy(buf + o, "...", 3);
        o += 3;
    }
    buf[o++] = '\'';
    buf[o] = '\0';
    return buf;
}
