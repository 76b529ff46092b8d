/* backend.h - what the worker and a GPU back end that it loads at run time say to each other. Prefix backend_.
 *
 * The worker links no CUDA. backend_cuda.so lies beside the executable and is opened with dlopen only where libcuda.so.1
 * can be loaded; it carries the CUDA runtime inside (static) and exports one function, BACKEND_SYMBOL:
 *
 *     const struct backend_api *(*entry)(uint32_t abi) = dlsym(library, BACKEND_SYMBOL);
 *     const struct backend_api *api = entry(BACKEND_ABI);      // NULL: built for another ABI
 *     api->devices(&count, st); api->describe(0, &device, st); api->open(&session, 0, st);
 *     struct engine_config cfg = {.parts = api->parts(session), ...};    // the engine is built of the session's parts
 *
 * The parts are tables of functions that engine.c calls where it otherwise calls the host's: memory for the KV pool, memory
 * for the weights, the forward pass. Plan state and accounting stay in the engine. Structures cross in both directions, so
 * both sides must come from one build; BACKEND_ABI catches a plugin that an older build has left behind. Threads: one, that
 * of the engine; stage and store of the weights also those of its pool.
 */
#ifndef TANDEM_BACKEND_H
#define TANDEM_BACKEND_H

#include <stdint.h>

#include "comm/comm.h"
#include "memory/memory.h"
#include "proto/status.h"
#include "worker/activity.h"
#include "worker/forward.h"
#include "worker/model_weights.h"

#define BACKEND_ABI    8u
#define BACKEND_SYMBOL "tandem_backend"

struct backend_session;

struct backend_device {
    char name[128];
    uint64_t memory_bytes;
    uint32_t major, minor;         /* compute capability */
    uint32_t processors;           /* SMs */
    uint8_t id[COMM_DEVICE_BYTES]; /* its UUID */
};

struct backend_memory {
    uint64_t total_bytes, free_bytes;
};

/* What an engine is built of. */
struct backend_parts {
    char text[64];           /* "cuda:0 NVIDIA H200" */
    int device;              /* for the KV pool */
    const struct kv_ops *kv; /* memory of the KV pool */
    uint32_t kv_elem_bytes;
    struct weight_store weights;
    const struct forward_ops *forward;
    void *ctx; /* for memory */
    enum status_code (*memory)(void *ctx, struct backend_memory *out, struct status *st);
};

struct backend_api {
    uint32_t abi;     /* BACKEND_ABI; the first field in every version */
    const char *name; /* "cuda" */
    /* FAILED_PRECONDITION with the driver's words when it cannot be used. 0 devices is ST_OK. */
    enum status_code (*devices)(uint32_t *count, struct status *st);
    enum status_code (*describe)(uint32_t device, struct backend_device *out, struct status *st);
    /* Makes a device ready to serve, and current for the calling thread. UNIMPLEMENTED when this build cannot serve on
     * it: the worker then uses the host, or ends when it was told to use this back end. */
    enum status_code (*open)(struct backend_session **out, uint32_t device, struct status *st);
    const struct backend_parts *(*parts)(struct backend_session *session); /* lives as long as the session */
    void (*close)(struct backend_session *session);                        /* NULL is fine */
    /* What devices do, record by record; started before anything else is called. Optional: NULL: it cannot be told. */
    const struct activity_source *activity;
};

typedef const struct backend_api *backend_entry(uint32_t abi);

#endif
