#include "worker/worker_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 1024 /* a longer line is cut */

void worker_log(const struct worker_log *log, enum worker_log_level level, const char *fmt, ...)
{
    if (level > log->level)
        return;
    char line[LINE_MAX_BYTES];
    char rank[16] = "-";
    int number = atomic_load(&log->rank);
    if (number >= 0)
        snprintf(rank, sizeof rank, "%d", number);
    int n = snprintf(line, sizeof line, "tandem-worker[%s] %c ", rank, "EWID"[level]);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (m > 0 ? (size_t)m : 0);
    if (len > sizeof line - 1)
        len = sizeof line - 1;
    line[len++] = '\n';
    /* Nobody reads stderr any more: then there is nobody to tell it to. */
    if (write(STDERR_FILENO, line, len) < 0)
        return;
}

const char *worker_size_text(char buf[32], uint64_t bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double x = (double)bytes;
    size_t u = 0;
    while (x >= 1024 && u + 1 < sizeof units / sizeof *units) {
        x /= 1024;
        u++;
    }
    snprintf(buf, 32, u && x < 100 ? "%.1f %s" : "%.0f %s", x, units[u]);
    return buf;
}

int64_t worker_now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}
