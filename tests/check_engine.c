/* check_engine.c - worker/engine.h on the demo model: the right tokens for every split and batch, and a clear refusal of
 * plans and folders that are wrong. The arithmetic on other shapes is tests/reference.py's business. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "comm/comm_internal.h"
#include "tests/engine_group.h"
#include "tests/temp_dir.h"

#define DEMO TEST_DATA "/demo-model"

enum { CASES = 3, NEW = 96 };

/* expected.json */
struct cases {
    uint32_t prompt[CASES][64], prompt_tokens[CASES];
    uint32_t ids[CASES][NEW];
};

static struct cases *read_cases(void)
{
    json_t *doc = json_load_file(DEMO "/expected.json", 0, NULL), *list = json_object_get(doc, "cases");
    ck_assert_uint_eq(json_array_size(list), CASES);
    struct cases *c = calloc(1, sizeof *c);
    for (size_t i = 0; i < CASES; i++) {
        const json_t *prompt = json_object_get(json_array_get(list, i), "prompt_ids");
        const json_t *ids = json_object_get(json_array_get(list, i), "greedy_ids");
        c->prompt_tokens[i] = (uint32_t)json_array_size(prompt);
        ck_assert_uint_le(c->prompt_tokens[i], 64);
        ck_assert_uint_eq(json_array_size(ids), NEW);
        for (size_t k = 0; k < c->prompt_tokens[i]; k++)
            c->prompt[i][k] = (uint32_t)json_integer_value(json_array_get(prompt, k));
        for (size_t k = 0; k < NEW; k++)
            c->ids[i][k] = (uint32_t)json_integer_value(json_array_get(ids, k));
    }
    json_decref(doc);
    return c;
}

static struct engine_config small(const char *dir)
{
    return (struct engine_config){.model_dir = dir, .threads = 1, .max_slots = 8, .max_step_tokens = 64};
}

static struct group *make(struct engine_config cfg, uint32_t ranks)
{
    struct group *g;
    struct status st = STATUS_INIT;
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

/* n requests of the cases in turn, `fresh` tokens each. out: [n][NEW] */
static struct group_request *make_requests(const struct cases *c, uint32_t n, uint32_t fresh, uint32_t (*out)[NEW])
{
    struct group_request *req = calloc(n, sizeof *req);
    for (uint32_t i = 0; i < n; i++)
        req[i] = (struct group_request){
            .prompt = c->prompt[i % CASES],
            .prompt_tokens = c->prompt_tokens[i % CASES],
            .max_new = fresh,
            .out = out[i],
        };
    return req;
}

static void expect_greedy(const struct cases *c, uint32_t (*out)[NEW], uint32_t n, uint32_t fresh, const char *what)
{
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < fresh; k++)
            ck_assert_msg(out[i][k] == c->ids[i % CASES][k], "%s: request %u token %u: %u, expected %u", what, i, k,
                          out[i][k], c->ids[i % CASES][k]);
}

/* ---- core ---- */

#ifdef TANDEM_SANITIZED /* ten times slower: fewer splits and tokens */
static const uint32_t rank_counts[] = {1, 3, 8};
enum { GREEDY_NEW = 12, CROWD_NEW = 4, CROWD_ARRIVE = 16, CROWD_WAYS = 1, SINGLE_NEW = 10, SAMPLED_NEW = 8 };
#else
static const uint32_t rank_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 16, 64};
enum { GREEDY_NEW = NEW, CROWD_NEW = 40, CROWD_ARRIVE = 3, CROWD_WAYS = 2, SINGLE_NEW = 30, SAMPLED_NEW = 24 };
#endif

START_TEST(greedy_ids_are_right_for_every_number_of_ranks)
{
    uint32_t ranks = rank_counts[_i];
    struct cases *c = read_cases();
    struct engine_config cfg = small(DEMO);
    cfg.max_step_tokens = 512;
    cfg.threads = ranks < 3 ? 2 : 1;
    struct group *g = make(cfg, ranks);
    uint32_t out[2 * CASES][NEW];
    static const uint32_t rows[] = {512, 64, 16};
    for (size_t i = ranks > 8 ? 1 : 0; i < (ranks > 8 ? 2 : sizeof rows / sizeof *rows);
         i++) { /* many: one way of three */
        char what[64];
        snprintf(what, sizeof what, "%u ranks, %u rows a step", ranks, rows[i]);
        struct group_request *req = make_requests(c, CASES, GREEDY_NEW, out);
        memset(out, 0xff, sizeof out);
        run(g, req, CASES, rows[i], i == 0 ? 1 : CASES);
        expect_greedy(c, out, CASES, GREEDY_NEW, what);
        free(req);
    }
    group_destroy(g);
    free(c);
}
END_TEST

