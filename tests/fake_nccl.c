/* fake_nccl.c - an imitation of NCCL for tests of how comm/ uses it: a shared object, loaded by its path. */
#include <nccl.h>
#include <string.h>

#include "tests/fake_nccl.h"

extern struct fake_nccl_control fake_nccl; /* tests look it up */
struct fake_nccl_control fake_nccl;

struct ncclComm {
    int unused;
};
static struct ncclComm one; /* for all */

ncclResult_t ncclGetVersion(int *version)
{
    *version = 22809;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    memset(id, 7, sizeof *id);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank)
{
    *comm = &one;
    fake_nccl.live++;
    return rank < ranks && id.internal[0] == 7 ? ncclSuccess : ncclInvalidArgument;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream)
{
    (void)from, (void)to, (void)n, (void)type, (void)op, (void)comm, (void)stream;
    return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream)
{
    (void)from, (void)to, (void)n, (void)type, (void)comm, (void)stream;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    (void)comm;
    fake_nccl.live--;
    fake_nccl.ended++;
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    (void)comm;
    fake_nccl.live--;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error)
{
    (void)comm;
    fake_nccl.asked++;
    *error = (ncclResult_t)atomic_load(&fake_nccl.error);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t rc)
{
    return rc == ncclRemoteError ? "remote process exited or there was a network error" : "unhandled system error";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return "socketProgress: Connection closed by remote peer 10.1.2.3";
}
