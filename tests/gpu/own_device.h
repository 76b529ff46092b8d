/* own_device.h - the device of this rank, by the rule of the worker, as the CUDA runtime numbers them: for tests and benchmarks.
 * Prefix own_. */
#ifndef TANDEM_TESTS_OWN_DEVICE_H
#define TANDEM_TESTS_OWN_DEVICE_H

#include <cuda_runtime_api.h>
#include <string.h>

#include "comm/comm.h"

/* Collective. The error is that of comm_take_device. */
static inline enum status_code own_device(struct comm *c, int *device, struct status *st)
{
    struct comm_devices d = {.count = 0};
    struct cudaDeviceProp p;
    uint32_t taken = 0;
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess)
        n = 0;
    for (; d.count < COMM_DEVICES_MAX && (int)d.count < n; d.count++)
        if (cudaGetDeviceProperties(&p, (int)d.count) == cudaSuccess)
            memcpy(d.id[d.count], &p.uuid, COMM_DEVICE_BYTES);
    enum status_code rc = comm_take_device(c, &d, &taken, st);
    *device = (int)taken;
    return rc;
}

#endif
