/* attention_host_internal.h - the host back end's parts: attention_host.c cuts a batch into blocks, the kernels of
 * attention_kernels.c compute a block.
 *
 * A packed row is one query head of one query row: the rows * G rows of a sequence that share a KV head, row by row.
 * A block is some packed rows of one sequence and KV head against a range of its keys.
 */
#ifndef TANDEM_ATTENTION_HOST_INTERNAL_H
#define TANDEM_ATTENTION_HOST_INTERNAL_H

#include "attention/attention_internal.h"

enum {
    FEW_ROWS = 16,   /* packed rows of a sequence up to which keys are read in place, each once; above, keys are widened
                        and transposed into a tile first, which that many rows pay for */
    BLOCK_ROWS = 96, /* packed rows of a block at most */
    TILE_KEYS = 64,  /* keys between two updates of the running maximum */
    MAX_VW = 16,
};

/* A worker's own memory. Rows of q and out are padded to a multiple of MAX_VW (DP); what stands behind column D of out
 * is finite and meaningless. */
struct host_scratch {
    float *q;                   /* [BLOCK_ROWS][DP] times scale * log2(e), zeros behind column D */
    float *out;                 /* [BLOCK_ROWS][DP] sum of p * v, not divided by sum yet */
    float *p;                   /* [BLOCK_ROWS][TILE_KEYS] scores of the tile, then their powers */
    float *kt;                  /* [D][TILE_KEYS] the tile's keys, transposed */
    float *v;                   /* [TILE_KEYS][DP] the tile's values */
    float max[BLOCK_ROWS];      /* of the scores seen, base 2; -inf: none yet */
    float sum[BLOCK_ROWS];      /* of 2^(score - max) */
    uint32_t start[BLOCK_ROWS]; /* keys a row sees: start .. limit - 1, at least one; both rise with the row */
    uint32_t limit[BLOCK_ROWS];
};

struct host_block {
    const char *k, *v; /* key 0 of the KV head */
    uint64_t token_stride;
    enum attn_dtype dtype;
    uint32_t D, DP;
    uint32_t rows;           /* packed, at most BLOCK_ROWS */
    uint32_t k_begin, k_end; /* no key from k_end on is read */
    float cap;               /* soft cap of scores times log2(e); 0: none */
};

struct host_kernels {
    const char *name;
    /* Both leave out, max and sum of b->rows rows in s; q, start and limit are filled in. few: at most FEW_ROWS rows. */
    void (*few)(const struct host_block *b, struct host_scratch *s);
    void (*many)(const struct host_block *b, struct host_scratch *s);
    /* dst[i] = src[i] * factor for n elements, a multiple of 8. */
    void (*scale)(float *dst, const float *src, uint32_t n, float factor);
    /* dst[i] += src[i] * factor, likewise. */
    void (*add_scaled)(float *dst, const float *src, uint32_t n, float factor);
    /* 2^x with the error of the kernels. */
    float (*exp2)(float x);
};

enum { HOST_MAX_KERNELS = 3 };

extern const struct host_kernels host_kernels_portable;
extern const struct host_kernels host_kernels_avx2;   /* x86-64 only */
extern const struct host_kernels host_kernels_avx512; /* x86-64 only */

/* Those that this CPU runs, the best first; returns how many, at least 1. */
uint32_t host_kernels_list(const struct host_kernels *out[HOST_MAX_KERNELS]);

/* attn_ops_host with the n-th of that list instead of the best: for tests. create says UNIMPLEMENTED where the CPU has
 * fewer. */
extern const struct attn_ops attn_ops_host_nth[HOST_MAX_KERNELS];

#endif
