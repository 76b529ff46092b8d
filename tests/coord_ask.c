#include "tests/coord_ask.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

void start(struct proc *p, const char *const *args)
{
    proc_start(p, TEST_COORDINATOR, TEST_MODEL, args);
}

struct fake_group *start_ready(struct proc *p, const struct fake_options *o, const char *const *args)
{
    start(p, args);
    struct fake_group *g = fake_group_start(p->control, o);
    ck_assert(proc_wait_state(p, STATE(READY), WAIT_MS));
    return g;
}

void finish(struct proc *p, struct fake_group *g)
{
    bool ok = g ? fake_group_stop(g) : true;
    ck_assert_int_eq(proc_end(p, SIGTERM, WAIT_MS), 0);
    ck_assert(ok);
}

void ask_ids(struct ask *a, uint32_t n, uint64_t seed, uint32_t max_tokens)
{
    tandem__v1__generate_request__init(&a->m);
    tandem__v1__token_ids__init(&a->ids);
    tandem__v1__sampling__init(&a->sampling);
    tandem__v1__stopping__init(&a->stopping);
    tandem__v1__scheduling__init(&a->scheduling);
    for (uint32_t i = 0; i < n && i < 2048; i++)
        a->prompt[i] = 40 + i % 60;
    a->ids.ids = a->prompt;
    a->ids.n_ids = n;
    a->m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
    a->m.token_ids = &a->ids;
    a->m.sampling = &a->sampling;
    a->m.stopping = &a->stopping;
    a->sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS_SEED;
    a->sampling.seed = seed;
    a->stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
    a->stopping.max_tokens = max_tokens;
}

void ask_text(struct ask *a, const char *text, uint32_t max_tokens)
{
    ask_ids(a, 0, 1, max_tokens);
    a->m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TEXT;
    a->m.text = (ProtobufCBinaryData){.len = strlen(text), .data = (uint8_t *)text};
}

void ask_name(struct ask *a, const char *name)
{
    a->m.request_id = (ProtobufCBinaryData){.len = strlen(name), .data = (uint8_t *)name};
}

void check_ids(const struct proc_reply *r, uint32_t n_prompt, uint64_t seed, uint32_t n_new)
{
    ck_assert_msg(r->code == ST_OK, "%s: %s", status_name(r->code), r->message);
    ck_assert(r->finished);
    ck_assert_uint_eq(r->n_ids, n_new);
    for (uint32_t i = 0; i < n_new; i++)
        ck_assert_uint_eq(r->ids[i], fake_token(seed, n_prompt + i, 2048));
    ck_assert_uint_eq(r->prompt_tokens, n_prompt);
    ck_assert_uint_eq(r->completion_tokens, n_new);
    ck_assert_uint_eq(r->n_first, 1);
}

Tandem__V1__Load *get_load(struct proc *p)
{
    Tandem__V1__GetLoadRequest req = TANDEM__V1__GET_LOAD_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    struct status st = STATUS_INIT;
    enum status_code rc =
        rpc_unary(p->ch, "/tandem.v1.Control/GetLoad", &req.base, &tandem__v1__load__descriptor, &m, 5000, &st);
    ck_assert_msg(rc == ST_OK, "GetLoad: %s", st.message);
    return (Tandem__V1__Load *)m;
}

bool wait_running(struct proc *p, uint32_t running, uint32_t queued)
{
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(2000)) {
        Tandem__V1__Load *l = get_load(p);
        bool hit = l->running_requests == running && l->queued_requests == queued;
        tandem__v1__load__free_unpacked(l, NULL);
        if (hit)
            return true;
    }
    return false;
}

bool wait_live(struct proc *p, uint32_t n)
{
    for (int64_t until = proc_now_ms() + WAIT_MS; proc_now_ms() < until; usleep(2000)) {
        Tandem__V1__Load *l = get_load(p);
        bool hit = l->running_requests + l->queued_requests == n;
        tandem__v1__load__free_unpacked(l, NULL);
        if (hit)
            return true;
    }
    return false;
}

enum status_code drain_call(struct proc *p, uint64_t timeout_ms, uint32_t *remaining)
{
    Tandem__V1__DrainRequest req = TANDEM__V1__DRAIN_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    req.timeout_ms = timeout_ms;
    enum status_code rc = rpc_unary(p->ch, "/tandem.v1.Control/Drain", &req.base,
                                    &tandem__v1__drain_response__descriptor, &m, 20000, NULL);
    if (rc == ST_OK) {
        *remaining = ((Tandem__V1__DrainResponse *)m)->remaining_requests;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    return rc;
}

enum status_code abort_call(struct proc *p, const char *const *names, size_t n, bool all, uint32_t *aborted,
                            struct status *st)
{
    Tandem__V1__AbortRequest req = TANDEM__V1__ABORT_REQUEST__INIT;
    ProtobufCMessage *m = NULL;
    req.n_request_ids = n;
    req.request_ids = (char **)names;
    req.all = all;
    enum status_code rc =
        rpc_unary(p->ch, "/tandem.v1.Control/Abort", &req.base, &tandem__v1__abort_response__descriptor, &m, 5000, st);
    if (rc == ST_OK) {
        *aborted = ((Tandem__V1__AbortResponse *)m)->aborted;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    return rc;
}
