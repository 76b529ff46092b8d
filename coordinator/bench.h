/* bench.h - what `tandem bench` computes: which requests come when, and what their times say. Prefix bench_. No clock and no
 * network in it; cmd_bench_run.c sends the requests.
 *
 * Times are seconds since the start. A request's times count from when it was due (due_s), not from when it was sent: a
 * generator or a server that falls behind an open-loop schedule would otherwise hide its own delay ("coordinated
 * omission"). In a closed loop a request is due when the one before it has ended.
 */
#ifndef TANDEM_BENCH_H
#define TANDEM_BENCH_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "coordinator/trace.h"
#include "proto/status.h"

/* ---- the load ---- */

enum bench_lengths_kind { BENCH_FIXED, BENCH_UNIFORM, BENCH_LOG_NORMAL };

/* "220", "uniform:100-300", "lognormal:220", "lognormal:220,0.8" (mean, sigma of the logarithm) or
 * "lognormal:220,0.8,50-900" (cut to these; the mean is that before). */
struct bench_lengths {
    enum bench_lengths_kind kind;
    uint32_t low, high; /* the bounds; of a log-normal one, what it is cut to */
    double mean, sigma;
};

/* option: for messages, "--input-tokens". INVALID_ARGUMENT. */
STATUS_MUST_CHECK enum status_code bench_lengths_parse(struct bench_lengths *out, const char *option, const char *text,
                                                       struct status *st);

enum bench_mode { BENCH_OFFLINE, BENCH_RATE, BENCH_CONCURRENCY, BENCH_TRACE };

struct bench_load {
    enum bench_mode mode;
    uint32_t requests; /* 0 with a trace: all of it */
    double rate;       /* a second; Poisson */
    uint32_t concurrency;
    const struct trace *trace;
    double speed; /* of the trace */
    struct bench_lengths prompt, output;
    uint32_t max_tokens; /* prompt and answer together: answers, then prompts are cut to it; 0: no bound */
    uint64_t seed;
};

struct bench_request {
    double due_s; /* closed loop: set when it is sent */
    uint32_t prompt_tokens, output_tokens;
    /* what came of it */
    double sent_s, first_s, end_s; /* < 0: did not happen */
    uint32_t tokens;               /* that came */
    double stall_s;                /* the longest pause between two messages */
    uint8_t code;                  /* enum status_code */
    uint8_t tenant;                /* in a simulation */
};

/* The requests in the order of arrival; free() them. The same for the same load. */
STATUS_MUST_CHECK enum status_code bench_requests(struct bench_request **out, uint32_t *n,
                                                  const struct bench_load *load, struct status *st);
/* Token i of request r's prompt, below vocab; the first `shared` tokens are the same in all. */
uint32_t bench_prompt_token(uint64_t seed, uint32_t r, uint32_t i, uint32_t shared, uint32_t vocab);

/* ---- times ---- */

/* Values from 1 us to 10^5 s in steps of 0.5 %. All zero: empty. */
#define BENCH_BINS 5080
struct bench_histogram {
    uint64_t count[BENCH_BINS];
    uint64_t n;
    double sum_s, max_s;
};
void bench_add(struct bench_histogram *h, double seconds, uint64_t times);
/* q of 0 to 1; the upper end of the bin, max_s at most. 0 when it is empty. */
double bench_quantile(const struct bench_histogram *h, double q);

#define BENCH_SLICES 200 /* of the whole time, for the plot */

struct bench_result {
    const struct bench_load *load;
    const struct bench_request *request;
    uint32_t n;
    double slo_ttft_s, slo_tbt_s, slo_stall_s; /* 0: none */
    uint64_t tokens_of_slice[BENCH_SLICES];
    double slice_s;             /* doubles when time goes on past the last one */
    struct bench_histogram gap; /* between two messages of an answer: what somebody who reads it sees */
    /* by bench_sum_up */
    uint32_t done, failed, good;
    uint32_t stalled_200ms, stalled_500ms; /* of those done: with a longer pause between two messages */
    uint64_t prompt_tokens, output_tokens; /* of those done */
    double duration_s;                     /* first due to last end */
    double late_s;                         /* the longest from due to sent: the generator's own delay */
    struct bench_histogram ttft, latency,
        per_token; /* per_token: of a request, first to last token by their number less 1 */
};

/* `tokens` came at `at_s`. */
void bench_note_tokens(struct bench_result *r, double at_s, uint32_t tokens);
/* A request is good when it ended well, its first token came within slo_ttft_s, per_token is within slo_tbt_s, and no pause
 * was longer than slo_stall_s. */
void bench_sum_up(struct bench_result *r);

/* ---- reports ---- */

void bench_print_table(FILE *to, const struct bench_result *r);
void bench_print_json(FILE *to, const struct bench_result *r, const char *model);
/* SVG: tokens over time, and what share of the times is below what. */
void bench_print_plot(FILE *to, const struct bench_result *r);

#endif
