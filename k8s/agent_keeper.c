/* agent_keeper.c - one connection of the server: who is there, may it be started, and then the program's keeper.
 *
 *     HELLO -> START -> proof, policy -> fork -> STARTED -> output, signals -> the program ends, or the connection does
 *
 * The keeper is a subreaper: whatever the program starts stays below it, also ranks with process groups of their own. At
 * the end all of it is killed and waited for, so that a next start finds the node (its devices, its ports) free. */
#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "k8s/agent.h"

#define DRAIN_MS   500 /* what others below still write after the program's end is not waited for */
#define OUTPUT_MAX (16u * 1024)

struct keeper {
    int fd, signals; /* signals: SIGCHLD, SIGTERM */
    int out[2];      /* read ends of the program's stdout and stderr, -1 at their end */
    pid_t program;   /* 0: it has been waited for */
    int status;
    bool client_gone;
    int64_t kill_at_ms;  /* SIGKILL for all; INT64_MAX: not asked to end */
    int64_t drain_by_ms; /* the program has ended: its output may still come */
    /* A frame of output on its way: sent as the client takes it, so that one that takes nothing holds up no signal. */
    uint8_t frame[AGENT_HEADER + OUTPUT_MAX];
    size_t frame_n, frame_sent; /* frame_n 0: none, and more may be read */
    int64_t frame_until_ms;
    const struct agent_keep_config *cfg;
    struct agent_reader reader;
};

static void say(const struct keeper *k, const char *what, const char *text)
{
    fprintf(stderr, "tandem-agent: %s: %s%s%s\n", k->cfg->peer, what, text ? ": " : "", text ? text : "");
}

static void refuse(struct keeper *k, const struct status *st)
{
    uint8_t payload[1 + STATUS_MESSAGE_MAX];
    size_t n = strlen(st->message);
    payload[0] = (uint8_t)st->code;
    memcpy(payload + 1, st->message, n);
    say(k, "refused", st->message);
    if (agent_send(k->fd, AGENT_REFUSED, payload, 1 + n, agent_now_ms() + k->cfg->login_ms, NULL) != ST_OK)
        say(k, "gone before it was told", NULL);
}

/* ---- processes ---- */

/* Signals all that is below this process. How many there were; zombies count until they are waited for. */
static unsigned signal_below(pid_t pid, int number)
{
    char path[64], line[4096];
    unsigned n = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)pid, (int)pid);
    FILE *f = fopen(path, "re");
    if (!f)
        return 0;
    size_t len = fread(line, 1, sizeof line - 1, f);
    fclose(f);
    line[len] = '\0';
    for (char *p = line, *end; *p; p = end) {
        long child = strtol(p, &end, 10);
        if (end == p || child <= 1)
            break;
        n += 1 + signal_below((pid_t)child, number);
        kill((pid_t)child, number);
    }
    return n;
}

/* Waits for whoever has ended; true when the program is among them. */
static bool reap(struct keeper *k)
{
    bool ended = false;
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        if (pid == k->program) {
            k->program = 0;
            k->status = status;
            ended = true;
        }
    return ended;
}

/* Nothing is left below after this, short of processes that the kernel cannot end. */
static void end_all(struct keeper *k)
{
    for (int i = 0; i < 200; i++) {
        reap(k);
        if (signal_below(getpid(), SIGKILL) == 0)
            return;
        nanosleep(&(struct timespec){0, (i < 20 ? 1 : 20) * 1000000L}, NULL);
    }
    say(k, "processes are left that SIGKILL does not end", NULL);
}

static _Noreturn void become(const char *program, const struct agent_request *r, const int out[2], int report,
                             pid_t parent)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC), err = 0;
    if (setpgid(0, 0) || prctl(PR_SET_PDEATHSIG, SIGKILL) || null < 0 || dup2(null, STDIN_FILENO) < 0 ||
        dup2(out[0], STDOUT_FILENO) < 0 || dup2(out[1], STDERR_FILENO) < 0)
        err = errno;
    for (size_t i = 0; i < r->envc && !err; i++)
        if (putenv((char *)(uintptr_t)r->env[i]))
            err = errno;
    if (!err && getppid() == parent) {
        execv(program, (char *const *)(uintptr_t)r->argv);
        err = errno;
    }
    if (write(report, &err, sizeof err) < 0)
        _exit(126);
    _exit(127);
}

