/* The HTTP thread: listening socket, the daemon's loop, who may come in and where a request goes. */
#include "coordinator/coord_http.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "coordinator/coord_http_internal.h"

#define TURN_MS   250
#define BACKLOG   1024
#define SPARE_FDS 256 /* beside the connections: gRPC, ranks, files */
/* Of a connection, in the kernel, which doubles it. Left to itself that grows to megabytes for a client that does not read, which
 * would be found slow that much later; events are some hundred bytes each. */
#define SEND_BYTES (64 << 10)
#define LAST_TURNS 64 /* of the daemon, after all connections were told to end */

/* ---- who and where: HTTP thread ---- */

static bool is_admitted(struct http *h, struct MHD_Connection *connection)
{
    if (!h->tokens)
        return true;
    const char *value = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Authorization");
    return value && rpc_tokens_accept(h->tokens, value, strlen(value));
}

/* Probes have no token, and the page has nothing in it: it asks for one itself. */
static bool is_open(const char *url)
{
    return strcmp(url, "/") == 0 || strcmp(url, "/health") == 0 || strcmp(url, "/healthz") == 0 ||
           strcmp(url, "/livez") == 0 || strcmp(url, "/readyz") == 0 || strcmp(url, "/startupz") == 0;
}

/* A body that says that it is too long. */
static bool is_too_long(struct http *h, struct MHD_Connection *connection)
{
    const char *value = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Length");
    return value && strtoull(value, NULL, 10) > h->c->opt.max_message_bytes;
}

static enum MHD_Result open_post(struct http *h, struct MHD_Connection *connection, const char *url, void **data)
{
    struct status st = STATUS_INIT;
    bool chat = strcmp(url, "/v1/chat/completions") == 0;
    if (is_too_long(h, connection)) {
        status_set(&st, ST_INVALID_ARGUMENT, "the body is too long, expected at most %u bytes (--max-message-bytes)",
                   h->c->opt.max_message_bytes);
        return http_refuse(connection, 413, NULL, &st, 0);
    }
    struct exchange *x = exchange_create(h, connection, chat ? OPENAI_CHAT : OPENAI_COMPLETION);
    if (!x)
        return MHD_NO;
    if (!is_admitted(h, connection))
        exchange_deny(x, ST_UNAUTHENTICATED, "authorization: expected Bearer and a token of this server");
    else if (h->listener->security.health_only)
        exchange_deny(x, ST_PERMISSION_DENIED, "this listener answers health and metrics only");
    else if (!chat && strcmp(url, "/v1/completions") != 0)
        exchange_deny(x, ST_NOT_FOUND, "no such path: POST goes to /v1/completions and /v1/chat/completions");
    *data = x;
    return MHD_YES;
}

/* What *data is of a request that no exchange belongs to: it has no body, and its answer comes with the next call. The library
 * closes a connection that was answered in the first, since a body may be on its way. */
static char bodyless;

static bool has_body(struct MHD_Connection *connection)
{
    const char *length = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Length");
    return MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Transfer-Encoding") ||
           (length && strcmp(length, "0") != 0);
}

static enum MHD_Result on_access(void *ctx, struct MHD_Connection *connection, const char *url, const char *method,
                                 const char *version, const char *bytes, size_t *n, void **data)
{
    struct http *h = ctx;
    struct status st = STATUS_INIT;
    (void)version;
    if (*data && *data != &bodyless)
        return exchange_advance(*data, bytes, n);
    if (strcmp(method, MHD_HTTP_METHOD_POST) == 0)
        return open_post(h, connection, url, data);
    if (!*data && !has_body(connection)) {
        *data = &bodyless;
        return MHD_YES;
    }
    if (!is_open(url) && !is_admitted(h, connection)) {
        status_set(&st, ST_UNAUTHENTICATED, "authorization: expected Bearer and a token of this server");
        return http_refuse(connection, 0, NULL, &st, 0);
    }
    return http_page(h, connection, url, method);
}

static void on_completed(void *ctx, struct MHD_Connection *connection, void **data,
                         enum MHD_RequestTerminationCode code)
{
    (void)ctx;
    (void)connection;
    if (*data && *data != &bodyless)
        exchange_complete(*data, code == MHD_REQUEST_TERMINATED_COMPLETED_OK);
    *data = NULL;
}

/* What the library has to say about broken connections is no news. */
static void on_library_log(void *ctx, const char *fmt, va_list list)
{
    const struct http *h = ctx;
    char text[256];
    if (h->c->log.level < LOG_DEBUG)
        return;
    vsnprintf(text, sizeof text, fmt, list);
    text[strcspn(text, "\n")] = '\0';
    log_line(&h->c->log, LOG_DEBUG, "http: %s", text);
}

/* ---- the loop ---- */

