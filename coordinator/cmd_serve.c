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
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <getopt.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/cmd.h"

#define MAX_ARGS       192
#define MAX_LINE       4096
#define MAX_FAILURES   8     /* launches in a row that never became ready */
#define LISTEN_WAIT_MS 15000 /* from starting the coordinator to its "listening" */
#define TERM_WAIT_MS   2500  /* from SIGTERM to SIGKILL; mpirun itself gives its ranks about one second */
#define HEALTHY_MS     30000 /* a group that was ready this long has its failures forgiven */
#define MAX_PAUSE_MS   10000

static const char help[] =
    "usage: tandem serve --model DIR [OPTIONS]\n\n"
    "Serves a model: starts the coordinator, launches the tensor-parallel ranks with mpirun, and starts again what "
    "dies.\n"
    "DIR is a Hugging Face model folder: config.json, *.safetensors, tokenizer.json.\n\n"
    "  --model DIR            the model folder (required)\n"
    "  --tp R                 tensor-parallel ranks (default 1)\n"
    "  --listen ADDR          where clients connect, host:port or unix:/path; may be given several times\n"
    "                         (default " CMD_DEFAULT_ADDRESS ")\n"
    "  --served-name NAME     name of the model in the API (default: the folder's name)\n"
    "  --backend NAME         auto, cuda or host (default auto)\n"
    "  --threads N            CPU threads of each rank on the host back end (default: its share of the cores)\n"
    "  --max-slots N          requests that run at once (default 256)\n"
    "  --max-context N        tokens of a request, prompt and answer (default: the model's)\n"
    "  --step-tokens N        rows of one step: decodes and prompt chunks (default 512)\n"
    "  --kv-memory SIZE       KV memory of each rank, such as 512M or 8G (default: computed)\n"
    "  --page-size SIZE       size of a KV page (default 2M)\n"
    "  --max-queued N         requests that may wait (default: the coordinator's)\n"
    "  --default-max-tokens N new tokens of a request that names no limit (default 256)\n"
    "  --drain-timeout S      on SIGTERM: seconds that running requests get to end (default 30)\n"
    "  --coordinator-arg ARG  handed to tandem-coordinator as it is; may be repeated\n"
    "  --worker-arg ARG       handed to tandem-worker as it is; may be repeated\n"
    "  --mpi-arg ARG          handed to mpirun as it is; may be repeated. With ranks on other hosts give\n"
    "                         --control-listen too\n"
    "  --control-listen ADDR  where ranks connect (default: a unix socket in a private folder)\n"
    "  --mpirun PATH          the mpirun to use (default: from PATH)\n"
    "  --log-level LEVEL      error, warning, info or debug (default info)\n\n"
    "SIGTERM or Ctrl-C drains and stops; a second one stops at once.\n\n"
    "  tandem serve --model /models/llama --tp 2\n"
    "  tandem generate \"Once upon a time\"          # in another terminal\n"
    "  tandem probe --wait 60                      # until it serves\n";

struct argument_list {
    char *v[MAX_ARGS + 1];
    int n;
};

struct child {
    pid_t pid;          /* 0: not running */
    int64_t kill_at_ms; /* SIGKILL then; INT64_MAX: not asked to end */
};

