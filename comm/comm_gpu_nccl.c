/* comm_gpu_nccl.c - NCCL, opened at run time: a machine without it (or a build without its header) has the other way only.
 * The only file that knows the library. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_gpu_internal.h"

#ifdef TANDEM_NCCL
#include <nccl.h>

struct comm_nccl {
    void *library;
    ncclComm_t comm; /* NULL: not connected, or aborted */
    int version;
    ncclResult_t (*get_version)(int *);
    ncclResult_t (*get_unique_id)(ncclUniqueId *);
    ncclResult_t (*init_rank)(ncclComm_t *, int, ncclUniqueId, int);
    ncclResult_t (*all_reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
    ncclResult_t (*all_gather)(const void *, void *, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
    ncclResult_t (*abort)(ncclComm_t);
    ncclResult_t (*destroy)(ncclComm_t);
    ncclResult_t (*async_error)(ncclComm_t, ncclResult_t *);
    const char *(*last_error)(ncclComm_t);
    const char *(*error_string)(ncclResult_t);
};

static enum status_code check(const struct comm_nccl *n, ncclResult_t rc, struct status *st, const char *what)
{
    if (rc == ncclSuccess)
        return ST_OK;
    return status_set(st, ST_INTERNAL, "%s: %s", what, n->error_string(rc));
}

enum status_code comm_nccl_open(struct comm_nccl **out, const char *library, struct status *st)
{
    struct comm_nccl *n = calloc(1, sizeof *n);
    if (!n)
        return status_nomem(st, "NCCL", sizeof *n);
    n->library = dlopen(library ? library : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!n->library) {
        status_set(st, ST_FAILED_PRECONDITION, "%s", dlerror());
        comm_nccl_close(n);
        return ST_FAILED_PRECONDITION;
    }
    const struct {
        const char *name;
        void **to;
    } symbols[] = {
        {"ncclGetVersion", (void **)&n->get_version},        {"ncclGetUniqueId", (void **)&n->get_unique_id},
        {"ncclCommInitRank", (void **)&n->init_rank},        {"ncclAllReduce", (void **)&n->all_reduce},
        {"ncclAllGather", (void **)&n->all_gather},          {"ncclCommAbort", (void **)&n->abort},
        {"ncclCommDestroy", (void **)&n->destroy},           {"ncclGetErrorString", (void **)&n->error_string},
        {"ncclCommGetAsyncError", (void **)&n->async_error}, {"ncclGetLastError", (void **)&n->last_error},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        *symbols[i].to = dlsym(n->library, symbols[i].name);
        if (*symbols[i].to)
            continue;
        status_set(st, ST_FAILED_PRECONDITION, "%s has no %s", library ? library : "libnccl.so.2", symbols[i].name);
        comm_nccl_close(n);
        return ST_FAILED_PRECONDITION;
    }
    enum status_code rc = check(n, n->get_version(&n->version), st, "ncclGetVersion");
    if (rc != ST_OK) {
        comm_nccl_close(n);
        return rc;
    }
    *out = n;
    return ST_OK;
}

void comm_nccl_close(struct comm_nccl *n)
{
    if (!n)
        return;
    if (n->comm)
        n->destroy(n->comm);
    free(n); /* the library stays: it does not like to be unmapped */
}

uint32_t comm_nccl_version(const struct comm_nccl *n)
{
    return (uint32_t)n->version;
}

enum status_code comm_nccl_connect(struct comm_nccl *n, struct comm *c, struct status *st)
{
    /* On the machines of several tenants multicast objects of NVLink have put GPUs out of service; the sums that would
     * use them are ours anyway. */
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    /* Else the first call that takes an algorithm connects it, on the host, without a bound. */
    setenv("NCCL_RUNTIME_CONNECT", "0", 0);
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    struct status own = STATUS_INIT;
    enum status_code rc = ST_OK, sent;
    if (comm_rank(c) == 0)
        rc = check(n, n->get_unique_id(&id), &own, "ncclGetUniqueId");
    /* after a failure as well, with an id of zeros: nobody waits for it */
    if ((sent = comm_broadcast(c, &id, sizeof id, 0, st)) != ST_OK)
        return sent;
    static const ncclUniqueId none;
    if (rc != ST_OK || memcmp(&id, &none, sizeof id) == 0)
        return status_set(st, ST_INTERNAL, "%s", rc != ST_OK ? own.message : "rank 0 has no NCCL id");
    return check(n, n->init_rank(&n->comm, (int)comm_size(c), id, (int)comm_rank(c)), st, "ncclCommInitRank");
}

enum status_code comm_nccl_sum(struct comm_nccl *n, void *x, uint64_t count, cudaStream_t stream, struct status *st)
{
    return check(n, n->all_reduce(x, x, count, ncclBfloat16, ncclSum, n->comm, stream), st, "ncclAllReduce");
}

enum status_code comm_nccl_gather(struct comm_nccl *n, const float *in, float *out, uint64_t count, cudaStream_t stream,
                                  struct status *st)
{
    return check(n, n->all_gather(in, out, count, ncclFloat32, n->comm, stream), st, "ncclAllGather");
}

enum status_code comm_nccl_fault(const struct comm_nccl *n, struct status *st)
{
    ncclResult_t error = ncclSuccess, rc = n->comm ? n->async_error(n->comm, &error) : ncclSuccess;
    if (rc == ncclSuccess)
        rc = error;
    if (rc == ncclSuccess || rc == ncclInProgress)
        return ST_OK;
    const char *last = n->last_error(n->comm);
    return status_set(st, ST_UNAVAILABLE, "NCCL: %s%s%s", n->error_string(rc), last && *last ? ": " : "",
                      last ? last : "");
}

struct ending {
    ncclResult_t (*abort)(ncclComm_t);
    ncclComm_t comm;
};

static void *end(void *arg)
{
    struct ending *e = arg;
    e->abort(e->comm);
    free(e);
    return NULL;
}

/* On a thread of its own: the library tells its kernels to end, then may wait for the other ranks, without a bound. */
void comm_nccl_abort(struct comm_nccl *n)
{
    struct ending *e = n->comm ? malloc(sizeof *e) : NULL;
    pthread_t thread;
    if (e)
        *e = (struct ending){.abort = n->abort, .comm = n->comm};
    n->comm = NULL;
    if (e && pthread_create(&thread, NULL, end, e) == 0)
        pthread_detach(thread);
    else
        free(e); /* its kernels wait on; the process ends anyway */
}

#else

struct comm_nccl {
    char unused;
};

enum status_code comm_nccl_open(struct comm_nccl **out, const char *library, struct status *st)
{
    (void)out, (void)library;
    return status_set(st, ST_UNIMPLEMENTED, "this build was made without nccl.h");
}

void comm_nccl_close(struct comm_nccl *n)
{
    (void)n;
}

uint32_t comm_nccl_version(const struct comm_nccl *n)
{
    (void)n;
    return 0;
}

enum status_code comm_nccl_connect(struct comm_nccl *n, struct comm *c, struct status *st)
{
    (void)n, (void)c;
    return status_set(st, ST_UNIMPLEMENTED, "NCCL");
}

enum status_code comm_nccl_sum(struct comm_nccl *n, void *x, uint64_t count, cudaStream_t stream, struct status *st)
{
    (void)n, (void)x, (void)count, (void)stream;
    return status_set(st, ST_UNIMPLEMENTED, "NCCL");
}

enum status_code comm_nccl_gather(struct comm_nccl *n, const float *in, float *out, uint64_t count, cudaStream_t stream,
                                  struct status *st)
{
    (void)n, (void)in, (void)out, (void)count, (void)stream;
    return status_set(st, ST_UNIMPLEMENTED, "NCCL");
}

enum status_code comm_nccl_fault(const struct comm_nccl *n, struct status *st)
{
    (void)n, (void)st;
    return ST_OK;
}

void comm_nccl_abort(struct comm_nccl *n)
{
    (void)n;
}
#endif
