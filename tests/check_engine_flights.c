/* check_engine_flights.c - two steps under way in an engine, without a GPU: the host's forward behind start and finish, which
 * keeps its tokens to itself until finish and knows of a slot's token in flight only what the engine says it may. */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker/engine_internal.h"

#define DEMO       TEST_DATA "/demo-model"
#define NEW_TOKENS 20
#define SLOTS      8
#define HIDDEN     0x7fffffffu /* in the place of a token until finish */

/* ---- a device that is the host; its memory of last tokens ---- */

static struct {
    struct flight {
        uint32_t *to, token[64], n;
    } flight[2];
    uint32_t first, count;
    uint32_t last[SLOTS];
    unsigned fails_at, starts; /* the n-th start; 0: none */
    bool finish_fails;
    double begin_us, end_us; /* of the step that is finished */
    /* a device that keeps options: of so many slots at a time */
    uint32_t tables, kept_rows; /* rows of such slots whose token the host did not know */
    struct kept {
        bool used;
        uint32_t output_at;
        struct sample_adjust adjust;
        struct sample_history history;
    } kept[SLOTS];
} fake;

static enum status_code fake_begin(struct forward *f, uint32_t slot, const struct sample_adjust *a, uint32_t output_at,
                                   bool *kept, struct status *st)
{
    struct kept *k = &fake.kept[slot];
    (void)f, (void)st;
    ck_assert(!k->used);
    *kept = fake.tables > 0;
    if (!*kept)
        return ST_OK;
    fake.tables--;
    *k = (struct kept){.used = true, .output_at = output_at, .adjust = *a};
    k->adjust.history = &k->history;
    return ST_OK;
}

static void fake_end(struct forward *f, uint32_t slot)
{
    struct kept *k = &fake.kept[slot];
    (void)f;
    fake.tables += k->used;
    sample_history_fini(&k->history);
    k->used = false;
}

/* Counts what the batch feeds; samples of slots that are kept know nothing of the engine's history. */
static void keep_options(const struct forward_batch *b, const uint32_t *id, struct forward_sample *sample)
{
    for (uint32_t i = 0; i < b->seqs; i++) {
        struct kept *k = &fake.kept[b->seq[i].slot];
        for (uint32_t r = 0; k->used && r < b->seq[i].rows; r++) {
            uint32_t row = b->seq[i].first_row + r;
            fake.kept_rows += b->token[row] != id[row];
            ck_assert_int_eq(sample_history_add(&k->history, id[row], b->seq[i].position + r >= k->output_at, NULL),
                             ST_OK);
        }
    }
    for (uint32_t i = 0; i < b->samples; i++) {
        sample[i] = b->sample[i];
        if (sample[i].slot == FORWARD_NO_SLOT || !fake.kept[sample[i].slot].used)
            continue;
        struct sample_adjust *a = &fake.kept[sample[i].slot].adjust;
        a->n_banned = sample[i].adjust->n_banned;
        sample[i].adjust = a;
    }
}

static enum status_code fake_start(struct forward *f, const struct forward_batch *b, uint32_t *tokens,
                                   struct status *st)
{
    static struct forward_sample sample[64];
    uint32_t id[64];
    ck_assert_uint_lt(fake.count, 2);
    ck_assert_uint_le(b->rows, 64);
    for (uint32_t i = 0; i < b->rows; i++) {
        id[i] = b->token[i];
        if (id[i] & FORWARD_TOKEN_OF_SLOT)
            id[i] = fake.last[id[i] & ~FORWARD_TOKEN_OF_SLOT];
    }
    if (++fake.starts == fake.fails_at)
        return status_set(st, ST_INTERNAL, "the device is broken");
    struct forward_batch batch = *b;
    struct flight *l = &fake.flight[(fake.first + fake.count++) % 2];
    batch.token = id;
    keep_options(b, id, sample);
    batch.sample = sample;
    *l = (struct flight){.to = tokens, .n = b->samples};
    enum status_code rc = forward_ops_host.run(f, &batch, l->token, st);
    for (uint32_t i = 0; rc == ST_OK && i < b->samples; i++) {
        tokens[i] = HIDDEN;
        if (b->sample[i].slot != FORWARD_NO_SLOT)
            fake.last[b->sample[i].slot] = l->token[i];
    }
    return rc;
}

