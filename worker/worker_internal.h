/* worker_internal.h - the tandem-worker program, shared between its own files only.
 *
 *     main thread        options -> MPI -> attach -> load -> [ next plan -> engine_step -> StepResult ]*
 *     receiver thread    stream -> plan queue, Shutdown, end of the stream         (one per attachment)
 *     sender thread      a Heartbeat each interval, whatever the main thread does; the StepResults of steps behind
 *                        which the next plan waits already                         (one per attachment)
 *     guard thread       signals, and the deadlines that end a rank which cannot end itself
 *
 * The main thread owns the engine and MPI, and may be stuck in either: a collective whose peer is gone, a read from a dead
 * disk. Hence the rule: whoever asks the rank to end arms the guard, and the guard first aborts the collective and
 * then ends the process. Lock order: control.lock, then guard.lock.
 *
 * When the coordinator dies between two sends, rank A may be inside step n that rank B never got. A then waits for B in a
 * collective that B never enters. A cannot tell this from a slow step, so after the stream broke a step has
 * WORKER_STEP_GRACE_MS to end; past that the collective is aborted and the rank exits with 75, which ends its group.
 * Otherwise the rank attaches again with its weights, and since the coordinator starts plans only when all ranks of a
 * launch are Ready, no collective of the old epoch can meet one of the new.
 */
#ifndef TANDEM_WORKER_INTERNAL_H
#define TANDEM_WORKER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "comm/comm.h"
#include "proto/rpc.h"
#include "proto/status.h"
#include "tandem/v1/worker_control.pb-c.h"
#include "worker/activity.h"
#include "worker/engine.h"

/* ---- exit status: what a supervisor goes by ---- */

enum worker_exit {
    WORKER_EXIT_OK = 0,        /* Shutdown without relaunch */
    WORKER_EXIT_PERMANENT = 1, /* the same command would fail again: model, options */
    WORKER_EXIT_USAGE = 2,     /* the command line */
    WORKER_EXIT_RELAUNCH = 75, /* start the group again */
    WORKER_EXIT_SIGNAL = 128,  /* plus the signal's number */
};

/* ---- bounds ---- */

#define WORKER_QUEUE_MAX         8     /* plans; the coordinator keeps two in flight, more than 8 break the protocol */
#define WORKER_STEP_GRACE_MS     2000  /* for a step to end after its stream broke, or to drain after Shutdown */
#define WORKER_EXIT_GRACE_MS     1000  /* from the abort of the collective to _exit */
#define WORKER_SIGNAL_GRACE_MS   500   /* as STEP_GRACE, after SIGTERM: mpirun sends SIGKILL a second later */
#define WORKER_RELAUNCH_DELAY_MS 250   /* mpirun reports the first rank that exits: let the faulty one be it */
#define WORKER_SEND_TIMEOUT_MS   5000  /* a coordinator that does not read for so long is gone */
#define WORKER_FAULT_SEND_MS     1000  /* to write a Fault */
#define WORKER_FINISH_MS         500   /* for the coordinator to have taken all, when this rank ends */
#define WORKER_WELCOME_MS        10000 /* from Hello to Welcome */
#define WORKER_PROGRESS_MS       200   /* between Loading messages */
#define WORKER_KERNELS_END_MS    700   /* for a traced device's last records; EXIT_GRACE less RELAUNCH_DELAY is 750 */

/* ---- log ---- */

enum worker_log_level { WORKER_LOG_ERROR, WORKER_LOG_WARNING, WORKER_LOG_INFO, WORKER_LOG_DEBUG };

struct worker_log {
    enum worker_log_level level;
    atomic_int rank; /* -1: not known yet; set once, while the guard thread may log */
};

/* One line on stderr, "tandem-worker[rank] I text", by one write, so that ranks do not mix within a line. */
void worker_log(const struct worker_log *log, enum worker_log_level level, const char *fmt, ...) STATUS_PRINTF(3, 4);
/* "1.5 GiB"; returns buf. */
const char *worker_size_text(char buf[32], uint64_t bytes);
/* Microseconds of CLOCK_MONOTONIC. */
int64_t worker_now_us(void);

/* ---- options ---- */

enum worker_backend_kind { WORKER_BACKEND_AUTO, WORKER_BACKEND_CUDA, WORKER_BACKEND_HOST };

