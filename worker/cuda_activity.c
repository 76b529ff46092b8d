/* cuda_activity.c - see cuda_activity.h. CUPTI is opened at run time, by the library's name and in the toolkit's folders; only its
 * headers are needed here. The only file that knows the library.
 *
 *   CUPTI asks for an empty buffer ── free ──> fills it ── full ──> take hands its records over ── free ─
 *
 * There are CUDA_ACTIVITY_BUFFERS of them, 32 MiB. When none is free, CUPTI drops records and counts them. It calls back on
 * threads of its own and on the one that flushes.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker/cuda_activity.h"

#ifdef TANDEM_CUPTI
#include <cupti.h>

/* The beginning of a record is read, which versions of the library have in common: CUDA 12's and 13's. */
#define SAME(old, new, field)                                                                                          \
    _Static_assert(offsetof(old, field) == offsetof(new, field), "records of both versions begin alike")
SAME(CUpti_ActivityKernel9, CUpti_ActivityKernel10, start);
SAME(CUpti_ActivityKernel9, CUpti_ActivityKernel10, end);
SAME(CUpti_ActivityKernel9, CUpti_ActivityKernel10, streamId);
SAME(CUpti_ActivityKernel9, CUpti_ActivityKernel10, name);
SAME(CUpti_ActivityMemcpy5, CUpti_ActivityMemcpy6, bytes);
SAME(CUpti_ActivityMemcpy5, CUpti_ActivityMemcpy6, start);
SAME(CUpti_ActivityMemcpy5, CUpti_ActivityMemcpy6, end);
SAME(CUpti_ActivityMemcpy5, CUpti_ActivityMemcpy6, streamId);

static const CUpti_ActivityKind kinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                                           CUPTI_ACTIVITY_KIND_MEMSET};
#define OLDEST 19 /* what cuptiGetVersion says of CUDA 12.0, the first whose records begin like that */
#define KINDS  (sizeof kinds / sizeof *kinds)

struct cupti {
    CUptiResult (*version)(uint32_t *);
    CUptiResult (*register_callbacks)(CUpti_BuffersCallbackRequestFunc, CUpti_BuffersCallbackCompleteFunc);
    CUptiResult (*enable)(CUpti_ActivityKind);
    CUptiResult (*disable)(CUpti_ActivityKind);
    CUptiResult (*flush_all)(uint32_t);
    CUptiResult (*next_record)(uint8_t *, size_t, CUpti_Activity **);
    CUptiResult (*dropped)(CUcontext, uint32_t, size_t *);
    CUptiResult (*timestamp)(uint64_t *);
    CUptiResult (*result_string)(CUptiResult, const char **);
    CUptiResult (*register_clock)(CUpti_TimestampCallbackFunc); /* NULL: an old library */
};

/* CUPTI is one for the process, and its callbacks have no argument of ours. It may fill buffers as long as the process lives. */
static struct {
    struct cupti lib;
    bool started, own_clock; /* own_clock: times are CLOCK_MONOTONIC already */
    uint8_t *memory;
    pthread_mutex_t lock;
    /* guarded by lock */
    uint8_t *free[CUDA_ACTIVITY_BUFFERS];
    struct {
        uint8_t *at;
        size_t bytes;
    } full[CUDA_ACTIVITY_BUFFERS]; /* a ring, oldest first */
    uint32_t n_free, first_full, n_full;
} cupti = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- the library ---- */

#define PATH_BYTES 512

/* why: stays as it is unless it is empty and the library is there, but does not load. */
static void *open_library(const char *path, char *why, size_t cap)
{
    dlerror(); /* forget what was */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    const char *text = library ? NULL : dlerror();
    /* The loader says it like that of what the library itself needs, too: behind that one's name. */
    const size_t n = strlen(path);
    const bool absent = text && strncmp(text, path, n) == 0 &&
                        strncmp(text + n, ": cannot open shared object file: No such file", 46) == 0;
    if (text && !absent && !*why)
        snprintf(why, cap, "%s", text);
    return library;
}

