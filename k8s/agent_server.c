/* agent_server.c - accepts connections and gives each a keeper process; counts them, reads the secret anew. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <openssl/crypto.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "k8s/agent.h"

struct server {
    const struct agent_server_config *cfg;
    int listener, signals;
    struct agent_secrets secrets; /* as last read well */
    bool told;                    /* that the file is bad */
    uint32_t sessions;
    pid_t keepers[AGENT_SESSIONS_MAX]; /* the first `sessions` */
};

/* At each connection: a mounted secret changes without notice. A bad file leaves the secrets as they were. */
static void read_secrets(struct server *s)
{
    struct status st = STATUS_INIT;
    if (agent_secrets_read(&s->secrets, s->cfg->secret_file, &st) == ST_OK)
        s->told = false;
    else if (!s->told) {
        s->told = true;
        fprintf(stderr, "tandem-agent: %s; the secrets read before stay\n", st.message);
    }
}

static void describe_peer(const struct sockaddr_storage *at, socklen_t len, char *text, size_t n)
{
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (getnameinfo((const struct sockaddr *)at, len, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) == 0)
        snprintf(text, n, "%s port %s", host, port);
    else
        snprintf(text, n, "unknown");
}

static void accept_one(struct server *s)
{
    struct sockaddr_storage at;
    socklen_t len = sizeof at;
    int fd = accept4(s->listener, (struct sockaddr *)&at, &len, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) /* out of descriptors: no busy loop */
            nanosleep(&(struct timespec){0, 50000000L}, NULL);
        return;
    }
    char peer[NI_MAXHOST + NI_MAXSERV + 16];
    describe_peer(&at, len, peer, sizeof peer);
    if (s->sessions >= s->cfg->max_sessions) {
        static const char text[] = "\010too many sessions"; /* ST_RESOURCE_EXHAUSTED */
        if (agent_send(fd, AGENT_REFUSED, text, sizeof text - 1, agent_now_ms(), NULL) != ST_OK)
            fprintf(stderr, "tandem-agent: %s: gone\n", peer);
        fprintf(stderr, "tandem-agent: %s: refused: %u sessions, no more than that\n", peer, s->sessions);
        close(fd);
        return;
    }
    read_secrets(s);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        close(s->listener);
        close(s->signals);
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        const struct agent_keep_config cfg = {&s->secrets, &s->cfg->policy, peer, AGENT_LOGIN_MS, AGENT_GRACE_MS};
        if (getppid() == parent)
            agent_keep(fd, &cfg);
        _exit(0);
    }
    if (pid > 0)
        s->keepers[s->sessions++] = pid;
    else
        fprintf(stderr, "tandem-agent: fork: %s\n", strerror(errno));
    close(fd);
}

/* As process 1 of a container others than keepers come here, too. */
static void reap(struct server *s)
{
    for (pid_t pid; (pid = waitpid(-1, NULL, WNOHANG)) > 0;)
        for (uint32_t i = 0; i < s->sessions; i++)
            if (s->keepers[i] == pid) {
                s->keepers[i] = s->keepers[--s->sessions];
                break;
            }
}

/* Each keeper ends what it has started, and itself. */
static void end_keepers(struct server *s)
{
    int64_t until = agent_now_ms() + AGENT_GRACE_MS + AGENT_LOGIN_MS;
    for (uint32_t i = 0; i < s->sessions; i++)
        kill(s->keepers[i], SIGTERM);
    for (reap(s); s->sessions > 0 && agent_now_ms() < until; reap(s))
        nanosleep(&(struct timespec){0, 10000000L}, NULL);
    for (uint32_t i = 0; i < s->sessions; i++)
        kill(s->keepers[i], SIGKILL);
}

/* Whether a signal asks for the end. */
static bool told_to_end(struct server *s)
{
    struct signalfd_siginfo info;
    bool end = false;
    while (read(s->signals, &info, sizeof info) == (ssize_t)sizeof info)
        end |= info.ssi_signo != SIGCHLD;
    return end;
}

static void loop(struct server *s)
{
    for (;;) {
        struct pollfd p[] = {{s->listener, POLLIN, 0}, {s->signals, POLLIN, 0}};
        poll(p, 2, 1000);
        if (told_to_end(s))
            return;
        reap(s);
        if (p[0].revents)
            accept_one(s);
    }
}

/* Pods of a group are told to end at the same time: the one that serves finishes its streams, and needs its ranks for that. */
static void drain(struct server *s)
{
    int64_t until = agent_now_ms() + s->cfg->drain_ms;
    close(s->listener);
    s->listener = -1;
    reap(s);
    if (s->sessions > 0 && s->cfg->drain_ms > 0)
        fprintf(stderr, "tandem-agent: told to end: waiting for %u sessions, %.0f s at most\n", s->sessions,
                s->cfg->drain_ms / 1e3);
    while (s->sessions > 0 && agent_now_ms() < until) {
        poll(&(struct pollfd){s->signals, POLLIN, 0}, 1, 100);
        if (told_to_end(s))
            return;
        reap(s);
    }
}

int agent_serve(const struct agent_server_config *cfg)
{
    struct server s = {.cfg = cfg, .listener = -1, .signals = -1};
    struct status st = STATUS_INIT;
    unsigned port = 0;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    s.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    enum status_code rc = agent_secrets_read(&s.secrets, cfg->secret_file, &st);
    if (rc == ST_OK)
        rc = agent_listen(cfg->listen, &s.listener, &port, &st);
    if (rc == ST_OK && s.signals < 0)
        rc = status_errno(&st, ST_INTERNAL, errno, "signalfd");
    if (rc == ST_OK) {
        fprintf(stderr, "tandem-agent: listening on port %u; starts", port);
        for (size_t i = 0; i < cfg->policy.n_programs; i++)
            fprintf(stderr, " %s", cfg->policy.programs[i]);
        fprintf(stderr, "\n");
        loop(&s);
        drain(&s);
        end_keepers(&s);
    } else
        fprintf(stderr, "tandem-agent: %s\n", st.message);
    if (s.listener >= 0)
        close(s.listener);
    if (s.signals >= 0)
        close(s.signals);
    OPENSSL_cleanse(&s.secrets, sizeof s.secrets);
    return rc == ST_OK ? 0 : 1;
}
