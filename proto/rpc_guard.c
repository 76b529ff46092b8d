/* rpc_guard.c - what one listener demands: TLS by certificates that may change, client certificates, tokens.
 *
 * Two callbacks of the core do it, both on a thread of the core and both without waiting:
 *  - fetch_certificates, before each handshake: a changed set of files is taken as a whole or not at all, so that a
 *    certificate whose key has not arrived yet disturbs nobody;
 *  - check_call, when the headers of a call are in: a refused call costs no request slot and none of its messages is read.
 * The guard belongs to the credentials that it is part of; the core destroys it with them.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/rpc_security.h"

#define HEALTH "/grpc.health.v1.Health/"

struct rpc_guard {
    struct rpc_report report;
    bool health_only;
    struct rpc_tokens *tokens;  /* NULL: none needed */
    char *cert, *key, *ca;      /* paths; NULL: plaintext; ca NULL: client certificates are not asked for */
    pthread_mutex_t lock;       /* a leaf but for `report` */
    struct rpc_tls_texts first; /* read when the guard was made, for the first fetch */
    struct rpc_tls_stamps stamps;
    int64_t not_after_s;
    bool expiry_told;
};

void rpc_report(const struct rpc_report *to, bool failed, const char *fmt, ...)
{
    char text[STATUS_MESSAGE_MAX + 128];
    va_list ap;
    if (!to->fn)
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    to->fn(to->ctx, failed, text);
}

static void guard_destroy(void *state)
{
    struct rpc_guard *g = state;
    rpc_tokens_destroy(g->tokens);
    rpc_tls_unload(&g->first);
    pthread_mutex_destroy(&g->lock);
    free(g->cert);
    free(g->key);
    free(g->ca);
    free(g);
}

/* ---- certificates ---- */

static struct rpc_tls_files files_of(const struct rpc_guard *g)
{
    return (struct rpc_tls_files){.cert = g->cert, .key = g->key, .ca = g->ca};
}

/* The core insists on client CAs (an assertion) even where it is not to ask for client certificates and so never looks at
 * them: our own certificate stands in then. */
static grpc_ssl_server_certificate_config *core_config(const struct rpc_tls_texts *t)
{
    grpc_ssl_pem_key_cert_pair pair = {.private_key = t->key, .cert_chain = t->cert};
    return grpc_ssl_server_certificate_config_create(t->ca ? t->ca : t->cert, &pair, 1);
}

/* With the lock held: once, when the certificate in use has run out. */
static void tell_expiry(struct rpc_guard *g)
{
    if (g->expiry_told || time(NULL) <= g->not_after_s)
        return;
    g->expiry_told = true;
    rpc_report(&g->report, true, "tls-cert %s: the certificate in use has expired; clients refuse it", g->cert);
}

/* With the lock held. */
static void use(struct rpc_guard *g, const struct rpc_tls_texts *t, const char *how,
                grpc_ssl_server_certificate_config **config)
{
    *config = core_config(t);
    g->not_after_s = t->not_after_s;
    g->expiry_told = false;
    rpc_report(&g->report, false, "tls-cert %s: %s, good until %s%s", g->cert, t->subject, t->until, how);
}

static grpc_ssl_certificate_config_reload_status fetch_certificates(void *ctx,
                                                                    grpc_ssl_server_certificate_config **config)
{
    struct rpc_guard *g = ctx;
    struct rpc_tls_files files = files_of(g);
    struct rpc_tls_texts texts;
    struct status st = STATUS_INIT;
    grpc_ssl_certificate_config_reload_status result = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    pthread_mutex_lock(&g->lock);
    struct rpc_tls_stamps stamps = rpc_tls_stamps(&files); /* before reading: a change meanwhile is seen next time */
    if (g->first.cert) {
        use(g, &g->first, "", config);
        rpc_tls_unload(&g->first);
        result = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
    } else if (!rpc_tls_same(&stamps, &g->stamps)) {
        g->stamps = stamps;
        if (rpc_tls_load(&texts, &files, "tls-client-ca", &st) == ST_OK) {
            use(g, &texts, "; read again", config);
            rpc_tls_unload(&texts);
            result = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
        } else {
            rpc_report(&g->report, true, "%s; the certificates read before stay in use", st.message);
        }
    }
    tell_expiry(g);
    pthread_mutex_unlock(&g->lock);
    return result;
}

