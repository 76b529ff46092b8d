/* fake_cuda.h - what tests ask of the imitation of the CUDA driver (fake_cuda.c), found in it with dlsym. */
#ifndef TANDEM_FAKE_CUDA_H
#define TANDEM_FAKE_CUDA_H

struct fake_cuda_control {
    int (*inject)(void); /* called by every entry point that can fail; not 0: the call fails; NULL: none fails */
    int result;          /* CUresult of a call that fails so; 0: CUDA_ERROR_OUT_OF_MEMORY */
    int live;         /* contexts, streams, reservations, mappings, handles and host blocks that are not given back */
    int broken_rules; /* calls that the driver would refuse, or should: double unmap, release of a mapped handle */
};

#define FAKE_CUDA_CONTROL "fake_cuda" /* a struct fake_cuda_control */

#endif
