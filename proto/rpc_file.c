/* rpc_file.c - small files that somebody replaces while we run: certificates, keys, tokens. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/rpc_security.h"

struct rpc_file_stamp rpc_file_stamp(const char *path)
{
    struct rpc_file_stamp s = {0};
    struct stat sb;
    if (!path || stat(path, &sb) != 0) /* follows links: mounted secrets are rotated by changing one */
        return s;
    s.dev = (uint64_t)sb.st_dev;
    s.ino = (uint64_t)sb.st_ino;
    s.size = (uint64_t)sb.st_size;
    s.mtime_ns = (uint64_t)sb.st_mtim.tv_sec * 1000000000u + (uint64_t)sb.st_mtim.tv_nsec;
    return s;
}

bool rpc_file_same(const struct rpc_file_stamp *a, const struct rpc_file_stamp *b)
{
    return a->dev == b->dev && a->ino == b->ino && a->size == b->size && a->mtime_ns == b->mtime_ns;
}

enum status_code rpc_file_read(const char *role, const char *path, char **text, struct status *st)
{
    char *buffer = NULL;
    enum status_code rc;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return status_errno(st, errno == EACCES ? ST_PERMISSION_DENIED : ST_NOT_FOUND, errno, "%s %.300s", role, path);
    buffer = malloc(RPC_FILE_MAX + 1);
    if (!buffer) {
        rc = status_nomem(st, role, RPC_FILE_MAX);
        goto fail;
    }
    size_t len = 0;
    ssize_t n = 0;
    while (len <= RPC_FILE_MAX && (n = read(fd, buffer + len, RPC_FILE_MAX + 1 - len)) > 0)
        len += (size_t)n;
    if (n < 0) {
        rc = status_errno(st, ST_UNAVAILABLE, errno, "%s %.300s", role, path);
        goto fail;
    }
    if (len > RPC_FILE_MAX || len == 0 || memchr(buffer, '\0', len)) {
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s %.300s: expected a text file of 1 to %u bytes", role, path,
                        RPC_FILE_MAX);
        goto fail;
    }
    close(fd);
    buffer[len] = '\0';
    *text = buffer;
    return ST_OK;
fail:
    rpc_file_forget(buffer, buffer ? RPC_FILE_MAX : 0);
    close(fd);
    return rc;
}

void rpc_file_forget(char *text, size_t len)
{
    if (!text)
        return;
    explicit_bzero(text, len);
    free(text);
}
