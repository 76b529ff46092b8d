/* attn_cases.h - the table of shapes that every back end of attention/ is held to: lengths of 1, around tiles and page
 * edges, either side of the batch empty, many decodes, many chunks, long contexts, all group sizes, head slices of
 * tensor-parallel ranks. C and CUDA C++.
 */
#ifndef TANDEM_ATTN_CASES_H
#define TANDEM_ATTN_CASES_H

#include <stdint.h>

/* `times` sequences alike. */
struct attn_span {
    uint32_t times, rows, kv_len;
};

struct attn_case {
    const char *name;
    uint32_t H, HK, D;
    uint32_t window;
    float soft_cap;
    int large;                    /* a host takes seconds to minutes: only when asked */
    const struct attn_span *span; /* ends with times 0 */
};

/* 64 keys are a tile, 16, 64 and 128 packed rows a block; 1024 tokens of 2 KiB fill a page of 2 MiB. */
static const struct attn_span attn_edges[] = {
    {1, 1, 1},   {1, 1, 15},  {1, 1, 16},  {1, 1, 17},   {1, 1, 63},   {1, 1, 64},   {1, 1, 65},   {1, 1, 127},
    {1, 1, 128}, {1, 1, 129}, {1, 1, 511}, {1, 1, 1023}, {1, 1, 1024}, {1, 1, 1025}, {1, 1, 4097}, {0, 0, 0}};
static const struct attn_span attn_chunk_edges[] = {
    {1, 2, 2},     {1, 16, 16},  {1, 17, 40}, {1, 63, 63},   {1, 64, 128}, {1, 65, 200}, {1, 127, 127}, {1, 128, 300},
    {1, 129, 129}, {1, 3, 1025}, {1, 5, 64},  {1, 33, 1000}, {1, 31, 31},  {1, 4, 700},  {0, 0, 0}};
/* The tiles of a device's kernels: 32 keys of a decode's warp, 96 of a chunk in the fused kernel, blocks of 256 packed rows (with four query
 * heads or one to a KV head). */
static const struct attn_span attn_tile_edges[] = {
    {1, 1, 31},   {1, 1, 32},   {1, 1, 33},    {1, 1, 95},    {1, 1, 96},    {1, 1, 97},
    {1, 1, 191},  {1, 1, 193},  {1, 30, 95},   {1, 30, 96},   {1, 30, 97},   {1, 63, 191},
    {1, 64, 192}, {1, 65, 193}, {1, 255, 255}, {1, 256, 300}, {1, 257, 259}, {0, 0, 0}};
static const struct attn_span attn_mixed[] = {{1, 1, 40}, {1, 100, 300}, {1, 1, 700},   {1, 9, 9},    {2, 3, 130},
                                              {1, 1, 1},  {3, 1, 513},   {1, 150, 400}, {2, 1, 2047}, {0, 0, 0}};
static const struct attn_span attn_one_chunk[] = {{1, 128, 128}, {0, 0, 0}};
static const struct attn_span attn_one_decode[] = {{1, 1, 3000}, {0, 0, 0}};
static const struct attn_span attn_one_row[] = {{1, 1, 1}, {0, 0, 0}};
static const struct attn_span attn_short_decodes[] = {{8, 1, 1024}, {0, 0, 0}};
static const struct attn_span attn_many_decodes[] = {{100, 1, 70}, {56, 1, 129}, {90, 1, 16}, {10, 1, 640}, {0, 0, 0}};
/* More than the planners look at in one round. */
static const struct attn_span attn_crowd[] = {{1000, 1, 70}, {20, 40, 100}, {1000, 1, 33}, {1, 90, 2000},
                                              {996, 1, 129}, {20, 17, 150}, {4, 1, 5000},  {0, 0, 0}};
static const struct attn_span attn_many_chunks[] = {{4, 40, 100}, {2, 64, 64}, {1, 100, 228}, {1, 17, 500}, {0, 0, 0}};
static const struct attn_span attn_full_decodes[] = {{256, 1, 2048}, {1, 512, 4096}, {0, 0, 0}};
/* Prefill is over at once: decodes are left to their own kernel from the beginning. */
static const struct attn_span attn_short_beside[] = {
    {200, 1, 2048}, {1, 200, 200}, {1, 40, 700}, {20, 1, 3000}, {0, 0, 0}};