START_TEST(sixty_four_requests_at_once_give_the_same_ids)
{
    enum { N = 64, FRESH = CROWD_NEW };
    struct cases *c = read_cases();
    struct engine_config cfg = small(DEMO);
    cfg.max_slots = N;
    cfg.max_step_tokens = 512;
    struct group *g = make(cfg, (uint32_t)_i);
    static uint32_t out[N][NEW];
    static const uint32_t rows[] = {512, 70}; /* 70: most of a step is decodes, prompts come in small pieces */
    for (int i = 0; i < CROWD_WAYS; i++) {
        struct group_request *req = make_requests(c, N, FRESH, out);
        for (uint32_t k = 0; k < N; k++)
            req[k].arrival = k / CROWD_ARRIVE; /* all are there before the first is over */
        run(g, req, N, rows[(_i + i) % 2], N);
        expect_greedy(c, out, N, FRESH, "64 at once");
        free(req);
    }
    group_destroy(g);
    free(c);
}
END_TEST

START_TEST(tokens_one_row_at_a_time_are_the_same)
{
    struct cases *c = read_cases();
    struct group *g = make(small(DEMO), 2);
    uint32_t out[CASES][NEW];
    struct group_request *req = make_requests(c, CASES, SINGLE_NEW, out);
    run(g, req, CASES, 1, 1);
    expect_greedy(c, out, CASES, SINGLE_NEW, "one row a step");
    free(req);
    group_destroy(g);
    free(c);
}
END_TEST

/* Sampled tokens depend on seed and position: not on the batch, the chunks, the ranks or earlier requests. */
START_TEST(sampled_ids_depend_on_the_seed_only)
{
    enum { N = 12, FRESH = SAMPLED_NEW };
    struct cases *c = read_cases();
    static uint32_t alone[N][NEW], mixed[N][NEW];
    struct group *one = make(small(DEMO), 1), *three = make(small(DEMO), 3);
    struct group_request *req = make_requests(c, N, FRESH, alone), *again = make_requests(c, N, FRESH, mixed);
    for (uint32_t i = 0; i < N; i++) {
        req[i].temperature = i % 4 == 3 ? 0.0f : 0.8f; /* every fourth is greedy */
        req[i].top_k = i % 2 ? 40 : 0;
        req[i].top_p = i % 3 ? 0.9f : 1.0f;
        req[i].seed = 1000 + i / 6; /* same prompt, same parameters, another seed: 0 and 6, 1 and 7 ... */
        uint32_t *out = again[i].out;
        again[i] = req[i];
        again[i].out = out;
        again[i].arrival = (N - i) * 2;
    }
    run(one, req, N, 64, 1);
    run(three, again, N, 7, 5);
    for (uint32_t i = 0; i < N; i++)
        ck_assert_msg(memcmp(alone[i], mixed[i], FRESH * sizeof **alone) == 0, "request %u", i);
    ck_assert_mem_ne(alone[0], alone[6], FRESH * sizeof **alone);
    ck_assert_mem_ne(alone[1], alone[7], FRESH * sizeof **alone);
    for (uint32_t i = 3; i < N; i += 4)
        ck_assert_mem_eq(alone[i], c->ids[i % CASES], FRESH * sizeof **alone);
    free(req);
    free(again);
    group_destroy(one);
    group_destroy(three);
    free(c);
}
END_TEST

START_TEST(info_says_what_the_model_is)
{
    struct engine_config cfg = small(DEMO);
    cfg.max_context = 300;
    cfg.page_bytes = 1 << 16;
    cfg.kv_bytes = 20 << 16;
    struct group *g = make(cfg, 8);
    uint64_t embed_rows = 0, without_heads = 0, weights = 0;
    for (uint32_t r = 0; r < 8; r++) {
        struct engine_info info = engine_info(group_engine(g, r));
        ck_assert_uint_eq(info.max_slots, 8);
        ck_assert_uint_eq(info.max_context, 300);
        ck_assert_uint_eq(info.max_step_tokens, 64);
        ck_assert_uint_eq(info.vocab_size, 2048);
        ck_assert_str_eq(info.architecture, "LlamaForCausalLM");
        ck_assert_str_eq(info.device, "host, 1 thread");
        ck_assert_uint_eq(info.heads, 6);
        ck_assert_uint_eq(info.kv_heads, 3);
        ck_assert_int_eq(info.bos_id, 2046);
        ck_assert_uint_eq(info.n_eos, 1);
        ck_assert_float_eq(info.temperature, 0.8f);
        ck_assert_uint_eq(info.kv.page_bytes, 1 << 16);
        /* 6 query heads on 8 ranks: two have none and need no KV; the others hold one KV head */
        ck_assert_uint_eq(info.kv.total_pages, info.kv.token_bytes ? 20 : UINT64_C(1) << 31); /* bounds nobody */
        ck_assert(info.kv.token_bytes == 0 || info.kv.token_bytes == 4 * 2 * 1 * 32 * sizeof(float));
        without_heads += info.kv.token_bytes == 0;
        weights += info.weight_bytes;
        embed_rows += 256;
    }
    ck_assert_uint_eq(without_heads, 2);
    ck_assert_uint_eq(embed_rows, 2048);
    group_destroy(g);
    /* bf16 weights, each matrix held once but for the norms, the replicated KV heads and alignment */
    struct group *one = make(cfg, 1);
    uint64_t whole = engine_info(group_engine(one, 0)).weight_bytes;
    ck_assert_uint_ge(weights, whole);
    ck_assert_uint_lt(weights, whole + whole / 4);
    group_destroy(one);
}
END_TEST

