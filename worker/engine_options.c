/* engine_options.c - what a slot's admission says about its samples, and the history that penalties look at. The history is
 * made of the tokens that are fed, not of those that are sampled: a replay, which feeds all of them again, finds the same. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "worker/engine_internal.h"

struct engine_options {
    bool penalties, kept;
    uint32_t output_at, min_tokens;
    uint32_t *allowed, *banned;
    uint32_t n_banned;
    struct sample_bias *bias;
    struct sample_history history;
    struct sample_adjust adjust; /* for the sample under way */
};

struct sample_params engine_sample_params(const Tandem__V1__SampleParams *p)
{
    if (!p)
        return (struct sample_params){0};
    return (struct sample_params){
        .temperature = p->temperature,
        .top_k = p->top_k,
        .top_p = p->top_p,
        .seed = p->seed,
        .min_p = p->min_p,
        .typical_p = p->typical_p,
    };
}

/* ---- check ---- */

static enum status_code check_ids(const char *field, const uint32_t *ids, size_t n, uint32_t vocab, struct status *st)
{
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= vocab)
            return status_set(st, ST_INVALID_ARGUMENT, "%s[%zu]: %u, expected 0 to %u", field, i, ids[i], vocab - 1);
    return ST_OK;
}

bool engine_options_history(const Tandem__V1__SampleParams *p)
{
    if (!p)
        return false;
    bool repetition = p->repetition_penalty != 0.0f && p->repetition_penalty != 1.0f;
    return repetition || p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
}

static bool is_adjusted(const Tandem__V1__SampleParams *p)
{
    return engine_options_history(p) || p->n_allowed_ids || p->n_bias_ids || (p->n_banned_ids && p->min_tokens);
}

static enum status_code check_support(const Tandem__V1__SampleParams *p, uint32_t supported, struct status *st)
{
    const char *field = p->min_p > 0.0f && !(supported & SAMPLE_MIN_P)                                  ? "min_p"
                        : p->typical_p > 0.0f && p->typical_p < 1.0f && !(supported & SAMPLE_TYPICAL_P) ? "typical_p"
                        : p->logprobs && !(supported & SAMPLE_SCORE)                                    ? "logprobs"
                        : is_adjusted(p) && !(supported & SAMPLE_ADJUST) ? "penalties, bias, allowed or banned ids"
                                                                         : NULL;
    return field ? status_set(st, ST_UNIMPLEMENTED, "%s: this back end has no such option", field) : ST_OK;
}

enum status_code engine_options_check(const Tandem__V1__SampleParams *p, uint32_t vocab, uint32_t supported,
                                      struct status *st)
{
    struct sample_params basic = engine_sample_params(p);
    enum status_code rc = sample_check(&basic, st);
    if (rc != ST_OK || !p || (rc = check_support(p, supported, st)) != ST_OK)
        return rc;
    if ((rc = check_ids("bias_ids", p->bias_ids, p->n_bias_ids, vocab, st)) != ST_OK ||
        (rc = check_ids("allowed_ids", p->allowed_ids, p->n_allowed_ids, vocab, st)) != ST_OK ||
        (rc = check_ids("banned_ids", p->banned_ids, p->n_banned_ids, vocab, st)) != ST_OK)
        return rc;
    if (p->n_biases != p->n_bias_ids)
        return status_set(st, ST_INVALID_ARGUMENT, "biases: %zu of them, expected %zu as of bias_ids", p->n_biases,
                          p->n_bias_ids);
    for (size_t i = 0; i < p->n_biases; i++)
        if (!isfinite(p->biases[i]))
            return status_set(st, ST_INVALID_ARGUMENT, "biases[%zu]: %g, expected a finite number", i,
                              (double)p->biases[i]);
    if (!(p->repetition_penalty >= 0.0f) || isinf(p->repetition_penalty))
        return status_set(st, ST_INVALID_ARGUMENT, "repetition_penalty: %g, expected a finite number of at least 0",
                          (double)p->repetition_penalty);
    if (!isfinite(p->presence_penalty) || !isfinite(p->frequency_penalty))
        return status_set(st, ST_INVALID_ARGUMENT, "%s_penalty: expected a finite number",
                          isfinite(p->presence_penalty) ? "frequency" : "presence");
    if (p->top_logprobs > SAMPLE_MAX_TOP)
        return status_set(st, ST_INVALID_ARGUMENT, "top_logprobs: %u, expected at most %d", p->top_logprobs,
                          SAMPLE_MAX_TOP);
    return ST_OK;
}