static enum status_code start(struct keeper *k, const char *program, const struct agent_request *r, struct status *st)
{
    int out[2] = {-1, -1}, both[2], report[2] = {-1, -1}, err = 0;
    int ends[2] = {-1, -1};
    enum status_code rc = ST_OK;
    for (int i = 0; i < 2 && rc == ST_OK; i++) {
        if (pipe2(both, O_CLOEXEC))
            rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "pipe");
        else
            out[i] = both[0], ends[i] = both[1], fcntl(both[0], F_SETFL, O_NONBLOCK);
    }
    pid_t parent = getpid(), pid = -1;
    if (rc == ST_OK && (pipe2(report, O_CLOEXEC) || (pid = fork()) < 0))
        rc = status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "fork");
    if (pid == 0)
        become(program, r, ends, report[1], parent);
    if (report[1] >= 0)
        close(report[1]);
    if (rc == ST_OK && read(report[0], &err, sizeof err) == (ssize_t)sizeof err) { /* else closed by exec */
        waitpid(pid, NULL, 0);
        rc = status_errno(st, ST_FAILED_PRECONDITION, err, "%.200s", program);
    }
    for (int i = 0; i < 2; i++) {
        if (ends[i] >= 0)
            close(ends[i]);
        if (rc != ST_OK && out[i] >= 0)
            close(out[i]);
    }
    if (report[0] >= 0)
        close(report[0]);
    if (rc == ST_OK) {
        k->program = pid;
        k->out[0] = out[0];
        k->out[1] = out[1];
    }
    return rc;
}

/* ---- the program runs ---- */

static void ask_to_end(struct keeper *k, int number)
{
    signal_below(getpid(), number);
    if (k->kill_at_ms == INT64_MAX)
        k->kill_at_ms = agent_now_ms() + k->cfg->grace_ms;
}

static void lose_client(struct keeper *k, const char *why)
{
    if (k->client_gone)
        return;
    k->client_gone = true;
    say(k, "connection lost, ending what it started", why);
    if (k->program)
        ask_to_end(k, SIGTERM);
}

static void send_frame(struct keeper *k)
{
    while (k->frame_n > 0 && !k->client_gone) {
        ssize_t n = send(k->fd, k->frame + k->frame_sent, k->frame_n - k->frame_sent, MSG_NOSIGNAL);
        if (n > 0 && (k->frame_sent += (size_t)n) == k->frame_n)
            k->frame_n = 0;
        else if (n < 0 && errno == EAGAIN && agent_now_ms() < k->frame_until_ms)
            return;
        else if (n < 0 && errno == EAGAIN)
            lose_client(k, "the peer takes nothing");
        else if (n < 0 && errno != EINTR)
            lose_client(k, strerror(errno));
    }
    k->frame_n = 0;
}

static void take_output(struct keeper *k, int i)
{
    ssize_t n = read(k->out[i], k->frame + AGENT_HEADER, OUTPUT_MAX);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        close(k->out[i]);
        k->out[i] = -1;
        return;
    }
    agent_write_header(k->frame, i == 0 ? AGENT_STDOUT : AGENT_STDERR, (size_t)n);
    k->frame_n = AGENT_HEADER + (size_t)n;
    k->frame_sent = 0;
    k->frame_until_ms = agent_now_ms() + AGENT_SEND_MS;
    send_frame(k);
}

static void take_frame(struct keeper *k)
{
    enum agent_frame type;
    const uint8_t *payload;
    size_t n;
    struct status st = STATUS_INIT;
    if (agent_receive(k->fd, &k->reader, &type, &payload, &n, &st) != ST_OK) {
        lose_client(k, st.message);
        return;
    }
    if (!payload)
        return;
    if (type == AGENT_SIGNAL && n == 1 && (payload[0] == SIGTERM || payload[0] == SIGINT || payload[0] == SIGKILL))
        ask_to_end(k, payload[0]);
    else
        lose_client(k, "a frame that does not belong here");
    agent_frame_done(&k->reader);
}

static void take_signals(struct keeper *k)
{
    struct signalfd_siginfo info;
    while (read(k->signals, &info, sizeof info) == (ssize_t)sizeof info)
        if (info.ssi_signo == SIGTERM && k->program)
            ask_to_end(k, SIGTERM);
    if (reap(k)) {
        k->drain_by_ms = agent_now_ms() + DRAIN_MS;
        if (k->kill_at_ms != INT64_MAX) /* told to end: a client that takes nothing is not waited for longer */
            k->frame_until_ms = k->drain_by_ms;
    }
}

/* Until the program has ended and its output is out, or the connection is gone and everything killed. */
static void relay(struct keeper *k)
{
    while (k->program || k->frame_n > 0 || ((k->out[0] >= 0 || k->out[1] >= 0) && agent_now_ms() < k->drain_by_ms)) {
        int64_t until = k->program ? k->kill_at_ms : k->drain_by_ms, wait = until - agent_now_ms();
        bool busy = k->frame_n > 0;
        struct pollfd p[] = {{k->signals, POLLIN, 0},
                             {busy ? -1 : k->out[0], POLLIN, 0},
                             {busy ? -1 : k->out[1], POLLIN, 0},
                             {k->client_gone ? -1 : k->fd, (short)(busy ? POLLIN | POLLOUT : POLLIN), 0}};
        poll(p, 4, wait <= 0 ? (busy ? 100 : 0) : wait > 1000 ? 1000 : (int)wait);
        take_signals(k);
        send_frame(k);
        for (int i = 0; i < 2; i++)
            if (k->frame_n == 0 && k->out[i] >= 0 && p[1 + i].revents)
                take_output(k, i);
        if ((p[3].revents & ~POLLOUT) && !k->client_gone)
            take_frame(k);
        if (k->program && agent_now_ms() >= k->kill_at_ms) {
            end_all(k);
            k->kill_at_ms = INT64_MAX;
            k->drain_by_ms = k->frame_until_ms = agent_now_ms() + DRAIN_MS;
        }
    }
}