static void take_ready(struct http *h)
{
    pthread_mutex_lock(&h->mu);
    struct exchange *x = h->ready;
    h->ready = NULL;
    while (x) { /* one after the other: what is no longer listed may be listed again at once, and linked elsewhere */
        struct exchange *next = x->ready_next;
        x->listed = false;
        pthread_mutex_unlock(&h->mu);
        exchange_resume(x);
        pthread_mutex_lock(&h->mu);
        x = next;
    }
    pthread_mutex_unlock(&h->mu);
}

static void turn(struct http *h, int timeout_ms)
{
    struct epoll_event ev[64];
    int n = epoll_wait(h->epoll_fd, ev, 64, timeout_ms);
    for (int i = 0; i < n; i++) {
        uint64_t unused;
        if (ev[i].data.ptr == &h->wake_fd) {
            if (read(h->wake_fd, &unused, sizeof unused) < 0)
                continue; /* taken before */
        } else if (ev[i].data.ptr != h) {
            exchange_hang_up(ev[i].data.ptr);
        }
    }
    take_ready(h);
    MHD_run(h->daemon);
}

static void close_all(struct http *h)
{
    for (struct link *l = h->exchanges.next, *next; l != &h->exchanges; l = next) {
        next = l->next;
        exchange_hang_up(container_of(l, struct exchange, link));
    }
}

static void *http_main(void *arg)
{
    struct http *h = arg;
    while (!atomic_load(&h->stop)) {
        MHD_UNSIGNED_LONG_LONG ms = TURN_MS;
        if (MHD_get_timeout(h->daemon, &ms) != MHD_YES || ms > TURN_MS)
            ms = TURN_MS;
        turn(h, (int)ms);
    }
    /* The requests are at their end: what they leave goes out first. */
    MHD_socket fd = MHD_quiesce_daemon(h->daemon);
    while (!list_empty(&h->exchanges) && coord_now_us() < h->stop_until_us)
        turn(h, 10);
    close_all(h);
    for (int i = 0; i < LAST_TURNS && !list_empty(&h->exchanges); i++)
        turn(h, 1);
    take_ready(h);
    MHD_stop_daemon(h->daemon); /* completes what is left */
    h->daemon = NULL;
    if (fd != MHD_INVALID_SOCKET)
        close(fd);
    h->listen_fd = -1;
    take_ready(h);
    return NULL;
}

/* ---- start and stop ---- */

static enum status_code split(const char *address, char host[256], char port[8], struct status *st)
{
    const char *colon = strrchr(address, ':'), *begin = address, *end = colon;
    size_t digits = colon ? strspn(colon + 1, "0123456789") : 0;
    if (end && *begin == '[' && end > begin + 1 && end[-1] == ']') {
        begin++;
        end--;
    } else if (end && memchr(begin, ':', (size_t)(end - begin))) {
        end = NULL;
    }
    if (!end || end == begin || end - begin > 255 || strncmp(address, "unix:", 5) == 0 || digits < 1 || digits > 5 ||
        colon[1 + digits] || strtoul(colon + 1, NULL, 10) > 65535)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: expected HOST:PORT or [IPV6]:PORT", address);
    memcpy(host, begin, (size_t)(end - begin));
    host[end - begin] = '\0';
    memcpy(port, colon + 1, digits + 1);
    return ST_OK;
}

/* 0 or an errno. */
static int listen_at(const struct addrinfo *ai, int *out)
{
    int on = 1, off = 0, bytes = SEND_BYTES;
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes); /* accepted ones have it, too */
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0) {
        *out = fd;
        return 0;
    }
    int err = errno;
    close(fd);
    return err;
}

static enum status_code open_socket(struct http *h, struct status *st)
{
    const char *address = h->listener->address;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *list;
    char host[256], port[8];
    enum status_code rc = split(address, host, port, st);
    if (rc != ST_OK)
        return rc;
    int gai = getaddrinfo(host, port, &hints, &list);
    if (gai)
        return status_set(st, ST_INVALID_ARGUMENT, "%s: %s", address, gai_strerror(gai));
    int err = listen_at(list, &h->listen_fd);
    freeaddrinfo(list);
    if (err == EADDRINUSE)
        return status_set(st, ST_ALREADY_EXISTS, "%s: in use by another process", address);
    if (err)
        return status_errno(st, err == EACCES ? ST_PERMISSION_DENIED : ST_INVALID_ARGUMENT, err, "%s", address);
    struct sockaddr_in6 at = {0};
    socklen_t len = sizeof at;
    static_assert(offsetof(struct sockaddr_in, sin_port) == offsetof(struct sockaddr_in6, sin6_port), "one place");
    if (getsockname(h->listen_fd, (struct sockaddr *)&at, &len) == 0)
        h->port = ntohs(at.sin6_port);
    return ST_OK;
}