/* ---- life ---- */

static bool copy_lists(struct engine_options *o, const Tandem__V1__SampleParams *p, uint32_t vocab)
{
    if (p->n_allowed_ids) {
        o->allowed = calloc((vocab + 31) / 32, sizeof *o->allowed);
        if (!o->allowed)
            return false;
        for (size_t i = 0; i < p->n_allowed_ids; i++)
            o->allowed[p->allowed_ids[i] / 32] |= 1u << p->allowed_ids[i] % 32;
    }
    if (p->n_bias_ids) {
        o->bias = malloc(p->n_bias_ids * sizeof *o->bias);
        if (!o->bias)
            return false;
        for (size_t i = 0; i < p->n_bias_ids; i++)
            o->bias[i] = (struct sample_bias){p->bias_ids[i], p->biases[i]};
    }
    if (p->n_banned_ids && p->min_tokens) {
        o->banned = malloc(p->n_banned_ids * sizeof *o->banned);
        if (!o->banned)
            return false;
        memcpy(o->banned, p->banned_ids, p->n_banned_ids * sizeof *o->banned);
        o->n_banned = (uint32_t)p->n_banned_ids;
    }
    return true;
}

enum status_code engine_options_create(struct engine_options **out, const Tandem__V1__SampleParams *p, uint32_t vocab,
                                       struct status *st)
{
    *out = NULL;
    if (!p || !is_adjusted(p))
        return ST_OK;
    struct engine_options *o = calloc(1, sizeof *o);
    if (!o || !copy_lists(o, p, vocab)) {
        engine_options_destroy(o);
        return status_nomem(st, "sampling options of a slot", sizeof *o);
    }
    o->penalties = engine_options_history(p);
    o->output_at = p->output_at;
    o->min_tokens = p->min_tokens;
    o->adjust = (struct sample_adjust){
        .allowed = o->allowed,
        .banned = o->banned,
        .n_bias = (uint32_t)p->n_bias_ids,
        .bias = o->bias,
        .history = o->penalties ? &o->history : NULL,
        .repetition = p->repetition_penalty == 0.0f ? 1.0f : p->repetition_penalty,
        .frequency = p->frequency_penalty,
        .presence = p->presence_penalty,
    };
    *out = o;
    return ST_OK;
}

void engine_options_destroy(struct engine_options *o)
{
    if (!o)
        return;
    sample_history_fini(&o->history);
    free(o->allowed);
    free(o->banned);
    free(o->bias);
    free(o);
}

/* ---- use ---- */

void engine_options_kept(struct engine_options *o)
{
    o->kept = true;
}

bool engine_options_wait(const struct engine_options *o)
{
    return o && o->penalties && !o->kept;
}

enum status_code engine_options_feed(struct engine_options *o, const uint32_t *tokens, uint32_t n, uint32_t position,
                                     struct status *st)
{
    if (!o || !o->penalties || o->kept)
        return ST_OK;
    for (uint32_t i = 0; i < n; i++) {
        enum status_code rc = sample_history_add(&o->history, tokens[i], position + i >= o->output_at, st);
        if (rc != ST_OK)
            return rc;
    }
    return ST_OK;
}

const struct sample_adjust *engine_options_at(struct engine_options *o, uint32_t position)
{
    if (!o)
        return NULL;
    o->adjust.n_banned = position < (uint64_t)o->output_at + o->min_tokens ? o->n_banned : 0;
    return &o->adjust;
}
