/* check_engine_options.c - sampling options in worker/engine.h on the demo model: they act whatever the ranks, chunks and
 * batch are, a replay goes on as if nothing had happened, and plans with wrong ones are refused with the field's name. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/engine_group.h"
#include "worker/engine_internal.h"

#define DEMO TEST_DATA "/demo-model"

enum { N = 8, FRESH = 20, PROMPT = 14, VOCAB = 2048 };

static const uint32_t prompt[PROMPT] = {2046, 415, 33, 415, 90, 7, 1200, 33, 33, 611, 45, 1999, 8, 90};
static uint32_t bias_ids[] = {33, 90, 500, 1500};
static float biases[] = {2.5f, -4.0f, 3.0f, 5.0f};
static uint32_t banned[] = {500, 1500, 33};
static uint32_t allowed[VOCAB / 2]; /* the even ids */

static struct group *make(uint32_t ranks)
{
    struct group *g;
    struct status st = STATUS_INIT;
    const struct engine_config cfg = {.model_dir = DEMO, .threads = 1, .max_slots = N, .max_step_tokens = 64};
    ck_assert_msg(group_create(&g, &cfg, ranks, &st) == ST_OK, "%s", st.message);
    return g;
}

static void run(struct group *g, struct group_request *req, uint32_t n, uint32_t rows, uint32_t concurrent)
{
    struct status st = STATUS_INIT;
    struct group_schedule sched = {.rows_per_step = rows, .concurrent = concurrent};
    group_reset(g);
    ck_assert_msg(group_run(g, req, n, &sched, &st) == ST_OK, "%s", st.message);
}

/* The i-th of N different sets of options. */
static Tandem__V1__SampleParams options(uint32_t i)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    for (uint32_t k = 0; k < VOCAB / 2; k++)
        allowed[k] = 2 * k;
    p.temperature = i % 3 == 0 ? 0.0f : 1.1f;
    p.seed = 77 + i;
    p.output_at = PROMPT;
    if (i % 2)
        p.repetition_penalty = 1.4f;
    if (i & 2)
        p.frequency_penalty = 0.6f;
    if (i & 4)
        p.presence_penalty = 0.8f;
    if (i == 3 || i == 4) {
        p.n_bias_ids = p.n_biases = 4;
        p.bias_ids = bias_ids;
        p.biases = biases;
    }
    if (i == 5 || i == 6) {
        p.n_allowed_ids = VOCAB / 2;
        p.allowed_ids = allowed;
    }
    if (i == 4 || i == 7) {
        p.n_banned_ids = 3;
        p.banned_ids = banned;
        p.min_tokens = 6;
        p.min_p = 0.02f;
        p.typical_p = 0.9f;
    }
    p.logprobs = i % 4 == 1;
    return p;
}

struct batch {
    struct group_request req[N];
    Tandem__V1__SampleParams params[N];
    uint32_t out[N][FRESH];
    struct sample_scores scores[N][FRESH], prompt_scores[N][PROMPT];
};

static struct batch *make_batch(bool late)
{
    struct batch *b = calloc(1, sizeof *b);
    for (uint32_t i = 0; i < N; i++) {
        b->params[i] = options(i);
        b->req[i] = (struct group_request){.prompt = prompt,
                                           .prompt_tokens = PROMPT,
                                           .max_new = FRESH,
                                           .out = b->out[i],
                                           .params = &b->params[i],
                                           .arrival = late ? 2 * (N - i) : 0};
        if (i % 4 == 1) {
            b->req[i].top = i;
            b->req[i].scores = b->scores[i];
            b->req[i].prompt_scores = b->prompt_scores[i];
        }
    }
    return b;
}

START_TEST(options_give_the_same_ids_whatever_the_ranks_chunks_and_batch)
{
    static const struct {
        uint32_t ranks, rows, concurrent;
    } ways[] = {{1, 3, N}, {2, 64, N}, {3, 9, 5}, {4, 17, N}};
    struct group *one = make(1), *g = make(ways[_i].ranks);
    struct batch *alone = make_batch(false), *mixed = make_batch(true);
    run(one, alone->req, N, 64, 1);
    run(g, mixed->req, N, ways[_i].rows, ways[_i].concurrent);
    for (uint32_t i = 0; i < N; i++) {
        ck_assert_msg(memcmp(alone->out[i], mixed->out[i], sizeof alone->out[i]) == 0, "request %u", i);
        for (uint32_t k = 0; i % 4 == 1 && k < FRESH; k++) {
            const struct sample_scores *a = &alone->scores[i][k], *b = &mixed->scores[i][k];
            ck_assert_uint_eq(a->token, alone->out[i][k]);
            ck_assert_uint_eq(b->token, a->token);
            ck_assert_uint_eq(b->n, i);
            ck_assert_float_le(fabsf(a->logprob - b->logprob), 1e-4f);
            ck_assert_float_le(fabsf(a->top_logprob[0] - b->top_logprob[0]), 1e-4f);
        }
        for (uint32_t k = 0; i % 4 == 1 && k + 1 < PROMPT; k++) {
            const struct sample_scores *a = &alone->prompt_scores[i][k], *b = &mixed->prompt_scores[i][k];
            ck_assert_uint_eq(a->token, prompt[k + 1]);
            ck_assert_uint_eq(b->token, a->token);
            ck_assert_float_le(fabsf(a->logprob - b->logprob), 1e-4f);
        }
    }
    for (uint32_t i = 1; i < N; i++)
        ck_assert_mem_ne(alone->out[i], alone->out[0], sizeof alone->out[0]);
    group_destroy(one);
    group_destroy(g);
    free(alone);
    free(mixed);
}
END_TEST

