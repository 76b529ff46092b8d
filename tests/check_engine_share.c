/* check_engine_share.c - a slot that begins as another (AdmitSlot.from_slot) in a whole engine: answers and scores equal to
 * those of a slot that computed the same tokens, pages that are counted once, and bytes that nobody writes while they are
 * shared. The same of a slot that goes to host memory and back, and of pages that earlier owners left full of NaN. The pool and the forward pass are the real ones. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "tests/engine_group.h"
#include "worker/engine_internal.h"

#define DEMO TEST_DATA "/demo-model"

/* R 1: a token takes 4 layers x K and V x 3 heads x 32 floats = 3072 bytes, so that every fourth token ends with a page. */
enum { PAGE = 4096, SLOTS = 6, PREFIX = 150, TAIL = 9, FRESH = 6, TOP = 5 };

/* One plan, made and run bit by bit. */
struct hand {
    struct group *g;
    uint64_t step;
    Tandem__V1__StepPlan plan;
    uint32_t release[4], decode[4], suspend[4], resume[4];
    Tandem__V1__AdmitSlot admit[4], *admits[4];
    Tandem__V1__SampleParams params[4];
    Tandem__V1__PrefillChunk chunk[4], *chunks[4];
    uint64_t used_pages; /* after the last one */
};

static void next_plan(struct hand *h)
{
    tandem__v1__step_plan__init(&h->plan);
    h->plan.step = h->step + 1;
    h->plan.release_slots = h->release;
    h->plan.suspend_slots = h->suspend;
    h->plan.resume_slots = h->resume;
    h->plan.decode_slots = h->decode;
    h->plan.admits = h->admits;
    h->plan.prefills = h->chunks;
    for (int i = 0; i < 4; i++) {
        h->admits[i] = &h->admit[i];
        h->chunks[i] = &h->chunk[i];
    }
}

static Tandem__V1__SampleParams *add_admit(struct hand *h, uint32_t slot, uint32_t from, uint32_t from_tokens)
{
    size_t i = h->plan.n_admits++;
    tandem__v1__admit_slot__init(&h->admit[i]);
    tandem__v1__sample_params__init(&h->params[i]);
    h->params[i].logprobs = true;
    h->params[i].top_logprobs = TOP;
    h->admit[i].slot = slot;
    h->admit[i].from_slot = from;
    h->admit[i].from_tokens = from_tokens;
    h->admit[i].sample = &h->params[i];
    return &h->params[i];
}

/* tokens[position ... end - 1] */
static void add_rows(struct hand *h, uint32_t slot, const uint32_t *tokens, uint32_t position, uint32_t end,
                     bool sample)
{
    size_t i = h->plan.n_prefills++;
    tandem__v1__prefill_chunk__init(&h->chunk[i]);
    h->chunk[i].slot = slot;
    h->chunk[i].position = position;
    h->chunk[i].token_ids = (uint32_t *)tokens + position;
    h->chunk[i].n_token_ids = end - position;
    h->chunk[i].sample = sample;
}

static struct engine_result must_step(struct hand *h)
{
    struct engine_result r = {0};
    struct status st = STATUS_INIT;
    ck_assert_msg(group_step(h->g, &h->plan, &r, &st) == ST_OK, "%s", st.message);
    h->step = h->plan.step;
    h->used_pages = r.used_pages;
    next_plan(h);
    return r;
}

enum { HOST_PAGES = 128 }; /* in units of 16 */

static struct hand *start_ahead(uint32_t ranks, uint64_t pages, enum engine_ahead ahead)
{
    struct hand *h = calloc(1, sizeof *h);
    struct status st = STATUS_INIT;
    const struct engine_config cfg = {.model_dir = DEMO,
                                      .threads = 1,
                                      .max_slots = SLOTS,
                                      .max_step_tokens = 256,
                                      .page_bytes = PAGE,
                                      .kv_bytes = pages * PAGE,
                                      .suspend_bytes = HOST_PAGES * PAGE,
                                      .kv_ahead = ahead};
    ck_assert_msg(group_create(&h->g, &cfg, ranks, &st) == ST_OK, "%s", st.message);
    next_plan(h);
    return h;
}