struct progress {
    uint64_t calls, done, total;
};

static void note_progress(void *ctx, uint64_t done, uint64_t total)
{
    struct progress *p = ctx;
    ck_assert_uint_ge(done, p->done);
    ck_assert_uint_le(done, total);
    *p = (struct progress){p->calls + 1, done, total};
}

START_TEST(progress_grows_to_the_whole)
{
    struct progress p = {0};
    struct engine_config cfg = small(DEMO);
    cfg.progress = note_progress;
    cfg.progress_ctx = &p;
    struct group *g = make(cfg, 1);
    ck_assert_uint_ge(p.calls, 2);
    ck_assert_uint_eq(p.done, p.total);
    ck_assert_uint_eq(p.total, engine_info(group_engine(g, 0)).weight_bytes);
    group_destroy(g);
}
END_TEST

/* ---- plans by hand ---- */

enum { MAX_CHUNK = 200 };

struct hand {
    Tandem__V1__StepPlan plan;
    uint32_t release[8], decode[8], ids[MAX_CHUNK];
    Tandem__V1__AdmitSlot admit[4], *admits[4];
    Tandem__V1__SampleParams params[4];
    Tandem__V1__PrefillChunk chunk[4], *chunks[4];
};

static void hand_init(struct hand *h, uint64_t step)
{
    memset(h, 0, sizeof *h);
    tandem__v1__step_plan__init(&h->plan);
    h->plan.step = step;
    h->plan.release_slots = h->release;
    h->plan.decode_slots = h->decode;
    h->plan.admits = h->admits;
    h->plan.prefills = h->chunks;
    for (uint32_t i = 0; i < MAX_CHUNK; i++)
        h->ids[i] = i;
}

static void hand_admit(struct hand *h, uint32_t slot)
{
    size_t i = h->plan.n_admits++;
    tandem__v1__admit_slot__init(&h->admit[i]);
    tandem__v1__sample_params__init(&h->params[i]);
    h->admit[i].slot = slot;
    h->admit[i].sample = &h->params[i];
    h->admits[i] = &h->admit[i];
}

static void hand_prefill(struct hand *h, uint32_t slot, uint32_t position, uint32_t n, bool sample)
{
    size_t i = h->plan.n_prefills++;
    tandem__v1__prefill_chunk__init(&h->chunk[i]);
    h->chunk[i].slot = slot;
    h->chunk[i].position = position;
    h->chunk[i].n_token_ids = n;
    h->chunk[i].token_ids = h->ids;
    h->chunk[i].sample = sample;
    h->chunks[i] = &h->chunk[i];
}

static struct engine_result must_step(struct group *g, const struct hand *h)
{
    struct engine_result r;
    struct status st = STATUS_INIT;
    ck_assert_msg(group_step(g, &h->plan, &r, &st) == ST_OK, "%s", st.message);
    return r;
}

static atomic_int fallocate_fails_in; /* 0: it does not */

int __real_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate(int fd, int mode, off_t off, off_t len)
{
    if (fallocate_fails_in && --fallocate_fails_in == 0) {
        errno = ENOSPC;
        return -1;
    }
    return __real_fallocate(fd, mode, off, len);
}

START_TEST(what_the_machine_refuses_is_in_the_result)
{
    struct engine_config cfg = small(DEMO);
    cfg.page_bytes = 4096;
    cfg.kv_bytes = 40 * 4096;
    struct group *g = make(cfg, 1);
    struct hand h;
    hand_init(&h, 1);
    h.plan.kv_pages = 10;
    fallocate_fails_in = 6;
    struct engine_result r = must_step(g, &h);
    ck_assert_uint_eq(r.kv.total_pages, 35);
    ck_assert_ptr_nonnull(r.resize_failed);
    ck_assert_msg(strstr(r.resize_failed, "pages: 5 of 30 given back: giving KV page "), "%s", r.resize_failed);
    hand_init(&h, 2);
    h.plan.kv_pages = 10;
    r = must_step(g, &h);
    ck_assert_uint_eq(r.kv.total_pages, 10);
    ck_assert_ptr_null(r.resize_failed);
    hand_init(&h, 3);
    h.plan.kv_pages = 40;
    fallocate_fails_in = 3;
    r = must_step(g, &h);
    ck_assert_uint_eq(r.kv.total_pages, 12);
    ck_assert_uint_eq(engine_info(group_engine(g, 0)).kv.total_pages, 12);
    ck_assert_msg(strstr(r.resize_failed, "pages: 2 of 30 taken again: taking KV page "), "%s", r.resize_failed);
    hand_init(&h, 4);
    r = must_step(g, &h);
    ck_assert_ptr_null(r.resize_failed);
    group_destroy(g);
}
END_TEST

