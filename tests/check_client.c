/* check_client.c - proto/tandem_client.h against the real coordinator, with ranks that compute nothing (coord_fake.h). */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/tandem_client.h"
#include "tests/client_attach.h"
#include "tests/coord_ask.h"

#define OK(expr)                                                                                                       \
    do {                                                                                                               \
        struct status st_ = STATUS_INIT;                                                                               \
        struct status *st = &st_;                                                                                      \
        enum status_code rc_ = (expr);                                                                                 \
        ck_assert_msg(rc_ == ST_OK, "%s: %s %s", #expr, status_name(rc_), st_.message);                                \
    } while (0)

/* ---- allocations that fail: the linker sends calloc and strdup of our own code here ---- */

static long fail_at = -1; /* below 0: none */

void *__real_calloc(size_t n, size_t each);
char *__real_strdup(const char *s);
void *__wrap_calloc(size_t n, size_t each);
char *__wrap_strdup(const char *s);

static bool fails(void)
{
    return fail_at >= 0 && fail_at-- == 0;
}

void *__wrap_calloc(size_t n, size_t each)
{
    return fails() ? NULL : __real_calloc(n, each);
}

char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}

/* ---- */

static struct tandem_client *open_client(const char *address)
{
    struct tandem_client *c;
    struct tandem_client_options options = {.address = address};
    OK(tandem_client_open(&c, &options, st));
    return c;
}

struct heard {
    uint32_t n_ids, n_messages, stop_after; /* stop_after messages; 0: never */
    uint32_t ids[2048];
    bool finished;
    char name[160];
};

static bool hear(void *ctx, const Tandem__V1__GenerateResponse *m)
{
    struct heard *h = ctx;
    ck_assert(!h->finished);
    for (size_t i = 0; i < m->n_token_ids; i++)
        h->ids[h->n_ids++] = m->token_ids[i];
    if (m->request_id.len)
        snprintf(h->name, sizeof h->name, "%.*s", (int)m->request_id.len, (const char *)m->request_id.data);
    h->finished = m->finish != NULL;
    return ++h->n_messages != h->stop_after;
}

START_TEST(callback_gets_every_token)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct tandem_client *c = open_client(p.address);
    struct ask a;
    struct heard h = {0};
    ask_ids(&a, 50, 9, 40);
    ask_name(&a, "call.1");
    OK(tandem_client_generate(c, &a.m, 0, hear, &h, st));
    ck_assert(h.finished);
    ck_assert_str_eq(h.name, "call.1");
    ck_assert_uint_eq(h.n_ids, 40);
    for (uint32_t i = 0; i < 40; i++)
        ck_assert_uint_eq(h.ids[i], fake_token(9, 50 + i, 2048));
    /* The caller has heard enough: the server's slot is free again. */
    struct heard some = {.stop_after = 2};
    struct status got = STATUS_INIT;
    ask_ids(&a, 50, 9, 900);
    ck_assert_int_eq(tandem_client_generate(c, &a.m, 0, hear, &some, &got), ST_CANCELLED);
    ck_assert_uint_eq(some.n_messages, 2);
    ck_assert(wait_running(&p, 0, 0));
    tandem_client_close(c);
    finish(&p, g);
}
END_TEST

static void *cancel_soon(void *generation)
{
    usleep(50000);
    tandem_generation_cancel(generation);
    return NULL;
}

START_TEST(iterator_waits_in_steps_and_is_cancelled_from_elsewhere)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct tandem_client *c = open_client(p.address);
    struct tandem_generation *run;
    const Tandem__V1__GenerateResponse *m = NULL;
    struct status got = STATUS_INIT;
    struct ask a;
    bool late = false;
    fake_group_mood(g, 0, FAKE_HOLD);
    fake_group_mood(g, 1, FAKE_HOLD);
    ask_ids(&a, 10, 3, 100);
    OK(tandem_generation_open(&run, c, 0, st));
    tandem_generation_send(run, &a.m);
    ck_assert_int_eq(tandem_generation_next(run, &m, 30, &late, &got), ST_DEADLINE_EXCEEDED);
    ck_assert(late);
    pthread_t thread;
    pthread_create(&thread, NULL, cancel_soon, run);
    ck_assert_int_eq(tandem_generation_next(run, &m, WAIT_MS, &late, &got), ST_CANCELLED);
    ck_assert(!late);
    pthread_join(thread, NULL);
    tandem_generation_close(run);
    fake_group_mood(g, 0, FAKE_WELL);
    fake_group_mood(g, 1, FAKE_WELL);
    ck_assert(wait_running(&p, 0, 0));
    /* Cancelled before it was sent. */
    OK(tandem_generation_open(&run, c, 0, st));
    tandem_generation_cancel(run);
    tandem_generation_send(run, &a.m);
    ck_assert_int_eq(tandem_generation_next(run, &m, WAIT_MS, NULL, &got), ST_CANCELLED);
    tandem_generation_close(run);
    tandem_client_close(c);
    finish(&p, g);
}
END_TEST

