#include "worker/worker_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static const int ending_signals[] = {SIGTERM, SIGINT, SIGHUP};
#define ENDING_SIGNALS (sizeof ending_signals / sizeof *ending_signals)

/* The one thing a handler can reach: the write end of the guard's pipe, -1 without a guard. A handler and not a signalfd,
 * because libraries (OpenBLAS) start threads before main, which block nothing and would take the signal's default. */
static atomic_int handler_fd = -1;

static void on_signal(int number)
{
    int saved = errno;
    unsigned char byte = (unsigned char)number;
    if (write(atomic_load(&handler_fd), &byte, 1) < 0)
        errno = saved; /* full: enough signals wait there already */
    errno = saved;
}

/* The guard thread takes the signals; all threads that exist later inherit the block. */
static void mask_signals(int how)
{
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < ENDING_SIGNALS; i++)
        sigaddset(&set, ending_signals[i]);
    pthread_sigmask(how, &set, NULL);
}

static void handle_signals(void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    for (size_t i = 0; i < ENDING_SIGNALS; i++)
        sigaction(ending_signals[i], &action, NULL);
}

static void wake(struct worker_guard *g)
{
    uint64_t one = 1;
    if (write(g->wake_fd, &one, sizeof one) < 0)
        return; /* EAGAIN: the counter is full, so the thread wakes anyway */
}

static int64_t earlier(int64_t a, int64_t b)
{
    return a == 0 ? b : b == 0 || a < b ? a : b;
}

/* Until the next deadline, -1: none. Called with the lock. */
static int wait_ms(const struct worker_guard *g, int64_t now_us)
{
    int64_t next_us = earlier(earlier(g->step_limit_us, g->abort_us), g->exit_us);
    if (next_us == 0)
        return -1;
    return next_us <= now_us ? 0 : (int)((next_us - now_us + 999) / 1000);
}

static void take_signals(struct worker_guard *g)
{
    unsigned char number;
    while (read(g->signal_pipe[0], &number, 1) == 1) {
        if (worker_guard_exit_code(g) < 0)
            worker_log(g->log, WORKER_LOG_INFO, "%s: ending", strsignal(number));
        worker_guard_request_exit(g, WORKER_EXIT_SIGNAL + number, WORKER_SIGNAL_GRACE_MS);
    }
}

/* Acts on deadlines that have passed; false when the thread is to end. */
static bool take_deadlines(struct worker_guard *g)
{
    int64_t now_us = worker_now_us();
    pthread_mutex_lock(&g->lock);
    bool stop = g->stop;
    bool step_late = g->step_limit_us && now_us >= g->step_limit_us;
    if (step_late)
        g->step_limit_us = 0;
    if (!stop && g->abort_us && now_us >= g->abort_us) {
        g->abort_us = 0;
        if (g->comm)
            comm_abort(g->comm); /* under the lock: set_comm(NULL) must not pass it */
    }
    bool must_exit = !stop && g->exit_us && now_us >= g->exit_us;
    pthread_mutex_unlock(&g->lock);
    if (must_exit) {
        worker_log(g->log, WORKER_LOG_WARNING, "could not end in time: leaving with status %d",
                   worker_guard_exit_code(g));
        _exit(worker_guard_exit_code(g));
    }
    if (!stop && step_late) {
        worker_log(g->log, WORKER_LOG_ERROR,
                   "the step under way did not end within %d ms after the coordinator's stream was given up "
                   "(another rank may lack it): the group must start again",
                   WORKER_STEP_GRACE_MS);
        worker_guard_request_exit(g, WORKER_EXIT_RELAUNCH, 0);
    }
    return !stop;
}

static void *guard_main(void *arg)
{
    struct worker_guard *g = arg;
    mask_signals(SIG_UNBLOCK);
    do {
        pthread_mutex_lock(&g->lock);
        int timeout_ms = wait_ms(g, worker_now_us());
        pthread_mutex_unlock(&g->lock);
        struct pollfd fds[2] = {{.fd = g->signal_pipe[0], .events = POLLIN}, {.fd = g->wake_fd, .events = POLLIN}};
        uint64_t count;
        if (poll(fds, 2, timeout_ms) < 0) /* EINTR: the byte is in the pipe */
            continue;
        if (fds[1].revents && read(g->wake_fd, &count, sizeof count) < 0)
            continue;
        if (fds[0].revents)
            take_signals(g);
    } while (take_deadlines(g));
    return NULL;
}

enum status_code worker_guard_start(struct worker_guard *g, const struct worker_log *log, void (*on_exit)(void *ctx),
                                    void *ctx, struct status *st)
{
    *g = (struct worker_guard){
        .log = log, .on_exit = on_exit, .on_exit_ctx = ctx, .signal_pipe = {-1, -1}, .wake_fd = -1};
    atomic_init(&g->exit_code, -1);
    pthread_mutex_init(&g->lock, NULL);
    g->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (g->wake_fd < 0 || pipe2(g->signal_pipe, O_CLOEXEC | O_NONBLOCK) != 0) {
        int err = errno;
        worker_guard_stop(g);
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "eventfd or pipe");
    }
    mask_signals(SIG_BLOCK);
    atomic_store(&handler_fd, g->signal_pipe[1]);
    handle_signals(on_signal);
    int err = pthread_create(&g->thread, NULL, guard_main, g);
    if (err) {
        worker_guard_stop(g);
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "guard thread");
    }
    g->started = true;
    return ST_OK;
}

void worker_guard_stop(struct worker_guard *g)
{
    if (g->started) {
        pthread_mutex_lock(&g->lock);
        g->stop = true;
        pthread_mutex_unlock(&g->lock);
        wake(g);
        pthread_join(g->thread, NULL);
        g->started = false;
    }
    if (atomic_load(&handler_fd) >= 0)
        handle_signals(SIG_IGN); /* the process is about to end anyway */
    atomic_store(&handler_fd, -1);
    int fds[] = {g->signal_pipe[0], g->signal_pipe[1], g->wake_fd};
    for (size_t i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    g->signal_pipe[0] = g->signal_pipe[1] = g->wake_fd = -1;
    pthread_mutex_destroy(&g->lock);
}

void worker_guard_set_comm(struct worker_guard *g, struct comm *comm)
{
    pthread_mutex_lock(&g->lock);
    g->comm = comm;
    pthread_mutex_unlock(&g->lock);
}

void worker_guard_request_exit(struct worker_guard *g, int code, uint32_t abort_ms)
{
    int none = -1;
    bool first = atomic_compare_exchange_strong(&g->exit_code, &none, code);
    int64_t abort_us = worker_now_us() + (int64_t)abort_ms * 1000;
    pthread_mutex_lock(&g->lock);
    /* A later, more urgent request keeps the status and moves the deadlines forward, never back. */
    g->step_limit_us = 0;
    if (first || abort_us < g->exit_us - WORKER_EXIT_GRACE_MS * 1000) {
        g->abort_us = abort_us;
        g->exit_us = abort_us + WORKER_EXIT_GRACE_MS * 1000;
    }
    pthread_mutex_unlock(&g->lock);
    wake(g);
    if (g->on_exit)
        g->on_exit(g->on_exit_ctx);
}

int worker_guard_exit_code(const struct worker_guard *g)
{
    return atomic_load(&g->exit_code);
}

void worker_guard_limit_step(struct worker_guard *g, uint32_t limit_ms)
{
    pthread_mutex_lock(&g->lock);
    g->step_limit_us = limit_ms ? worker_now_us() + (int64_t)limit_ms * 1000 : 0;
    pthread_mutex_unlock(&g->lock);
    wake(g);
}