static struct hand *start(uint32_t ranks, uint64_t pages)
{
    return start_ahead(ranks, pages, ENGINE_AHEAD_AUTO);
}

static void stop(struct hand *h)
{
    for (uint32_t i = 0; i < group_size(h->g); i++) {
        struct status st = STATUS_INIT;
        ck_assert_msg(kv_pool_check(group_engine(h->g, i)->kv, &st) == ST_OK, "rank %u: %s", i, st.message);
    }
    group_destroy(h->g);
    free(h);
}

static const struct kv_account *account(const struct hand *h)
{
    return &group_engine(h->g, 0)->info.kv;
}

/* The same for all who give the same kind: PREFIX tokens in common, then tokens of their own. */
static void make_prompt(uint32_t *tokens, uint32_t kind)
{
    for (uint32_t i = 0; i < PREFIX + TAIL; i++)
        tokens[i] = (i * 2654435761u + (i < PREFIX ? 0 : kind * 977) + 12345) >> 7 & 1023;
}

struct answer {
    uint32_t n;
    struct sample_scores scores[FRESH]; /* token, its log probability, the likeliest */
};

static void keep(struct answer *a, const struct engine_result *r, uint32_t index)
{
    ck_assert_uint_eq(r->n_sample_scores, r->n_tokens);
    ck_assert_uint_eq(r->sample_scores[index].scores.token, r->tokens[index]);
    a->scores[a->n++] = r->sample_scores[index].scores;
}

static void decode_to_the_end(struct hand *h, uint32_t slot, struct answer *a)
{
    while (a->n < FRESH) {
        h->decode[h->plan.n_decode_slots++] = slot;
        struct engine_result r = must_step(h);
        keep(a, &r, 0);
    }
}

/* Prefix and tail are computed in two chunks, as the source of a share and its sharer would. */
static struct answer alone(struct hand *h, uint32_t slot, uint32_t kind, uint32_t split)
{
    uint32_t tokens[PREFIX + TAIL];
    struct answer a = {0};
    make_prompt(tokens, kind);
    add_admit(h, slot, 0, 0);
    add_rows(h, slot, tokens, 0, split, false);
    must_step(h);
    add_rows(h, slot, tokens, split, PREFIX + TAIL, true);
    struct engine_result r = must_step(h);
    keep(&a, &r, 0);
    decode_to_the_end(h, slot, &a);
    return a;
}

static void release(struct hand *h, uint32_t slot)
{
    h->release[h->plan.n_release_slots++] = slot;
}

/* To the bit: the same tokens give the same K and V wherever they lie. */
static void expect_same(const struct answer *a, const struct answer *b, const char *what, uint32_t number)
{
    ck_assert_uint_eq(a->n, b->n);
    for (uint32_t i = 0; i < a->n; i++) {
        const struct sample_scores *x = &a->scores[i], *y = &b->scores[i];
        ck_assert_msg(x->token == y->token && x->logprob == y->logprob && x->rank == y->rank && x->n == y->n &&
                          memcmp(x->top, y->top, x->n * sizeof *x->top) == 0 &&
                          memcmp(x->top_logprob, y->top_logprob, x->n * sizeof *x->top_logprob) == 0,
                      "%s %u: sample %u: token %u (%.9g), expected %u (%.9g)", what, number, i, y->token,
                      (double)y->logprob, x->token, (double)x->logprob);
    }
}

/* K and V of the first tokens of a slot, of all layers and ranks. To be freed. */
static uint8_t *copy_kv(const struct hand *h, uint32_t slot, uint32_t tokens, size_t *bytes)
{
    uint8_t *out = calloc(group_size(h->g), tokens * account(h)->token_bytes + 1), *at = out;
    for (uint32_t rank = 0; rank < group_size(h->g); rank++) {
        const struct engine *e = group_engine(h->g, rank);
        size_t row = (size_t)e->shard.kv_heads.count * e->model.head_dim * SHARD_KV_HOST_BYTES;
        for (uint32_t layer = 0; row && layer < e->model.layers; layer++) {
            struct kv_view v = kv_slot_view(e->kv, slot, layer);
            for (uint32_t t = 0; t < tokens; t++) {
                at = mempcpy(at, v.k + t * v.token_stride, row);
                at = mempcpy(at, v.v + t * v.token_stride, row);
            }
        }
    }
    *bytes = (size_t)(at - out);
    return out;
}

