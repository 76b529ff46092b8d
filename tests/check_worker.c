/* Real tandem-worker processes, under mpirun and alone, against a coordinator that the test plays (worker_stub.h).
 * CHECK_WORKER_LOG=1 prints what the processes wrote. */
#include <check.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/worker_stub.h"
#include "worker/worker_internal.h"

#define MODEL    TEST_DATA "/demo-model"
#define EXIT_MS  15000 /* for a job to end; the bounds inside sum up to about 4 s, the rest is a loaded machine */
#define MAX_IDS  128
#define ID_COUNT 32 /* of expected.json: margins there are larger than float rounding */

static struct stub stub;
static struct job job;

static void setup(void)
{
    stub_init(&stub);
    job_make_dir(&job);
}

static void teardown(void)
{
    job_end(&job);
    stub_stop(&stub);
}

/* ---- plans ---- */

struct ids {
    uint32_t n, id[MAX_IDS];
};

static void load_case(size_t index, struct ids *prompt, struct ids *greedy)
{
    json_error_t error;
    json_t *root = json_load_file(MODEL "/expected.json", 0, &error);
    ck_assert_msg(root, "%s", error.text);
    json_t *c = json_array_get(json_object_get(root, "cases"), index);
    json_t *p = json_object_get(c, "prompt_ids"), *g = json_object_get(c, "greedy_ids");
    prompt->n = (uint32_t)json_array_size(p);
    greedy->n = (uint32_t)json_array_size(g);
    ck_assert_uint_gt(prompt->n, 0);
    ck_assert_uint_le(prompt->n, MAX_IDS);
    ck_assert_uint_ge(greedy->n, ID_COUNT);
    ck_assert_uint_le(greedy->n, MAX_IDS);
    for (uint32_t i = 0; i < prompt->n; i++)
        prompt->id[i] = (uint32_t)json_integer_value(json_array_get(p, i));
    for (uint32_t i = 0; i < greedy->n; i++)
        greedy->id[i] = (uint32_t)json_integer_value(json_array_get(g, i));
    json_decref(root);
}

/* A plan of at most one admit, two prefills and two decodes. */
struct plan {
    Tandem__V1__StepPlan plan;
    Tandem__V1__AdmitSlot admit;
    Tandem__V1__AdmitSlot *admits[1];
    Tandem__V1__SampleParams sample;
    Tandem__V1__PrefillChunk chunk;
    Tandem__V1__PrefillChunk *chunks[1];
    uint32_t decodes[2], releases[2];
    Tandem__V1__CoordinatorMessage message;
};

static void plan_init(struct plan *p, uint64_t step)
{
    *p = (struct plan){.plan = TANDEM__V1__STEP_PLAN__INIT,
                       .admit = TANDEM__V1__ADMIT_SLOT__INIT,
                       .sample = TANDEM__V1__SAMPLE_PARAMS__INIT,
                       .chunk = TANDEM__V1__PREFILL_CHUNK__INIT,
                       .message = TANDEM__V1__COORDINATOR_MESSAGE__INIT};
    p->plan.step = step;
    p->plan.admits = p->admits;
    p->plan.prefills = p->chunks;
    p->plan.decode_slots = p->decodes;
    p->plan.release_slots = p->releases;
    p->message.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_PLAN;
    p->message.plan = &p->plan;
}

static void plan_prefill(struct plan *p, uint32_t slot, const struct ids *prompt, uint32_t from, uint32_t n)
{
    if (from == 0) {
        p->sample.top_p = 1;
        p->admit.slot = slot;
        p->admit.sample = &p->sample;
        p->admits[0] = &p->admit;
        p->plan.n_admits = 1;
    }
    p->chunk.slot = slot;
    p->chunk.position = from;
    p->chunk.token_ids = (uint32_t *)prompt->id + from;
    p->chunk.n_token_ids = n;
    p->chunk.sample = from + n == prompt->n;
    p->chunks[0] = &p->chunk;
    p->plan.n_prefills = 1;
}

