/* cmd_serve.c - `tandem serve`: starts tandem-coordinator, launches the ranks with mpirun, keeps both running.
 *
 *     tandem serve ---- pipe: listening, ready, group-lost, drained ----- tandem-coordinator
 *          '---- mpirun ---- tandem-worker rank 0 .. R-1
 *
 * One thread and one poll loop over the pipe and a signalfd. Both children have process groups of their own, so that a
 * Ctrl-C reaches only this process, which ends them in order: the coordinator drains first, then the ranks leave.
 *
 *     group-lost permanent=1   a rank said that starting it again would fail again: stop all, exit 1
 *     group-lost permanent=0   end mpirun (SIGTERM, then SIGKILL; its ranks die with it), launch it again
 *     mpirun ended by itself   launch it again, with a growing pause; give up after MAX_FAILURES without a "ready"
 *     coordinator ended        start it again; the ranks attach to the new one and keep their weights
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/cmd.h"
#include "coordinator/cmd_serve.h"

#define MAX_LINE       4096
#define MAX_FAILURES   8     /* launches in a row that never became ready */
#define LISTEN_WAIT_MS 15000 /* from starting the coordinator to its "listening" */
#define TERM_WAIT_MS   2500  /* from SIGTERM to SIGKILL; mpirun itself gives its ranks about one second */
#define HEALTHY_MS     30000 /* a group that was ready this long has its failures forgiven */
#define MAX_PAUSE_MS   10000

struct child {
    pid_t pid;          /* 0: not running */
    int64_t kill_at_ms; /* SIGKILL then; INT64_MAX: not asked to end */
};

struct serve {
    struct serve_setup set;

    struct child coord, ranks;
    int pipe_fd; /* read end of the coordinator's lines; -1 */
    char line[MAX_LINE];
    size_t line_len;
    bool listening; /* this coordinator has said so */
    bool ready;     /* a group serves now */
    bool ever_ready;
    bool announced;
    unsigned failures; /* launches without a ready since the last healthy time */
    unsigned coord_failures;
    int64_t start_ms;     /* of serve */
    int64_t ready_ms;     /* of the present group */
    int64_t launch_at_ms; /* the next mpirun; INT64_MAX: none planned */
    int64_t listen_by_ms;
    int stopping; /* signals seen, or a fatal error */
    int exit_code;
    char public_address[512];
    char http_address[192]; /* empty: none */
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* ---- children ---- */

/* Starts argv[0] in its own process group with no terminal input and no signal blocked. keep_fd stays open in it (-1:
 * none). death_signal: what it gets when this process dies. */
static pid_t spawn(char *const *argv, int keep_fd, int death_signal)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid)
        return pid;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, death_signal);
    if (getppid() != parent)
        _exit(1);
    setpgid(0, 0);
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        close(null);
    }
    if (keep_fd >= 0)
        fcntl(keep_fd, F_SETFD, 0);
    execvp(argv[0], argv);
    int err = errno;
    dprintf(STDERR_FILENO, "tandem serve: cannot run %s: %s%s\n", argv[0], strerror(err),
            strstr(argv[0], "mpirun") ? " (install Open MPI: apt-get install openmpi-bin, or give --mpirun PATH)" : "");
    _exit(127);
}

static void end_child(struct child *c, int64_t wait_ms)
{
    if (!c->pid || c->kill_at_ms != INT64_MAX)
        return;
    kill(-c->pid, SIGTERM);
    c->kill_at_ms = now_ms() + wait_ms;
}

static bool start_coordinator(struct serve *s)
{
    int fds[2];
    if (pipe2(fds, O_CLOEXEC))
        return cmd_error(CMD_FAILED, "serve", "pipe: %s", strerror(errno)), false;
    char number[16];
    snprintf(number, sizeof number, "%d", fds[1]);
    struct argument_list *a = &s->set.coordinator;
    int keep = a->n;
    bool ok = arguments_push2(a, "--supervisor-fd", number);
    s->coord = (struct child){ok ? spawn(a->v, fds[1], SIGTERM) : -1, INT64_MAX};
    arguments_cut(a, keep);
    close(fds[1]);
    if (s->coord.pid < 0) {
        s->coord.pid = 0;
        close(fds[0]);
        return cmd_error(CMD_FAILED, "serve", "cannot start the coordinator: %s", strerror(errno)), false;
    }
    s->pipe_fd = fds[0];
    s->line_len = 0;
    s->listening = s->ready = false;
    s->listen_by_ms = now_ms() + LISTEN_WAIT_MS;
    return true;
}

