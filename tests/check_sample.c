/* check_sample.c - worker/sample.h: the generator against published vectors, the choice against a plain sort. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "worker/sample.h"

/* A generator of the test's own. */
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

static struct sampler *make(uint32_t vocab)
{
    struct sampler *s;
    ck_assert_int_eq(sampler_create(&s, vocab, NULL), ST_OK);
    return s;
}

/* ---- random numbers ---- */

START_TEST(philox_gives_the_published_vectors)
{
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        /* philox 4x32-10 of Random123's kat_vectors */
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint32_t out[4];
        sample_philox(out, known[i].counter, known[i].key);
        ck_assert_mem_eq(out, known[i].out, sizeof out);
    }
}
END_TEST

START_TEST(uniform_numbers_are_even_and_depend_on_seed_and_position)
{
    enum { BINS = 64, N = 64000 };
    unsigned bin[BINS] = {0};
    for (uint64_t i = 0; i < N; i++) {
        double u = sample_uniform(12345, i);
        ck_assert(u >= 0.0 && u < 1.0);
        bin[(int)(u * BINS)]++;
    }
    const double each = (double)N / BINS;
    double chi2 = 0;
    for (int i = 0; i < BINS; i++)
        chi2 += (bin[i] - each) * (bin[i] - each) / each;
    ck_assert_double_lt(chi2, 63 + 5 * sqrt(2 * 63)); /* 63 degrees of freedom, 5 sigma */
    ck_assert_double_eq(sample_uniform(7, 9), sample_uniform(7, 9));
    ck_assert_double_ne(sample_uniform(7, 9), sample_uniform(9, 7));
    ck_assert_double_ne(sample_uniform(7, 9), sample_uniform(7 + (1ull << 32), 9));
    ck_assert_double_ne(sample_uniform(7, 9), sample_uniform(7, 9 + (1ull << 32)));
}
END_TEST

/* ---- greedy ---- */

START_TEST(greedy_takes_the_largest_and_of_equals_the_lowest)
{
    uint64_t state = 5;
    for (uint32_t n = 1; n < 100; n++)
        for (int round = 0; round < 20; round++) {
            float logits[100];
            uint32_t expected = 0;
            for (uint32_t i = 0; i < n; i++) {
                logits[i] = (float)(int)(next_random(&state) % 9) - 4.0f; /* many ties, 0 and -0 among them */
                if (logits[i] == 0.0f && next_random(&state) % 2)
                    logits[i] = -0.0f;
                if (logits[i] > logits[expected])
                    expected = i;
            }
            struct sample_best best = sample_argmax(logits, n, 1000);
            ck_assert_uint_eq(best.id, 1000 + expected);
            ck_assert_float_eq(best.logit, logits[expected]);
        }
}
END_TEST

START_TEST(greedy_over_shares_is_greedy_over_all)
{
    uint64_t state = 6;
    for (int round = 0; round < 2000; round++) {
        float logits[64];
        for (int i = 0; i < 64; i++)
            logits[i] = (float)(next_random(&state) % 20);
        if (round % 3 == 0)
            logits[next_random(&state) % 64] = NAN;
        struct sample_best all = sample_argmax(logits, 64, 0), merged = {-INFINITY, UINT32_MAX};
        uint32_t cut1 = (uint32_t)(next_random(&state) % 65), cut2 = (uint32_t)(next_random(&state) % 65);
        uint32_t a = cut1 < cut2 ? cut1 : cut2, b = cut1 < cut2 ? cut2 : cut1;
        merged = sample_merge(sample_argmax(logits + b, 64 - b, b), merged);
        merged = sample_merge(merged, sample_argmax(logits, a, 0));
        merged = sample_merge(sample_argmax(logits + a, b - a, a), merged);
        ck_assert_uint_eq(merged.id, all.id);
        ck_assert_int_eq(isnan(merged.logit), isnan(all.logit));
    }
}
END_TEST

