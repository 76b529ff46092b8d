#include "worker/worker_internal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

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
    struct signalfd_siginfo info;
    while (read(g->signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
        if (worker_guard_exit_code(g) < 0)
            worker_log(g->log, WORKER_LOG_INFO, "%s: ending", strsignal((int)info.ssi_signo));
        worker_guard_request_exit(g, WORKER_EXIT_SIGNAL + (int)info.ssi_signo, WORKER_SIGNAL_GRACE_MS);
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
                   "the step under way did not end within %d ms after the coordinator was lost "
                   "(another rank may lack it): the group must start again",
                   WORKER_STEP_GRACE_MS);
        worker_guard_request_exit(g, WORKER_EXIT_RELAUNCH, 0);
    }
    return !stop;
}

static void *guard_main(void *arg)
{
    struct worker_guard *g = arg;
    do {
        pthread_mutex_lock(&g->lock);
        int timeout_ms = wait_ms(g, worker_now_us());
        pthread_mutex_unlock(&g->lock);
        struct pollfd fds[2] = {{.fd = g->signal_fd, .events = POLLIN}, {.fd = g->wake_fd, .events = POLLIN}};
        if (poll(fds, 2, timeout_ms) > 0) {
            uint64_t count;
            if (fds[1].revents && read(g->wake_fd, &count, sizeof count) < 0)
                continue;
            if (fds[0].revents)
                take_signals(g);
        }
    } while (take_deadlines(g));
    return NULL;
}

enum status_code worker_guard_start(struct worker_guard *g, const struct worker_log *log, void (*on_exit)(void *ctx),
                                    void *ctx, struct status *st)
{
    *g = (struct worker_guard){.log = log, .on_exit = on_exit, .on_exit_ctx = ctx, .signal_fd = -1, .wake_fd = -1};
    atomic_init(&g->exit_code, -1);
    pthread_mutex_init(&g->lock, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    int err = pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (err)
        return status_errno(st, ST_INTERNAL, err, "pthread_sigmask");
    g->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    g->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (g->signal_fd < 0 || g->wake_fd < 0) {
        err = errno;
        worker_guard_stop(g);
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "signalfd");
    }
    err = pthread_create(&g->thread, NULL, guard_main, g);
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
    if (g->signal_fd >= 0)
        close(g->signal_fd);
    if (g->wake_fd >= 0)
        close(g->wake_fd);
    g->signal_fd = g->wake_fd = -1;
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