/* ---- calls ---- */

static const grpc_metadata *find(const grpc_metadata *md, size_t n, const char *key)
{
    for (size_t i = 0; i < n; i++) {
        if (grpc_slice_str_cmp(md[i].key, key) == 0)
            return &md[i];
    }
    return NULL;
}

static bool is_health(const grpc_metadata *path)
{
    size_t n = sizeof HEALTH - 1;
    return path && GRPC_SLICE_LENGTH(path->value) > n && memcmp(GRPC_SLICE_START_PTR(path->value), HEALTH, n) == 0;
}

static void check_call(void *state, grpc_auth_context *context, const grpc_metadata *md, size_t n,
                       grpc_process_auth_metadata_done_cb done, void *user)
{
    struct rpc_guard *g = state;
    const grpc_metadata *shown = find(md, n, "authorization");
    bool health = is_health(find(md, n, ":path"));
    grpc_status_code code = GRPC_STATUS_OK;
    const char *why = NULL;
    (void)context;
    if (g->health_only && !health) {
        code = GRPC_STATUS_PERMISSION_DENIED;
        why = "this listener answers grpc.health.v1 only";
    } else if (g->tokens && !health && !shown) {
        code = GRPC_STATUS_UNAUTHENTICATED;
        why = "authorization: no such header, expected \"Bearer \" and a token";
    } else if (g->tokens && !health &&
               !rpc_tokens_accept(g->tokens, GRPC_SLICE_START_PTR(shown->value), GRPC_SLICE_LENGTH(shown->value))) {
        code = GRPC_STATUS_UNAUTHENTICATED;
        why = "authorization: not a token of this server, expected \"Bearer \" and a token";
    }
    done(user, NULL, 0, NULL, 0, code, why); /* the header stays until rpc_caller_take has seen it */
}

/* ---- making one ---- */

static char *copy(const char *text, bool *ok)
{
    char *c = text ? strdup(text) : NULL;
    *ok = *ok && (!text || c);
    return c;
}

static enum status_code guard_create(struct rpc_guard **out, const struct rpc_listen_security *sec,
                                     struct rpc_report report, struct status *st)
{
    struct rpc_guard *g = calloc(1, sizeof *g);
    if (!g)
        return status_nomem(st, "listener", sizeof *g);
    bool ok = true;
    pthread_mutex_init(&g->lock, NULL);
    g->report = report;
    g->health_only = sec->health_only;
    g->cert = copy(sec->cert_file, &ok);
    g->key = copy(sec->key_file, &ok);
    g->ca = copy(sec->client_ca_file, &ok);
    enum status_code rc = ok ? ST_OK : status_nomem(st, "listener", 0);
    struct rpc_tls_files files = files_of(g);
    g->stamps = rpc_tls_stamps(&files);
    if (rc == ST_OK)
        rc = rpc_tls_load(&g->first, &files, "tls-client-ca", st);
    if (rc == ST_OK && sec->token_file)
        rc = rpc_tokens_create(&g->tokens, sec->token_file, report, st);
    if (rc != ST_OK) {
        guard_destroy(g);
        return rc;
    }
    *out = g;
    return ST_OK;
}

static grpc_server_credentials *tls_credentials(struct rpc_guard *g)
{
    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            g->ca ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                  : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
            fetch_certificates, g));
}

enum status_code rpc_guard_credentials(grpc_server_credentials **out, const struct rpc_listen_security *sec,
                                       struct rpc_report report, struct status *st)
{
    struct rpc_guard *g = NULL;
    if (sec->client_ca_file && !sec->cert_file)
        return status_set(st, ST_INVALID_ARGUMENT, "tls-client-ca %.300s: needs tls-cert and tls-key beside it",
                          sec->client_ca_file);
    enum status_code rc = guard_create(&g, sec, report, st);
    if (rc != ST_OK || !g)
        return rc;
    grpc_server_credentials *creds = g->cert ? tls_credentials(g) : grpc_insecure_server_credentials_create();
    grpc_auth_metadata_processor processor = {
        .process = g->tokens || g->health_only ? check_call : NULL, .destroy = guard_destroy, .state = g};
    grpc_server_credentials_set_auth_metadata_processor(creds, processor);
    *out = creds;
    return ST_OK;
}