struct serve {
    char bin_dir[PATH_MAX];
    char run_dir[64]; /* control socket, Open MPI's session files */
    char shm_dir[64]; /* Open MPI's shared segments; "": where it wants */
    char control[160];
    struct argument_list coordinator, mpirun;
    bool local_only;
    double drain_s;
    uint64_t tp;

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
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static bool push(struct argument_list *a, const char *text)
{
    if (a->n == MAX_ARGS)
        return false;
    a->v[a->n] = strdup(text);
    if (!a->v[a->n])
        return false;
    a->v[++a->n] = NULL;
    return true;
}

static bool push2(struct argument_list *a, const char *option, const char *value)
{
    return push(a, option) && push(a, value);
}

static void clear(struct argument_list *a)
{
    for (int i = 0; i < a->n; i++)
        free(a->v[i]);
    a->n = 0;
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
    struct argument_list *a = &s->coordinator;
    int keep = a->n;
    bool ok = push2(a, "--supervisor-fd", number);
    s->coord = (struct child){ok ? spawn(a->v, fds[1], SIGTERM) : -1, INT64_MAX};
    while (a->n > keep) {
        free(a->v[--a->n]);
        a->v[a->n] = NULL;
    }
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
    s->ranks = (struct child){spawn(s->mpirun.v, -1, SIGKILL), INT64_MAX};
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
        end_child(&s->coord, exit_code ? TERM_WAIT_MS : (int64_t)(s->drain_s * 1000) + 5000);
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

static void on_listening(struct serve *s, const char *rest)
{
    s->listening = true;
    s->listen_by_ms = INT64_MAX;
    const char *p = strstr(rest, "public=");
    if (p) {
        p += strlen("public=");
        snprintf(s->public_address, sizeof s->public_address, "%.*s", (int)strcspn(p, " "), p);
    }
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
    fprintf(stderr, "tandem serve: ready on %s after %.2f s, %llu rank%s; Ctrl-C stops\n", s->public_address,
            (double)(now_ms() - s->start_ms) / 1e3, (unsigned long long)s->tp, s->tp == 1 ? "" : "s");
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

/* ---- options ---- */

/* Options that go on to one or both programs unchanged. */
static const struct forward {
    const char *name, *to_coordinator, *to_worker;
} forwards[] = {
    {"served-name", "--served-name", NULL},
    {"max-queued", "--max-queued", NULL},
    {"default-max-tokens", "--default-max-tokens", NULL},
    {"log-level", "--log-level", "--log-level"},
    {"step-tokens", "--step-tokens", "--max-step-tokens"},
    {"backend", NULL, "--backend"},
    {"threads", NULL, "--threads"},
    {"max-slots", NULL, "--max-slots"},
    {"max-context", NULL, "--max-context"},
    {"kv-memory", NULL, "--kv-memory"},
    {"page-size", NULL, "--page-size"},
};
#define N_FORWARDS (sizeof forwards / sizeof *forwards)

enum {
    OPT_MODEL = 256,
    OPT_TP,
    OPT_LISTEN,
    OPT_DRAIN,
    OPT_COORD_ARG,
    OPT_WORKER_ARG,
    OPT_MPI_ARG,
    OPT_CONTROL,
    OPT_MPIRUN,
    OPT_FORWARD
};

static const struct option own_options[] = {
    {"model", required_argument, 0, OPT_MODEL},
    {"tp", required_argument, 0, OPT_TP},
    {"listen", required_argument, 0, OPT_LISTEN},
    {"drain-timeout", required_argument, 0, OPT_DRAIN},
    {"coordinator-arg", required_argument, 0, OPT_COORD_ARG},
    {"worker-arg", required_argument, 0, OPT_WORKER_ARG},
    {"mpi-arg", required_argument, 0, OPT_MPI_ARG},
    {"control-listen", required_argument, 0, OPT_CONTROL},
    {"mpirun", required_argument, 0, OPT_MPIRUN},
    {"help", no_argument, 0, 'h'},
};
#define N_OWN (sizeof own_options / sizeof *own_options)

struct serve_options {
    const char *model, *control, *mpirun;
    struct argument_list coordinator, worker, mpi;
    bool listens;
};

static bool take_option(struct serve *s, struct serve_options *o, int opt, bool *ok)
{
    uint64_t u;
    switch (opt) {
    case OPT_MODEL:
        o->model = optarg;
        break;
    case OPT_TP:
        if (!cmd_parse_u64(optarg, 1, 64, &u))
            return cmd_error(CMD_USAGE, "serve", "--tp %s: expected the number of ranks, 1 to 64", optarg), false;
        s->tp = u;
        break;
    case OPT_LISTEN:
        o->listens = true;
        *ok = push2(&o->coordinator, "--listen", optarg);
        break;
    case OPT_DRAIN:
        if (!cmd_parse_double(optarg, 0, 86400, &s->drain_s))
            return cmd_error(CMD_USAGE, "serve", "--drain-timeout %s: expected seconds, 0 to 86400", optarg), false;
        break;
    case OPT_COORD_ARG:
        *ok = push(&o->coordinator, optarg);
        break;
    case OPT_WORKER_ARG:
        *ok = push(&o->worker, optarg);
        break;
    case OPT_MPI_ARG:
        s->local_only = false;
        *ok = push(&o->mpi, optarg);
        break;
    case OPT_CONTROL:
        o->control = optarg;
        break;
    case OPT_MPIRUN:
        o->mpirun = optarg;
        break;
    default: {
        const struct forward *f = &forwards[opt - OPT_FORWARD];
        *ok = (!f->to_coordinator || push2(&o->coordinator, f->to_coordinator, optarg)) &&
              (!f->to_worker || push2(&o->worker, f->to_worker, optarg));
    }
    }
    return true;
}

/* CMD_OK, CMD_USAGE, or -1 after --help. */
static int parse(int argc, char **argv, struct serve *s, struct serve_options *o)
{
    struct option options[N_OWN + N_FORWARDS + 1] = {0};
    memcpy(options, own_options, sizeof own_options);
    for (size_t i = 0; i < N_FORWARDS; i++)
        options[N_OWN + i] = (struct option){forwards[i].name, required_argument, 0, OPT_FORWARD + (int)i};
    bool ok = true;
    for (int c; (c = getopt_long(argc, argv, "+:h", options, NULL)) != -1;) {
        if (c == 'h') {
            fputs(help, stdout);
            return -1;
        }
        if (c == '?' || c == ':')
            return cmd_bad_option("serve", argv, c);
        if (!take_option(s, o, c, &ok))
            return CMD_USAGE;
        if (!ok)
            return cmd_error(CMD_USAGE, "serve", "too many arguments: %d at most", MAX_ARGS);
    }
    if (optind < argc)
        return cmd_error(CMD_USAGE, "serve", "%s: takes no arguments, only options; see `tandem serve --help`",
                         argv[optind]);
    if (!o->model)
        return cmd_error(CMD_USAGE, "serve", "--model DIR is missing; see `tandem serve --help`");
    struct stat sb;
    if (stat(o->model, &sb))
        return cmd_error(CMD_FAILED, "serve", "--model %s: %s", o->model, strerror(errno));
    if (!S_ISDIR(sb.st_mode))
        return cmd_error(CMD_FAILED, "serve", "--model %s: not a folder; expected a Hugging Face model folder",
                         o->model);
    return CMD_OK;
}

static bool append(struct argument_list *to, const struct argument_list *from)
{
    bool ok = true;
    for (int i = 0; ok && i < from->n; i++)
        ok = push(to, from->v[i]);
    return ok;
}

/* The two command lines. */
static bool build_commands(struct serve *s, const struct serve_options *o)
{
    char path[PATH_MAX + 32], number[32];
    struct argument_list *c = &s->coordinator, *m = &s->mpirun;
    snprintf(path, sizeof path, "%s/tandem-coordinator", s->bin_dir);
    snprintf(number, sizeof number, "%llu", (unsigned long long)s->tp);
    bool ok = push(c, path) && push2(c, "--model", o->model) && push2(c, "--tp", number) &&
              push2(c, "--control-listen", s->control);
    if (!o->listens)
        ok = ok && push2(c, "--listen", CMD_DEFAULT_ADDRESS);
    char drain[32];
    snprintf(drain, sizeof drain, "%.0f", s->drain_s * 1000);
    ok = ok && push2(c, "--drain-timeout-ms", drain) && append(c, &o->coordinator);

    ok = ok && push(m, o->mpirun ? o->mpirun : "mpirun") && push2(m, "-np", number);
    /* Ranks have threads of their own and may share cores: no binding, no busy waiting, more ranks than cores allowed.
     * Copies between processes through the kernel need rights that containers often lack. */
    ok = ok && push(m, "--oversubscribe") && push2(m, "--bind-to", "none") && push(m, "--mca") &&
         push2(m, "mpi_yield_when_idle", "1") && push(m, "--mca") &&
         push2(m, "btl_vader_single_copy_mechanism", "none");
    /* Its files lie in folders of ours: when ranks are killed, nobody else would clean up after them. */
    ok = ok && push(m, "--mca") && push2(m, "orte_tmpdir_base", s->run_dir);
    if (s->shm_dir[0])
        ok = ok && push(m, "--mca") && push2(m, "btl_vader_backing_directory", s->shm_dir);
    if (s->local_only) /* no ssh is needed, and none may be there */
        ok = ok && push(m, "--mca") && push2(m, "plm", "isolated");
    ok = ok && append(m, &o->mpi);
    snprintf(path, sizeof path, "%s/tandem-worker", s->bin_dir);
    ok = ok && push(m, path) && push2(m, "--model", o->model) && push2(m, "--coordinator", s->control);
    return ok && append(m, &o->worker);
}

static bool find_bin_dir(struct serve *s)
{
    ssize_t n = readlink("/proc/self/exe", s->bin_dir, sizeof s->bin_dir - 1);
    if (n <= 0)
        return cmd_error(CMD_FAILED, "serve", "/proc/self/exe: %s", strerror(errno)), false;
    s->bin_dir[n] = '\0';
    char *slash = strrchr(s->bin_dir, '/');
    *slash = '\0';
    char path[PATH_MAX + 32];
    static const char *const programs[] = {"tandem-coordinator", "tandem-worker"};
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", s->bin_dir, programs[i]);
        if (access(path, X_OK))
            return cmd_error(CMD_FAILED, "serve", "%s: %s; it must lie beside this program", path, strerror(errno)),
                   false;
    }
    return true;
}

/* ---- private folders ---- */

static int remove_entry(const char *path, const struct stat *sb, int type, struct FTW *ftw)
{
    (void)sb, (void)type, (void)ftw;
    remove(path);
    return 0;
}

static void remove_tree(const char *path)
{
    nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* Removes what a serve that was killed has left in `parent`: a folder of our name whose lock nobody holds. The lock, and
 * not a process id, tells: the folder may be shared with containers that number their processes themselves. */
static void sweep(const char *parent)
{
    DIR *dir = opendir(parent);
    if (!dir)
        return;
    for (const struct dirent *e; (e = readdir(dir));) {
        char path[PATH_MAX], lock[PATH_MAX + 8];
        struct stat sb;
        if (strncmp(e->d_name, "tandem-", 7) != 0 || strlen(e->d_name) != 13)
            continue;
        snprintf(path, sizeof path, "%s/%s", parent, e->d_name);
        snprintf(lock, sizeof lock, "%s/lock", path);
        if (lstat(path, &sb) || !S_ISDIR(sb.st_mode) || sb.st_uid != geteuid())
            continue;
        int fd = open(lock, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (fd < 0)
            continue;
        if (!flock(fd, LOCK_EX | LOCK_NB))
            remove_tree(path);
        close(fd);
    }
    closedir(dir);
}

/* Makes PARENT/tandem-XXXXXX and holds its lock as long as this process lives. path: "" on failure, errno says why. */
static bool make_folder(char *path, size_t n, const char *parent)
{
    sweep(parent);
    snprintf(path, n, "%s/tandem-XXXXXX", parent);
    if (!mkdtemp(path)) {
        path[0] = '\0';
        return false;
    }
    char lock[PATH_MAX];
    snprintf(lock, sizeof lock, "%s/lock", path);
    int fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600); /* closed by the end of the process */
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB)) {
        close(fd); /* a file system without locks: nobody will take it for stale either */
        unlink(lock);
    }
    return true;
}

static bool prepare(struct serve *s, const struct serve_options *o)
{
    if (!find_bin_dir(s))
        return false;
    const char *tmp = getenv("TMPDIR");
    if (!tmp || !*tmp || strlen(tmp) > 40) /* a socket's path is short */
        tmp = "/tmp";
    if (!make_folder(s->run_dir, sizeof s->run_dir, tmp))
        return cmd_error(CMD_FAILED, "serve", "%s: cannot make a private folder: %s; TMPDIR names another place", tmp,
                         strerror(errno)),
               false;
    if (s->local_only) /* on other hosts the folder would not exist */
        make_folder(s->shm_dir, sizeof s->shm_dir, "/dev/shm");
    if (o->control)
        snprintf(s->control, sizeof s->control, "%s", o->control);
    else
        snprintf(s->control, sizeof s->control, "unix:%s/control", s->run_dir);
    if (!build_commands(s, o))
        return cmd_error(CMD_FAILED, "serve", "too many arguments: %d at most", MAX_ARGS), false;
    if (geteuid() == 0) { /* mpirun refuses root without these two; in containers root is usual */
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    }
    return true;
}

static void clean_up(struct serve *s)
{
    if (s->pipe_fd >= 0)
        close(s->pipe_fd);
    if (s->run_dir[0])
        remove_tree(s->run_dir);
    if (s->shm_dir[0])
        remove_tree(s->shm_dir);
    clear(&s->coordinator);
    clear(&s->mpirun);
}

int cmd_serve(int argc, char **argv)
{
    struct serve s = {.pipe_fd = -1,
                      .tp = 1,
                      .drain_s = 30,
                      .local_only = true,
                      .start_ms = now_ms(),
                      .launch_at_ms = INT64_MAX,
                      .listen_by_ms = INT64_MAX,
                      .coord = {0, INT64_MAX},
                      .ranks = {0, INT64_MAX}};
    struct serve_options o = {0};
    int rc = parse(argc, argv, &s, &o);
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
        else if (!prepare(&s, &o) || !start_coordinator(&s))
            rc = CMD_FAILED;
        else {
            supervise(&s, signal_fd);
            rc = s.exit_code;
        }
        if (signal_fd >= 0)
            close(signal_fd);
    }
    clean_up(&s);
    clear(&o.coordinator);
    clear(&o.worker);
    clear(&o.mpi);
    return rc < 0 ? CMD_OK : rc;
}
