/* cmd_bench_run.c - sends the requests of a load over gRPC and takes their times.
 *
 * One thread: it sleeps in the completion queue until a message comes or the next request is due. Time is read once for each
 * message, right after it has come out of the queue.
 */
#include "coordinator/cmd_bench.h"

#include <math.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/rpc.h"

#define CALLS_A_CHANNEL 512 /* a connection is a lock and a window: thousands of streams take several */
#define CHANNELS_MAX    16
#define WAIT_MAX_US     100000 /* signals and the progress line are looked at so often */
#define LOOK_EVERY      256    /* messages in a row */
#define PROGRESS_S      1.0

struct live {
    struct bench_request *request;
    double last_s; /* of its last message */
};

struct run {
    struct bench_result *result;
    struct bench_request *request;
    const struct bench_server *server;
    struct rpc_channel *channel[CHANNELS_MAX];
    uint32_t n_channels;
    struct rpc_many *many;
    struct live *live; /* [n] */
    uint32_t *ids;     /* of the prompt under way */
    double start_s;    /* CLOCK_MONOTONIC */
    uint32_t sent, ended;
    uint64_t tokens;
    double shown_s;
};

static double now_s(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static enum status_code open_channels(struct run *run, struct status *st)
{
    const struct tandem_client_options *o = &run->server->options;
    const struct bench_load *load = run->result->load;
    const struct rpc_client_security sec = {.tls = o->tls,
                                            .ca_file = o->tls_ca,
                                            .cert_file = o->tls_cert,
                                            .key_file = o->tls_key,
                                            .server_name = o->tls_server_name,
                                            .token_file = o->token_file};
    uint32_t calls = load->mode == BENCH_CONCURRENCY ? load->concurrency : run->result->n;
    uint32_t n = (calls + CALLS_A_CHANNEL - 1) / CALLS_A_CHANNEL;
    n = n < 1 ? 1 : n > CHANNELS_MAX ? CHANNELS_MAX : n;
    enum status_code rc = ST_OK;
    while (rc == ST_OK && run->n_channels < n) {
        rc = rpc_channel_open(&run->channel[run->n_channels], o->address ? o->address : TANDEM_DEFAULT_ADDRESS, &sec,
                              st);
        if (rc == ST_OK)
            run->n_channels++;
    }
    return rc;
}

/* Request number run->sent. */
static enum status_code send_next(struct run *run, struct status *st)
{
    uint32_t i = run->sent;
    struct bench_request *q = &run->request[i];
    const struct bench_server *s = run->server;
    Tandem__V1__GenerateRequest m = TANDEM__V1__GENERATE_REQUEST__INIT;
    Tandem__V1__TokenIds prompt = TANDEM__V1__TOKEN_IDS__INIT;
    Tandem__V1__Stopping stopping = TANDEM__V1__STOPPING__INIT;
    Tandem__V1__Sampling sampling = TANDEM__V1__SAMPLING__INIT;
    for (uint32_t k = 0; k < q->prompt_tokens; k++)
        run->ids[k] = bench_prompt_token(run->result->load->seed, i, k, s->shared_prefix, s->vocab);
    prompt.ids = run->ids;
    prompt.n_ids = q->prompt_tokens;
    m.prompt_case = TANDEM__V1__GENERATE_REQUEST__PROMPT_TOKEN_IDS;
    m.token_ids = &prompt;
    stopping.max_tokens_is_case = TANDEM__V1__STOPPING__MAX_TOKENS_IS_MAX_TOKENS;
    stopping.max_tokens = q->output_tokens;
    stopping.ignore_eos = !s->stop_at_eos;
    m.stopping = &stopping;
    sampling.seed_is_case = TANDEM__V1__SAMPLING__SEED_IS_SEED;
    sampling.seed = run->result->load->seed + i;
    if (s->temperature >= 0) {
        sampling.temperature_is_case = TANDEM__V1__SAMPLING__TEMPERATURE_IS_TEMPERATURE;
        sampling.temperature = (float)s->temperature;
    }
    m.sampling = &sampling;
    run->live[i] = (struct live){.request = q};
    q->code = ST_CANCELLED; /* until its end says otherwise */
    q->sent_s = now_s() - run->start_s;
    if (run->result->load->mode == BENCH_CONCURRENCY)
        q->due_s = q->sent_s;
    enum status_code rc = rpc_many_start(run->many, run->channel[i % run->n_channels], "/tandem.v1.Inference/Generate",
                                         &m.base, (uint64_t)(s->timeout_s * 1000), &run->live[i], st);
    if (rc == ST_OK)
        run->sent++;
    else
        q->sent_s = -1;
    return rc;
}

static void take_message(struct run *run, struct live *l, const struct rpc_many_event *event, double at_s)
{
    struct bench_request *q = l->request;
    Tandem__V1__GenerateResponse *m = (Tandem__V1__GenerateResponse *)rpc_unpack(
        &tandem__v1__generate_response__descriptor, event->message, event->len);
    if (m && m->n_token_ids) {
        uint32_t n = (uint32_t)m->n_token_ids;
        if (q->first_s < 0) {
            q->first_s = at_s;
        } else {
            bench_add(&run->result->gap, at_s - l->last_s, 1);
            if (at_s - l->last_s > q->stall_s)
                q->stall_s = at_s - l->last_s;
        }
        l->last_s = q->end_s = at_s;
        q->tokens += n;
        run->tokens += n;
        bench_note_tokens(run->result, at_s, n);
    }
    if (m)
        protobuf_c_message_free_unpacked(&m->base, NULL);
}

static void take_event(struct run *run, const struct rpc_many_event *event)
{
    struct live *l = event->user;
    double at_s = now_s() - run->start_s;
    if (event->message) {
        take_message(run, l, event, at_s);
        return;
    }
    l->request->code = (uint8_t)event->status.code;
    if (l->request->end_s < 0 || event->status.code != ST_OK)
        l->request->end_s = at_s;
    if (event->status.code != ST_OK && run->result->failed++ == 0)
        fprintf(stderr, "tandem bench: a request failed: %s: %s\n", status_name(event->status.code),
                event->status.message);
    run->ended++;
}

/* Microseconds until the next request is to be sent; 0: now; WAIT_MAX_US: none is due soon. */
static int64_t until_next_us(const struct run *run)
{
    const struct bench_load *load = run->result->load;
    if (run->sent == run->result->n)
        return WAIT_MAX_US;
    if (load->mode == BENCH_CONCURRENCY)
        return run->sent - run->ended < load->concurrency ? 0 : WAIT_MAX_US;
    double wait_us = (run->request[run->sent].due_s - (now_s() - run->start_s)) * 1e6;
    return wait_us <= 0 ? 0 : wait_us < WAIT_MAX_US ? (int64_t)ceil(wait_us) : WAIT_MAX_US;
}

static void show_progress(struct run *run, bool last)
{
    double at_s = now_s() - run->start_s;
    if (!last && at_s - run->shown_s < PROGRESS_S)
        return;
    run->shown_s = at_s;
    fprintf(stderr, "\r%u of %u requests, %u under way, %.0f answer tokens/s%s", run->ended, run->result->n,
            run->sent - run->ended, at_s > 0 ? (double)run->tokens / at_s : 0, last ? "\n" : "   ");
}

static enum status_code loop(struct run *run, int signal_fd, bool progress, struct status *st)
{
    uint32_t in_a_row = 0;
    enum status_code rc;
    while (run->ended < run->result->n) {
        int64_t wait_us = until_next_us(run);
        if (wait_us == 0 && (rc = send_next(run, st)) != ST_OK)
            return rc;
        struct rpc_many_event event;
        bool any = rpc_many_next(run->many, &event, wait_us);
        if (any)
            take_event(run, &event);
        in_a_row = any ? in_a_row + 1 : 0;
        if (in_a_row % LOOK_EVERY)
            continue;
        struct pollfd p = {.fd = signal_fd, .events = POLLIN};
        if (poll(&p, 1, 0) > 0)
            return status_set(st, ST_CANCELLED, "interrupted after %u of %u requests", run->ended, run->result->n);
        if (progress)
            show_progress(run, false);
    }
    return ST_OK;
}

enum status_code bench_run(struct bench_result *r, struct bench_request *request, const struct bench_server *server,
                           int signal_fd, bool progress, struct status *st)
{
    struct run run = {.result = r, .request = request, .server = server};
    uint32_t longest = 1;
    enum status_code rc;
    r->slice_s = 0.01;
    for (uint32_t i = 0; i < r->n; i++)
        if (request[i].prompt_tokens > longest)
            longest = request[i].prompt_tokens;
    run.live = calloc(r->n ? r->n : 1, sizeof *run.live);
    run.ids = calloc(longest, sizeof *run.ids);
    if (!run.live || !run.ids) {
        rc = status_nomem(st, "requests", r->n * sizeof *run.live + longest * sizeof *run.ids);
        goto done;
    }
    if ((rc = open_channels(&run, st)) != ST_OK || (rc = rpc_many_create(&run.many, st)) != ST_OK)
        goto done;
    run.start_s = now_s();
    rc = loop(&run, signal_fd, progress, st);
    if (progress)
        show_progress(&run, true);
    for (uint32_t i = 0; rc == ST_CANCELLED && i < r->n; i++)
        if (request[i].sent_s >= 0 && request[i].end_s < 0)
            request[i].end_s = now_s() - run.start_s;
    r->failed = 0; /* bench_sum_up counts again */
done:
    rpc_many_destroy(run.many);
    for (uint32_t i = 0; i < run.n_channels; i++)
        rpc_channel_destroy(run.channel[i]);
    free(run.ids);
    free(run.live);
    return rc;
}
