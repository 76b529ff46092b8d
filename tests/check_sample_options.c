/* check_sample_options.c - every option of worker/sample.h, alone and combined: the frequencies of draws against
 * probabilities that are computed here from the definitions of vLLM and Hugging Face (softmax, logarithms, sorting), and
 * the rest against plain arrays. */
#include <check.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "worker/sample.h"

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

static float uniform(uint64_t *state, float low, float high)
{
    return low + (high - low) * (float)(next_random(state) >> 40) * 0x1p-24f;
}

/* ---- exact probabilities ---- */

enum { VOCAB = 30, TEXT = 12 };

struct options {
    struct sample_params params;
    float repetition, frequency, presence; /* repetition 0: 1 */
    bool allowed, banned, bias;            /* of the lists below */
};

static const float logits[VOCAB] = {0.3f,  1.9f,  -0.7f, 2.2f,  1.1f,  -2.5f, 0.9f, 3.0f,   -1.3f, 2.6f,
                                    -0.1f, 0.55f, 1.45f, -3.1f, 2.05f, 0.0f,  1.7f, -0.45f, 2.4f,  0.8f,
                                    -1.9f, 1.25f, 2.8f,  -0.9f, 0.15f, 1.6f,  2.1f, -2.2f,  0.65f, 1.0f};
static const uint32_t prompt[TEXT] = {7, 2, 2, 13, 19, 22, 4, 4, 4, 28, 5, 11};
static const uint32_t output[TEXT] = {9, 9, 9, 7, 18, 2, 26, 9, 3, 15, 18, 20};
static const uint32_t allowed_ids[] = {1, 2, 3, 5, 7, 9, 12, 14, 17, 18, 20, 22, 25, 26, 29};
static const uint32_t banned_ids[] = {7, 29, 0};
static const struct sample_bias biases[] = {{9, -3.0f}, {5, 4.5f}, {22, 0.75f}, {13, 100.0f}, {26, -100.0f}};

struct entry {
    uint32_t id;
    double x, p, far;
};

static int likelier(const void *a, const void *b)
{
    const struct entry *e = a, *f = b;
    return e->x > f->x ? -1 : e->x < f->x ? 1 : (e->id > f->id) - (e->id < f->id);
}

static int nearer(const void *a, const void *b)
{
    const struct entry *e = a, *f = b;
    return e->far < f->far ? -1 : e->far > f->far ? 1 : (e->id > f->id) - (e->id < f->id);
}

static void normalise(struct entry *e, unsigned n)
{
    double sum = 0;
    for (unsigned i = 0; i < n; i++)
        sum += e[i].p;
    for (unsigned i = 0; i < n; i++)
        e[i].p /= sum;
}

static unsigned cut(struct entry *e, unsigned n, double mass)
{
    double sum = 0;
    unsigned kept = 0;
    while (kept < n && sum < mass)
        sum += e[kept++].p;
    normalise(e, kept);
    return kept;
}

static bool holds(const uint32_t *list, size_t n, uint32_t id)
{
    for (size_t i = 0; i < n; i++)
        if (list[i] == id)
            return true;
    return false;
}

static double exact_logit(const struct options *o, uint32_t id)
{
    double x = logits[id];
    unsigned times = 0;
    for (unsigned i = 0; i < TEXT; i++)
        times += output[i] == id;
    if ((o->allowed && !holds(allowed_ids, sizeof allowed_ids / sizeof *allowed_ids, id)) ||
        (o->banned && holds(banned_ids, sizeof banned_ids / sizeof *banned_ids, id)))
        return -INFINITY;
    for (size_t i = 0; o->bias && i < sizeof biases / sizeof *biases; i++)
        x += biases[i].id == id ? (double)biases[i].bias : 0.0;
    if (o->repetition != 0 && (times || holds(prompt, TEXT, id)))
        x = x > 0 ? x / (double)o->repetition : x * (double)o->repetition;
    return x - (double)o->frequency * times - (times ? (double)o->presence : 0.0);
}

