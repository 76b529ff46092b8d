/* agent_wire.c - frames over a socket, and how sockets are made. */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "k8s/agent.h"

#define HEADER   AGENT_HEADER
#define RETRY_MS 250

int64_t agent_now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* True when fd is ready in time. */
static bool ready(int fd, short events, int64_t until_ms)
{
    for (;;) {
        int64_t wait = until_ms - agent_now_ms();
        struct pollfd p = {fd, events, 0};
        int n = poll(&p, 1, wait <= 0 ? 0 : wait > 1000 ? 1000 : (int)wait);
        if (n > 0)
            return true;
        if ((n < 0 && errno != EINTR) || wait <= 0)
            return false;
    }
}

void agent_write_header(uint8_t out[AGENT_HEADER], enum agent_frame type, size_t bytes)
{
    out[0] = (uint8_t)type;
    for (int i = 0; i < 4; i++)
        out[1 + i] = (uint8_t)(bytes >> (24 - 8 * i));
}

enum status_code agent_send(int fd, enum agent_frame type, const void *payload, size_t bytes, int64_t until_ms,
                            struct status *st)
{
    uint8_t header[HEADER];
    agent_write_header(header, type, bytes);
    for (size_t sent = 0; sent < HEADER + bytes;) {
        struct iovec v[2] = {{header + (sent < HEADER ? sent : HEADER), sent < HEADER ? HEADER - sent : 0}, {NULL, 0}};
        size_t of_payload = sent < HEADER ? 0 : sent - HEADER;
        if (bytes > 0)
            v[1] = (struct iovec){(uint8_t *)(uintptr_t)payload + of_payload, bytes - of_payload};
        struct msghdr m = {.msg_iov = v, .msg_iovlen = 2};
        ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL);
        if (n > 0)
            sent += (size_t)n;
        else if (errno == EAGAIN && !ready(fd, POLLOUT, until_ms))
            return status_set(st, ST_DEADLINE_EXCEEDED, "the peer takes nothing");
        else if (errno != EAGAIN && errno != EINTR)
            return status_errno(st, ST_UNAVAILABLE, errno, "send");
    }
    return ST_OK;
}

static size_t frame_bytes(const struct agent_reader *r)
{
    const uint8_t *b = r->buffer;
    return (size_t)b[1] << 24 | (size_t)b[2] << 16 | (size_t)b[3] << 8 | b[4];
}

enum status_code agent_receive(int fd, struct agent_reader *r, enum agent_frame *type, const uint8_t **payload,
                               size_t *bytes, struct status *st)
{
    *payload = NULL;
    for (;;) {
        if (r->have >= HEADER && frame_bytes(r) > AGENT_FRAME_MAX)
            return status_set(st, ST_DATA_LOSS, "a frame of %zu bytes, expected at most %u", frame_bytes(r),
                              AGENT_FRAME_MAX);
        size_t want = r->have < HEADER ? HEADER : HEADER + frame_bytes(r);
        if (r->have >= HEADER && r->have >= want) {
            *type = (enum agent_frame)r->buffer[0];
            *bytes = want - HEADER;
            *payload = r->buffer + HEADER;
            return ST_OK;
        }
        ssize_t n = recv(fd, r->buffer + r->have, want - r->have, 0); /* no more: so that nothing needs to be moved */
        if (n > 0)
            r->have += (size_t)n;
        else if (n == 0)
            return status_set(st, ST_UNAVAILABLE, "the peer closed the connection");
        else if (errno == EAGAIN)
            return ST_OK;
        else if (errno != EINTR)
            return status_errno(st, ST_UNAVAILABLE, errno, "receive");
    }
}

void agent_frame_done(struct agent_reader *r)
{
    r->have = 0;
}

enum status_code agent_await(int fd, struct agent_reader *r, int64_t until_ms, enum agent_frame *type,
                             const uint8_t **payload, size_t *bytes, struct status *st)
{
    for (;;) {
        enum status_code rc = agent_receive(fd, r, type, payload, bytes, st);
        if (rc != ST_OK || *payload)
            return rc;
        if (!ready(fd, POLLIN, until_ms))
            return status_set(st, ST_DEADLINE_EXCEEDED, "no answer in time");
    }
}

