/* What is read over HTTP: health, models, metrics; and the form of answers and errors. HTTP thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coord_http_internal.h"

#define JSON "application/json"

enum MHD_Result http_answer(struct MHD_Connection *connection, unsigned code, const char *type, struct json_text *text,
                            uint32_t retry_after_ms)
{
    char number[24];
    if (text->failed) {
        json_text_free(text);
        return MHD_NO;
    }
    struct MHD_Response *response = MHD_create_response_from_buffer(text->n, text->p, MHD_RESPMEM_MUST_FREE);
    if (!response) {
        json_text_free(text);
        return MHD_NO;
    }
    *text = (struct json_text){0};
    MHD_add_response_header(response, "Content-Type", type);
    if (retry_after_ms) {
        snprintf(number, sizeof number, "%u", (retry_after_ms + 999) / 1000);
        MHD_add_response_header(response, "Retry-After", number);
        snprintf(number, sizeof number, "%u", retry_after_ms);
        MHD_add_response_header(response, "retry-after-ms", number);
    }
    if (code == 401)
        MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    if (code == 405)
        MHD_add_response_header(response, "Allow", "GET, HEAD");
    enum MHD_Result rc = MHD_queue_response(connection, code, response);
    MHD_destroy_response(response);
    return rc;
}

enum MHD_Result http_refuse(struct MHD_Connection *connection, unsigned code, const struct openai_form *form,
                            const struct status *st, uint32_t retry_after_ms)
{
    struct json_text text = {0};
    if (code == 0)
        code = openai_http_code(st->code);
    openai_error(&text, code, form, st);
    return http_answer(connection, code, JSON, &text, retry_after_ms);
}

/* ---- health ---- */

static enum MHD_Result health(struct http *h, struct MHD_Connection *connection, const char *url)
{
    struct coord *c = h->c;
    int state = atomic_load(&c->state);
    char reason[sizeof c->reason] = "";
    bool well;
    if (strcmp(url, "/livez") == 0 || strcmp(url, "/healthz") == 0) {
        int64_t age_us = coord_now_us() - atomic_load_explicit(&c->alive_us, memory_order_relaxed);
        well = age_us < (int64_t)COORD_ALIVE_MS * 1000;
        snprintf(reason, sizeof reason, "the engine has not turned for %.1f s", (double)age_us / 1e6);
    } else if (strcmp(url, "/startupz") == 0) {
        well = state != TANDEM__V1__SERVER_INFO__STATE__STARTING;
    } else {
        well = state == TANDEM__V1__SERVER_INFO__STATE__READY;
    }
    if (!well && !reason[0]) {
        pthread_mutex_lock(&c->pub_mu);
        snprintf(reason, sizeof reason, "%s", c->reason);
        pthread_mutex_unlock(&c->pub_mu);
    }
    struct json_text text = {0};
    json_text_put(&text, well ? "{\"status\":\"ok\"" : "{\"status\":\"unavailable\",\"reason\":");
    if (!well)
        json_text_string(&text, reason, strlen(reason));
    json_text_put(&text, "}\n");
    return http_answer(connection, well ? 200 : 503, JSON, &text, 0);
}

/* ---- models ---- */

static void put_model(struct coord *c, struct json_text *t)
{
    pthread_mutex_lock(&c->pub_mu);
    uint32_t context = c->model.max_context;
    pthread_mutex_unlock(&c->pub_mu);
    json_text_put(t, "{\"id\":");
    json_text_string(t, c->opt.served_name, strlen(c->opt.served_name));
    json_text_format(t, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"tandem\"", (long long)c->started_s);
    if (context) /* not known before the first group */
        json_text_format(t, ",\"max_model_len\":%u", context);
    json_text_put(t, "}");
}