/* The same on a rank of uneven share, and on one without heads, which has no pages. */
START_TEST(the_pool_has_as_many_pages_as_the_plan_says)
{
    struct engine_config cfg = small(DEMO);
    cfg.page_bytes = 4096;
    cfg.kv_bytes = 40 * 4096;
    struct group *g = make(cfg, _i);
    struct hand h;
    hand_init(&h, 1);
    hand_admit(&h, 3);
    hand_prefill(&h, 3, 0, 5, true);
    h.plan.kv_pages = 4;
    struct engine_result r = must_step(g, &h);
    ck_assert_uint_eq(r.kv.total_pages, 4);
    ck_assert_uint_eq(r.kv.given_pages, 36);
    ck_assert_uint_eq(r.kv.mapped_pages, r.used_pages);
    ck_assert_uint_eq(r.kv.wasted_bytes, r.used_pages * 4096 - 5 * engine_info(group_engine(g, 0)).kv.token_bytes);
    struct status st = STATUS_INIT;
    hand_init(&h, 2); /* more than there is */
    hand_prefill(&h, 3, 5, 5, true);
    h.plan.kv_pages = 2;
    if (_i == 1) {
        ck_assert_int_eq(group_step(g, &h.plan, &r, &st), ST_RESOURCE_EXHAUSTED);
        ck_assert_ptr_nonnull(strstr(st.message, "KV pages needed, but the pool has 2"));
        hand_init(&h, 2);
        h.plan.kv_pages = 41;
        ck_assert_int_eq(group_step(g, &h.plan, &r, &st), ST_INVALID_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(st.message, "kv_pages: 41, expected at most 40"));
    }
    hand_init(&h, 2);
    h.plan.kv_pages = 40;
    r = must_step(g, &h);
    ck_assert_uint_eq(r.kv.total_pages, 40);
    ck_assert_uint_eq(r.kv.given_pages, 0);
    ck_assert_uint_eq(engine_info(group_engine(g, (uint32_t)_i - 1)).kv.total_pages, 40);
    hand_init(&h, 3);
    hand_prefill(&h, 3, 5, 5, true); /* as it was refused, nothing had changed */
    must_step(g, &h);
    group_destroy(g);
}
END_TEST

START_TEST(pages_follow_the_slots)
{
    struct engine_config cfg = small(DEMO);
    cfg.page_bytes = 4096; /* a token takes 3072 bytes in 4 layers of 3 KV heads */
    cfg.kv_bytes = 40 * 4096;
    struct group *g = make(cfg, 1);
    struct hand h;
    hand_init(&h, 1);
    hand_admit(&h, 3);
    hand_prefill(&h, 3, 0, 5, true);
    struct engine_result r = must_step(g, &h);
    ck_assert_uint_eq(r.n_tokens, 1);
    uint64_t token_bytes = engine_info(group_engine(g, 0)).kv.token_bytes;
    ck_assert_uint_eq(r.used_pages, (5 * token_bytes + 4095) / 4096);
    hand_init(&h, 2); /* released and admitted anew in one plan */
    h.release[h.plan.n_release_slots++] = 3;
    hand_admit(&h, 3);
    hand_prefill(&h, 3, 0, 2, false);
    r = must_step(g, &h);
    ck_assert_uint_eq(r.n_tokens, 0);
    ck_assert_uint_eq(r.used_pages, (2 * token_bytes + 4095) / 4096);
    hand_init(&h, 3);
    h.release[h.plan.n_release_slots++] = 3;
    r = must_step(g, &h);
    ck_assert_uint_eq(r.used_pages, 0);
    hand_init(&h, 4); /* nothing at all */
    r = must_step(g, &h);
    ck_assert_uint_eq(r.n_tokens, 0);
    group_destroy(g);
}
END_TEST