/* sm90: prefill is on some SMs, and decodes on the others from the beginning. */
static const struct attn_span attn_some_sms[] = {{14, 1, 1000}, {1, 64, 64}, {12, 1, 1023}, {0, 0, 0}};
/* sm90: each unit of prefill in three parts; cut, behind a window. */
static const struct attn_span attn_three_parts[] = {{1, 704, 2600}, {1, 1, 300}, {0, 0, 0}};
static const struct attn_span attn_window_cut[] = {{1, 64, 3000}, {1, 1, 2500}, {0, 0, 0}};
static const struct attn_span attn_full_chunks[] = {{8, 512, 2000}, {64, 1, 3000}, {0, 0, 0}};
static const struct attn_span attn_at_32k[] = {{1, 512, 32768}, {20, 1, 16384}, {0, 0, 0}};
static const struct attn_span attn_at_128k[] = {{1, 1, 131072}, {1, 128, 131072}, {1, 1, 131071}, {0, 0, 0}};
/* sm90: decodes' parts are level, two for each block; units of 64 tiles in parts that were whole else; prefill in parts on some of the clusters. */
static const struct attn_span attn_few_long[] = {{1, 64, 64}, {8, 1, 4096}, {0, 0, 0}};
static const struct attn_span attn_whole_units[] = {{1, 128, 2048}, {67, 1, 4096}, {0, 0, 0}};
static const struct attn_span attn_parts_beside[] = {{1, 256, 4096}, {10, 1, 4096}, {0, 0, 0}};
/* Few, but cut and whole units of both roles. */
static const struct attn_span attn_few[] = {{1, 1, 70}, {1, 40, 1100}, {1, 1, 600}, {1, 70, 130}, {0, 0, 0}};
static const struct attn_span attn_speculation[] = {{30, 5, 4000}, {10, 2, 3000}, {10, 1, 1000}, {0, 0, 0}};
/* Decodes that are cut as beside a long prefill, the last quarter of the sequences finer; both sides take several rounds. */
static const struct attn_span attn_long_both[] = {{1, 700, 3000}, {20, 1, 9000}, {1, 1000, 1000},
                                                  {2, 1, 40000},  {12, 1, 7000}, {0, 0, 0}};

