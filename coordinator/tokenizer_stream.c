#include "coordinator/tokenizer_internal.h"

#include <stdlib.h>

struct tok_stream {
    const struct tokenizer *t;
    unsigned flags;
    bool nomem; /* priming ran out of memory: the next push says so */
    struct tok_dec_state state;
    struct tok_buf out; /* what the last call returned */
};

enum status_code tok_stream_create(struct tok_stream **out, const struct tokenizer *t, unsigned flags,
                                   struct status *st)
{
    struct tok_stream *s = calloc(1, sizeof *s);
    if (!s)
        return status_nomem(st, "token stream", sizeof *s);
    s->t = t;
    s->flags = flags;
    *out = s;
    return ST_OK;
}

void tok_stream_free(struct tok_stream *s)
{
    if (!s)
        return;
    tok_dec_fini(&s->state);
    tok_buf_free(&s->out);
    free(s);
}

void tok_stream_prime(struct tok_stream *s, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n && !s->nomem; i++) {
        s->out.len = 0;
        s->nomem = !tok_dec_push(s->t, &s->state, ids[i], s->flags, &s->out);
    }
    s->nomem = s->nomem || !tok_dec_settle(s->t, &s->state, &s->out);
    s->out.len = 0;
}

static enum status_code give(struct tok_stream *s, bool ok, const char **text, size_t *len, struct status *st)
{
    if (!ok || !tok_buf_reserve(&s->out, 1)) {
        s->nomem = true; /* text was lost: every later call says so too */
        return status_nomem(st, "streamed text", s->out.len);
    }
    s->out.data[s->out.len] = '\0';
    *text = s->out.data;
    *len = s->out.len;
    return ST_OK;
}

enum status_code tok_stream_push(struct tok_stream *s, uint32_t id, const char **text, size_t *len, struct status *st)
{
    s->out.len = 0;
    return give(s, !s->nomem && tok_dec_push(s->t, &s->state, id, s->flags, &s->out), text, len, st);
}

enum status_code tok_stream_flush(struct tok_stream *s, const char **text, size_t *len, struct status *st)
{
    s->out.len = 0;
    return give(s, !s->nomem && tok_dec_finish(s->t, &s->state, &s->out), text, len, st);
}
