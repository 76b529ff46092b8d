/* coord_listen.c - listeners: an address, the words behind it, and the files that they need.
 *
 *     ADDR[,WORD]*     words: plain, tls, mtls; open, token; health
 *
 * Without words a TCP listener takes what there are files for, a unix socket is plain and open: its folder guards it. The
 * control listener has files of its own, and takes them on a unix socket, too.
 */
#include <stdio.h>
#include <string.h>

#include "coordinator/coord_internal.h"

#define WORDS "expected plain, tls, mtls, open, token or health"

struct files {
    const char *prefix; /* of the options' names */
    const char *cert, *key, *client_ca, *token;
    bool on_unix; /* by default on unix sockets, too */
};

static bool is_unix(const char *address)
{
    return strncmp(address, "unix:", 5) == 0;
}

/* Nobody on another machine can reach it. */
static bool is_local(const char *address)
{
    return is_unix(address) || strncmp(address, "127.", 4) == 0 || strncmp(address, "[::1]:", 6) == 0 ||
           strncmp(address, "localhost:", 10) == 0;
}

static enum status_code need(const char *file, const char *what, const struct files *f, const char *word,
                             struct status *st)
{
    if (file)
        return ST_OK;
    return status_set(st, ST_INVALID_ARGUMENT, "\"%s\" needs --%s%s", word, f->prefix, what);
}

static enum status_code take_word(struct rpc_listen_security *s, const char *word, const struct files *f,
                                  struct status *st)
{
    enum status_code rc = ST_OK;
    bool mtls = strcmp(word, "mtls") == 0;
    if (strcmp(word, "plain") == 0) {
        s->cert_file = s->key_file = s->client_ca_file = NULL;
    } else if (mtls || strcmp(word, "tls") == 0) {
        s->cert_file = f->cert;
        s->key_file = f->key;
        s->client_ca_file = mtls ? f->client_ca : NULL;
        rc = need(f->cert, "tls-cert", f, word, st);
        if (rc == ST_OK && mtls)
            rc = need(f->client_ca, "tls-client-ca", f, word, st);
    } else if (strcmp(word, "token") == 0) {
        s->token_file = f->token;
        rc = need(f->token, "token-file", f, word, st);
    } else if (strcmp(word, "open") == 0) {
        s->token_file = NULL;
    } else if (strcmp(word, "health") == 0) {
        s->health_only = true;
    } else {
        rc = status_set(st, ST_INVALID_ARGUMENT, "\"%.40s\": %s", word, WORDS);
    }
    return rc;
}

static enum status_code parse(struct coord_listener *l, const char *text, const struct files *f, struct status *st)
{
    if (snprintf(l->address, sizeof l->address, "%s", text) >= (int)sizeof l->address)
        return status_set(st, ST_INVALID_ARGUMENT, "%zu bytes, expected at most %zu", strlen(text),
                          sizeof l->address - 1);
    char *rest = strchr(l->address, ',');
    if (rest)
        *rest++ = '\0';
    l->security = (struct rpc_listen_security){0};
    if (f->on_unix || !is_unix(l->address))
        l->security = (struct rpc_listen_security){
            .cert_file = f->cert, .key_file = f->key, .client_ca_file = f->client_ca, .token_file = f->token};
    for (char *word; (word = strsep(&rest, ","));) {
        enum status_code rc = take_word(&l->security, word, f, st);
        if (rc != ST_OK)
            return status_prefix(st, "%s", l->address);
    }
    return ST_OK;
}

static enum status_code check_files(const struct files *f, struct status *st)
{
    if (!f->cert != !f->key)
        return status_set(st, ST_INVALID_ARGUMENT, "--%s%s: not given, expected beside --%s%s", f->prefix,
                          f->cert ? "tls-key" : "tls-cert", f->prefix, f->cert ? "tls-cert" : "tls-key");
    if (f->client_ca && !f->cert)
        return status_set(st, ST_INVALID_ARGUMENT, "--%stls-client-ca: needs --%stls-cert and --%stls-key", f->prefix,
                          f->prefix, f->prefix);
    return ST_OK;
}

enum status_code listeners_resolve(struct coord_options *o, struct status *st)
{
    const struct files public = {"", o->tls_cert, o->tls_key, o->tls_client_ca, o->token_file, false};
    const struct files control = {
        "control-", o->control_tls_cert, o->control_tls_key, o->control_tls_client_ca, o->control_token_file, true};
    enum status_code rc = check_files(&public, st);
    if (rc == ST_OK)
        rc = check_files(&control, st);
    if (rc != ST_OK)
        return rc;
    for (size_t i = 0; i < o->n_listen; i++) {
        rc = parse(&o->listeners[i], o->listen[i], &public, st);
        if (rc != ST_OK)
            return status_prefix(st, "--listen");
        o->listen[i] = o->listeners[i].address;
    }
    if (o->http_listen) {
        rc = parse(&o->http, o->http_listen, &public, st);
        if (rc == ST_OK && o->http.security.cert_file)
            rc = status_set(st, ST_INVALID_ARGUMENT,
                            "%s: no TLS there yet: say \"%s,plain\" and put a proxy that ends TLS before it",
                            o->http.address, o->http.address);
        if (rc != ST_OK)
            return status_prefix(st, "--http");
    }
    rc = parse(&o->control, o->control_listen, &control, st);
    if (rc == ST_OK && o->control.security.health_only)
        rc = status_set(st, ST_INVALID_ARGUMENT, "%s: \"health\" is for --listen", o->control.address);
    return rc == ST_OK ? rc : status_prefix(st, "--control-listen");
}

static void warn_of(const struct coord_log *log, const char *option, const struct coord_listener *l)
{
    const struct rpc_listen_security *s = &l->security;
    if (is_local(l->address) || s->health_only)
        return;
    if (!s->cert_file && s->token_file)
        log_line(log, LOG_WARN, "%s %s: tokens cross the network in the clear: no TLS", option, l->address);
    else if (!s->cert_file)
        log_line(log, LOG_WARN, "%s %s: open to everyone who can reach it: no TLS, no token", option, l->address);
    else if (!s->client_ca_file && !s->token_file)
        log_line(log, LOG_WARN, "%s %s: open to everyone who can reach it: no client certificates, no token", option,
                 l->address);
}

void listeners_warn(const struct coord_options *o, const struct coord_log *log)
{
    for (size_t i = 0; i < o->n_listen; i++)
        warn_of(log, "--listen", &o->listeners[i]);
    if (o->http_listen)
        warn_of(log, "--http", &o->http);
    warn_of(log, "--control-listen", &o->control);
}
