/* http_ask.h - a small HTTP client for a coordinator under test. Prefix http_. */
#ifndef TANDEM_TESTS_HTTP_ASK_H
#define TANDEM_TESTS_HTTP_ASK_H

#include <stdbool.h>
#include <stddef.h>

struct proc;

struct http_answer {
    int code; /* 0: the connection ended without one */
    char *head, *body;
    size_t body_len; /* without the frames of chunks */
    bool whole;      /* what the head promised came */
};

/* A connection to the --http address that the coordinator announced. */
int http_connect(const struct proc *p);
/* One request; headers: lines, each with its \r\n, or "". body NULL: none. */
void http_send(int fd, const char *method, const char *path, const char *headers, const char *body);
/* Reads one answer; false when nothing came within timeout_ms. */
bool http_read(int fd, struct http_answer *a, int timeout_ms);
/* Reads what is there until `text` was seen; false at the end, or after timeout_ms. */
bool http_read_until(int fd, const char *text, int timeout_ms);
void http_answer_free(struct http_answer *a);
/* All in one, on a connection of its own. */
void http_ask(const struct proc *p, const char *method, const char *path, const char *headers, const char *body,
              struct http_answer *a);
/* The texts of all events of a stream, or of a whole body, without NULs; the caller frees it. `choice`: which answer. */
char *http_text(const struct http_answer *a, int choice);
/* A number of /metrics; -1: it is not there. */
double http_metric(const struct proc *p, const char *name);

#endif