/* The first that opens; else NULL, and tried is what was, for a message. */
static void *look_for_library(char *tried, size_t cap, char *why, size_t why_cap)
{
    static const char *const names[] = {"libcupti.so.13", "libcupti.so"};
    const char *home = getenv("CUDA_HOME");
    char in_home[PATH_BYTES];
    snprintf(in_home, sizeof in_home, "%s/extras/CUPTI/lib64", home ? home : "");
    const char *const folders[] = {NULL, home && *home ? in_home : NULL, "/usr/local/cuda/extras/CUPTI/lib64",
                                   "/usr/local/cuda/lib64"};
    size_t n = 0;
    for (size_t f = 0; f < sizeof folders / sizeof *folders; f++) {
        if (f > 0 && !folders[f])
            continue;
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            char path[PATH_BYTES + 32];
            snprintf(path, sizeof path, "%s%s%s", folders[f] ? folders[f] : "", folders[f] ? "/" : "", names[i]);
            void *library = open_library(path, why, why_cap);
            if (library)
                return library;
            if (f == 0 && n < cap)
                n += (size_t)snprintf(tried + n, cap - n, "%s%s", n ? ", " : "", path);
        }
        if (f > 0 && n < cap)
            n += (size_t)snprintf(tried + n, cap - n, ", in %s", folders[f]);
    }
    return NULL;
}

static enum status_code find_symbols(void *library, struct status *st)
{
    struct cupti *c = &cupti.lib;
    const struct {
        const char *name;
        void **to;
    } symbols[] = {
        {"cuptiGetVersion", (void **)&c->version},
        {"cuptiActivityRegisterCallbacks", (void **)&c->register_callbacks},
        {"cuptiActivityEnable", (void **)&c->enable},
        {"cuptiActivityDisable", (void **)&c->disable},
        {"cuptiActivityFlushAll", (void **)&c->flush_all},
        {"cuptiActivityGetNextRecord", (void **)&c->next_record},
        {"cuptiActivityGetNumDroppedRecords", (void **)&c->dropped},
        {"cuptiGetTimestamp", (void **)&c->timestamp},
        {"cuptiGetResultString", (void **)&c->result_string},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        *symbols[i].to = dlsym(library, symbols[i].name);
        if (!*symbols[i].to)
            return status_set(st, ST_FAILED_PRECONDITION,
                              "the CUPTI library that was found has no %s, expected CUDA 12's or 13's",
                              symbols[i].name);
    }
    *(void **)&c->register_clock = dlsym(library, "cuptiActivityRegisterTimestampCallback");
    return ST_OK;
}

static enum status_code refused(struct status *st, CUptiResult rc, const char *what)
{
    const char *text = NULL;
    if (cupti.lib.result_string(rc, &text) != CUPTI_SUCCESS || !text)
        text = "unknown error";
    return status_set(
        st, ST_FAILED_PRECONDITION,
        "CUPTI refuses %s: %s (%d); needed are a driver that its version fits, and no other profiler in this "
        "process",
        what, text, (int)rc);
}

static enum status_code check_version(struct status *st)
{
    uint32_t version = 0;
    CUptiResult rc = cupti.lib.version(&version);
    if (rc != CUPTI_SUCCESS)
        return refused(st, rc, "to say its version");
    if (version < OLDEST)
        return status_set(st, ST_FAILED_PRECONDITION,
                          "the CUPTI library that was found is of version %u, expected %d (CUDA 12.0) or newer",
                          (unsigned)version, OLDEST);
    return ST_OK;
}

static enum status_code find_library(const char *path, struct status *st)
{
    char tried[320] = "", why[320] = "";
    void *library = path ? open_library(path, why, sizeof why) : look_for_library(tried, sizeof tried, why, sizeof why);
    if (!library && *why)
        return status_set(st, ST_FAILED_PRECONDITION, "CUPTI is there, but does not load: %s", why);
    if (!library)
        return status_set(
            st, ST_FAILED_PRECONDITION,
            "CUPTI is needed and not there (tried %s): install cuda-cupti of the toolkit, or set CUDA_HOME or "
            "LD_LIBRARY_PATH",
            path ? path : tried);
    enum status_code rc = find_symbols(library, st);
    return rc == ST_OK ? check_version(st) : rc;
}

