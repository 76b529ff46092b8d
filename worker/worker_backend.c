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

enum status_code worker_backend_devices(uint32_t device[COMM_DEVICES_MAX], uint32_t *n, const char *list,
                                        uint32_t count, struct status *st)
{
    *n = 0;
    for (const char *p = list;; p++) {
        char *end;
        unsigned long v = isdigit((unsigned char)*p) ? strtoul(p, &end, 10) : ULONG_MAX;
        if (v == ULONG_MAX || (*end && *end != ','))
            return status_set(st, ST_INVALID_ARGUMENT, "--devices: \"%s\" is no list; write numbers like 0,1", list);
        if (v >= count)
            return status_set(st, ST_INVALID_ARGUMENT, "--devices: %lu, but the driver finds %u device%s", v, count,
                              count == 1 ? "" : "s");
        if (*n == COMM_DEVICES_MAX)
            return status_set(st, ST_INVALID_ARGUMENT, "--devices: %s, expected at most %d", list, COMM_DEVICES_MAX);
        device[(*n)++] = (uint32_t)v;
        p = end;
        if (!*p)
            return ST_OK;
    }
}

/* What this rank may take. */
struct choice {
    uint32_t found; /* devices of the driver */
    uint32_t number[COMM_DEVICES_MAX];
    struct comm_devices devices;
};

static enum status_code find_devices(struct choice *c, const struct worker_backend *b, const char *list,
                                     struct status *st)
{
    uint32_t n = 0;
    enum status_code rc = b->api->devices(&c->found, st);
    if (rc != ST_OK)
        return rc;
    if (list && (rc = worker_backend_devices(c->number, &n, list, c->found, st)) != ST_OK)
        return rc;
    if (c->found == 0)
        return status_set(st, ST_FAILED_PRECONDITION, "the driver finds no device");
    for (; !list && n < c->found && n < COMM_DEVICES_MAX; n++)
        c->number[n] = n;
    for (uint32_t i = 0; i < n; i++) {
        struct backend_device d;
        if ((rc = b->api->describe(c->number[i], &d, st)) != ST_OK)
            return rc;
        memcpy(c->devices.id[i], d.id, sizeof d.id);
    }
    c->devices.count = n;
    return ST_OK;
}

/* Whether the back end serves on this device. The error of a refusal names ours only, as all are alike. */
static enum status_code serve_on(struct worker_backend *b, uint32_t device, uint32_t found, struct status *st)
{
    struct backend_device d;
    enum status_code rc = b->api->describe(device, &d, st);
    if (rc != ST_OK)
        return rc;
    rc = b->api->open(&b->session, device, st);
    if (rc == ST_OK) {
        b->parts = b->api->parts(b->session);
        return ST_OK;
    }
    char memory[32];
    return status_prefix(st, "%u x %s, %s, compute capability %u.%u", found, d.name,
                         worker_size_text(memory, d.memory_bytes), d.major, d.minor);
}

static enum status_code record_kernels(const struct worker_backend *b, struct status *st)
{
    if (!b->api->activity)
        return status_set(st, ST_UNIMPLEMENTED, "the %s back end does not tell of its kernels", b->api->name);
    return b->api->activity->start(NULL, st);
}

/* *driver: there is one. */
static enum status_code look_for_devices(struct worker_backend *b, const struct worker_backend_config *cfg,
                                         struct choice *c, bool *driver, struct status *st)
{
    enum status_code rc = load_driver(b, cfg->driver_library ? cfg->driver_library : DRIVER_LIBRARY, st);
    *driver = rc == ST_OK;
    if (rc == ST_OK)
        rc = load_plugin(b, cfg->plugin, st);
    if (rc == ST_OK && cfg->kernels) /* before the driver is asked for anything */
        rc = record_kernels(b, st);
    return rc == ST_OK ? find_devices(c, b, cfg->devices, st) : rc;
}

enum status_code worker_backend_open(struct worker_backend *b, const struct worker_backend_config *cfg,
                                     const struct worker_log *log, struct status *st)
{
    *b = (struct worker_backend){0};
    const bool host = cfg->kind == WORKER_BACKEND_HOST;
    struct status why = STATUS_INIT, match = STATUS_INIT;
    struct choice c = {.found = 0};
    bool driver = false;
    uint32_t taken = 0;
    enum status_code rc = host ? ST_OK : look_for_devices(b, cfg, &c, &driver, &why);
    if (rc != ST_OK)
        c.devices.count = 0; /* the others hear that we take none */
    enum status_code matched = comm_take_device(cfg->comm, &c.devices, &taken, &match);
    if (host && (matched == ST_OK || matched == ST_FAILED_PRECONDITION))
        return ST_OK;
    if (matched != ST_OK && matched != ST_FAILED_PRECONDITION) { /* not about devices: the group is gone */
        worker_backend_close(b);
        return status_set(st, matched, "%s", match.message);
    }
    if (rc == ST_OK && (rc = matched) != ST_OK)
        why = match;
    if (rc == ST_OK)
        rc = serve_on(b, c.number[taken], c.found, &why);
    if (rc == ST_OK)
        return ST_OK;
    worker_backend_close(b);
    if (rc == ST_INVALID_ARGUMENT) /* a wrong --devices is wrong at auto, too */
        return status_set(st, rc, "%s", why.message);
    if (cfg->kind == WORKER_BACKEND_CUDA || cfg->kernels) /* the host has no kernels */
        return status_set(st, rc, "%s: %s", cfg->kernels ? "--trace-kernels" : "--backend cuda", why.message);
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