/* ---- the choice against a plain sort ---- */

struct candidate {
    float logit;
    uint32_t id;
    double p;
    float deviation;
};

static int typical_first(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->deviation != y->deviation)
        return x->deviation < y->deviation ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int best_first(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static int by_id(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    return x->id < y->id ? -1 : 1;
}

/* As the header describes it, without any thought of speed. */
static uint32_t plain_draw(const float *logits, uint32_t vocab, const struct sample_params *p, uint64_t position,
                           uint32_t *kept)
{
    struct candidate *c = calloc(vocab, sizeof *c);
    for (uint32_t i = 0; i < vocab; i++)
        c[i] = (struct candidate){.logit = logits[i], .id = i};
    qsort(c, vocab, sizeof *c, best_first);
    uint32_t n = p->top_k && p->top_k < vocab ? p->top_k : vocab;
    double total = 0;
    for (uint32_t i = 0; i < n; i++)
        total += c[i].p = exp(((double)c[i].logit - (double)c[0].logit) / (double)p->temperature);
    if (p->min_p > 0) {
        uint32_t i = 0;
        for (total = 0; i < n && c[i].p >= (double)p->min_p; i++)
            total += c[i].p;
        n = i;
    }
    if (p->top_p > 0 && p->top_p < 1) {
        double sum = 0;
        uint32_t i = 0;
        while (i < n && sum < (double)p->top_p * total)
            sum += c[i++].p;
        n = i;
        total = sum;
    }
    if (p->typical_p > 0 && p->typical_p < 1) {
        double mean = 0, best = c[0].logit, sum = 0;
        qsort(c, n, sizeof *c, by_id);
        total = 0;
        for (uint32_t i = 0; i < n; i++) {
            total += c[i].p;
            mean += c[i].p > 0 ? c[i].p * (((double)c[i].logit - best) / (double)p->temperature) : 0;
        }
        for (uint32_t i = 0; i < n; i++)
            c[i].deviation = (float)fabs(mean / total - ((double)c[i].logit - best) / (double)p->temperature);
        qsort(c, n, sizeof *c, typical_first);
        uint32_t i = 0;
        while (i < n && sum < (double)p->typical_p * total)
            sum += c[i++].p;
        n = i;
        total = sum;
    }
    *kept = n;
    qsort(c, n, sizeof *c, by_id);
    double u = sample_uniform(p->seed, position) * total, sum = 0;
    uint32_t token = c[n - 1].id;
    for (uint32_t i = 0; i < n; i++) {
        sum += c[i].p;
        if (sum > u) {
            token = c[i].id;
            break;
        }
    }
    free(c);
    return token;
}

static void fill(float *logits, uint32_t vocab, int kind, uint64_t *state)
{
    for (uint32_t i = 0; i < vocab; i++)
        switch (kind) {
        case 0: /* as of a model */
            logits[i] = uniform(state, -4, 4) + uniform(state, -4, 4) + uniform(state, -4, 4);
            break;
        case 1: /* few values: ties at every cut */
            logits[i] = (float)(next_random(state) % 5) - 2.0f;
            break;
        case 2: /* masked tokens */
            logits[i] = next_random(state) % 4 ? -INFINITY : uniform(state, -3, 3);
            break;
        case 3: /* a wide range: most probabilities are 0 */
            logits[i] = uniform(state, -1e4f, 1e4f);
            break;
        case 4: /* values next to each other */
            logits[i] = nextafterf(1.0f, (float)(next_random(state) % 3));
            break;
        default: /* all equal */
            logits[i] = -0.0f;
        }
    logits[next_random(state) % vocab] = 4.0f; /* at least one is finite */
}

START_TEST(draw_equals_a_plain_sort)
{
    uint64_t state = 77 + (uint64_t)_i;
    static const uint32_t vocabs[] = {1, 2, 3, 17, 100, 512, 3000};
    static const float temperatures[] = {0.1f, 0.7f, 1.0f, 1.7f, 10.0f};
    uint32_t less = 0, rounds = 0;
    for (size_t v = 0; v < sizeof vocabs / sizeof *vocabs; v++) {
        uint32_t vocab = vocabs[v];
        struct sampler *s = make(vocab);
        float *logits = calloc(vocab, sizeof *logits);
        for (int round = 0; round < 150; round++, rounds++) {
            fill(logits, vocab, _i, &state);
            struct sample_params p = {
                .temperature = temperatures[next_random(&state) % 5],
                .top_k = next_random(&state) % 2 ? (uint32_t)(next_random(&state) % (vocab + 2)) : 0,
                .top_p = next_random(&state) % 2 ? uniform(&state, 0, 1) : 1.0f,
                .min_p = next_random(&state) % 4 ? 0.0f : uniform(&state, 0, 0.5f),
                .typical_p = next_random(&state) % 4 ? 0.0f : uniform(&state, 0, 1),
                .seed = next_random(&state),
            };
            uint64_t position = next_random(&state) % 100000;
            uint32_t token, kept, expected = plain_draw(logits, vocab, &p, position, &kept);
            ck_assert_int_eq(sampler_draw(s, &token, logits, &p, position, 0, NULL), ST_OK);
            ck_assert_msg(token == expected,
                          "logits %d vocab %u round %d: %u, expected %u (t %g k %u p %g min %g typical %g)", _i, vocab,
                          round, token, expected, (double)p.temperature, p.top_k, (double)p.top_p, (double)p.min_p,
                          (double)p.typical_p);
            less += kept < vocab;
        }
        free(logits);
        sampler_destroy(s);
    }
    ck_assert_uint_gt(less, rounds / 3); /* the cuts did cut */
}
END_TEST

START_TEST(draw_equals_a_plain_sort_on_a_large_vocabulary)
{
    enum { VOCAB = 128256 };
    uint64_t state = 99;
    struct sampler *s = make(VOCAB);
    float *logits = calloc(VOCAB, sizeof *logits);
    static const struct sample_params params[] = {
        {.temperature = 0.8f, .top_p = 0.95f, .seed = 1},
        {.temperature = 1.0f, .top_k = 50, .seed = 2},
        {.temperature = 1.3f, .top_k = 40, .top_p = 0.9f, .seed = 3},
        {.temperature = 1.0f, .seed = 4},
        {.temperature = 2.0f, .top_k = 100000, .top_p = 0.999f, .seed = 5},
        {.temperature = 1.1f, .min_p = 0.02f, .typical_p = 0.7f, .seed = 6},
    };
    for (size_t i = 0; i < sizeof params / sizeof *params; i++) {
        fill(logits, VOCAB, 0, &state);
        uint32_t token, kept, expected = plain_draw(logits, VOCAB, &params[i], i, &kept);
        ck_assert_int_eq(sampler_draw(s, &token, logits, &params[i], i, 0, NULL), ST_OK);
        ck_assert_uint_eq(token, expected);
    }
    free(logits);
    sampler_destroy(s);
}
END_TEST

START_TEST(draws_are_distributed_as_the_logits_say)
{
    enum { VOCAB = 40, N = 40000 };
    uint64_t state = 31;
    float logits[VOCAB];
    fill(logits, VOCAB, 0, &state);
    struct sampler *s = make(VOCAB);
    const struct sample_params p = {.temperature = 1.5f, .seed = 8};
    unsigned seen[VOCAB] = {0};
    for (uint64_t i = 0; i < N; i++) {
        uint32_t token;
        ck_assert_int_eq(sampler_draw(s, &token, logits, &p, i, 0, NULL), ST_OK);
        seen[token]++;
    }
    double total = 0, chi2 = 0, rare_expected = 0, rare_seen = 0;
    for (int i = 0; i < VOCAB; i++)
        total += exp((double)logits[i] / 1.5);
    int freedom = 0;
    for (int i = 0; i < VOCAB; i++) {
        double expected = N * exp((double)logits[i] / 1.5) / total;
        if (expected < 10) { /* too few for the statistic: taken together */
            rare_expected += expected;
            rare_seen += seen[i];
            continue;
        }
        chi2 += (seen[i] - expected) * (seen[i] - expected) / expected;
        freedom++;
    }
    ck_assert_int_gt(freedom, 10);
    ck_assert_double_lt(chi2, freedom + 5 * sqrt(2.0 * freedom));
    ck_assert_double_lt(fabs(rare_seen - rare_expected), 5 * sqrt(rare_expected) + 5);
    sampler_destroy(s);
}
END_TEST

START_TEST(draw_depends_on_nothing_drawn_before)
{
    enum { VOCAB = 300, N = 50 };
    uint64_t state = 3;
    static float logits[N][VOCAB];
    uint32_t forward[N], token;
    struct sample_params p[N];
    struct sampler *s = make(VOCAB);
    for (int i = 0; i < N; i++) {
        fill(logits[i], VOCAB, i % 5, &state);
        p[i] = (struct sample_params){.temperature = 0.9f,
                                      .top_k = (uint32_t)(i % 3) * 20,
                                      .top_p = i % 2 ? 0.9f : 1.0f,
                                      .typical_p = i % 5 ? 0.0f : 0.8f,
                                      .seed = (uint64_t)i};
        ck_assert_int_eq(sampler_draw(s, &forward[i], logits[i], &p[i], 10, 0, NULL), ST_OK);
    }
    for (int i = N; i-- > 0;) {
        ck_assert_int_eq(sampler_draw(s, &token, logits[i], &p[i], 10, (uint32_t)i, NULL), ST_OK);
        ck_assert_uint_eq(token, forward[i]);
    }
    sampler_destroy(s);
}
END_TEST

/* ---- limits ---- */

START_TEST(extreme_parameters_are_well_defined)
{
    float logits[] = {1.0f, 3.0f, 3.0f, -2.0f};
    struct sampler *s = make(4);
    uint32_t token;
    const struct sample_params best_only[] = {
        {.temperature = 1.0f, .top_k = 1},
        {.temperature = 1.0f, .top_p = 1e-30f, .seed = 5},
        {.temperature = 0.0f, .seed = 9},
        {.temperature = 5.0f, .top_k = 1, .top_p = 0.5f},
    };
    for (size_t i = 0; i < sizeof best_only / sizeof *best_only; i++)
        for (uint64_t position = 0; position < 50; position++) {
            ck_assert_int_eq(sampler_draw(s, &token, logits, &best_only[i], position, 0, NULL), ST_OK);
            ck_assert_uint_eq(token, 1);
        }
    /* the least temperature there is leaves the best ones, evenly; the largest makes all alike */
    unsigned seen[4] = {0};
    for (uint64_t position = 0; position < 400; position++) {
        ck_assert_int_eq(
            sampler_draw(s, &token, logits, &(struct sample_params){.temperature = 1e-45f}, position, 0, NULL), ST_OK);
        seen[token]++;
    }
    ck_assert_uint_eq(seen[0] + seen[3], 0);
    ck_assert_uint_gt(seen[1], 100);
    ck_assert_uint_gt(seen[2], 100);
    for (uint64_t position = 0; position < 400; position++) {
        ck_assert_int_eq(
            sampler_draw(s, &token, logits, &(struct sample_params){.temperature = 3e38f}, position, 0, NULL), ST_OK);
        seen[token]++;
    }
    ck_assert_uint_gt(seen[0], 50);
    ck_assert_uint_gt(seen[3], 50);
    sampler_destroy(s);
}
END_TEST

START_TEST(parameters_are_checked)
{
    struct status st = STATUS_INIT;
    const struct {
        struct sample_params p;
        const char *field; /* NULL: fine */
    } cases[] = {
        {{.temperature = 0}, NULL},
        {{.temperature = 1}, NULL},
        {{.temperature = 1, .top_k = UINT32_MAX, .top_p = 1, .seed = UINT64_MAX, .min_p = 1, .typical_p = 1}, NULL},
        {{.top_p = NAN, .min_p = NAN, .typical_p = 7}, NULL}, /* greedy looks at nothing else */
        {{.temperature = -1}, "temperature"},
        {{.temperature = NAN}, "temperature"},
        {{.temperature = INFINITY}, "temperature"},
        {{.temperature = 1, .top_p = -0.1f}, "top_p"},
        {{.temperature = 1, .top_p = 1.1f}, "top_p"},
        {{.temperature = 1, .top_p = NAN}, "top_p"},
        {{.temperature = 1, .min_p = -0.1f}, "min_p"},
        {{.temperature = 1, .min_p = 1.1f}, "min_p"},
        {{.temperature = 1, .min_p = NAN}, "min_p"},
        {{.temperature = 1, .typical_p = -0.1f}, "typical_p"},
        {{.temperature = 1, .typical_p = 1.1f}, "typical_p"},
        {{.temperature = 1, .typical_p = NAN}, "typical_p"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        enum status_code rc = sample_check(&cases[i].p, &st);
        ck_assert_int_eq(rc, cases[i].field ? ST_INVALID_ARGUMENT : ST_OK);
        if (cases[i].field)
            ck_assert_ptr_nonnull(strstr(st.message, cases[i].field));
    }
}
END_TEST

/* ---- faults ---- */

START_TEST(logits_that_are_no_numbers_name_the_row)
{
    struct status st = STATUS_INIT;
    struct sampler *s = make(50);
    const struct sample_params p = {.temperature = 1.0f, .top_k = 5};
    uint32_t token = 7;
    for (uint32_t at = 0; at < 50; at++) {
        float logits[50] = {0};
        logits[at] = NAN;
        ck_assert_int_eq(sampler_draw(s, &token, logits, &p, 0, 42, &st), ST_INTERNAL);
        ck_assert_ptr_nonnull(strstr(st.message, "row 42"));
        ck_assert_ptr_nonnull(strstr(st.message, "NaN"));
        ck_assert_int_eq(sample_best_token(&token, sample_argmax(logits, 50, 0), 42, &st), ST_INTERNAL);
        logits[at] = INFINITY;
        ck_assert_int_eq(sampler_draw(s, &token, logits, &p, 0, 43, &st), ST_INTERNAL);
        ck_assert_ptr_nonnull(strstr(st.message, "row 43"));
    }
    float none[50];
    for (int i = 0; i < 50; i++)
        none[i] = -INFINITY;
    ck_assert_int_eq(sampler_draw(s, &token, none, &p, 0, 44, &st), ST_INTERNAL);
    ck_assert_ptr_nonnull(strstr(st.message, "row 44"));
    ck_assert_uint_eq(token, 7);
    sampler_destroy(s);
    sampler_destroy(NULL);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sample");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_test(core, philox_gives_the_published_vectors);
    tcase_add_test(core, uniform_numbers_are_even_and_depend_on_seed_and_position);
    tcase_add_test(core, greedy_takes_the_largest_and_of_equals_the_lowest);
    tcase_add_test(core, greedy_over_shares_is_greedy_over_all);
    tcase_add_loop_test(core, draw_equals_a_plain_sort, 0, 6);
    tcase_add_test(core, draw_equals_a_plain_sort_on_a_large_vocabulary);
    tcase_add_test(core, draws_are_distributed_as_the_logits_say);
    tcase_add_test(core, draw_depends_on_nothing_drawn_before);
    tcase_add_test(limits, extreme_parameters_are_well_defined);
    tcase_add_test(limits, parameters_are_checked);
    tcase_add_test(faults, logits_that_are_no_numbers_name_the_row);
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