static bool start_ranks(struct serve *s)
{
    s->launch_at_ms = INT64_MAX;
    s->ranks = (struct child){spawn(s->set.mpirun.v, -1, SIGKILL), INT64_MAX};
    if (s->ranks.pid > 0)
        return true;
    s->ranks.pid = 0;
    return cmd_error(CMD_FAILED, "serve", "cannot start mpirun: %s", strerror(errno)), false;
}

/* Ends everything in order; the loop goes on until the children are gone. */
static void stop(struct serve *s, int exit_code)
{
    if (!s->stopping)
        s->exit_code = exit_code;
    s->stopping++;
    s->launch_at_ms = INT64_MAX;
    if (s->stopping == 1 && s->coord.pid)
        end_child(&s->coord, exit_code ? TERM_WAIT_MS : (int64_t)(s->set.drain_s * 1000) + 5000);
    else
        end_child(&s->ranks, TERM_WAIT_MS);
    if (s->stopping > 1) {
        if (s->coord.pid)
            s->coord.kill_at_ms = 0;
        if (s->ranks.pid)
            s->ranks.kill_at_ms = 0;
    }
    if (exit_code)
        end_child(&s->ranks, TERM_WAIT_MS);
}

/* Plans the next launch of the ranks, or gives up. */
static void plan_launch(struct serve *s)
{
    if (s->stopping)
        return;
    if (s->ready_ms && now_ms() - s->ready_ms > HEALTHY_MS)
        s->failures = 0;
    s->ready_ms = 0;
    if (++s->failures > MAX_FAILURES) {
        cmd_error(CMD_FAILED, "serve", "the worker group failed %u times in a row; giving up", s->failures - 1);
        stop(s, CMD_FAILED);
        return;
    }
    int64_t pause = s->failures == 1 ? 0 : 100ll << s->failures;
    s->launch_at_ms = now_ms() + (pause > MAX_PAUSE_MS ? MAX_PAUSE_MS : pause);
}

/* ---- the coordinator's lines ---- */

/* The word behind key, up to the next blank. */
static void copy_word(char *out, size_t cap, const char *line, const char *key)
{
    const char *p = strstr(line, key);
    if (p) {
        p += strlen(key);
        snprintf(out, cap, "%.*s", (int)strcspn(p, " "), p);
    }
}

static void on_listening(struct serve *s, const char *rest)
{
    s->listening = true;
    s->listen_by_ms = INT64_MAX;
    copy_word(s->public_address, sizeof s->public_address, rest, "public=");
    copy_word(s->http_address, sizeof s->http_address, rest, " http=");
    if (!s->ranks.pid && s->launch_at_ms == INT64_MAX && !s->stopping)
        s->launch_at_ms = now_ms();
}

static void on_ready(struct serve *s)
{
    s->ready = s->ever_ready = true;
    s->ready_ms = now_ms();
    s->coord_failures = 0;
    if (s->announced) {
        fprintf(stderr, "tandem serve: serving again on %s\n", s->public_address);
        return;
    }
    s->announced = true;
    fprintf(stderr, "tandem serve: ready on %s%s%s%s after %.2f s, %llu rank%s; Ctrl-C stops\n", s->public_address,
            s->http_address[0] ? " and http://" : "", s->http_address, s->http_address[0] ? "/v1" : "",
            (double)(now_ms() - s->start_ms) / 1e3, (unsigned long long)s->set.tp, s->set.tp == 1 ? "" : "s");
}

