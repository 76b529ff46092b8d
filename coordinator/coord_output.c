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
        free(c->text_at);
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
        if (p)
            c->ids = p;
        size_t *at = p && c->request->kept ? realloc(c->text_at, cap * sizeof *at) : NULL;
        if (at)
            c->text_at = at;
        if (!p || (c->request->kept && !at))
            return status_nomem(st, "output of a request", cap * sizeof *p);
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

static enum status_code add(struct choice *c, const uint32_t *id, bool *ended, struct status *st)
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

enum status_code choice_add(struct choice *c, const uint32_t *id, bool *ended, struct status *st)
{
    enum status_code rc = add(c, id, ended, st);
    if (rc != ST_OK || !id || !c->request->kept)
        return rc;
    size_t text = c->text_len - (*ended ? 0 : c->match.held);
    c->text_at[c->n_ids - 1] = text;
    if (c->text_follows && c->n_ids == c->ids_from) {
        c->text_from = text;
        c->text_follows = false;
    }
    return ST_OK;
}

/* ---- what goes ---- */

static size_t sendable(const struct choice *c)
{
    size_t n = c->text_len - (c->finish_ready ? 0 : c->match.held);
    return n > c->text_from && !c->text_follows ? n - c->text_from : 0;
}

static uint32_t ids_left(const struct choice *c)
{
    return c->n_ids > c->ids_from ? c->n_ids - c->ids_from : 0;
}

static uint32_t scores_left(const struct score_list *l)
{
    return l->n > l->from ? l->n - l->from : 0;
}

static uint32_t echo_left(const struct choice *c)
{
    return c->request->echo ? c->request->n_prompt - c->n_echoed : 0;
}

bool choice_has_output(const struct choice *c)
{
    return !c->done && (sendable(c) || ids_left(c) || scores_left(&c->prompt_scores) || c->finish_ready);
}

static size_t text_chunk(const struct choice *c)
{
    size_t n = sendable(c);
    if (n <= COORD_CHUNK_BYTES)
        return n;
    n = COORD_CHUNK_BYTES;
    while (((unsigned char)c->text[c->text_from + n] & 0xC0) ==
           0x80) /* whole characters only; the text is valid UTF-8 */
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
        uint32_t *w = l->word + (l->from + i) * score_words(l);
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

static void drop_scores(struct score_list *l, uint32_t n, bool kept)
{
    if (kept) {
        l->from += n;
        return;
    }
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

void choice_seek(struct choice *c, uint32_t tokens, const uint64_t *text)
{
    bool any = tokens > 0 || (text && *text > 0);
    c->done = false;
    c->ids_from = c->scores.from = tokens;
    c->n_echoed = any ? c->request->n_prompt : 0;
    c->prompt_scores.from = any ? UINT32_MAX : 0;
    c->text_follows = !text && tokens > c->n_ids;
    c->text_from = text ? *text : tokens && !c->text_follows ? c->text_at[tokens - 1] : 0;
}

/* What was sent: gone, or behind the marks. */
static void drop_sent(struct choice *c, size_t n_text, uint32_t n_ids, uint32_t n_scores, uint32_t n_prompt)
{
    bool kept = c->request->kept;
    drop_scores(&c->scores, n_scores, kept);
    drop_scores(&c->prompt_scores, n_prompt, kept);
    if (kept) {
        c->text_from += n_text;
        c->ids_from += n_ids;
        return;
    }
    c->text_len -= n_text;
    c->n_ids -= n_ids;
    if (c->text_len)
        memmove(c->text, c->text + n_text, c->text_len);
    if (c->n_ids)
        memmove(c->ids, c->ids + n_ids, c->n_ids * sizeof *c->ids);
}

/* Only Attach can ask for what does not come. */
static enum status_code check_end(const struct choice *c, struct status *st)
{
    if (c->text_from < c->text_len && ((unsigned char)c->text[c->text_from] & 0xC0) == 0x80)
        return status_set(st, ST_OUT_OF_RANGE, "offsets: text_bytes %zu of answer %u is within a character",
                          c->text_from, c->index);
    if (!c->finish_ready || (c->ids_from <= c->n_ids && c->text_from <= c->text_len))
        return ST_OK;
    return status_set(st, ST_OUT_OF_RANGE,
                      "offsets: %u tokens and %zu bytes of text of answer %u, but it has %u and %zu", c->ids_from,
                      c->text_from, c->index, c->n_ids, c->text_len);
}

enum status_code choice_send(struct choice *c, struct status *st)
{
    struct request *r = c->request;
    Tandem__V1__GenerateResponse m = TANDEM__V1__GENERATE_RESPONSE__INIT;
    struct finish_parts f;
    size_t n_text = text_chunk(c);
    bool scored = r->top >= 0;
    uint32_t prompt_left = scores_left(&c->prompt_scores);
    uint32_t n_prompt = min_u32(prompt_left, COORD_CHUNK_SCORES), n_echo = min_u32(echo_left(c), COORD_CHUNK_IDS);
    bool prompt_done = n_prompt == prompt_left && n_echo == echo_left(c);
    /* all of the prompt's comes before the first id: who has an id has all of it */
    uint32_t n_ids = prompt_done ? min_u32(ids_left(c), scored ? COORD_CHUNK_SCORES : COORD_CHUNK_IDS) : 0;
    bool last = c->finish_ready && n_text == sendable(c) && n_ids == ids_left(c) && prompt_done;
    enum status_code rc = check_end(c, st);
    if (rc != ST_OK)
        return rc;
    m.index = c->index;
    m.text = (ProtobufCBinaryData){.len = n_text, .data = n_text ? (uint8_t *)c->text + c->text_from : NULL};
    m.n_token_ids = n_ids;
    m.token_ids = n_ids ? c->ids + c->ids_from : NULL;
    m.n_prompt_token_ids = n_echo;
    m.prompt_token_ids = n_echo ? r->prompt + c->n_echoed : NULL;
    m.n_logprobs = scored ? n_ids : 0;
    m.logprobs = score_messages(&c->scores, (uint32_t)m.n_logprobs);
    m.n_prompt_logprobs = n_prompt;
    m.prompt_logprobs = score_messages(&c->prompt_scores, n_prompt);
    if (!r->first_sent) {
        m.request_id = (ProtobufCBinaryData){.len = strlen(r->name), .data = (uint8_t *)r->name};
        m.attach_ms =
            r->number && r->keep_ms < r->coord->opt.journal_keep_ms ? r->coord->opt.journal_keep_ms : r->keep_ms;
    }
    if (last) {
        fill_finish(c, &f);
        m.finish = &f.finish;
    }
    rc = (m.n_logprobs && !m.logprobs) || (n_prompt && !m.prompt_logprobs)
             ? status_nomem(st, "log probabilities of a message", n_ids + n_prompt)
             : r->ops->send(r->sink, &m, st);
    free(m.logprobs);
    free(m.prompt_logprobs);
    if (rc != ST_OK)
        return rc;
    r->first_sent = true;
    c->done = last;
    c->n_echoed += n_echo;
    drop_sent(c, n_text, n_ids, (uint32_t)m.n_logprobs, n_prompt);
    return ST_OK;
}
