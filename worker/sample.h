/* sample.h - from logits to a token: pure functions of logits, parameters, seed and position. Prefix sample_.
 *
 *   greedy      the largest logit; of equal ones the lowest id
 *   otherwise   1. logits / temperature
 *               2. top_k: the k best stay (order: larger logit first, then lower id; 0 or >= V: all)
 *               3. top_p: of those, the shortest run from the best on whose probability reaches p (1 or 0: all)
 *               4. one draw u in [0, 1) from Philox4x32-10 with key = seed, counter = position of the sampled token;
 *                  the token is the first, by id, at which the cumulated probability of what stayed exceeds u
 *
 * The result depends on nothing else: not on the batch, the rank, the number of threads or the tokens before. All
 * arithmetic here is plain double without library functions that vary by CPU, so ranks that hold equal logits draw the
 * same token on different machines, too.
 */
#ifndef TANDEM_SAMPLE_H
#define TANDEM_SAMPLE_H

#include <stdint.h>

#include "proto/status.h"

struct sample_params {
    float temperature; /* 0: greedy, the rest is not looked at */
    uint32_t top_k;    /* 0: off */
    float top_p;       /* 0 or 1: off */
    uint64_t seed;
};

/* INVALID_ARGUMENT names the field. */
STATUS_MUST_CHECK enum status_code sample_check(const struct sample_params *p, struct status *st);

/* Philox4x32-10 (Salmon et al., 2011). */
void sample_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);
/* 53 bits, in [0, 1). */
double sample_uniform(uint64_t seed, uint64_t position);

/* What ranks exchange for a greedy row: the best of a share of the vocabulary. */
struct sample_best {
    float logit; /* NaN when the share has one: then id is the first of them */
    uint32_t id;
};

/* first_id: what logits[0] belongs to. n 0: {-inf, UINT32_MAX}. */
struct sample_best sample_argmax(const float *logits, uint32_t n, uint32_t first_id);
/* The better of both, NaN before all. Neither order nor grouping of several merges matters. */
struct sample_best sample_merge(struct sample_best a, struct sample_best b);
/* INTERNAL when the best logit is no finite number; row is for the message. */
STATUS_MUST_CHECK enum status_code sample_best_token(uint32_t *token, struct sample_best best, uint32_t row,
                                                     struct status *st);

struct sampler;
/* Work memory for one row of vocab logits. */
STATUS_MUST_CHECK enum status_code sampler_create(struct sampler **out, uint32_t vocab, struct status *st);
void sampler_destroy(struct sampler *s); /* NULL is fine */

/* logits: all `vocab`, not changed. INTERNAL when one is NaN or the best is infinite. Linear time, no sort. */
STATUS_MUST_CHECK enum status_code sampler_draw(struct sampler *s, uint32_t *token, const float *logits,
                                                const struct sample_params *p, uint64_t position, uint32_t row,
                                                struct status *st);

#endif
