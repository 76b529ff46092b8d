/* worker_stub.h - a coordinator that does what a test tells it, and the jobs of real tandem-worker processes. For
 * check_worker.c. Functions end the test (ck_abort_msg) when a bound of time is over. */
#ifndef TANDEM_TESTS_WORKER_STUB_H
#define TANDEM_TESTS_WORKER_STUB_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "proto/rpc.h"
#include "tandem/v1/worker_control.pb-c.h"

#define STUB_RANKS   4
#define STUB_STEPS   512 /* results kept of one attachment */
#define STUB_TOKENS  8   /* of one result */
#define STUB_WAIT_MS 30000

struct stub_result {
    uint64_t step;
    uint32_t n, tokens[STUB_TOKENS];
    uint64_t compute_us;
    int64_t at_us;
};

struct stub_rank {
    struct rpc_call *call; /* NULL: not attached */
    unsigned attached;     /* times that a Hello came */
    uint64_t launch_id;
    uint32_t size, pid, protocol;
    /* since the last Hello */
    uint64_t epoch;
    bool ready, faulted;
    unsigned loadings, heartbeats, foreign; /* foreign: messages with another epoch */
    uint64_t heartbeat_step;
    uint32_t vocab_size, max_slots, max_step_tokens, layers, eos, bos;
    uint64_t page_bytes, token_bytes, total_pages;
    uint32_t fault_code;
    bool fault_permanent;
    char fault[512];
    unsigned n_results;
    struct stub_result results[STUB_STEPS];
};

struct stub {
    struct rpc_server *server;
    struct rpc_method method;
    char address[256];
    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* guarded by lock */
    uint64_t epoch;     /* of the next Welcome; 0: no Welcome is sent */
    struct status deny; /* code not OK: a Hello is answered so */
    uint32_t slow_us;   /* what it takes over each message before the next one is read */
    struct stub_rank ranks[STUB_RANKS];
};

void stub_init(struct stub *s);
/* address: as rpc_server_config.listen. */
void stub_start(struct stub *s, const char *address);
void stub_stop(struct stub *s); /* all streams end; may be started again */
/* Waits until done(rank, arg) holds for ranks 0..n-1. */
void stub_wait(struct stub *s, uint32_t n, bool (*done)(const struct stub_rank *r, uint64_t arg), uint64_t arg,
               const char *what);
bool stub_is_ready(const struct stub_rank *r, uint64_t epoch);
bool stub_has_fault(const struct stub_rank *r, uint64_t unused);
bool stub_is_gone(const struct stub_rank *r, uint64_t unused);
bool stub_has_results(const struct stub_rank *r, uint64_t n);
bool stub_has_heartbeats(const struct stub_rank *r, uint64_t n);
bool stub_beats_at_step(const struct stub_rank *r, uint64_t step);
struct stub_rank stub_rank(struct stub *s, uint32_t rank);
struct stub_result stub_result(struct stub *s, uint32_t rank, unsigned index);
void stub_send(struct stub *s, uint32_t rank, Tandem__V1__CoordinatorMessage *m); /* epoch as set */
void stub_shutdown(struct stub *s, uint32_t ranks, bool relaunch);
void stub_drop(struct stub *s, uint32_t rank);

struct job {
    pid_t pid;
    char dir[64]; /* temporary: the log, the socket */
    char log[128];
};

/* Starts tandem-worker under mpirun with np ranks (0: without mpirun). extra: NULL-ended further options. */
void job_start(struct job *j, unsigned np, const char *model, const char *coordinator, const char *const *extra);
/* Exit status (128 + n: by signal n); fails the test when the job does not end in time. */
int job_wait(struct job *j, uint32_t timeout_ms);
bool job_log_has(const struct job *j, const char *text);
void job_make_dir(struct job *j);
/* Ends what is left and removes the directory. */
void job_end(struct job *j);

#endif
