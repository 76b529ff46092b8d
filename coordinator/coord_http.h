/* coord_http.h - HTTP beside gRPC: OpenAI's API, health, metrics. Prefix http_.
 *
 *     engine, intake ── sink ops ──▶ exchange (queue of packed messages) ── ready list, eventfd ──▶ the HTTP thread
 *
 * One thread owns the daemon of libmicrohttpd, without threads of its own, and calls everything of it. While a request is in
 * the coordinator its connection is suspended, which takes it out of the daemon's epoll set: the thread watches the socket
 * itself then, so that a client that goes away is noticed at once, also one that waits in the queue.
 *
 *     POST body ──▶ request_open ──▶ suspended ──▶ first message or status ──▶ response: a body, or events
 *                                        ▲                                           │ nothing to send
 *                                        └───────────────────────────────────────────┘
 */
#ifndef TANDEM_COORD_HTTP_H
#define TANDEM_COORD_HTTP_H

#include "coordinator/coord_internal.h"

struct http;

/* Listens at c->opt.http. The error names the option. */
STATUS_MUST_CHECK enum status_code http_start(struct http **out, struct coord *c, struct status *st);
uint16_t http_port(const struct http *h);
/* After the requests were ended: lets answers go out for grace_ms, closes all connections. NULL is fine. */
void http_stop(struct http *h, uint32_t grace_ms);

#endif