START_TEST(reset_forgets_everything)
{
    struct cases *c = read_cases();
    struct group *g = make(small(DEMO), 2);
    uint32_t out[CASES][NEW];
    struct hand h;
    hand_init(&h, 1);
    for (uint32_t slot = 0; slot < 4; slot++) {
        hand_admit(&h, slot);
        hand_prefill(&h, slot, 0, 10 + slot, true);
    }
    must_step(g, &h);
    struct group_request *req = make_requests(c, CASES, 20, out);
    run(g, req, CASES, 64, 2); /* resets; takes slots from above, then the same as ever */
    expect_greedy(c, out, CASES, 20, "after a reset");
    group_reset(g);
    struct engine_result r = must_step(g, &h);
    ck_assert_uint_eq(r.n_tokens, 4);
    free(req);
    group_destroy(g);
    free(c);
}
END_TEST

/* ---- limits ---- */

START_TEST(context_can_be_filled_to_the_last_token)
{
    struct engine_config cfg = small(DEMO);
    cfg.max_context = 20;
    struct group *g = make(cfg, 2);
    struct hand h;
    hand_init(&h, 1);
    hand_admit(&h, 0);
    hand_admit(&h, 7);
    hand_prefill(&h, 0, 0, 20, true); /* samples the token after the last that fits */
    hand_prefill(&h, 7, 0, 19, true);
    ck_assert_uint_eq(must_step(g, &h).n_tokens, 2);
    hand_init(&h, 2);
    h.decode[h.plan.n_decode_slots++] = 7;
    ck_assert_uint_eq(must_step(g, &h).n_tokens, 1);
    struct engine_result r;
    struct status st = STATUS_INIT;
    for (uint32_t slot = 0; slot <= 7; slot += 7) {
        hand_init(&h, 3);
        h.decode[h.plan.n_decode_slots++] = slot;
        ck_assert_int_eq(group_step(g, &h.plan, &r, &st), ST_INVALID_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(st.message, "20 tokens and 1 more, expected at most 20"));
    }
    group_destroy(g);
}
END_TEST

START_TEST(options_out_of_range_are_refused)
{
    struct {
        struct engine_config cfg;
        uint32_t ranks;
        enum status_code code;
        const char *says;
    } cases[] = {
        {small(DEMO), 1, ST_INVALID_ARGUMENT, "max_context: 1025, expected at most 1024"},
        {small(DEMO), 1, ST_INVALID_ARGUMENT, "max_slots: 65537"},
        {small(DEMO), 1, ST_INVALID_ARGUMENT, "max_step_tokens: 65537"},
        {small(DEMO), 1, ST_INVALID_ARGUMENT, "kv_bytes: 4096"},
        {small(DEMO), 1, ST_INVALID_ARGUMENT, "page_bytes"},
        {small(DEMO), 65, ST_INVALID_ARGUMENT, "ranks: 65, expected 1 to 64"},
        {small(DEMO), 1, ST_INVALID_ARGUMENT, "threads"},
        {small("/nonexistent"), 2, ST_NOT_FOUND, "/nonexistent: no such folder"},
        {small(TEST_DATA), 2, ST_NOT_FOUND, "config.json"},
        {small(DEMO), 2, ST_UNIMPLEMENTED, "batch_invariant"},
        {small(DEMO), 2, ST_INVALID_ARGUMENT, "tune_ms: 600000, expected at most"},
    };
    cases[0].cfg.max_context = 1025;
    cases[1].cfg.max_slots = 65537;
    cases[2].cfg.max_step_tokens = 65537;
    cases[3].cfg.kv_bytes = 4096;
    cases[4].cfg.page_bytes = 5000;
    cases[6].cfg.threads = 1000000;
    cases[9].cfg.batch_invariant = true;
    cases[10].cfg.tune_ms = 600000;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct group *g = NULL;
        struct status st = STATUS_INIT;
        enum status_code rc = group_create(&g, &cases[i].cfg, cases[i].ranks, &st);
        ck_assert_msg(rc == cases[i].code && strstr(st.message, cases[i].says), "case %zu: %s, \"%s\"", i,
                      status_name(rc), st.message);
        ck_assert_ptr_null(g);
    }
    engine_destroy(NULL);
}
END_TEST

/* ---- faults ---- */

/* A group in a known state: step 1 done, slot 0 has 10 tokens and a sample, slot 1 has 4 and none, 2 was admitted only. */
static struct group *known_state(void)
{
    struct engine_config cfg = small(DEMO);
    cfg.max_context = 100;
    cfg.page_bytes = 4096;
    cfg.kv_bytes = 16 * 4096;
    struct group *g = make(cfg, 2);
    struct hand h;
    hand_init(&h, 1);
    hand_admit(&h, 0);
    hand_admit(&h, 1);
    hand_admit(&h, 2);
    hand_prefill(&h, 0, 0, 10, true);
    hand_prefill(&h, 1, 0, 4, false);
    must_step(g, &h);
    return g;
}

