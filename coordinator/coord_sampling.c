/* Sampling, Stopping and Output of a request: checked field by field, then what the ranks get of them. Intake threads. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "coordinator/coord_internal.h"

#define MAX_BIASES     1024
#define MAX_ANSWERS    64
#define MAX_STOPS      32
#define MAX_STOP_BYTES 1024
#define MAX_LOGPROBS   20
#define MAX_BIAS       100.0
#define MAX_PENALTY    2.0
#define MAX_REPETITION 100.0

enum status_code draw_seed(uint64_t *seed, struct status *st)
{
    ssize_t n;
    do
        n = getrandom(seed, sizeof *seed, 0);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)sizeof *seed ? ST_OK : status_errno(st, ST_INTERNAL, errno, "getrandom");
}

uint64_t choice_seed(uint64_t seed, uint32_t index)
{
    if (index == 0)
        return seed;
    uint64_t z = seed + index * 0x9E3779B97F4A7C15ull; /* splitmix64 */
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

/* ---- single numbers ---- */

/* So written, NaN fails too. */
static enum status_code in_range(const char *field, float value, double low, double high, struct status *st)
{
    if ((double)value >= low && (double)value <= high)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "sampling.%s: %g, expected %g to %g", field, (double)value, low, high);
}

static enum status_code over_zero(const char *field, float value, double high, struct status *st)
{
    if (value > 0.0f && (double)value <= high)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "sampling.%s: %g, expected over 0, at most %g", field, (double)value,
                      high);
}

static enum status_code take_numbers(struct request *r, const Tandem__V1__Sampling *s, struct status *st)
{
    Tandem__V1__SampleParams *p = &r->params;
    enum status_code rc;
    if (s->temperature_is_case) {
        if ((rc = in_range("temperature", s->temperature, 0, 100, st)) != ST_OK)
            return rc;
        p->temperature = s->temperature;
    }
    if (s->top_k_is_case)
        p->top_k = s->top_k;
    if (s->top_p_is_case) {
        if ((rc = over_zero("top_p", s->top_p, 1, st)) != ST_OK)
            return rc;
        p->top_p = s->top_p;
    }
    if (s->min_p_is_case) {
        if ((rc = in_range("min_p", s->min_p, 0, 1, st)) != ST_OK)
            return rc;
        p->min_p = s->min_p;
    }
    if (s->typical_p_is_case) {
        if ((rc = over_zero("typical_p", s->typical_p, 1, st)) != ST_OK)
            return rc;
        p->typical_p = s->typical_p;
    }
    if (s->repetition_penalty_is_case) {
        if ((rc = over_zero("repetition_penalty", s->repetition_penalty, MAX_REPETITION, st)) != ST_OK)
            return rc;
        p->repetition_penalty = s->repetition_penalty;
    }
    if (s->presence_penalty_is_case) {
        if ((rc = in_range("presence_penalty", s->presence_penalty, -MAX_PENALTY, MAX_PENALTY, st)) != ST_OK)
            return rc;
        p->presence_penalty = s->presence_penalty;
    }
    if (s->frequency_penalty_is_case) {
        if ((rc = in_range("frequency_penalty", s->frequency_penalty, -MAX_PENALTY, MAX_PENALTY, st)) != ST_OK)
            return rc;
        p->frequency_penalty = s->frequency_penalty;
    }
    return ST_OK;
}

/* ---- lists ---- */

