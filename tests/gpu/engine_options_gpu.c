/* engine_options_gpu.c - sampling options on a device: every choice against the host's on the same logits, and the same choices to
 * the bit alone, in a batch, with two steps under way, after a stay in host memory and after a replay. */
#include "tests/gpu/engine_options_gpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SETS       17
#define PROMPT     9
#define NEW_TOKENS 24
#define BATCH      12 /* slots side by side */

/* Of a log probability: sums in another order, then a rounding to float32 that may fall to the other side. */
static bool is_near(float host, float device)
{
    return host == device || fabs((double)host - (double)device) <= 0x1p-23 * fabs((double)host) + 0x1p-36;
}

static const struct options {
    float temperature, top_p, min_p, typical_p, repetition, frequency, presence;
    uint32_t top_k, n_bias, n_allowed, n_banned, logprobs; /* logprobs: 1 + so many likeliest */
    bool in_prompt;                                        /* half of the prompt counts as output */
} sets[SETS] = {
    {.repetition = 1.3f},
    {.frequency = 0.7f},
    {.presence = 1.1f, .in_prompt = true},
    {.n_bias = 40, .n_banned = 300}, /* more than a device keeps: chosen on the host */
    {.n_allowed = 50},
    {.n_banned = 8},
    {.temperature = 1, .logprobs = 1 + 20},
    {.logprobs = 1},
    {.temperature = 1, .typical_p = 0.7f},
    {.temperature = 0.8f, .repetition = 0.6f, .frequency = -0.5f, .in_prompt = true},
    {.temperature = 1.2f, .top_k = 40, .top_p = 0.9f, .repetition = 1.2f, .frequency = 0.3f, .presence = 0.4f},
    {.temperature = 1, .min_p = 0.01f, .n_bias = 1000, .n_banned = 64, .n_allowed = 700},
    {.temperature = 2, .typical_p = 0.3f, .top_p = 0.95f, .presence = -0.6f, .logprobs = 1 + 5},
    {.frequency = 1.5f, .presence = 1, .repetition = 1.1f, .n_bias = 3, .logprobs = 1 + 2},
    {.temperature = 0.5f, .typical_p = 0.95f, .top_k = 500, .n_bias = 20},
    {.temperature = 1, .typical_p = 0.9f, .frequency = 0.5f, .n_banned = 300, .logprobs = 1 + 3}, /* host */
    {.temperature = 1},                                                                           /* none */
};

/* What the engine gets, and the same for the host's functions. */
struct choice {
    Tandem__V1__SampleParams p;
    struct sample_params params;
    struct sample_adjust adjust;
    struct sample_history history;
    uint32_t bias_id[1000], allowed[700], banned[300], *bits;
    float bias[1000];
    struct sample_bias biases[1000];
};

static void die(const char *what)
{
    fprintf(stderr, "engine_options_gpu: %s\n", what);
    exit(1);
}

static void fill_lists(struct choice *c, const struct options *o, uint32_t vocab)
{
    uint32_t most = vocab / 2;
    for (uint32_t i = 0; i < o->n_bias && i < most; i++) { /* 2 i + 1, so none is named twice */
        c->bias_id[i] = 2 * i + 1;
        c->bias[i] = (float)((i * 37) % 41) * 0.1f - 2;
        c->biases[i] = (struct sample_bias){c->bias_id[i], c->bias[i]};
        c->p.n_bias_ids = c->p.n_biases = i + 1;
    }
    for (uint32_t i = 0; i < o->n_allowed; i++) {
        c->allowed[i] = (uint32_t)(((uint64_t)i * 7919 + 11) % vocab);
        c->bits[c->allowed[i] / 32] |= 1u << c->allowed[i] % 32;
    }
    for (uint32_t i = 0; i < o->n_banned; i++)
        c->banned[i] = (uint32_t)(((uint64_t)i * 104729 + 11) % vocab);
    c->p.n_allowed_ids = o->n_allowed;
    c->p.n_banned_ids = o->n_banned;
    c->p.bias_ids = c->bias_id;
    c->p.biases = c->bias;
    c->p.allowed_ids = c->allowed;
    c->p.banned_ids = c->banned;
}

static void make(struct choice *c, uint32_t set, uint32_t vocab)
{
    const struct options *o = &sets[set];
    memset(c, 0, sizeof *c);
    tandem__v1__sample_params__init(&c->p);
    c->bits = calloc((vocab + 31) / 32, sizeof *c->bits);
    if (!c->bits)
        die("no memory");
    fill_lists(c, o, vocab);
    c->p.temperature = o->temperature;
    c->p.top_k = o->top_k;
    c->p.top_p = o->top_p;
    c->p.min_p = o->min_p;
    c->p.typical_p = o->typical_p;
    c->p.seed = 0xABCDEF123ull * (set + 1);
    c->p.repetition_penalty = o->repetition;
    c->p.frequency_penalty = o->frequency;
    c->p.presence_penalty = o->presence;
    c->p.min_tokens = NEW_TOKENS / 2;
    c->p.output_at = o->in_prompt ? PROMPT / 2 : PROMPT;
    c->p.logprobs = o->logprobs > 0;
    c->p.top_logprobs = o->logprobs ? o->logprobs - 1 : 0;
    c->params = (struct sample_params){o->temperature, o->top_k, o->top_p, c->p.seed, o->min_p, o->typical_p};
    c->adjust = (struct sample_adjust){.allowed = o->n_allowed ? c->bits : NULL,
                                       .banned = c->banned,
                                       .bias = c->biases,
                                       .n_bias = (uint32_t)c->p.n_bias_ids,
                                       .history = &c->history,
                                       .repetition = o->repetition == 0 ? 1 : o->repetition,
                                       .frequency = o->frequency,
                                       .presence = o->presence};
}

