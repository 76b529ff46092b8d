/* check_engine_memory.c - an engine allocates when it is created and never in a step; and when an allocation fails, it
 * says so and leaves nothing behind. The allocator is ours here, so this suite is not built with a sanitizer. */
#include <check.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "worker/engine.h"

#define DEMO TEST_DATA "/demo-model"

/* ---- the C library's allocator, counted ---- */

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);

static atomic_long calls;        /* allocations so far */
static atomic_long live;         /* not freed yet */
static atomic_long fail_at = -1; /* the call that fails; -1: none */
static atomic_size_t least;      /* allocations below this are neither counted nor refused */

static void *counted(void *p)
{
    if (p)
        atomic_fetch_add(&live, 1);
    return p;
}

static int refused(size_t bytes)
{
    if (bytes < atomic_load(&least) || atomic_fetch_add(&calls, 1) != atomic_load(&fail_at))
        return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t n)
{
    return refused(n) ? NULL : counted(__libc_malloc(n));
}

void *calloc(size_t n, size_t size)
{
    return refused(n * size) ? NULL : counted(__libc_calloc(n, size));
}

void *realloc(void *p, size_t n)
{
    if (refused(n))
        return NULL;
    void *q = __libc_realloc(p, n);
    return p ? q : counted(q);
}

void *aligned_alloc(size_t align, size_t n)
{
    return refused(n) ? NULL : counted(__libc_memalign(align, n));
}

void free(void *p)
{
    if (p)
        atomic_fetch_sub(&live, 1);
    __libc_free(p);
}

/* ---- tests ---- */

static struct comm *make_comm(void)
{
    struct comm *c;
    ck_assert_int_eq(comm_create(&c, &(struct comm_config){.ops = &comm_ops_self}, NULL), ST_OK);
    return c;
}

/* How many allocations it made. */
static long run_step(struct engine *e, uint64_t step, uint32_t prompt, uint32_t decodes, float temperature)
{
    static uint32_t ids[512];
    Tandem__V1__StepPlan plan = TANDEM__V1__STEP_PLAN__INIT;
    Tandem__V1__SampleParams params = TANDEM__V1__SAMPLE_PARAMS__INIT;
    Tandem__V1__AdmitSlot admit = TANDEM__V1__ADMIT_SLOT__INIT, *admits[] = {&admit};
    Tandem__V1__PrefillChunk chunk = TANDEM__V1__PREFILL_CHUNK__INIT, *chunks[] = {&chunk};
    uint32_t slots[8];
    params.temperature = temperature;
    params.top_p = 0.9f;
    params.top_k = 100;
    admit.slot = chunk.slot = decodes;
    admit.sample = &params;
    chunk.token_ids = ids;
    chunk.n_token_ids = prompt;
    chunk.sample = true;
    plan.step = step;
    if (prompt) {
        plan.n_admits = plan.n_prefills = 1;
        plan.admits = admits;
        plan.prefills = chunks;
    }
    for (uint32_t i = 0; i < decodes; i++)
        slots[i] = i;
    plan.decode_slots = slots;
    plan.n_decode_slots = decodes;
    struct engine_result r;
    struct status st = STATUS_INIT;
    long before = atomic_load(&calls);
    enum status_code rc = engine_step(e, &plan, &r, &st);
    long made = atomic_load(&calls) - before;
    ck_assert_msg(rc == ST_OK, "%s", st.message);
    return made;
}

static long run_all_steps(struct engine *e)
{
    ck_assert_int_eq(engine_reset(e, NULL), ST_OK);
    uint64_t step = 0;
    long made = 0;
    for (uint32_t slot = 0; slot < 8; slot++)
        made += run_step(e, ++step, slot == 3 ? 500 : 5 + 20 * slot, slot, slot % 2 ? 0.7f : 0.0f);
    for (int i = 0; i < 20; i++)
        made += run_step(e, ++step, 0, 8, 0.0f);
    return made;
}

START_TEST(steps_allocate_nothing)
{
    struct comm *comm = make_comm();
    struct engine *e;
    struct engine_config cfg = {.model_dir = DEMO, .comm = comm, .threads = 2, .max_slots = 8};
    ck_assert_int_eq(engine_create(&e, &cfg, NULL), ST_OK);
    run_all_steps(e); /* the pool makes its book-keeping for a slot when that first grows, and keeps it */
    ck_assert_int_eq(run_all_steps(e), 0);
    engine_destroy(e);
    comm_destroy(comm);
}
END_TEST

/* Fails each allocation of at least `bytes` in turn. Returns how many were reported as RESOURCE_EXHAUSTED. */
static long fail_each(size_t bytes, bool strict)
{
    struct comm *comm = make_comm();
    struct engine_config cfg = {
        .model_dir = DEMO, .comm = comm, .threads = 1, .max_slots = 2, .max_context = 64, .max_step_tokens = 16};
    struct engine *e;
    ck_assert_int_eq(engine_create(&e, &cfg, NULL), ST_OK); /* what libraries allocate once and keep */
    engine_destroy(e);
    atomic_store(&least, bytes);
    long before = atomic_load(&calls), reported = 0;
    ck_assert_int_eq(engine_create(&e, &cfg, NULL), ST_OK);
    long total = atomic_load(&calls) - before;
    engine_destroy(e);
    for (long n = 0; n < total; n += n < 100 || total - n < 100 ? 1 : 7) {
        struct status st = STATUS_INIT;
        long kept = atomic_load(&live);
        atomic_store(&fail_at, atomic_load(&calls) + n);
        enum status_code rc = engine_create(&e, &cfg, &st);
        atomic_store(&fail_at, -1);
        if (rc == ST_OK) /* a library went on without, as stdio does without a buffer */
            engine_destroy(e);
        else
            ck_assert_msg(st.message[0] && (rc == ST_RESOURCE_EXHAUSTED || !strict), "allocation %ld of %ld: %s: %s", n,
                          total, status_name(rc), st.message);
        ck_assert_msg(atomic_load(&live) == kept, "allocation %ld of %ld: %ld left behind", n, total,
                      atomic_load(&live) - kept);
        reported += rc == ST_RESOURCE_EXHAUSTED;
    }
    comm_destroy(comm);
    return reported;
}

START_TEST(failed_allocation_is_reported_and_leaves_nothing)
{
    ck_assert_int_gt(fail_each(1024, true), 10);
}
END_TEST

/* jansson takes some failed allocations of its scanner for another text: any error will do, but nothing may leak. */
START_TEST(failed_small_allocation_leaves_nothing)
{
    ck_assert_int_gt(fail_each(0, false), 50);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine_memory");
    TCase *core = tcase_create("core"), *faults = tcase_create("faults");
    tcase_add_test(core, steps_allocate_nothing);
    tcase_add_test(faults, failed_allocation_is_reported_and_leaves_nothing);
    tcase_add_test(faults, failed_small_allocation_leaves_nothing);
    tcase_set_timeout(core, 60);
    tcase_set_timeout(faults, 120);
    suite_add_tcase(s, core);
    suite_add_tcase(s, faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
