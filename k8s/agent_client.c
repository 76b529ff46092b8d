/* agent_client.c - what mpirun starts for each host, and the probe. */
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
#include <unistd.h>

#include "k8s/agent.h"

extern char **environ;

struct client {
    int fd;
    struct agent_reader reader;
};

/* The address to connect to: of the table when the name stands in it. */
static void resolve(const struct agent_client_config *cfg, const char *host, char address[320])
{
    size_t len = strlen(host);
    for (const char *p = cfg->resolve; p && *p;) {
        size_t n = strcspn(p, ",");
        if (n > len + 1 && strncmp(p, host, len) == 0 && p[len] == '=') {
            snprintf(address, 320, "%.*s", (int)(n - len - 1), p + len + 1);
            return;
        }
        p += n + (p[n] == ',');
    }
    snprintf(address, 320, strchr(host, ':') ? "[%.255s]:%u" : "%.255s:%u", host, cfg->port);
}

static enum status_code take_hello(struct client *c, int64_t until_ms, struct agent_token *token, struct status *st)
{
    enum agent_frame type;
    const uint8_t *payload;
    size_t n;
    enum status_code rc = agent_await(c->fd, &c->reader, until_ms, &type, &payload, &n, st);
    if (rc != ST_OK)
        return rc;
    if (type == AGENT_REFUSED && n >= 1)
        return status_set(st, (enum status_code)payload[0], "%.*s", (int)(n - 1), (const char *)payload + 1);
    if (type != AGENT_HELLO || n != 4 + AGENT_NONCE_BYTES || memcmp(payload, "TAG1", 4) != 0)
        return status_set(st, ST_DATA_LOSS, "no tandem-agent of this version answers");
    memcpy(token->server_nonce, payload + 4, AGENT_NONCE_BYTES);
    agent_frame_done(&c->reader);
    return ST_OK;
}

/* Sends the request with its proof, and checks the server's. */
static enum status_code ask(struct client *c, const struct agent_secrets *secrets, const struct agent_request *r,
                            struct status *st)
{
    uint8_t frame[AGENT_NONCE_BYTES + AGENT_PROOF_BYTES + AGENT_REQUEST_MAX];
    uint8_t *request = frame + AGENT_NONCE_BYTES + AGENT_PROOF_BYTES;
    struct agent_token token;
    enum agent_frame type;
    const uint8_t *payload;
    size_t n;
    int64_t until_ms = agent_now_ms() + AGENT_LOGIN_MS;
    enum status_code rc = take_hello(c, until_ms, &token, st);
    if (rc != ST_OK)
        return rc;
    token.request = request;
    token.request_bytes = agent_request_write(r, request);
    if (token.request_bytes == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "command: over %u bytes", AGENT_REQUEST_MAX);
    if (!agent_nonce(token.client_nonce) || !agent_prove(secrets, 0, AGENT_CLIENT, &token, frame + AGENT_NONCE_BYTES))
        return status_set(st, ST_INTERNAL, "random numbers or HMAC failed");
    memcpy(frame, token.client_nonce, AGENT_NONCE_BYTES);
    rc = agent_send(c->fd, AGENT_START, frame, (size_t)(request - frame) + token.request_bytes, until_ms, st);
    if (rc == ST_OK)
        rc = agent_await(c->fd, &c->reader, until_ms, &type, &payload, &n, st);
    if (rc != ST_OK)
        return rc;
    if (type == AGENT_REFUSED && n >= 1)
        return status_set(st, (enum status_code)payload[0], "%.*s", (int)(n - 1), (const char *)payload + 1);
    if (type != AGENT_STARTED || n != AGENT_PROOF_BYTES || agent_check(secrets, AGENT_SERVER, &token, payload) < 0)
        return status_set(st, ST_UNAUTHENTICATED, "the server does not prove that it knows the secret");
    agent_frame_done(&c->reader);
    return ST_OK;
}

static enum status_code open_client(struct client **out, const struct agent_client_config *cfg, const char *host,
                                    const struct agent_request *r, struct status *st)
{
    char address[320];
    struct agent_secrets secrets;
    struct client *c = calloc(1, sizeof *c);
    if (!c)
        return status_nomem(st, "client", sizeof *c);
    c->fd = -1;
    resolve(cfg, host, address);
    enum status_code rc = agent_connect(address, agent_now_ms() + cfg->connect_ms, &c->fd, st);
    if (rc == ST_OK) {
        rc = agent_secrets_read(&secrets, cfg->secret_file, st); /* late: pods wait for each other meanwhile */
        if (rc == ST_OK)
            rc = ask(c, &secrets, r, st);
        OPENSSL_cleanse(&secrets, sizeof secrets);
    }
    if (rc == ST_OK) {
        *out = c;
        return ST_OK;
    }
    if (c->fd >= 0)
        close(c->fd);
    free(c);
    if (st)
        (void)status_prefix(st, "%s", host);
    return rc;
}

static void close_client(struct client *c)
{
    close(c->fd);
    free(c);
}

enum status_code agent_probe(const struct agent_client_config *cfg, const char *host, struct status *st)
{
    struct client *c = NULL;
    const struct agent_request nothing = {.argc = 0};
    enum status_code rc = open_client(&c, cfg, host, &nothing, st);
    if (c)
        close_client(c);
    return rc;
}

