/* bench_load.c - which requests come when: Poisson arrivals, lengths, the words of a prompt. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/bench.h"

#define LOG_NORMAL_SIGMA 1.0 /* where none is given */
#define LOG_NORMAL_TIMES 20  /* the longest, in means */
#define NUMBERS          4   /* drawn for one request */

/* ---- numbers from a seed ---- */

/* splitmix64 */
static uint64_t mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

/* Over 0, below 1; number k of request r. */
static double uniform(uint64_t seed, uint64_t r, uint64_t k)
{
    return ((double)(mix(mix(seed) ^ (r * NUMBERS + k)) >> 11) + 0.5) * 0x1p-53;
}

uint32_t bench_prompt_token(uint64_t seed, uint32_t r, uint32_t i, uint32_t shared, uint32_t vocab)
{
    uint64_t who = i < shared ? 0 : (uint64_t)r + 1;
    return (uint32_t)(mix(mix(seed ^ 0x70726F6D7074ull) ^ (who << 32 | i)) % vocab);
}

/* ---- lengths ---- */

static bool read_number(const char **text, double lo, double hi, double *out)
{
    char *end;
    if ((**text < '0' || **text > '9') && **text != '.')
        return false;
    errno = 0;
    *out = strtod(*text, &end);
    if (errno || !(*out >= lo && *out <= hi))
        return false;
    *text = end;
    return true;
}

/* "100-300" */
static bool read_bounds(const char **text, double *low, double *high)
{
    return read_number(text, 1, TRACE_MAX_TOKENS, low) && *(*text)++ == '-' &&
           read_number(text, *low, TRACE_MAX_TOKENS, high) && floor(*low) == *low && floor(*high) == *high;
}

enum status_code bench_lengths_parse(struct bench_lengths *out, const char *option, const char *text, struct status *st)
{
    struct bench_lengths l = {.kind = BENCH_FIXED, .sigma = LOG_NORMAL_SIGMA};
    const char *p = text;
    double low = 1, high = 1;
    bool ok;
    if (strncmp(p, "uniform:", 8) == 0) {
        l.kind = BENCH_UNIFORM;
        p += 8;
        ok = read_bounds(&p, &low, &high);
    } else if (strncmp(p, "lognormal:", 10) == 0) {
        l.kind = BENCH_LOG_NORMAL;
        p += 10;
        ok = read_number(&p, 1, TRACE_MAX_TOKENS, &l.mean) && (*p != ',' || (p++, read_number(&p, 0, 4, &l.sigma)));
        low = 1;
        high = fmin(l.mean * LOG_NORMAL_TIMES, TRACE_MAX_TOKENS);
        if (ok && *p == ',')
            p++, ok = read_bounds(&p, &low, &high);
    } else {
        ok = read_number(&p, 1, TRACE_MAX_TOKENS, &low) && floor(low) == low;
        high = low;
    }
    if (!ok || *p)
        return status_set(st, ST_INVALID_ARGUMENT,
                          "%s %s: expected a number of tokens, uniform:LOW-HIGH or lognormal:MEAN[,SIGMA[,LOW-HIGH]]",
                          option, text);
    l.low = (uint32_t)low;
    l.high = (uint32_t)high;
    *out = l;
    return ST_OK;
}

/* u, v: over 0, below 1. */
static uint32_t draw_length(const struct bench_lengths *l, double u, double v)
{
    double x = l->low;
    if (l->kind == BENCH_UNIFORM)
        x = l->low + floor(u * ((double)l->high - l->low + 1));
    else if (l->kind == BENCH_LOG_NORMAL) { /* exp(mu + sigma z) has the mean exp(mu + sigma^2 / 2) */
        double z = sqrt(-2 * log(u)) * cos(2 * M_PI * v);
        x = rint(exp(log(l->mean) - l->sigma * l->sigma / 2 + l->sigma * z));
    }
    return x < l->low ? l->low : x > l->high ? l->high : (uint32_t)x;
}

/* ---- requests ---- */

static void cut(struct bench_request *q, uint32_t max_tokens)
{
    if (max_tokens == 0 || (uint64_t)q->prompt_tokens + q->output_tokens <= max_tokens)
        return;
    if (q->prompt_tokens >= max_tokens)
        q->prompt_tokens = max_tokens - 1;
    if (q->output_tokens > max_tokens - q->prompt_tokens)
        q->output_tokens = max_tokens - q->prompt_tokens;
}

enum status_code bench_requests(struct bench_request **out, uint32_t *n, const struct bench_load *load,
                                struct status *st)
{
    uint32_t count = load->requests;
    if (load->mode == BENCH_TRACE && (count == 0 || count > load->trace->n))
        count = (uint32_t)load->trace->n;
    struct bench_request *all = calloc(count ? count : 1, sizeof *all);
    if (!all)
        return status_nomem(st, "requests", count * sizeof *all);
    double at = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct bench_request *q = &all[i];
        *q = (struct bench_request){.sent_s = -1, .first_s = -1, .end_s = -1};
        if (load->mode == BENCH_TRACE) {
            const struct trace_entry *e = &load->trace->entry[i];
            q->due_s = (e->arrival_s - load->trace->entry[0].arrival_s) / load->speed;
            q->prompt_tokens = e->prompt_tokens;
            q->output_tokens = e->output_tokens;
        } else {
            if (load->mode == BENCH_RATE && i > 0)
                at -= log(uniform(load->seed, i, 2)) / load->rate;
            q->due_s = at;
            q->prompt_tokens = draw_length(&load->prompt, uniform(load->seed, i, 0), uniform(~load->seed, i, 0));
            q->output_tokens = draw_length(&load->output, uniform(load->seed, i, 1), uniform(~load->seed, i, 1));
        }
        cut(q, load->max_tokens);
    }
    *out = all;
    *n = count;
    return ST_OK;
}
