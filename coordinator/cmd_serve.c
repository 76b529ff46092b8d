/* cmd_serve.c - `tandem serve`: starts tandem-coordinator, launches the ranks with mpirun, keeps both running.
 *
 *     tandem serve ---- pipe: listening, attaching, ready, group-lost, ... ----- tandem-coordinator
 *          |---- mpirun ---- tandem-worker rank 0 .. R-1      group g0 (with --groups 1 it has no name)
 *          '---- mpirun ---- tandem-worker rank 0 .. R-1      group g1 ...
 *
 * One thread and one poll loop over the pipe and a signalfd. Both children have process groups of their own, so that a
 * Ctrl-C reaches only this process, which ends them in order: the coordinator drains first, then the ranks leave.
 *
 *     group-lost permanent=1   a rank said that starting it again would fail again: give the group up
 *     group-lost permanent=0   end mpirun (SIGTERM, then SIGKILL; its ranks die with it), launch it again
 *     group-drained restart=1  its ranks leave; launch it again
 *     group-drained restart=0  its ranks leave, and it stays away
 *     no "attaching" in time   end mpirun, launch it again
 *     mpirun ended by itself   launch it again, with a growing pause; give up after MAX_FAILURES without a "ready", and at
 *                              once when none of the groups has come further than that
 *     all groups given up      stop all, exit 1
 *     coordinator ended        start it again, with a growing pause when that fails (a file may be on its way to its place);
 *                              the ranks attach to the new one and keep their weights
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
#include <unistd.h>

#include "coordinator/cmd.h"
#include "coordinator/cmd_serve.h"

#define MAX_LINE       4096
#define MAX_FAILURES   8     /* launches in a row that never became ready */
#define MAX_RETURNS    20    /* starts of the coordinator in a row that did, once it had served: some two minutes */
#define LISTEN_WAIT_MS 15000 /* from starting the coordinator to its "listening" */
#define TERM_WAIT_MS   2500  /* from SIGTERM to SIGKILL; mpirun itself gives its ranks about one second */
#define HEALTHY_MS     30000 /* a group that was ready this long has its failures forgiven */
#define MAX_PAUSE_MS   10000

struct child {
    pid_t pid;          /* 0: not running */
    int64_t kill_at_ms; /* SIGKILL then; INT64_MAX: not asked to end */
};

struct ranks {
    char name[16]; /* empty: the only group */
    struct child child;
    bool ready; /* it serves now */
    bool ever_ready;
    bool refused;         /* its last mpirun failed by itself, and no rank has attached since */
    bool gone;            /* given up, or drained for good */
    unsigned failures;    /* launches without a ready since the last healthy time */
    int64_t ready_ms;     /* of the present epoch */
    int64_t launch_at_ms; /* the next mpirun; INT64_MAX: none planned */
    int64_t attach_by_ms; /* a first rank, or mpirun hangs; INT64_MAX: none is waited for */
};

struct serve {
    struct serve_setup set;

    struct child coord;
    struct ranks group[SERVE_MAX_GROUPS];
    int pipe_fd; /* read end of the coordinator's lines; -1 */
    char line[MAX_LINE];
    size_t line_len;
    bool listening; /* this coordinator has said so */
    bool announced;
    char refusal[1024]; /* why this coordinator does not start; empty: it has not said */
    unsigned coord_failures;
    int64_t coord_at_ms; /* the coordinator's next start; INT64_MAX: none planned */
    int64_t listen_by_ms;
    int stopping; /* signals seen, or a fatal error */
    int exit_code;
    char public_address[512];
    char http_address[192]; /* empty: none */
};

/* ---- children ---- */

/* Starts argv[0] in its own process group with no terminal input and no signal blocked. keep_fd stays open in it (-1:
 * none). death_signal: what it gets when this process dies. With --json standard output is ours alone. */
static pid_t spawn(const struct serve *s, char *const *argv, int keep_fd, int death_signal)
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
    if (s->set.json)
        dup2(STDERR_FILENO, STDOUT_FILENO);
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
    c->kill_at_ms = serve_now_ms() + wait_ms;
}

