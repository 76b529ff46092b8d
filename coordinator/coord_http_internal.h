/* coord_http_internal.h - what the files of coord_http*.c share. */
#ifndef TANDEM_COORD_HTTP_INTERNAL_H
#define TANDEM_COORD_HTTP_INTERNAL_H

#include <microhttpd.h>

#include "coordinator/coord_http.h"
#include "coordinator/openai.h"
#include "proto/rpc_token.h"

#define HTTP_HEADER_BYTES (32u << 10) /* of a request; also a connection's buffer */
#define HTTP_IDLE_S       60          /* a connection on which nothing moves */
#define HTTP_BODY_MS      60000       /* for a body to come in */
#define HTTP_EVENT_BYTES  (16u << 10) /* handed to the daemon at once */
#define HTTP_BODIES       8           /* bodies of the largest size that may be coming in together */

struct http {
    struct coord *c;
    const struct coord_listener *listener;
    struct MHD_Daemon *daemon;
    int listen_fd, epoll_fd, wake_fd;
    uint16_t port;
    pthread_t thread;
    bool started;
    atomic_bool stop;
    int64_t stop_until_us; /* before stop is set */
    struct rpc_tokens *tokens;
    pthread_mutex_t mu;
    struct exchange *ready; /* mu: have something to tell the thread; it holds a reference to each */
    /* HTTP thread */
    struct link exchanges;
    uint64_t body_bytes; /* of all bodies that are coming in */
};

/* A request to a route that generates. */
struct exchange {
    struct http *http;
    atomic_uint refs; /* the connection's, the request's, the ready list's */
    struct MHD_Connection *connection;
    enum openai_kind kind; /* constant */
    char peer[80];
    /* HTTP thread */
    struct link link;
    int64_t arrived_us;
    uint8_t *body;
    size_t body_len, body_cap;
    bool denied, begun, suspended, answering, gone;
    int watched_fd; /* -1: not watched */
    struct request *request;
    struct openai_reply *reply;
    const char *out; /* of reply: what the daemon has not taken */
    size_t out_len;
    bool end_written;
    struct json_text taken; /* the queue, taken out of it */
    /* mu */
    pthread_mutex_t mu;
    struct openai_form form;
    struct json_text queue; /* messages: length in four bytes, then packed */
    bool ended, cut, closed;
    struct status end;
    uint32_t retry_after_ms;
    struct exchange *ready_next; /* http->mu */
    bool listed;                 /* http->mu */
    /* any */
    atomic_uint pending;
};

/* coord_http_exchange.c: HTTP thread */
struct exchange *exchange_create(struct http *h, struct MHD_Connection *connection, enum openai_kind kind);
void exchange_unref(struct exchange *x);
/* To be refused when its body is in. Before the first exchange_advance. */
void exchange_deny(struct exchange *x, enum status_code code, const char *message);
/* A call of the daemon's handler: bytes of the body, or (n NULL or 0) the end of it or a resumption. */
enum MHD_Result exchange_advance(struct exchange *x, const char *bytes, size_t *n);
/* The daemon is done with it. */
void exchange_complete(struct exchange *x, bool whole);
/* The client has closed its side. */
void exchange_hang_up(struct exchange *x);
/* It was on the ready list: goes on where it was suspended. Drops the list's reference. */
void exchange_resume(struct exchange *x);

/* coord_http_pages.c: HTTP thread */
enum MHD_Result http_page(struct http *h, struct MHD_Connection *connection, const char *url, const char *method);
/* Takes the text over; retry_after_ms 0: none. */
enum MHD_Result http_answer(struct MHD_Connection *connection, unsigned code, const char *type, struct json_text *text,
                            uint32_t retry_after_ms);
/* The error of a status in OpenAI's form, or under another code (0: the status' own). */
enum MHD_Result http_refuse(struct MHD_Connection *connection, unsigned code, const struct openai_form *form,
                            const struct status *st, uint32_t retry_after_ms);

#endif
