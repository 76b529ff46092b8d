#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "coordinator/coord_internal.h"

int64_t coord_now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

#define LINE_BYTES 1280 /* a message of 1000 at most */

/* What cannot stand in a line as it is: names, paths and messages come from others, and one event stays one line. Bytes past
 * 0x7F are left as they are in text, where a terminal shows them; in JSON they might be no UTF-8. */
static size_t put_clean(char *out, size_t cap, const char *text, size_t n, bool json)
{
    size_t used = 0;
    for (size_t i = 0; i < n && used + 2 < cap; i++) {
        unsigned char c = (unsigned char)text[i];
        if (json && (c == '"' || c == '\\'))
            out[used++] = '\\';
        out[used++] = c < 0x20 || c == 0x7F || (json && c > 0x7F) ? '?' : (char)c;
    }
    return used;
}

/* One write per line, so that lines of several threads and processes do not mix. name: of a request, or NULL. */
static void put_line(const struct coord_log *log, enum log_level level, const char *name, const char *fmt, va_list ap)
{
    static const char *const names[] = {"error", "warn", "info", "debug"};
    char line[LINE_BYTES], text[1000];
    struct timespec ts;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &ts);
    gmtime_r(&ts.tv_sec, &tm);
    int k = vsnprintf(text, sizeof text, fmt, ap);
    if (k < 0)
        return;
    size_t len = (size_t)k < sizeof text ? (size_t)k : sizeof text - 1;
    size_t n = strftime(line, sizeof line, log->json ? "{\"time\":\"%Y-%m-%dT%H:%M:%S" : "%Y-%m-%dT%H:%M:%S", &tm);
    n += (size_t)snprintf(line + n, sizeof line - n,
                          log->json ? ".%03ldZ\",\"level\":\"%s\",\"program\":\"coordinator\""
                                    : ".%03ldZ %-5s coordinator: ",
                          ts.tv_nsec / 1000000, names[level]);
    if (name) {
        n += (size_t)snprintf(line + n, sizeof line - n, "%s", log->json ? ",\"request\":\"" : "");
        n += put_clean(line + n, 200, name, strlen(name), log->json);
        n += (size_t)snprintf(line + n, sizeof line - n, "%s", log->json ? "\"" : ": ");
    }
    if (log->json)
        n += (size_t)snprintf(line + n, sizeof line - n, ",\"message\":\"");
    n += put_clean(line + n, sizeof line - n - 4, text, len, log->json);
    n += (size_t)snprintf(line + n, sizeof line - n, log->json ? "\"}\n" : "\n");
    ssize_t unused = write(STDERR_FILENO, line, n);
    (void)unused; /* nobody to tell */
}

void log_line(const struct coord_log *log, enum log_level level, const char *fmt, ...)
{
    if (level > log->level)
        return;
    va_list ap;
    va_start(ap, fmt);
    put_line(log, level, NULL, fmt, ap);
    va_end(ap);
}

void log_request(const struct coord_log *log, enum log_level level, const char *name, const char *fmt, ...)
{
    if (level > log->level)
        return;
    va_list ap;
    va_start(ap, fmt);
    put_line(log, level, name, fmt, ap);
    va_end(ap);
}

void text_sanitize(char *out, size_t cap, const void *text, size_t len)
{
    const unsigned char *t = text;
    size_t n = len < cap - 1 ? len : cap - 1;
    for (size_t i = 0; i < n; i++)
        out[i] = t[i] >= 0x20 && t[i] < 0x7F ? (char)t[i] : '?';
    out[n] = '\0';
}