static void exact(const struct options *o, double *p)
{
    struct entry e[VOCAB];
    const struct sample_params *s = &o->params;
    unsigned n = VOCAB;
    double best = -INFINITY, entropy = 0;
    for (uint32_t i = 0; i < VOCAB; i++) {
        e[i] = (struct entry){.id = i, .x = exact_logit(o, i) / (double)s->temperature};
        best = fmax(best, e[i].x);
    }
    for (uint32_t i = 0; i < VOCAB; i++)
        e[i].p = exp(e[i].x - best);
    qsort(e, n, sizeof *e, likelier);
    if (s->top_k && s->top_k < n)
        n = s->top_k;
    normalise(e, n);
    while (s->min_p > 0 && e[n - 1].p < (double)s->min_p * e[0].p)
        n--;
    normalise(e, n);
    if (s->top_p > 0 && s->top_p < 1)
        n = cut(e, n, (double)s->top_p);
    if (s->typical_p > 0 && s->typical_p < 1) {
        for (unsigned i = 0; i < n; i++)
            entropy -= e[i].p > 0 ? e[i].p * log(e[i].p) : 0;
        for (unsigned i = 0; i < n; i++)
            e[i].far = fabs(-log(e[i].p) - entropy);
        qsort(e, n, sizeof *e, nearer);
        n = cut(e, n, (double)s->typical_p);
    }
    memset(p, 0, VOCAB * sizeof *p);
    for (unsigned i = 0; i < n; i++)
        p[e[i].id] = e[i].p;
}

/* ---- draws ---- */

static void add_text(struct sample_history *h)
{
    for (unsigned i = 0; i < TEXT; i++) {
        ck_assert_int_eq(sample_history_add(h, prompt[i], false, NULL), ST_OK);
        ck_assert_int_eq(sample_history_add(h, output[i], true, NULL), ST_OK);
    }
}

static void adjusted(const struct options *o, float *x)
{
    uint32_t bits = 0;
    struct sample_history h = {0};
    add_text(&h);
    for (size_t i = 0; i < sizeof allowed_ids / sizeof *allowed_ids; i++)
        bits |= 1u << allowed_ids[i];
    const struct sample_adjust a = {
        .allowed = o->allowed ? &bits : NULL,
        .banned = banned_ids,
        .n_banned = o->banned ? sizeof banned_ids / sizeof *banned_ids : 0,
        .bias = biases,
        .n_bias = o->bias ? sizeof biases / sizeof *biases : 0,
        .history = &h,
        .repetition = o->repetition != 0 ? o->repetition : 1.0f,
        .frequency = o->frequency,
        .presence = o->presence,
    };
    memcpy(x, logits, sizeof logits);
    sample_adjust(x, VOCAB, 0, &a);
    sample_history_fini(&h);
}

/* chi-square of n draws with 5 sigma; what has no probability is never drawn. Returns how many tokens have one. */
static unsigned check_draws(const struct options *o, unsigned n, const char *what, int number)
{
    struct sampler *s;
    float x[VOCAB];
    double p[VOCAB], chi2 = 0, rare = 0, rare_seen = 0;
    unsigned seen[VOCAB] = {0}, possible = 0;
    int freedom = -1;
    ck_assert_int_eq(sampler_create(&s, VOCAB, NULL), ST_OK);
    adjusted(o, x);
    exact(o, p);
    for (unsigned i = 0; i < n; i++) {
        uint32_t token;
        ck_assert_int_eq(sampler_draw(s, &token, x, &o->params, i, 0, NULL), ST_OK);
        seen[token]++;
    }
    for (int i = 0; i < VOCAB; i++) {
        ck_assert_msg(p[i] > 0 || seen[i] == 0, "%s %d: token %d was drawn %u times and cannot be", what, number, i,
                      seen[i]);
        possible += p[i] > 0;
        if (p[i] * n < 10) {
            rare += p[i] * n;
            rare_seen += seen[i];
            continue;
        }
        chi2 += (seen[i] - p[i] * n) * (seen[i] - p[i] * n) / (p[i] * n);
        freedom++;
    }
    if (rare > 0)
        freedom++;
    if (rare >= 5)
        chi2 += (rare_seen - rare) * (rare_seen - rare) / rare;
    ck_assert_msg(rare_seen <= rare + 5 * sqrt(rare) + 5, "%s %d: %g rare tokens, expected %g", what, number, rare_seen,
                  rare);
    ck_assert_msg(chi2 <= freedom + 5 * sqrt(2.0 * freedom) + 1e-9, "%s %d: chi-square %g with %d degrees of freedom",
                  what, number, chi2, freedom);
    sampler_destroy(s);
    return possible;
}

