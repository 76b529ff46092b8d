/* fake_nccl.h - what tests ask of the imitation of NCCL (fake_nccl.c), found in it with dlsym. It joins ranks without
 * doing a sum. */
#ifndef TANDEM_TESTS_FAKE_NCCL_H
#define TANDEM_TESTS_FAKE_NCCL_H

#include <stdatomic.h>

struct fake_nccl_control {
    atomic_int error;       /* ncclResult_t of what goes on behind the calls */
    atomic_int live, ended; /* communicators; by ncclCommAbort */
    atomic_int asked;       /* for such an error */
};

#define FAKE_NCCL_CONTROL "fake_nccl" /* a struct fake_nccl_control */

#endif