struct worker_options {
    const char *model_dir;
    const char *coordinator;
    const char *group;                   /* NULL: the default one */
    struct rpc_client_security security; /* of that connection */
    uint32_t backend;                    /* enum worker_backend_kind */
    uint32_t threads;
    uint32_t max_slots;
    uint32_t max_context;
    uint32_t max_step_tokens;
    uint32_t comm_timeout_ms;
    uint32_t attach_timeout_ms;
    uint32_t log_level; /* enum worker_log_level */
    uint32_t progress;  /* enum worker_progress */
    uint64_t kv_bytes;
    uint64_t page_bytes;
    uint64_t suspend_bytes;
    uint32_t kv_ahead;        /* enum engine_ahead */
    const char *devices;      /* "0,2"; NULL: all */
    double memory_fraction;   /* of a device; 0: default */
    uint32_t random_weights;  /* a seed; 0: none */
    const char *tune_cache;   /* folder, or "off"; NULL: the default */
    uint32_t tune_ms;         /* 0: default */
    uint32_t eager;           /* 0 or 1 */
    uint32_t attention;       /* enum attn_gpu_policy */
    uint32_t all_reduce;      /* auto, peer, nccl */
    uint32_t batch_invariant; /* 0 or 1 */
    const char *trace;        /* file of the timeline; NULL: none */
    uint32_t trace_kernels;   /* 0 or 1 */
};

enum worker_progress { WORKER_PROGRESS_AUTO, WORKER_PROGRESS_BAR, WORKER_PROGRESS_LINES };

enum worker_action { WORKER_RUN, WORKER_SHOW_HELP, WORKER_SHOW_VERSION, WORKER_INSPECT };

/* Strings point into argv. INVALID_ARGUMENT names the option and says what to do. */
STATUS_MUST_CHECK enum status_code worker_options_parse(struct worker_options *o, enum worker_action *action, int argc,
                                                        char **argv, struct status *st);
void worker_options_help(void);
/* Where measured products are kept: --tune-cache, else tandem in XDG_CACHE_HOME or ~/.cache. buf may be used; NULL: nowhere. */
const char *worker_tune_dir(const struct worker_options *o, char *buf, size_t cap);

/* Prints one JSON object on the model; an error may come in the middle of it. */
STATUS_MUST_CHECK enum status_code worker_inspect(const char *path, struct status *st);

/* ---- guard ---- */

struct worker_guard {
    const struct worker_log *log;
    void (*on_exit)(void *ctx); /* after an exit was asked for, on the asking thread, without locks */
    void *on_exit_ctx;
    int signal_pipe[2], wake_fd;
    pthread_t thread;
    bool started;
    atomic_int exit_code; /* -1: none asked for */

    pthread_mutex_t lock;
    /* guarded by lock; times are CLOCK_MONOTONIC, 0: none */
    struct comm *comm;
    int64_t step_limit_us, abort_us, exit_us;
    bool stop;
};

/* Takes over SIGTERM, SIGINT and SIGHUP; one guard per process. Call before other threads are started. */
STATUS_MUST_CHECK enum status_code worker_guard_start(struct worker_guard *g, const struct worker_log *log,
                                                      void (*on_exit)(void *ctx), void *ctx, struct status *st);
void worker_guard_stop(struct worker_guard *g);
/* The comm to abort; NULL before it is destroyed. */
void worker_guard_set_comm(struct worker_guard *g, struct comm *comm);
/* The first request sets the status. The main thread is expected to end by itself; after abort_ms its collective is aborted,
 * WORKER_EXIT_GRACE_MS later the process ends. Do not hold control.lock. */
void worker_guard_request_exit(struct worker_guard *g, int code, uint32_t abort_ms);
/* -1: nobody asked. */
int worker_guard_exit_code(const struct worker_guard *g);
/* The step under way has limit_ms to end, else exit is requested with RELAUNCH. 0 takes the limit back. */
void worker_guard_limit_step(struct worker_guard *g, uint32_t limit_ms);

/* ---- timeline of the steps (worker_trace.c); one thread; NULL is fine but in open: nothing is written ---- */

struct worker_trace;

/* path, with ".RANK" behind it when there are several. log: told once when the file cannot be written to any more. */
STATUS_MUST_CHECK enum status_code worker_trace_open(struct worker_trace **out, const char *path, uint32_t rank,
                                                     uint32_t ranks, const struct worker_log *log, struct status *st);