#ifdef TANDEM_SANITIZED /* ten times slower, and the same code */
enum { DRAWS_ALONE = 5000, DRAWS_COMBINED = 500 };
#else
enum { DRAWS_ALONE = 40000, DRAWS_COMBINED = 5000 };
#endif

static const struct options alone[] = {
    {.params = {.temperature = 1.0f}},
    {.params = {.temperature = 0.4f}},
    {.params = {.temperature = 1.0f, .top_k = 7}},
    {.params = {.temperature = 1.0f, .top_p = 0.6f}},
    {.params = {.temperature = 1.0f, .min_p = 0.25f}},
    {.params = {.temperature = 1.0f, .min_p = 1.0f}},
    {.params = {.temperature = 1.0f, .typical_p = 0.5f}},
    {.params = {.temperature = 0.3f, .typical_p = 0.3f}}, /* leaves the likeliest out */
    {.params = {.temperature = 1.0f}, .repetition = 1.8f},
    {.params = {.temperature = 1.0f}, .repetition = 0.5f},
    {.params = {.temperature = 1.0f}, .frequency = 0.7f},
    {.params = {.temperature = 1.0f}, .frequency = -0.4f},
    {.params = {.temperature = 1.0f}, .presence = 1.5f},
    {.params = {.temperature = 1.0f}, .presence = -2.0f},
    {.params = {.temperature = 1.0f}, .allowed = true},
    {.params = {.temperature = 1.0f}, .banned = true},
    {.params = {.temperature = 1.0f}, .bias = true},
    {.params = {.temperature = 100.0f}, .bias = true}, /* 100 / 100: the bias does not decide alone */
};

START_TEST(each_option_alone_has_its_distribution)
{
    struct options o = alone[_i];
    o.params.seed = 4711 + (uint64_t)_i;
    unsigned possible = check_draws(&o, DRAWS_ALONE, "option", _i);
    ck_assert_uint_gt(possible, 0);
}
END_TEST

START_TEST(combined_options_have_their_distribution)
{
    uint64_t state = 1 + (uint64_t)_i;
    unsigned least = VOCAB, most = 0;
    for (int round = 0; round < 25; round++) {
        struct options o = {.params = {.temperature = uniform(&state, 0.3f, 3.0f), .seed = next_random(&state)}};
        uint64_t on = next_random(&state);
        o.params.top_k = on & 1 ? 1 + (uint32_t)(next_random(&state) % VOCAB) : 0;
        o.params.top_p = on & 2 ? uniform(&state, 0.2f, 1.0f) : 0;
        o.params.min_p = on & 4 ? uniform(&state, 0, 0.3f) : 0;
        o.params.typical_p = on & 8 ? uniform(&state, 0.2f, 1.0f) : 0;
        o.repetition = on & 16 ? uniform(&state, 0.5f, 2.0f) : 0;
        o.frequency = on & 32 ? uniform(&state, -1, 1) : 0;
        o.presence = on & 64 ? uniform(&state, -2, 2) : 0;
        o.allowed = on & 128;
        o.banned = on & 256;
        o.bias = on & 512 && o.params.temperature > 1; /* +100 leaves nothing to choose */
        unsigned possible = check_draws(&o, DRAWS_COMBINED, "round", round);
        least = possible < least ? possible : least;
        most = possible > most ? possible : most;
    }
    ck_assert_uint_lt(least, 6);
    ck_assert_uint_gt(most, 10);
}
END_TEST