static void on_group_lost(struct serve *s, const char *rest)
{
    const char *reason = strstr(rest, "reason=");
    reason = reason ? reason + strlen("reason=") : "unknown";
    s->ready = false;
    if (strstr(rest, "permanent=1")) {
        if (!s->stopping)
            cmd_error(CMD_FAILED, "serve", "%s", reason);
        stop(s, CMD_FAILED);
        return;
    }
    if (s->stopping)
        return;
    fprintf(stderr, "tandem serve: the worker group was lost (%s); starting a new one\n", reason);
    if (s->ranks.pid)
        end_child(&s->ranks, TERM_WAIT_MS); /* launched again when it is gone */
}

static void on_line(struct serve *s, const char *line)
{
    if (!strncmp(line, "listening ", 10))
        on_listening(s, line + 10);
    else if (!strncmp(line, "ready ", 6))
        on_ready(s);
    else if (!strncmp(line, "group-lost ", 11))
        on_group_lost(s, line + 11);
    /* "drained" needs nothing: the coordinator ends by itself. Unknown lines are for later versions. */
}

static void read_lines(struct serve *s)
{
    ssize_t n = read(s->pipe_fd, s->line + s->line_len, sizeof s->line - 1 - s->line_len);
    if (n <= 0) {
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            return;
        close(s->pipe_fd);
        s->pipe_fd = -1;
        return;
    }
    s->line_len += (size_t)n;
    for (char *nl; (nl = memchr(s->line, '\n', s->line_len));) {
        *nl = '\0';
        on_line(s, s->line);
        size_t used = (size_t)(nl + 1 - s->line);
        s->line_len -= used;
        memmove(s->line, nl + 1, s->line_len);
    }
    if (s->line_len == sizeof s->line - 1)
        s->line_len = 0; /* no line of ours is that long */
}

/* ---- ends of children ---- */

static void describe_end(int status, char *out, size_t n)
{
    if (WIFSIGNALED(status))
        snprintf(out, n, "was killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        snprintf(out, n, "ended with status %d", WEXITSTATUS(status));
}

static void coordinator_ended(struct serve *s, int status)
{
    while (s->pipe_fd >= 0)
        read_lines(s); /* what it said last; ends at end of file */
    s->coord = (struct child){0, INT64_MAX};
    s->listening = s->ready = false;
    s->listen_by_ms = INT64_MAX;
    if (s->stopping) {
        /* A drained coordinator has told its ranks to leave: give them a moment before they are made to. */
        if (s->ranks.pid && s->ranks.kill_at_ms == INT64_MAX) {
            if (s->exit_code || !s->ever_ready)
                end_child(&s->ranks, TERM_WAIT_MS);
            else
                s->ranks.kill_at_ms = now_ms() + TERM_WAIT_MS;
        }
        return;
    }
    char how[96];
    describe_end(status, how, sizeof how);
    bool refused = WIFEXITED(status) && WEXITSTATUS(status) && !s->ever_ready; /* it has said why on stderr */
    if (refused || ++s->coord_failures > MAX_FAILURES) {
        cmd_error(CMD_FAILED, "serve", "the coordinator %s", how);
        stop(s, CMD_FAILED);
        return;
    }
    fprintf(stderr, "tandem serve: the coordinator %s; starting it again\n", how);
    if (!start_coordinator(s))
        stop(s, CMD_FAILED);
}

static void ranks_ended(struct serve *s, int status)
{
    bool asked = s->ranks.kill_at_ms != INT64_MAX;
    kill(-s->ranks.pid, SIGKILL); /* what may be left of its process group */
    s->ranks = (struct child){0, INT64_MAX};
    if (s->stopping)
        return;
    char how[96];
    describe_end(status, how, sizeof how);
    /* Before anything ever served, a plain failure of the launch (wrong option, no mpirun, no slots) will not pass. A
     * rank's own fault has come as "group-lost permanent=1" or will in a moment, with the better message. */
    if (!s->ever_ready && !asked && WIFEXITED(status) && WEXITSTATUS(status) && WEXITSTATUS(status) != 75) {
        while (s->pipe_fd >= 0 && !s->stopping && poll(&(struct pollfd){s->pipe_fd, POLLIN, 0}, 1, 1000) > 0)
            read_lines(s);
        if (!s->stopping) {
            cmd_error(CMD_FAILED, "serve", "mpirun %s; its message stands above", how);
            stop(s, CMD_FAILED);
        }
        return;
    }
    if (!asked)
        fprintf(stderr, "tandem serve: mpirun %s; starting a new worker group\n", how);
    plan_launch(s);
}

static void reap(struct serve *s)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == s->coord.pid)
            coordinator_ended(s, status);
        else if (pid == s->ranks.pid)
            ranks_ended(s, status);
    }
}