static bool write_all(int to, const uint8_t *bytes, size_t n)
{
    int64_t until = agent_now_ms() + AGENT_SEND_MS;
    for (size_t done = 0; done < n;) {
        ssize_t w = write(to, bytes + done, n - done);
        if (w > 0)
            done += (size_t)w;
        else if (w < 0 && errno == EAGAIN && agent_now_ms() < until)
            poll(&(struct pollfd){to, POLLOUT, 0}, 1, 1000);
        else if (w == 0 || errno != EINTR)
            return false;
    }
    return true;
}

/* The program's exit status once it has come, -1: not yet, AGENT_EXIT_FAILED for anything wrong. */
static int take_frame(struct client *c, const char *host)
{
    enum agent_frame type;
    const uint8_t *payload;
    size_t n;
    struct status st = STATUS_INIT;
    if (agent_receive(c->fd, &c->reader, &type, &payload, &n, &st) != ST_OK) {
        fprintf(stderr, "tandem-agent: %s: %s\n", host, st.message);
        return AGENT_EXIT_FAILED;
    }
    if (!payload)
        return -1;
    agent_frame_done(&c->reader); /* the bytes stay until the next receive */
    if ((type == AGENT_STDOUT || type == AGENT_STDERR) &&
        write_all(type == AGENT_STDOUT ? STDOUT_FILENO : STDERR_FILENO, payload, n))
        return -1;
    if (type == AGENT_EXIT && n == 2)
        return payload[0] ? 128 + payload[1] : payload[1];
    fprintf(stderr, "tandem-agent: %s: %s\n", host,
            type == AGENT_EXIT || type > AGENT_EXIT ? "a frame that does not belong here" : "nobody takes the output");
    return AGENT_EXIT_FAILED;
}

static int relay(struct client *c, const char *host, int signals)
{
    int64_t until = INT64_MAX;
    for (;;) {
        struct pollfd p[] = {{c->fd, POLLIN, 0}, {signals, POLLIN, 0}};
        poll(p, 2, 500);
        struct signalfd_siginfo info;
        while (read(signals, &info, sizeof info) == (ssize_t)sizeof info) {
            uint8_t number = info.ssi_signo == SIGINT ? SIGINT : SIGTERM;
            if (until == INT64_MAX)
                until = agent_now_ms() + AGENT_GRACE_MS + 2000;
            if (agent_send(c->fd, AGENT_SIGNAL, &number, 1, agent_now_ms() + 1000, NULL) != ST_OK)
                return AGENT_EXIT_FAILED;
        }
        int code = p[0].revents ? take_frame(c, host) : -1;
        if (code >= 0)
            return code;
        if (agent_now_ms() >= until) {
            fprintf(stderr, "tandem-agent: %s: does not end; the connection is closed\n", host);
            return AGENT_EXIT_FAILED;
        }
    }
}

/* Words of all arguments together: mpirun passes pieces, each with quotes for a shell. text: to be freed. */
static enum status_code read_command(int argc, char **argv, struct agent_request *r, char **text, struct status *st)
{
    size_t bytes = 1;
    for (int i = 0; i < argc; i++)
        bytes += strlen(argv[i]) + 1;
    *text = calloc(1, bytes);
    if (!*text)
        return status_nomem(st, "command", bytes);
    for (int i = 0, at = 0; i < argc; i++)
        at += snprintf(*text + at, bytes - (size_t)at, "%s ", argv[i]);
    enum status_code rc = agent_words(*text, r->argv, AGENT_ARGS_MAX, &r->argc, st);
    if (rc == ST_OK && r->argc == 0)
        rc = status_set(st, ST_INVALID_ARGUMENT, "command: expected one");
    for (char **e = environ; rc == ST_OK && *e && r->envc < AGENT_ENV_MAX; e++)
        if (agent_policy_env(*e))
            r->env[r->envc++] = *e;
    return rc;
}

int agent_run(const struct agent_client_config *cfg, int argc, char **argv)
{
    struct status st = STATUS_INIT;
    struct agent_request r = {.argc = 0};
    struct client *c = NULL;
    char *text = NULL;
    pid_t parent = getppid();
    sigset_t set;
    while (argc > 1 && strcmp(argv[0], "-o") == 0) { /* ssh's options, which mpi-operator sets */
        argc -= 2;
        argv += 2;
    }
    if (argc < 2) {
        fprintf(stderr, "tandem-agent: run: expected a host and a command\n");
        return AGENT_EXIT_FAILED;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* mpirun that is killed takes the others' daemons along */
    if (getppid() != parent)
        return AGENT_EXIT_FAILED;
    enum status_code rc = read_command(argc - 1, argv + 1, &r, &text, &st);
    if (rc == ST_OK)
        rc = open_client(&c, cfg, argv[0], &r, &st);
    free(text);
    if (rc != ST_OK || !c) {
        fprintf(stderr, "tandem-agent: %s\n", st.message);
        return AGENT_EXIT_FAILED;
    }
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    int code = signals < 0 ? AGENT_EXIT_FAILED : relay(c, argv[0], signals);
    if (signals >= 0)
        close(signals);
    close_client(c);
    return code;
}
