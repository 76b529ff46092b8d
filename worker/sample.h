/* sample.h - from logits to a token: pure functions of logits, options, history, seed and position. Prefix sample_.
 *
 *   raw logits (float32) ──▶ log probabilities (sample_score), when they are asked for
 *   1. options of single tokens (sample_adjust): float32, each operation rounded, in this order
 *        a. a token that is not allowed, or banned (a stop id while min_tokens lasts): -infinity
 *        b. logit_bias        x + bias
 *        c. repetition        x > 0 ? x / r : x * r    where the prompt or the output holds the token
 *        d. frequency         x - f * (times that the output holds it)
 *        e. presence          x - p                    where the output holds it
 *      A finite value that would leave the range of float32 in b to e stops at its largest number.
 *   2. temperature 0: the largest x; of equal ones the lowest id. Otherwise, in double:
 *        a. y = (x - largest x) / temperature, weight e^y (0 for y < -700)
 *        b. top_k             the k best stay (order: larger x first, then lower id; 0 or >= V: all)
 *        c. min_p             of those, the ones whose weight is at least min_p: p >= min_p * the largest p (0: all)
 *        d. top_p             of those, the shortest run from the best on whose probability reaches p (1 or 0: all)
 *        e. typical_p         of those, the shortest run whose probability reaches p, in the order of
 *                             |(sum of weight * y) / (sum of weight) - y| rounded to float32, least first, then lower id
 *                             (1 or 0: all). That is |surprisal - entropy|: the logarithm of the sum cancels.
 *        f. one draw u in [0, 1) from Philox4x32-10 with key = seed, counter = position of the sampled token;
 *           the token is the first, by id, at which the cumulated probability of what stayed exceeds u
 *      Probabilities in d to f are shares of what stayed so far.
 *
 * The result depends on nothing else: not on the batch, the rank or the number of threads. All arithmetic here is plain
 * float and double without contraction and without library functions that vary by CPU, so ranks that hold equal logits
 * draw the same token on different machines, too. The order of 1 and of a to d is vLLM's; e comes last, as in Hugging
 * Face's generate.
 */
#ifndef TANDEM_SAMPLE_H
#define TANDEM_SAMPLE_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/status.h"

struct sample_params {
    float temperature; /* 0: greedy, the rest is not looked at */
    uint32_t top_k;    /* 0: off */
    float top_p;       /* 0 or 1: off */
    uint64_t seed;
    float min_p;     /* 0: off */
    float typical_p; /* 0 or 1: off */
};

/* What an implementation may lack. The bits travel in Ready.sample_options. */
enum sample_option {
    SAMPLE_MIN_P = 1,
    SAMPLE_TYPICAL_P = 2,
    SAMPLE_ADJUST = 4, /* part 1 of the definition */
    SAMPLE_SCORE = 8,  /* log probabilities */
    SAMPLE_ALL = 15,
};

/* INVALID_ARGUMENT names the field. */
STATUS_MUST_CHECK enum status_code sample_check(const struct sample_params *p, struct status *st);
/* The best one is taken, whatever seed and position are. */
static inline bool sample_is_greedy(const struct sample_params *p)
{
    return p->temperature == 0.0f || p->top_k == 1;
}

/* Philox4x32-10 (Salmon et al., 2011). */
void sample_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);
/* 53 bits, in [0, 1). */
double sample_uniform(uint64_t seed, uint64_t position);

/* ---- options of single tokens ---- */

/* Which tokens a sequence holds. Zeroed is empty; _fini frees. */
struct sample_history {
    struct sample_seen {
        uint32_t id_plus_1; /* 0: an empty cell */
        uint32_t in_output; /* times; 0: in the prompt only */
    } * cell;               /* open addressing, at most half full */
    uint32_t mask, count;   /* cells - 1, a power of two less 1; cells in use */
};

STATUS_MUST_CHECK enum status_code sample_history_add(struct sample_history *h, uint32_t id, bool output,
                                                      struct status *st);
void sample_history_fini(struct sample_history *h);

struct sample_bias {
    uint32_t id;
    float bias;
};

struct sample_adjust {
    const uint32_t *allowed; /* bit id % 32 of word id / 32; NULL: all are */
    const uint32_t *banned;  /* ids */
    uint32_t n_banned;
    uint32_t n_bias;
    const struct sample_bias *bias;       /* each id once */
    const struct sample_history *history; /* NULL: no penalties */
    float repetition, frequency, presence;
};

/* In place. logits: those of tokens first_id .. first_id + n - 1; shares of a vocabulary may be adjusted apart. */
void sample_adjust(float *logits, uint32_t n, uint32_t first_id, const struct sample_adjust *a);

/* ---- greedy ---- */

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

/* ---- draws ---- */

struct sampler;
/* Work memory for one row of vocab logits. */
STATUS_MUST_CHECK enum status_code sampler_create(struct sampler **out, uint32_t vocab, struct status *st);
void sampler_destroy(struct sampler *s); /* NULL is fine */

/* logits: all `vocab`, adjusted, not changed. INTERNAL when one is NaN or the best is infinite. Linear time, no sort. */
STATUS_MUST_CHECK enum status_code sampler_draw(struct sampler *s, uint32_t *token, const float *logits,
                                                const struct sample_params *p, uint64_t position, uint32_t row,
                                                struct status *st);

/* ---- log probabilities ---- */

#define SAMPLE_MAX_TOP 20

/* Of a row of raw logits: x - largest - ln(sum of e^(x - largest)), the sum in double by ascending id, the result rounded
 * to float32. rank: 1 for the best, in the order of 2b. */
struct sample_scores {
    uint32_t token;
    float logprob;
    uint32_t rank;
    uint32_t n; /* the n best of all, best first */
    uint32_t top[SAMPLE_MAX_TOP];
    float top_logprob[SAMPLE_MAX_TOP];
};

/* n: at most SAMPLE_MAX_TOP and vocab. INTERNAL as in sampler_draw. */
STATUS_MUST_CHECK enum status_code sample_score(struct sample_scores *out, const float *logits, uint32_t vocab,
                                                uint32_t token, uint32_t n, uint32_t row, struct status *st);

#endif
