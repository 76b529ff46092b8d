/* client_attach.c - a generation whose connection is lost, against a server that says what a table says. Part of check_client. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tests/client_attach.h"

#include "proto/rpc.h"
#include "proto/tandem_client.h"

#define PATIENCE_MS 20000
#define MAX_PARTS   4

/* A message: of texts their bytes, of tokens and the like how many; they are numbered from `from`. */
struct part {
    const char *text;
    uint32_t index, from, tokens, prompt_ids, prompt_scores;
    bool finish;
};

/* A call. The first is Generate, the others Attach; offsets: "index:tokens:bytes ..." as it must have asked. */
struct play {
    const char *offsets;
    struct part part[MAX_PARTS];
    uint32_t n_parts;
    enum status_code end;
};

static struct {
    struct rpc_server *rpc;
    struct rpc_method methods[2];
    char address[64];
    const struct play *play;
    uint32_t n_plays, attach_ms;
    atomic_uint n_calls; /* behind the last play the last one is played again */
    char wrong[256];     /* what was asked otherwise; written before the call ends */
} srv;

static void send_part(struct rpc_call *call, const struct part *p, bool first)
{
    Tandem__V1__GenerateResponse m = TANDEM__V1__GENERATE_RESPONSE__INIT;
    Tandem__V1__TokenLogprob score[8], *scores[8];
    Tandem__V1__Finish finish = TANDEM__V1__FINISH__INIT;
    uint32_t ids[8];
    for (uint32_t i = 0; i < 8; i++) {
        ids[i] = p->from + i;
        score[i] = (Tandem__V1__TokenLogprob)TANDEM__V1__TOKEN_LOGPROB__INIT;
        score[i].token_id = i;
        scores[i] = &score[i];
    }
    m.index = p->index;
    m.text = (ProtobufCBinaryData){p->text ? strlen(p->text) : 0, (uint8_t *)p->text};
    m.token_ids = ids;
    m.n_token_ids = p->tokens;
    m.prompt_token_ids = ids;
    m.n_prompt_token_ids = p->prompt_ids;
    m.prompt_logprobs = scores;
    m.n_prompt_logprobs = p->prompt_scores;
    m.finish = p->finish ? &finish : NULL;
    if (first) {
        m.request_id = (ProtobufCBinaryData){4, (uint8_t *)"name"};
        m.attach_ms = srv.attach_ms;
    }
    if (rpc_call_send(call, &m.base, NULL) != ST_OK)
        snprintf(srv.wrong, sizeof srv.wrong, "a message was not sent");
}

static void play(struct rpc_call *call, uint32_t n)
{
    const struct play *p = &srv.play[n < srv.n_plays ? n : srv.n_plays - 1];
    struct status st = STATUS_INIT;
    for (uint32_t i = 0; i < p->n_parts; i++)
        send_part(call, &p->part[i], i == 0);
    if (p->end != ST_OK)
        status_set(&st, p->end, "end of call %u", n);
    rpc_call_finish(call, p->end == ST_OK ? NULL : &st, 0);
}

static void on_generate(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    (void)msg;
    (void)len;
    (void)ctx;
    play(call, atomic_fetch_add(&srv.n_calls, 1));
}

static void on_attach(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    char text[128] = "";
    size_t n = 0;
    uint32_t at = atomic_fetch_add(&srv.n_calls, 1);
    (void)ctx;
    Tandem__V1__AttachRequest *m =
        (Tandem__V1__AttachRequest *)rpc_unpack(&tandem__v1__attach_request__descriptor, msg, len);
    for (size_t i = 0; m && i < m->n_offsets && n < sizeof text; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s%u:%u:%d", i ? " " : "", m->offsets[i]->index,
                              m->offsets[i]->tokens,
                              m->offsets[i]->text_bytes_is_case ? (int)m->offsets[i]->text_bytes : -1);
    const char *expected = srv.play[at < srv.n_plays ? at : srv.n_plays - 1].offsets;
    if (!m || m->request_id.len != 4 || (expected && strcmp(expected, text) != 0))
        snprintf(srv.wrong, sizeof srv.wrong, "call %u asked for \"%s\", expected \"%s\"", at, text, expected);
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
    play(call, at);
}

static struct tandem_client *serve(const struct play *plays, uint32_t n, uint32_t attach_ms,
                                   struct tandem_client_options options)
{
    struct tandem_client *c = NULL;
    struct status st = STATUS_INIT;
    const char *listen[] = {"127.0.0.1:0"};
    srv.play = plays;
    srv.n_plays = n;
    srv.attach_ms = attach_ms;
    srv.methods[0] =
        (struct rpc_method){.path = "/tandem.v1.Inference/Generate", .kind = RPC_SERVER_STREAM, .on_open = on_generate};
    srv.methods[1] =
        (struct rpc_method){.path = "/tandem.v1.Inference/Attach", .kind = RPC_SERVER_STREAM, .on_open = on_attach};
    struct rpc_server_config cfg = {.methods = srv.methods, .n_methods = 2, .listen = listen, .n_listen = 1};
    ck_assert_msg(rpc_server_start(&srv.rpc, &cfg, &st) == ST_OK, "%s", st.message);
    snprintf(srv.address, sizeof srv.address, "127.0.0.1:%u", rpc_server_port(srv.rpc, 0));
    options.address = srv.address;
    ck_assert_msg(tandem_client_open(&c, &options, &st) == ST_OK, "%s", st.message);
    return c;
}