static enum status_code fake_poll(struct forward *f, bool *done, struct status *st)
{
    (void)f, (void)st;
    *done = false; /* it is done when somebody waits */
    return ST_OK;
}

static enum status_code fake_finish(struct forward *f, struct status *st)
{
    (void)f;
    struct flight *l = &fake.flight[fake.first];
    ck_assert_uint_gt(fake.count, 0);
    if (fake.finish_fails)
        return status_set(st, ST_DEADLINE_EXCEEDED, "rank 1 is silent");
    memcpy(l->to, l->token, l->n * sizeof *l->to);
    fake.first = (fake.first + 1) % 2;
    fake.count--;
    return ST_OK;
}

static void fake_time_of(struct forward *f, double *begin_us, double *end_us)
{
    (void)f;
    *begin_us = fake.begin_us;
    *end_us = fake.end_us;
}

static enum status_code no_store(void *ctx, void **arena, uint64_t bytes, struct status *st)
{
    (void)ctx, (void)st;
    *arena = aligned_alloc(64, (bytes + 63) / 64 * 64);
    return ST_OK;
}

static void free_store(void *ctx, void *arena)
{
    (void)ctx;
    free(arena);
}

static uint8_t stage[WEIGHT_LANES][WEIGHT_STAGE_BYTES];

static enum status_code stage_store(void *ctx, uint32_t lane, void **host, uint64_t bytes, struct status *st)
{
    (void)ctx, (void)bytes, (void)st;
    *host = stage[lane];
    return ST_OK;
}

static enum status_code store(void *ctx, uint32_t lane, void *to, uint64_t bytes, struct status *st)
{
    (void)ctx, (void)st;
    memcpy(to, stage[lane], bytes);
    return ST_OK;
}

static enum status_code finish_store(void *ctx, struct status *st)
{
    (void)ctx, (void)st;
    return ST_OK;
}

static enum status_code no_bytes(uint64_t *out, const struct forward_config *cfg, struct status *st)
{
    (void)cfg, (void)st;
    *out = 0;
    return ST_OK;
}

static enum status_code memory(void *ctx, struct backend_memory *out, struct status *st)
{
    (void)ctx, (void)st;
    *out = (struct backend_memory){.total_bytes = 2048ull << 20, .free_bytes = 2000ull << 20};
    return ST_OK;
}

static uint32_t fake_tables; /* what the next one has */

static struct engine *make(bool flights)
{
    static struct forward_ops ops;
    static struct backend_parts parts;
    static struct comm *comm;
    struct status st = STATUS_INIT;
    struct engine *e;
    ops = forward_ops_host;
    ops.bytes = no_bytes;
    ops.start = fake_start;
    ops.poll = fake_poll;
    ops.finish = fake_finish;
    ops.time_of = fake_time_of;
    if (fake_tables) {
        ops.begin = fake_begin;
        ops.end = fake_end;
    }
    parts = (struct backend_parts){.text = "fake:0",
                                   .kv = &kv_ops_host,
                                   .kv_elem_bytes = 4,
                                   .weights = {NULL, no_store, free_store, stage_store, store, NULL, finish_store},
                                   .forward = &ops,
                                   .memory = memory};
    memset(&fake, 0, sizeof fake);
    fake.tables = fake_tables;
    if (!comm)
        ck_assert_int_eq(comm_create(&comm, &(struct comm_config){.ops = &comm_ops_self}, &st), ST_OK);
    const struct engine_config cfg = {.model_dir = DEMO,
                                      .comm = comm,
                                      .parts = flights ? &parts : NULL,
                                      .threads = 1,
                                      .max_slots = SLOTS,
                                      .max_step_tokens = 64,
                                      .kv_bytes = 32 << 20,
                                      .suspend_bytes = 32 << 20,
                                      .kv_ahead = ENGINE_AHEAD_ON,
                                      .timed = true};
    ck_assert_msg(engine_create(&e, &cfg, &st) == ST_OK, "%s", st.message);
    ck_assert_uint_eq(engine_info(e).depth, flights ? 2 : 1);
    ck_assert_int_eq(engine_reset(e, &st), ST_OK);
    return e;
}

/* ---- a small scheduler: every slot gets a prompt, then decodes; one slot is given to another request on the way ---- */

struct text {
    uint32_t id[2 * SLOTS][NEW_TOKENS];
    uint32_t n[2 * SLOTS];
};

