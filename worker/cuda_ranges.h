/* cuda_ranges.h - ranges for NVIDIA's tools (NVTX): what a step's phases are called in a timeline of Nsight Systems. Prefix
 * cuda_range_.
 *
 * Ranges nest, and begin and end on one thread. Without a tool that has asked for them a call is a test of a pointer. The
 * toolkit's headers are all there is to it: nothing is linked.
 */
#ifndef TANDEM_CUDA_RANGES_H
#define TANDEM_CUDA_RANGES_H

#include <stdint.h>

#include <nvtx3/nvToolsExt.h>

/* name: a literal. value is shown beside it: rows, a number. */
static inline void cuda_range_begin(const char *name, uint64_t value)
{
    const nvtxEventAttributes_t a = {
        .version = NVTX_VERSION,
        .size = NVTX_EVENT_ATTRIB_STRUCT_SIZE,
        .payloadType = NVTX_PAYLOAD_TYPE_UNSIGNED_INT64,
        .payload.ullValue = value,
        .messageType = NVTX_MESSAGE_TYPE_ASCII,
        .message.ascii = name,
    };
    nvtxRangePushEx(&a);
}

static inline void cuda_range_end(void)
{
    nvtxRangePop();
}

#endif