static void expect_kv(const struct hand *h, uint32_t slot, uint32_t tokens, const uint8_t *expected, size_t bytes)
{
    size_t n;
    uint8_t *got = copy_kv(h, slot, tokens, &n);
    ck_assert_uint_eq(n, bytes);
    ck_assert_msg(memcmp(got, expected, n) == 0, "slot %u: its first %u tokens have changed", slot, tokens);
    free(got);
}

/* ---- core ---- */

/* The lengths end with a page, within one, and before the first is full. */
static const uint32_t lengths[] = {PREFIX, 148, 149, 5, 4, 3, 1};

START_TEST(shared_tokens_give_the_same_answer)
{
    struct hand *h = start((uint32_t)_i, 4096);
    uint32_t tokens[PREFIX + TAIL];
    make_prompt(tokens, 1);
    for (uint32_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        uint32_t n = lengths[k], source = 2 * k % SLOTS, sharer = (2 * k + 1) % SLOTS;
        struct answer expected = alone(h, source, 1, n), got = {0};
        release(h, source);
        add_admit(h, source, 0, 0); /* pages that another filled before */
        add_rows(h, source, tokens, 0, n, false);
        must_step(h);
        if (n < PREFIX) { /* it has more than is shared */
            add_rows(h, source, tokens, n, PREFIX, false);
            must_step(h);
        }
        add_admit(h, sharer, source, n);
        add_rows(h, sharer, tokens, n, PREFIX + TAIL, true);
        struct engine_result r = must_step(h);
        keep(&got, &r, 0);
        decode_to_the_end(h, sharer, &got);
        expect_same(&expected, &got, "tokens shared:", n);
        release(h, source);
        release(h, sharer);
        must_step(h);
        ck_assert_uint_eq(h->used_pages, 0);
    }
    stop(h);
}
END_TEST

START_TEST(pages_are_counted_once_and_the_last_is_copied)
{
    struct hand *h = start(1, 4096);
    const struct kv_account *kv = account(h);
    uint32_t tokens[PREFIX + TAIL];
    make_prompt(tokens, 1);
    add_admit(h, 0, 0, 0);
    add_rows(h, 0, tokens, 0, PREFIX, false);
    must_step(h);
    uint64_t pages = kv_pages_for(kv, PREFIX);
    ck_assert_uint_eq(h->used_pages, pages);
    for (uint32_t slot = 1; slot < SLOTS; slot++) { /* each of the one before */
        add_admit(h, slot, slot - 1, PREFIX - slot);
        must_step(h);
        pages += kv_pages_added(kv, PREFIX - slot, PREFIX - slot);
        ck_assert_uint_eq(h->used_pages, pages);
        struct kv_stats s = kv_pool_stats(group_engine(h->g, 0)->kv);
        ck_assert_uint_eq(s.shared_pages, kv_pages_shared(kv, PREFIX - 1));
    }
    const struct kv_pool *pool = group_engine(h->g, 0)->kv;
    ck_assert_uint_gt(kv_pages_for(kv, PREFIX - 1), kv_pages_shared(kv, PREFIX - 1));
    ck_assert_ptr_ne(kv_slot_view(pool, 0, 0).k, kv_slot_view(pool, 1, 0).k);
    stop(h);
}
END_TEST