struct script {
    struct engine *e;
    uint64_t step;
    uint32_t owner[SLOTS], planned[SLOTS];     /* whose text; tokens planned */
    uint32_t queue[2][64], n[2], first, count; /* texts of the samples of the steps under way */
    struct text *text;
    Tandem__V1__SampleParams *params; /* of all */
    uint32_t suspended;               /* this slot is, or goes or comes in the next step */
    int move;                         /* 1: it goes, -1: it comes */
};

static void collect(struct script *s)
{
    struct status st = STATUS_INIT;
    struct engine_result r;
    ck_assert_msg(engine_collect(s->e, &r, &st) == ST_OK, "%s", st.message);
    ck_assert_uint_eq(r.step, s->step - s->count + 1);
    ck_assert_uint_eq(r.n_tokens, s->n[s->first]);
    for (uint32_t i = 0; i < r.n_tokens; i++) {
        uint32_t t = s->queue[s->first][i];
        ck_assert_uint_ne(r.tokens[i], HIDDEN);
        s->text->id[t][s->text->n[t]++] = r.tokens[i];
    }
    s->first = (s->first + 1) % 2;
    s->count--;
}

static void submit(struct script *s, Tandem__V1__StepPlan *plan)
{
    struct status st = STATUS_INIT;
    plan->step = ++s->step;
    ck_assert_msg(engine_submit(s->e, plan, &st) == ST_OK, "%s", st.message);
    s->count++;
    if (plan->n_suspend_slots) /* the step in front has ended: it may read the slot */
        ck_assert_uint_eq(fake.count, 1);
    bool done;
    ck_assert_int_eq(engine_poll(s->e, &done, &st), ST_OK);
    if (engine_info(s->e).depth == 1 || s->count == 2)
        collect(s);
}

static void sampled(struct script *s, uint32_t text)
{
    uint32_t at = (s->first + s->count) % 2;
    s->queue[at][s->n[at]++] = text;
}

/* The plan admits `slot` to text number `text`, if there is one, and decodes all slots that have more to say. */
static void step(struct script *s, uint32_t slot, uint32_t text, uint32_t from, uint32_t release)
{
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT, *admits[] = {&admit};
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT, *chunks[] = {&chunk};
    uint32_t ids[12], decodes[SLOTS];
    s->n[(s->first + s->count) % 2] = 0;
    for (uint32_t i = 0; i < SLOTS; i++)
        if (s->owner[i] != UINT32_MAX && i != slot && i != release && i != s->suspended && s->planned[i] < NEW_TOKENS) {
            decodes[plan.n_decode_slots++] = i;
            s->planned[i]++;
            sampled(s, s->owner[i]);
        }
    plan.decode_slots = decodes;
    plan.suspend_slots = plan.resume_slots = &s->suspended;
    plan.n_suspend_slots = s->move > 0;
    plan.n_resume_slots = s->move < 0;
    if (release != UINT32_MAX) {
        plan.release_slots = &release;
        plan.n_release_slots = 1;
        s->owner[release] = UINT32_MAX;
    }
    if (slot != UINT32_MAX) {
        for (uint32_t i = 0; i < 12; i++)
            ids[i] = 5 + (i < 4 ? i * 7 : text * 31 + i * 7);
        admit.slot = chunk.slot = slot;
        admit.sample = s->params;
        admit.from_slot = from;
        admit.from_tokens = from == UINT32_MAX ? 0 : 4; /* the first four are everybody's */
        chunk.token_ids = ids + admit.from_tokens;
        chunk.n_token_ids = 12 - admit.from_tokens;
        chunk.position = admit.from_tokens;
        chunk.sample = true;
        plan.admits = admits;
        plan.prefills = chunks;
        plan.n_admits = plan.n_prefills = 1;
        s->owner[slot] = text;
        s->planned[slot] = 1;
        sampled(s, text);
    }
    submit(s, &plan);
    if (s->move < 0)
        s->suspended = UINT32_MAX;
    s->move = 0;
}

