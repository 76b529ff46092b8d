/* An answer on its way to the client: tokens become text, stop strings end it, log probabilities wait beside their ids.
 *
 *     text  |  may be sent  |  held: may be the beginning of a stop string  |      c->text_len, c->match.held
 *
 * What a client has not taken waits here, not in rpc: coord_request.c asks for one message at a time. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_internal.h"

enum status_code choices_create(struct request *r, const struct tokenizer *tok, struct status *st)
{
    r->choice = calloc(r->n_choices, sizeof *r->choice);
    if (!r->choice)
        return status_nomem(st, "answers of a request", r->n_choices * sizeof *r->choice);
    for (uint32_t i = 0; i < r->n_choices; i++) {
        struct choice *c = &r->choice[i];
        c->request = r;
        c->index = i;
        c->scores.top = r->top > 0 ? (uint32_t)r->top : 0;
        c->prompt_scores.top = r->prompt_top > 0 ? (uint32_t)r->prompt_top : 0;
        enum status_code rc = tok_stream_create(&c->decoder, tok, TOK_SKIP_SPECIAL, st);
        if (rc != ST_OK || (rc = stop_match_init(&c->match, r->stop_strings, st)) != ST_OK)
            return rc;
        tok_stream_prime(c->decoder, r->prompt, r->n_prompt);
    }
    return ST_OK;
}

void choices_destroy(struct request *r)
{
    for (uint32_t i = 0; r->choice && i < r->n_choices; i++) {
        struct choice *c = &r->choice[i];
        tok_stream_free(c->decoder);
        stop_match_fini(&c->match);
        free(c->text);
        free(c->ids);
        free(c->scores.word);
        free(c->prompt_scores.word);
    }
    free(r->choice);
}

/* ---- what comes ---- */

enum status_code choice_append(struct choice *c, const void *text, size_t len, struct status *st)
{
    if (len == 0)
        return ST_OK;
    if (c->text_len + len > c->text_cap) {
        size_t cap = 2 * (c->text_len + len) + 64;
        char *p = realloc(c->text, cap);
        if (!p)
            return status_nomem(st, "output of a request", cap);
        c->text = p;
        c->text_cap = cap;
    }
    memcpy(c->text + c->text_len, text, len);
    c->text_len += len;
    return ST_OK;
}

static enum status_code append_id(struct choice *c, uint32_t id, struct status *st)
{
    if (c->n_ids == c->ids_cap) {
        uint32_t cap = c->ids_cap ? 2 * c->ids_cap : 8;
        uint32_t *p = realloc(c->ids, cap * sizeof *p);
        if (!p)
            return status_nomem(st, "output of a request", cap * sizeof *p);
        c->ids = p;
        c->ids_cap = cap;
    }
    c->ids[c->n_ids++] = id;
    return ST_OK;
}

static size_t score_words(const struct score_list *l)
{
    return 3 + 2 * (size_t)l->top;
}

enum status_code scores_add(struct score_list *l, const Tandem__V1__Scores *s, struct status *st)
{
    /* a vocabulary may have less; the ranks send what the other list of the request wants, which may be more */
    if (s->n_top_ids < l->top)
        l->top = l->n ? l->top : (uint32_t)s->n_top_ids;
    if (s->n_top_ids < l->top)
        return status_set(st, ST_INTERNAL, "%zu log probabilities, expected %u", s->n_top_ids, l->top);
    if (l->n == l->cap) {
        uint32_t cap = l->cap ? 2 * l->cap : 8;
        uint32_t *p = realloc(l->word, cap * score_words(l) * sizeof *p);
        if (!p)
            return status_nomem(st, "log probabilities of a request", cap * score_words(l) * sizeof *p);
        l->word = p;
        l->cap = cap;
    }
    uint32_t *w = l->word + l->n++ * score_words(l);
    w[0] = s->token_id;
    w[1] = s->rank;
    memcpy(w + 2, &s->logprob, sizeof s->logprob);
    if (l->top) {
        memcpy(w + 3, s->top_ids, l->top * sizeof *w);
        memcpy(w + 3 + l->top, s->top_logprobs, l->top * sizeof *w);
    }
    return ST_OK;
}