START_TEST(greedy_takes_the_best_of_adjusted_logits)
{
    for (unsigned on = 0; on < 64; on++) {
        struct options o = {.allowed = on & 1, .banned = on & 2, .bias = on & 4};
        o.repetition = on & 8 ? 1.5f : 0;
        o.frequency = on & 16 ? 0.9f : 0;
        o.presence = on & 32 ? 0.8f : 0;
        float x[VOCAB];
        uint32_t best = 0;
        adjusted(&o, x);
        for (uint32_t i = 1; i < VOCAB; i++)
            if (exact_logit(&o, i) > exact_logit(&o, best))
                best = i;
        ck_assert_uint_eq(sample_argmax(x, VOCAB, 0).id, best);
    }
}
END_TEST

/* ---- adjustment and history against plain arrays ---- */

START_TEST(shares_are_adjusted_as_the_whole)
{
    enum { N = 5000, WORDS = (N + 31) / 32 };
    uint64_t state = 9;
    static float whole[N], shares[N];
    static uint32_t times[N], words[WORDS];
    static bool in_prompt[N];
    struct sample_history h = {0};
    for (int i = 0; i < 3000; i++) {
        uint32_t id = (uint32_t)(next_random(&state) % (i % 2 ? N : 40)); /* a few often, the others now and then */
        bool out = next_random(&state) % 2;
        ck_assert_int_eq(sample_history_add(&h, id, out, NULL), ST_OK);
        times[id] += out;
        in_prompt[id] |= !out;
    }
    for (int i = 0; i < WORDS; i++)
        words[i] = (uint32_t)next_random(&state);
    const struct sample_bias bias[] = {{0, 1.5f}, {N - 1, -2.0f}, {2500, 3.0f}};
    const uint32_t banned[] = {3, N - 2, 1666};
    const struct sample_adjust a = {.allowed = words,
                                    .banned = banned,
                                    .n_banned = 3,
                                    .bias = bias,
                                    .n_bias = 3,
                                    .history = &h,
                                    .repetition = 1.3f,
                                    .frequency = 0.4f,
                                    .presence = -0.3f};
    for (int i = 0; i < N; i++) {
        float x = uniform(&state, -5, 5), y = x;
        whole[i] = shares[i] = x;
        if (!(words[i / 32] >> i % 32 & 1) || i == 3 || i == N - 2 || i == 1666)
            y = -INFINITY;
        for (int k = 0; k < 3; k++)
            y += bias[k].id == (uint32_t)i ? bias[k].bias : 0.0f;
        if (times[i] || in_prompt[i])
            y = y > 0 ? y / 1.3f : y * 1.3f;
        float off = 0.4f * (float)times[i];
        y -= off;
        y -= times[i] ? -0.3f : 0.0f;
        sample_adjust(&x, 1, (uint32_t)i, &a);
        ck_assert_msg(x == y, "token %d: %g, expected %g", i, (double)x, (double)y);
    }
    sample_adjust(whole, N, 0, &a);
    for (uint32_t first = 0; first < N;) {
        uint32_t n = 1 + (uint32_t)(next_random(&state) % 700);
        n = n < N - first ? n : N - first;
        sample_adjust(shares + first, n, first, &a);
        first += n;
    }
    ck_assert_mem_eq(whole, shares, sizeof whole);
    sample_history_fini(&h);
    sample_history_fini(&h);
}
END_TEST

START_TEST(no_option_makes_an_infinity_of_a_number)
{
    struct sample_history h = {0};
    for (uint32_t id = 0; id < 4; id++)
        ck_assert_int_eq(sample_history_add(&h, id, true, NULL), ST_OK);
    const struct sample_bias bias[] = {{4, FLT_MAX}, {5, -FLT_MAX}};
    const struct sample_adjust a = {
        .bias = bias, .n_bias = 2, .history = &h, .repetition = 1e-30f, .frequency = FLT_MAX, .presence = FLT_MAX};
    float x[] = {1e20f, -1e20f, 0.0f, -INFINITY, FLT_MAX, -FLT_MAX};
    sample_adjust(x, 6, 0, &a);
    for (int i = 0; i < 6; i++)
        ck_assert_msg(isfinite(x[i]) || i == 3, "%d: %g", i, (double)x[i]);
    ck_assert_float_eq(x[3], -INFINITY);
    ck_assert_float_eq(x[4], FLT_MAX);
    ck_assert_float_eq(x[5], -FLT_MAX);
    sample_history_fini(&h);
}
END_TEST