/* With flights, slots also go to host memory and come back, with what they sampled last under way. */
static void write_texts(struct text *text, bool flights, Tandem__V1__SampleParams *params)
{
    struct script s = {.e = make(flights), .text = text, .params = params, .suspended = UINT32_MAX};
    bool history = params && params->presence_penalty != 0; /* such slots begin with nobody */
    memset(text, 0, sizeof *text);
    for (uint32_t i = 0; i < SLOTS; i++)
        s.owner[i] = UINT32_MAX;
    for (uint32_t i = 0; i < SLOTS; i++)
        step(&s, i, i, i % 3 == 2 && !history ? i - 1 : UINT32_MAX, UINT32_MAX);
    for (uint32_t i = 0; i < 3; i++) { /* slots change hands while what they sampled last is under way */
        step(&s, UINT32_MAX, 0, UINT32_MAX, i);
        step(&s, i, SLOTS + i, UINT32_MAX, UINT32_MAX);
    }
    step(&s, 4, SLOTS + 4, UINT32_MAX, 4);
    for (uint32_t i = 0; i < NEW_TOKENS + 12; i++) {
        if (flights && i % 4 == 0 && i < 12) {
            s.suspended = 4 + i / 4;
            s.move = 1;
        } else if (s.suspended != UINT32_MAX && i % 4 == 2) {
            s.move = -1;
        }
        step(&s, UINT32_MAX, 0, UINT32_MAX, UINT32_MAX);
    }
    while (s.count)
        collect(&s);
    ck_assert_uint_eq(fake.count, 0);
    struct status st = STATUS_INIT;
    ck_assert_int_eq(engine_reset(s.e, &st), ST_OK);
    ck_assert_uint_eq(fake.tables, fake_tables); /* none is lost */
    engine_destroy(s.e);
}

/* ---- core ---- */

static struct text one;

static void compare_flights(Tandem__V1__SampleParams *params)
{
    static struct text two;
    write_texts(&two, true, params);
    for (uint32_t t = 0; t < 2 * SLOTS; t++) {
        ck_assert_uint_eq(one.n[t], two.n[t]);
        ck_assert_mem_eq(one.id[t], two.id[t], one.n[t] * sizeof one.id[t][0]);
    }
    ck_assert_uint_eq(two.n[SLOTS], NEW_TOKENS);
}

static void compare(Tandem__V1__SampleParams *params)
{
    write_texts(&one, false, params);
    compare_flights(params);
}

START_TEST(greedy_texts_are_those_of_one_step_at_a_time)
{
    compare(NULL);
}
END_TEST

START_TEST(drawn_texts_are_those_of_one_step_at_a_time)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    p.temperature = 1;
    p.top_p = 0.9f;
    p.seed = 99;
    compare(&p);
}
END_TEST

START_TEST(options_that_look_at_all_tokens_see_those_in_flight)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    p.presence_penalty = 1.5f;
    p.frequency_penalty = 0.5f;
    p.repetition_penalty = 1;
    compare(&p);
}
END_TEST

/* Of the eight slots some or all are kept. */
START_TEST(a_device_that_keeps_options_sees_those_in_flight_without_a_wait)
{
    Tandem__V1__SampleParams p = TANDEM__V1__SAMPLE_PARAMS__INIT;
    uint32_t banned = 3;
    p.presence_penalty = 1.5f;
    p.frequency_penalty = 0.5f;
    p.repetition_penalty = 1.1f;
    p.output_at = 12;
    p.banned_ids = &banned;
    p.n_banned_ids = 1;
    p.min_tokens = 5;
    fake_tables = 3;
    compare(&p);
    ck_assert_uint_gt(fake.kept_rows, 0); /* who is not kept makes all wait */
    fake_tables = SLOTS;
    compare_flights(&p);
    ck_assert_uint_gt(fake.kept_rows, 100);
}
END_TEST

/* ---- times ---- */

static double clock_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static void submit_nothing(struct engine *e, uint64_t step)
{
    struct status st = STATUS_INIT;
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.step = step;
    ck_assert_msg(engine_submit(e, &plan, &st) == ST_OK, "%s", st.message);
}

static struct engine_timing collect_at(struct engine *e, double begin_us, double end_us)
{
    struct status st = STATUS_INIT;
    struct engine_result r;
    fake.begin_us = begin_us;
    fake.end_us = end_us;
    ck_assert_msg(engine_collect(e, &r, &st) == ST_OK, "%s", st.message);
    return r.timing;
}