/* Before the next start after so many failures in a row: the first is soon made good. */
static int64_t pause_ms(unsigned failures)
{
    int64_t pause = failures <= 1 ? 0 : 100ll << (failures < 16 ? failures : 16);
    return pause > MAX_PAUSE_MS ? MAX_PAUSE_MS : pause;
}

static bool start_coordinator(struct serve *s)
{
    int fds[2];
    s->coord_at_ms = INT64_MAX;
    if (pipe2(fds, O_CLOEXEC))
        return serve_error(&s->set, CMD_FAILED, "pipe: %s", strerror(errno)), false;
    char **number = &s->set.coordinator.v[SERVE_FD_AT];
    free(*number);
    if (asprintf(number, "%d", fds[1]) < 0)
        *number = NULL;
    s->coord = (struct child){*number ? spawn(s, s->set.coordinator.v, fds[1], SIGTERM) : -1, INT64_MAX};
    close(fds[1]);
    if (s->coord.pid < 0) {
        s->coord.pid = 0;
        close(fds[0]);
        return serve_error(&s->set, CMD_FAILED, "cannot start the coordinator: %s", strerror(errno)), false;
    }
    s->pipe_fd = fds[0];
    s->line_len = 0;
    s->listening = false;
    s->refusal[0] = '\0';
    s->listen_by_ms = serve_now_ms() + LISTEN_WAIT_MS;
    return true;
}

/* Before its first rank attaches nobody else watches a launch. */
static void await_ranks(const struct serve *s, struct ranks *g)
{
    g->attach_by_ms = serve_now_ms() + (int64_t)(s->set.launch_s * 1000);
}

static bool start_ranks(struct serve *s, struct ranks *g)
{
    g->launch_at_ms = INT64_MAX;
    g->child = (struct child){spawn(s, s->set.mpirun[g - s->group].v, -1, SIGKILL), INT64_MAX};
    if (g->child.pid > 0) {
        await_ranks(s, g);
        serve_event(&s->set, "launching", g->name, json_pack("{s:i}", "attempt", (int)g->failures + 1));
        return true;
    }
    g->child.pid = 0;
    return serve_error(&s->set, CMD_FAILED, "cannot start mpirun: %s", strerror(errno)), false;
}

static bool any_ranks(const struct serve *s)
{
    for (uint64_t i = 0; i < s->set.groups; i++)
        if (s->group[i].child.pid)
            return true;
    return false;
}

static bool ever_ready(const struct serve *s)
{
    for (uint64_t i = 0; i < s->set.groups; i++)
        if (s->group[i].ever_ready)
            return true;
    return false;
}

/* Ends everything in order; the loop goes on until the children are gone. */
static void stop(struct serve *s, int exit_code)
{
    if (!s->stopping)
        s->exit_code = exit_code;
    s->stopping++;
    s->coord_at_ms = INT64_MAX;
    bool ranks = exit_code != 0;
    if (s->stopping == 1 && s->coord.pid)
        end_child(&s->coord, exit_code ? TERM_WAIT_MS : (int64_t)(s->set.drain_s * 1000) + 5000);
    else
        ranks = true;
    if (s->stopping > 1 && s->coord.pid)
        s->coord.kill_at_ms = 0;
    for (uint64_t i = 0; i < s->set.groups; i++) {
        struct ranks *g = &s->group[i];
        g->launch_at_ms = INT64_MAX;
        if (ranks)
            end_child(&g->child, TERM_WAIT_MS);
        if (s->stopping > 1 && g->child.pid)
            g->child.kill_at_ms = 0;
    }
}

/* The group is not started again. Without another, nothing is left to do. */
static void give_up(struct serve *s, struct ranks *g)
{
    g->gone = true;
    g->launch_at_ms = INT64_MAX;
    for (uint64_t i = 0; i < s->set.groups; i++)
        if (!s->group[i].gone) {
            end_child(&g->child, TERM_WAIT_MS);
            fprintf(stderr, "tandem serve: going on without group %s\n", g->name);
            return;
        }
    stop(s, CMD_FAILED);
}

