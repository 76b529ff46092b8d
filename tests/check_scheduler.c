/* check_scheduler.c - the scheduler by hand-made cases; the simulator of sim_scheduler.h for everything else. */
#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/check_scheduler.h"
#include "tests/sim_scheduler.h"

/* ---- core ---- */

START_TEST(request_runs_to_its_length_with_two_plans_in_flight)
{
    struct sched *s = create_attached(config(4, 16, 2));
    submit(s, 1, 3, 3);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.step, 1);
    ck_assert_uint_eq(p.n_admit, 1);
    ck_assert_uint_eq(p.admit[0].id, 1);
    ck_assert_uint_eq(p.admit[0].sample.seed, 1);
    ck_assert_uint_eq(p.admit[0].sample.top_k, 3);
    ck_assert_uint_eq(p.n_chunk, 1);
    ck_assert_uint_eq(p.chunk[0].slot, p.admit[0].slot);
    ck_assert_uint_eq(p.chunk[0].position, 0);
    ck_assert_uint_eq(p.chunk[0].n_tokens, 3);
    ck_assert_uint_eq(p.chunk[0].tokens[2], 102);
    ck_assert(p.chunk[0].sample);
    ck_assert_uint_eq(p.rows, 3);
    ck_assert_uint_eq(p.samples, 1);
    uint32_t slot = p.admit[0].slot;

    p = plan(s); /* the input of this row is not known here yet */
    ck_assert_uint_eq(p.step, 2);
    ck_assert_uint_eq(p.n_decode, 1);
    ck_assert_uint_eq(p.decode[0], slot);
    ck_assert_uint_eq(p.n_admit + p.n_chunk + p.n_release, 0);
    no_plan(s); /* the pipeline is full */
    RESULT(s, 1, 50);
    expect_token(s, 1, 50);
    p = plan(s);
    ck_assert_uint_eq(p.n_decode, 1);
    RESULT(s, 2, 51);
    expect_token(s, 1, 51);
    no_plan(s); /* all three tokens are sampled: no fourth row */
    RESULT(s, 3, 52);
    expect_token(s, 1, 52);
    struct sched_event ev = expect_finished(s, 1);
    ck_assert(!ev.stopped);
    ck_assert_uint_eq(ev.n_prompt, 3);
    ck_assert_uint_eq(ev.n_new, 3);
    ck_assert_uint_eq(ev.preemptions, 0);
    ck_assert_int_eq(ev.arrived_us, 1000);
    ck_assert_int_eq(ev.started_us, 2000);
    ck_assert_int_eq(ev.first_token_us, 3000);
    ck_assert_int_eq(ev.last_token_us, 3000);
    p = plan(s);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(p.release[0], slot);
    ck_assert_uint_eq(p.rows + p.samples, 0);
    result(s, 4, 0, NULL);
    struct sched_load l = sched_load(s);
    ck_assert_uint_eq(l.prompt_tokens, 3);
    ck_assert_uint_eq(l.generated_tokens, 3);
    ck_assert_uint_eq(l.finished, 1);
    ck_assert_uint_eq(l.steps, 4);
    ck_assert_uint_eq(l.wasted_rows, 0);
    finish(s);
}
END_TEST

START_TEST(stop_token_ends_a_request_and_the_row_in_flight_is_dropped)
{
    struct sched *s = create_attached(config(4, 16, 2));
    submit(s, 1, 3, 100);
    plan(s);
    plan(s);
    RESULT(s, 1, 50);
    expect_token(s, 1, 50);
    plan(s);
    RESULT(s, 2, 7);
    expect_token(s, 1, 7);
    struct sched_event ev = expect_finished(s, 1);
    ck_assert(ev.stopped);
    ck_assert_uint_eq(ev.token, 7);
    ck_assert_uint_eq(ev.n_new, 2);
    no_plan(s);
    RESULT(s, 3, 51);
    no_event(s);
    ck_assert_uint_eq(plan(s).n_release, 1);
    result(s, 4, 0, NULL);
    ck_assert_uint_eq(sched_load(s).wasted_rows, 1);
    finish(s);
}
END_TEST