/* A device that stands still before a step: as long as there was no plan it was idle, from then on it waited for us. */
START_TEST(time_between_steps_is_idle_until_the_plan_is_there)
{
    struct engine *e = make(true);
    submit_nothing(e, 1);
    const double start = clock_us(), end = start + 100;
    struct engine_timing t = collect_at(e, start, end);
    ck_assert(t.idle_us == 0 && t.gap_us == 0);
    usleep(2000);
    const double before = clock_us();
    submit_nothing(e, 2);
    const double after = clock_us(), begin = after + 500, far = after + 1e6;
    submit_nothing(e, 3);
    t = collect_at(e, begin, far);
    ck_assert(t.idle_us >= before - end && t.idle_us <= after - end);
    ck_assert_double_eq_tol(t.idle_us + t.gap_us, begin - end, 1e-3);
    t = collect_at(e, far + 7, far + 20); /* its plan was there before that end */
    ck_assert_double_eq(t.idle_us, 0);
    ck_assert_double_eq_tol(t.gap_us, 7, 1e-3);
    submit_nothing(e, 4);
    t = collect_at(e, far + 10, far + 30); /* clocks of a device are not as exact */
    ck_assert(t.idle_us == 0 && t.gap_us == 0);
    engine_destroy(e);
}
END_TEST

/* ---- limits ---- */

START_TEST(a_third_step_is_refused_and_changes_nothing)
{
    struct engine *e = make(true);
    struct engine_result r;
    struct status st = STATUS_INIT;
    for (uint64_t i = 1; i <= 2; i++) {
        Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
        plan.step = i;
        ck_assert_int_eq(engine_submit(e, &plan, &st), ST_OK);
    }
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.step = 3;
    ck_assert_int_eq(engine_submit(e, &plan, &st), ST_INTERNAL);
    ck_assert_msg(strstr(st.message, "2 steps are under way"), "%s", st.message);
    ck_assert_uint_eq(engine_in_flight(e), 2);
    ck_assert_int_eq(engine_collect(e, &r, &st), ST_OK);
    ck_assert_int_eq(engine_submit(e, &plan, &st), ST_OK);
    ck_assert_int_eq(engine_reset(e, &st), ST_OK); /* forgets both */
    ck_assert_uint_eq(engine_in_flight(e), 0);
    ck_assert_int_eq(engine_collect(e, &r, &st), ST_INTERNAL);
    plan.step = 1;
    ck_assert_int_eq(engine_submit(e, &plan, &st), ST_OK);
    engine_destroy(e);
}
END_TEST

/* ---- faults ---- */

START_TEST(a_start_that_fails_is_said_with_its_step)
{
    struct engine *e = make(true);
    struct status st = STATUS_INIT;
    fake.fails_at = 2;
    for (uint64_t i = 1; i <= 2; i++) {
        Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
        plan.step = i;
        ck_assert_int_eq(engine_submit(e, &plan, &st), i == 1 ? ST_OK : ST_INTERNAL);
    }
    ck_assert_str_eq(st.message, "step 2: the device is broken");
    engine_destroy(e);
}
END_TEST

START_TEST(a_step_that_fails_is_not_forgotten_by_a_reset)
{
    struct engine *e = make(true);
    struct status st = STATUS_INIT;
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    plan.step = 1;
    ck_assert_int_eq(engine_submit(e, &plan, &st), ST_OK);
    fake.finish_fails = true;
    ck_assert_int_eq(engine_reset(e, &st), ST_DEADLINE_EXCEEDED);
    ck_assert_str_eq(st.message, "step 1: rank 1 is silent");
    ck_assert_uint_eq(engine_in_flight(e), 1);
    engine_destroy(e);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine_flights");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_set_timeout(core, 60);
    tcase_add_test(core, greedy_texts_are_those_of_one_step_at_a_time);
    tcase_add_test(core, drawn_texts_are_those_of_one_step_at_a_time);
    tcase_add_test(core, options_that_look_at_all_tokens_see_those_in_flight);
    tcase_add_test(core, a_device_that_keeps_options_sees_those_in_flight_without_a_wait);
    tcase_add_test(core, time_between_steps_is_idle_until_the_plan_is_there);
    tcase_add_test(limits, a_third_step_is_refused_and_changes_nothing);
    tcase_add_test(faults, a_start_that_fails_is_said_with_its_step);
    tcase_add_test(faults, a_step_that_fails_is_not_forgotten_by_a_reset);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