/* The plan that goes on from there. */
static uint32_t go_on(struct group *g)
{
    struct hand h;
    hand_init(&h, 2);
    h.decode[h.plan.n_decode_slots++] = 0;
    hand_prefill(&h, 1, 4, 3, true);
    hand_prefill(&h, 2, 0, 3, false);
    struct engine_result r = must_step(g, &h);
    ck_assert_uint_eq(r.n_tokens, 2);
    return r.tokens[0] << 16 | r.tokens[1];
}

static const char *spoil(int which, struct hand *h, enum status_code *code)
{
    hand_init(h, 2);
    h->decode[h->plan.n_decode_slots++] = 0; /* valid by itself: must not be carried out with the rest */
    *code = ST_INTERNAL;
    switch (which) {
    case 0:
        h->plan.step = 3;
        return "step 3, but the last one done is 1";
    case 1:
        h->plan.step = 1;
        return "step 1, but the last one done is 1";
    case 2:
        h->release[h->plan.n_release_slots++] = 5;
        return "release of slot 5: it is free";
    case 3:
        h->release[h->plan.n_release_slots++] = 1;
        h->release[h->plan.n_release_slots++] = 1;
        return "release of slot 1: named twice";
    case 4:
        hand_admit(h, 1);
        return "admission to slot 1: it is taken";
    case 5:
        hand_admit(h, 6);
        hand_admit(h, 6);
        return "admission to slot 6: named twice";
    case 6:
        h->decode[h->plan.n_decode_slots++] = 0;
        return "decode of slot 0: it has rows already";
    case 7:
        h->decode[h->plan.n_decode_slots++] = 1;
        return "decode of slot 1: it has no sampled token";
    case 8:
        h->decode[h->plan.n_decode_slots++] = 6;
        return "decode of slot 6: it was not admitted";
    case 9:
        h->release[h->plan.n_release_slots++] = 0;
        return "decode of slot 0: it was not admitted";
    case 10:
        hand_prefill(h, 1, 5, 3, false);
        return "prefill of slot 1: position 5, but the slot has 4 tokens";
    case 11:
        hand_prefill(h, 0, 10, 3, false);
        return "prefill of slot 0: it has rows already";
    case 12:
        hand_prefill(h, 6, 0, 3, false);
        return "prefill of slot 6: it was not admitted";
    case 13:
        hand_admit(h, 6);
        h->decode[h->plan.n_decode_slots++] = 6;
        return "decode of slot 6: it has no sampled token";
    case 14:
        h->release[h->plan.n_release_slots++] = 1;
        hand_admit(h, 1);
        hand_prefill(h, 1, 4, 3, false);
        return "prefill of slot 1: position 4, but the slot has 0 tokens";
    default:
        break;
    }
    *code = ST_INVALID_ARGUMENT;
    switch (which) {
    case 15:
        h->release[h->plan.n_release_slots++] = 8;
        return "release of slot 8, expected 0 to 7";
    case 16:
        hand_admit(h, 4000000000u);
        return "admission to slot 4000000000, expected 0 to 7";
    case 17:
        h->decode[h->plan.n_decode_slots++] = 8;
        return "decode of slot 8, expected 0 to 7";
    case 18:
        hand_prefill(h, 8, 0, 3, false);
        return "prefill of slot 8, expected 0 to 7";
    case 19:
        hand_prefill(h, 1, 4, 3, false);
        h->ids[2] = 2048;
        return "prefill of slot 1: token_ids[2]: 2048, expected 0 to 2047";
    case 20:
        hand_prefill(h, 1, 4, 0, false);
        return "prefill of slot 1: no tokens";
    case 21:
        hand_prefill(h, 1, 4, 65, false);
        return "prefill of slot 1: 65 tokens, expected at most 64";
    case 22:
        hand_prefill(h, 1, 4, 64, false); /* with the decode one too many */
        return "more than 64 rows";
    case 23:
        hand_admit(h, 6);
        h->params[0].temperature = -1;
        return "admission to slot 6: temperature: -1";
    case 24:
        hand_admit(h, 6);
        h->params[0].temperature = 1;
        h->params[0].top_p = 2;
        return "admission to slot 6: top_p: 2";
    default:
        *code = ST_RESOURCE_EXHAUSTED; /* 2048 and 1024 bytes a token: 67 tokens take 34 and 17 pages */
        hand_prefill(h, 1, 4, 63, false);
        return "KV pages needed, but the pool has 16";
    }
}

enum { SPOILED_PLANS = 26 };

START_TEST(wrong_plan_is_described_and_changes_nothing)
{
    struct group *g = known_state();
    uint32_t expected = go_on(g);
    group_destroy(g);

    g = known_state();
    struct hand h;
    enum status_code code;
    const char *says = spoil(_i, &h, &code);
    struct engine_result r;
    struct status st = STATUS_INIT;
    for (int again = 0; again < 2; again++) {
        enum status_code rc = group_step(g, &h.plan, &r, &st);
        ck_assert_msg(rc == code && strstr(st.message, says), "%s, \"%s\"; expected %s, \"%s\"", status_name(rc),
                      st.message, status_name(code), says);
    }
    ck_assert_uint_eq(go_on(g), expected);
    group_destroy(g);
}
END_TEST