/* ---- log probabilities ---- */

START_TEST(scores_are_the_log_softmax)
{
    uint64_t state = 21 + (uint64_t)_i;
    static const uint32_t vocabs[] = {1, 2, 20, 21, 500, 4000};
    for (size_t v = 0; v < sizeof vocabs / sizeof *vocabs; v++) {
        uint32_t vocab = vocabs[v];
        float *x = calloc(vocab, sizeof *x);
        for (int round = 0; round < 20; round++) {
            long double sum = 0;
            for (uint32_t i = 0; i < vocab; i++) {
                x[i] = _i == 0   ? uniform(&state, -8, 8)
                       : _i == 1 ? (float)(next_random(&state) % 7)
                       : _i == 2 ? uniform(&state, -3000, 3000)
                                 : 1000.0f + uniform(&state, 0, 1e-3f);
                sum += expl((long double)x[i]); /* up to e^3000: within a long double */
            }
            uint32_t token = (uint32_t)(next_random(&state) % vocab), n = (uint32_t)(next_random(&state) % 21),
                     rank = 1;
            n = n < vocab ? n : vocab;
            struct sample_scores s;
            ck_assert_int_eq(sample_score(&s, x, vocab, token, n, 0, NULL), ST_OK);
            for (uint32_t i = 0; i < vocab; i++)
                rank += x[i] > x[token] || (x[i] == x[token] && i < token);
            double expected = (double)((long double)x[token] - logl(sum));
            ck_assert_msg(fabs((double)s.logprob - expected) <= 1e-6 + 1e-7 * fabs(expected), "%.9g, expected %.9g",
                          (double)s.logprob, expected);
            ck_assert_uint_eq(s.token, token);
            ck_assert_uint_eq(s.rank, rank);
            ck_assert_uint_eq(s.n, n);
            for (uint32_t k = 0; k < n; k++) {
                uint32_t better = 0;
                for (uint32_t i = 0; i < vocab; i++)
                    better += x[i] > x[s.top[k]] || (x[i] == x[s.top[k]] && i < s.top[k]);
                ck_assert_uint_eq(better, k);
                expected = (double)((long double)x[s.top[k]] - logl(sum));
                ck_assert(fabs((double)s.top_logprob[k] - expected) <= 1e-6 + 1e-7 * fabs(expected));
            }
        }
        free(x);
    }
}
END_TEST

START_TEST(scores_of_logits_that_are_no_numbers_name_the_row)
{
    struct status st = STATUS_INIT;
    struct sample_scores s;
    float x[] = {1.0f, NAN, 2.0f}, none[] = {-INFINITY, -INFINITY}, one[] = {-INFINITY, 5.0f};
    ck_assert_int_eq(sample_score(&s, x, 3, 0, 1, 17, &st), ST_INTERNAL);
    ck_assert_ptr_nonnull(strstr(st.message, "row 17"));
    ck_assert_int_eq(sample_score(&s, none, 2, 0, 1, 18, &st), ST_INTERNAL);
    ck_assert_ptr_nonnull(strstr(st.message, "row 18"));
    ck_assert_int_eq(sample_score(&s, one, 2, 0, 2, 19, &st), ST_OK);
    ck_assert_float_eq(s.logprob, -INFINITY);
    ck_assert_uint_eq(s.rank, 2);
    ck_assert_uint_eq(s.top[0], 1);
    ck_assert_float_eq(s.top_logprob[0], 0.0f);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sample_options");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_loop_test(core, each_option_alone_has_its_distribution, 0, sizeof alone / sizeof *alone);
    tcase_add_loop_test(core, combined_options_have_their_distribution, 0, 4);
    tcase_add_test(core, greedy_takes_the_best_of_adjusted_logits);
    tcase_add_test(core, shares_are_adjusted_as_the_whole);
    tcase_add_loop_test(core, scores_are_the_log_softmax, 0, 4);
    tcase_add_test(limits, no_option_makes_an_infinity_of_a_number);
    tcase_add_test(faults, scores_of_logits_that_are_no_numbers_name_the_row);
    tcase_set_timeout(core, 60);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