static void plan_decode(struct plan *p, uint32_t slot)
{
    p->decodes[p->plan.n_decode_slots++] = slot;
}

static void plan_send(struct plan *p, uint32_t ranks)
{
    p->message.epoch = stub.epoch;
    for (uint32_t r = 0; r < ranks; r++)
        stub_send(&stub, r, &p->message);
}

/* Two sequences from step 1 on: the prompt of the first in chunks of two, the second's whole while the first decodes, then
 * both decode; each plan goes out before the result of the one before it is waited for. Checks ids and results. */
static void check_generation(uint32_t ranks)
{
    struct ids prompt[2], want[2];
    load_case(0, &prompt[0], &want[0]);
    load_case(1, &prompt[1], &want[1]);
    uint32_t got[2] = {0, 0};
    uint32_t order[STUB_STEPS][2], n_order[STUB_STEPS]; /* slots of the tokens of each step */
    uint64_t step = 0;
    uint32_t planned[2] = {0, 0}, filled = 0;
    while (planned[0] < ID_COUNT || planned[1] < ID_COUNT) {
        struct plan p;
        plan_init(&p, ++step);
        uint32_t n = 0;
        for (uint32_t s = 0; s < 2; s++) {
            if (planned[s] > 0) {
                plan_decode(&p, s);
                order[step - 1][n++] = s;
                planned[s]++;
            }
        }
        if (filled < prompt[0].n) {
            uint32_t take = prompt[0].n - filled < 2 ? prompt[0].n - filled : 2;
            plan_prefill(&p, 0, &prompt[0], filled, take);
            filled += take;
            if (filled == prompt[0].n)
                order[step - 1][n++] = 0, planned[0] = 1;
        } else if (planned[0] > 4 && planned[1] == 0) {
            plan_prefill(&p, 1, &prompt[1], 0, prompt[1].n);
            order[step - 1][n++] = 1, planned[1] = 1;
        }
        n_order[step - 1] = n;
        plan_send(&p, ranks);
        if (step > 1)
            stub_wait(&stub, ranks, stub_has_results, step - 1, "results");
    }
    stub_wait(&stub, ranks, stub_has_results, step, "last result");
    for (uint64_t i = 0; i < step; i++) {
        struct stub_result x = stub_result(&stub, 0, (unsigned)i);
        ck_assert_uint_eq(x.step, i + 1);
        ck_assert_uint_eq(x.n, n_order[i]);
        for (uint32_t k = 0; k < x.n; k++) {
            uint32_t s = order[i][k];
            if (got[s] < ID_COUNT)
                ck_assert_msg(x.tokens[k] == want[s].id[got[s]], "sequence %u, token %u: %u, expected %u", s, got[s],
                              x.tokens[k], want[s].id[got[s]]);
            got[s]++;
        }
        for (uint32_t r = 1; r < ranks; r++) {
            struct stub_result y = stub_result(&stub, r, (unsigned)i);
            ck_assert_uint_eq(y.step, i + 1);
            ck_assert_uint_eq(y.n, 0);
        }
    }
    stub_wait(&stub, ranks, stub_beats_at_step, step, "heartbeat with the last step");
}

static void start_stub(void)
{
    char address[128];
    snprintf(address, sizeof address, "unix:%s/s", job.dir);
    stub_start(&stub, address);
}

static void start_group(uint32_t ranks)
{
    if (!stub.server)
        start_stub();
    job_start(&job, ranks, MODEL, stub.address, NULL);
    stub_wait(&stub, ranks, stub_is_ready, stub.epoch, "all ranks ready");
}

/* Rank 0 enters step 1 and waits for rank 1, which has no plan. */
static void get_rank_0_stuck(void)
{
    struct ids prompt, unused;
    struct plan p;
    load_case(0, &prompt, &unused);
    plan_init(&p, 1);
    plan_prefill(&p, 0, &prompt, 0, prompt.n);
    plan_send(&p, 1);
    usleep(300000);
    ck_assert_uint_eq(stub_rank(&stub, 0).n_results, 0);
}

