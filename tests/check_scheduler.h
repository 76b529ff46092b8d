/* check_scheduler.h - what the scheduler's test files share: short names for calls that must go well. */
#ifndef TANDEM_CHECK_SCHEDULER_H
#define TANDEM_CHECK_SCHEDULER_H

#include <check.h>
#include <stdint.h>

#include "coordinator/scheduler.h"

/* check_scheduler_limits.c */
TCase *scheduler_limits(void);
TCase *scheduler_faults(void);
/* check_scheduler_suspend.c */
TCase *scheduler_suspension(void);
/* check_scheduler_resize.c */
TCase *scheduler_resize(void);
/* check_scheduler_move.c */
TCase *scheduler_move(void);

/* One page holds 4 tokens. */
static const struct kv_account ROOMY = {.page_bytes = 4096, .token_bytes = 1024, .total_pages = 1000};

static inline struct sched_config config(uint32_t slots, uint32_t budget, uint32_t depth)
{
    return (struct sched_config){.max_slots = slots,
                                 .max_context = 256,
                                 .step_token_budget = budget,
                                 .max_queued = 100,
                                 .max_queued_tokens = 10000,
                                 .depth = depth,
                                 .kv = ROOMY};
}

static inline struct sched *create(const struct sched_config *cfg)
{
    struct sched *s = NULL;
    struct status st = STATUS_INIT;
    ck_assert_msg(sched_create(&s, cfg, &st) == ST_OK, "%s", st.message);
    return s;
}

static inline struct sched *create_attached(struct sched_config cfg)
{
    struct sched *s = create(&cfg);
    struct status st = STATUS_INIT;
    ck_assert_msg(sched_attach(s, 0, cfg.max_slots, cfg.max_context, &cfg.kv, &st) == ST_OK, "%s", st.message);
    return s;
}

/* Prompt tokens are 100, 101, ...; token 7 stops. */
static inline enum status_code submit_until(struct sched *s, uint64_t id, uint32_t n_prompt, uint32_t max_new,
                                            int64_t deadline_us, struct status *st)
{
    uint32_t prompt[512];
    for (uint32_t i = 0; i < n_prompt; i++)
        prompt[i] = 100 + i;
    uint32_t stop = 7;
    struct sched_request req = {.id = id,
                                .prompt = prompt,
                                .n_prompt = n_prompt,
                                .max_new = max_new,
                                .stop_ids = &stop,
                                .n_stop = 1,
                                .deadline_us = deadline_us,
                                .sample = {.temperature = 0.5f, .top_k = 3, .top_p = 0.9f, .seed = id}};
    enum status_code rc = sched_submit(s, 1000, &req, st);
    sched_check(s);
    return rc;
}

static inline void submit(struct sched *s, uint64_t id, uint32_t n_prompt, uint32_t max_new)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(submit_until(s, id, n_prompt, max_new, INT64_MAX, &st) == ST_OK, "%s", st.message);
}

static inline struct sched_plan plan(struct sched *s)
{
    struct sched_plan p;
    ck_assert_msg(sched_plan(s, 2000, &p), "expected a plan");
    sched_check(s);
    return p;
}

static inline void no_plan(struct sched *s)
{
    struct sched_plan p;
    ck_assert_msg(!sched_plan(s, 2000, &p), "expected no plan");
    sched_check(s);
}

static inline void result(struct sched *s, uint64_t step, uint32_t n, const uint32_t *tokens)
{
    struct status st = STATUS_INIT;
    ck_assert_msg(sched_result(s, 3000, step, tokens, n, 0, &st) == ST_OK, "%s", st.message);
    sched_check(s);
}
#define RESULT(s, step, ...)                                                                                           \
    result(s, step, sizeof((uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t), (uint32_t[]){__VA_ARGS__})

static inline struct sched_event event(struct sched *s)
{
    struct sched_event ev;
    ck_assert_msg(sched_next_event(s, &ev), "expected an event");
    return ev;
}

static inline void no_event(struct sched *s)
{
    struct sched_event ev;
    ck_assert_msg(!sched_next_event(s, &ev), "unexpected event of kind %d for request %llu", ev.kind,
                  (unsigned long long)ev.id);
}

static inline void expect_token(struct sched *s, uint64_t id, uint32_t token)
{
    struct sched_event ev = event(s);
    ck_assert_int_eq(ev.kind, SCHED_TOKEN);
    ck_assert_uint_eq(ev.id, id);
    ck_assert_uint_eq(ev.token, token);
}

static inline struct sched_event expect_failed(struct sched *s, uint64_t id, enum status_code code)
{
    struct sched_event ev = event(s);
    ck_assert_int_eq(ev.kind, SCHED_FAILED);
    ck_assert_uint_eq(ev.id, id);
    ck_assert_str_eq(status_name(ev.code), status_name(code));
    return ev;
}

static inline struct sched_event expect_finished(struct sched *s, uint64_t id)
{
    struct sched_event ev = event(s);
    ck_assert_int_eq(ev.kind, SCHED_FINISHED);
    ck_assert_uint_eq(ev.id, id);
    return ev;
}

/* Nothing is live, nothing is held. */
static inline void finish(struct sched *s)
{
    no_event(s);
    no_plan(s);
    struct sched_load l = sched_load(s);
    ck_assert_uint_eq(l.queued + l.running + l.in_flight, 0);
    ck_assert_uint_eq(l.queued_tokens, 0);
    ck_assert_uint_eq(l.used_pages, 0);
    sched_destroy(s);
}

#endif