START_TEST(questions_are_answered)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct tandem_client *c = open_client(p.address);
    struct status got = STATUS_INIT;
    Tandem__V1__ServerInfo *info;
    Tandem__V1__ModelInfo *model;
    Tandem__V1__Load *load;
    bool serving = false;
    OK(tandem_client_health(c, NULL, &serving, st));
    ck_assert(serving);
    OK(tandem_client_health(c, "", &serving, st));
    ck_assert(serving);
    ck_assert_int_eq(tandem_client_health(c, "no.Such", &serving, &got), ST_NOT_FOUND);
    OK(tandem_client_server_info(c, &info, st));
    ck_assert_uint_eq(info->tensor_parallel_size, 2);
    ck_assert_uint_eq(info->n_ranks, 2);
    tandem_free(info);
    OK(tandem_client_model_info(c, &model, st));
    ck_assert_uint_eq(model->vocab_size, 2048);
    tandem_free(model);
    OK(tandem_client_load(c, &load, st));
    ck_assert_uint_eq(load->total_slots, 8);
    tandem_free(load);
    ck_assert_int_eq(tandem_client_abort(c, (const char *const[]){"nobody"}, 1, &got), ST_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(got.message, "nobody"));
    ck_assert_int_eq(tandem_client_abort(c, NULL, 0, &got), ST_INVALID_ARGUMENT);
    tandem_client_close(c);
    finish(&p, g);
}
END_TEST

static void refused(struct tandem_client *c, const struct ask *a, uint64_t deadline_ms, enum status_code code,
                    const char *part)
{
    struct heard h = {0};
    struct status got = STATUS_INIT;
    ck_assert_int_eq(tandem_client_generate(c, &a->m, deadline_ms, hear, &h, &got), code);
    ck_assert_msg(strstr(got.message, part), "\"%s\" not in: %s", part, got.message);
}

START_TEST(refusals_name_their_field)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, (const char *const[]){"--max-message-bytes", "4096", NULL});
    struct tandem_client *c = open_client(p.address);
    struct ask a;
    ask_ids(&a, 10, 3, 10);
    a.m.model = (ProtobufCBinaryData){5, (uint8_t *)"other"};
    refused(c, &a, 0, ST_NOT_FOUND, "model");
    ask_ids(&a, 10, 3, 10);
    a.sampling.temperature_is_case = TANDEM__V1__SAMPLING__TEMPERATURE_IS_TEMPERATURE;
    a.sampling.temperature = -1;
    refused(c, &a, 0, ST_INVALID_ARGUMENT, "sampling.temperature");
    char *big = calloc(1, 5001);
    memset(big, 'x', 5000);
    ask_text(&a, big, 10);
    refused(c, &a, 0, ST_RESOURCE_EXHAUSTED, "4096");
    free(big);
    fake_group_mood(g, 0, FAKE_HOLD);
    fake_group_mood(g, 1, FAKE_HOLD);
    ask_ids(&a, 10, 3, 10);
    refused(c, &a, 60, ST_DEADLINE_EXCEEDED, "");
    fake_group_mood(g, 0, FAKE_WELL);
    fake_group_mood(g, 1, FAKE_WELL);
    tandem_client_close(c);
    finish(&p, g);
}
END_TEST

