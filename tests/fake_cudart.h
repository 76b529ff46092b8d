/* fake_cudart.h - an imitation of as much of the CUDA runtime as comm/ takes to join ranks, linked in its place: memory is the
 * host's, kernels do nothing, each thread of a test is a rank with a device of that number. Prefix fake_. */
#ifndef TANDEM_TESTS_FAKE_CUDART_H
#define TANDEM_TESTS_FAKE_CUDART_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum fake_reach {
    FAKE_REACHES, /* as processes of one PID namespace, whatever devices they see */
    FAKE_REFUSES, /* as the driver between PID namespaces */
    FAKE_CONFUSES /* what is mapped is memory of the process itself */
};

struct fake_cudart {
    enum fake_reach reach[8]; /* of the rank that opens a handle */
    atomic_int mapped;        /* memory of peers, now */
    atomic_int launched;      /* kernels of sums that name peers' memory */
    atomic_bool pending;      /* no event comes, */
    atomic_int *ends;         /* but once this is not 0; NULL: never */
};
extern struct fake_cudart fake_cudart;

void fake_cudart_rank(uint32_t rank); /* of this thread */

#endif
