#include "proto/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A message that was cut must not end within a UTF-8 character: gRPC percent-encodes it and clients decode it. */
static void trim_to_character(char *s)
{
    size_t n = strlen(s);
    if (n + 1 < STATUS_MESSAGE_MAX)
        return;
    size_t tail = 0;
    while (tail < n && tail < 3 && ((unsigned char)s[n - 1 - tail] & 0xC0) == 0x80)
        tail++;
    if (tail == n)
        return;
    unsigned char lead = (unsigned char)s[n - 1 - tail];
    size_t want = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : lead >= 0xC0 ? 1 : 0;
    if (want != tail)
        s[n - 1 - tail] = '\0';
}

enum status_code status_set(struct status *st, enum status_code code, const char *fmt, ...)
{
    if (!st)
        return code;
    char text[STATUS_MESSAGE_MAX]; /* an argument may point into st->message */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    trim_to_character(text);
    st->code = code;
    memcpy(st->message, text, sizeof text);
    return code;
}

enum status_code status_errno(struct status *st, enum status_code code, int err, const char *fmt, ...)
{
    if (!st)
        return code;
    char text[STATUS_MESSAGE_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    char buf[128];
    return status_set(st, code, "%s: %s", text, strerror_r(err, buf, sizeof buf));
}

enum status_code status_prefix(struct status *st, const char *fmt, ...)
{
    if (!st)
        return ST_UNKNOWN;
    char text[STATUS_MESSAGE_MAX];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    char old[STATUS_MESSAGE_MAX];
    memcpy(old, st->message, sizeof old);
    return status_set(st, st->code, "%s: %s", text, old);
}

enum status_code status_nomem(struct status *st, const char *what, size_t bytes)
{
    return status_set(st, ST_RESOURCE_EXHAUSTED, "out of memory: %s (%zu bytes)", what, bytes);
}

const char *status_name(enum status_code code)
{
    static const char *const names[] = {
        "OK",        "CANCELLED",       "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
        "NOT_FOUND", "ALREADY_EXISTS",  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED",   "OUT_OF_RANGE",    "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
        "DATA_LOSS", "UNAUTHENTICATED",
    };
    return (unsigned)code < sizeof names / sizeof *names ? names[code] : "UNKNOWN";
}
