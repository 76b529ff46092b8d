/* check_rpc.c - proto/rpc.h over real sockets: what it is for, and health. The fixture is in rpc_fixture.h, limits and
 * faults are in files of their own. */
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <pthread.h>

#include "grpc/health/v1/health.pb-c.h"
#include "rpc_fixture.h"

START_TEST(unary_call_is_answered)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    OK(echo(ch, "hello", st));
    OK(echo(ch, "", st));
    ck_assert_int_eq(strncmp(srv.peer, "ipv4:127.0.0.1:", 15), 0);
    ck_assert_ptr_nonnull(strstr(srv.header, "grpc-c"));
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.opens, 2);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

START_TEST(stream_comes_in_order_and_whole)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Count", 0, 5000, 100);
    for (int64_t i = 0; i < 5000; i++)
        ck_assert_int_eq(next_id(s), i);
    ck_assert_int_eq(next_id(s), -1);
    ck_assert_int_eq(next_id(s), -1); /* and stays at the end */
    rpc_stream_close(s);
    s = open_with(ch, "/test.T/Count", 0, 0, 0);
    ck_assert_int_eq(next_id(s), -1);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

static void *send_all(void *arg)
{
    struct rpc_stream *s = arg;
    uint32_t id;
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &id;
    for (id = 0; id < 3000; id++)
        OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, PATIENCE_MS, st));
    return NULL;
}

START_TEST(bidi_echoes_while_both_sides_talk)
{
    server_start(socket_path("s"), NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s;
    pthread_t sender;
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    pthread_create(&sender, NULL, send_all, s);
    for (int64_t i = 0; i < 3000; i++)
        ck_assert_int_eq(next_id(s), i);
    ck_assert_int_eq(next_id(s), -1);
    pthread_join(sender, NULL);
    struct status after = STATUS_INIT;
    Msg m = MSG_INIT;
    ck_assert_int_eq(rpc_stream_send(s, &m.base, 100, &after), ST_FAILED_PRECONDITION);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.messages, 3000);
    ck_assert_uint_eq(srv.half_closes, 1);
    ck_assert_uint_eq(srv.refused_sends, 0);
    folder_remove();
}
END_TEST

static void *send_some(void *arg)
{
    uint32_t id = 7;
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &id;
    for (int i = 0; i < 500; i++)
        OK(rpc_stream_send(arg, &m.base, PATIENCE_MS, st));
    return NULL;
}

START_TEST(several_threads_may_send_on_a_stream)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s;
    pthread_t senders[4];
    OK(rpc_stream_open(&s, ch, "/test.T/Bidi", 0, st));
    for (int i = 0; i < 4; i++)
        pthread_create(&senders[i], NULL, send_some, s);
    for (int i = 0; i < 2000; i++)
        ck_assert_int_eq(next_id(s), 7);
    for (int i = 0; i < 4; i++)
        pthread_join(senders[i], NULL);
    OK(rpc_stream_half_close(s, PATIENCE_MS, st));
    ck_assert_int_eq(next_id(s), -1);
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

struct in_place {
    struct rpc_call *call;
    uint32_t sent, at_once; /* at_once: written, and said to be so, when the send returned */
};

static void *send_in_place(void *arg)
{
    struct in_place *p = arg;
    Msg m = MSG_INIT;
    m.n_token_ids = 1;
    m.token_ids = &p->sent;
    for (; p->sent < 3000; p->sent++) {
        while (rpc_call_pending(p->call) > 8)
            sleep_ms(1);
        OK(rpc_call_send_in_place(p->call, &m.base, st));
        p->at_once += rpc_call_pending(p->call) == 0;
    }
    rpc_call_finish(p->call, NULL, 0);
    return NULL;
}

START_TEST(messages_sent_in_place_come_in_order_and_wait_for_no_poll_thread)
{
    server_start(socket_path("s"), NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s = open_with(ch, "/test.T/Hold", 0, 0, 0);
    pthread_t sender;
    AWAIT(atomic_load(&srv.held) != NULL);
    struct in_place p = {.call = atomic_load(&srv.held)};
    pthread_create(&sender, NULL, send_in_place, &p);
    for (int64_t i = 0; i < 3000; i++)
        ck_assert_int_eq(next_id(s), i);
    ck_assert_int_eq(next_id(s), -1);
    pthread_join(sender, NULL);
    ck_assert_uint_gt(p.at_once, 1500); /* the rest met a poll thread at work in the same connection */
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
    ck_assert_uint_eq(srv.cancelled, 0);
    folder_remove();
}
END_TEST

START_TEST(error_carries_message_and_trailer)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *s;
    struct status got = STATUS_INIT;
    Msg m = MSG_INIT;
    m.text = (ProtobufCBinaryData){.data = (uint8_t *)"busy", .len = 4};
    OK(rpc_stream_open(&s, ch, "/test.T/Echo", 0, st));
    OK(rpc_stream_send(s, &m.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, PATIENCE_MS, st));
    ck_assert_ptr_null(rpc_stream_trailer(s, "retry-after-ms"));
    ck_assert_int_eq(drain(s, &got), ST_UNAVAILABLE);
    ck_assert_ptr_nonnull(strstr(got.message, "busy, come again: é"));
    ck_assert_str_eq(rpc_stream_trailer(s, "retry-after-ms"), "1500");
    ck_assert_ptr_null(rpc_stream_trailer(s, "retry-after"));
    rpc_stream_close(s);
    rpc_channel_destroy(ch);
    server_stop(0);
    ck_assert_uint_eq(srv.cancelled, 0);
}
END_TEST