void worker_trace_host(struct worker_trace *t, const char *name, uint64_t step, int64_t begin_us, int64_t end_us);
void worker_trace_step(struct worker_trace *t, const struct engine_result *r);
/* From now on the kernels and copies of a device, as its source tells them, under the steps; source->start was called. Without it
 * steps cost nothing more. */
STATUS_MUST_CHECK enum status_code worker_trace_kernels(struct worker_trace *t, const struct activity_source *source,
                                                        struct status *st);
/* Waits up to WORKER_KERNELS_END_MS for the last of them. False: in vain, and the thread that takes them may be anywhere in the
 * source, so the back end must stay as it is. */
bool worker_trace_close(struct worker_trace *t);

/* ---- kernels of the timeline (worker_kernels.c): a thread of their own takes them from the device's source ---- */

struct worker_kernels;

/* write is given whole events, each with ",\n" in front; on that thread. */
STATUS_MUST_CHECK enum status_code worker_kernels_start(struct worker_kernels **out,
                                                        const struct activity_source *source, uint32_t rank,
                                                        void (*write)(void *ctx, const char *text, size_t n), void *ctx,
                                                        struct status *st);
/* A step was computed then. The thread of the steps; it waits for nobody. */
void worker_kernels_step(struct worker_kernels *k, uint64_t step, double begin_us, double end_us);
/* Takes what is left and ends the thread. args: what the summary says of it, ",\"kernels\":...". False: it does not end, and
 * may still write. */
bool worker_kernels_end(struct worker_kernels *k, char *args, size_t cap);

/* ---- control: the stream to the coordinator ---- */

enum worker_link { WORKER_LINK_DOWN, WORKER_LINK_UP, WORKER_LINK_BROKEN };

struct worker_result {
    uint64_t step, compute_us, used_pages;
    struct kv_stats kv;
    uint32_t *tokens; /* kept and reused, as scores are */
    uint32_t n_tokens, capacity;
    struct engine_score *sample_scores, *prompt_scores;
    uint32_t n_sample_scores, n_prompt_scores, sample_scores_capacity, prompt_scores_capacity;
};

struct worker_control {
    const struct worker_log *log;
    struct worker_guard *guard;
    const char *address;
    const struct rpc_client_security *security; /* NULL: plaintext */
    Tandem__V1__Hello hello;                    /* its strings belong to the caller */
    atomic_uint_fast64_t last_step;

    pthread_mutex_t lock;
    pthread_cond_t changed; /* for the main thread */
    pthread_cond_t to_send; /* for the sender */
    /* guarded by lock */
    enum worker_link link;
    struct status broken;    /* why the link is broken */
    struct status violation; /* code not OK: the coordinator broke the protocol */
    Tandem__V1__CoordinatorMessage *queue[WORKER_QUEUE_MAX];
    uint32_t head, count;
    struct worker_result results[WORKER_QUEUE_MAX]; /* to be sent; full: the main thread waits */
    uint32_t result_head, result_count;             /* an entry counts, and is the sender's, until it is sent */
    bool flushing;                                  /* the main thread waits for the sender */
    uint32_t in_step;                               /* plans given to the main thread whose step is not over */
    bool draining;                                  /* Shutdown without relaunch: end after the queue */
    bool sending;                                   /* the sender writes, without the lock */
    bool closing;                                   /* nothing follows what is queued: no more heartbeats */

    /* of one attachment: written by the main thread while the other threads of it do not run */
    struct rpc_channel *channel;
    struct rpc_stream *stream;
    uint64_t epoch;
    uint32_t heartbeat_ms;
    pthread_t receiver, sender;
};

enum worker_event {
    WORKER_PLAN,
    WORKER_NOTHING,   /* of worker_control_poll */
    WORKER_BROKEN,    /* attach again; control.broken says why */
    WORKER_VIOLATION, /* control.violation */
    WORKER_EXIT,      /* worker_guard_exit_code */
};

STATUS_MUST_CHECK enum status_code worker_control_init(struct worker_control *c, struct worker_guard *guard,
                                                       const struct worker_log *log, struct status *st);
void worker_control_fini(struct worker_control *c); /* detached before */
/* Tries until a coordinator says Welcome. CANCELLED when an exit was requested meanwhile; INVALID_ARGUMENT, UNIMPLEMENTED,
 * PERMISSION_DENIED, UNAUTHENTICATED: refused for good; UNAVAILABLE after timeout_ms. */