static void report_end(struct keeper *k)
{
    uint8_t payload[2] = {WIFSIGNALED(k->status),
                          (uint8_t)(WIFSIGNALED(k->status) ? WTERMSIG(k->status) : WEXITSTATUS(k->status))};
    if (!k->client_gone && agent_send(k->fd, AGENT_EXIT, payload, 2, agent_now_ms() + k->cfg->login_ms, NULL) != ST_OK)
        say(k, "gone before it heard of the end", NULL);
}

/* ---- who is there ---- */

/* The request, proven; its bytes stay in the reader. proof: the answer's. */
static enum status_code log_in(struct keeper *k, struct agent_request *r, uint8_t proof[AGENT_PROOF_BYTES],
                               struct status *st)
{
    uint8_t hello[4 + AGENT_NONCE_BYTES] = "TAG1";
    struct agent_token token;
    int64_t until = agent_now_ms() + k->cfg->login_ms;
    const struct agent_secrets *secrets = k->cfg->secrets;
    enum agent_frame type;
    const uint8_t *payload;
    size_t n;
    if (!agent_nonce(token.server_nonce))
        return status_set(st, ST_INTERNAL, "no random numbers");
    memcpy(hello + 4, token.server_nonce, AGENT_NONCE_BYTES);
    enum status_code rc = agent_send(k->fd, AGENT_HELLO, hello, sizeof hello, until, st);
    if (rc == ST_OK)
        rc = agent_await(k->fd, &k->reader, until, &type, &payload, &n, st);
    if (rc != ST_OK)
        return rc;
    if (type != AGENT_START || n < AGENT_NONCE_BYTES + AGENT_PROOF_BYTES ||
        n > AGENT_NONCE_BYTES + AGENT_PROOF_BYTES + AGENT_REQUEST_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "frame of type %d, %zu bytes: expected START", (int)type, n);
    memcpy(token.client_nonce, payload, AGENT_NONCE_BYTES);
    token.request = payload + AGENT_NONCE_BYTES + AGENT_PROOF_BYTES;
    token.request_bytes = n - AGENT_NONCE_BYTES - AGENT_PROOF_BYTES;
    int which = agent_check(secrets, AGENT_CLIENT, &token, payload + AGENT_NONCE_BYTES);
    if (which < 0)
        return status_set(st, ST_UNAUTHENTICATED, "wrong secret, or a token that was not made for this connection");
    if (!agent_prove(secrets, (size_t)which, AGENT_SERVER, &token, proof))
        return status_set(st, ST_INTERNAL, "HMAC failed");
    return agent_request_read(r, token.request, token.request_bytes, st);
}

/* A port that is probed, or a client that has thought better of it: nothing to refuse, and no line in the log each time. */
static bool came_and_went(const struct keeper *k, enum status_code rc)
{
    return rc == ST_UNAVAILABLE && k->reader.have == 0;
}

static enum status_code serve_one(struct keeper *k, struct status *st)
{
    struct agent_request r = {.argc = 0};
    uint8_t proof[AGENT_PROOF_BYTES];
    const char *program = NULL;
    enum status_code rc = log_in(k, &r, proof, st);
    if (rc != ST_OK)
        return rc;
    if (r.argc > 0 && (rc = agent_policy_check(k->cfg->policy, &r, &program, st)) != ST_OK)
        return rc;
    if (r.argc > 0 && (rc = start(k, program, &r, st)) != ST_OK)
        return rc;
    agent_frame_done(&k->reader); /* what comes next is one SIGNAL or more; a second START ends the connection */
    rc = agent_send(k->fd, AGENT_STARTED, proof, sizeof proof, agent_now_ms() + k->cfg->login_ms, st);
    if (rc != ST_OK)
        lose_client(k, st->message);
    if (r.argc > 0) {
        say(k, "started", program);
        relay(k);
    }
    end_all(k); /* before the end is told: then the node is free */
    report_end(k);
    return ST_OK;
}

void agent_keep(int fd, const struct agent_keep_config *cfg)
{
    struct keeper *k = calloc(1, sizeof *k);
    struct status st = STATUS_INIT;
    enum status_code rc;
    sigset_t set;
    if (!k)
        return;
    *k = (struct keeper){.fd = fd, .out = {-1, -1}, .kill_at_ms = INT64_MAX, .drain_by_ms = INT64_MAX, .cfg = cfg};
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    agent_keep_alive(fd);
    k->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (k->signals < 0)
        say(k, "signalfd", strerror(errno));
    else if ((rc = serve_one(k, &st)) != ST_OK && !came_and_went(k, rc))
        refuse(k, &st);
    for (int i = 0; i < 2; i++)
        if (k->out[i] >= 0)
            close(k->out[i]);
    if (k->signals >= 0)
        close(k->signals);
    free(k);
}
