/* KV memory of the ranks: counted, given back and taken again over Control. Part of check_coordinator. */
#include <string.h>
#include <unistd.h>

#include "tests/coord_ask.h"

static enum status_code set_memory(struct proc *p, const char *group, uint64_t bytes,
                                   Tandem__V1__SetKvMemoryResponse *out, struct status *st)
{
    Tandem__V1__SetKvMemoryRequest req = TANDEM__V1__SET_KV_MEMORY_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    req.group = (char *)group;
    req.kv_bytes = bytes;
    enum status_code rc = rpc_unary(p->ch, "/tandem.v1.Control/SetKvMemory", &req.base,
                                    &tandem__v1__set_kv_memory_response__descriptor, &m, 20000, st);
    if (rc == ST_OK) {
        *out = *(Tandem__V1__SetKvMemoryResponse *)m;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    return rc;
}

static void expect_refused(struct proc *p, const char *group, uint64_t bytes, enum status_code code, const char *says)
{
    struct status st = STATUS_INIT;
    Tandem__V1__SetKvMemoryResponse m;
    ck_assert_int_eq(set_memory(p, group, bytes, &m, &st), code);
    ck_assert_msg(strstr(st.message, says), "%s", st.message);
}

/* The pages that the coordinator plans with, and those of both ranks' pools. */
static void wait_pages(struct proc *p, uint64_t total, uint64_t of_pools)
{
    uint64_t is = 0, pools = 0;
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(2000)) {
        Tandem__V1__Load *l = get_load(p);
        is = l->total_pages;
        pools = l->kv->total_pages;
        bool done = l->groups[0]->goal_pages == 0;
        ck_assert_uint_eq(l->groups[0]->kv->total_pages, pools);
        tandem__v1__load__free_unpacked(l, NULL);
        if (done && is == total && pools == of_pools)
            return;
    }
    ck_abort_msg("%llu pages, %llu of the pools, expected %llu and %llu", (unsigned long long)is,
                 (unsigned long long)pools, (unsigned long long)total, (unsigned long long)of_pools);
}

/* 1024 pages of 4096 bytes on rank 0, 7 more on rank 1. The group runs on meanwhile. */
START_TEST(memory_is_given_back_and_taken_again_while_it_serves)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    struct ask a;
    struct proc_reply r = {0};
    struct status st = STATUS_INIT;
    Tandem__V1__SetKvMemoryResponse m;
    ask_ids(&a, 100, 1, 900);
    struct rpc_stream *s = proc_open(&p, &a.m, 0);
    ck_assert_msg(set_memory(&p, "", 100 * 4096 + 5, &m, &st) == ST_OK, "%s", st.message);
    ck_assert_uint_eq(m.total_pages, 1024);
    ck_assert_uint_eq(m.goal_pages, 100);
    ck_assert_uint_eq(m.page_bytes, 4096);
    wait_pages(&p, 100, 200);
    ck_assert_int_eq(set_memory(&p, "default", 0, &m, &st), ST_OK);
    ck_assert_uint_eq(m.goal_pages, 1024);
    wait_pages(&p, 1024, 2048);
    proc_drain(s, &r);
    check_ids(&r, 100, 1, 900);
    proc_reply_free(&r);
    rpc_stream_close(s);
    finish(&p, g);
}
END_TEST

START_TEST(memory_that_others_have_taken_stays_away)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct status st = STATUS_INIT;
    Tandem__V1__SetKvMemoryResponse m;
    o.most_pages = 300;
    struct fake_group *g = start_ready(&p, &o, NULL);
    ck_assert_int_eq(set_memory(&p, "", 64 * 4096, &m, &st), ST_OK);
    wait_pages(&p, 64, 128);
    ck_assert_int_eq(set_memory(&p, "", 0, &m, &st), ST_OK);
    wait_pages(&p, 300, 600);
    finish(&p, g);
}
END_TEST

START_TEST(wrong_sizes_and_groups_are_refused)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct fake_group *g = start_ready(&p, &o, NULL);
    expect_refused(&p, "", 4095, ST_INVALID_ARGUMENT, "kv_bytes: 4095, expected 4096 (a page) to 4194304");
    expect_refused(&p, "", 1025 * 4096, ST_INVALID_ARGUMENT, "kv_bytes: 4198400, expected");
    expect_refused(&p, "b\n", 0, ST_NOT_FOUND, "does not serve");
    fake_group_mood(g, 0, FAKE_DROP);
    ck_assert(proc_wait_state(&p, STATE(RECOVERING), WAIT_MS));
    expect_refused(&p, "", 0, ST_UNAVAILABLE, "no worker group serves");
    ck_assert(fake_group_stop(g));
    finish(&p, NULL);
}
END_TEST

/* What was asked for counts for the group that follows under the same name. */
START_TEST(the_next_group_is_made_as_small)
{
    struct proc p;
    struct fake_options o = FAKE_OPTIONS;
    struct status st = STATUS_INIT;
    Tandem__V1__SetKvMemoryResponse m;
    struct fake_group *g = start_ready(&p, &o, NULL);
    ck_assert_int_eq(set_memory(&p, "", 50 * 4096, &m, &st), ST_OK);
    wait_pages(&p, 50, 100);
    fake_group_mood(g, 0, FAKE_DROP);
    ck_assert(proc_wait_state(&p, STATE(RECOVERING), WAIT_MS));
    ck_assert(fake_group_stop(g));
    o.launch_id = 2;
    g = fake_group_start(p.control, &o);
    ck_assert(proc_wait_state(&p, STATE(READY), WAIT_MS));
    wait_pages(&p, 50, 100);
    finish(&p, g);
}
END_TEST

TCase *coord_memory(void)
{
    TCase *memory = tcase_create("memory");
    tcase_set_timeout(memory, 90);
    tcase_add_test(memory, memory_is_given_back_and_taken_again_while_it_serves);
    tcase_add_test(memory, memory_that_others_have_taken_stays_away);
    tcase_add_test(memory, wrong_sizes_and_groups_are_refused);
    tcase_add_test(memory, the_next_group_is_made_as_small);
    return memory;
}