START_TEST(prompts_are_cut_to_the_budget_and_decodes_come_first)
{
    struct sched *s = create_attached(config(4, 16, 1));
    submit(s, 1, 10, 20);
    submit(s, 2, 10, 20);
    submit(s, 3, 30, 20);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_chunk, 2); /* 10 of the first, 6 of the second */
    ck_assert_uint_eq(p.n_admit, 2);
    ck_assert_uint_eq(p.chunk[1].n_tokens, 6);
    ck_assert(!p.chunk[1].sample);
    ck_assert_uint_eq(p.rows, 16);
    ck_assert_uint_eq(p.samples, 1);
    RESULT(s, 1, 50);
    expect_token(s, 1, 50);
    p = plan(s); /* one decode, the rest of the second, a part of the third */
    ck_assert_uint_eq(p.n_decode, 1);
    ck_assert_uint_eq(p.n_chunk, 2);
    ck_assert_uint_eq(p.chunk[0].id, 2);
    ck_assert_uint_eq(p.chunk[0].position, 6);
    ck_assert_uint_eq(p.chunk[0].n_tokens, 4);
    ck_assert_uint_eq(p.chunk[0].tokens[0], 106);
    ck_assert(p.chunk[0].sample);
    ck_assert_uint_eq(p.chunk[1].id, 3);
    ck_assert_uint_eq(p.chunk[1].n_tokens, 11);
    ck_assert_uint_eq(p.samples, 2);
    RESULT(s, 2, 60, 70); /* decodes first, then chunks */
    expect_token(s, 1, 60);
    expect_token(s, 2, 70);
    p = plan(s);
    ck_assert_uint_eq(p.n_decode, 2);
    ck_assert_uint_eq(p.chunk[0].position, 11);
    ck_assert_uint_eq(p.chunk[0].n_tokens, 14);
    sched_destroy(s);
}
END_TEST

START_TEST(more_decodes_than_budget_take_turns_and_prefill_keeps_a_row)
{
    struct sched *s = create_attached(config(8, 4, 1));
    for (uint64_t id = 1; id <= 6; id++)
        submit(s, id, 1, 100);
    uint32_t served[8] = {0};
    uint32_t tokens[4] = {50, 50, 50, 50};
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_admit, 4);
    result(s, 1, 4, tokens);
    p = plan(s); /* the fifth waits: 3 decodes and its row */
    ck_assert_uint_eq(p.n_decode, 3);
    ck_assert_uint_eq(p.n_admit, 1);
    result(s, 2, 4, tokens);
    p = plan(s);
    ck_assert_uint_eq(p.n_decode, 3);
    ck_assert_uint_eq(p.n_admit, 1);
    result(s, 3, 4, tokens);
    for (uint64_t step = 4; step < 4 + 30; step++) {
        p = plan(s);
        ck_assert_uint_eq(p.n_decode, 4);
        for (uint32_t i = 0; i < 4; i++)
            served[p.decode[i]]++;
        result(s, step, 4, tokens);
    }
    for (uint32_t i = 0; i < 6; i++) /* 30 steps x 4 rows among 6 */
        ck_assert_uint_eq(served[i], 20);
    sched_destroy(s);
}
END_TEST

START_TEST(cancel_of_a_queued_request_is_not_seen_by_ranks)
{
    struct sched *s = create_attached(config(1, 16, 2));
    submit(s, 1, 4, 50);
    submit(s, 2, 4, 50);
    plan(s);
    ck_assert_int_eq(sched_cancel(s, 0, 2, ST_CANCELLED, NULL), ST_OK);
    expect_failed(s, 2, ST_CANCELLED);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_release, 0);
    ck_assert_int_eq(sched_cancel(s, 0, 2, ST_CANCELLED, NULL), ST_NOT_FOUND);
    ck_assert_uint_eq(sched_load(s).queued, 0);
    sched_destroy(s);
}
END_TEST