/* ---- damaged folders ---- */

struct folder {
    struct temp_dir dir;
    char *config, *weights;
    size_t weight_bytes;
};

static struct folder copy_demo(void)
{
    struct folder f = {.dir = temp_dir_make()};
    f.config = temp_dir_read_file(DEMO "/config.json", NULL);
    f.weights = temp_dir_read_file(DEMO "/model.safetensors", &f.weight_bytes);
    temp_dir_write(&f.dir, "config.json", f.config, strlen(f.config));
    temp_dir_write(&f.dir, "model.safetensors", f.weights, f.weight_bytes);
    return f;
}

static void drop_folder(struct folder *f)
{
    temp_dir_remove(&f->dir);
    free(f->config);
    free(f->weights);
}

/* One text for another; of the same length where the file is not config.json, whose offsets would move. */
static void replace(struct folder *f, const char *file, const char *from, const char *to)
{
    bool config = strcmp(file, "config.json") == 0;
    const char *data = config ? f->config : f->weights;
    size_t bytes = config ? strlen(f->config) : f->weight_bytes;
    const char *at = memmem(data, bytes, from, strlen(from));
    ck_assert_msg(at != NULL, "%s has no %s", file, from);
    ck_assert(config || strlen(from) == strlen(to));
    size_t before = (size_t)(at - data), after = bytes - before - strlen(from);
    char *out = malloc(bytes + strlen(to));
    char *end = mempcpy(mempcpy(mempcpy(out, data, before), to, strlen(to)), at + strlen(from), after);
    temp_dir_write(&f->dir, file, out, (size_t)(end - out));
    free(out);
}

static void expect_refusal(const struct folder *f, enum status_code code, const char *says)
{
    for (uint32_t ranks = 1; ranks <= 3; ranks += 2) {
        struct group *g = NULL;
        struct status st = STATUS_INIT;
        struct engine_config cfg = small(f->dir.path);
        enum status_code rc = group_create(&g, &cfg, ranks, &st);
        ck_assert_msg(rc == code && strstr(st.message, says), "%s, \"%s\"; expected %s, \"%s\"", status_name(rc),
                      st.message, status_name(code), says);
    }
}

START_TEST(damaged_folder_is_described)
{
    struct folder f = copy_demo();
    static const struct {
        const char *file, *from, *to;
        enum status_code code;
        const char *says;
    } edits[] = {
        {"config.json", "\"hidden_size\": 192", "\"hidden_size\": 200", ST_DATA_LOSS,
         "tensor model.embed_tokens.weight: shape [2048, 192], expected [2048, 200] by the model's configuration"},
        {"config.json", "\"intermediate_size\": 512", "\"intermediate_size\": 511", ST_DATA_LOSS,
         "tensor model.layers.0.mlp.gate_proj.weight: shape [512, 192], expected [511, 192]"},
        {"config.json", "\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5", ST_DATA_LOSS,
         "tensor model.layers.4.input_layernorm.weight is missing"},
        {"config.json", "\"num_key_value_heads\": 3", "\"num_key_value_heads\": 2", ST_DATA_LOSS,
         "tensor model.layers.0.self_attn.k_proj.weight: shape [96, 192], expected [64, 192]"},
        {"config.json", "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", ST_DATA_LOSS,
         "tensor lm_head.weight is missing"},
        {"config.json", "LlamaForCausalLM", "GlimmForCausalLM", ST_UNIMPLEMENTED, "GlimmForCausalLM"},
        {"model.safetensors", "model.norm.weight", "model.norn.weight", ST_DATA_LOSS,
         "tensor model.norm.weight is missing"},
        {"model.safetensors", "\"BF16\"", "\"U16\" ", ST_UNIMPLEMENTED, "dtype U16 is not supported"},
        {"model.safetensors", "[2048,192]", "[192,2048]", ST_DATA_LOSS,
         "tensor model.embed_tokens.weight: shape [192, 2048], expected [2048, 192]"},
        {"model.safetensors", "[192]", "[191]", ST_DATA_LOSS, "do not fit data_offsets"},
    };
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        replace(&f, edits[i].file, edits[i].from, edits[i].to);
        expect_refusal(&f, edits[i].code, edits[i].says);
        temp_dir_write(&f.dir, "config.json", f.config, strlen(f.config));
        temp_dir_write(&f.dir, "model.safetensors", f.weights, f.weight_bytes);
    }
    temp_dir_write(&f.dir, "model.safetensors", f.weights, f.weight_bytes / 2);
    expect_refusal(&f, ST_DATA_LOSS, "truncated");
    drop_folder(&f);
}
END_TEST

