/* cmd_serve_commands.c - `tandem serve`: the command lines of the coordinator and of each group's mpirun. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "coordinator/cmd.h"
#include "coordinator/cmd_serve.h"

bool arguments_push(struct argument_list *a, const char *text)
{
    if (a->n == SERVE_MAX_ARGS)
        return false;
    a->v[a->n] = strdup(text);
    if (!a->v[a->n])
        return false;
    a->v[++a->n] = NULL;
    return true;
}

bool arguments_push2(struct argument_list *a, const char *option, const char *value)
{
    return arguments_push(a, option) && arguments_push(a, value);
}

void arguments_cut(struct argument_list *a, int n)
{
    while (a->n > n) {
        free(a->v[--a->n]);
        a->v[a->n] = NULL;
    }
}

const char *serve_devices_of(const struct serve_setup *s, uint64_t i, size_t *len)
{
    const char *at = s->devices;
    uint64_t n = 1;
    for (const char *p = s->devices; *p; p++)
        n += *p == ',';
    if (n != s->groups * s->tp)
        return NULL;
    for (uint64_t k = 0; k < i * s->tp; k++)
        at = strchr(at, ',') + 1;
    const char *end = at;
    for (uint64_t k = 0; k < s->tp; k++)
        end = strchr(end + (k > 0), ',') ? strchr(end + (k > 0), ',') : end + strlen(end);
    *len = (size_t)(end - at);
    return at;
}

static bool append(struct argument_list *to, const struct argument_list *from)
{
    bool ok = true;
    for (int i = 0; ok && i < from->n; i++)
        ok = arguments_push(to, from->v[i]);
    return ok;
}

void serve_group_name(char *out, size_t cap, uint64_t i)
{
    snprintf(out, cap, "g%llu", (unsigned long long)i);
}

/* What several groups on one machine must not take twice. */
static bool push_share(struct serve_setup *s, struct argument_list *m, uint64_t i)
{
    char text[1024] = "";
    size_t len = 0;
    bool ok = true;
    if (s->devices && s->groups > 1) {
        const char *part = serve_devices_of(s, i, &len);
        snprintf(text, sizeof text, "%.*s", (int)len, part);
    } else if (s->devices) {
        snprintf(text, sizeof text, "%s", s->devices);
    } else if (s->groups > 1 && access("/dev/nvidiactl", F_OK) == 0 && !(s->backend && !strcmp(s->backend, "host"))) {
        for (uint64_t k = i * s->tp; k < (i + 1) * s->tp; k++)
            len += (size_t)snprintf(text + len, sizeof text - len, "%s%llu", len ? "," : "", (unsigned long long)k);
    }
    if (text[0])
        ok = arguments_push2(m, "--devices", text);
    if (s->backend)
        ok = ok && arguments_push2(m, "--backend", s->backend);
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t ranks = s->groups * s->tp, share = cores > 0 && ranks ? (uint64_t)cores / ranks : 1;
    snprintf(text, sizeof text, "%llu", share ? (unsigned long long)share : 1);
    if (s->threads)
        ok = ok && arguments_push2(m, "--threads", s->threads);
    else if (s->groups > 1 && s->local_only)
        ok = ok && arguments_push2(m, "--threads", text);
    return ok;
}

/* A folder of the group's own in one that is ours; of several launches at a time none sweeps another's files away. */
static const char *group_folder(const struct serve_setup *s, char *path, size_t cap, const char *parent, uint64_t i)
{
    if (s->groups == 1)
        return parent;
    snprintf(path, cap, "%s/g%llu", parent, (unsigned long long)i);
    return mkdir(path, 0700) == 0 || errno == EEXIST ? path : parent;
}