STATUS_MUST_CHECK enum status_code worker_control_attach(struct worker_control *c, uint32_t timeout_ms,
                                                         struct status *st);
void worker_control_detach(struct worker_control *c); /* fine when not attached */
/* Waits. *plan belongs to *message, which the caller frees with worker_control_step_end. */
enum worker_event worker_control_next(struct worker_control *c, Tandem__V1__CoordinatorMessage **message);
/* The same without waiting. */
enum worker_event worker_control_poll(struct worker_control *c, Tandem__V1__CoordinatorMessage **message);
/* The step of this message is over; frees it. */
void worker_control_step_end(struct worker_control *c, Tandem__V1__CoordinatorMessage *message, bool done);
/* Sends a message of this epoch. A failure breaks the link (worker_control_next reports it) and is otherwise ignored. */
void worker_control_send(struct worker_control *c, Tandem__V1__RankMessage *m);
/* Sends a StepResult; copies tokens and scores when it leaves the sending to the sender thread. */
void worker_control_result(struct worker_control *c, uint64_t step, uint64_t compute_us,
                           const struct engine_result *result);
/* Sends Fault and waits, with bounds, until the coordinator took it. */
void worker_control_fault(struct worker_control *c, const struct status *why, bool permanent);
/* Between worker_control.c and worker_send.c. wait, await_sender and finish are called with the lock.
 * wait: until then; false when the time is over. await_sender: until at most `most` results are left; false when the link
 * is not up. finish: nothing more will be sent; waits, with a bound, until the coordinator took what was. break: the stream
 * is of no use any more; any thread of the link. sender: the thread. */
bool worker_control_wait(struct worker_control *c, pthread_cond_t *cond, int64_t until_us);
bool worker_control_await_sender(struct worker_control *c, uint32_t most);
void worker_control_finish(struct worker_control *c);
void worker_control_break(struct worker_control *c, const struct status *why);
void *worker_control_sender(void *control);
/* Wakes the main thread in attach or next: it looks at the guard's exit code. Any thread. */
void worker_control_wake(void *control);

/* ---- back end ---- */

struct backend_api;
struct backend_session;
struct backend_parts;

struct worker_backend_config {
    uint32_t kind;       /* enum worker_backend_kind */
    const char *devices; /* "0,2": those that may be taken, in this order; NULL: all that the driver finds */
    struct comm *comm;
    bool kernels;               /* what devices do is recorded (b->api->activity): CUDA, or an error */
    const char *plugin;         /* path of backend_cuda.so; NULL: beside the executable */
    const char *driver_library; /* NULL: libcuda.so.1 */
};

struct worker_backend {
    void *driver, *library; /* dlopen handles; NULL: host */
    const struct backend_api *api;
    struct backend_session *session;
    const struct backend_parts *parts; /* for the engine; NULL: host */
};

/* Numbers with commas between, each below count, COMM_DEVICES_MAX at most; *n of them to device. INVALID_ARGUMENT. */
STATUS_MUST_CHECK enum status_code worker_backend_devices(uint32_t device[COMM_DEVICES_MAX], uint32_t *n,
                                                          const char *list, uint32_t count, struct status *st);
/* Chooses; at AUTO whatever keeps CUDA from serving is one log line and the host back end (b->api NULL). Collective, whatever a rank
 * is told and has: the ranks tell each other their devices, and each takes one (comm_take_device). */
STATUS_MUST_CHECK enum status_code worker_backend_open(struct worker_backend *b,
                                                       const struct worker_backend_config *cfg,
                                                       const struct worker_log *log, struct status *st);
void worker_backend_close(struct worker_backend *b);

/* ---- loop ---- */

struct worker {
    struct worker_options options;
    struct worker_log log;
    struct worker_guard guard;
    struct worker_control control;
    struct worker_backend backend;
    struct worker_trace *trace; /* NULL: none */
    struct comm *comm;
    struct engine *engine;
    uint32_t rank, size;
    uint64_t launch_id;
    char host[256], device[64];
    struct { /* main thread, while loading */
        int64_t last_sent_us, last_shown_us;
        bool bar, shown;
    } progress;
};

/* Attach, load, serve, attach again ... until the rank is to end. Returns the exit status; everything is still open. */
int worker_run(struct worker *w);

#endif
