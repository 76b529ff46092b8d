#include "coordinator/spans.h"

#include <string.h>

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* 2n digits to n bytes; false: others are among them. */
static bool read_hex(const char *text, uint8_t *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int high = digit(text[2 * i]), low = digit(text[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        out[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

static bool is_zero(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i])
            return false;
    return true;
}

struct spans_parent spans_parent_parse(const char *text)
{
    struct spans_parent p = {.sampled = true}, none = p;
    uint8_t version, flags;
    size_t n = text ? strlen(text) : 0;
    if (n < 55 || text[2] != '-' || text[35] != '-' || text[52] != '-' || !read_hex(text, &version, 1) ||
        version == 0xff || (version == 0 && n != 55) || (n > 55 && text[55] != '-') ||
        !read_hex(text + 3, p.trace, 16) || !read_hex(text + 36, p.span, 8) || !read_hex(text + 53, &flags, 1) ||
        is_zero(p.trace, 16) || is_zero(p.span, 8))
        return none;
    p.there = true;
    p.sampled = flags & 1;
    return p;
}

static void put_id(struct json_text *t, const char *key, const uint8_t *id, size_t n)
{
    json_text_format(t, "\"%s\":\"", key);
    for (size_t i = 0; i < n; i++)
        json_text_format(t, "%02x", id[i]);
    json_text_put(t, "\",");
}

static void put_text(struct json_text *t, const char *key, const char *value)
{
    json_text_format(t, "{\"key\":\"%s\",\"value\":{\"stringValue\":", key);
    json_text_string(t, value, strlen(value));
    json_text_put(t, "}}");
}

/* OTLP writes 64-bit numbers as texts. */
static void put_number(struct json_text *t, const char *key, uint32_t value)
{
    json_text_format(t, ",{\"key\":\"%s\",\"value\":{\"intValue\":\"%u\"}}", key, value);
}

static void begin(struct json_text *t, const uint8_t *trace, const uint8_t *span, const uint8_t *parent,
                  const char *name, int kind, int64_t from_us, int64_t to_us)
{
    json_text_put(t, "{");
    put_id(t, "traceId", trace, 16);
    put_id(t, "spanId", span, 8);
    if (parent)
        put_id(t, "parentSpanId", parent, 8);
    json_text_format(t, "\"name\":\"%s\",\"kind\":%d,\"startTimeUnixNano\":\"%lld000\",\"endTimeUnixNano\":\"%lld000\"",
                     name, kind, (long long)from_us, (long long)(to_us > from_us ? to_us : from_us));
}

/* Where the time of a request went. */
static void child(struct json_text *t, const uint8_t *trace, const uint8_t *span, const uint8_t *parent,
                  const char *name, int64_t from_us, int64_t to_us)
{
    if (!from_us || !to_us)
        return;
    json_text_put(t, ",");
    begin(t, trace, span, parent, name, 1, from_us, to_us);
    json_text_put(t, "}");
}

void spans_line(struct json_text *t, const struct spans_parent *parent, const struct spans_request *r,
                const uint8_t random[40])
{
    uint8_t id[40];
    memcpy(id, random, sizeof id);
    for (size_t i = 0; i < sizeof id; i += 8) /* an id of zeros is none */
        id[i] |= 1;
    const uint8_t *trace = parent->there ? parent->trace : id + 24, *own = id;
    json_text_put(t, "{\"resourceSpans\":[{\"resource\":{\"attributes\":[");
    put_text(t, "service.name", "tandem");
    json_text_format(t, "]},\"scopeSpans\":[{\"scope\":{\"name\":\"tandem\",\"version\":\"%s\"},\"spans\":[",
                     TANDEM_VERSION);
    begin(t, trace, own, parent->there ? parent->span : NULL, "generate", 2, r->arrived_us, r->ended_us);
    json_text_put(t, ",\"attributes\":[");
    put_text(t, "gen_ai.response.id", r->name);
    json_text_put(t, ",");
    put_text(t, "gen_ai.request.model", r->model);
    json_text_put(t, ",");
    put_text(t, "rpc.response.status_code", r->code);
    put_number(t, "gen_ai.usage.input_tokens", r->prompt_tokens);
    put_number(t, "gen_ai.usage.output_tokens", r->new_tokens);
    put_number(t, "gen_ai.usage.cache_read.input_tokens", r->cached_tokens);
    json_text_format(t, "],\"status\":{\"code\":%d}}", r->failed ? 2 : 1);
    child(t, trace, id + 8, own, "queue", r->arrived_us, r->started_us);
    child(t, trace, id + 16, own, "prefill", r->started_us, r->first_token_us);
    child(t, trace, id + 32, own, "decode", r->first_token_us, r->last_token_us);
    json_text_put(t, "]}]}]}\n");
}
