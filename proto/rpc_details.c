/* rpc_details.c - what a program can read of an error: the trailer grpc-status-details-bin, a google.rpc.Status.
 *
 * The source is the status itself. A message that starts with a field's path, "sampling.temperature: 200, expected ...",
 * becomes a google.rpc.BadRequest with that field; a retry hint becomes a google.rpc.RetryInfo. Encoded by hand: four
 * fixed messages are less than a dependency on their .proto files.
 *
 *     Status    { int32 code = 1; string message = 2; repeated Any details = 3; }      Any { type_url = 1; value = 2; }
 *     BadRequest{ repeated FieldViolation field_violations = 1; }   FieldViolation { field = 1; description = 2; }
 *     RetryInfo { Duration retry_delay = 1; }                       Duration { int64 seconds = 1; int32 nanos = 2; }
 */
#include <string.h>

#include "proto/rpc_internal.h"

#define DETAIL_MAX (STATUS_MESSAGE_MAX + 64)

/* A message under construction. What does not fit is left out as a whole: the sizes below make that impossible. */
struct writer {
    uint8_t *at, *end;
};

static void put_varint(struct writer *w, uint64_t v)
{
    while (w->at < w->end) {
        *w->at++ = (uint8_t)(v < 0x80 ? v : v | 0x80);
        if (v < 0x80)
            return;
        v >>= 7;
    }
}

static void put_number(struct writer *w, unsigned field, uint64_t v)
{
    put_varint(w, field << 3);
    put_varint(w, v);
}

static void put_bytes(struct writer *w, unsigned field, const void *data, size_t len)
{
    put_varint(w, field << 3 | 2);
    put_varint(w, len);
    if ((size_t)(w->end - w->at) < len)
        return;
    memcpy(w->at, data, len);
    w->at += len;
}

static void put_any(struct writer *w, const char *type_url, const void *value, size_t len)
{
    uint8_t any[DETAIL_MAX + 64];
    struct writer a = {any, any + sizeof any};
    put_bytes(&a, 1, type_url, strlen(type_url));
    put_bytes(&a, 2, value, len);
    put_bytes(w, 3, any, (size_t)(a.at - any));
}

/* Length of the path of a field that the message starts with, "a.b_c[3]", when ": " follows it; 0 without one. */
static size_t field_length(const char *message)
{
    size_t n = strspn(message, "abcdefghijklmnopqrstuvwxyz0123456789_.[]");
    bool letter = message[0] >= 'a' && message[0] <= 'z';
    return letter && message[n] == ':' && message[n + 1] == ' ' ? n : 0;
}

static void put_bad_request(struct writer *w, const char *message, size_t field_len)
{
    uint8_t violation[DETAIL_MAX], request[DETAIL_MAX];
    struct writer v = {violation, violation + sizeof violation};
    put_bytes(&v, 1, message, field_len);
    put_bytes(&v, 2, message + field_len + 2, strlen(message + field_len + 2));
    struct writer r = {request, request + sizeof request};
    put_bytes(&r, 1, violation, (size_t)(v.at - violation));
    put_any(w, "type.googleapis.com/google.rpc.BadRequest", request, (size_t)(r.at - request));
}

static void put_retry_info(struct writer *w, uint32_t retry_after_ms)
{
    uint8_t duration[32], info[40];
    struct writer d = {duration, duration + sizeof duration};
    put_number(&d, 1, retry_after_ms / 1000);
    put_number(&d, 2, retry_after_ms % 1000 * 1000000ull);
    struct writer i = {info, info + sizeof info};
    put_bytes(&i, 1, duration, (size_t)(d.at - duration));
    put_any(w, "type.googleapis.com/google.rpc.RetryInfo", info, (size_t)(i.at - info));
}

size_t rpc_details_encode(const struct status *st, uint32_t retry_after_ms, uint8_t out[RPC_DETAILS_MAX])
{
    size_t field = st->code == ST_INVALID_ARGUMENT ? field_length(st->message) : 0;
    if (field == 0 && retry_after_ms == 0)
        return 0;
    struct writer w = {out, out + RPC_DETAILS_MAX};
    put_number(&w, 1, st->code);
    put_bytes(&w, 2, st->message, strlen(st->message));
    if (field > 0)
        put_bad_request(&w, st->message, field);
    if (retry_after_ms > 0)
        put_retry_info(&w, retry_after_ms);
    return (size_t)(w.at - out);
}