START_TEST(cancel_gives_the_slot_to_the_next_in_the_same_plan)
{
    struct sched *s = create_attached(config(1, 16, 2));
    submit(s, 1, 4, 50);
    submit(s, 2, 5, 50);
    plan(s);
    ck_assert_int_eq(sched_cancel(s, 0, 1, ST_CANCELLED, NULL), ST_OK);
    struct sched_event ev = expect_failed(s, 1, ST_CANCELLED);
    ck_assert_int_eq(ev.started_us, 2000);
    ck_assert_int_eq(ev.first_token_us, 0);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(p.n_admit, 1);
    ck_assert_uint_eq(p.release[0], p.admit[0].slot);
    ck_assert_uint_eq(p.chunk[0].id, 2);
    ck_assert_uint_eq(sched_load(s).used_pages, 4); /* step 1 may still read those of the first */
    RESULT(s, 1, 50);                               /* of the cancelled one */
    no_event(s);
    ck_assert_uint_eq(sched_load(s).used_pages, 2);
    RESULT(s, 2, 60);
    expect_token(s, 2, 60);
    sched_destroy(s);
}
END_TEST

START_TEST(plan_with_a_release_only_is_made_at_once_when_nothing_is_in_flight)
{
    struct sched *s = create_attached(config(2, 16, 2));
    submit(s, 1, 40, 50);
    plan(s);
    result(s, 1, 0, NULL); /* 16 of 40 */
    ck_assert_int_eq(sched_cancel(s, 0, 1, ST_CANCELLED, NULL), ST_OK);
    expect_failed(s, 1, ST_CANCELLED);
    ck_assert_uint_gt(sched_load(s).used_pages, 0);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(p.rows, 0);
    ck_assert_uint_eq(sched_load(s).used_pages, 0);
    result(s, 2, 0, NULL);
    finish(s);
}
END_TEST

/* 18 pages of 4 tokens. Two requests of 8 prompt tokens begin with 3 each (8 known + 1) and need 17; at the 37th token
 * the older one finds no page. Tokens are their positions, so that what is computed again can be recognised. */
START_TEST(memory_pressure_preempts_the_youngest_and_it_continues_where_it_was)
{
    struct sched_config cfg = config(4, 64, 2);
    cfg.kv.total_pages = 18;
    struct sched *s = create_attached(cfg);
    submit(s, 1, 8, 60);
    submit(s, 2, 8, 60);
    uint32_t len[4] = {0}, slot_of[3] = {0}, next[3] = {0, 8, 8};
    uint32_t flight[2][4], n_flight[2], in_flight = 0;
    uint64_t step = 1;
    bool preempted = false, resumed = false, finished[3] = {false};
    for (int guard = 0; guard < 400 && !(finished[1] && finished[2]); guard++) {
        struct sched_plan p;
        while (sched_plan(s, 0, &p)) {
            sched_check(s);
            uint32_t *t = flight[p.step % 2], n = 0;
            for (uint32_t i = 0; i < p.n_release; i++) {
                if (p.release[i] == slot_of[2] && !finished[2] && len[slot_of[2]] + 1 < 68)
                    preempted = true;
                else
                    ck_assert(p.release[i] != slot_of[1] || len[slot_of[1]] + 1 == 68);
            }
            for (uint32_t i = 0; i < p.n_admit; i++) {
                resumed |= preempted && p.admit[i].id == 2;
                slot_of[p.admit[i].id] = p.admit[i].slot;
                len[p.admit[i].slot] = 0;
            }
            for (uint32_t i = 0; i < p.n_decode; i++)
                t[n++] = ++len[p.decode[i]];
            for (uint32_t i = 0; i < p.n_chunk; i++) {
                ck_assert_uint_eq(p.chunk[i].position, len[p.chunk[i].slot]);
                for (uint32_t k = 0; k < p.chunk[i].n_tokens; k++) {
                    uint32_t at = p.chunk[i].position + k;
                    ck_assert_uint_eq(p.chunk[i].tokens[k], at < 8 ? 100 + at : at + 1000);
                }
                len[p.chunk[i].slot] += p.chunk[i].n_tokens;
                if (p.chunk[i].sample)
                    t[n++] = len[p.chunk[i].slot];
            }
            for (uint32_t i = 0; i < n; i++)
                t[i] += 1000;
            n_flight[p.step % 2] = n;
            in_flight++;
        }
        ck_assert_uint_gt(in_flight, 0);
        result(s, step, n_flight[step % 2], flight[step % 2]);
        step++;
        in_flight--;
        struct sched_event ev;
        while (sched_next_event(s, &ev)) {
            if (ev.kind == SCHED_TOKEN) {
                ck_assert_uint_eq(ev.token, 1000 + next[ev.id]++);
            } else {
                ck_assert_int_eq(ev.kind, SCHED_FINISHED);
                ck_assert_uint_eq(ev.n_new, 60);
                ck_assert_uint_eq(ev.preemptions, ev.id == 2 ? 1 : 0);
                finished[ev.id] = true;
            }
        }
    }
    ck_assert(finished[1] && finished[2]);
    ck_assert(preempted && resumed);
    struct sched_load l = sched_load(s);
    ck_assert_uint_eq(l.preemptions, 1);
    ck_assert_uint_eq(l.prompt_tokens, 16);
    ck_assert_uint_ge(l.recomputed_tokens, 36); /* at 37 tokens it had lost them */
    ck_assert_uint_le(l.recomputed_tokens, 37);
    sched_destroy(s);
}
END_TEST