/* Source and sharers write behind what they share, all in the same steps. */
START_TEST(shared_pages_are_never_written)
{
    enum { N = 149 };
    struct hand *h = start((uint32_t)_i, 4096);
    struct answer expected[4], got[4] = {0};
    uint32_t tokens[4][PREFIX + TAIL];
    size_t bytes;
    for (uint32_t k = 0; k < 4; k++) {
        make_prompt(tokens[k], k);
        expected[k] = alone(h, 0, k, k == 0 ? PREFIX : N);
        release(h, 0);
        must_step(h);
    }
    add_admit(h, 0, 0, 0);
    add_rows(h, 0, tokens[0], 0, PREFIX, false);
    must_step(h);
    uint8_t *before = copy_kv(h, 0, N, &bytes);
    for (uint32_t k = 1; k < 4; k++) {
        add_admit(h, k, 0, N);
        expect_kv(h, 0, N, before, bytes);
    }
    add_rows(h, 0, tokens[0], PREFIX, PREFIX + TAIL, true);
    for (uint32_t k = 1; k < 4; k++)
        add_rows(h, k, tokens[k], N, PREFIX + TAIL, true);
    struct engine_result r = must_step(h);
    for (uint32_t k = 0; k < 4; k++)
        keep(&got[k], &r, k);
    while (got[0].n < FRESH) {
        for (uint32_t k = 0; k < 4; k++)
            h->decode[h->plan.n_decode_slots++] = k;
        r = must_step(h);
        for (uint32_t k = 0; k < 4; k++)
            keep(&got[k], &r, k);
    }
    for (uint32_t k = 0; k < 4; k++) {
        expect_same(&expected[k], &got[k], "slot", k);
        expect_kv(h, k, N, before, bytes);
    }
    free(before);
    stop(h);
}
END_TEST

START_TEST(sharers_outlive_the_source)
{
    enum { N = 150 };
    struct hand *h = start(1, 420); /* so few that what is released is used again at once */
    struct answer expected = alone(h, 0, 1, N), got = {0};
    uint32_t tokens[PREFIX + TAIL], others[PREFIX + TAIL];
    make_prompt(tokens, 1);
    for (uint32_t i = 0; i < PREFIX + TAIL; i++)
        others[i] = 2000 - i;
    release(h, 0);
    add_admit(h, 1, 0, 0);
    add_rows(h, 1, tokens, 0, PREFIX, false);
    must_step(h);
    add_admit(h, 2, 1, N);
    must_step(h);
    release(h, 1);
    must_step(h);
    for (uint32_t again = 0; again < 3; again++) {
        for (uint32_t slot = 3; slot < 5; slot++) {
            if (again)
                release(h, slot);
            add_admit(h, slot, 0, 0);
            add_rows(h, slot, others, 0, 120, false);
        }
        must_step(h);
    }
    add_rows(h, 2, tokens, N, PREFIX + TAIL, true);
    struct engine_result r = must_step(h);
    keep(&got, &r, 0);
    decode_to_the_end(h, 2, &got);
    expect_same(&expected, &got, "slot", 2);
    stop(h);
}
END_TEST

/* Slots go to host memory and come back, between chunks and between decodes, while others use their pages. */
START_TEST(suspended_slot_gives_the_same_answer)
{
    struct hand *h = start((uint32_t)_i, 4096);
    uint32_t tokens[PREFIX + TAIL], others[PREFIX + TAIL];
    struct answer expected = alone(h, 0, 1, 100), got = {0};
    make_prompt(tokens, 1);
    make_prompt(others, 2);
    ck_assert_uint_eq(engine_info(group_engine(h->g, 0)).suspend_pages, HOST_PAGES);
    ck_assert_uint_gt(engine_info(group_engine(h->g, 0)).suspend_bytes_per_s, 0);
    release(h, 0);
    add_admit(h, 1, 0, 0);
    add_rows(h, 1, tokens, 0, 100, false);
    must_step(h);
    for (int round = 0; got.n < FRESH; round++) {
        h->suspend[h->plan.n_suspend_slots++] = 1;
        if (round > 0)
            release(h, 2);
        add_admit(h, 2, 0, 0);
        add_rows(h, 2, others, 0, 20, false);
        must_step(h);
        ck_assert_uint_eq(h->used_pages, kv_pages_for(account(h), 20));
        h->resume[h->plan.n_resume_slots++] = 1;
        must_step(h);
        if (round == 0)
            add_rows(h, 1, tokens, 100, PREFIX + TAIL, true);
        else
            h->decode[h->plan.n_decode_slots++] = 1;
        struct engine_result r = must_step(h);
        keep(&got, &r, 0);
    }
    expect_same(&expected, &got, "slot", 1);
    h->suspend[h->plan.n_suspend_slots++] = 1;
    must_step(h);
    release(h, 1); /* from where it is */
    release(h, 2);
    must_step(h);
    ck_assert_uint_eq(h->used_pages, 0);
    stop(h);
}
END_TEST

