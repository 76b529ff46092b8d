/* rpc_channel.c - a channel: connection settings, certificates and tokens of a client, and the calls made on it.
 *
 * The core's channel has its certificates for life. When their files change, the next call is made on a new one, a "link";
 * calls under way keep theirs, and the last of them drops it.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/rpc_security.h"

#define LOOK_MS 200 /* between looks at the files' stamps */

struct rpc_link {
    atomic_uint refs;
    grpc_channel *core;
};

struct client_files {
    struct rpc_tls_stamps tls;
    struct rpc_file_stamp token;
};

struct rpc_channel {
    char *address; /* as given, for messages */
    char target[RPC_TARGET_MAX];
    bool tls;
    char *ca, *cert, *key, *server_name, *token; /* paths but for the name; NULL: not given */

    pthread_mutex_t lock;
    struct rpc_link *link;
    struct client_files seen;
    gpr_timespec next_look;
    char header[RPC_TOKEN_MAX_BYTES + 16]; /* "Bearer ..." or empty */
};

static grpc_arg arg_int(const char *key, int value)
{
    grpc_arg a = {.type = GRPC_ARG_INTEGER, .key = (char *)key};
    a.value.integer = value;
    return a;
}

static grpc_channel *core_channel_new(const struct rpc_channel *ch, grpc_channel_credentials *creds)
{
    grpc_arg args[] = {
        arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)RPC_MAX_MESSAGE_BYTES),
        arg_int(GRPC_ARG_MAX_METADATA_SIZE, (int)RPC_MAX_METADATA_BYTES),
        arg_int(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1), /* a channel is a connection of its own */
        arg_int(GRPC_ARG_ENABLE_HTTP_PROXY, 0),         /* http_proxy is not meant for a cluster's inner traffic */
        arg_int(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        /* While a server is away calls fail at once; it is looked for again soon after it has come back. */
        arg_int(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100),
        arg_int(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000),
        arg_int(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000), /* in truth: the longest that one attempt to connect takes */
        /* A dead server is noticed within 30 s; the server allows a ping every 10 s. */
        arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, 20000),
        arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000),
        arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        {.type = GRPC_ARG_STRING, .key = (char *)GRPC_SSL_TARGET_NAME_OVERRIDE_ARG},
    };
    size_t n = sizeof args / sizeof *args;
    args[n - 1].value.string = ch->server_name;
    grpc_channel_args list = {ch->server_name ? n : n - 1, args};
    return grpc_channel_create(ch->target, creds, &list);
}

/* ---- links ---- */

static void link_put(struct rpc_link *l)
{
    if (!l || atomic_fetch_sub_explicit(&l->refs, 1, memory_order_acq_rel) != 1)
        return;
    grpc_channel_destroy(l->core);
    free(l);
}

static struct rpc_tls_files tls_files(const struct rpc_channel *ch)
{
    return (struct rpc_tls_files){.cert = ch->cert, .key = ch->key, .ca = ch->ca};
}

static enum status_code credentials_new(grpc_channel_credentials **out, const struct rpc_channel *ch, struct status *st)
{
    struct rpc_tls_texts t;
    struct rpc_tls_files files = tls_files(ch);
    if (!ch->tls) {
        *out = grpc_insecure_credentials_create();
        return ST_OK;
    }
    enum status_code rc = rpc_tls_load(&t, &files, "tls-ca", st);
    if (rc != ST_OK)
        return rc;
    grpc_ssl_pem_key_cert_pair pair = {.private_key = t.key, .cert_chain = t.cert};
    *out = grpc_ssl_credentials_create_ex(t.ca, t.cert ? &pair : NULL, NULL, NULL);
    rpc_tls_unload(&t);
    return *out ? ST_OK : status_set(st, ST_INVALID_ARGUMENT, "tls: the system has no file of certificates to believe");
}