START_TEST(deadlines_end_queued_and_running_requests)
{
    struct sched *s = create_attached(config(1, 16, 2));
    ck_assert(sched_next_deadline_us(s) == INT64_MAX);
    ck_assert_int_eq(submit_until(s, 1, 4, 50, 5000, NULL), ST_OK);
    ck_assert_int_eq(submit_until(s, 2, 4, 50, 4000, NULL), ST_OK);
    ck_assert_int_eq(submit_until(s, 3, 4, 50, 6000, NULL), ST_OK);
    plan(s);
    ck_assert_int_eq(sched_next_deadline_us(s), 4000);
    sched_expire(s, 3999);
    no_event(s);
    sched_expire(s, 4000);
    expect_failed(s, 2, ST_DEADLINE_EXCEEDED);
    ck_assert_int_eq(sched_next_deadline_us(s), 5000);
    struct sched_plan p;
    ck_assert(sched_plan(s, 5500, &p)); /* expires the running one by itself */
    expect_failed(s, 1, ST_DEADLINE_EXCEEDED);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(p.admit[0].id, 3);
    ck_assert_int_eq(sched_next_deadline_us(s), 6000);
    sched_destroy(s);
}
END_TEST

START_TEST(lost_group_fails_admitted_requests_and_keeps_queued_ones)
{
    struct sched *s = create_attached(config(2, 16, 2));
    submit(s, 1, 4, 50);
    submit(s, 2, 4, 2);
    submit(s, 3, 4, 50);
    submit(s, 4, 60, 100);
    plan(s);
    plan(s);
    RESULT(s, 1, 50, 51);
    expect_token(s, 1, 50);
    expect_token(s, 2, 51);
    plan(s); /* 2 has all its tokens sampled and drains; 3 runs */
    sched_detach(s, 0);
    sched_check(s);
    expect_failed(s, 2, ST_UNAVAILABLE);
    expect_failed(s, 1, ST_UNAVAILABLE);
    expect_failed(s, 3, ST_UNAVAILABLE);
    no_event(s);
    no_plan(s);
    sched_detach(s, 0); /* again: nothing */
    ck_assert_uint_eq(sched_load(s).queued, 1);
    submit(s, 5, 4, 50);
    struct kv_account kv = ROOMY;
    ck_assert_int_eq(sched_attach(s, 0, 1, 100, &kv, NULL), ST_OK);
    sched_check(s);
    expect_failed(s, 4, ST_INVALID_ARGUMENT); /* 160 tokens in a context of 100 */
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.step, 1);
    ck_assert_uint_eq(p.n_admit, 1);
    ck_assert_uint_eq(p.admit[0].id, 5);
    ck_assert_uint_eq(p.n_release, 0);
    sched_destroy(s);
}
END_TEST