/* All pages of each rank, from a slot that is gone. */
static void poison(struct hand *h)
{
    for (uint32_t rank = 0; rank < group_size(h->g); rank++) {
        const struct engine *e = group_engine(h->g, rank);
        const struct kv_account *a = &e->info.kv;
        uint32_t slot = 0;
        for (uint64_t left = a->token_bytes ? a->total_pages : 0; left > 0; slot++) {
            uint64_t tokens = left * a->page_bytes / a->token_bytes;
            if (tokens > e->info.max_context)
                tokens = e->info.max_context;
            if (tokens == 0)
                break;
            ck_assert_int_eq(kv_slot_grow(e->kv, slot, (uint32_t)tokens, NULL), ST_OK);
            memset(kv_slot_view(e->kv, slot, 0).k, 0xff, tokens * a->token_bytes);
            left -= kv_pages_for(a, tokens);
        }
        kv_pool_reset(e->kv);
    }
}

START_TEST(what_earlier_owners_left_is_never_read)
{
    struct hand *h = start_ahead((uint32_t)_i + 1, 256, _i ? ENGINE_AHEAD_ON : ENGINE_AHEAD_OFF);
    struct answer expected = alone(h, 0, 1, 100);
    release(h, 0);
    must_step(h);
    poison(h);
    struct answer got = alone(h, 1, 1, 100);
    expect_same(&expected, &got, "slot", 1);
    stop(h);
}
END_TEST

/* ---- faults ---- */

/* Each spoils a plan over this state: slot 0 has PREFIX tokens, slot 1 begins as it and has 8, slot 2 is free. */
static const char *spoil(struct hand *h, int which, enum status_code *code)
{
    *code = ST_INTERNAL;
    switch (which) {
    case 0:
        add_admit(h, 3, 2, 1);
        return "beginning as slot 2: it has not so many tokens, or is released";
    case 1:
        add_admit(h, 3, 1, 9);
        return "beginning as slot 1: it has not so many tokens";
    case 2:
        release(h, 1);
        add_admit(h, 3, 1, 4);
        return "beginning as slot 1: it has not so many tokens, or is released";
    case 3:
        add_admit(h, 2, 0, 0);
        add_admit(h, 3, 2, 1);
        return "beginning as slot 2: it has not so many tokens";
    case 4:
        add_admit(h, 3, 3, 1);
        return "beginning as slot 3: it has not so many tokens";
    case 5:
        *code = ST_INVALID_ARGUMENT;
        add_admit(h, 3, SLOTS, 1);
        return "beginning as slot 6, expected 0 to 5";
    case 6:
        *code = ST_INVALID_ARGUMENT;
        add_admit(h, 3, 0, 4)->repetition_penalty = 1.5f;
        return "admission to slot 3: penalties look at all tokens, but 4 of them were never sent";
    case 7: {
        uint32_t none = 0;
        add_admit(h, 3, 0, 4);
        add_rows(h, 3, &none, 0, 1, true);
        return "prefill of slot 3: position 0, but the slot has 4 tokens";
    }
    case 8:
        add_admit(h, 3, 0, 4);
        h->decode[h->plan.n_decode_slots++] = 3;
        return "decode of slot 3: it has no sampled token";
    case 9:
        h->suspend[h->plan.n_suspend_slots++] = 2;
        return "suspension of slot 2: it is free, or released";
    case 10:
        release(h, 1);
        h->suspend[h->plan.n_suspend_slots++] = 1;
        return "suspension of slot 1: it is free, or released";
    case 11:
        h->suspend[h->plan.n_suspend_slots++] = 4;
        return "suspension of slot 4: it is suspended already, or empty";
    case 12:
        h->suspend[h->plan.n_suspend_slots++] = 1;
        h->suspend[h->plan.n_suspend_slots++] = 1;
        return "suspension of slot 1: named twice";
    case 13:
        h->resume[h->plan.n_resume_slots++] = 1;
        return "resumption of slot 1: it is not suspended";
    case 14:
        h->suspend[h->plan.n_suspend_slots++] = 1;
        h->resume[h->plan.n_resume_slots++] = 1;
        return "resumption of slot 1: named twice";
    case 15:
        add_admit(h, 3, 4, 1);
        return "beginning as slot 4: it has not so many tokens, or is released or suspended";
    case 16: {
        uint32_t none[9] = {0};
        h->suspend[h->plan.n_suspend_slots++] = 1;
        add_rows(h, 1, none, 8, 9, true);
        return "prefill of slot 1: it is suspended, or resumed by this plan";
    }
    case 17: {
        uint32_t none[4] = {0};
        h->resume[h->plan.n_resume_slots++] = 4;
        add_rows(h, 4, none, 3, 4, true);
        return "prefill of slot 4: it is suspended, or resumed by this plan";
    }
    case 18:
        *code = ST_INVALID_ARGUMENT;
        h->suspend[h->plan.n_suspend_slots++] = SLOTS;
        return "suspension of slot 6, expected 0 to 5";
    case 19:
        *code = ST_RESOURCE_EXHAUSTED;
        h->suspend[h->plan.n_suspend_slots++] = 0;
        h->suspend[h->plan.n_suspend_slots++] = 5;
        return "suspension of slot 5: 131 pages of host memory needed, but there are 128";
    default:
        *code = ST_RESOURCE_EXHAUSTED;
        add_admit(h, 3, 0, 149); /* the rest of a page, where none is free */
        return "KV pages needed, but the pool has";
    }
}

