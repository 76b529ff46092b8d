/* bench_worker - what a rank adds to a step beside engine_step: stream, queue, result.
 *
 *     bench_worker [RANKS]        (0: one rank without mpirun)
 *
 * The coordinator is played in this process over a unix socket; one sequence decodes the demo model, with one plan and
 * with two plans in flight. period: between results of rank 0; compute: what the rank measured around engine_step. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/worker_stub.h"
#include "worker/worker_internal.h"

#define STEPS 400
#define WARM  50

static struct stub stub;
static struct job job;

static void send_plan(uint64_t step, uint32_t ranks)
{
    static uint32_t slot = 0, prompt[] = {2046, 415, 424, 258, 393};
    Tandem__V1__SampleParams sample = TANDEM__V1__SAMPLE_PARAMS__INIT;
    Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT;
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT;
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    Tandem__V1__CoordinatorMessage m = TANDEM__V1__COORDINATOR_MESSAGE__INIT;
    Tandem__V1__AdmitSlot *admits = &admit;
    Tandem__V1__PrefillChunk *chunks = &chunk;
    sample.top_p = 1;
    admit.sample = &sample;
    chunk.token_ids = prompt;
    chunk.n_token_ids = sizeof prompt / sizeof *prompt;
    chunk.sample = true;
    plan.step = step;
    plan.admits = &admits;
    plan.prefills = &chunks;
    plan.decode_slots = &slot;
    plan.n_admits = plan.n_prefills = step == 1;
    plan.n_decode_slots = step > 1;
    m.epoch = stub.epoch;
    m.body_case = TANDEM__V1__COORDINATOR_MESSAGE__BODY_PLAN;
    m.plan = &plan;
    for (uint32_t r = 0; r < ranks; r++)
        stub_send(&stub, r, &m);
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void measure(uint32_t ranks, uint32_t in_flight)
{
    for (uint64_t step = 1; step <= STEPS; step++) {
        send_plan(step, ranks);
        if (step >= in_flight)
            stub_wait(&stub, ranks, stub_has_results, step - in_flight + 1, "results");
    }
    stub_wait(&stub, ranks, stub_has_results, STEPS, "results");
    static int64_t period[STEPS], compute[STEPS];
    size_t n = 0;
    for (unsigned i = WARM; i < STEPS; i++, n++) {
        struct stub_result x = stub_result(&stub, 0, i);
        period[n] = x.at_us - stub_result(&stub, 0, i - 1).at_us;
        compute[n] = (int64_t)x.compute_us;
    }
    qsort(period, n, sizeof *period, compare);
    qsort(compute, n, sizeof *compute, compare);
    printf("%u rank(s), %u in flight: period median %lld us, p99 %lld; compute median %lld us; added %lld us\n", ranks,
           in_flight, (long long)period[n / 2], (long long)period[n * 99 / 100], (long long)compute[n / 2],
           (long long)(period[n / 2] - compute[n / 2]));
}

static unsigned np;

START_TEST(steps)
{
    uint32_t ranks = np ? np : 1;
    char address[128];
    stub_init(&stub);
    job_make_dir(&job);
    snprintf(address, sizeof address, "unix:%s/s", job.dir);
    stub_start(&stub, address);
    job_start(&job, np, TEST_DATA "/demo-model", address, NULL);
    for (uint32_t in_flight = 1; in_flight <= 3; in_flight++) {
        stub_wait(&stub, ranks, stub_is_ready, stub.epoch, "ready");
        measure(ranks, in_flight);
        pthread_mutex_lock(&stub.lock);
        stub.epoch++;
        pthread_mutex_unlock(&stub.lock);
        for (uint32_t r = 0; r < ranks; r++)
            stub_drop(&stub, r);
    }
    stub_wait(&stub, ranks, stub_is_ready, stub.epoch, "ready");
    stub_shutdown(&stub, ranks, false);
    ck_assert_int_eq(job_wait(&job, 15000), 0);
    job_end(&job);
    stub_stop(&stub);
}
END_TEST

/* In a Check runner, as the stub reports with Check. */
int main(int argc, char **argv)
{
    np = argc > 1 ? (unsigned)atoi(argv[1]) : 0;
    if (np > STUB_RANKS) {
        fprintf(stderr, "bench_worker: at most %d ranks\n", STUB_RANKS);
        return 2;
    }
    Suite *s = suite_create("bench_worker");
    TCase *t = tcase_create("bench");
    tcase_add_test(t, steps);
    suite_add_tcase(s, t);
    SRunner *runner = srunner_create(s);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_MINIMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