/* 1 decodes, 2 has all its tokens sampled and drains, 3 runs, 4 waits. */
START_TEST(lost_group_is_followed_by_one_that_goes_on_with_its_requests)
{
    struct sched_config cfg = config(2, 16, 2);
    cfg.replay_limit = 1;
    struct sched *s = create_attached(cfg);
    submit(s, 1, 4, 50);
    submit(s, 2, 4, 2);
    submit(s, 3, 4, 50);
    submit(s, 4, 60, 100);
    plan(s);
    plan(s);
    RESULT(s, 1, 50, 51);
    expect_token(s, 1, 50);
    expect_token(s, 2, 51);
    plan(s);
    sched_lose(s, 0);
    sched_check(s);
    no_event(s);
    no_plan(s);
    sched_lose(s, 0); /* again: nothing */
    ck_assert_uint_eq(sched_load(s).queued, 1);
    ck_assert_uint_eq(sched_load(s).running, 3);
    ck_assert_uint_eq(sched_load(s).replays, 3);
    ck_assert_int_eq(sched_finish(s, 0, 3, NULL), ST_OK); /* needs no group for it */
    ck_assert_uint_eq(expect_finished(s, 3).replays, 1);
    struct kv_account kv = ROOMY;
    ck_assert_int_eq(sched_attach(s, 0, 3, 100, &kv, NULL), ST_OK);
    sched_check(s);
    expect_failed(s, 4, ST_INVALID_ARGUMENT); /* 160 tokens in a context of 100 */
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.step, 1);
    ck_assert_uint_eq(p.n_admit, 2);
    ck_assert_uint_eq(p.n_decode, 0);
    for (uint32_t i = 0; i < 2; i++) { /* oldest first: the prompt and the token that its owner has */
        ck_assert_uint_eq(p.admit[i].id, 1 + i);
        ck_assert_uint_eq(p.admit[i].sample.seed, 1 + i);
        ck_assert_uint_eq(p.chunk[i].position, 0);
        ck_assert_uint_eq(p.chunk[i].n_tokens, 5);
        ck_assert_uint_eq(p.chunk[i].tokens[4], 50 + i);
        ck_assert(p.chunk[i].sample);
    }
    RESULT(s, 1, 60, 61);
    expect_token(s, 1, 60);
    expect_token(s, 2, 61);
    struct sched_event ev = expect_finished(s, 2);
    ck_assert_uint_eq(ev.n_new, 2);
    ck_assert_uint_eq(ev.replays, 1);
    ck_assert_uint_eq(ev.preemptions, 0);
    sched_destroy(s);
}
END_TEST

/* Tokens first, first + 1, ... */
static void submit_from(struct sched *s, uint64_t id, uint32_t first, uint32_t n_prompt)
{
    uint32_t prompt[16];
    for (uint32_t i = 0; i < n_prompt; i++)
        prompt[i] = first + i;
    struct sched_request req = {
        .id = id, .prompt = prompt, .n_prompt = n_prompt, .max_new = 50, .deadline_us = INT64_MAX};
    ck_assert_int_eq(sched_submit(s, 1000, &req, NULL), ST_OK);
}

/* 3 waits and has seen that it begins as 1 does. In the next group, whose index has changed as often by then, 2 has the slot. */
START_TEST(what_was_matched_in_a_lost_group_is_not_believed_in_the_next)
{
    struct sched_config cfg = config(2, 4, 2);
    cfg.replay_limit = 1;
    cfg.prefix_cache = true;
    struct sched *s = create_attached(cfg);
    submit_from(s, 1, 100, 5);
    submit_from(s, 2, 200, 5);
    submit_from(s, 3, 100, 9);
    plan(s);
    plan(s);
    result(s, 1, 0, NULL);
    RESULT(s, 2, 50);
    expect_token(s, 1, 50);
    ck_assert_uint_eq(plan(s).n_admit, 0); /* looks at 3, but there is no slot */
    sched_lose(s, 0);
    ck_assert_int_eq(sched_finish(s, 0, 1, NULL), ST_OK);
    expect_finished(s, 1);
    ck_assert_int_eq(sched_attach(s, 0, 2, 256, &ROOMY, NULL), ST_OK);
    ck_assert_uint_eq(plan(s).admit[0].id, 2);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_admit, 1);
    ck_assert_uint_eq(p.admit[0].id, 3);
    ck_assert_uint_eq(p.admit[0].from_tokens, 0);
    ck_assert_uint_eq(p.chunk[1].position, 0);
    sched_destroy(s);
}
END_TEST