/* ---- core ---- */

START_TEST(ranks_generate_the_expected_ids)
{
    uint32_t ranks = (uint32_t)_i;
    if (ranks != 2)
        stub_start(&stub, "127.0.0.1:0");
    start_group(ranks);
    struct stub_rank first = stub_rank(&stub, 0);
    for (uint32_t i = 0; i < ranks; i++) {
        struct stub_rank r = stub_rank(&stub, i);
        ck_assert_uint_eq(r.protocol, RPC_WORKER_PROTOCOL);
        ck_assert_uint_eq(r.size, ranks);
        ck_assert_uint_ne(r.launch_id, 0);
        ck_assert_uint_eq(r.launch_id, first.launch_id);
        ck_assert_uint_eq(r.attached, 1);
        ck_assert_uint_eq(r.vocab_size, 2048);
        ck_assert_uint_eq(r.layers, 4);
        ck_assert_uint_eq(r.eos, 2047);
        ck_assert_uint_eq(r.bos, 2046);
        ck_assert_uint_gt(r.max_slots, 1);
        ck_assert_uint_gt(r.max_step_tokens, 1);
        ck_assert_uint_gt(r.total_pages, 0);
        ck_assert_uint_gt(r.page_bytes, 0);
    }
    stub_wait(&stub, ranks, stub_has_heartbeats, 3, "heartbeats of idle ranks");
    check_generation(ranks);
    stub_shutdown(&stub, ranks, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
    for (uint32_t i = 0; i < ranks; i++)
        ck_assert_uint_eq(stub_rank(&stub, i).foreign, 0);
}
END_TEST

START_TEST(one_rank_needs_no_mpirun)
{
    start_stub();
    job_start(&job, 0, MODEL, stub.address, NULL);
    stub_wait(&stub, 1, stub_is_ready, 1, "ready");
    check_generation(1);
    stub_shutdown(&stub, 1, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
}
END_TEST

START_TEST(a_timeline_has_every_step)
{
    char path[] = "/tmp/tandem-trace-XXXXXX";
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
    start_stub();
    const char *const extra[] = {"--trace", path, NULL};
    job_start(&job, 0, MODEL, stub.address, extra);
    stub_wait(&stub, 1, stub_is_ready, 1, "ready");
    check_generation(1);
    stub_shutdown(&stub, 1, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
    json_error_t error;
    json_t *all = json_load_file(path, 0, &error), *e;
    ck_assert_msg(all != NULL, "%s", error.text);
    size_t i, steps = 0, rows = 0;
    json_array_foreach(all, i, e)
    {
        ck_assert(json_number_value(json_object_get(e, "dur")) >= 0);
        if (strcmp(json_string_value(json_object_get(e, "tid")), "device") != 0)
            continue;
        steps++;
        rows += (size_t)json_integer_value(json_object_get(json_object_get(e, "args"), "rows"));
    }
    ck_assert_uint_gt(steps, 10);
    ck_assert_uint_ge(rows, steps);
    ck_assert_uint_gt(json_array_size(all), 3 * steps); /* each with a submission and a wait; the summary */
    json_decref(all);
    unlink(path);
}
END_TEST

START_TEST(shutdown_with_relaunch_ends_with_75)
{
    start_group(2);
    stub_shutdown(&stub, 2, true);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_RELAUNCH);
}
END_TEST

/* All plans and the Shutdown are sent before the first result is there. */
static void run_four_steps_and_stop(const struct ids *prompt)
{
    struct plan p;
    plan_init(&p, 1);
    plan_prefill(&p, 0, prompt, 0, prompt->n);
    plan_send(&p, 2);
    for (uint64_t step = 2; step <= 4; step++) {
        plan_init(&p, step);
        plan_decode(&p, 0);
        plan_send(&p, 2);
    }
    stub_shutdown(&stub, 2, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
}

START_TEST(plans_before_a_shutdown_are_run)
{
    struct ids prompt, want;
    load_case(0, &prompt, &want);
    start_group(2);
    run_four_steps_and_stop(&prompt);
    ck_assert_uint_eq(stub_rank(&stub, 0).n_results, 4);
    for (uint32_t i = 0; i < 4; i++)
        ck_assert_uint_eq(stub_result(&stub, 0, i).tokens[0], want.id[i]);
}
END_TEST

/* What the ranks have sent when they end is still on its way: they must not end before it has arrived. */
START_TEST(results_arrive_at_a_coordinator_that_is_slow)
{
    struct ids prompt, want;
    load_case(0, &prompt, &want);
    start_group(2);
    pthread_mutex_lock(&stub.lock);
    stub.slow_us = 40000;
    pthread_mutex_unlock(&stub.lock);
    run_four_steps_and_stop(&prompt);
    for (uint32_t rank = 0; rank < 2; rank++)
        ck_assert_uint_eq(stub_rank(&stub, rank).n_results, 4);
}
END_TEST

START_TEST(waits_for_a_coordinator_that_starts_late)
{
    char address[128];
    snprintf(address, sizeof address, "unix:%s/s", job.dir);
    job_start(&job, 2, MODEL, address, NULL);
    sleep(1);
    stub_start(&stub, address);
    stub_wait(&stub, 2, stub_is_ready, 1, "ready");
    stub_shutdown(&stub, 2, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
}
END_TEST

START_TEST(attaches_again_after_the_stream_broke)
{
    start_group(2);
    check_generation(2);
    uint64_t launch_id = stub_rank(&stub, 0).launch_id;
    uint32_t pid = stub_rank(&stub, 1).pid;
    pthread_mutex_lock(&stub.lock);
    stub.epoch = 7;
    pthread_mutex_unlock(&stub.lock);
    stub_drop(&stub, 0);
    stub_drop(&stub, 1);
    stub_wait(&stub, 2, stub_is_ready, 7, "ready again");
    struct stub_rank r = stub_rank(&stub, 1);
    ck_assert_uint_eq(r.launch_id, launch_id);
    ck_assert_uint_eq(r.pid, pid);
    ck_assert_uint_eq(r.attached, 2);
    ck_assert_uint_eq(r.loadings, 0);
    check_generation(2);
    stub_shutdown(&stub, 2, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
}
END_TEST

START_TEST(attaches_to_a_new_coordinator)
{
    start_group(2);
    stub_stop(&stub);
    usleep(300000);
    stub.epoch = 2;
    start_stub();
    stub_wait(&stub, 2, stub_is_ready, 2, "ready again");
    check_generation(2);
    stub_shutdown(&stub, 2, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
}
END_TEST

/* ---- limits ---- */

START_TEST(messages_of_another_epoch_are_dropped)
{
    stub.epoch = 5;
    start_group(1);
    struct ids prompt, unused;
    load_case(1, &prompt, &unused);
    static const uint64_t others[] = {0, 4, 6};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        struct plan p;
        plan_init(&p, 1);
        plan_prefill(&p, 0, &prompt, 0, prompt.n);
        p.message.epoch = others[i];
        stub_send(&stub, 0, &p.message);
    }
    stub.epoch = 4;
    stub_shutdown(&stub, 1, false);
    stub.epoch = 5;
    check_generation(1); /* starts at step 1 with slot 0: a plan that slipped through would be a fault */
    stub_shutdown(&stub, 1, false);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_OK);
}
END_TEST

START_TEST(plans_that_run_too_far_ahead_end_the_group)
{
    start_group(2);
    get_rank_0_stuck();
    for (uint64_t step = 2; step <= WORKER_QUEUE_MAX + 2; step++) {
        struct plan p;
        plan_init(&p, step);
        plan_decode(&p, 0);
        plan_send(&p, 1);
    }
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_RELAUNCH);
    ck_assert(job_log_has(&job, "plans ahead"));
}
END_TEST

START_TEST(no_coordinator_ends_with_75_in_time)
{
    char address[128];
    snprintf(address, sizeof address, "unix:%s/nobody", job.dir);
    const char *const extra[] = {"--attach-timeout-ms", "700", NULL};
    job_start(&job, 0, MODEL, address, extra);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_RELAUNCH);
    ck_assert(job_log_has(&job, "--attach-timeout-ms"));
}
END_TEST

START_TEST(command_line_errors_are_one_line_and_status_2)
{
    static const struct {
        const char *option, *value, *text;
    } table[] = {
        {"--frobnicate", "1", "tandem-worker: unknown option --frobnicate: see tandem-worker --help"},
        {"--max-slots", "0", "tandem-worker: --max-slots: \"0\" is not a number from 1 to 65536"},
        {"--kv-memory", "lots", "tandem-worker: --kv-memory: \"lots\" is not a size"},
        {"--memory-fraction", "90",
         "tandem-worker: --memory-fraction: \"90\" is not a fraction from 0.01 to 1, such as 0.9"},
        {"--backend", "tpu", "tandem-worker: --backend: \"tpu\" is none of: auto, cuda, host"},
        {"--trace-kernels", "yes", "tandem-worker: --trace-kernels: \"yes\" is not a number from 0 to 1"},
        {"--trace-kernels", "1", "tandem-worker: --trace-kernels 1: also give the file, --trace FILE"},
    };
    const char *const extra[] = {table[_i].option, table[_i].value, NULL};
    job_start(&job, 0, MODEL, "127.0.0.1:1", extra);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_USAGE);
    ck_assert_msg(job_log_has(&job, table[_i].text), "%s", table[_i].text);
}
END_TEST

static enum status_code parse(struct worker_options *o, const char *name, const char *value)
{
    const char *const argv[] = {"tandem-worker", "--model", "m", "--coordinator", "h:1", name, value};
    enum worker_action action;
    return worker_options_parse(o, &action, value ? 7 : 6, (char **)argv, NULL);
}

START_TEST(sizes_and_numbers_are_read_exactly)
{
    struct worker_options o;
    static const struct {
        const char *text;
        uint64_t bytes; /* 0: refused */
    } sizes[] = {
        {"1", 1},           {"4096", 4096},
        {"64k", 65536},     {"512M", 512ull << 20},
        {"2G", 2ull << 30}, {"2GiB", 2ull << 30},
        {"1T", 1ull << 40}, {"16777215T", 16777215ull << 40},
        {"16777216T", 0},   {"18446744073709551616", 0},
        {"0", 0},           {"", 0},
        {"-1", 0},          {" 1", 0},
        {"1.5G", 0},        {"1GG", 0},
        {"1GiBs", 0},       {"1X", 0},
        {"G", 0},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        enum status_code rc = parse(&o, "--kv-memory", sizes[i].text);
        ck_assert_msg(rc == (sizes[i].bytes ? ST_OK : ST_INVALID_ARGUMENT), "\"%s\"", sizes[i].text);
        if (sizes[i].bytes)
            ck_assert_uint_eq(o.kv_bytes, sizes[i].bytes);
    }
    static const struct {
        const char *text;
        double value; /* 0: refused */
    } fractions[] = {
        {"0.9", 0.9}, {"1", 1},   {"1.0", 1},  {"0.05", 0.05}, {"00.5", 0.5}, {"0.01", 0.01}, {"0.0099", 0},
        {"0", 0},     {"0.0", 0}, {"1.01", 0}, {"2", 0},       {"-0.5", 0},   {"0.9 ", 0},    {"0,9", 0},
        {"9e-1", 0},  {".9", 0},  {"1.", 0},   {"0.9.", 0},    {"", 0},       {"nan", 0},
    };
    for (size_t i = 0; i < sizeof fractions / sizeof *fractions; i++) {
        enum status_code rc = parse(&o, "--memory-fraction", fractions[i].text);
        ck_assert_msg(rc == (fractions[i].value > 0 ? ST_OK : ST_INVALID_ARGUMENT), "\"%s\"", fractions[i].text);
        if (fractions[i].value > 0)
            ck_assert_double_eq_tol(o.memory_fraction, fractions[i].value, 1e-15);
    }
    ck_assert_int_eq(parse(&o, "--threads", "1024"), ST_OK);
    ck_assert_uint_eq(o.threads, 1024);
    ck_assert_int_eq(parse(&o, "--threads=7", NULL), ST_OK);
    ck_assert_uint_eq(o.threads, 7);
    ck_assert_int_eq(parse(&o, "--threads", "1025"), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(parse(&o, "--threads", "4294967297"), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(parse(&o, "--threads", NULL), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(parse(&o, "--thread", "1"), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(parse(&o, "stray", NULL), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(parse(&o, "--log-level", "debug"), ST_OK);
    ck_assert_uint_eq(o.log_level, WORKER_LOG_DEBUG);
    ck_assert_int_eq(parse(&o, "--all-reduce", "nccl"), ST_OK);
    ck_assert_uint_eq(o.all_reduce, 2);
    ck_assert_int_eq(parse(&o, "--all-reduce", "ring"), ST_INVALID_ARGUMENT);
    ck_assert_int_eq(parse(&o, "--progress", "lines"), ST_OK);
    ck_assert_uint_eq(o.progress, WORKER_PROGRESS_LINES);
    static const char *const addresses[] = {"host", "host:", ":1", "h:0", "h:65536", "unix:", "h:1x"};
    for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++)
        ck_assert_msg(parse(&o, "--coordinator", addresses[i]) == ST_INVALID_ARGUMENT, "%s", addresses[i]);
    ck_assert_int_eq(parse(&o, "--coordinator", "[::1]:50052"), ST_OK);
    ck_assert_str_eq(o.coordinator, "[::1]:50052");
}
END_TEST

/* ---- faults ---- */

START_TEST(bad_model_is_a_permanent_fault)
{
    start_stub();
    job_start(&job, 2, TEST_DATA "/no-such-model", stub.address, NULL);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_PERMANENT);
    struct stub_rank a = stub_rank(&stub, 0), b = stub_rank(&stub, 1);
    ck_assert_msg(a.faulted || b.faulted, "no Fault came");
    const struct stub_rank *r = a.faulted ? &a : &b;
    ck_assert(r->fault_permanent);
    ck_assert_uint_eq(r->fault_code, ST_NOT_FOUND);
    ck_assert_msg(strstr(r->fault, "no-such-model"), "%s", r->fault);
}
END_TEST

START_TEST(cuda_where_there_is_none_is_a_permanent_fault)
{
    const char *const extra[] = {"--backend", "cuda", NULL};
    start_stub();
    job_start(&job, 0, MODEL, stub.address, extra);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_PERMANENT);
    struct stub_rank r = stub_rank(&stub, 0);
    ck_assert(r.faulted);
    ck_assert(r.fault_permanent);
    ck_assert_msg(strncmp(r.fault, "--backend cuda: ", 16) == 0, "%s", r.fault);
}
END_TEST

START_TEST(kernels_of_a_host_are_refused)
{
    char path[160];
    snprintf(path, sizeof path, "%s/trace", job.dir);
    const char *const extra[] = {"--trace", path, "--trace-kernels", "1", NULL};
    const char *const argv[] = {"tandem-worker",   "--model", "m",         "--coordinator", "h:1", "--trace", path,
                                "--trace-kernels", "1",       "--backend", "host"};
    struct worker_options o;
    enum worker_action action;
    struct status st = STATUS_INIT;
    ck_assert_int_eq(worker_options_parse(&o, &action, 9, (char **)argv, &st), ST_OK);
    ck_assert_uint_eq(o.trace_kernels, 1);
    ck_assert_int_eq(worker_options_parse(&o, &action, 11, (char **)argv, &st), ST_INVALID_ARGUMENT);
    ck_assert_str_eq(st.message, "--trace-kernels 1: --backend host has none, expected cuda or auto");
    ck_assert_int_eq(setenv("CUDA_VISIBLE_DEVICES", "", 1), 0); /* whatever is here */
    start_stub();
    job_start(&job, 0, MODEL, stub.address, extra);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_PERMANENT);
    struct stub_rank r = stub_rank(&stub, 0);
    ck_assert(r.faulted);
    ck_assert(r.fault_permanent);
    ck_assert_msg(strncmp(r.fault, "--trace-kernels: ", 17) == 0, "%s", r.fault);
    unlink(path);
}
END_TEST

START_TEST(memory_that_is_not_there_now_is_no_permanent_fault)
{
    const char *const extra[] = {"--kv-memory", "8T", "--page-size", "2M", NULL};
    start_stub();
    job_start(&job, 0, MODEL, stub.address, extra);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_RELAUNCH);
    struct stub_rank r = stub_rank(&stub, 0);
    ck_assert(r.faulted);
    ck_assert(!r.fault_permanent);
    ck_assert_uint_eq(r.fault_code, ST_RESOURCE_EXHAUSTED);
}
END_TEST

START_TEST(impossible_plan_is_a_fault_and_75)
{
    start_group(2);
    struct plan p;
    plan_init(&p, 1);
    plan_decode(&p, 3); /* never admitted */
    plan_send(&p, 2);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_RELAUNCH);
    struct stub_rank a = stub_rank(&stub, 0), b = stub_rank(&stub, 1);
    ck_assert(a.faulted || b.faulted);
    const struct stub_rank *r = a.faulted ? &a : &b;
    ck_assert(!r->fault_permanent);
    ck_assert_msg(strstr(r->fault, "step 1: "), "%s", r->fault);
}
END_TEST