static bool is_stop(const struct request *r, uint32_t id)
{
    for (uint32_t i = 0; i < r->n_stop; i++)
        if (r->stop[i] == id)
            return true;
    return false;
}

enum status_code choice_add(struct choice *c, const uint32_t *id, bool *ended, struct status *st)
{
    const struct request *r = c->request;
    const char *text = NULL;
    size_t len = 0, used = 0;
    enum status_code rc;
    *ended = false;
    if (id) {
        c->n_new++;
        if ((rc = append_id(c, *id, st)) != ST_OK || is_stop(r, *id))
            return rc;
        rc = tok_stream_push(c->decoder, *id, &text, &len, st);
    } else {
        rc = tok_stream_flush(c->decoder, &text, &len, st);
    }
    if (rc != ST_OK)
        return rc;
    *ended = stop_feed(&c->match, text, len, c->n_new > r->params.min_tokens, &used);
    if ((rc = choice_append(c, text, *ended ? used : len, st)) != ST_OK)
        return rc;
    if (*ended && !r->include_stop)
        c->text_len -= r->stop_strings->len[c->match.which];
    if (!id)
        c->match.held = 0; /* nothing follows */
    return ST_OK;
}

/* ---- what goes ---- */

static size_t sendable(const struct choice *c)
{
    return c->text_len - (c->finish_ready ? 0 : c->match.held);
}

static uint32_t echo_left(const struct choice *c)
{
    return c->request->echo ? c->request->n_prompt - c->n_echoed : 0;
}

bool choice_has_output(const struct choice *c)
{
    return !c->done && (sendable(c) || c->n_ids || c->prompt_scores.n || c->finish_ready);
}

static size_t text_chunk(const struct choice *c)
{
    size_t n = sendable(c);
    if (n <= COORD_CHUNK_BYTES)
        return n;
    n = COORD_CHUNK_BYTES;
    while (((unsigned char)c->text[n] & 0xC0) == 0x80) /* whole characters only; the text is valid UTF-8 */
        n--;
    return n;
}

static uint64_t span_us(int64_t from, int64_t to)
{
    return from > 0 && to > from ? (uint64_t)(to - from) : 0;
}

/* A message's worth of scores, pointers into the list. One allocation; NULL: out of memory, or n is 0. */
static Tandem__V1__TokenLogprob **score_messages(const struct score_list *l, uint32_t n)
{
    Tandem__V1__TokenLogprob **list =
        n ? malloc(n * (sizeof(Tandem__V1__TokenLogprob *) + sizeof(Tandem__V1__TokenLogprob))) : NULL;
    if (!list)
        return NULL;
    Tandem__V1__TokenLogprob *m = (Tandem__V1__TokenLogprob *)(void *)(list + n);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t *w = l->word + i * score_words(l);
        tandem__v1__token_logprob__init(&m[i]);
        m[i].token_id = w[0];
        m[i].rank = w[1];
        memcpy(&m[i].logprob, w + 2, sizeof m[i].logprob);
        m[i].n_top_token_ids = m[i].n_top_logprobs = l->top;
        m[i].top_token_ids = w + 3;
        m[i].top_logprobs = (float *)(void *)(w + 3 + l->top);
        list[i] = &m[i];
    }
    return list;
}

static void drop_scores(struct score_list *l, uint32_t n)
{
    l->n -= n;
    if (l->n)
        memmove(l->word, l->word + n * score_words(l), l->n * score_words(l) * sizeof *l->word);
}

struct finish_parts {
    Tandem__V1__Finish finish;
    Tandem__V1__Usage usage;
    Tandem__V1__Timing timing;
};

