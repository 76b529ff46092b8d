/* cost.h - how long a step takes, from what is in it: five terms, each linear, fitted while the server runs. Prefix cost_.
 *
 *     t = fixed + decodes * decode + context * kv + rows * row + pairs * pair
 *
 *     decodes   rows of running requests, one each          context   tokens whose KV these rows read
 *     rows      tokens of prefill chunks                    pairs     (query, key) pairs of the chunks' attention:
 *                                                                     position * n + n * (n + 1) / 2 for n tokens
 *
 * Two sets of coefficients: steps with both decodes and chunks have their own, for there attention of the one hides under
 * attention of the other, so that such a step is cheaper than the sum. A set that has seen nothing yet takes the other's.
 *
 * The fit is recursive least squares of relative errors with forgetting, robust (what is off by more than three times the
 * usual counts less: a step that waited for pages, a process that stood still) and bounded (no coefficient under 0; none
 * moves more freely than at the start). The best coefficients that are not under 0 are looked for at every step: to cut
 * the others off at 0 leaves the rest where only the cut ones made them right, and a model that is wrong about decodes
 * admits nobody and never sees that it is.
 *
 * No allocation, no clock, no state outside the struct. Time in microseconds.
 */
#ifndef TANDEM_COST_H
#define TANDEM_COST_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

#define COST_TERMS 5

/* What a step holds. */
struct cost_step {
    uint32_t decodes, rows;
    uint64_t context, pairs;
};

struct cost_coef {
    double fixed_us, decode_us, kv_us, row_us, pair_us;
};

/* Where the fit starts from. known: the coefficients are measured ones, good enough to decide by from the first step on. */
struct cost_profile {
    struct cost_coef pure, hybrid; /* steps of one kind of rows; of both kinds */
    bool known;
};

struct cost_fit {
    double theta[COST_TERMS]; /* of scaled terms */
    /* sums over steps, fading: terms by terms, and terms by times; theta is what fits them best and is not under 0 */
    double info[COST_TERMS][COST_TERMS], target[COST_TERMS];
    double floor[COST_TERMS]; /* added to its diagonal: no coefficient moves more freely than at the start */
    double spread;            /* usual relative error */
    uint64_t seen;
};

struct cost_model {
    struct cost_fit pure, hybrid;
    bool known;
};

/* Guesses for a model of some billion parameters on some GPU: a start, not to decide by. */
extern const struct cost_profile cost_default;

void cost_init(struct cost_model *m, const struct cost_profile *p);
/* Never under 0. */
double cost_predict_us(const struct cost_model *m, const struct cost_step *step);
/* A step took so long. Times of 0 and over an hour are no times and change nothing. */
void cost_observe(struct cost_model *m, const struct cost_step *step, double took_us);
/* Enough was seen, or a measured profile was given. */
bool cost_known(const struct cost_model *m);
/* The usual relative error, of steps with both kinds of rows where any were seen: what to stay below a target by. */
double cost_spread(const struct cost_model *m);
/* The largest n up to max_rows for which the step and a chunk of n tokens behind `position` others take at most limit_us;
 * 0: not even one fits. */
uint32_t cost_rows_within(const struct cost_model *m, const struct cost_step *step, uint32_t position,
                          uint32_t max_rows, double limit_us);
/* What the model has come to, to be kept or printed. */
struct cost_profile cost_get(const struct cost_model *m);

static inline uint64_t cost_pairs(uint32_t position, uint32_t n)
{
    return (uint64_t)position * n + (uint64_t)n * ((uint64_t)n + 1) / 2;
}

#endif
