/* check_cost.c - the cost model against steps whose true cost is known, with noise and outliers. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "coordinator/cost.h"

static uint64_t state;

static double unit(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 33) / 2147483648.0;
}

static struct cost_step draw_step(void)
{
    struct cost_step s = {0};
    bool hybrid = unit() < 0.7;
    if (hybrid || unit() < 0.5) {
        s.decodes = 1 + (uint32_t)(unit() * 200);
        s.context = (uint64_t)(s.decodes * (500 + unit() * 15000));
    }
    if (hybrid || !s.decodes) {
        s.rows = 128 + (uint32_t)(unit() * 2000);
        s.pairs = cost_pairs((uint32_t)(unit() * 16000), s.rows);
    }
    return s;
}

static double truth_us(const struct cost_coef *c, const struct cost_step *s)
{
    double pair_us = s->decodes && s->rows ? c->pair_us / 2 : c->pair_us; /* hidden under decodes, in part */
    return c->fixed_us + c->decode_us * s->decodes + c->kv_us * (double)s->context + c->row_us * s->rows +
           pair_us * (double)s->pairs;
}

START_TEST(fit_finds_the_truth_behind_noise_and_outliers)
{
    state = (uint64_t)_i + 1;
    struct cost_model m;
    struct cost_coef c = {3000 + 3000 * unit(), 2 + 8 * unit(), 0.02 + 0.03 * unit(), 10 + 30 * unit(),
                          0.0005 + 0.001 * unit()};
    cost_init(&m, &cost_default);
    ck_assert(!cost_known(&m));
    double sum = 0, worst = 0;
    for (int i = 0; i < 4000; i++) {
        struct cost_step s = draw_step();
        double truth = truth_us(&c, &s), error = fabs(cost_predict_us(&m, &s) / truth - 1);
        sum += i >= 1000 ? error : 0;
        worst = i >= 1000 && error > worst ? error : worst;
        double noise = 1 + 0.1 * (unit() + unit() + unit() - 1.5);
        cost_observe(&m, &s, truth * noise * (unit() < 0.01 ? 20 : 1));
    }
    ck_assert(cost_known(&m));
    ck_assert_double_lt(sum / 3000, 0.02);
    ck_assert_double_lt(worst, 0.12);
    ck_assert_double_lt(cost_spread(&m), 0.15);
}
END_TEST

START_TEST(rows_within_a_limit_are_the_most_that_keep_it)
{
    state = 9;
    struct cost_model m;
    cost_init(&m, &cost_default);
    for (int i = 0; i < 20000; i++) {
        struct cost_step s = draw_step();
        uint32_t position = (uint32_t)(unit() * 30000), most = (uint32_t)(unit() * 4096);
        double limit_us = cost_predict_us(&m, &s) * (0.9 + unit());
        uint32_t n = cost_rows_within(&m, &s, position, most, limit_us);
        ck_assert_uint_le(n, most);
        struct cost_step with = s;
        with.rows += n;
        with.pairs += cost_pairs(position, n);
        ck_assert(n == 0 || cost_predict_us(&m, &with) <= limit_us * (1 + 1e-9));
        with.rows = s.rows + n + 1;
        with.pairs = s.pairs + cost_pairs(position, n + 1);
        ck_assert(n == most || cost_predict_us(&m, &with) > limit_us * (1 - 1e-9));
    }
}
END_TEST

START_TEST(no_time_makes_it_unsound)
{
    state = 5;
    struct cost_model m;
    cost_init(&m, &cost_default);
    for (int i = 0; i < 20000; i++) {
        struct cost_step s = draw_step();
        static const double odd[] = {0, -1, 1, 1e3, 1e9, 1e30, NAN, INFINITY};
        cost_observe(&m, &s, unit() < 0.5 ? odd[(int)(unit() * 8)] : exp(unit() * 25));
        double us = cost_predict_us(&m, &s);
        ck_assert(isfinite(us) && us >= 0);
    }
    struct cost_profile p = cost_get(&m);
    ck_assert(p.hybrid.row_us >= 0 && p.pure.fixed_us >= 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cost");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_loop_test(core, fit_finds_the_truth_behind_noise_and_outliers, 0, 20);
    tcase_add_test(limits, rows_within_a_limit_are_the_most_that_keep_it);
    tcase_add_test(faults, no_time_makes_it_unsound);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