static void end(struct tandem_client *c)
{
    tandem_client_close(c);
    rpc_server_destroy(srv.rpc);
    ck_assert_str_eq(srv.wrong, "");
}

/* What was handed out. */
struct got {
    uint32_t n_named, n_empty, n_ids[2], n_prompt_ids[2], n_scores[2], n_finish[2];
    uint32_t ids[2][16];
    char text[2][64];
};

static bool take(void *ctx, const Tandem__V1__GenerateResponse *m)
{
    struct got *g = ctx;
    uint32_t i = m->index;
    g->n_named += m->request_id.len > 0;
    for (size_t k = 0; k < m->n_token_ids; k++)
        g->ids[i][g->n_ids[i]++] = m->token_ids[k];
    for (size_t k = 0; k < m->n_prompt_token_ids; k++)
        ck_assert_uint_eq(m->prompt_token_ids[k], g->n_prompt_ids[i]++);
    for (size_t k = 0; k < m->n_prompt_logprobs; k++)
        ck_assert_uint_eq(m->prompt_logprobs[k]->token_id, g->n_scores[i]++);
    strncat(g->text[i], m->text.len ? (const char *)m->text.data : "", m->text.len);
    g->n_finish[i] += m->finish != NULL;
    g->n_empty += !m->text.len && !m->n_token_ids && !m->n_prompt_token_ids && !m->n_prompt_logprobs && !m->finish;
    return true;
}

static enum status_code ask(struct tandem_client *c, struct got *g, struct status *st)
{
    Tandem__V1__GenerateRequest request = TANDEM__V1__GENERATE_REQUEST__INIT;
    return tandem_client_generate(c, &request, 0, take, g, st);
}

static void count_loss(void *ctx, const struct status *st, uint32_t attach_ms)
{
    unsigned *n = ctx;
    ck_assert_int_eq(st->code, ST_UNAVAILABLE);
    ck_assert_uint_eq(attach_ms, 5000);
    ++*n;
}

/* Two answers; the prompt's part of the first comes again until a token of it has come. */
START_TEST(what_a_lost_connection_had_comes_once)
{
    static const struct play plays[] = {
        {NULL,
         {{.text = "ab", .prompt_ids = 2, .prompt_scores = 2}, {.text = "xy", .index = 1, .tokens = 2, .from = 10}},
         2,
         ST_UNAVAILABLE},
        {"1:2:2", {{0}}, 0, ST_UNAVAILABLE},
        {"1:2:2", {{0}}, 0, ST_RESOURCE_EXHAUSTED}, /* too many attach at once */
        {"1:2:2",
         {{.text = "a", .prompt_ids = 1, .prompt_scores = 1},
          {.text = "z", .index = 1, .tokens = 1, .from = 12, .finish = true}},
         2,
         ST_UNAVAILABLE},
        {"1:3:3", {{.text = "abc", .prompt_ids = 3, .prompt_scores = 3}}, 1, ST_UNAVAILABLE},
        {"1:3:3",
         {{.text = "abc", .prompt_ids = 3, .prompt_scores = 3}, {.text = "d", .tokens = 1, .from = 20}},
         2,
         ST_UNAVAILABLE},
        {"0:1:4 1:3:3",
         {{.index = 1, .finish = true}, {.text = "e", .tokens = 1, .from = 21, .finish = true}},
         2,
         ST_OK},
    };
    struct got g = {0};
    struct status st = STATUS_INIT;
    unsigned n_lost = 0;
    struct tandem_client *c =
        serve(plays, 7, 5000, (struct tandem_client_options){.on_lost = count_loss, .on_lost_ctx = &n_lost});
    enum status_code rc = ask(c, &g, &st);
    ck_assert_msg(rc == ST_OK, "%s: %s (%s)", status_name(rc), st.message, srv.wrong);
    ck_assert_uint_eq(atomic_load(&srv.n_calls), 7);
    ck_assert_uint_eq(n_lost, 4); /* the tries that brought nothing belong to the loss before */
    ck_assert_str_eq(g.text[0], "abcde");
    ck_assert_str_eq(g.text[1], "xyz");
    ck_assert_uint_eq(g.n_prompt_ids[0], 3);
    ck_assert_uint_eq(g.n_scores[0], 3);
    ck_assert_uint_eq(g.n_ids[0], 2);
    ck_assert_uint_eq(g.ids[0][0], 20);
    ck_assert_uint_eq(g.ids[0][1], 21);
    ck_assert_uint_eq(g.n_ids[1], 3);
    ck_assert_uint_eq(g.ids[1][2], 12);
    ck_assert(g.n_finish[0] == 1 && g.n_finish[1] == 1 && g.n_named == 1 && g.n_empty == 0);
    end(c);
}
END_TEST