static enum status_code link_new(struct rpc_link **out, const struct rpc_channel *ch, struct status *st)
{
    grpc_channel_credentials *creds = NULL;
    enum status_code rc = credentials_new(&creds, ch, st);
    if (rc != ST_OK)
        return rc;
    struct rpc_link *l = calloc(1, sizeof *l);
    if (l) {
        atomic_init(&l->refs, 1);
        l->core = core_channel_new(ch, creds);
        *out = l;
    }
    grpc_channel_credentials_release(creds);
    return l ? ST_OK : status_nomem(st, "connection", sizeof *l);
}

static struct client_files look_at_files(const struct rpc_channel *ch)
{
    struct rpc_tls_files files = tls_files(ch);
    return (struct client_files){.tls = rpc_tls_stamps(&files), .token = rpc_file_stamp(ch->token)};
}

/* With the lock held. Files that cannot be used leave things as they are: the next change is looked at again. */
static void refresh(struct rpc_channel *ch)
{
    gpr_timespec now = gpr_now(GPR_CLOCK_MONOTONIC);
    if ((!ch->ca && !ch->cert && !ch->token) || gpr_time_cmp(now, ch->next_look) < 0)
        return;
    ch->next_look = gpr_time_add(now, gpr_time_from_millis(LOOK_MS, GPR_TIMESPAN));
    struct client_files files = look_at_files(ch);
    char header[sizeof ch->header];
    struct rpc_link *link = NULL;
    if (!rpc_file_same(&files.token, &ch->seen.token) && rpc_token_header(ch->token, header, NULL) == ST_OK)
        memcpy(ch->header, header, sizeof header);
    if (!rpc_tls_same(&files.tls, &ch->seen.tls) && link_new(&link, ch, NULL) == ST_OK && link) {
        link_put(ch->link);
        ch->link = link;
    }
    ch->seen = files;
}

/* ---- calls ---- */

void rpc_client_call_begin(struct rpc_client_call *c, struct rpc_channel *ch, const char *path, uint64_t deadline_ms,
                           grpc_completion_queue *cq)
{
    sigset_t old;
    memset(c, 0, sizeof *c);
    rpc_signals_block(&old); /* a new link may start threads */
    pthread_mutex_lock(&ch->lock);
    refresh(ch);
    c->link = ch->link;
    atomic_fetch_add_explicit(&c->link->refs, 1, memory_order_relaxed);
    if (ch->header[0]) {
        c->headers[c->n_headers].key = grpc_slice_from_static_string("authorization");
        c->headers[c->n_headers++].value = grpc_slice_from_copied_string(ch->header);
    }
    pthread_mutex_unlock(&ch->lock);
    grpc_slice method = grpc_slice_from_copied_string(path);
    c->core = grpc_channel_create_call(c->link->core, NULL, GRPC_PROPAGATE_DEFAULTS, cq, method, NULL,
                                       rpc_after_ms(deadline_ms), NULL);
    grpc_slice_unref(method);
    rpc_signals_restore(&old);
}

void rpc_client_call_end(struct rpc_client_call *c)
{
    grpc_call_unref(c->core);
    for (size_t i = 0; i < c->n_headers; i++)
        grpc_slice_unref(c->headers[i].value);
    link_put(c->link);
}

const char *rpc_channel_address(const struct rpc_channel *ch)
{
    return ch->address;
}

/* What a failed connection is likely to mean here: the core knows the handshake, we know the options. */
static void hint(const struct rpc_channel *ch, const char *failure, char *out, size_t n)
{
    bool closed = strstr(failure, "Socket closed") || strstr(failure, "Connection reset");
    out[0] = '\0';
    if (strstr(failure, "certificate verify failed"))
        snprintf(out, n, "; the server's certificate has expired or was not signed by tls-ca %.160s",
                 ch->ca ? ch->ca : "(not given: the system's)");
    else if (strstr(failure, "not in peer certificate"))
        snprintf(out, n, "; tls-server-name names what it should hold");
    else if (closed && ch->cert)
        snprintf(out, n, "; does the server believe tls-cert %.160s?", ch->cert);
    else if (closed && ch->tls)
        snprintf(out, n, "; does the server demand a client certificate (tls-cert)?");
    else if (closed)
        snprintf(out, n, "; does the server expect TLS (tls-ca)?");
    else if (strstr(failure, "wrong version number"))
        snprintf(out, n, "; the server does not speak TLS");
}

