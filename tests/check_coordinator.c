/* The real tandem-coordinator as a child process, a worker group without a model (coord_fake.h), clients over gRPC. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "coordinator/tokenizer.h"
#include "grpc/health/v1/health.pb-c.h"
#include "tests/coord_ask.h"

static bool health_is(struct proc *p, const char *service, bool serving)
{
    Grpc__Health__V1__HealthCheckRequest req = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    req.service = (char *)service;
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(5000)) {
        ProtobufCMessage *m = NULL;
        if (rpc_unary(p->ch, "/grpc.health.v1.Health/Check", &req.base,
                      &grpc__health__v1__health_check_response__descriptor, &m, 5000, NULL) != ST_OK)
            continue;
        bool is = ((Grpc__Health__V1__HealthCheckResponse *)m)->status ==
                  GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
        protobuf_c_message_free_unpacked(m, NULL);
        if (is == serving)
            return true;
    }
    return false;
}

START_TEST(generates_the_tokens_of_the_ranks)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r;
    struct ask a;
    ask_ids(&a, 700, 5, 30); /* two chunks of a budget of 512 */
    proc_generate(&p, &a.m, 0, &r);
    check_ids(&r, 700, 5, 30);
    ck_assert_int_eq(r.reason, TANDEM__V1__FINISH__REASON__LENGTH);
    ck_assert(!r.has_stop);
    ck_assert_str_ne(r.request_id, "");
    ck_assert_uint_gt(r.prefill_us, 0);
    ck_assert_uint_gt(r.decode_us, 0);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(text_continues_the_prompt)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct tokenizer *tok = NULL;
    struct status st = STATUS_INIT;
    const char *prompt = "Once upon a time, there was";
    ck_assert_msg(tok_load(&tok, TEST_MODEL, &st) == ST_OK, "%s", st.message);
    for (uint64_t seed = 1; seed <= 8; seed++) {
        struct proc_reply r;
        struct ask a;
        uint32_t *ids = NULL, all[256];
        size_t n = 0, whole_len = 0, prompt_len = 0;
        char *whole = NULL, *alone = NULL;
        ask_text(&a, prompt, 40);
        a.sampling.seed = seed;
        ask_name(&a, "my.request:1");
        proc_generate(&p, &a.m, 0, &r);
        ck_assert_msg(r.code == ST_OK, "%s", r.message);
        ck_assert_str_eq(r.request_id, "my.request:1");
        ck_assert_int_eq(tok_encode(tok, prompt, strlen(prompt), TOK_ADD_SPECIAL, &ids, &n, &st), ST_OK);
        check_ids(&r, (uint32_t)n, seed, 40);
        memcpy(all, ids, n * sizeof *ids);
        memcpy(all + n, r.ids, r.n_ids * sizeof *ids);
        ck_assert_int_eq(tok_decode(tok, all, n, TOK_SKIP_SPECIAL, &alone, &prompt_len, &st), ST_OK);
        ck_assert_int_eq(tok_decode(tok, all, n + r.n_ids, TOK_SKIP_SPECIAL, &whole, &whole_len, &st), ST_OK);
        ck_assert_uint_eq(whole_len, prompt_len + r.text_len);
        ck_assert_mem_eq(whole + prompt_len, r.text, r.text_len);
        free(ids);
        free(whole);
        free(alone);
        proc_reply_free(&r);
    }
    tok_free(tok);
    finish(&p, g);
}
END_TEST