START_TEST(refusal_for_good_ends_with_1)
{
    stub.deny = (struct status){ST_INVALID_ARGUMENT, "Hello.protocol: 1, expected 2"};
    start_stub();
    job_start(&job, 0, MODEL, stub.address, NULL);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_PERMANENT);
    ck_assert(job_log_has(&job, "expected 2"));
}
END_TEST

START_TEST(refusal_for_now_is_tried_again)
{
    stub.deny = (struct status){ST_ALREADY_EXISTS, "another group is attached"};
    start_stub();
    job_start(&job, 0, MODEL, stub.address, NULL);
    sleep(1);
    pthread_mutex_lock(&stub.lock);
    stub.deny.code = ST_OK;
    pthread_mutex_unlock(&stub.lock);
    stub_wait(&stub, 1, stub_is_ready, 1, "ready");
}
END_TEST

START_TEST(killed_rank_ends_the_job)
{
    bool in_step = _i;
    start_group(2);
    if (in_step)
        get_rank_0_stuck();
    kill((pid_t)stub_rank(&stub, 1).pid, SIGKILL);
    ck_assert_int_ne(job_wait(&job, EXIT_MS), 0);
    stub_wait(&stub, 2, stub_is_gone, 0, "both streams ended");
}
END_TEST

START_TEST(stuck_step_ends_with_75_when_the_stream_breaks)
{
    start_group(2);
    get_rank_0_stuck();
    stub_stop(&stub);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_RELAUNCH);
    ck_assert(job_log_has(&job, "did not end within"));
}
END_TEST