static void fill_finish(const struct choice *c, struct finish_parts *f)
{
    const struct request *r = c->request;
    const struct sched_event *end = &c->end;
    bool stopped = end->stopped && !r->nothing_new;
    tandem__v1__finish__init(&f->finish);
    tandem__v1__usage__init(&f->usage);
    tandem__v1__timing__init(&f->timing);
    f->finish.reason = stopped || c->matched ? TANDEM__V1__FINISH__REASON__STOP : TANDEM__V1__FINISH__REASON__LENGTH;
    if (c->matched) {
        f->finish.stop_index_is_case = TANDEM__V1__FINISH__STOP_INDEX_IS_STOP_INDEX;
        f->finish.stop_index = c->match.which;
    } else if (stopped) {
        f->finish.stop_token_id_is_case = TANDEM__V1__FINISH__STOP_TOKEN_ID_IS_STOP_TOKEN_ID;
        f->finish.stop_token_id = end->token;
    }
    f->usage.prompt_tokens = end->n_prompt;
    f->usage.cached_prompt_tokens = end->n_cached;
    f->usage.completion_tokens = c->n_new;
    f->timing.queue_us = span_us(r->arrived_us, end->started_us);
    f->timing.prefill_us = span_us(end->started_us, end->first_token_us);
    f->timing.decode_us = span_us(end->first_token_us, end->last_token_us);
    f->timing.preemptions = end->preemptions;
    f->timing.replays = end->replays;
    f->finish.usage = &f->usage;
    f->finish.timing = &f->timing;
}

enum status_code choice_send(struct choice *c, struct status *st)
{
    struct request *r = c->request;
    Tandem__V1__GenerateResponse m = TANDEM__V1__GENERATE_RESPONSE__INIT;
    struct finish_parts f;
    size_t n_text = text_chunk(c);
    bool scored = r->top >= 0;
    uint32_t n_ids = min_u32(c->n_ids, scored ? COORD_CHUNK_SCORES : COORD_CHUNK_IDS);
    uint32_t n_prompt = min_u32(c->prompt_scores.n, COORD_CHUNK_SCORES),
             n_echo = min_u32(echo_left(c), COORD_CHUNK_IDS);
    bool last = c->finish_ready && n_text == c->text_len && n_ids == c->n_ids && n_prompt == c->prompt_scores.n &&
                n_echo == echo_left(c);
    m.index = c->index;
    m.text = (ProtobufCBinaryData){.len = n_text, .data = (uint8_t *)c->text};
    m.n_token_ids = n_ids;
    m.token_ids = c->ids;
    m.n_prompt_token_ids = n_echo;
    m.prompt_token_ids = n_echo ? r->prompt + c->n_echoed : NULL;
    m.n_logprobs = scored ? n_ids : 0;
    m.logprobs = score_messages(&c->scores, (uint32_t)m.n_logprobs);
    m.n_prompt_logprobs = n_prompt;
    m.prompt_logprobs = score_messages(&c->prompt_scores, n_prompt);
    if (!r->first_sent)
        m.request_id = (ProtobufCBinaryData){.len = strlen(r->name), .data = (uint8_t *)r->name};
    if (last) {
        fill_finish(c, &f);
        m.finish = &f.finish;
    }
    enum status_code rc = (m.n_logprobs && !m.logprobs) || (n_prompt && !m.prompt_logprobs)
                              ? status_nomem(st, "log probabilities of a message", n_ids + n_prompt)
                              : r->ops->send(r->sink, &m, st);
    free(m.logprobs);
    free(m.prompt_logprobs);
    if (rc != ST_OK)
        return rc;
    r->first_sent = true;
    c->done = last;
    c->n_echoed += n_echo;
    c->text_len -= n_text;
    c->n_ids -= n_ids;
    if (c->text_len)
        memmove(c->text, c->text + n_text, c->text_len);
    if (c->n_ids)
        memmove(c->ids, c->ids + n_ids, c->n_ids * sizeof *c->ids);
    drop_scores(&c->scores, (uint32_t)m.n_logprobs);
    drop_scores(&c->prompt_scores, n_prompt);
    return ST_OK;
}