/* What a preemption does: the tokens made so far come as a prompt, with the output where it was. */
START_TEST(replay_goes_on_with_the_same_history)
{
    struct group *g = make(2);
    struct batch *whole = make_batch(false), *again = make_batch(true);
    uint32_t known[N][PROMPT + FRESH];
    run(g, whole->req, N, 64, N);
    for (uint32_t i = 0; i < N; i++) {
        uint32_t made = 1 + 2 * i;
        memcpy(known[i], prompt, sizeof prompt);
        memcpy(known[i] + PROMPT, whole->out[i], made * sizeof *known[i]);
        again->req[i].prompt = known[i];
        again->req[i].prompt_tokens = PROMPT + made;
        again->req[i].max_new = FRESH - made;
        again->req[i].prompt_scores = NULL;
    }
    run(g, again->req, N, 11, 3);
    for (uint32_t i = 0; i < N; i++)
        ck_assert_msg(memcmp(whole->out[i] + 1 + 2 * i, again->out[i], (FRESH - 1 - 2 * i) * sizeof *again->out[i]) ==
                          0,
                      "request %u", i);
    group_destroy(g);
    free(whole);
    free(again);
}
END_TEST

START_TEST(lists_and_minimum_are_obeyed)
{
    struct group *g = make(1);
    uint32_t out[3][FRESH];
    struct group_request req[3];
    Tandem__V1__SampleParams p[3];
    static uint32_t one[] = {1234, 500, 77}, stop[] = {500};
    static float strong[] = {50.0f};
    for (uint32_t i = 0; i < 3; i++) {
        p[i] = options(0);
        req[i] = (struct group_request){
            .prompt = prompt, .prompt_tokens = PROMPT, .max_new = FRESH, .out = out[i], .params = &p[i]};
    }
    p[0].temperature = 5.0f;
    p[0].allowed_ids = one;
    p[0].n_allowed_ids = 3;
    p[1].bias_ids = p[2].bias_ids = stop;
    p[1].biases = p[2].biases = strong;
    p[1].n_bias_ids = p[1].n_biases = p[2].n_bias_ids = p[2].n_biases = 1;
    p[2].banned_ids = stop;
    p[2].n_banned_ids = 1;
    p[2].min_tokens = 7;
    run(g, req, 3, 64, 3);
    unsigned seen[3] = {0};
    for (uint32_t k = 0; k < FRESH; k++) {
        ck_assert(out[0][k] == 1234 || out[0][k] == 500 || out[0][k] == 77);
        seen[out[0][k] == 1234 ? 0 : out[0][k] == 500 ? 1 : 2]++;
        ck_assert_uint_eq(out[1][k], 500);
        ck_assert((out[2][k] == 500) == (k >= 7));
    }
    ck_assert(seen[0] && seen[1] && seen[2]);
    group_destroy(g);
}
END_TEST

START_TEST(wrong_options_are_named)
{
    Tandem__V1__SampleParams good = options(4), p;
    uint32_t ids[] = {1, VOCAB};
    float nan[] = {1, NAN};
    struct status st = STATUS_INIT;
    ck_assert_int_eq(engine_options_check(&good, VOCAB, SAMPLE_ALL, &st), ST_OK);
    ck_assert_int_eq(engine_options_check(NULL, VOCAB, SAMPLE_ALL, &st), ST_OK);
    for (int which = 0; which < 12; which++) {
        static const char *const says[] = {"bias_ids[1]: 2048",
                                           "biases: 3",
                                           "biases[1]",
                                           "allowed_ids[1]: 2048",
                                           "banned_ids[1]: 2048",
                                           "repetition_penalty",
                                           "repetition_penalty",
                                           "presence_penalty",
                                           "frequency_penalty",
                                           "top_logprobs: 21",
                                           "min_p",
                                           "typical_p"};
        p = good;
        p.temperature = 1;
        if (which == 0) {
            p.bias_ids = ids;
            p.n_bias_ids = p.n_biases = 2;
        } else if (which == 1) {
            p.n_biases = 3;
        } else if (which == 2) {
            p.biases = nan;
            p.n_bias_ids = p.n_biases = 2;
        } else if (which == 3) {
            p.allowed_ids = ids;
            p.n_allowed_ids = 2;
        } else if (which == 4) {
            p.banned_ids = ids;
            p.n_banned_ids = 2;
        }
        p.repetition_penalty = which == 5 ? -1.0f : which == 6 ? NAN : 1.0f;
        p.presence_penalty = which == 7 ? INFINITY : 0.0f;
        p.frequency_penalty = which == 8 ? NAN : 0.0f;
        p.top_logprobs = which == 9 ? 21 : 20;
        p.min_p = which == 10 ? 2.0f : 0.0f;
        p.typical_p = which == 11 ? -1.0f : 0.0f;
        ck_assert_int_eq(engine_options_check(&p, VOCAB, SAMPLE_ALL, &st), ST_INVALID_ARGUMENT);
        ck_assert_msg(strstr(st.message, says[which]) != NULL, "%d: %s", which, st.message);
    }
}
END_TEST