START_TEST(what_loses_group_after_group_without_a_token_fails)
{
    struct sched_config cfg = config(4, 16, 2);
    cfg.replay_limit = 2;
    struct sched *s = create_attached(cfg);
    submit(s, 1, 4, 50);
    plan(s);
    for (uint32_t lost = 1; lost <= 5; lost++) {
        sched_lose(s, 0);
        sched_check(s);
        no_event(s);
        ck_assert_int_eq(sched_attach(s, 0, 4, 256, &ROOMY, NULL), ST_OK);
        plan(s);
        if (lost == 2) { /* a token: the count begins anew */
            RESULT(s, 1, 50);
            expect_token(s, 1, 50);
            lost = 3;
        }
    }
    submit(s, 2, 4, 50); /* never ran: it is not suspected */
    sched_lose(s, 0);
    ck_assert_uint_eq(expect_failed(s, 1, ST_ABORTED).replays, 5);
    ck_assert_uint_eq(sched_load(s).queued, 1);
    ck_assert_int_eq(sched_cancel(s, 0, 2, ST_CANCELLED, NULL), ST_OK);
    expect_failed(s, 2, ST_CANCELLED);
    finish(s);
}
END_TEST

START_TEST(deadline_and_cancel_end_what_waits_for_the_next_group)
{
    struct sched_config cfg = config(4, 16, 1);
    cfg.replay_limit = 1;
    struct sched *s = create_attached(cfg);
    ck_assert_int_eq(submit_until(s, 1, 4, 50, 9000, NULL), ST_OK);
    submit(s, 2, 4, 50);
    plan(s);
    sched_lose(s, 0);
    ck_assert_int_eq(sched_next_deadline_us(s), 9000);
    sched_expire(s, 9000);
    sched_check(s);
    expect_failed(s, 1, ST_DEADLINE_EXCEEDED);
    ck_assert_int_eq(sched_cancel(s, 0, 2, ST_CANCELLED, NULL), ST_OK);
    expect_failed(s, 2, ST_CANCELLED);
    finish(s);
}
END_TEST

START_TEST(requests_wait_for_the_first_group)
{
    struct sched_config cfg = config(4, 16, 2);
    cfg.kv.page_bytes = 0; /* not known yet */
    struct sched *s = create(&cfg);
    submit(s, 1, 100, 100);
    submit(s, 2, 4, 4);
    no_plan(s);
    struct kv_account kv = {.page_bytes = 4096, .token_bytes = 1024, .total_pages = 10};
    ck_assert_int_eq(sched_attach(s, 0, 8, 256, &kv, NULL), ST_OK);
    expect_failed(s, 1, ST_INVALID_ARGUMENT);
    ck_assert_uint_eq(plan(s).admit[0].id, 2);
    sched_destroy(s);
}
END_TEST

/* 9 pages: the big one at the head waits for memory, the small one behind it does not pass. */
START_TEST(admission_does_not_pass_the_head_of_the_line)
{
    struct sched_config cfg = config(4, 64, 1);
    cfg.kv.total_pages = 9;
    struct sched *s = create_attached(cfg);
    submit(s, 1, 10, 4);
    submit(s, 2, 24, 4);
    submit(s, 3, 1, 1);
    uint64_t step = 0;
    for (int i = 0; i < 4; i++) {
        struct sched_plan p = plan(s);
        ck_assert_uint_eq(p.n_admit, i == 0 ? 1 : 0);
        RESULT(s, ++step, 50);
        expect_token(s, 1, 50);
    }
    expect_finished(s, 1);
    struct sched_plan p = plan(s);
    ck_assert_uint_eq(p.n_release, 1);
    ck_assert_uint_eq(p.n_admit, 2); /* 7 pages, 1 that it may grow by, and 1 */
    ck_assert_uint_eq(p.admit[0].id, 2);
    ck_assert_uint_eq(p.admit[1].id, 3);
    ck_assert_uint_eq(sched_load(s).used_pages, 8);
    sched_destroy(s);
}
END_TEST