/* Plans the next launch of the ranks, or gives up. */
static void plan_launch(struct serve *s, struct ranks *g)
{
    if (s->stopping || g->gone)
        return;
    if (g->ready_ms && serve_now_ms() - g->ready_ms > HEALTHY_MS)
        g->failures = 0;
    g->ready_ms = 0;
    if (++g->failures > MAX_FAILURES) {
        serve_error(&s->set, CMD_FAILED, "the worker group%s%s failed %u times in a row; giving up",
                    g->name[0] ? " " : "", g->name, g->failures - 1);
        give_up(s, g);
        return;
    }
    g->launch_at_ms = serve_now_ms() + pause_ms(g->failures);
}

/* ---- the coordinator's lines ---- */

/* Where clients find us. */
static json_t *addresses(const struct serve *s)
{
    json_t *facts = json_pack("{s:o}", "addresses", serve_list(s->public_address));
    if (s->http_address[0])
        json_object_set_new(facts, "http", json_string(s->http_address));
    return facts;
}

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
    serve_event(&s->set, "listening", NULL, addresses(s));
    for (uint64_t i = 0; i < s->set.groups; i++) {
        struct ranks *g = &s->group[i];
        if (g->child.pid)
            await_ranks(s, g); /* those of before come back */
        else if (g->launch_at_ms == INT64_MAX && !s->stopping && !g->gone)
            g->launch_at_ms = serve_now_ms();
    }
}

/* Whom a line speaks of; NULL: a group that is not ours, it attached by itself. */
static struct ranks *group_of(struct serve *s, const char *rest)
{
    char name[64] = "";
    const char *end = strstr(rest, " reason=");
    copy_word(name, sizeof name, rest, " group=");
    const char *at = strstr(rest, " group=");
    if (at && end && at > end) /* in the text */
        name[0] = '\0';
    for (uint64_t i = 0; i < s->set.groups; i++)
        if (strcmp(s->group[i].name, name) == 0)
            return &s->group[i];
    return NULL;
}

static void announce(struct serve *s)
{
    char of[64] = "";
    s->announced = true;
    if (s->set.groups > 1)
        snprintf(of, sizeof of, " in each of %llu groups, the first is ready", (unsigned long long)s->set.groups);
    fprintf(stderr, "tandem serve: ready on %s%s%s%s after %.2f s, %llu rank%s%s; Ctrl-C stops\n", s->public_address,
            s->http_address[0] ? " and http://" : "", s->http_address, s->http_address[0] ? "/v1" : "",
            (double)(serve_now_ms() - s->set.start_ms) / 1e3, (unsigned long long)s->set.tp, s->set.tp == 1 ? "" : "s",
            of);
}

static void on_attaching(struct serve *s, const char *rest)
{
    struct ranks *g = group_of(s, rest);
    if (!g)
        return;
    g->attach_by_ms = INT64_MAX; /* from here on the coordinator watches it */
    g->refused = false;
}

static void on_ready(struct serve *s, const char *rest)
{
    struct ranks *g = group_of(s, rest);
    s->coord_failures = 0;
    if (!g)
        return;
    g->ready = g->ever_ready = true;
    g->ready_ms = serve_now_ms();
    json_t *facts = addresses(s);
    json_object_set_new(facts, "ranks", json_integer((json_int_t)s->set.tp));
    json_object_set_new(facts, "groups", json_integer((json_int_t)s->set.groups));
    serve_event(&s->set, "ready", g->name, facts);
    if (!s->announced)
        announce(s);
    else if (g->name[0])
        fprintf(stderr, "tandem serve: group %s serves\n", g->name);
    else
        fprintf(stderr, "tandem serve: serving again on %s\n", s->public_address);
}

