/* worker_trace.c - a timeline of this rank's steps, in the JSON that chrome://tracing and ui.perfetto.dev read.
 *
 * One event a line. A file whose writer was killed ends behind a comma; both programs read it as it is. Per step, in
 * microseconds of CLOCK_MONOTONIC:
 *
 *   host    "submit N"    the plan becomes a batch and is launched; on the host back end it is computed here
 *           "collect N"   waiting for the tokens
 *   device  "step N"      from the first copy of the step to the last; args: rows and what they are, the time since the step in front
 *                         had ended: until the plan was there ("idle"), and from then on ("gap"); what of "submit" went by until the KV pool had its pages
 *                         ("pages")
 *   kernels, copies       what the device did in it, where it was asked for (worker_kernels.c); later, up to 10 s
 *
 * The last event of a file that was ended in order, "summary", has the sums: steps, time computed, both times between steps, and for pages;
 * and those of the kernels.
 *
 * Where the disk is full the file ends, perhaps within a line, and the log says so; the worker goes on.
 */
#include "worker/worker_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>

struct worker_trace {
    const struct worker_log *log;
    char *name;
    FILE *file; /* its lock is held from the look at any to the end of the event */
    uint32_t rank;
    bool any;                       /* an event was written */
    struct worker_kernels *kernels; /* NULL: not asked for */
    bool ended;                     /* nothing is written any more: closed, or the disk is full */
    uint64_t steps;
    double busy_us, gap_us, idle_us, pages_us;
};

enum status_code worker_trace_open(struct worker_trace **out, const char *path, uint32_t rank, uint32_t ranks,
                                   const struct worker_log *log, struct status *st)
{
    struct worker_trace *t = calloc(1, sizeof *t);
    char name[4096];
    int n = ranks > 1 ? snprintf(name, sizeof name, "%s.%u", path, rank) : snprintf(name, sizeof name, "%s", path);
    if (!t)
        return status_nomem(st, "trace", sizeof *t);
    if (n < 0 || (size_t)n >= sizeof name || !(t->file = fopen(name, "we"))) {
        int err = errno;
        free(t);
        return status_set(st, ST_INVALID_ARGUMENT, "--trace: %.200s: %s", path, strerror(err));
    }
    if (!(t->name = strdup(name))) {
        fclose(t->file);
        free(t);
        return status_nomem(st, "trace", strlen(name) + 1);
    }
    setvbuf(t->file, NULL, _IOLBF, 0); /* whole events, whatever ends the process */
    t->log = log;
    t->rank = rank;
    *out = t;
    return ST_OK;
}

/* Whoever holds the file's lock, behind what was written. What stdio still has is thrown away, or it would come behind the hole. */
static void look_for_errors(struct worker_trace *t)
{
    int err = errno;
    if (t->ended || !ferror(t->file))
        return;
    t->ended = true;
    __fpurge(t->file);
    worker_log(t->log, WORKER_LOG_WARNING, "--trace: %s: %s: nothing more is written to it", t->name, strerror(err));
}

static void event(struct worker_trace *t, const char *name, uint64_t step, const char *track, double at_us,
                  double dur_us, const char *args)
{
    flockfile(t->file);
    if (!t->ended)
        fprintf(t->file,
                "%s\n{\"name\":\"%s %" PRIu64
                "\",\"ph\":\"X\",\"pid\":%u,\"tid\":\"%s\",\"ts\":%.3f,\"dur\":%.3f%s%s%s}",
                t->any ? "," : "[", name, step, t->rank, track, at_us, dur_us, args ? ",\"args\":{" : "",
                args ? args : "", args ? "}" : "");
    t->any = true;
    look_for_errors(t);
    funlockfile(t->file);
}

/* Of kernels: many at a time, on their thread. */
static void write_events(void *ctx, const char *text, size_t n)
{
    struct worker_trace *t = ctx;
    flockfile(t->file);
    const size_t comma = !t->any; /* left out */
    if (!t->ended && comma)
        fputc('[', t->file);
    if (!t->ended)
        fwrite(text + comma, 1, n - comma, t->file);
    t->any = true;
    look_for_errors(t);
    funlockfile(t->file);
}

enum status_code worker_trace_kernels(struct worker_trace *t, const struct activity_source *source, struct status *st)
{
    return worker_kernels_start(&t->kernels, source, t->rank, write_events, t, st);
}

void worker_trace_host(struct worker_trace *t, const char *name, uint64_t step, int64_t begin_us, int64_t end_us)
{
    if (t)
        event(t, name, step, "host", (double)begin_us, (double)(end_us - begin_us), NULL);
}

void worker_trace_step(struct worker_trace *t, const struct engine_result *r)
{
    char args[256];
    const struct engine_timing *g = &r->timing;
    if (!t || g->end_us <= g->begin_us)
        return;
    snprintf(args, sizeof args,
             "\"rows\":%u,\"decodes\":%u,\"tokens\":%u,\"gap_us\":%.3f,\"idle_us\":%.3f,\"pages_us\":%.3f", r->rows,
             r->decodes, r->n_tokens, g->gap_us, g->idle_us, g->pages_us);
    event(t, "step", r->step, "device", g->begin_us, g->end_us - g->begin_us, args);
    if (t->kernels)
        worker_kernels_step(t->kernels, r->step, g->begin_us, g->end_us);
    t->steps++;
    t->busy_us += g->end_us - g->begin_us;
    t->gap_us += g->gap_us;
    t->idle_us += g->idle_us;
    t->pages_us += g->pages_us;
}

bool worker_trace_close(struct worker_trace *t)
{
    char args[16384];
    if (!t)
        return true;
    int n = snprintf(args, sizeof args,
                     "\"busy_us\":%.0f,\"gap_us\":%.0f,\"idle_us\":%.0f,\"pages_us\":%.0f,\"gap_share\":%.5f",
                     t->busy_us, t->gap_us, t->idle_us, t->pages_us, t->gap_us / (t->busy_us + t->gap_us + 1e-9));
    const bool stuck = t->kernels && !worker_kernels_end(t->kernels, args + n, sizeof args - (size_t)n);
    flockfile(t->file);
    event(t, "summary", t->steps, "host", (double)worker_now_us(), 0, args);
    if (!t->ended && (fputs("\n]\n", t->file) < 0 || fflush(t->file) != 0))
        look_for_errors(t);
    t->ended = true;
    funlockfile(t->file);
    if (stuck) /* its thread has t */
        return false;
    fclose(t->file);
    free(t->name);
    free(t);
    return true;
}
