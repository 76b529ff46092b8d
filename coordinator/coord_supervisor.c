/* Lines to the supervisor that started us (--supervisor-fd, a pipe). One event per line, each in one write below PIPE_BUF,
 * so a reader never sees half of one:
 *
 *     listening public=ADDR[,ADDR] control=ADDR
 *     refused reason=TEXT                                    instead of listening: it cannot start
 *     loading epoch=N[ group=NAME]                             all its ranks are attached
 *     ready epoch=N[ group=NAME]
 *     group-lost epoch=N[ group=NAME] permanent=0|1 reason=TEXT
 *     group-drained epoch=N[ group=NAME] restart=0|1       its ranks leave, to be started again or not
 *     drained
 *
 * group= is left out for the group "default".
 *
 * The pipe is non-blocking: a supervisor that died or does not read must not stop the engine, so errors are ignored. */
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "coordinator/coord_internal.h"

void supervisor_line(const struct coord *c, const char *fmt, ...)
{
    if (c->opt.supervisor_fd < 0)
        return;
    char line[4096]; /* PIPE_BUF */
    va_list ap;
    va_start(ap, fmt);
    int k = vsnprintf(line, sizeof line - 1, fmt, ap);
    va_end(ap);
    if (k < 0)
        return;
    size_t n = (size_t)k < sizeof line - 1 ? (size_t)k : sizeof line - 2;
    for (size_t i = 0; i < n; i++)
        if (line[i] == '\n' || line[i] == '\r')
            line[i] = ' ';
    line[n++] = '\n';
    ssize_t unused = write(c->opt.supervisor_fd, line, n);
    (void)unused;
}