static void on_loading(const struct serve *s, const struct ranks *g)
{
    if (g)
        serve_event(&s->set, "loading", g->name, NULL);
}

static void on_group_lost(struct serve *s, const char *rest)
{
    struct ranks *g = group_of(s, rest);
    const char *reason = strstr(rest, "reason=");
    reason = reason ? reason + strlen("reason=") : "unknown";
    if (!g)
        return;
    g->ready = false;
    bool permanent = strstr(rest, " permanent=1 ") != NULL;
    serve_event(&s->set, "group-lost", g->name,
                json_pack("{s:o, s:b}", "reason", cmd_json_string(reason), "permanent", permanent));
    if (permanent) {
        if (!s->stopping)
            serve_error(&s->set, CMD_FAILED, "%s%s%s", g->name, g->name[0] ? ": " : "", reason);
        give_up(s, g);
        return;
    }
    if (s->stopping)
        return;
    fprintf(stderr, "tandem serve: the worker group%s%s was lost (%s); starting a new one\n", g->name[0] ? " " : "",
            g->name, reason);
    if (g->child.pid)
        end_child(&g->child, TERM_WAIT_MS); /* launched again when it is gone */
}

/* Its ranks were told to leave; they get a moment before they are made to. */
static void on_group_drained(struct serve *s, const char *rest)
{
    struct ranks *g = group_of(s, rest);
    if (!g || s->stopping)
        return;
    g->ready = false;
    g->failures = 0;
    g->gone = strstr(rest, " restart=1") == NULL;
    serve_event(&s->set, "group-drained", g->name, json_pack("{s:b}", "restart", !g->gone));
    if (g->child.pid && g->child.kill_at_ms == INT64_MAX)
        g->child.kill_at_ms = serve_now_ms() + TERM_WAIT_MS;
    fprintf(stderr, "tandem serve: the worker group%s%s was drained%s\n", g->name[0] ? " " : "", g->name,
            g->gone ? "" : "; starting it again");
}