struct meddler {
    char path[512];
    off_t cut; /* below 0: only touched */
    bool done;
};

static void meddle(void *ctx, uint64_t done_bytes, uint64_t total_bytes)
{
    struct meddler *m = ctx;
    (void)done_bytes;
    (void)total_bytes;
    if (m->done)
        return;
    m->done = true;
    const struct timespec past[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    ck_assert_int_eq(m->cut >= 0 ? truncate(m->path, m->cut) : utimensat(AT_FDCWD, m->path, past, 0), 0);
}

/* Another program writes to the file while it is mapped: without care a cut is a SIGBUS. */
START_TEST(file_that_changes_while_it_is_loaded_is_refused)
{
    static const struct {
        off_t cut;
        const char *says;
    } cases[] = {{0, "another program"}, {100000, "another program cuts"}, {-1, "another program changed it"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct folder f = copy_demo();
        struct meddler m = {.cut = cases[i].cut};
        snprintf(m.path, sizeof m.path, "%s/model.safetensors", f.dir.path);
        struct group *g;
        struct status st = STATUS_INIT;
        struct engine_config cfg = small(f.dir.path);
        cfg.progress = meddle;
        cfg.progress_ctx = &m;
        enum status_code rc = group_create(&g, &cfg, 1, &st);
        ck_assert_msg(rc == ST_DATA_LOSS && strstr(st.message, cases[i].says) && strstr(st.message, m.path), "%s: %s",
                      status_name(rc), st.message);
        drop_folder(&f);
    }
}
END_TEST

START_TEST(weights_that_are_no_numbers_end_the_step_with_the_row)
{
    struct folder f = copy_demo();
    /* the last tensor of the file is the final norm: 192 bf16 numbers */
    for (size_t i = 0; i < 2 * 192; i += 2)
        memcpy(f.weights + f.weight_bytes - 2 * 192 + i, (uint8_t[]){0xc0, 0x7f}, 2);
    temp_dir_write(&f.dir, "model.safetensors", f.weights, f.weight_bytes);
    for (uint32_t ranks = 1; ranks <= 2; ranks++)
        for (int sampled = 0; sampled < 2; sampled++) {
            struct group *g = make(small(f.dir.path), ranks);
            struct hand h;
            struct engine_result r;
            struct status st = STATUS_INIT;
            hand_init(&h, 1);
            hand_admit(&h, 2);
            h.params[0].temperature = sampled ? 1.0f : 0.0f;
            hand_prefill(&h, 2, 0, 6, true);
            ck_assert_int_eq(group_step(g, &h.plan, &r, &st), ST_INTERNAL);
            ck_assert_msg(strstr(st.message, "step 1: row 5:") && strstr(st.message, "NaN"), "%s", st.message);
            group_destroy(g);
        }
    drop_folder(&f);
}
END_TEST

static void add_cases(Suite *s)
{
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    tcase_add_loop_test(core, greedy_ids_are_right_for_every_number_of_ranks, 0,
                        sizeof rank_counts / sizeof *rank_counts);
    tcase_add_loop_test(core, sixty_four_requests_at_once_give_the_same_ids, 1, 3);
    tcase_add_test(core, tokens_one_row_at_a_time_are_the_same);
    tcase_add_test(core, sampled_ids_depend_on_the_seed_only);
    tcase_add_test(core, info_says_what_the_model_is);
    tcase_add_test(core, progress_grows_to_the_whole);
    tcase_add_test(core, pages_follow_the_slots);
    tcase_add_test(faults, what_the_machine_refuses_is_in_the_result);
    tcase_add_loop_test(core, the_pool_has_as_many_pages_as_the_plan_says, 1, 3);
    tcase_add_loop_test(core, the_pool_has_as_many_pages_as_the_plan_says, 8, 9);
    tcase_add_test(core, reset_forgets_everything);
    tcase_add_test(limits, context_can_be_filled_to_the_last_token);
    tcase_add_test(limits, options_out_of_range_are_refused);
    tcase_add_loop_test(faults, wrong_plan_is_described_and_changes_nothing, 0, SPOILED_PLANS);
    tcase_add_test(faults, damaged_folder_is_described);
    tcase_add_test(faults, file_that_changes_while_it_is_loaded_is_refused);
    tcase_add_test(faults, weights_that_are_no_numbers_end_the_step_with_the_row);
    tcase_set_timeout(core, 120);
    tcase_set_timeout(limits, 120);
    tcase_set_timeout(faults, 120);
    suite_add_tcase(s, core);
    suite_add_tcase(s, limits);
    suite_add_tcase(s, faults);
}

int main(void)
{
    Suite *s = suite_create("engine");
    add_cases(s);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