START_TEST(stop_token_is_in_the_ids_and_not_in_the_text)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.eos_id = 50; /* an ordinary token, so its text would be seen */
    o.eos_at = 15;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct proc_reply r, ignored;
    struct ask a;
    ask_ids(&a, 10, 5, 30);
    proc_generate(&p, &a.m, 0, &r);
    ck_assert_int_eq(r.code, ST_OK);
    ck_assert_int_eq(r.reason, TANDEM__V1__FINISH__REASON__STOP);
    ck_assert(r.has_stop);
    ck_assert_uint_eq(r.stop_id, 50);
    ck_assert_uint_eq(r.n_ids, 6); /* positions 10 to 15 */
    ck_assert_uint_eq(r.ids[5], 50);
    a.stopping.ignore_eos = true;
    proc_generate(&p, &a.m, 0, &ignored);
    ck_assert_uint_eq(ignored.n_ids, 30);
    ck_assert_uint_gt(ignored.text_len, r.text_len);
    ck_assert_mem_eq(ignored.text, r.text, r.text_len);
    proc_reply_free(&ignored);
    a.stop[0] = fake_token(5, 12, 2048);
    a.stopping.stop_token_ids = a.stop;
    a.stopping.n_stop_token_ids = 1;
    proc_generate(&p, &a.m, 0, &ignored);
    ck_assert_int_eq(ignored.reason, TANDEM__V1__FINISH__REASON__STOP);
    ck_assert_uint_eq(ignored.stop_id, a.stop[0]);
    ck_assert_uint_le(ignored.n_ids, 3);
    proc_reply_free(&ignored);
    proc_reply_free(&r);
    finish(&p, g);
}
END_TEST

START_TEST(many_streams_at_once_get_their_own_tokens)
{
    enum { N = 512 };
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    o.max_slots = 128;
    o.total_pages = 512; /* 128 slots of up to 70 tokens need 2 pages each: some are preempted on purpose */
    o.token_bytes = 512;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct rpc_stream *s[N];
    for (uint32_t i = 0; i < N; i++) {
        struct ask a;
        ask_ids(&a, 1 + i % 40, 1000 + i, 1 + i % 30);
        s[i] = proc_open(&p, &a.m, 0);
    }
    for (uint32_t i = 0; i < N; i++) {
        struct proc_reply r = {0};
        proc_drain(s[i], &r);
        check_ids(&r, 1 + i % 40, 1000 + i, 1 + i % 30);
        proc_reply_free(&r);
        rpc_stream_close(s[i]);
    }
    Tandem__V1__Load *l = get_load(&p);
    ck_assert_uint_eq(l->finished_requests, N);
    ck_assert_uint_eq(l->running_requests, 0);
    ck_assert_uint_eq(l->total_slots, 128);
    ck_assert_uint_gt(l->generated_tokens, N);
    tandem__v1__load__free_unpacked(l, NULL);
    finish(&p, g);
}
END_TEST

START_TEST(tells_about_server_and_model)
{
    struct proc p;
    const char *args[] = {"--served-name",        "demo", "--tp", "2", "--max-running", "3",
                          "--default-max-tokens", "9",    NULL};
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, args);
    Tandem__V1__GetServerInfoRequest sreq = TANDEM__V1__GET_SERVER_INFO_REQUEST__INIT;
    Tandem__V1__GetModelInfoRequest mreq = TANDEM__V1__GET_MODEL_INFO_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    ck_assert_int_eq(rpc_unary(p.ch, "/tandem.v1.Control/GetServerInfo", &sreq.base,
                               &tandem__v1__server_info__descriptor, &m, 5000, NULL),
                     ST_OK);
    Tandem__V1__ServerInfo *s = (Tandem__V1__ServerInfo *)m;
    ck_assert_str_ne(s->version, "");
    ck_assert_str_eq(s->reason, "");
    ck_assert_uint_eq(s->epoch, 1);
    ck_assert_uint_eq(s->tensor_parallel_size, 2);
    ck_assert_uint_eq(s->n_ranks, 2);
    ck_assert_str_eq(s->ranks[1]->host, "fake-host");
    ck_assert_str_eq(s->ranks[0]->device, "no device yet");
    ck_assert_str_eq(s->ranks[1]->device, "fake device");
    ck_assert_uint_eq(s->ranks[1]->pid, (uint32_t)getpid());
    ck_assert_uint_lt(s->ranks[1]->heartbeat_age_ms, 3000);
    ck_assert_uint_eq(s->max_running_requests, 3);
    ck_assert_uint_eq(s->step_token_budget, 512);
    ck_assert_uint_eq(s->default_max_tokens, 9);
    protobuf_c_message_free_unpacked(m, NULL);
    ck_assert_int_eq(rpc_unary(p.ch, "/tandem.v1.Control/GetModelInfo", &mreq.base, &tandem__v1__model_info__descriptor,
                               &m, 5000, NULL),
                     ST_OK);
    Tandem__V1__ModelInfo *mi = (Tandem__V1__ModelInfo *)m;
    ck_assert_str_eq(mi->name, "demo");
    ck_assert_str_eq(mi->architecture, "FakeForCausalLM");
    ck_assert_uint_eq(mi->layers, 3);
    ck_assert_uint_eq(mi->max_context_tokens, 1024);
    ck_assert_uint_eq(mi->defaults->max_tokens, 9);
    ck_assert_float_eq(mi->defaults->temperature, 0.5f);
    protobuf_c_message_free_unpacked(m, NULL);
    /* nothing set: the server's number of tokens, a seed of its own, no fewer than two different ones */
    struct proc_reply one, two;
    struct ask a;
    ask_ids(&a, 5, 0, 0);
    a.m.sampling = NULL;
    a.m.stopping = NULL;
    proc_generate(&p, &a.m, 0, &one);
    proc_generate(&p, &a.m, 0, &two);
    ck_assert_uint_eq(one.n_ids, 9);
    ck_assert_uint_eq(two.n_ids, 9);
    ck_assert(memcmp(one.ids, two.ids, 9 * sizeof *one.ids) != 0);
    ck_assert_str_ne(one.request_id, two.request_id);
    proc_reply_free(&one);
    proc_reply_free(&two);
    finish(&p, g);
}
END_TEST

