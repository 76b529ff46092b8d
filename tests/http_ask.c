#include "tests/http_ask.h"

#include <arpa/inet.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/coord_proc.h"

int http_connect(const struct proc *p)
{
    struct sockaddr_in sa = {.sin_family = AF_INET};
    unsigned port = 0;
    const char *at = strstr(p->listening, " http=127.0.0.1:");
    if (!at || sscanf(at, " http=127.0.0.1:%u", &port) != 1)
        abort();
    sa.sin_port = htons((uint16_t)port);
    sa.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof sa) != 0)
        abort();
    return fd;
}

static void send_all(int fd, const char *text, size_t n)
{
    for (size_t at = 0; at < n;) {
        ssize_t k = send(fd, text + at, n - at, MSG_NOSIGNAL);
        if (k <= 0)
            return; /* the answer says why */
        at += (size_t)k;
    }
}

void http_send(int fd, const char *method, const char *path, const char *headers, const char *body)
{
    char head[4096];
    int n = snprintf(head, sizeof head, "%s %s HTTP/1.1\r\nHost: test\r\n%s", method, path, headers);
    if (body)
        n += snprintf(head + n, sizeof head - (size_t)n, "Content-Length: %zu\r\n", strlen(body));
    n += snprintf(head + n, sizeof head - (size_t)n, "\r\n");
    send_all(fd, head, (size_t)n);
    if (body)
        send_all(fd, body, strlen(body));
}

/* More bytes behind *text; false at the end or after the time. */
static bool more(int fd, char **text, size_t *n, int timeout_ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    char piece[16384];
    if (poll(&p, 1, timeout_ms) <= 0)
        return false;
    ssize_t k = recv(fd, piece, sizeof piece, 0);
    if (k <= 0)
        return false;
    *text = realloc(*text, *n + (size_t)k + 1);
    if (!*text)
        abort();
    memcpy(*text + *n, piece, (size_t)k);
    *n += (size_t)k;
    (*text)[*n] = '\0';
    return true;
}

/* Takes the frames of chunks out of what came; true when the last one was there. */
static bool join_chunks(char *text, size_t *n)
{
    size_t from = 0, to = 0;
    for (;;) {
        char *line_end = memmem(text + from, *n - from, "\r\n", 2);
        if (!line_end)
            break;
        size_t len = strtoul(text + from, NULL, 16);
        from = (size_t)(line_end - text) + 2;
        if (len == 0) {
            *n = to;
            return true;
        }
        if (from + len + 2 > *n)
            break;
        memmove(text + to, text + from, len);
        to += len;
        from += len + 2;
    }
    *n = to;
    return false;
}

/* Of one line of the head, in lower case; NULL without it. */
static const char *header_of(const char *head, const char *name)
{
    const char *at = strcasestr(head, name);
    return at ? at + strlen(name) : NULL;
}

bool http_read(int fd, struct http_answer *a, int timeout_ms)
{
    char *text = NULL, *end = NULL;
    size_t n = 0;
    memset(a, 0, sizeof *a);
    while (!end && more(fd, &text, &n, timeout_ms))
        end = memmem(text, n, "\r\n\r\n", 4);
    if (!end || sscanf(text, "HTTP/1.1 %d", &a->code) != 1) {
        free(text);
        return false;
    }
    size_t head_len = (size_t)(end - text) + 4;
    a->head = strndup(text, head_len);
    a->body_len = n - head_len;
    a->body = calloc(1, a->body_len + 1);
    if (!a->head || !a->body)
        abort();
    memcpy(a->body, text + head_len, a->body_len);
    free(text);
    const char *length = header_of(a->head, "\r\nContent-Length: ");
    bool chunks = header_of(a->head, "\r\nTransfer-Encoding: chunked");
    size_t want = length ? strtoul(length, NULL, 10) : SIZE_MAX;
    while ((chunks ? a->body_len < 5 || memcmp(a->body + a->body_len - 5, "0\r\n\r\n", 5) != 0 : a->body_len < want) &&
           more(fd, &a->body, &a->body_len, timeout_ms))
        ;
    a->whole = chunks ? join_chunks(a->body, &a->body_len) : !length || a->body_len == want;
    a->body[a->body_len] = '\0';
    return true;
}

bool http_read_until(int fd, const char *wanted, int timeout_ms)
{
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    while (!found && more(fd, &text, &n, timeout_ms))
        found = strstr(text, wanted) != NULL;
    free(text);
    return found;
}

void http_answer_free(struct http_answer *a)
{
    free(a->head);
    free(a->body);
    memset(a, 0, sizeof *a);
}

void http_ask(const struct proc *p, const char *method, const char *path, const char *headers, const char *body,
              struct http_answer *a)
{
    char with_close[2048];
    int fd = http_connect(p);
    snprintf(with_close, sizeof with_close, "Connection: close\r\n%s", headers);
    http_send(fd, method, path, with_close, body);
    http_read(fd, a, 30000);
    close(fd);
}

static void add_text(char **out, const char *json, size_t n, int choice)
{
    json_t *v = json_loadb(json, n, JSON_ALLOW_NUL, NULL);
    for (size_t i = 0; i < json_array_size(json_object_get(v, "choices")); i++) {
        const json_t *c = json_array_get(json_object_get(v, "choices"), i);
        const json_t *part = json_object_get(c, "delta") ? json_object_get(c, "delta") : json_object_get(c, "message");
        const json_t *text = part ? json_object_get(part, "content") : json_object_get(c, "text");
        if (json_integer_value(json_object_get(c, "index")) != choice || !json_is_string(text))
            continue;
        size_t at = strlen(*out), len = json_string_length(text);
        *out = realloc(*out, at + len + 1);
        if (!*out)
            abort();
        for (size_t k = 0; k < len; k++)
            if (json_string_value(text)[k])
                (*out)[at++] = json_string_value(text)[k];
        (*out)[at] = '\0';
    }
    json_decref(v);
}

char *http_text(const struct http_answer *a, int choice)
{
    char *out = strdup("");
    if (!out)
        abort();
    if (strncmp(a->body, "data: ", 6) != 0) {
        add_text(&out, a->body, a->body_len, choice);
        return out;
    }
    for (const char *at = a->body; (at = strstr(at, "data: "));) {
        const char *end = strstr(at, "\n\n");
        at += 6;
        if (!end)
            break;
        add_text(&out, at, (size_t)(end - at), choice);
    }
    return out;
}

double http_metric(const struct proc *p, const char *name)
{
    struct http_answer a;
    char line[160];
    double v = -1;
    http_ask(p, "GET", "/metrics", "", NULL, &a);
    snprintf(line, sizeof line, "\n%s ", name);
    const char *at = a.body ? strstr(a.body, line) : NULL;
    if (at)
        v = strtod(at + strlen(line), NULL);
    http_answer_free(&a);
    return v;
}
