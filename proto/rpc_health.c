/* rpc_health.c - grpc.health.v1.Health over a table of service names.
 *
 * A Watch call is a struct watcher in the list, from its on_open to its on_close. An update goes out when nothing of the
 * watcher is pending; else its on_writable sends what is true by then: so a client that does not read costs one message,
 * however often the state changes.
 *
 * Lock order: rpc_health.lock, then (inside the rpc_call functions) the lock of a call.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "proto/rpc_internal.h"

#define MAX_SERVICES 32
#define MAX_NAME     128
#define MAX_WATCHERS 1024

typedef Grpc__Health__V1__HealthCheckRequest CheckRequest;
typedef Grpc__Health__V1__HealthCheckResponse CheckResponse;
typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus ServingStatus;

#define STATE(name) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name

struct service {
    char name[MAX_NAME + 1];
    bool serving;
};

struct watcher {
    struct watcher *prev, *next;
    struct rpc_call *call; /* valid: on_close takes the watcher out of the list */
    char name[MAX_NAME + 1];
    ServingStatus sent;
};

struct rpc_health {
    pthread_mutex_t lock;
    struct service services[MAX_SERVICES];
    size_t n_services;
    struct watcher watchers; /* head of a ring */
    size_t n_watchers;
    bool closed; /* watchers get one update and are ended */
};

/* With the lock held. */
static ServingStatus state_of(const struct rpc_health *h, const char *name)
{
    for (size_t i = 0; i < h->n_services; i++) {
        if (strcmp(h->services[i].name, name) == 0)
            return h->services[i].serving ? STATE(SERVING) : STATE(NOT_SERVING);
    }
    return STATE(SERVICE_UNKNOWN);
}

static CheckResponse response(ServingStatus s)
{
    CheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    r.status = s;
    return r;
}

static void fail(struct rpc_call *call, enum status_code code, const char *what, const char *name)
{
    struct status st;
    status_set(&st, code, "service \"%.*s\": %s", MAX_NAME, name, what);
    rpc_call_finish(call, &st, 0);
}

/* The name that is asked for, or the call is finished with an error. Free the request when done with it. */
static CheckRequest *request_open(struct rpc_call *call, const void *msg, size_t len)
{
    CheckRequest *r = (CheckRequest *)rpc_unpack(&grpc__health__v1__health_check_request__descriptor, msg, len);
    if (!r) {
        struct status st;
        status_set(&st, ST_INVALID_ARGUMENT, "the request is not a valid grpc.health.v1.HealthCheckRequest");
        rpc_call_finish(call, &st, 0);
        return NULL;
    }
    if (strlen(r->service) > MAX_NAME) {
        fail(call, ST_INVALID_ARGUMENT, "the name is too long", r->service);
        protobuf_c_message_free_unpacked(&r->base, NULL);
        return NULL;
    }
    return r;
}

static void check_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct rpc_health *h = ctx;
    CheckRequest *r = request_open(call, msg, len);
    if (!r)
        return;
    pthread_mutex_lock(&h->lock);
    ServingStatus s = state_of(h, r->service);
    pthread_mutex_unlock(&h->lock);
    if (s == STATE(SERVICE_UNKNOWN)) {
        fail(call, ST_NOT_FOUND, "not known here", r->service);
    } else {
        CheckResponse reply = response(s);
        rpc_call_reply(call, &reply.base);
    }
    protobuf_c_message_free_unpacked(&r->base, NULL);
}

static void list_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    typedef Grpc__Health__V1__HealthListResponse__StatusesEntry Entry;
    struct rpc_health *h = ctx;
    struct service services[MAX_SERVICES];
    CheckResponse values[MAX_SERVICES];
    Entry entries[MAX_SERVICES];
    Entry *list[MAX_SERVICES];
    Grpc__Health__V1__HealthListResponse reply = GRPC__HEALTH__V1__HEALTH_LIST_RESPONSE__INIT;
    (void)msg;
    (void)len;
    pthread_mutex_lock(&h->lock);
    size_t n = h->n_services;
    memcpy(services, h->services, n * sizeof *services);
    pthread_mutex_unlock(&h->lock);
    for (size_t i = 0; i < n; i++) {
        values[i] = response(services[i].serving ? STATE(SERVING) : STATE(NOT_SERVING));
        entries[i] = (Entry)GRPC__HEALTH__V1__HEALTH_LIST_RESPONSE__STATUSES_ENTRY__INIT;
        entries[i].key = services[i].name;
        entries[i].value = &values[i];
        list[i] = &entries[i];
    }
    reply.n_statuses = n;
    reply.statuses = list;
    rpc_call_reply(call, &reply.base);
}