/* ---- buffers; called by CUPTI ---- */

static void CUPTIAPI on_request(uint8_t **buffer, size_t *bytes, size_t *max_records)
{
    pthread_mutex_lock(&cupti.lock);
    *buffer = cupti.n_free ? cupti.free[--cupti.n_free] : NULL;
    pthread_mutex_unlock(&cupti.lock);
    *bytes = *buffer ? CUDA_ACTIVITY_BUFFER_BYTES : 0;
    *max_records = 0; /* as many as there is room for */
}

static void CUPTIAPI on_complete(CUcontext context, uint32_t stream, uint8_t *buffer, size_t bytes, size_t valid_bytes)
{
    (void)context, (void)stream, (void)bytes;
    if (!buffer)
        return;
    pthread_mutex_lock(&cupti.lock);
    if (valid_bytes) {
        uint32_t at = (cupti.first_full + cupti.n_full++) % CUDA_ACTIVITY_BUFFERS;
        cupti.full[at].at = buffer;
        cupti.full[at].bytes = valid_bytes;
    } else {
        cupti.free[cupti.n_free++] = buffer;
    }
    pthread_mutex_unlock(&cupti.lock);
}

static uint64_t monotonic_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t CUPTIAPI on_timestamp(void)
{
    return monotonic_ns();
}

/* ---- start ---- */

static enum status_code register_all(struct status *st)
{
    const struct cupti *c = &cupti.lib;
    CUptiResult rc = c->register_clock ? c->register_clock(on_timestamp) : CUPTI_ERROR_NOT_SUPPORTED;
    cupti.own_clock = rc == CUPTI_SUCCESS;
    if ((rc = c->register_callbacks(on_request, on_complete)) != CUPTI_SUCCESS)
        return refused(st, rc, "its callbacks");
    for (size_t i = 0; i < KINDS; i++)
        if ((rc = c->enable(kinds[i])) != CUPTI_SUCCESS) {
            while (i > 0)
                c->disable(kinds[--i]);
            return refused(st, rc, "records of kernels and copies");
        }
    return ST_OK;
}

/* Once: CUPTI may still have some of the buffers after a start that it has refused. */
static enum status_code take_memory(struct status *st)
{
    if (cupti.memory)
        return ST_OK;
    if (!(cupti.memory = malloc(CUDA_ACTIVITY_BUFFERS * CUDA_ACTIVITY_BUFFER_BYTES)))
        return status_nomem(st, "CUPTI's buffers", CUDA_ACTIVITY_BUFFERS * CUDA_ACTIVITY_BUFFER_BYTES);
    for (size_t i = 0; i < CUDA_ACTIVITY_BUFFERS; i++)
        cupti.free[cupti.n_free++] = cupti.memory + i * CUDA_ACTIVITY_BUFFER_BYTES;
    return ST_OK;
}

static enum status_code activity_start(const char *library, struct status *st)
{
    if (cupti.started)
        return status_set(st, ST_FAILED_PRECONDITION, "CUPTI records already");
    enum status_code rc = find_library(library, st);
    if (rc != ST_OK)
        return rc;
    if ((rc = take_memory(st)) != ST_OK)
        return rc;
    rc = register_all(st);
    cupti.started = rc == ST_OK;
    return rc;
}

/* ---- records ---- */

struct times {
    uint64_t begin, end; /* ns, by CUPTI's clock */
    int64_t to_monotonic;
};

/* CUPTI's clock may be set while we run: looked at each time. */
static int64_t clock_offset(void)
{
    uint64_t theirs, before = monotonic_ns();
    if (cupti.own_clock || cupti.lib.timestamp(&theirs) != CUPTI_SUCCESS)
        return 0;
    return (int64_t)(before + (monotonic_ns() - before) / 2 - theirs);
}

