#include "worker/backend.h"
#include "worker/worker_internal.h"

#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PLUGIN_NAME    "backend_cuda.so"
#define DRIVER_LIBRARY "libcuda.so.1"

/* PLUGIN_NAME in the executable's own directory. */
static enum status_code plugin_path(char *out, size_t size, struct status *st)
{
    ssize_t n = readlink("/proc/self/exe", out, size - 1);
    if (n < 0)
        return status_errno(st, ST_INTERNAL, errno, "/proc/self/exe");
    out[n] = '\0';
    char *slash = strrchr(out, '/');
    if (!slash || (size_t)(slash + 1 - out) + sizeof PLUGIN_NAME > size)
        return status_set(st, ST_INTERNAL, "/proc/self/exe: no place for the name of %s", PLUGIN_NAME);
    memcpy(slash + 1, PLUGIN_NAME, sizeof PLUGIN_NAME);
    return ST_OK;
}

/* NODELETE: neither the driver nor the CUDA runtime likes to be unmapped after use. */
static void *open_library(const char *path)
{
    return dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
}

static enum status_code load_driver(struct worker_backend *b, const char *name, struct status *st)
{
    b->driver = open_library(name);
    if (!b->driver)
        return status_set(st, ST_FAILED_PRECONDITION, "no CUDA driver (%s); install it or use --backend host",
                          dlerror());
    return ST_OK;
}

static enum status_code load_plugin(struct worker_backend *b, const char *path, struct status *st)
{
    char own[4096];
    if (!path) {
        enum status_code rc = plugin_path(own, sizeof own, st);
        if (rc != ST_OK)
            return rc;
        path = own;
    }
    if (access(path, F_OK) != 0)
        return status_set(st, ST_FAILED_PRECONDITION,
                          "%s is not there: build with -DTANDEM_CUDA=ON or use --backend host", path);
    b->library = open_library(path);
    if (!b->library)
        return status_set(st, ST_FAILED_PRECONDITION, "CUDA back end: %s", dlerror());
    backend_entry *entry;
    void *symbol = dlsym(b->library, BACKEND_SYMBOL);
    memcpy(&entry, &symbol, sizeof entry); /* ISO C has no cast from object to function pointer */
    const struct backend_api *api = symbol ? entry(BACKEND_ABI) : NULL;
    if (!api || api->abi != BACKEND_ABI)
        return status_set(st, ST_FAILED_PRECONDITION, "%s is not of this build (ABI %u expected): build again", path,
                          BACKEND_ABI);
    b->api = api;
    return ST_OK;
}

enum status_code worker_backend_device(uint32_t *device, const char *list, uint32_t rank, uint32_t count,
                                       struct status *st)
{
    uint32_t number[64], n = 0;
    for (const char *p = list;; p++) {
        char *end;
        unsigned long v = isdigit((unsigned char)*p) ? strtoul(p, &end, 10) : ULONG_MAX;
        if (v == ULONG_MAX || (*end && *end != ',') || n == sizeof number / sizeof *number)
            return status_set(st, ST_INVALID_ARGUMENT, "--devices: \"%s\" is no list; write numbers like 0,1", list);
        if (v >= count)
            return status_set(st, ST_INVALID_ARGUMENT, "--devices: %lu, but the driver finds %u device%s", v, count,
                              count == 1 ? "" : "s");
        number[n++] = (uint32_t)v;
        p = end;
        if (!*p)
            break;
    }
    *device = number[rank % n];
    return ST_OK;
}

/* The devices, and whether the back end serves on ours. The error of a refusal names ours only, as all are alike. */
static enum status_code try_serve(struct worker_backend *b, const struct worker_backend_config *cfg, struct status *st)
{
    uint32_t count = 0, device;
    enum status_code rc = b->api->devices(&count, st);
    if (rc != ST_OK)
        return rc;
    if (count == 0)
        return status_set(st, ST_FAILED_PRECONDITION, "the driver finds no device");
    if (cfg->local_ranks > count)
        return status_set(st, ST_FAILED_PRECONDITION, "%u ranks on this machine, but %u device%s", cfg->local_ranks,
                          count, count == 1 ? "" : "s");
    device = cfg->local_rank % count;
    if (cfg->devices && (rc = worker_backend_device(&device, cfg->devices, cfg->local_rank, count, st)) != ST_OK)
        return rc;
    struct backend_device d;
    if ((rc = b->api->describe(device, &d, st)) != ST_OK)
        return rc;
    rc = b->api->open(&b->session, device, st);
    if (rc == ST_OK) {
        b->parts = b->api->parts(b->session);
        return ST_OK;
    }
    char memory[32];
    return status_prefix(st, "%u x %s, %s, compute capability %u.%u", count, d.name,
                         worker_size_text(memory, d.memory_bytes), d.major, d.minor);
}

enum status_code worker_backend_open(struct worker_backend *b, const struct worker_backend_config *cfg,
                                     const struct worker_log *log, struct status *st)
{
    *b = (struct worker_backend){0};
    if (cfg->kind == WORKER_BACKEND_HOST)
        return ST_OK;
    struct status why = STATUS_INIT;
    enum status_code rc = load_driver(b, cfg->driver_library ? cfg->driver_library : DRIVER_LIBRARY, &why);
    bool driver = rc == ST_OK;
    if (rc == ST_OK)
        rc = load_plugin(b, cfg->plugin, &why);
    if (rc == ST_OK)
        rc = try_serve(b, cfg, &why);
    if (rc == ST_OK)
        return ST_OK;
    worker_backend_close(b);
    if (cfg->kind == WORKER_BACKEND_CUDA || rc == ST_INVALID_ARGUMENT) /* a wrong --devices is wrong at auto, too */
        return status_set(st, rc, "%s%s", rc == ST_INVALID_ARGUMENT ? "" : "--backend cuda: ", why.message);
    if (driver)
        worker_log(log, WORKER_LOG_WARNING, "host back end, not CUDA: %s", why.message);
    else
        worker_log(log, log->rank > 0 ? WORKER_LOG_DEBUG : WORKER_LOG_INFO, "no CUDA driver: host back end");
    return ST_OK;
}

void worker_backend_close(struct worker_backend *b)
{
    if (b->session)
        b->api->close(b->session);
    if (b->library)
        dlclose(b->library);
    if (b->driver)
        dlclose(b->driver);
    *b = (struct worker_backend){0};
}