static int by_value(const void *a, const void *b)
{
    const uint32_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static enum status_code check_twice(const uint32_t *ids, size_t n, struct status *st)
{
    uint32_t sorted[MAX_BIASES];
    memcpy(sorted, ids, n * sizeof *ids);
    qsort(sorted, n, sizeof *sorted, by_value);
    for (size_t i = 1; i < n; i++)
        if (sorted[i] == sorted[i - 1])
            return status_set(st, ST_INVALID_ARGUMENT, "sampling.logit_bias: token %u is named twice", sorted[i]);
    return ST_OK;
}

static enum status_code take_bias(struct request *r, const Tandem__V1__Sampling *s, uint32_t vocab, struct status *st)
{
    size_t n = s->n_logit_bias;
    Tandem__V1__SampleParams *p = &r->params;
    if (n > MAX_BIASES)
        return status_set(st, ST_INVALID_ARGUMENT, "sampling.logit_bias: %zu tokens, expected at most %d", n,
                          MAX_BIASES);
    if (n == 0)
        return ST_OK;
    p->bias_ids = malloc(n * sizeof *p->bias_ids);
    p->biases = malloc(n * sizeof *p->biases);
    if (!p->bias_ids || !p->biases)
        return status_nomem(st, "logit_bias", n * sizeof *p->bias_ids);
    for (size_t i = 0; i < n; i++) {
        const Tandem__V1__LogitBias *b = s->logit_bias[i];
        if (b->token_id >= vocab)
            return status_set(st, ST_INVALID_ARGUMENT, "sampling.logit_bias[%zu].token_id: %u, expected below %u", i,
                              b->token_id, vocab);
        if (!(fabs((double)b->bias) <= MAX_BIAS))
            return status_set(st, ST_INVALID_ARGUMENT, "sampling.logit_bias[%zu].bias: %g, expected -%g to %g", i,
                              (double)b->bias, MAX_BIAS, MAX_BIAS);
        p->bias_ids[i] = b->token_id;
        p->biases[i] = b->bias;
    }
    p->n_bias_ids = p->n_biases = n;
    return check_twice(p->bias_ids, n, st);
}

static enum status_code take_allowed(struct request *r, Tandem__V1__Sampling *s, uint32_t vocab, struct status *st)
{
    if (s->n_allowed_token_ids > vocab)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "sampling.allowed_token_ids: %zu ids, expected at most %u, the vocabulary",
                          s->n_allowed_token_ids, vocab);
    for (size_t i = 0; i < s->n_allowed_token_ids; i++)
        if (s->allowed_token_ids[i] >= vocab)
            return status_set(st, ST_INVALID_ARGUMENT, "sampling.allowed_token_ids[%zu]: %u, expected below %u", i,
                              s->allowed_token_ids[i], vocab);
    r->params.allowed_ids = s->allowed_token_ids; /* taken over from the message */
    r->params.n_allowed_ids = s->n_allowed_token_ids;
    s->allowed_token_ids = NULL;
    s->n_allowed_token_ids = 0;
    return ST_OK;
}

static enum status_code take_sampling(struct request *r, Tandem__V1__Sampling *s, const struct model_facts *m,
                                      struct status *st)
{
    enum status_code rc;
    r->params.temperature = m->temperature;
    r->params.top_k = m->top_k;
    r->params.top_p = m->top_p;
    r->params.min_p = m->min_p;
    r->params.typical_p = m->typical_p;
    r->params.repetition_penalty = m->repetition_penalty;
    r->n_choices = 1;
    if (s && ((rc = take_numbers(r, s, st)) != ST_OK || (rc = take_bias(r, s, m->vocab_size, st)) != ST_OK ||
              (rc = take_allowed(r, s, m->vocab_size, st)) != ST_OK))
        return rc;
    if (s && s->n_is_case) {
        if (s->n < 1 || s->n > MAX_ANSWERS)
            return status_set(st, ST_INVALID_ARGUMENT, "sampling.n: %u, expected 1 to %d", s->n, MAX_ANSWERS);
        if (s->n > 1 && r->params.temperature == 0.0f)
            return status_set(st, ST_INVALID_ARGUMENT,
                              "sampling.n: %u answers at temperature 0 would be the same, expected 1", s->n);
        r->n_choices = s->n;
    }
    if (s && s->seed_is_case) {
        r->params.seed = s->seed;
        return ST_OK;
    }
    return draw_seed(&r->params.seed, st);
}

/* ---- stopping ---- */

