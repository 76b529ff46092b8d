/* cmd_serve_say.c - `tandem serve --json`: what happens, as one JSON object a line on standard output.
 *
 *     {"event":"ready","seconds":0.41,"addresses":["127.0.0.1:50051"],"ranks":2,"groups":1}
 *
 * | event | facts |
 * |---|---|
 * | starting | model, ranks (of each group), groups, pid |
 * | listening | addresses, http |
 * | launching | group, attempt |
 * | loading | group: all ranks of it are there |
 * | ready | addresses, http, ranks, groups, group. The first one: clients are served from here on |
 * | group-lost | group, reason, permanent |
 * | group-drained | group, restart |
 * | ended | program (coordinator, mpirun), group, how |
 * | stopping | at_once |
 * | error | message |
 * | stopped | status: the exit status. Always the last, also after an error |
 *
 * seconds: since the start, monotonic. group is left out with --groups 1, http without --http. Later versions may add events
 * and facts. Standard error says the same for people, beside the logs of the programs. */
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "coordinator/cmd.h"
#include "coordinator/cmd_serve.h"

int64_t serve_now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

json_t *serve_list(const char *text)
{
    json_t *list = json_array();
    for (const char *at = text; *at;) {
        size_t n = strcspn(at, ",");
        json_array_append_new(list, json_stringn(at, n));
        at += n + (at[n] == ',');
    }
    return list;
}

void serve_event(const struct serve_setup *s, const char *name, const char *group, json_t *facts)
{
    if (!s->json) {
        json_decref(facts);
        return;
    }
    json_t *o = json_pack("{s:s, s:f}", "event", name, "seconds", (double)(serve_now_ms() - s->start_ms) / 1e3);
    if (group && group[0])
        json_object_set_new(o, "group", json_string(group));
    if (facts)
        json_object_update(o, facts);
    json_decref(facts);
    json_dumpf(o, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6));
    putchar('\n');
    fflush(stdout); /* nobody reads: SIGPIPE is ignored, and serving goes on */
    json_decref(o);
}

int serve_error(const struct serve_setup *s, int rc, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    cmd_error(rc, "serve", "%s", text);
    serve_event(s, "error", NULL, json_pack("{s:o}", "message", cmd_json_string(text)));
    return rc;
}