static enum MHD_Result models(struct http *h, struct MHD_Connection *connection, const char *name)
{
    struct json_text text = {0};
    struct status st = STATUS_INIT;
    if (name && strcmp(name, h->c->opt.served_name) != 0) {
        char got[65];
        text_sanitize(got, sizeof got, name, strlen(name));
        status_set(&st, ST_NOT_FOUND, "model: \"%s\" is not served here, expected \"%s\"", got, h->c->opt.served_name);
        return http_refuse(connection, 0, NULL, &st, 0);
    }
    if (!name)
        json_text_put(&text, "{\"object\":\"list\",\"data\":[");
    put_model(h->c, &text);
    json_text_put(&text, name ? "\n" : "]}\n");
    return http_answer(connection, 200, JSON, &text, 0);
}

static enum MHD_Result version(struct MHD_Connection *connection)
{
    struct json_text text = {0};
    json_text_format(&text, "{\"version\":\"%s\"}\n", TANDEM_VERSION);
    return http_answer(connection, 200, JSON, &text, 0);
}

/* ---- the page for people ---- */

/* coordinator/live.html, as it was when this was built */
extern const uint8_t live_html[];
extern const size_t live_html_len;

static enum MHD_Result live_page(struct MHD_Connection *connection)
{
    struct MHD_Response *response =
        MHD_create_response_from_buffer(live_html_len, (void *)(uintptr_t)live_html, MHD_RESPMEM_PERSISTENT);
    if (!response)
        return MHD_NO;
    MHD_add_response_header(response, "Content-Type", "text/html; charset=utf-8");
    MHD_add_response_header(
        response, "Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'");
    enum MHD_Result rc = MHD_queue_response(connection, 200, response);
    MHD_destroy_response(response);
    return rc;
}

/* ---- the table ---- */

static const char *const pages[] = {"/",        "/live.json", "/health",         "/healthz",
                                    "/livez",   "/readyz",    "/startupz",       "/v1/models",
                                    "/version", "/metrics",   "/v1/completions", "/v1/chat/completions"};

enum MHD_Result http_page(struct http *h, struct MHD_Connection *connection, const char *url, const char *method)
{
    struct status st = STATUS_INIT;
    bool model = strncmp(url, "/v1/models/", 11) == 0 && url[11], known = model;
    bool reads = strcmp(method, MHD_HTTP_METHOD_GET) == 0 || strcmp(method, MHD_HTTP_METHOD_HEAD) == 0;
    for (size_t i = 0; i < sizeof pages / sizeof *pages; i++)
        known = known || strcmp(url, pages[i]) == 0;
    bool generates = strcmp(url, "/v1/completions") == 0 || strcmp(url, "/v1/chat/completions") == 0;
    if (known && (!reads || generates)) {
        status_set(&st, ST_INVALID_ARGUMENT, "this path takes %s", generates ? "POST" : "GET");
        return http_refuse(connection, 405, NULL, &st, 0);
    }
    if (!known) {
        status_set(&st, ST_NOT_FOUND, "no such path");
        return http_refuse(connection, 0, NULL, &st, 0);
    }
    if (url[1] == 'h' || url[1] == 'r' || url[1] == 's' || strcmp(url, "/livez") == 0)
        return health(h, connection, url);
    if (strcmp(url, "/metrics") == 0) {
        struct json_text text = {0};
        const char *names = MHD_lookup_connection_value(connection, MHD_GET_ARGUMENT_KIND, "names");
        metrics_render(&h->c->metrics, names && strcmp(names, "vllm") == 0, &text);
        return http_answer(connection, 200, "text/plain; version=0.0.4; charset=utf-8", &text, 0);
    }
    if (h->listener->security.health_only) {
        status_set(&st, ST_PERMISSION_DENIED, "this listener answers health and metrics only");
        return http_refuse(connection, 0, NULL, &st, 0);
    }
    if (url[1] == '\0')
        return live_page(connection);
    if (strcmp(url, "/live.json") == 0) {
        struct json_text text = {0};
        live_json(h->c, &text);
        return http_answer(connection, 200, JSON, &text, 0);
    }
    if (strcmp(url, "/version") == 0)
        return version(connection);
    return models(h, connection, model ? url + 11 : NULL);
}