/* Pages for 8 + 1 tokens of the second and 32 tokens more of the first: 3 + 3 + 8. */
START_TEST(admission_leaves_room_for_the_running_ones_to_grow)
{
    struct sched_config cfg = config(4, 64, 1);
    for (uint32_t pages = 13; pages <= 14; pages++) {
        cfg.kv.total_pages = pages;
        struct sched *s = create_attached(cfg);
        submit(s, 1, 8, 40);
        submit(s, 2, 8, 4);
        ck_assert_uint_eq(plan(s).n_admit, pages - 12);
        sched_destroy(s);
    }
}
END_TEST

/* ---- simulator ---- */

static uint64_t env_number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

#define SIM_RUN_STEPS 4000
#ifdef TANDEM_SANITIZED
#define SIM_STEPS_DEFAULT 150000
#else
#define SIM_STEPS_DEFAULT 700000
#endif

/* What an abort, also one of sched_check, prints at the end: a handler can reach nothing but a static. */
static char last_words[80];

static void on_abort(int sig)
{
    (void)sig;
    ssize_t n = write(STDERR_FILENO, last_words, strlen(last_words));
    (void)n;
}

/* SIM_STEPS for each load, in runs with seeds SIM_SEED, SIM_SEED + 1, ... */
static void simulate(struct sim_options o, struct sim_report *total)
{
    memset(total, 0, sizeof *total);
    signal(SIGABRT, on_abort);
    o.steps = SIM_RUN_STEPS;
    uint64_t steps = env_number("SIM_STEPS", SIM_STEPS_DEFAULT), seed = env_number("SIM_SEED", 1);
    for (; total->steps < steps; seed++) {
        o.seed = seed;
        snprintf(last_words, sizeof last_words, "run it again with SIM_SEED=%llu SIM_STEPS=1\n",
                 (unsigned long long)seed);
        struct sim_report r;
        sim_run(&o, &r);
        total->steps += r.steps;
        total->submitted += r.submitted;
        total->finished += r.finished;
        total->failed += r.failed;
        total->rejected += r.rejected;
        total->groups += r.groups;
        total->replays += r.replays;
        total->unfit += r.unfit;
        total->preemptions += r.preemptions;
        total->suspensions += r.suspensions;
        total->resumptions += r.resumptions;
        total->resizes += r.resizes;
        total->short_of_pages += r.short_of_pages;
        total->generated += r.generated;
        total->prompt += r.prompt;
        total->recomputed += r.recomputed;
        total->wasted += r.wasted;
        total->cache_hits += r.cache_hits;
        total->worst_wait = r.worst_wait > total->worst_wait ? r.worst_wait : total->worst_wait;
    }
}

static void print_report(const char *what, const struct sim_report *r)
{
    printf("%s: %llu steps, %llu groups, %llu requests (%llu finished, %llu failed, %llu refused), %llu preemptions "
           "(%llu suspended, %llu resumed), %llu resizes (%llu in part), %.1f %% of rows computed again, %llu wasted, "
           "longest wait %.3f of its "
           "bound, %llu hits\n",
           what, (unsigned long long)r->steps, (unsigned long long)r->groups, (unsigned long long)r->submitted,
           (unsigned long long)r->finished, (unsigned long long)r->failed, (unsigned long long)r->rejected,
           (unsigned long long)r->preemptions, (unsigned long long)r->suspensions, (unsigned long long)r->resumptions,
           (unsigned long long)r->resizes, (unsigned long long)r->short_of_pages,
           100.0 * (double)r->recomputed / (double)(r->recomputed + r->prompt + r->generated + 1),
           (unsigned long long)r->wasted, r->worst_wait, (unsigned long long)r->cache_hits);
}

START_TEST(sim_every_request_finishes_when_nothing_goes_wrong)
{
    struct sim_report r;
    simulate((struct sim_options){.arrival = 600, .context = 128, .min_context_fits = 4, .max_context_fits = 40}, &r);
    print_report("steady", &r);
    ck_assert_uint_gt(r.cache_hits, 0);
    ck_assert_uint_eq(r.finished + r.unfit, r.submitted);
    ck_assert_uint_gt(r.finished, r.steps / 100);
    ck_assert_uint_gt(r.wasted, 0);
}
END_TEST

