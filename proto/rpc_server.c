/* rpc_server.c - a server: its start, its poll threads, its end. A call's own life is in rpc_call.c. */
#include <errno.h>
#include <grpc/compression.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/rpc_security.h"

#define SLOTS_PER_METHOD     32 /* calls that may come in at once before a poll thread has to ask for more */
#define MAX_METHODS          64
#define MAX_POLL_THREADS     64
#define DEFAULT_QUEUE_BYTES  (4u << 20)
#define EVENTS_BETWEEN_POLLS 32
/* What a server's connections may hold of messages that are not whole yet. Else each stream that stops half way through
 * 16 MiB keeps them, 4096 on a connection. When it is full the core closes streams. */
#define MAX_CORE_BYTES ((size_t)512 << 20)
#define GOODBYE_MS     500 /* for clients to take in the end of their calls before connections are cut */

/* The core's queue hands out what is there before it looks at the sockets: while writers keep it filled, no request and no
 * cancellation is read. So each thread asks, every few events, a queue on which nothing ever completes: with a deadline
 * that is past this polls the sockets once. */
static bool poll_event(struct rpc_server *s)
{
    grpc_event ev = grpc_completion_queue_next(s->cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    if (ev.type == GRPC_QUEUE_SHUTDOWN)
        return false;
    rpc_tag_run(ev.tag, ev.success != 0);
    return true;
}

static void *poll_main(void *arg)
{
    struct rpc_server *s = arg;
    for (unsigned n = 1; poll_event(s); n++) {
        if (n % EVENTS_BETWEEN_POLLS == 0)
            grpc_completion_queue_next(s->idle_cq, gpr_time_0(GPR_CLOCK_MONOTONIC), NULL);
    }
    return NULL;
}

/* ---- counts: when may the queue be shut down? ---- */

void rpc_server_slot_begins(struct rpc_server *s)
{
    pthread_mutex_lock(&s->lock);
    s->n_calls++;
    pthread_mutex_unlock(&s->lock);
}

void rpc_server_call_begins(struct rpc_server *s)
{
    pthread_mutex_lock(&s->lock);
    s->n_active++;
    pthread_mutex_unlock(&s->lock);
}

void rpc_server_call_ends(struct rpc_server *s, bool was_active)
{
    pthread_mutex_lock(&s->lock);
    s->n_calls--;
    if (was_active)
        s->n_active--;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

static void shutdown_done(void *owner, bool ok)
{
    struct rpc_server *s = owner;
    (void)ok;
    pthread_mutex_lock(&s->lock);
    s->shutdown_confirmed = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

uint32_t rpc_server_live_calls(const struct rpc_server *s)
{
    return atomic_load_explicit(&((struct rpc_server *)s)->live, memory_order_relaxed);
}

/* ---- start ---- */

static enum status_code check_config(const struct rpc_server_config *cfg, struct status *st)
{
    if (cfg->n_methods > MAX_METHODS)
        return status_set(st, ST_INVALID_ARGUMENT, "n_methods: %zu, expected at most %d", cfg->n_methods, MAX_METHODS);
    if (cfg->n_listen == 0)
        return status_set(st, ST_INVALID_ARGUMENT, "n_listen: 0, expected at least one address");
    if (cfg->poll_threads > MAX_POLL_THREADS)
        return status_set(st, ST_INVALID_ARGUMENT, "poll_threads: %u, expected at most %d", cfg->poll_threads,
                          MAX_POLL_THREADS);
    if (cfg->max_message_bytes > RPC_MAX_MESSAGE_BYTES)
        return status_set(st, ST_INVALID_ARGUMENT, "max_message_bytes: %u, expected at most %u", cfg->max_message_bytes,
                          RPC_MAX_MESSAGE_BYTES);
    if (cfg->max_metadata_bytes > INT32_MAX || cfg->max_streams > INT32_MAX)
        return status_set(st, ST_INVALID_ARGUMENT, "max_metadata_bytes, max_streams: expected at most %d", INT32_MAX);
    return ST_OK;
}

static grpc_arg arg_int(const char *key, uint32_t value)
{
    grpc_arg a = {.type = GRPC_ARG_INTEGER, .key = (char *)key};
    a.value.integer = (int)value;
    return a;
}

/* 0: the default. What is beyond an int is "never" to the core, too. */
static uint32_t or_else(uint32_t value, uint32_t otherwise)
{
    return value == 0 ? otherwise : value > INT32_MAX ? INT32_MAX : value;
}

static grpc_server *core_server_new(const struct rpc_server_config *cfg)
{
    grpc_resource_quota *quota = grpc_resource_quota_create("server");
    grpc_resource_quota_resize(quota, MAX_CORE_BYTES);
    grpc_arg bound = {.type = GRPC_ARG_POINTER, .key = (char *)GRPC_ARG_RESOURCE_QUOTA};
    bound.value.pointer.p = quota;
    bound.value.pointer.vtable = grpc_resource_quota_arg_vtable();
    grpc_arg args[] = {
        bound,
        arg_int(GRPC_ARG_ALLOW_REUSEPORT, 0), /* else a second server would silently share the port */
        arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, or_else(cfg->max_message_bytes, RPC_MAX_MESSAGE_BYTES)),
        arg_int(GRPC_ARG_MAX_METADATA_SIZE, or_else(cfg->max_metadata_bytes, RPC_MAX_METADATA_BYTES)),
        arg_int(GRPC_ARG_MAX_CONCURRENT_STREAMS, or_else(cfg->max_streams, RPC_MAX_STREAMS)),
        /* Compressed messages are refused, UNIMPLEMENTED: 16 MiB of gzip may hold 16 GiB. */
        arg_int(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1u << GRPC_COMPRESS_NONE),
        arg_int(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, or_else(cfg->keepalive_ms, 60000)),
        arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, or_else(cfg->keepalive_timeout_ms, 20000)),
        arg_int(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        arg_int(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, or_else(cfg->min_ping_interval_ms, 10000)),
        arg_int(GRPC_ARG_MAX_CONNECTION_IDLE_MS, or_else(cfg->max_connection_idle_ms, INT32_MAX)),
        arg_int(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                or_else(cfg->max_connection_age_ms, INT32_MAX)), /* +- 10 %, at random */
        arg_int(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, or_else(cfg->max_connection_age_grace_ms, INT32_MAX)),
        arg_int(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10000),
    };
    grpc_channel_args list = {sizeof args / sizeof *args, args};
    grpc_server *core = grpc_server_create(&list, NULL);
    grpc_resource_quota_unref(quota);
    return core;
}

static enum status_code register_methods(struct rpc_server *s, struct status *st)
{
    for (size_t i = 0; i < s->n_methods; i++) {
        const struct rpc_method *m = &s->methods[i];
        s->registered[i] = grpc_server_register_method(
            s->core, m->path, NULL,
            m->kind == RPC_BIDI ? GRPC_SRM_PAYLOAD_NONE : GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER, 0);
        if (!s->registered[i])
            return status_set(st, ST_INVALID_ARGUMENT, "methods[%zu]: %s is in the table twice", i, m->path);
    }
    return ST_OK;
}

/* Credentials of a listener that demands nothing have no callbacks, which cost a look at every call's headers. */
static enum status_code credentials_of(grpc_server_credentials **out, const struct rpc_server_config *cfg, size_t i,
                                       struct status *st)
{
    const struct rpc_listen_security *sec = cfg->security ? &cfg->security[i] : NULL;
    struct rpc_report report = {cfg->on_report, cfg->report_ctx};
    if (sec && (sec->cert_file || sec->key_file || sec->client_ca_file || sec->token_file || sec->health_only))
        return rpc_guard_credentials(out, sec, report, st);
    *out = grpc_insecure_server_credentials_create();
    return ST_OK;
}

static enum status_code listen_on(struct rpc_server *s, const struct rpc_server_config *cfg, size_t i,
                                  struct status *st)
{
    char target[RPC_TARGET_MAX];
    const char *address = cfg->listen[i];
    grpc_server_credentials *creds = NULL;
    enum status_code rc = rpc_address_target(address, "listen address", true, target, st);
    if (rc == ST_OK)
        rc = rpc_address_probe(address, st);
    if (rc == ST_OK)
        rc = credentials_of(&creds, cfg, i, st);
    if (rc != ST_OK)
        return rc;
    /* Schemes other than unix: are for clients only. */
    bool is_unix = rpc_address_is_unix(address);
    int bound = grpc_server_add_http2_port(s->core, is_unix ? target : address, creds);
    grpc_server_credentials_release(creds);
    if (bound == 0) /* taken since it was tried out a moment ago */
        return status_set(st, ST_ALREADY_EXISTS, "listen address %s: in use by another process", address);
    s->ports[i] = is_unix ? 0 : (uint16_t)bound;
    return ST_OK;
}

static enum status_code start_threads(struct rpc_server *s, struct status *st)
{
    size_t want = s->n_threads;
    s->n_threads = 0;
    while (s->n_threads < want) {
        int err = pthread_create(&s->threads[s->n_threads], NULL, poll_main, s);
        if (err)
            return status_errno(st, ST_RESOURCE_EXHAUSTED, err, "poll thread %zu of %zu", s->n_threads + 1, want);
        s->n_threads++;
    }
    return ST_OK;
}

static struct rpc_server *server_new(const struct rpc_server_config *cfg)
{
    struct rpc_server *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->methods = cfg->methods;
    s->n_methods = cfg->n_methods;
    s->n_ports = cfg->n_listen;
    s->n_threads = cfg->poll_threads ? cfg->poll_threads : 2;
    s->max_send_queue_bytes = cfg->max_send_queue_bytes ? cfg->max_send_queue_bytes : DEFAULT_QUEUE_BYTES;
    s->shutdown_tag = (struct rpc_tag){.done = shutdown_done, .owner = s};
    s->registered = calloc(s->n_methods + 1, sizeof *s->registered);
    s->ports = calloc(s->n_ports, sizeof *s->ports);
    s->threads = calloc(s->n_threads, sizeof *s->threads);
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->changed, &attr);
    pthread_condattr_destroy(&attr);
    return s;
}

static void server_free(struct rpc_server *s)
{
    free(s->registered);
    free(s->ports);
    free(s->threads);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static enum status_code start(struct rpc_server *s, const struct rpc_server_config *cfg, struct status *st)
{
    s->core = core_server_new(cfg);
    s->cq = grpc_completion_queue_create_for_next(NULL);
    s->idle_cq = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(s->core, s->cq, NULL);
    enum status_code rc = register_methods(s, st);
    for (size_t i = 0; i < cfg->n_listen && rc == ST_OK; i++)
        rc = listen_on(s, cfg, i, st);
    if (rc != ST_OK) {
        s->n_threads = 0;
        return rc;
    }
    grpc_server_start(s->core);
    for (size_t i = 0; i <= s->n_methods; i++) {
        for (int k = 0; k < SLOTS_PER_METHOD; k++) {
            if (!rpc_slot_open(s, i) && k == 0)
                rc = status_nomem(st, "request slots", 0);
        }
    }
    enum status_code threads = start_threads(s, rc == ST_OK ? st : NULL);
    return rc != ST_OK ? rc : threads;
}

enum status_code rpc_server_start(struct rpc_server **out, const struct rpc_server_config *cfg, struct status *st)
{
    enum status_code rc = check_config(cfg, st);
    if (rc != ST_OK)
        return rc;
    struct rpc_server *s = server_new(cfg);
    if (!s)
        return status_nomem(st, "server", sizeof *s);
    if (!s->registered || !s->ports || !s->threads) {
        server_free(s);
        return status_nomem(st, "server", 0);
    }
    rpc_core_start();
    sigset_t old;
    rpc_signals_block(&old);
    rc = start(s, cfg, st);
    rpc_signals_restore(&old);
    if (rc != ST_OK) {
        rpc_server_destroy(s);
        return rc;
    }
    *out = s;
    return ST_OK;
}

uint16_t rpc_server_port(const struct rpc_server *s, size_t i)
{
    return i < s->n_ports ? s->ports[i] : 0;
}

/* ---- end ---- */

static bool calls_over(const struct rpc_server *s)
{
    return s->n_active == 0;
}

static bool goodbye_said(const struct rpc_server *s)
{
    return s->shutdown_confirmed;
}

static bool all_over(const struct rpc_server *s)
{
    return s->n_calls == 0 && s->shutdown_confirmed;
}

/* ms UINT64_MAX: as long as it takes. */
static void wait_until(struct rpc_server *s, bool (*over)(const struct rpc_server *), uint64_t ms)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (ms != UINT64_MAX) {
        end.tv_sec += (time_t)(ms / 1000);
        end.tv_nsec += (long)(ms % 1000) * 1000000;
        end.tv_sec += end.tv_nsec / 1000000000;
        end.tv_nsec %= 1000000000;
    }
    int rc = 0;
    pthread_mutex_lock(&s->lock);
    while (!over(s) && rc != ETIMEDOUT)
        rc = ms == UINT64_MAX ? pthread_cond_wait(&s->changed, &s->lock)
                              : pthread_cond_timedwait(&s->changed, &s->lock, &end);
    pthread_mutex_unlock(&s->lock);
}

void rpc_server_shutdown(struct rpc_server *s, uint32_t grace_ms)
{
    if (s->shut_down)
        return;
    s->shut_down = true;
    atomic_store_explicit(&s->stopping, true, memory_order_relaxed);
    rpc_tag_arm(&s->shutdown_tag);
    grpc_server_shutdown_and_notify(s->core, s->cq, &s->shutdown_tag);
    if (s->n_threads > 0) {
        wait_until(s, calls_over, grace_ms);
        /* Cut connections could lose what has just been written. */
        wait_until(s, goodbye_said, grace_ms < GOODBYE_MS ? grace_ms : GOODBYE_MS);
    }
    grpc_server_cancel_all_calls(s->core);
    /* The core completes every batch of a cancelled call. A server that failed to start may have no poll thread. */
    while (s->n_threads == 0 && !all_over(s))
        poll_event(s);
    wait_until(s, all_over, UINT64_MAX);
    grpc_completion_queue_shutdown(s->cq); /* nothing may be started on it from here on */
    for (size_t i = 0; i < s->n_threads; i++)
        pthread_join(s->threads[i], NULL);
    if (s->n_threads == 0)
        poll_main(s);
}

void rpc_server_destroy(struct rpc_server *s)
{
    if (!s)
        return;
    rpc_server_shutdown(s, 0);
    grpc_server_destroy(s->core);
    grpc_completion_queue_destroy(s->cq);
    grpc_completion_queue_shutdown(s->idle_cq);
    grpc_completion_queue_next(s->idle_cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_completion_queue_destroy(s->idle_cq);
    server_free(s);
}