static const struct part begun = {.text = "a", .tokens = 1};

START_TEST(the_loss_is_the_error_where_attach_does_not_help)
{
    static const struct {
        uint32_t attach_ms, n_calls;
        bool no_attach;
        enum status_code attach_end, end;
        const char *says[2];
    } cases[] = {
        {5000, 2, false, ST_NOT_FOUND, ST_UNAVAILABLE, {"end of call 0; Attach: NOT_FOUND: ", "end of call 1"}},
        {5000, 2, false, ST_PERMISSION_DENIED, ST_UNAVAILABLE, {"end of call 0", "PERMISSION_DENIED"}},
        {5000, 2, false, ST_INTERNAL, ST_INTERNAL, {"end of call 1", ""}}, /* the request's own end */
        {5000, 1, true, ST_OK, ST_UNAVAILABLE, {"end of call 0", ""}},
        {0, 1, false, ST_OK, ST_UNAVAILABLE, {"end of call 0", ""}},
        {350, 0, false, ST_UNAVAILABLE, ST_UNAVAILABLE, {"end of call 0", "no Attach went through within 350 ms"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct play plays[] = {{NULL, {begun}, 1, ST_UNAVAILABLE}, {"0:1:1", {{0}}, 0, cases[i].attach_end}};
        struct got g = {0};
        struct status st = STATUS_INIT;
        memset(&srv, 0, sizeof srv);
        struct tandem_client *c =
            serve(plays, 2, cases[i].attach_ms, (struct tandem_client_options){.no_attach = cases[i].no_attach});
        ck_assert_int_eq(ask(c, &g, &st), cases[i].end);
        ck_assert_msg(strstr(st.message, cases[i].says[0]) && strstr(st.message, cases[i].says[1]), "%s", st.message);
        if (cases[i].n_calls)
            ck_assert_uint_eq(atomic_load(&srv.n_calls), cases[i].n_calls);
        ck_assert_str_eq(g.text[0], "a");
        end(c);
    }
}
END_TEST

static void *cancel_soon(void *generation)
{
    usleep(50000);
    tandem_generation_cancel(generation);
    return NULL;
}

/* In a pause that lasts until attach_ms is over. */
START_TEST(a_lost_generation_is_waited_for_in_steps_and_cancelled)
{
    static const struct play plays[] = {{NULL, {{.text = "a", .tokens = 1}}, 1, ST_UNAVAILABLE},
                                        {"0:1:1", {{0}}, 0, ST_UNAVAILABLE}};
    Tandem__V1__GenerateRequest request = TANDEM__V1__GENERATE_REQUEST__INIT;
    const Tandem__V1__GenerateResponse *m = NULL;
    struct tandem_generation *g = NULL;
    struct status st = STATUS_INIT;
    bool late = false;
    pthread_t thread;
    struct tandem_client *c = serve(plays, 2, 3600000, (struct tandem_client_options){0});
    ck_assert_int_eq(tandem_generation_open(&g, c, 0, &st), ST_OK);
    tandem_generation_send(g, &request);
    ck_assert_int_eq(tandem_generation_next(g, &m, PATIENCE_MS, &late, &st), ST_OK);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(tandem_generation_next(g, &m, 40, &late, &st), ST_DEADLINE_EXCEEDED);
        ck_assert(late);
    }
    pthread_create(&thread, NULL, cancel_soon, g);
    ck_assert_int_eq(tandem_generation_next(g, &m, 0, &late, &st), ST_CANCELLED);
    ck_assert(!late);
    pthread_join(thread, NULL);
    tandem_generation_close(g);
    /* its deadline counts in the pause, too */
    ck_assert_int_eq(tandem_generation_open(&g, c, 500, &st), ST_OK);
    atomic_store(&srv.n_calls, 0);
    tandem_generation_send(g, &request);
    ck_assert_int_eq(tandem_generation_next(g, &m, PATIENCE_MS, &late, &st), ST_OK);
    ck_assert_int_eq(tandem_generation_next(g, &m, PATIENCE_MS, &late, &st), ST_DEADLINE_EXCEEDED);
    ck_assert(!late);
    tandem_generation_close(g);
    end(c);
}
END_TEST

void client_attach(TCase *t)
{
    tcase_add_test(t, what_a_lost_connection_had_comes_once);
    tcase_add_test(t, the_loss_is_the_error_where_attach_does_not_help);
    tcase_add_test(t, a_lost_generation_is_waited_for_in_steps_and_cancelled);
}