static void on_line(struct serve *s, const char *line)
{
    if (!strncmp(line, "listening ", 10))
        on_listening(s, line + 10);
    else if (!strncmp(line, "attaching ", 10))
        on_attaching(s, line);
    else if (!strncmp(line, "loading ", 8))
        on_loading(s, group_of(s, line));
    else if (!strncmp(line, "ready ", 6))
        on_ready(s, line);
    else if (!strncmp(line, "group-lost ", 11))
        on_group_lost(s, line);
    else if (!strncmp(line, "group-drained ", 14))
        on_group_drained(s, line);
    else if (!strncmp(line, "refused reason=", 15))
        snprintf(s->refusal, sizeof s->refusal, "%s", line + 15);
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

/* A drained coordinator has told its ranks to leave: give them a moment before they are made to. */
static void let_ranks_leave(struct serve *s)
{
    for (uint64_t i = 0; i < s->set.groups; i++) {
        struct child *c = &s->group[i].child;
        if (!c->pid || c->kill_at_ms != INT64_MAX)
            continue;
        if (s->exit_code || !ever_ready(s))
            end_child(c, TERM_WAIT_MS);
        else
            c->kill_at_ms = serve_now_ms() + TERM_WAIT_MS;
    }
}

static void coordinator_ended(struct serve *s, int status)
{
    while (s->pipe_fd >= 0)
        read_lines(s); /* what it said last; ends at end of file */
    s->coord = (struct child){0, INT64_MAX};
    s->listening = false;
    s->listen_by_ms = INT64_MAX;
    for (uint64_t i = 0; i < s->set.groups; i++) {
        s->group[i].ready = false;
        s->group[i].attach_by_ms = INT64_MAX; /* to whom? */
    }
    if (s->stopping) {
        let_ranks_leave(s);
        return;
    }
    char how[sizeof s->refusal];
    describe_end(status, how, 96);
    serve_event(&s->set, "ended", NULL, json_pack("{s:s, s:s}", "program", "coordinator", "how", how));
    bool refused = WIFEXITED(status) && WEXITSTATUS(status) && !ever_ready(s); /* it has said why on stderr */
    if (refused || ++s->coord_failures > (ever_ready(s) ? MAX_RETURNS : MAX_FAILURES)) {
        cmd_error(CMD_FAILED, "serve", "the coordinator %s", how);
        if (s->refusal[0])
            snprintf(how, sizeof how, "%s", s->refusal);
        serve_event(&s->set, "error", NULL, json_pack("{s:o}", "message", cmd_json_string(how)));
        stop(s, CMD_FAILED);
        return;
    }
    fprintf(stderr, "tandem serve: the coordinator %s; starting it again\n", how);
    s->coord_at_ms = serve_now_ms() + pause_ms(s->coord_failures);
}

static bool all_refused(const struct serve *s)
{
    for (uint64_t i = 0; i < s->set.groups; i++)
        if (!s->group[i].gone && !s->group[i].refused)
            return false;
    return true;
}

static void ranks_ended(struct serve *s, struct ranks *g, int status)
{
    bool asked = g->child.kill_at_ms != INT64_MAX;
    kill(-g->child.pid, SIGKILL); /* what may be left of its process group */
    g->child = (struct child){0, INT64_MAX};
    g->attach_by_ms = INT64_MAX;
    if (s->stopping || g->gone)
        return;
    char how[96];
    describe_end(status, how, sizeof how);
    serve_event(&s->set, "ended", g->name, json_pack("{s:s, s:s}", "program", "mpirun", "how", how));
    /* Before it ever served, a plain failure of the launch (wrong option, no mpirun, no slots) will not pass: unless
     * another group was launched in the same way and has come further. A rank's own fault has come as "group-lost
     * permanent=1" or will in a moment, with the better message. */
    if (!g->ever_ready && !asked && WIFEXITED(status) && WEXITSTATUS(status) && WEXITSTATUS(status) != 75) {
        g->refused = true;
        bool all = all_refused(s);
        while (all && s->pipe_fd >= 0 && !s->stopping && !g->gone &&
               poll(&(struct pollfd){s->pipe_fd, POLLIN, 0}, 1, 1000) > 0)
            read_lines(s);
        if (s->stopping || g->gone)
            return;
        if (all) {
            serve_error(&s->set, CMD_FAILED, "mpirun %s; its message stands above", how);
            stop(s, CMD_FAILED);
            return;
        }
    }
    if (!asked)
        fprintf(stderr, "tandem serve: mpirun%s%s %s; starting a new worker group\n", g->name[0] ? " of group " : "",
                g->name, how);
    plan_launch(s, g);
}

static void reap(struct serve *s)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid == s->coord.pid)
            coordinator_ended(s, status);
        for (uint64_t i = 0; i < s->set.groups; i++)
            if (pid == s->group[i].child.pid)
                ranks_ended(s, &s->group[i], status);
    }
}

/* ---- the loop ---- */

