#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/jinja_internal.h"

struct jinja {
    struct jj_block *arena;
    const struct jj_node *body;
    const char *lacks;
};

/* ---- memory ---- */

#define BLOCK_BYTES (64u << 10)

struct jj_block {
    struct jj_block *next;
    size_t used, size;
    _Alignas(16) char data[];
};

void *jj_alloc(struct jj *c, size_t bytes)
{
    struct jj_block *b = c->arena;
    bytes = bytes <= c->arena_max ? (bytes + 15) & ~(size_t)15 : c->arena_max + 1;
    if (!b || b->size - b->used < bytes) {
        size_t size = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
        if (size > c->arena_max - c->arena_bytes)
            jj_fail(c, ST_RESOURCE_EXHAUSTED, "the template takes more than %zu MB of memory", c->arena_max >> 20);
        b = malloc(sizeof *b + size);
        if (!b)
            jj_fail(c, ST_RESOURCE_EXHAUSTED, "out of memory");
        *b = (struct jj_block){.next = c->arena, .size = size};
        c->arena = b;
        c->arena_bytes += size;
    }
    void *p = b->data + b->used;
    b->used += bytes;
    return memset(p, 0, bytes);
}

void jj_arena_free(struct jj_block *arena)
{
    while (arena) {
        struct jj_block *next = arena->next;
        free(arena);
        arena = next;
    }
}

/* ---- errors and limits ---- */

void jj_fail(struct jj *c, enum status_code code, const char *fmt, ...)
{
    char text[STATUS_MESSAGE_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    status_set(c->st, code, "line %u: %s", c->line, text);
    longjmp(c->out, 1);
}

void jj_enter(struct jj *c)
{
    if (++c->depth > JJ_MAX_DEPTH)
        jj_fail(c, ST_RESOURCE_EXHAUSTED, "nested deeper than %d", JJ_MAX_DEPTH);
}

void jj_step(struct jj *c, uint64_t n)
{
    c->steps += n;
    if (c->steps > JINJA_MAX_STEPS)
        jj_fail(c, ST_RESOURCE_EXHAUSTED, "more than %u steps", JINJA_MAX_STEPS);
}

/* ---- text ---- */

void jj_put(struct jj *c, struct jj_buf *b, const char *s, size_t n)
{
    if (n == 0)
        return;
    if (b->max && n > b->max - b->n)
        jj_fail(c, ST_RESOURCE_EXHAUSTED, "more than %zu bytes of text", b->max);
    if (b->cap - b->n < n) {
        size_t cap = b->cap ? b->cap : 256;
        while (cap - b->n < n)
            cap *= 2;
        char *s2 = jj_alloc(c, cap);
        if (b->n)
            memcpy(s2, b->s, b->n);
        b->s = s2;
        b->cap = cap;
    }
    memcpy(b->s + b->n, s, n);
    b->n += n;
}

void jj_puts(struct jj *c, struct jj_buf *b, const char *s)
{
    jj_put(c, b, s, strlen(s));
}

struct jj_value jj_buf_value(const struct jj_buf *b)
{
    return jj_string(b->s ? b->s : "", b->n);
}

/* ---- public ---- */

/* False when fn left by jj_fail. */
static bool guarded(struct jj *c, void (*fn)(void *arg), void *arg)
{
    if (setjmp(c->out))
        return false;
    fn(arg);
    return true;
}

struct compile {
    struct jj_parser parser;
    const char *source;
    size_t bytes;
    const struct jj_node *body;
};

static void compile(void *arg)
{
    struct compile *w = arg;
    w->parser.t = jj_lex(&w->parser.job, w->source, w->bytes);
    w->body = jj_parse(&w->parser);
}

enum status_code jinja_compile(struct jinja **out, const char *source, size_t bytes, struct status *st)
{
    struct status ignored = STATUS_INIT;
    if (!st)
        st = &ignored;
    if (bytes > JINJA_MAX_SOURCE_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "%zu bytes, expected at most %u", bytes, JINJA_MAX_SOURCE_BYTES);
    json_t *probe = json_stringn(source, bytes);
    if (!probe)
        return status_set(st, ST_INVALID_ARGUMENT, "no valid UTF-8");
    json_decref(probe);
    struct jinja *t = calloc(1, sizeof *t);
    struct compile *w = calloc(1, sizeof *w);
    enum status_code rc = ST_OK;
    if (!t || !w) {
        rc = status_set(st, ST_RESOURCE_EXHAUSTED, "out of memory");
        goto end;
    }
    w->source = source;
    w->bytes = bytes;
    w->parser.job = (struct jj){.st = st, .line = 1, .arena_max = JINJA_MAX_MEMORY_BYTES};
    if (guarded(&w->parser.job, compile, w)) {
        t->arena = w->parser.job.arena;
        t->body = w->body;
        t->lacks = w->parser.lacks.s;
        *out = t;
        t = NULL;
    } else {
        rc = st->code;
        jj_arena_free(w->parser.job.arena);
    }
end:
    free(w);
    free(t);
    return rc;
}

const char *jinja_lacks(const struct jinja *t)
{
    return t->lacks;
}

void jinja_free(struct jinja *t)
{
    if (t)
        jj_arena_free(t->arena);
    free(t);
}

struct render {
    struct jj_render state;
    const struct jinja *t;
    const json_t *context;
};

static void render(void *arg)
{
    struct render *w = arg;
    struct jj_render *r = &w->state;
    struct jj_value names = jj_from_json(&r->job, w->context);
    if (names.type != JJ_DICT)
        jj_fail(&r->job, ST_INTERNAL, "the context is no object");
    r->out = jj_alloc(&r->job, sizeof *r->out);
    r->out->max = JINJA_MAX_OUTPUT_BYTES;
    r->top = r->frame = jj_alloc(&r->job, sizeof *r->frame);
    r->frame->names = names.u.dict;
    jj_exec(r, w->t->body);
}

enum status_code jinja_render(const struct jinja *t, const json_t *context, char **text, size_t *bytes,
                              struct status *st)
{
    struct status ignored = STATUS_INIT;
    enum status_code rc = ST_OK;
    char *copy = NULL;
    if (!st)
        st = &ignored;
    struct render *w = calloc(1, sizeof *w);
    if (!w)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "out of memory");
    w->t = t;
    w->context = context;
    w->state.job = (struct jj){.st = st, .line = 1, .arena_max = JINJA_MAX_MEMORY_BYTES};
    if (!guarded(&w->state.job, render, w)) {
        rc = st->code;
    } else if (!(copy = malloc(w->state.out->n + 1))) {
        rc = status_set(st, ST_RESOURCE_EXHAUSTED, "out of memory");
    } else {
        size_t n = w->state.out->n;
        if (n)
            memcpy(copy, w->state.out->s, n);
        copy[n] = '\0';
        *text = copy;
        *bytes = n;
    }
    jj_arena_free(w->state.job.arena);
    free(w);
    return rc;
}