START_TEST(sim_memory_pressure_changes_no_token)
{
    struct sim_report r;
    simulate(
        (struct sim_options){.arrival = 300, .cancel = 2, .context = 512, .min_context_fits = 1, .max_context_fits = 2},
        &r);
    print_report("memory pressure", &r);
    ck_assert_uint_gt(r.cache_hits, 0);
    ck_assert_uint_gt(r.preemptions, r.steps / 1000);
    ck_assert_uint_gt(r.recomputed, 0);
    ck_assert_uint_gt(r.suspensions, r.preemptions / 10);
    ck_assert_uint_gt(r.resumptions, r.suspensions / 2);
}
END_TEST

START_TEST(sim_cancels_deadlines_losses_and_bad_requests)
{
    struct sim_report r;
    simulate((struct sim_options){.arrival = 500,
                                  .cancel = 60,
                                  .deadline = 500,
                                  .group_loss = 3,
                                  .context = 256,
                                  .bad_request = 50,
                                  .min_context_fits = 0,
                                  .max_context_fits = 6},
             &r);
    print_report("faults", &r);
    ck_assert_uint_gt(r.groups, r.steps / 10000);
    ck_assert_uint_gt(r.replays, r.groups);
    ck_assert_uint_gt(r.failed, r.steps / 100);
    ck_assert_uint_gt(r.resizes, r.steps / 1000);
    ck_assert_uint_gt(r.short_of_pages, 0);
    ck_assert_uint_gt(r.rejected, 0);
}
END_TEST

static Suite *suite(void)
{
    Suite *suite = suite_create("scheduler");
    TCase *core = tcase_create("core");
    tcase_add_test(core, request_runs_to_its_length_with_two_plans_in_flight);
    tcase_add_test(core, stop_token_ends_a_request_and_the_row_in_flight_is_dropped);
    tcase_add_test(core, prompts_are_cut_to_the_budget_and_decodes_come_first);
    tcase_add_test(core, more_decodes_than_budget_take_turns_and_prefill_keeps_a_row);
    tcase_add_test(core, cancel_of_a_queued_request_is_not_seen_by_ranks);
    tcase_add_test(core, cancel_gives_the_slot_to_the_next_in_the_same_plan);
    tcase_add_test(core, plan_with_a_release_only_is_made_at_once_when_nothing_is_in_flight);
    tcase_add_test(core, memory_pressure_preempts_the_youngest_and_it_continues_where_it_was);
    tcase_add_test(core, deadlines_end_queued_and_running_requests);
    tcase_add_test(core, lost_group_fails_admitted_requests_and_keeps_queued_ones);
    tcase_add_test(core, lost_group_is_followed_by_one_that_goes_on_with_its_requests);
    tcase_add_test(core, what_was_matched_in_a_lost_group_is_not_believed_in_the_next);
    tcase_add_test(core, what_loses_group_after_group_without_a_token_fails);
    tcase_add_test(core, deadline_and_cancel_end_what_waits_for_the_next_group);
    tcase_add_test(core, requests_wait_for_the_first_group);
    tcase_add_test(core, admission_does_not_pass_the_head_of_the_line);
    tcase_add_test(core, admission_leaves_room_for_the_running_ones_to_grow);
    suite_add_tcase(suite, core);
    suite_add_tcase(suite, scheduler_limits());
    suite_add_tcase(suite, scheduler_faults());
    suite_add_tcase(suite, scheduler_suspension());
    suite_add_tcase(suite, scheduler_resize());
    suite_add_tcase(suite, scheduler_move());
    TCase *sim = tcase_create("sim");
    tcase_set_timeout(sim, 3600);
    tcase_add_test(sim, sim_every_request_finishes_when_nothing_goes_wrong);
    tcase_add_test(sim, sim_memory_pressure_changes_no_token);
    tcase_add_test(sim, sim_cancels_deadlines_losses_and_bad_requests);
    suite_add_tcase(suite, sim);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
