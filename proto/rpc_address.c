/* rpc_address.c - addresses: what people write, what the core wants, and whether a server can listen there.
 *
 * The core answers a failed bind with port 0 and a line on stderr, and it unlinks whatever unix socket is in its way, a
 * live one too. So addresses are tried out here first, where the reason is known.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/rpc_internal.h"

#define EXPECTED "expected HOST:PORT, [IPV6]:PORT or unix:PATH"

bool rpc_address_is_unix(const char *address)
{
    return strncmp(address, "unix:", 5) == 0;
}

/* The file of "unix:PATH" and of "unix:///PATH". */
static const char *unix_path(const char *address)
{
    const char *path = address + 5;
    return strncmp(path, "///", 3) == 0 ? path + 2 : path;
}

static enum status_code check_unix(const char *address, const char *what, struct status *st)
{
    size_t max = sizeof((struct sockaddr_un *)0)->sun_path - 1;
    size_t n = strlen(unix_path(address));
    if (n == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "%s %s: no path, %s", what, address, EXPECTED);
    if (n > max)
        return status_set(st, ST_INVALID_ARGUMENT, "%s %.40s...: a path of %zu bytes, a unix socket takes %zu", what,
                          address, n, max);
    return ST_OK;
}

/* Splits "HOST:PORT" and "[HOST]:PORT". */
static enum status_code split(const char *address, const char *what, bool port_0_allowed, char host[256],
                              unsigned *port, struct status *st)
{
    const char *colon = strrchr(address, ':');
    const char *begin = address;
    const char *end = colon;
    if (!colon || colon == address)
        return status_set(st, ST_INVALID_ARGUMENT, "%s \"%.255s\": %s", what, address, EXPECTED);
    if (*begin == '[' && colon[-1] == ']') {
        begin++;
        end--;
    } else if (memchr(begin, ':', (size_t)(end - begin))) {
        return status_set(st, ST_INVALID_ARGUMENT, "%s \"%.255s\": %s", what, address, EXPECTED);
    }
    if (end <= begin || end - begin >= 256)
        return status_set(st, ST_INVALID_ARGUMENT, "%s \"%.255s\": %s", what, address, EXPECTED);
    memcpy(host, begin, (size_t)(end - begin));
    host[end - begin] = '\0';
    size_t digits = strspn(colon + 1, "0123456789");
    unsigned long v = digits > 0 && digits <= 5 && colon[1 + digits] == '\0' ? strtoul(colon + 1, NULL, 10) : 65536;
    if (v > 65535 || (v == 0 && !port_0_allowed))
        return status_set(st, ST_INVALID_ARGUMENT, "%s \"%.255s\": port \"%.16s\", expected %d to 65535", what, address,
                          colon + 1, port_0_allowed ? 0 : 1);
    *port = (unsigned)v;
    return ST_OK;
}

enum status_code rpc_address_target(const char *address, const char *what, bool port_0_allowed,
                                    char target[RPC_TARGET_MAX], struct status *st)
{
    enum status_code rc;
    if (rpc_address_is_unix(address)) {
        rc = check_unix(address, what, st);
        if (rc == ST_OK)
            snprintf(target, RPC_TARGET_MAX, "unix:%s", unix_path(address));
        return rc;
    }
    char host[256];
    unsigned port = 0;
    rc = split(address, what, port_0_allowed, host, &port, st);
    if (rc != ST_OK)
        return rc;
    struct in6_addr bits;
    if (inet_pton(AF_INET, host, &bits) == 1)
        snprintf(target, RPC_TARGET_MAX, "ipv4:%s:%u", host, port);
    else if (inet_pton(AF_INET6, host, &bits) == 1)
        snprintf(target, RPC_TARGET_MAX, "ipv6:%%5B%s%%5D:%u", host, port);
    else if (host[strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")] == '\0')
        snprintf(target, RPC_TARGET_MAX, "dns:///%s:%u", host, port);
    else
        return status_set(st, ST_INVALID_ARGUMENT, "%s \"%.255s\": no such host name, %s", what, address, EXPECTED);
    return ST_OK;
}

/* 1: somebody accepts on it; 0: nobody; -errno. */
static int unix_alive(const struct sockaddr_un *sa)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    int rc = connect(fd, (const struct sockaddr *)sa, sizeof *sa) == 0 ? 0 : errno;
    close(fd);
    if (rc == 0 || rc == EAGAIN) /* EAGAIN: alive, with a full backlog */
        return 1;
    return rc == ECONNREFUSED || rc == ENOENT ? 0 : -rc;
}

static enum status_code probe_unix(const char *address, struct status *st)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    memcpy(sa.sun_path, unix_path(address), strlen(unix_path(address)) + 1); /* its length was checked */
    struct stat sb;
    if (lstat(sa.sun_path, &sb) == 0) {
        if (!S_ISSOCK(sb.st_mode))
            return status_set(st, ST_ALREADY_EXISTS, "listen address %s: the file exists and is no socket", address);
        int alive = unix_alive(&sa);
        if (alive < 0)
            return status_errno(st, ST_PERMISSION_DENIED, -alive, "listen address %s", address);
        if (alive)
            return status_set(st, ST_ALREADY_EXISTS, "listen address %s: in use by another process", address);
        if (unlink(sa.sun_path) != 0 && errno != ENOENT)
            return status_errno(st, ST_PERMISSION_DENIED, errno, "listen address %s: cannot remove a stale socket",
                                address);
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return status_errno(st, ST_RESOURCE_EXHAUSTED, errno, "listen address %s", address);
    int err = bind(fd, (struct sockaddr *)&sa, sizeof sa) == 0 ? 0 : errno;
    if (err == 0)
        unlink(sa.sun_path);
    close(fd);
    if (err == EADDRINUSE)
        return status_set(st, ST_ALREADY_EXISTS, "listen address %s: in use by another process", address);
    if (err)
        return status_errno(st, err == EACCES ? ST_PERMISSION_DENIED : ST_INVALID_ARGUMENT, err, "listen address %s",
                            address);
    return ST_OK;
}

static int try_bind(const struct addrinfo *ai)
{
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    int on = 1, off = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on); /* as the core does: connections in TIME_WAIT are fine */
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    int err = bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 ? 0 : errno;
    close(fd);
    return err;
}

static enum status_code probe_tcp(const char *address, struct status *st)
{
    char host[256];
    char service[8];
    unsigned port = 0;
    enum status_code rc = split(address, "listen address", true, host, &port, st);
    if (rc != ST_OK)
        return rc;
    snprintf(service, sizeof service, "%u", port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *list;
    int gai = getaddrinfo(host, service, &hints, &list);
    if (gai != 0)
        return status_set(st, ST_INVALID_ARGUMENT, "listen address %s: %s", address, gai_strerror(gai));
    int err = EADDRNOTAVAIL;
    bool any = false;
    for (struct addrinfo *ai = list; ai && err != EADDRINUSE; ai = ai->ai_next) {
        int e = try_bind(ai);
        any = any || e == 0;
        if (e != 0)
            err = e;
    }
    freeaddrinfo(list);
    if (err == EADDRINUSE)
        return status_set(st, ST_ALREADY_EXISTS, "listen address %s: in use by another process", address);
    if (!any)
        return status_errno(st, err == EACCES ? ST_PERMISSION_DENIED : ST_INVALID_ARGUMENT, err, "listen address %s",
                            address);
    return ST_OK;
}

enum status_code rpc_address_probe(const char *address, struct status *st)
{
    return rpc_address_is_unix(address) ? probe_unix(address, st) : probe_tcp(address, st);
}