static enum activity_kind kind_of_copy(uint8_t kind)
{
    switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
        return ACTIVITY_COPY_IN;
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
        return ACTIVITY_COPY_OUT;
    default:
        return ACTIVITY_COPY;
    }
}

/* False: of a kind that was not asked for. */
static bool read_record(const CUpti_Activity *r, struct activity *a, struct times *t)
{
    switch (r->kind) {
    case CUPTI_ACTIVITY_KIND_KERNEL:
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
        const CUpti_ActivityKernel10 *k = (const void *)r;
        *a = (struct activity){.kind = ACTIVITY_KERNEL, .stream = k->streamId, .name = k->name};
        t->begin = k->start;
        t->end = k->end;
        return true;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
        const CUpti_ActivityMemcpy6 *c = (const void *)r;
        *a = (struct activity){.kind = kind_of_copy(c->copyKind), .stream = c->streamId, .bytes = c->bytes};
        t->begin = c->start;
        t->end = c->end;
        return true;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
        const CUpti_ActivityMemset4 *m = (const void *)r;
        *a = (struct activity){.kind = ACTIVITY_FILL, .stream = m->streamId, .bytes = m->bytes};
        t->begin = m->start;
        t->end = m->end;
        return true;
    }
    default:
        return false;
    }
}

/* Returns how many had no times: they were under way at the last flush, or the device had no room for them. */
static uint64_t read_buffer(uint8_t *buffer, size_t bytes, int64_t to_monotonic, activity_each *each, void *ctx)
{
    CUpti_Activity *r = NULL;
    struct activity a;
    struct times t;
    uint64_t lost = 0;
    while (cupti.lib.next_record(buffer, bytes, &r) == CUPTI_SUCCESS) {
        if (!read_record(r, &a, &t))
            continue;
        if (t.begin == 0 || t.end < t.begin) {
            lost++;
            continue;
        }
        a.begin_us = (double)((int64_t)t.begin + to_monotonic) * 1e-3;
        a.end_us = (double)((int64_t)t.end + to_monotonic) * 1e-3;
        each(ctx, &a);
    }
    return lost;
}

static uint64_t activity_take(bool last, activity_each *each, void *ctx)
{
    if (!cupti.started)
        return 0;
    /* What it returns is no error of ours: what is not flushed now comes later, or is missed. */
    cupti.lib.flush_all(last ? CUPTI_ACTIVITY_FLAG_FLUSH_FORCED : 0);
    const int64_t to_monotonic = clock_offset();
    uint64_t lost = 0;
    for (;;) {
        pthread_mutex_lock(&cupti.lock);
        bool any = cupti.n_full > 0;
        uint8_t *at = any ? cupti.full[cupti.first_full].at : NULL;
        size_t bytes = any ? cupti.full[cupti.first_full].bytes : 0;
        if (any) {
            cupti.first_full = (cupti.first_full + 1) % CUDA_ACTIVITY_BUFFERS;
            cupti.n_full--;
        }
        pthread_mutex_unlock(&cupti.lock);
        if (!any)
            break;
        lost += read_buffer(at, bytes, to_monotonic, each, ctx);
        pthread_mutex_lock(&cupti.lock);
        cupti.free[cupti.n_free++] = at;
        pthread_mutex_unlock(&cupti.lock);
    }
    size_t dropped = 0;
    if (cupti.lib.dropped(NULL, 0, &dropped) == CUPTI_SUCCESS)
        lost += dropped;
    for (size_t i = 0; last && i < KINDS; i++)
        cupti.lib.disable(kinds[i]);
    cupti.started = !last;
    return lost;
}
#else
static enum status_code activity_start(const char *library, struct status *st)
{
    (void)library;
    return status_set(st, ST_UNIMPLEMENTED, "this build has no CUPTI: build it where cupti.h of the toolkit is");
}

static uint64_t activity_take(bool last, activity_each *each, void *ctx)
{
    (void)last, (void)each, (void)ctx;
    return 0;
}
#endif

const struct activity_source cuda_activity = {.start = activity_start, .take = activity_take};