/* ---- the loop ---- */

static int64_t earliest(const struct serve *s)
{
    int64_t t = s->launch_at_ms;
    const int64_t others[] = {s->coord.pid ? s->coord.kill_at_ms : INT64_MAX,
                              s->ranks.pid ? s->ranks.kill_at_ms : INT64_MAX, s->listen_by_ms};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (others[i] < t)
            t = others[i];
    return t;
}

static void on_time(struct serve *s)
{
    int64_t now = now_ms();
    struct child *children[] = {&s->coord, &s->ranks};
    for (int i = 0; i < 2; i++)
        if (children[i]->pid && now >= children[i]->kill_at_ms) {
            kill(-children[i]->pid, SIGKILL);
            children[i]->kill_at_ms = INT64_MAX - 1; /* asked; nothing stronger is left */
        }
    if (now >= s->listen_by_ms) {
        s->listen_by_ms = INT64_MAX;
        cmd_error(CMD_FAILED, "serve", "the coordinator did not listen within %d s", LISTEN_WAIT_MS / 1000);
        stop(s, CMD_FAILED);
    }
    if (now >= s->launch_at_ms && s->listening && !s->ranks.pid && !s->stopping && !start_ranks(s))
        stop(s, CMD_FAILED);
}

static void supervise(struct serve *s, int signal_fd)
{
    while (!s->stopping || s->coord.pid || s->ranks.pid) {
        int64_t until = earliest(s);
        int64_t wait = until == INT64_MAX ? 1000 : until - now_ms();
        struct pollfd fds[] = {{signal_fd, POLLIN, 0}, {s->pipe_fd, POLLIN, 0}};
        poll(fds, s->pipe_fd >= 0 ? 2 : 1, wait < 0 ? 0 : wait > 1000 ? 1000 : (int)wait);
        if (s->pipe_fd >= 0 && fds[1].revents)
            read_lines(s);
        struct signalfd_siginfo info;
        while (read(signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
            if (info.ssi_signo == SIGCHLD)
                continue;
            fprintf(stderr, "tandem serve: %s\n", s->stopping ? "stopping at once" : "stopping: draining first");
            stop(s, CMD_OK);
        }
        reap(s);
        on_time(s);
    }
}

int cmd_serve(int argc, char **argv)
{
    struct serve s = {.set = {.tp = 1, .drain_s = 30, .local_only = true},
                      .pipe_fd = -1,
                      .start_ms = now_ms(),
                      .launch_at_ms = INT64_MAX,
                      .listen_by_ms = INT64_MAX,
                      .coord = {0, INT64_MAX},
                      .ranks = {0, INT64_MAX}};
    int rc = serve_parse(argc, argv, &s.set);
    if (rc == CMD_OK) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGCHLD);
        sigaddset(&set, SIGTERM);
        sigaddset(&set, SIGINT);
        struct sigaction hup;
        if (!sigaction(SIGHUP, NULL, &hup) && hup.sa_handler != SIG_IGN)
            sigaddset(&set, SIGHUP); /* under nohup it stays ignored */
        sigprocmask(SIG_BLOCK, &set, NULL);
        signal(SIGPIPE, SIG_IGN);
        int signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
        if (signal_fd < 0)
            rc = cmd_error(CMD_FAILED, "serve", "signalfd: %s", strerror(errno));
        else if (!serve_prepare(&s.set) || !start_coordinator(&s))
            rc = CMD_FAILED;
        else {
            supervise(&s, signal_fd);
            rc = s.exit_code;
        }
        if (signal_fd >= 0)
            close(signal_fd);
    }
    if (s.pipe_fd >= 0)
        close(s.pipe_fd);
    serve_release(&s.set);
    return rc < 0 ? CMD_OK : rc;
}