/* With the lock held. */
static void update(struct rpc_health *h, struct watcher *w)
{
    ServingStatus now = state_of(h, w->name);
    if (now == w->sent || rpc_call_pending(w->call) > 0)
        return;
    CheckResponse r = response(now);
    if (rpc_call_send(w->call, &r.base, NULL) == ST_OK)
        w->sent = now;
}

static void watch_open(struct rpc_call *call, const void *msg, size_t len, void *ctx)
{
    struct rpc_health *h = ctx;
    CheckRequest *r = request_open(call, msg, len);
    if (!r)
        return;
    struct watcher *w = calloc(1, sizeof *w);
    if (w) {
        w->call = call;
        w->sent = STATE(UNKNOWN); /* never the state of a service */
        memcpy(w->name, r->service, strlen(r->service) + 1);
    }
    pthread_mutex_lock(&h->lock);
    bool ok = w && h->n_watchers < MAX_WATCHERS;
    if (ok) {
        w->next = &h->watchers;
        w->prev = h->watchers.prev;
        w->prev->next = w->next->prev = w;
        h->n_watchers++;
        rpc_call_set_data(call, w);
        update(h, w);
        if (h->closed)
            rpc_call_finish(call, NULL, 0);
    }
    pthread_mutex_unlock(&h->lock);
    if (!ok) {
        free(w);
        fail(call, ST_RESOURCE_EXHAUSTED, "too many Watch calls", r->service);
    }
    protobuf_c_message_free_unpacked(&r->base, NULL);
}

static void watch_writable(struct rpc_call *call, void *ctx)
{
    struct rpc_health *h = ctx;
    struct watcher *w = rpc_call_data(call);
    pthread_mutex_lock(&h->lock);
    if (w)
        update(h, w);
    pthread_mutex_unlock(&h->lock);
}

static void watch_close(struct rpc_call *call, bool cancelled, void *ctx)
{
    struct rpc_health *h = ctx;
    struct watcher *w = rpc_call_data(call);
    (void)cancelled;
    if (!w)
        return;
    pthread_mutex_lock(&h->lock);
    w->prev->next = w->next;
    w->next->prev = w->prev;
    h->n_watchers--;
    pthread_mutex_unlock(&h->lock);
    free(w);
}

void rpc_health_set(struct rpc_health *h, const char *service, bool serving)
{
    size_t i = 0;
    assert(strlen(service) <= MAX_NAME);
    pthread_mutex_lock(&h->lock);
    while (i < h->n_services && strcmp(h->services[i].name, service) != 0)
        i++;
    if (i < MAX_SERVICES && strlen(service) <= MAX_NAME) {
        if (i == h->n_services)
            memcpy(h->services[h->n_services++].name, service, strlen(service) + 1);
        h->services[i].serving = serving;
        for (struct watcher *w = h->watchers.next; w != &h->watchers; w = w->next)
            update(h, w);
    }
    pthread_mutex_unlock(&h->lock);
}

void rpc_health_close_watchers(struct rpc_health *h)
{
    pthread_mutex_lock(&h->lock);
    h->closed = true;
    for (struct watcher *w = h->watchers.next; w != &h->watchers; w = w->next) {
        CheckResponse r = response(state_of(h, w->name));
        if (r.status != w->sent && rpc_call_send(w->call, &r.base, NULL) == ST_OK)
            w->sent = r.status;
        rpc_call_finish(w->call, NULL, 0);
    }
    pthread_mutex_unlock(&h->lock);
}

enum status_code rpc_health_create(struct rpc_health **out, struct status *st)
{
    struct rpc_health *h = calloc(1, sizeof *h);
    if (!h)
        return status_nomem(st, "health table", sizeof *h);
    pthread_mutex_init(&h->lock, NULL);
    h->watchers.next = h->watchers.prev = &h->watchers;
    *out = h;
    return ST_OK;
}

void rpc_health_destroy(struct rpc_health *h)
{
    if (!h)
        return;
    assert(h->n_watchers == 0);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

void rpc_health_methods(struct rpc_health *h, struct rpc_method *methods)
{
    methods[0] =
        (struct rpc_method){.path = "/grpc.health.v1.Health/Check", .kind = RPC_UNARY, .on_open = check_open, .ctx = h};
    methods[1] = (struct rpc_method){.path = "/grpc.health.v1.Health/Watch",
                                     .kind = RPC_SERVER_STREAM,
                                     .on_open = watch_open,
                                     .on_writable = watch_writable,
                                     .on_close = watch_close,
                                     .ctx = h};
    methods[2] =
        (struct rpc_method){.path = "/grpc.health.v1.Health/List", .kind = RPC_UNARY, .on_open = list_open, .ctx = h};
}