enum status_code rpc_client_status(const struct rpc_channel *ch, grpc_status_code code, grpc_slice details,
                                   struct status *st)
{
    enum status_code rc = rpc_status_from_slice(st, code, details);
    char more[256];
    if (rc != ST_UNAVAILABLE || !st)
        return rc;
    if (strncmp(st->message, "failed to connect", 17) == 0) {
        char text[STATUS_MESSAGE_MAX];
        hint(ch, st->message, more, sizeof more);
        memcpy(text, st->message, sizeof text);
        status_set(st, rc, "%.*s%s", (int)(sizeof text - sizeof more), text, more);
    }
    return status_prefix(st, "%s", ch->address);
}

/* ---- making one ---- */

static char *copy(const char *text, bool *ok)
{
    char *c = text ? strdup(text) : NULL;
    *ok = *ok && (!text || c);
    return c;
}

/* Nobody else can listen to what goes there. */
static bool stays_here(const char *target)
{
    return strncmp(target, "unix:", 5) == 0 || strncmp(target, "ipv4:127.", 9) == 0 ||
           strncmp(target, "ipv6:%5B::1%5D:", 15) == 0 || strncmp(target, "dns:///localhost:", 17) == 0;
}

static enum status_code take_security(struct rpc_channel *ch, const struct rpc_client_security *sec, struct status *st)
{
    bool ok = true;
    ch->tls = sec->tls || sec->ca_file || sec->cert_file || sec->key_file || sec->server_name;
    ch->ca = copy(sec->ca_file, &ok);
    ch->cert = copy(sec->cert_file, &ok);
    ch->key = copy(sec->key_file, &ok);
    ch->server_name = copy(sec->server_name, &ok);
    ch->token = copy(sec->token_file, &ok);
    if (!ok)
        return status_nomem(st, "channel", 0);
    ch->seen = look_at_files(ch);
    if (!ch->token)
        return ST_OK;
    if (!ch->tls && !stays_here(ch->target))
        return status_set(st, ST_INVALID_ARGUMENT,
                          "token-file %.200s: would travel in the clear to %.200s; use TLS (tls, tls-ca)", ch->token,
                          ch->address);
    return rpc_token_header(ch->token, ch->header, st);
}

enum status_code rpc_channel_open(struct rpc_channel **out, const char *address, const struct rpc_client_security *sec,
                                  struct status *st)
{
    static const struct rpc_client_security none = {0};
    struct rpc_channel *ch = calloc(1, sizeof *ch);
    if (!ch)
        return status_nomem(st, "channel", sizeof *ch);
    pthread_mutex_init(&ch->lock, NULL);
    ch->next_look = gpr_time_0(GPR_CLOCK_MONOTONIC);
    enum status_code rc = rpc_address_target(address, "address", false, ch->target, st);
    if (rc == ST_OK && !(ch->address = strdup(address)))
        rc = status_nomem(st, "channel", 0);
    if (rc == ST_OK)
        rc = take_security(ch, sec ? sec : &none, st);
    if (rc == ST_OK) {
        sigset_t old;
        rpc_core_start();
        rpc_signals_block(&old);
        rc = link_new(&ch->link, ch, st);
        rpc_signals_restore(&old);
    }
    if (rc != ST_OK) {
        rpc_channel_destroy(ch);
        return rc;
    }
    *out = ch;
    return ST_OK;
}

enum status_code rpc_channel_create(struct rpc_channel **out, const char *address, struct status *st)
{
    return rpc_channel_open(out, address, NULL, st);
}

void rpc_channel_destroy(struct rpc_channel *ch)
{
    if (!ch)
        return;
    link_put(ch->link);
    explicit_bzero(ch->header, sizeof ch->header);
    pthread_mutex_destroy(&ch->lock);
    free(ch->address);
    free(ch->ca);
    free(ch->cert);
    free(ch->key);
    free(ch->server_name);
    free(ch->token);
    free(ch);
}