/* The core retries a call by itself only while nothing of the answer has come: each retry is one more on_open. */
START_TEST(early_error_leaves_the_call_retryable)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    grpc_arg policy = {.type = GRPC_ARG_STRING, .key = (char *)GRPC_ARG_SERVICE_CONFIG};
    policy.value.string = (char *)"{\"methodConfig\":[{\"name\":[{}],\"retryPolicy\":{\"maxAttempts\":4,"
                                  "\"initialBackoff\":\"0.01s\",\"maxBackoff\":\"0.02s\",\"backoffMultiplier\":1,"
                                  "\"retryableStatusCodes\":[\"UNAVAILABLE\"]}}]}";
    grpc_channel_args args = {1, &policy};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *ch = grpc_channel_create(srv.address, plain, &args);
    grpc_channel_credentials_release(plain);
    grpc_completion_queue *cq = grpc_completion_queue_create_for_next(NULL);
    gpr_timespec end = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_seconds(20, GPR_TIMESPAN));
    grpc_call *call = grpc_channel_create_call(ch, NULL, GRPC_PROPAGATE_DEFAULTS, cq,
                                               grpc_slice_from_static_string("/test.T/Echo"), NULL, end, NULL);
    grpc_slice bytes = grpc_slice_from_static_string("\x0a\x04"
                                                     "busy");
    grpc_byte_buffer *request = grpc_raw_byte_buffer_create(&bytes, 1), *reply = NULL;
    grpc_metadata_array initial, trailing;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    grpc_status_code code;
    grpc_slice details = grpc_empty_slice();
    grpc_op ops[6] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},  {.op = GRPC_OP_SEND_MESSAGE},
                      {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}, {.op = GRPC_OP_RECV_INITIAL_METADATA},
                      {.op = GRPC_OP_RECV_MESSAGE},           {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};
    ops[1].data.send_message.send_message = request;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &initial;
    ops[4].data.recv_message.recv_message = &reply;
    ops[5].data.recv_status_on_client.trailing_metadata = &trailing;
    ops[5].data.recv_status_on_client.status = &code;
    ops[5].data.recv_status_on_client.status_details = &details;
    ck_assert_int_eq(grpc_call_start_batch(call, ops, 6, call, NULL), GRPC_CALL_OK);
    ck_assert_int_eq(grpc_completion_queue_next(cq, end, NULL).type, GRPC_OP_COMPLETE);
    ck_assert_int_eq(code, GRPC_STATUS_UNAVAILABLE);
    grpc_call_unref(call);
    grpc_byte_buffer_destroy(request);
    grpc_slice_unref(details);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_channel_destroy(ch);
    grpc_completion_queue_shutdown(cq);
    while (grpc_completion_queue_next(cq, end, NULL).type != GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(cq);
    server_stop(0);
    /* "retry-after-ms" is our own name: the core waits as its policy says. */
    ck_assert_uint_eq(srv.opens, 4);
}
END_TEST

/* ---- health ---- */

typedef Grpc__Health__V1__HealthCheckRequest CheckRequest;
typedef Grpc__Health__V1__HealthCheckResponse CheckResponse;
#define STATE(name) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name

static enum status_code health_check(struct rpc_channel *ch, const char *service, int *state, struct status *st)
{
    CheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    ProtobufCMessage *reply;
    r.service = (char *)service;
    enum status_code rc = rpc_unary(ch, "/grpc.health.v1.Health/Check", &r.base,
                                    &grpc__health__v1__health_check_response__descriptor, &reply, 0, st);
    if (rc == ST_OK) {
        *state = (int)((CheckResponse *)reply)->status;
        protobuf_c_message_free_unpacked(reply, NULL);
    }
    return rc;
}