static void drop(struct choice *c)
{
    sample_history_fini(&c->history);
    free(c->bits);
}

static void fill_prompt(uint32_t *ids, uint32_t set, uint32_t vocab)
{
    for (uint32_t i = 0; i < PROMPT; i++)
        ids[i] = i % 3 == 2 ? ids[i - 1] : (set * 577 + i * 31 + 2) % vocab;
}

static void feed(struct choice *c, uint32_t id, uint32_t position)
{
    if (sample_history_add(&c->history, id, position >= c->p.output_at, NULL) != ST_OK)
        die("no memory");
}

/* ---- against the host, on the same logits ---- */

struct scratch {
    uint32_t vocab;
    struct sampler *sampler;
    float *raw, *adjusted;
    unsigned draws, other, changed, scores, far; /* changed: choices that the options of tokens made another */
};

static void compare_scores(struct scratch *w, const struct sample_scores *h, const struct sample_scores *d)
{
    bool same = h->token == d->token && h->rank == d->rank && h->n == d->n && is_near(h->logprob, d->logprob);
    for (uint32_t i = 0; same && i < h->n; i++)
        same = h->top[i] == d->top[i] && is_near(h->top_logprob[i], d->top_logprob[i]);
    w->scores++;
    w->far += !same;
}

/* The token at `position` was drawn from the logits that the device still has. */
static void compare(struct scratch *w, struct choice *c, struct gpu_run *r, uint32_t position)
{
    uint32_t token, plain;
    struct sample_scores scores;
    gpu_logits(r, w->raw);
    memcpy(w->adjusted, w->raw, w->vocab * sizeof *w->raw);
    c->adjust.n_banned = position < c->p.output_at + c->p.min_tokens ? (uint32_t)c->p.n_banned_ids : 0;
    sample_adjust(w->adjusted, w->vocab, 0, &c->adjust);
    if (sampler_draw(w->sampler, &token, w->adjusted, &c->params, position, 0, NULL) != ST_OK ||
        sampler_draw(w->sampler, &plain, w->raw, &c->params, position, 0, NULL) != ST_OK)
        die("draw");
    w->draws++;
    w->other += token != r->result.tokens[0];
    w->changed += token != plain;
    if (r->result.n_sample_scores == 0)
        return;
    uint32_t n = c->p.top_logprobs < w->vocab ? c->p.top_logprobs : w->vocab;
    if (sample_score(&scores, w->raw, w->vocab, r->result.tokens[0], n, 0, NULL) != ST_OK)
        die("score");
    compare_scores(w, &scores, &r->result.sample_scores[0].scores);
}

static void run_alone(struct scratch *w, struct gpu_run *r, uint32_t set, uint32_t *out)
{
    uint32_t ids[PROMPT], slot = set % 5;
    struct choice c;
    make(&c, set, w->vocab);
    fill_prompt(ids, set, w->vocab);
    gpu_prefill(r, slot, ids, PROMPT, 0, true, &c.p);
    for (uint32_t i = 0; i < PROMPT; i++)
        feed(&c, ids[i], i);
    for (uint32_t i = 0;; i++) {
        compare(w, &c, r, PROMPT + i);
        out[i] = r->result.tokens[0];
        if (i == NEW_TOKENS - 1)
            break;
        feed(&c, out[i], PROMPT + i);
        gpu_decode(r, &slot, 1);
    }
    gpu_release(r, slot);
    drop(&c);
}

/* Rows of a prompt: the first of each chunk against the host, and all alike whatever the chunks are where that is so. */
static void run_prompt(struct scratch *w, struct gpu_run *r, bool invariant)
{
    enum { N = 40 };
    struct choice c;
    struct sample_scores first[N], scores;
    uint32_t ids[N + 1];
    make(&c, 6, w->vocab); /* 20 likeliest */
    for (uint32_t i = 0; i <= N; i++)
        ids[i] = (i * 7919 + i * i) % w->vocab;
    for (uint32_t chunk = 1; chunk <= N; chunk = chunk == 1 ? 7 : chunk == 7 ? N : N + 1) {
        for (uint32_t at = 0; at < N; at += chunk) {
            uint32_t n = N - at < chunk ? N - at : chunk;
            gpu_score(r, 3, ids + at, n, at, ids[at + n], &c.p);
            gpu_logits(r, w->raw);
            for (uint32_t i = 0; i < r->result.n_prompt_scores; i++) {
                const struct sample_scores *s = &r->result.prompt_scores[i].scores;
                if (i == 0 && sample_score(&scores, w->raw, w->vocab, ids[at + 1], s->n, 0, NULL) != ST_OK)
                    die("score");
                if (i == 0)
                    compare_scores(w, &scores, s);
                if (chunk == 1)
                    first[at] = *s;
                else if (invariant)
                    compare_scores(w, &first[at + i], s);
            }
        }
        gpu_release(r, 3);
    }
    drop(&c);
}