static int64_t min_ms(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t earliest(const struct serve *s)
{
    int64_t t = min_ms(s->listen_by_ms, s->coord.pid ? s->coord.kill_at_ms : s->coord_at_ms);
    for (uint64_t i = 0; i < s->set.groups; i++) {
        const struct ranks *g = &s->group[i];
        t = min_ms(t, min_ms(g->launch_at_ms, g->child.pid ? g->child.kill_at_ms : INT64_MAX));
        t = min_ms(t, g->attach_by_ms);
    }
    return t;
}

static void kill_late(struct child *c, int64_t now)
{
    if (!c->pid || now < c->kill_at_ms)
        return;
    kill(-c->pid, SIGKILL);
    c->kill_at_ms = INT64_MAX - 1; /* asked; nothing stronger is left */
}

static void end_hung_launch(const struct serve *s, struct ranks *g)
{
    g->attach_by_ms = INT64_MAX;
    if (!g->child.pid || g->child.kill_at_ms != INT64_MAX || s->stopping)
        return;
    fprintf(stderr, "tandem serve: no rank%s%s attached within %g s (--launch-timeout); starting mpirun again\n",
            g->name[0] ? " of group " : "", g->name, s->set.launch_s);
    end_child(&g->child, TERM_WAIT_MS);
}

static void on_time(struct serve *s)
{
    int64_t now = serve_now_ms();
    kill_late(&s->coord, now);
    for (uint64_t i = 0; i < s->set.groups; i++)
        kill_late(&s->group[i].child, now);
    if (now >= s->coord_at_ms && !s->stopping && !start_coordinator(s))
        stop(s, CMD_FAILED);
    if (now >= s->listen_by_ms) {
        s->listen_by_ms = INT64_MAX;
        serve_error(&s->set, CMD_FAILED, "the coordinator did not listen within %d s", LISTEN_WAIT_MS / 1000);
        stop(s, CMD_FAILED);
    }
    for (uint64_t i = 0; i < s->set.groups; i++) {
        struct ranks *g = &s->group[i];
        if (now >= g->attach_by_ms)
            end_hung_launch(s, g);
        if (now >= g->launch_at_ms && s->listening && !g->child.pid && !s->stopping && !start_ranks(s, g))
            stop(s, CMD_FAILED);
    }
}

static void supervise(struct serve *s, int signal_fd)
{
    while (!s->stopping || s->coord.pid || any_ranks(s)) {
        int64_t until = earliest(s);
        int64_t wait = until == INT64_MAX ? 1000 : until - serve_now_ms();
        struct pollfd fds[] = {{signal_fd, POLLIN, 0}, {s->pipe_fd, POLLIN, 0}};
        poll(fds, s->pipe_fd >= 0 ? 2 : 1, wait < 0 ? 0 : wait > 1000 ? 1000 : (int)wait);
        if (s->pipe_fd >= 0 && fds[1].revents)
            read_lines(s);
        struct signalfd_siginfo info;
        while (read(signal_fd, &info, sizeof info) == (ssize_t)sizeof info) {
            if (info.ssi_signo == SIGCHLD)
                continue;
            fprintf(stderr, "tandem serve: %s\n", s->stopping ? "stopping at once" : "stopping: draining first");
            serve_event(&s->set, "stopping", NULL, json_pack("{s:b}", "at_once", s->stopping > 0));
            stop(s, CMD_OK);
        }
        reap(s);
        on_time(s);
    }
}

int cmd_serve(int argc, char **argv)
{
    struct serve s = {
        .set = {.tp = 1, .groups = 1, .drain_s = 30, .launch_s = 300, .local_only = true, .start_ms = serve_now_ms()},
        .pipe_fd = -1,
        .listen_by_ms = INT64_MAX,
        .coord_at_ms = INT64_MAX,
        .coord = {0, INT64_MAX}};
    for (int i = 0; i < SERVE_MAX_GROUPS; i++) {
        s.group[i].child.kill_at_ms = s.group[i].launch_at_ms = s.group[i].attach_by_ms = INT64_MAX;
    }
    int rc = serve_parse(argc, argv, &s.set);
    for (uint64_t i = 0; s.set.groups > 1 && i < s.set.groups; i++)
        serve_group_name(s.group[i].name, sizeof s.group[i].name, i);
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
        serve_event(&s.set, "starting", NULL,
                    json_pack("{s:o, s:I, s:I, s:i}", "model", cmd_json_string(s.set.model), "ranks",
                              (json_int_t)s.set.tp, "groups", (json_int_t)s.set.groups, "pid", (int)getpid()));
        int signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
        if (signal_fd < 0)
            rc = serve_error(&s.set, CMD_FAILED, "signalfd: %s", strerror(errno));
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
    if (rc >= 0 && rc != CMD_USAGE)
        serve_event(&s.set, "stopped", NULL, json_pack("{s:i}", "status", rc));
    serve_release(&s.set);
    return rc < 0 ? CMD_OK : rc;
}