START_TEST(shutdown_frees_a_stuck_step)
{
    bool relaunch = _i;
    start_group(2);
    get_rank_0_stuck();
    stub_shutdown(&stub, 2, relaunch);
    int code = job_wait(&job, EXIT_MS);
    if (relaunch)
        ck_assert_int_eq(code, WORKER_EXIT_RELAUNCH);
}
END_TEST

START_TEST(sigterm_ends_the_job)
{
    start_group(2);
    kill(job.pid, SIGTERM); /* mpirun hands it on */
    ck_assert_int_ne(job_wait(&job, EXIT_MS), 0);
    stub_wait(&stub, 2, stub_is_gone, 0, "both streams ended");
}
END_TEST

START_TEST(sigterm_to_one_rank_names_the_signal)
{
    bool stuck = _i;
    start_group(2);
    if (stuck)
        get_rank_0_stuck();
    kill((pid_t)stub_rank(&stub, 0).pid, SIGTERM);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), WORKER_EXIT_SIGNAL + SIGTERM);
    ck_assert(job_log_has(&job, "tandem-worker[0] I Terminated: ending"));
    ck_assert(job_log_has(&job, "tandem-worker[0] I ending with status 143"));
}
END_TEST

/* Gone, or waiting to be reaped. */
static bool is_dead(pid_t pid)
{
    char path[64], line[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f)
        return true;
    const char *after = fgets(line, sizeof line, f) ? strrchr(line, ')') : NULL;
    fclose(f);
    return !after || after[2] == 'Z' || after[2] == 'X';
}