START_TEST(no_server_no_ranks_and_a_server_that_dies)
{
    struct proc p;
    struct ask a;
    struct status got = STATUS_INIT;
    bool serving;
    struct tandem_client *c = open_client("127.0.0.1:1");
    ck_assert_int_eq(tandem_client_health(c, NULL, &serving, &got), ST_UNAVAILABLE);
    ck_assert_msg(strncmp(got.message, "127.0.0.1:1: ", 13) == 0, "%s", got.message);
    tandem_client_close(c);

    start(&p, NULL); /* no group: try again later, says the server */
    c = open_client(p.address);
    struct tandem_generation *run;
    const Tandem__V1__GenerateResponse *m;
    ask_ids(&a, 10, 3, 10);
    OK(tandem_generation_open(&run, c, 0, st));
    tandem_generation_send(run, &a.m);
    ck_assert_int_eq(tandem_generation_next(run, &m, WAIT_MS, NULL, &got), ST_UNAVAILABLE);
    ck_assert_uint_gt(tandem_generation_retry_after_ms(run), 0);
    tandem_generation_close(run);

    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = fake_group_start(p.control, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    fake_group_mood(g, 0, FAKE_HOLD);
    fake_group_mood(g, 1, FAKE_HOLD);
    OK(tandem_generation_open(&run, c, 0, st));
    tandem_generation_send(run, &a.m);
    ck_assert(wait_live(&p, 1));
    kill(p.pid, SIGKILL);
    ck_assert_int_eq(tandem_generation_next(run, &m, WAIT_MS, NULL, &got), ST_UNAVAILABLE);
    ck_assert_uint_eq(tandem_generation_retry_after_ms(run), 0);
    tandem_generation_close(run);
    tandem_client_close(c);
    fake_group_stop(g);
    proc_end(&p, 0, WAIT_MS);
}
END_TEST

START_TEST(bad_options_are_named)
{
    static const struct {
        struct tandem_client_options options;
        enum status_code code;
        const char *part;
    } cases[] = {
        {{.address = "nonsense"}, ST_INVALID_ARGUMENT, "nonsense"},
        {{.address = "unix:"}, ST_INVALID_ARGUMENT, "unix:"},
        {{.tls_ca = "/no/such.pem"}, ST_NOT_FOUND, "tls-ca /no/such.pem"},
        {{.tls_cert = "/no/such.pem"}, ST_INVALID_ARGUMENT, "tls-key: not given"},
        {{.tls_key = "/no/such.pem"}, ST_INVALID_ARGUMENT, "tls-cert: not given"},
        {{.token_file = "/no/such"}, ST_NOT_FOUND, "token-file /no/such"},
        {{.token_file = "/no/such", .address = "10.1.2.3:4"}, ST_INVALID_ARGUMENT, "in the clear"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tandem_client *c = NULL;
        struct status got = STATUS_INIT;
        ck_assert_int_eq(tandem_client_open(&c, &cases[i].options, &got), cases[i].code);
        ck_assert_msg(strstr(got.message, cases[i].part), "\"%s\" not in: %s", cases[i].part, got.message);
        ck_assert_ptr_null(c);
    }
}
END_TEST

START_TEST(every_allocation_may_fail)
{
    struct tandem_client_options options = {.address = "localhost:1", .tls_server_name = "x", .tls = true};
    long n = 0;
    for (bool done = false; !done; n++) {
        struct tandem_client *c = NULL;
        struct status got = STATUS_INIT;
        fail_at = n;
        enum status_code rc = tandem_client_open(&c, &options, &got);
        done = fail_at >= 0; /* it was not reached */
        fail_at = -1;
        ck_assert_int_eq(rc, done ? ST_OK : ST_RESOURCE_EXHAUSTED);
        tandem_client_close(c);
    }
    ck_assert_int_ge(n, 5);
}
END_TEST

static TCase *add_case(Suite *s, const char *name)
{
    TCase *c = tcase_create(name);
    tcase_set_timeout(c, 120);
    suite_add_tcase(s, c);
    return c;
}

int main(void)
{
    Suite *s = suite_create("client");
    TCase *core = add_case(s, "core");
    tcase_add_test(core, callback_gets_every_token);
    tcase_add_test(core, iterator_waits_in_steps_and_is_cancelled_from_elsewhere);
    tcase_add_test(core, questions_are_answered);
    TCase *limits = add_case(s, "limits");
    tcase_add_test(limits, refusals_name_their_field);
    tcase_add_test(limits, bad_options_are_named);
    TCase *faults = add_case(s, "faults");
    tcase_add_test(faults, no_server_no_ranks_and_a_server_that_dies);
    tcase_add_test(faults, every_allocation_may_fail);
    client_attach(faults);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