static enum status_code take_stop_ids(struct request *r, const Tandem__V1__Stopping *s, const struct model_facts *m,
                                      struct status *st)
{
    size_t n_own = s ? s->n_stop_token_ids : 0;
    uint32_t n_eos = s && s->ignore_eos ? 0 : m->n_eos;
    if (n_own > COORD_MAX_STOP_IDS)
        return status_set(st, ST_INVALID_ARGUMENT, "stopping.stop_token_ids: %zu ids, expected at most %d", n_own,
                          COORD_MAX_STOP_IDS);
    for (size_t i = 0; i < n_own; i++)
        if (s->stop_token_ids[i] >= m->vocab_size)
            return status_set(st, ST_INVALID_ARGUMENT, "stopping.stop_token_ids[%zu]: %u, expected below %u", i,
                              s->stop_token_ids[i], m->vocab_size);
    if (n_own + n_eos == 0)
        return ST_OK;
    r->stop = malloc((n_own + n_eos) * sizeof *r->stop);
    if (!r->stop)
        return status_nomem(st, "stop ids", (n_own + n_eos) * sizeof *r->stop);
    memcpy(r->stop, m->eos, n_eos * sizeof *r->stop);
    if (n_own)
        memcpy(r->stop + n_eos, s->stop_token_ids, n_own * sizeof *r->stop);
    r->n_stop = n_eos + (uint32_t)n_own;
    return ST_OK;
}

/* The decoder's text is valid UTF-8; a string that is not could never be found, and is a mistake. */
static bool is_utf8(const char *s, size_t n)
{
    const unsigned char *c = (const unsigned char *)s, *end = c + n;
    while (c < end) {
        unsigned more = *c < 0x80 ? 0 : *c >= 0xC2 && *c < 0xE0 ? 1 : *c >= 0xE0 && *c < 0xF0 ? 2 : 3;
        if ((*c >= 0x80 && *c < 0xC2) || *c > 0xF4 || (size_t)(end - c) <= more)
            return false;
        if ((*c == 0xE0 && c[1] < 0xA0) || (*c == 0xED && c[1] > 0x9F) || (*c == 0xF0 && c[1] < 0x90) ||
            (*c == 0xF4 && c[1] > 0x8F))
            return false;
        for (c++; more > 0; more--, c++)
            if ((*c & 0xC0) != 0x80)
                return false;
    }
    return true;
}

static enum status_code take_stop_strings(struct request *r, const Tandem__V1__Stopping *s, struct status *st)
{
    if (s->n_stop > MAX_STOPS)
        return status_set(st, ST_INVALID_ARGUMENT, "stopping.stop: %zu strings, expected at most %d", s->n_stop,
                          MAX_STOPS);
    for (size_t i = 0; i < s->n_stop; i++) {
        size_t len = strlen(s->stop[i]);
        if (len < 1 || len > MAX_STOP_BYTES)
            return status_set(st, ST_INVALID_ARGUMENT, "stopping.stop[%zu]: %zu bytes, expected 1 to %d", i, len,
                              MAX_STOP_BYTES);
        if (!is_utf8(s->stop[i], len))
            return status_set(st, ST_INVALID_ARGUMENT, "stopping.stop[%zu]: not valid UTF-8", i);
    }
    if (s->include_stop_in_output && s->n_stop == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "stopping.include_stop_in_output: set, but stopping.stop is empty");
    r->include_stop = s->include_stop_in_output;
    return stop_set_create(&r->stop_strings, s->stop, (uint32_t)s->n_stop, st);
}

static bool is_listed(const uint32_t *ids, size_t n, uint32_t id)
{
    for (size_t i = 0; i < n; i++)
        if (ids[i] == id)
            return true;
    return false;
}

/* Something other than a stop id has to be left to sample while min_tokens lasts. */
static enum status_code take_min_tokens(struct request *r, const Tandem__V1__Stopping *s, uint32_t vocab,
                                        struct status *st)
{
    if (!s->min_tokens_is_case || s->min_tokens == 0)
        return ST_OK;
    Tandem__V1__SampleParams *p = &r->params;
    size_t n = p->n_allowed_ids ? p->n_allowed_ids : vocab, stops = 0;
    for (size_t i = 0; i < n && stops == i; i++)
        stops += is_listed(r->stop, r->n_stop, p->n_allowed_ids ? p->allowed_ids[i] : (uint32_t)i);
    if (stops == n)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "stopping.min_tokens: %u, but %s only of stop ids, which do not come before", s->min_tokens,
                          p->n_allowed_ids ? "sampling.allowed_token_ids consists" : "the vocabulary consists");
    p->min_tokens = s->min_tokens;
    p->banned_ids = r->stop;
    p->n_banned_ids = r->n_stop;
    return ST_OK;
}

/* ---- output ---- */