/* ---- the same in other company ---- */

enum way { TOGETHER, AHEAD, MOVED, REPLAYED, WAYS };

static struct choice choices[BATCH];

static void replay(struct gpu_run *r, uint32_t slot, const uint32_t *made, uint32_t n, uint32_t vocab)
{
    uint32_t ids[PROMPT + NEW_TOKENS];
    fill_prompt(ids, slot, vocab);
    memcpy(ids + PROMPT, made, n * sizeof *made);
    gpu_release(r, slot);
    gpu_prefill(r, slot, ids, PROMPT + n, 0, true, &choices[slot].p);
}

static unsigned run_together(struct gpu_run *r, enum way way, uint32_t vocab, uint32_t expected[SETS][NEW_TOKENS])
{
    static uint32_t made[BATCH][NEW_TOKENS];
    uint32_t slots[BATCH], ids[PROMPT], at = 1, wrong = 0;
    for (uint32_t s = 0; s < BATCH; s++) {
        slots[s] = s;
        make(&choices[s], s, vocab);
        fill_prompt(ids, s, vocab);
        gpu_prefill(r, s, ids, PROMPT, 0, true, &choices[s].p);
        made[s][0] = r->result.tokens[0];
    }
    for (uint32_t i = 1; i < NEW_TOKENS; i++) {
        if (way == MOVED && i % 7 == 3) {
            gpu_suspend(r, slots + i / 7, BATCH / 2);
            gpu_prefill(r, BATCH, ids, PROMPT, 0, false, NULL);
            gpu_release(r, BATCH);
            gpu_resume(r, slots + i / 7, BATCH / 2);
        }
        if (way == AHEAD) {
            if (!gpu_decode_ahead(r, slots, BATCH))
                continue;
        } else if (way == REPLAYED && i == NEW_TOKENS / 2) {
            for (uint32_t s = 0; s < BATCH; s++) {
                replay(r, s, made[s], i, vocab);
                made[s][i] = r->result.tokens[0];
            }
            at++;
            continue;
        } else {
            gpu_decode(r, slots, BATCH);
        }
        for (uint32_t s = 0; s < BATCH; s++)
            made[s][at] = r->result.tokens[s];
        at++;
    }
    if (way == AHEAD) {
        gpu_collect(r);
        for (uint32_t s = 0; s < BATCH; s++)
            made[s][at] = r->result.tokens[s];
        at++;
    }
    for (uint32_t s = 0; s < BATCH; s++) {
        for (uint32_t i = 0; i < NEW_TOKENS; i++)
            wrong += made[s][i] != expected[s][i];
        gpu_release(r, s);
        drop(&choices[s]);
    }
    return wrong + (at != NEW_TOKENS);
}

/* ---- */

static unsigned report(const char *name, const char *what, const struct scratch *w)
{
    if (comm_rank(gpu_comm()) == 0)
        printf(
            "%-28s options, %s: %u of %u choices and %u of %u scores differ from the host's; %u choices were changed\n",
            name, what, w->other, w->draws, w->far, w->scores, w->changed);
    bool scored = w->scores > 0 || comm_rank(gpu_comm()) != 0;
    bool ok = w->other == 0 && w->far == 0 && w->changed > w->draws / 20 && scored;
    if (!ok)
        printf("FAILED %s: options, %s\n", name, what);
    return !ok;
}

unsigned engine_options_gpu(const char *name, struct gpu_run *r, const char *what, bool invariant)
{
    static uint32_t made[SETS][NEW_TOKENS];
    static const char *const ways[WAYS] = {"in a batch", "two steps under way", "to host memory and back", "replayed"};
    struct scratch w = {.vocab = engine_info(r->e).vocab_size};
    unsigned failures = 0;
    w.raw = malloc(w.vocab * sizeof *w.raw);
    w.adjusted = malloc(w.vocab * sizeof *w.adjusted);
    if (!w.raw || !w.adjusted || sampler_create(&w.sampler, w.vocab, NULL) != ST_OK)
        die("no memory");
    for (uint32_t set = 0; set < SETS; set++)
        run_alone(&w, r, set, made[set]);
    run_prompt(&w, r, invariant);
    failures += report(name, what, &w);
    for (enum way way = 0; invariant && way < WAYS; way++) {
        unsigned wrong = run_together(r, way, w.vocab, made);
        if (wrong)
            printf("FAILED %s: options, %s, %s: %u of %d ids are not those of the slot alone\n", name, what, ways[way],
                   wrong, BATCH * NEW_TOKENS);
        failures += wrong > 0;
    }
    sampler_destroy(w.sampler);
    free(w.adjusted);
    free(w.raw);
    return failures;
}