START_TEST(what_a_back_end_lacks_is_named)
{
    static const struct {
        uint32_t without;
        float min_p, typical_p, penalty;
        bool logprobs;
        const char *says;
    } cases[] = {
        {SAMPLE_MIN_P, 0.1f, 0, 0, false, "min_p"},
        {SAMPLE_TYPICAL_P, 0, 0.5f, 0, false, "typical_p"},
        {SAMPLE_ADJUST, 0, 1, 0.5f, false, "penalties"},
        {SAMPLE_SCORE, 0, 0, 0, true, "logprobs"},
    };
    struct status st = STATUS_INIT;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
        p.temperature = 1;
        p.top_k = 5;
        p.top_p = 0.5f;
        p.typical_p = 1;
        p.repetition_penalty = 1;
        ck_assert_int_eq(engine_options_check(&p, VOCAB, 0, &st), ST_OK);
        p.min_p = cases[i].min_p;
        p.typical_p = cases[i].typical_p;
        p.presence_penalty = cases[i].penalty;
        p.logprobs = cases[i].logprobs;
        ck_assert_int_eq(engine_options_check(&p, VOCAB, SAMPLE_ALL & ~cases[i].without, &st), ST_UNIMPLEMENTED);
        ck_assert_ptr_nonnull(strstr(st.message, cases[i].says));
        ck_assert_int_eq(engine_options_check(&p, VOCAB, cases[i].without, &st), ST_OK);
    }
}
END_TEST

START_TEST(scored_rows_outside_of_the_chunk_are_refused)
{
    static const struct {
        uint32_t first, rows, next;
        bool sample;
        const char *says; /* NULL: fine */
    } cases[] = {
        {0, PROMPT, 5, false, NULL},
        {0, PROMPT - 1, VOCAB, true, NULL},
        {PROMPT - 1, 1, 5, false, NULL},
        {0, PROMPT, 5, true, "scored rows end at 14, expected at most 13"},
        {1, PROMPT, 5, false, "scored rows end at 15, expected at most 14"},
        {UINT32_MAX, 2, 5, false, "scored rows end at 4294967297"},
        {0, PROMPT, VOCAB, false, "next_token: 2048, expected 0 to 2047"},
    };
    struct group *g = make(1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
        Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT, *admits = &admit;
        Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT, *chunks = &chunk;
        struct engine_result r;
        struct status st = STATUS_INIT;
        plan.step = 1;
        plan.n_admits = plan.n_prefills = 1;
        plan.admits = &admits;
        plan.prefills = &chunks;
        chunk.token_ids = (uint32_t *)prompt;
        chunk.n_token_ids = PROMPT;
        chunk.sample = cases[i].sample;
        chunk.score_first = cases[i].first;
        chunk.score_rows = cases[i].rows;
        chunk.next_token = cases[i].next;
        group_reset(g);
        enum status_code rc = group_step(g, &plan, &r, &st);
        ck_assert_int_eq(rc, cases[i].says ? ST_INVALID_ARGUMENT : ST_OK);
        if (cases[i].says)
            ck_assert_msg(strstr(st.message, cases[i].says) != NULL, "%s", st.message);
        else
            ck_assert_uint_eq(r.n_prompt_scores, cases[i].rows);
    }
    group_destroy(g);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine_options");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_loop_test(core, options_give_the_same_ids_whatever_the_ranks_chunks_and_batch, 0, 4);
    tcase_add_test(core, replay_goes_on_with_the_same_history);
    tcase_add_test(limits, lists_and_minimum_are_obeyed);
    tcase_add_test(faults, wrong_options_are_named);
    tcase_add_test(faults, what_a_back_end_lacks_is_named);
    tcase_add_test(faults, scored_rows_outside_of_the_chunk_are_refused);
    tcase_set_timeout(core, 120);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