START_TEST(supervisor_and_health_follow_the_group)
{
    struct proc p;
    char line[512];
    struct fake_options o = FAKE_OPTIONS;
    start(&p, NULL);
    ck_assert(health_is(&p, "", true));
    ck_assert(health_is(&p, "tandem.v1.Inference", false));
    struct fake_group *g = fake_group_start(p.control, &o);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "ready epoch=1");
    ck_assert_str_eq(p.attaching, "attaching epoch=1");
    ck_assert_uint_eq(p.loading, 1); /* when the last rank was attached */
    ck_assert(health_is(&p, "tandem.v1.Inference", true));
    ck_assert(health_is(&p, "readiness", true));
    fake_group_mood(g, 1, FAKE_DROP);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "group-lost epoch=1 permanent=0 reason=rank 1 was lost: its stream was closed");
    ck_assert(health_is(&p, "tandem.v1.Inference", false));
    ck_assert(health_is(&p, "liveness", true));
    ck_assert(fake_group_stop(g));
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "ready epoch=2");
    kill(p.pid, SIGTERM);
    ck_assert(proc_event(&p, line, sizeof line, WAIT_MS));
    ck_assert_str_eq(line, "drained");
    struct status st = STATUS_INIT;
    bool shutdown = false, relaunch = true;
    ck_assert_int_eq(fake_rank_end(g, 0, &st, &shutdown, &relaunch), ST_OK);
    ck_assert(shutdown && !relaunch);
    ck_assert(fake_group_stop(g));
    ck_assert_int_eq(proc_end(&p, 0, WAIT_MS), 0);
}
END_TEST

static Suite *suite(void)
{
    Suite *s = suite_create("coordinator");
    TCase *core = tcase_create("core");
    tcase_set_timeout(core, 90);
    tcase_add_test(core, generates_the_tokens_of_the_ranks);
    tcase_add_test(core, text_continues_the_prompt);
    tcase_add_test(core, stop_token_is_in_the_ids_and_not_in_the_text);
    tcase_add_test(core, many_streams_at_once_get_their_own_tokens);
    tcase_add_test(core, tells_about_server_and_model);
    tcase_add_test(core, supervisor_and_health_follow_the_group);
    suite_add_tcase(s, core);
    suite_add_tcase(s, coord_limits());
    suite_add_tcase(s, coord_faults());
    suite_add_tcase(s, coord_replays());
    suite_add_tcase(s, coord_groups());
    suite_add_tcase(s, coord_memory());
    suite_add_tcase(s, coord_attach());
    return s;
}

int main(void)
{
    SRunner *sr = srunner_create(suite());
    srunner_run_all(sr, CK_NORMAL);
    int failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