static bool build_mpirun(struct serve_setup *s, uint64_t i)
{
    char path[PATH_MAX + 32], number[32], address[sizeof s->control];
    struct argument_list *m = &s->mpirun[i];
    snprintf(number, sizeof number, "%llu", (unsigned long long)s->tp);
    bool ok = arguments_push(m, s->mpirun_path ? s->mpirun_path : "mpirun") && arguments_push2(m, "-np", number);
    /* Ranks have threads of their own and may share cores: no binding, no busy waiting, more ranks than cores allowed.
     * Copies between processes through the kernel need rights that containers often lack. */
    ok = ok && arguments_push(m, "--oversubscribe") && arguments_push2(m, "--bind-to", "none") &&
         arguments_push(m, "--mca") && arguments_push2(m, "mpi_yield_when_idle", "1") && arguments_push(m, "--mca") &&
         arguments_push2(m, "btl_vader_single_copy_mechanism", "none");
    /* Its files lie in folders of ours, which other hosts do not have: when ranks are killed, nobody else would clean up
     * after them. */
    if (s->local_only)
        ok = ok && arguments_push(m, "--mca") &&
             arguments_push2(m, "orte_tmpdir_base", group_folder(s, path, sizeof path, s->run_dir, i));
    if (s->shm_dir[0])
        ok = ok && arguments_push(m, "--mca") &&
             arguments_push2(m, "btl_vader_backing_directory", group_folder(s, path, sizeof path, s->shm_dir, i));
    if (s->local_only) /* no ssh is needed, and none may be there */
        ok = ok && arguments_push(m, "--mca") && arguments_push2(m, "plm", "isolated");
    ok = ok && append(m, &s->mpi_extra);
    snprintf(path, sizeof path, "%s/tandem-worker", s->bin_dir);
    snprintf(address, sizeof address, "%.*s", (int)strcspn(s->control, ","), s->control); /* words are the listener's */
    ok = ok && arguments_push(m, path) && arguments_push2(m, "--model", s->model) &&
         arguments_push2(m, "--coordinator", address);
    if (s->groups > 1) {
        serve_group_name(number, sizeof number, i);
        ok = ok && arguments_push2(m, "--group", number);
    }
    if (s->trace) {
        int n = snprintf(path, sizeof path, s->groups > 1 ? "%s.%s" : "%s", s->trace, number);
        ok = ok && n >= 0 && (size_t)n < sizeof path && arguments_push2(m, "--trace", path);
        ok = ok && (!s->trace_kernels || arguments_push2(m, "--trace-kernels", "1"));
    }
    if (s->groups == 1 && isatty(STDERR_FILENO)) /* which the ranks see as a pipe of mpirun */
        ok = ok && arguments_push2(m, "--progress", "bar");
    return ok && push_share(s, m, i) && append(m, &s->worker_extra);
}

/* The command lines. */
bool serve_build_commands(struct serve_setup *s)
{
    char path[PATH_MAX + 32], number[32];
    struct argument_list *c = &s->coordinator;
    snprintf(path, sizeof path, "%s/tandem-coordinator", s->bin_dir);
    snprintf(number, sizeof number, "%llu", (unsigned long long)s->tp);
    /* the pipe comes first, so that the coordinator can tell of what it finds wrong behind it */
    bool ok = arguments_push(c, path) && arguments_push2(c, "--supervisor-fd", "0") &&
              arguments_push2(c, "--model", s->model) && arguments_push2(c, "--tp", number) &&
              arguments_push2(c, "--control-listen", s->control);
    if (!s->listens)
        ok = ok && arguments_push2(c, "--listen", CMD_DEFAULT_ADDRESS);
    char drain[32];
    snprintf(drain, sizeof drain, "%.0f", s->drain_s * 1000);
    ok = ok && arguments_push2(c, "--drain-timeout-ms", drain);
    if (!s->flight || strcmp(s->flight, "off") != 0) {
        snprintf(path, sizeof path, "%s/flight", s->run_dir);
        ok = ok && arguments_push2(c, "--flight-recorder", s->flight ? s->flight : path);
    }
    ok = ok && append(c, &s->coordinator_extra);
    for (uint64_t i = 0; i < s->groups; i++)
        ok = ok && build_mpirun(s, i);
    return ok;
}