START_TEST(ranks_die_with_a_killed_mpirun)
{
    start_group(2);
    pid_t pids[2] = {(pid_t)stub_rank(&stub, 0).pid, (pid_t)stub_rank(&stub, 1).pid};
    kill(job.pid, SIGKILL);
    ck_assert_int_eq(job_wait(&job, EXIT_MS), 128 + SIGKILL);
    for (int i = 0; i < 200 && !(is_dead(pids[0]) && is_dead(pids[1])); i++)
        usleep(10000);
    ck_assert(is_dead(pids[0]) && is_dead(pids[1]));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("worker");
    TCase *core = tcase_create("core"), *limits = tcase_create("limits"), *faults = tcase_create("faults");
    TCase *cases[] = {core, limits, faults};
    for (size_t i = 0; i < 3; i++) {
        tcase_add_checked_fixture(cases[i], setup, teardown);
        tcase_set_timeout(cases[i], 90);
        suite_add_tcase(s, cases[i]);
    }
    tcase_add_loop_test(core, ranks_generate_the_expected_ids, 1, 4);
    tcase_add_test(core, one_rank_needs_no_mpirun);
    tcase_add_test(core, a_timeline_has_every_step);
    tcase_add_test(core, shutdown_with_relaunch_ends_with_75);
    tcase_add_test(core, plans_before_a_shutdown_are_run);
    tcase_add_test(core, results_arrive_at_a_coordinator_that_is_slow);
    tcase_add_test(core, waits_for_a_coordinator_that_starts_late);
    tcase_add_test(core, attaches_again_after_the_stream_broke);
    tcase_add_test(core, attaches_to_a_new_coordinator);
    tcase_add_test(limits, messages_of_another_epoch_are_dropped);
    tcase_add_test(limits, plans_that_run_too_far_ahead_end_the_group);
    tcase_add_test(limits, no_coordinator_ends_with_75_in_time);
    tcase_add_loop_test(limits, command_line_errors_are_one_line_and_status_2, 0, 7);
    tcase_add_test(limits, sizes_and_numbers_are_read_exactly);
    tcase_add_test(faults, bad_model_is_a_permanent_fault);
    tcase_add_test(faults, cuda_where_there_is_none_is_a_permanent_fault);
    tcase_add_test(faults, kernels_of_a_host_are_refused);
    tcase_add_test(faults, memory_that_is_not_there_now_is_no_permanent_fault);
    tcase_add_test(faults, impossible_plan_is_a_fault_and_75);
    tcase_add_test(faults, refusal_for_good_ends_with_1);
    tcase_add_test(faults, refusal_for_now_is_tried_again);
    tcase_add_loop_test(faults, killed_rank_ends_the_job, 0, 2);
    tcase_add_test(faults, stuck_step_ends_with_75_when_the_stream_breaks);
    tcase_add_loop_test(faults, shutdown_frees_a_stuck_step, 0, 2);
    tcase_add_test(faults, sigterm_ends_the_job);
    tcase_add_loop_test(faults, sigterm_to_one_rank_names_the_signal, 0, 2);
    tcase_add_test(faults, ranks_die_with_a_killed_mpirun);
    SRunner *runner = srunner_create(s);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