enum { SPOILED = 21 };

START_TEST(wrong_beginning_is_described_and_changes_nothing)
{
    uint32_t zeros[20] = {0};
    uint32_t tokens[PREFIX + TAIL];
    /* of PREFIX tokens; of 8, of which 7 share 5; of those of slot 5; to spare */
    struct hand *h = start(1, 113 + 1 + 15 + (_i < SPOILED - 1));
    enum status_code code;
    struct engine_result r = {0};
    make_prompt(tokens, 1);
    add_admit(h, 0, 0, 0);
    add_rows(h, 0, tokens, 0, PREFIX, false);
    must_step(h);
    add_admit(h, 1, 0, 7);
    add_rows(h, 1, tokens, 7, 8, false);
    add_admit(h, 4, 0, 0);
    add_rows(h, 4, tokens, 0, 3, false);
    must_step(h);
    h->suspend[h->plan.n_suspend_slots++] = 4;
    must_step(h);
    add_admit(h, 5, 0, 0);
    add_rows(h, 5, zeros, 0, 20, false);
    must_step(h);
    const char *says = spoil(h, _i, &code);
    uint64_t pages = h->used_pages;
    for (int again = 0; again < 2; again++) {
        struct status st = STATUS_INIT;
        enum status_code rc = group_step(h->g, &h->plan, &r, &st);
        ck_assert_msg(rc == code && strstr(st.message, says), "%s, \"%s\"; expected %s, \"%s\"", status_name(rc),
                      st.message, status_name(code), says);
    }
    next_plan(h);
    must_step(h);
    ck_assert_uint_eq(h->used_pages, pages);
    stop(h);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine_share");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_add_loop_test(core, shared_tokens_give_the_same_answer, 1, 4);
    tcase_add_test(core, pages_are_counted_once_and_the_last_is_copied);
    tcase_add_loop_test(core, shared_pages_are_never_written, 1, 3);
    tcase_add_test(core, sharers_outlive_the_source);
    tcase_add_loop_test(core, suspended_slot_gives_the_same_answer, 2, 4);
    tcase_add_loop_test(core, what_earlier_owners_left_is_never_read, 0, 2);
    tcase_add_loop_test(faults, wrong_beginning_is_described_and_changes_nothing, 0, SPOILED);
    tcase_set_timeout(core, 60);
    tcase_set_timeout(faults, 60);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
