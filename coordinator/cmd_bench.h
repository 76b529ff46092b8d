/* cmd_bench.h - what the two files of `tandem bench` share: cmd_bench.c reads options and prints, cmd_bench_run.c sends. */
#ifndef TANDEM_CMD_BENCH_H
#define TANDEM_CMD_BENCH_H

#include "coordinator/bench.h"
#include "coordinator/cmd.h"

struct bench_server {
    struct tandem_client_options options;
    uint32_t vocab; /* prompt tokens are below it */
    uint32_t shared_prefix;
    double timeout_s;   /* of a request from when it is sent; 0: none */
    double temperature; /* < 0: the model's own */
    bool stop_at_eos;
};

/* Sends r->load's requests and notes in request[] and r what comes of them. signal_fd becomes readable when it is to end
 * early: what runs is cancelled then. CANCELLED; or an error of this side; those of requests are in request[]. */
STATUS_MUST_CHECK enum status_code bench_run(struct bench_result *r, struct bench_request *request,
                                             const struct bench_server *server, int signal_fd, bool progress,
                                             struct status *st);

#endif