START_TEST(health_check_and_list_tell_the_table)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct status got = STATUS_INIT;
    int state = -1;
    ck_assert_int_eq(health_check(ch, "", &state, &got), ST_NOT_FOUND);
    rpc_health_set(srv.health, "", true);
    rpc_health_set(srv.health, "a.B", false);
    OK(health_check(ch, "", &state, st));
    ck_assert_int_eq(state, STATE(SERVING));
    OK(health_check(ch, "a.B", &state, st));
    ck_assert_int_eq(state, STATE(NOT_SERVING));
    ck_assert_int_eq(health_check(ch, "a.C", &state, &got), ST_NOT_FOUND);
    ck_assert_ptr_nonnull(strstr(got.message, "a.C"));
    Grpc__Health__V1__HealthListRequest none = GRPC__HEALTH__V1__HEALTH_LIST_REQUEST__INIT;
    ProtobufCMessage *reply;
    OK(rpc_unary(ch, "/grpc.health.v1.Health/List", &none.base, &grpc__health__v1__health_list_response__descriptor,
                 &reply, 0, st));
    Grpc__Health__V1__HealthListResponse *list = (Grpc__Health__V1__HealthListResponse *)reply;
    ck_assert_uint_eq(list->n_statuses, 2);
    ck_assert_str_eq(list->statuses[0]->key, "");
    ck_assert_int_eq(list->statuses[0]->value->status, STATE(SERVING));
    ck_assert_str_eq(list->statuses[1]->key, "a.B");
    ck_assert_int_eq(list->statuses[1]->value->status, STATE(NOT_SERVING));
    protobuf_c_message_free_unpacked(reply, NULL);
    rpc_channel_destroy(ch);
    server_stop(0);
}
END_TEST

static int watch_next(struct rpc_stream *s)
{
    const void *msg;
    size_t len;
    OK(rpc_stream_recv(s, &msg, &len, PATIENCE_MS, NULL, st));
    if (!msg)
        return -1;
    CheckResponse *r = (CheckResponse *)rpc_unpack(&grpc__health__v1__health_check_response__descriptor, msg, len);
    ck_assert_ptr_nonnull(r);
    int state = (int)r->status;
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return state;
}

static struct rpc_stream *watch(struct rpc_channel *ch, const char *service)
{
    struct rpc_stream *s;
    CheckRequest r = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    r.service = (char *)service;
    OK(rpc_stream_open(&s, ch, "/grpc.health.v1.Health/Watch", 0, st));
    OK(rpc_stream_send(s, &r.base, PATIENCE_MS, st));
    OK(rpc_stream_half_close(s, PATIENCE_MS, st));
    return s;
}

START_TEST(health_watch_follows_changes)
{
    server_start("127.0.0.1:0", NO_EXTRAS);
    struct rpc_channel *ch = connect_to(srv.address);
    struct rpc_stream *a = watch(ch, "a.B"), *b = watch(ch, "a.B");
    bool timed_out = false;
    const void *msg;
    size_t len;
    ck_assert_int_eq(watch_next(a), STATE(SERVICE_UNKNOWN));
    ck_assert_int_eq(watch_next(b), STATE(SERVICE_UNKNOWN));
    rpc_health_set(srv.health, "a.B", false);
    ck_assert_int_eq(watch_next(a), STATE(NOT_SERVING));
    rpc_health_set(srv.health, "other", true);
    rpc_health_set(srv.health, "a.B", false); /* no change, no message */
    ck_assert_int_eq(rpc_stream_recv(a, &msg, &len, 50, &timed_out, NULL), ST_DEADLINE_EXCEEDED);
    ck_assert(timed_out);
    rpc_health_set(srv.health, "a.B", true);
    ck_assert_int_eq(watch_next(a), STATE(SERVING));
    rpc_stream_close(b); /* one watcher goes, the other stays */
    rpc_health_set(srv.health, "a.B", false);
    rpc_health_close_watchers(srv.health);
    ck_assert_int_eq(watch_next(a), STATE(NOT_SERVING));
    ck_assert_int_eq(watch_next(a), -1);
    rpc_stream_close(a);
    a = watch(ch, "a.B"); /* too late: one update and the end */
    ck_assert_int_eq(watch_next(a), STATE(NOT_SERVING));
    ck_assert_int_eq(watch_next(a), -1);
    rpc_stream_close(a);
    rpc_channel_destroy(ch);
    server_stop(PATIENCE_MS);
}
END_TEST

static TCase *add_case(Suite *s, const char *name)
{
    TCase *c = tcase_create(name);
    tcase_set_timeout(c, 60 * (SLOW > 1 ? 3 : 1));
    suite_add_tcase(s, c);
    return c;
}

static Suite *rpc_suite(void)
{
    Suite *s = suite_create("rpc");
    TCase *core = add_case(s, "core");
    tcase_add_test(core, unary_call_is_answered);
    tcase_add_test(core, stream_comes_in_order_and_whole);
    tcase_add_test(core, bidi_echoes_while_both_sides_talk);
    tcase_add_test(core, several_threads_may_send_on_a_stream);
    tcase_add_test(core, messages_sent_in_place_come_in_order_and_wait_for_no_poll_thread);
    tcase_add_test(core, error_carries_message_and_trailer);
    tcase_add_test(core, early_error_leaves_the_call_retryable);
    tcase_add_test(core, health_check_and_list_tell_the_table);
    tcase_add_test(core, health_watch_follows_changes);
    TCase *limits = add_case(s, "limits");
    rpc_limits_tests(limits);
    rpc_unpack_tests(limits);
    rpc_faults_tests(add_case(s, "faults"));
    rpc_security_tests(add_case(s, "security"));
    rpc_connections_tests(add_case(s, "connections"));
    return s;
}

int main(void)
{
    SRunner *r = srunner_create(rpc_suite());
    srunner_run_all(r, CK_ENV);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