enum status_code agent_split_address(const char *address, char host[256], char port[8], struct status *st)
{
    const char *begin = address, *colon = strrchr(address, ':');
    size_t n = colon ? (size_t)(colon - address) : strlen(address);
    if (address[0] == '[') {
        const char *close = strchr(address, ']');
        if (!close || (close[1] && close[1] != ':'))
            return status_set(st, ST_INVALID_ARGUMENT, "address %.200s: expected [address]:port", address);
        begin = address + 1;
        n = (size_t)(close - begin);
        colon = close[1] ? close + 1 : NULL;
    } else if (colon && memchr(address, ':', n)) { /* a bare IPv6 address */
        n = strlen(address);
        colon = NULL;
    }
    char *end = NULL;
    unsigned long number = colon ? strtoul(colon + 1, &end, 10) : AGENT_PORT;
    if (n == 0 || n >= 256 || number > 65535 || (colon && (!*(colon + 1) || *end || colon[1] < '0' || colon[1] > '9')))
        return status_set(st, ST_INVALID_ARGUMENT, "address %.200s: expected host or host:port", address);
    memcpy(host, begin, n);
    host[n] = '\0';
    snprintf(port, 8, "%lu", number);
    return ST_OK;
}

enum status_code agent_listen(const char *address, int *fd, unsigned *port, struct status *st)
{
    char host[256] = "", text[8] = "";
    enum status_code rc = agent_split_address(address, host, text, st);
    if (rc != ST_OK)
        return rc;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found = NULL;
    int err = getaddrinfo(host, text, &hints, &found);
    if (err)
        return status_set(st, ST_INVALID_ARGUMENT, "--listen %.200s: %s", address, gai_strerror(err));
    int one = 1, s = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    union { /* one address of either family */
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } at = {.v6 = {.sin6_port = 0}};
    socklen_t len = sizeof at;
    if (s < 0 || setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) ||
        bind(s, found->ai_addr, found->ai_addrlen) || listen(s, 64) || getsockname(s, &at.any, &len)) {
        rc = status_errno(st, ST_UNAVAILABLE, errno, "--listen %.200s", address);
        if (s >= 0)
            close(s);
    } else {
        *fd = s;
        *port = ntohs(at.any.sa_family == AF_INET6 ? at.v6.sin6_port : at.v4.sin_port);
    }
    freeaddrinfo(found);
    return rc;
}

static int try_connect(const struct addrinfo *a, int64_t until_ms)
{
    int s = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s < 0)
        return -1;
    int err = 0;
    socklen_t len = sizeof err;
    if (connect(s, a->ai_addr, a->ai_addrlen) == 0)
        return s;
    if (errno == EINPROGRESS && ready(s, POLLOUT, until_ms) && getsockopt(s, SOL_SOCKET, SO_ERROR, &err, &len) == 0 &&
        err == 0)
        return s;
    if (err == 0)
        err = errno == EINPROGRESS ? ETIMEDOUT : errno;
    close(s);
    errno = err;
    return -1;
}

enum status_code agent_connect(const char *address, int64_t until_ms, int *fd, struct status *st)
{
    char host[256] = "", port[8] = "";
    enum status_code rc = agent_split_address(address, host, port, st);
    while (rc == ST_OK) {
        struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
        int gai = getaddrinfo(host, port, &hints, &found), s = -1;
        int64_t try_until = agent_now_ms() + 3000; /* a pod that is gone answers nothing: ask the name again */
        for (const struct addrinfo *a = gai ? NULL : found; a && s < 0; a = a->ai_next)
            s = try_connect(a, try_until < until_ms ? try_until : until_ms);
        int err = errno;
        if (!gai)
            freeaddrinfo(found);
        if (s >= 0) {
            *fd = s;
            agent_keep_alive(s);
            return ST_OK;
        }
        if (agent_now_ms() + RETRY_MS > until_ms)
            return status_set(st, ST_UNAVAILABLE, "%.200s: %s", address, gai ? gai_strerror(gai) : strerror(err));
        nanosleep(&(struct timespec){0, RETRY_MS * 1000000L}, NULL);
    }
    return rc;
}

void agent_keep_alive(int fd)
{
    int one = 1, idle = 10, interval = 3, count = 3, unanswered_ms = 20000;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered_ms, sizeof unanswered_ms);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}