static const struct attn_case attn_cases[] = {
    {"decodes 32/8", 32, 8, 128, 0, 0, 0, attn_edges},
    {"decodes MHA", 4, 4, 64, 0, 0, 0, attn_edges},
    {"decodes D 256", 4, 2, 256, 0, 0, 0, attn_edges},
    {"chunks 8/2", 8, 2, 128, 0, 0, 0, attn_chunk_edges},
    {"chunks MHA", 3, 3, 64, 0, 0, 0, attn_chunk_edges},
    {"chunks D 256", 4, 1, 256, 0, 0, 0, attn_chunk_edges},
    {"tiles 8/2", 8, 2, 128, 0, 0, 0, attn_tile_edges},
    {"tiles MHA", 2, 2, 128, 0, 0, 0, attn_tile_edges},
    {"tiles D 64", 4, 1, 64, 0, 0, 0, attn_tile_edges},
    {"mixed 32/8", 32, 8, 128, 0, 0, 1, attn_mixed},
    {"mixed 16/4", 16, 4, 128, 0, 0, 1, attn_mixed},
    {"mixed 8/2", 8, 2, 128, 0, 0, 0, attn_mixed},
    {"mixed 4/1", 4, 1, 128, 0, 0, 0, attn_mixed},
    {"mixed MHA", 4, 4, 128, 0, 0, 0, attn_mixed},
    {"mixed D 64", 8, 4, 64, 0, 0, 0, attn_mixed},
    {"mixed D 8", 4, 2, 8, 0, 0, 0, attn_mixed},
    {"mixed D 40", 2, 2, 40, 0, 0, 0, attn_mixed},
    {"mixed D 80", 4, 2, 80, 0, 0, 0, attn_mixed},
    {"mixed D 96", 6, 2, 96, 0, 0, 0, attn_mixed},
    {"mixed D 192", 4, 2, 192, 0, 0, 0, attn_mixed},
    {"window 1", 4, 2, 64, 1, 0, 0, attn_mixed},
    {"window 64", 8, 2, 128, 64, 0, 0, attn_mixed},
    {"window 500", 4, 2, 64, 500, 0, 0, attn_mixed},
    {"soft cap", 8, 2, 128, 0, 3, 0, attn_mixed},
    {"soft cap, window", 4, 2, 256, 300, 20, 0, attn_mixed},
    /* Caps as models have them, with scores that come near. */
    {"cap 50", 8, 2, 128, 0, 50, 0, attn_mixed},
    {"cap 50, window", 8, 2, 128, 300, 50, 0, attn_few},
    {"cap 50 D 64", 4, 2, 64, 0, 50, 0, attn_few},
    {"cap 50 D 64, window", 4, 2, 64, 300, 50, 0, attn_mixed},
    {"cap 30", 4, 1, 128, 0, 30, 0, attn_few},
    {"cap 30 D 64, window", 2, 1, 64, 100, 30, 0, attn_few},
    {"one chunk", 8, 2, 128, 0, 0, 0, attn_one_chunk},
    {"one decode", 32, 8, 128, 0, 0, 0, attn_one_decode},
    {"one row", 4, 1, 64, 0, 0, 0, attn_one_row},
    {"short decodes", 8, 2, 128, 0, 0, 0, attn_short_decodes},
    {"256 decodes", 8, 2, 64, 0, 0, 0, attn_many_decodes},
    {"8 chunks", 4, 2, 64, 0, 0, 0, attn_many_chunks},
    {"3000 decodes, 41 chunks", 4, 2, 64, 0, 0, 1, attn_crowd},
    {"few D 128", 8, 2, 128, 0, 0, 0, attn_few},
    {"few D 64", 2, 1, 64, 0, 0, 0, attn_few},
    {"few D 256, window", 2, 1, 256, 300, 20, 0, attn_few},
    {"some SMs D 128", 8, 2, 128, 0, 0, 0, attn_some_sms},
    {"some SMs D 64", 8, 2, 64, 0, 0, 0, attn_some_sms},
    {"few long decodes", 32, 8, 128, 0, 0, 0, attn_few_long},
    {"three parts", 8, 2, 64, 0, 0, 0, attn_three_parts},
    {"window, cut", 8, 2, 128, 2000, 0, 0, attn_window_cut},
    {"256 decodes of 2K, a chunk", 32, 8, 128, 0, 0, 1, attn_full_decodes},
    {"220 decodes, short chunks", 32, 8, 128, 0, 0, 1, attn_short_beside},
    {"8 chunks of 512, 64 decodes", 32, 8, 128, 0, 0, 1, attn_full_chunks},
    {"chunk at 32K, decodes", 8, 2, 128, 0, 0, 1, attn_at_32k},
    {"both sides cut", 32, 8, 128, 0, 0, 1, attn_long_both},
    {"context of 128K", 4, 1, 128, 0, 0, 1, attn_at_128k},
    {"context of 128K, 32/8", 32, 8, 128, 0, 0, 1, attn_at_128k},
    {"speculation", 32, 4, 128, 0, 0, 1, attn_speculation},
    {"whole units, cut", 8, 2, 128, 0, 0, 1, attn_whole_units},
    {"prefill in parts beside", 32, 8, 128, 0, 0, 1, attn_parts_beside},
};

enum { ATTN_CASES = sizeof attn_cases / sizeof *attn_cases };

/* Every group size takes this batch, with HK 2 and D 64 (on a GPU D 128 too). */
enum { ATTN_MAX_GROUP = 17 };
static const struct attn_span attn_group_spans[] = {{2, 1, 77},  {1, 2, 20},  {1, 7, 30}, {1, 1, 3},
                                                    {1, 40, 90}, {1, 1, 600}, {0, 0, 0}};

static inline uint32_t attn_case_seqs(const struct attn_span *s)
{
    uint32_t n = 0;
    for (; s->times; s++)
        n += s->times;
    return n;
}

/* Products of an element of a query with one of a key: what a case costs a host. */
static inline uint64_t attn_case_work(const struct attn_case *c)
{
    uint64_t pairs = 0;
    for (const struct attn_span *s = c->span; s->times; s++) {
        for (uint32_t r = 0; r < s->rows; r++) {
            uint32_t keys = s->kv_len - r;
            pairs += (uint64_t)s->times * (c->window && c->window < keys ? c->window : keys);
        }
    }
    return pairs * c->H * c->D;
}

#endif
