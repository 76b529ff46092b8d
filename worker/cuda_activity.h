/* cuda_activity.h - what devices do as CUPTI tells it. Prefix cuda_activity_. */
#ifndef TANDEM_CUDA_ACTIVITY_H
#define TANDEM_CUDA_ACTIVITY_H

#include <stddef.h>

#include "worker/activity.h"

#define CUDA_ACTIVITY_BUFFERS 128
#define CUDA_ACTIVITY_BUFFER_BYTES                                                                                     \
    ((size_t)256 << 10) /* 1200 kernels: a few steps, so that none waits long to be full */

extern const struct activity_source cuda_activity;

#endif