static enum status_code take_output(struct request *r, const Tandem__V1__Output *o, struct status *st)
{
    r->top = r->prompt_top = -1;
    if (!o)
        return ST_OK;
    if (o->logprobs_is_case && o->logprobs > MAX_LOGPROBS)
        return status_set(st, ST_INVALID_ARGUMENT, "output.logprobs: %u, expected at most %d", o->logprobs,
                          MAX_LOGPROBS);
    if (o->prompt_logprobs_is_case && o->prompt_logprobs > MAX_LOGPROBS)
        return status_set(st, ST_INVALID_ARGUMENT, "output.prompt_logprobs: %u, expected at most %d",
                          o->prompt_logprobs, MAX_LOGPROBS);
    if (o->logprobs_is_case)
        r->top = (int)o->logprobs;
    if (o->prompt_logprobs_is_case)
        r->prompt_top = (int)o->prompt_logprobs;
    r->echo = o->echo;
    r->params.logprobs = r->top >= 0;
    int most = r->top > r->prompt_top ? r->top : r->prompt_top;
    r->params.top_logprobs = most > 0 ? (uint32_t)most : 0;
    return ST_OK;
}

/* What the ranks of this group lack. */
static enum status_code check_support(const struct request *r, uint32_t supported, struct status *st)
{
    const Tandem__V1__SampleParams *p = &r->params;
    const struct {
        const char *field;
        bool used;
        uint32_t needs;
    } field[] = {
        {"sampling.min_p", p->min_p > 0.0f, TANDEM__V1__SAMPLE_OPTION__MIN_P},
        {"sampling.typical_p", p->typical_p > 0.0f && p->typical_p < 1.0f, TANDEM__V1__SAMPLE_OPTION__TYPICAL_P},
        {"sampling.repetition_penalty", p->repetition_penalty != 0.0f && p->repetition_penalty != 1.0f,
         TANDEM__V1__SAMPLE_OPTION__ADJUST},
        {"sampling.presence_penalty", p->presence_penalty != 0.0f, TANDEM__V1__SAMPLE_OPTION__ADJUST},
        {"sampling.frequency_penalty", p->frequency_penalty != 0.0f, TANDEM__V1__SAMPLE_OPTION__ADJUST},
        {"sampling.logit_bias", p->n_bias_ids > 0, TANDEM__V1__SAMPLE_OPTION__ADJUST},
        {"sampling.allowed_token_ids", p->n_allowed_ids > 0, TANDEM__V1__SAMPLE_OPTION__ADJUST},
        {"stopping.min_tokens", p->min_tokens > 0 && p->n_banned_ids > 0, TANDEM__V1__SAMPLE_OPTION__ADJUST},
        {"output.logprobs", r->top >= 0, TANDEM__V1__SAMPLE_OPTION__SCORE},
        {"output.prompt_logprobs", r->prompt_top >= 0, TANDEM__V1__SAMPLE_OPTION__SCORE},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        if (field[i].used && !(supported & field[i].needs))
            return status_set(st, ST_UNIMPLEMENTED, "%s: the back end of this server has no such option",
                              field[i].field);
    return ST_OK;
}

enum status_code take_options(struct request *r, Tandem__V1__GenerateRequest *m, const struct model_facts *facts,
                              struct status *st)
{
    const Tandem__V1__Stopping *s = m->stopping;
    enum status_code rc;
    tandem__v1__sample_params__init(&r->params);
    if ((rc = take_sampling(r, m->sampling, facts, st)) != ST_OK || (rc = take_stop_ids(r, s, facts, st)) != ST_OK ||
        (rc = take_output(r, m->output, st)) != ST_OK)
        return rc;
    if (s &&
        ((rc = take_stop_strings(r, s, st)) != ST_OK || (rc = take_min_tokens(r, s, facts->vocab_size, st)) != ST_OK))
        return rc;
    if (s && s->max_tokens_is_case && s->max_tokens == 0 && !r->echo && r->prompt_top < 0)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "stopping.max_tokens: 0, expected at least 1 without output.echo or output.prompt_logprobs");
    return check_support(r, facts->sample_options, st);
}

void options_fini(struct request *r)
{
    free(r->params.bias_ids);
    free(r->params.biases);
    free(r->params.allowed_ids);
    stop_set_destroy(r->stop_strings);
}