/* As many connections as were asked for, or as there may be open files. */
static unsigned connection_limit(const struct http *h)
{
    struct rlimit files;
    unsigned asked = h->c->opt.http_connections;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0)
        return asked;
    if (files.rlim_cur != RLIM_INFINITY && files.rlim_cur < asked + SPARE_FDS) {
        files.rlim_cur =
            files.rlim_max == RLIM_INFINITY || files.rlim_max > asked + SPARE_FDS ? asked + SPARE_FDS : files.rlim_max;
        (void)!setrlimit(RLIMIT_NOFILE, &files);
        getrlimit(RLIMIT_NOFILE, &files);
    }
    if (files.rlim_cur == RLIM_INFINITY || files.rlim_cur >= asked + SPARE_FDS)
        return asked;
    unsigned most = files.rlim_cur > 2 * SPARE_FDS ? (unsigned)files.rlim_cur - SPARE_FDS : SPARE_FDS;
    log_line(&h->c->log, LOG_WARN, "--http-connections: %u, but at most %u fit the limit of open files", asked, most);
    return most;
}

static enum status_code start_daemon(struct http *h, struct status *st)
{
    h->daemon =
        MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_access, h,
                         MHD_OPTION_EXTERNAL_LOGGER, on_library_log, h, MHD_OPTION_LISTEN_SOCKET, h->listen_fd,
                         MHD_OPTION_NOTIFY_COMPLETED, on_completed, h, MHD_OPTION_CONNECTION_LIMIT, connection_limit(h),
                         MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HTTP_HEADER_BYTES, MHD_OPTION_CONNECTION_TIMEOUT,
                         (unsigned)HTTP_IDLE_S, MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1, MHD_OPTION_END);
    if (!h->daemon)
        return status_set(st, ST_RESOURCE_EXHAUSTED, "%s: the HTTP library did not start", h->listener->address);
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    struct epoll_event daemon_ev = {.events = EPOLLIN, .data.ptr = h},
                       wake_ev = {.events = EPOLLIN, .data.ptr = &h->wake_fd};
    if (!info || epoll_ctl(h->epoll_fd, EPOLL_CTL_ADD, info->epoll_fd, &daemon_ev) != 0 ||
        epoll_ctl(h->epoll_fd, EPOLL_CTL_ADD, h->wake_fd, &wake_ev) != 0)
        return status_errno(st, ST_INTERNAL, errno, "epoll");
    return ST_OK;
}

static void on_token_report(void *ctx, bool failed, const char *message)
{
    const struct coord *c = ctx;
    log_line(&c->log, failed ? LOG_ERROR : LOG_INFO, "%s", message);
}

static enum status_code set_up(struct http *h, struct status *st)
{
    const struct rpc_report report = {on_token_report, h->c};
    const char *token_file = h->listener->security.token_file;
    enum status_code rc = token_file ? rpc_tokens_create(&h->tokens, token_file, report, st) : ST_OK;
    if (rc != ST_OK || (rc = open_socket(h, st)) != ST_OK)
        return rc;
    h->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    h->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (h->epoll_fd < 0 || h->wake_fd < 0)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "epoll");
    if ((rc = start_daemon(h, st)) != ST_OK)
        return rc;
    int err = pthread_create(&h->thread, NULL, http_main, h);
    if (err)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "starting the HTTP thread");
    h->started = true;
    return ST_OK;
}

enum status_code http_start(struct http **out, struct coord *c, struct status *st)
{
    struct http *h = calloc(1, sizeof *h);
    if (!h)
        return status_nomem(st, "http", sizeof *h);
    h->c = c;
    h->listener = &c->opt.http;
    h->listen_fd = h->epoll_fd = h->wake_fd = -1;
    list_init(&h->exchanges);
    atomic_init(&h->stop, false);
    pthread_mutex_init(&h->mu, NULL);
    enum status_code rc = set_up(h, st);
    if (rc != ST_OK) {
        http_stop(h, 0);
        return status_prefix(st, "--http");
    }
    *out = h;
    return ST_OK;
}

uint16_t http_port(const struct http *h)
{
    return h->port;
}

void http_stop(struct http *h, uint32_t grace_ms)
{
    if (!h)
        return;
    if (h->started) {
        uint64_t one = 1;
        h->stop_until_us = coord_now_us() + (int64_t)grace_ms * 1000;
        atomic_store(&h->stop, true);
        (void)!write(h->wake_fd, &one, sizeof one); /* full: it is awake */
        pthread_join(h->thread, NULL);
    }
    if (h->daemon)
        MHD_stop_daemon(h->daemon); /* closes its socket */
    else if (h->listen_fd >= 0)
        close(h->listen_fd);
    if (h->epoll_fd >= 0)
        close(h->epoll_fd);
    if (h->wake_fd >= 0)
        close(h->wake_fd);
    rpc_tokens_destroy(h->tokens);
    pthread_mutex_destroy(&h->mu);
    free(h);
}
