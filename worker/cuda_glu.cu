/* cuda_glu.cu - gate and up of many rows, and SwiGLU of them, in one kernel: the 2 I values of a row never leave the chip.
 *
 *   act[T][I] = silu(x Wg^T) * (x Wu^T)          a tile: 128 columns of act by N rows of x
 *
 * W is wgmma's left side: a tile has 128 rows of gate and the 128 rows of up that belong to them, and the rows of x are the
 * columns of the sums, so that N may be any multiple of 8. With N chosen by T, the tiles fill whole rounds of all SMs: 1056
 * rows and 14336 columns are 7 * 112 tiles of N = 152, 5.94 rounds of 132 SMs. (With x on the left side, in units of 128
 * rows, it would be 7.6 rounds: 12 % more.)
 *
 * Grid: one block for each SM, which takes every n-th tile; or clusters of two blocks, which share the x of two neighbours in
 * I or the W of two neighbours in T and load each half of it for both. A block: two consumer warpgroups with 64 columns of
 * act each (two sums [64][N], gate and up, in registers), and one warp that loads.
 *
 *   shared memory   stage 0: gate [128][64] | up [128][64] | x [N][64]   rows of 128 swizzled bytes
 *                   stage 1 ...
 *                   two buffers a warpgroup: 16 rows of x by 64 columns of act, on their way out
 *
 * While a block makes act of its sums, the loads for its next tile go on. Consumer 1 can be held back at the start (`lag`): it
 * stays behind, and the sums of one warpgroup go on while the other makes act.
 */
#include <cuda.h>
#include <cuda_bf16.h>

#include "worker/cuda_kernels.h"
#include "worker/cuda_launch.cuh"
#include "worker/cuda_ptx_sm90.cuh"

namespace
{
constexpr uint32_t GROUP = 128; /* threads of a warpgroup */
constexpr uint32_t CONSUMERS = 2;
constexpr uint32_t THREADS = (CONSUMERS + 1) * GROUP;
constexpr uint32_t COLS = CUDA_GLU_COLS;      /* of act in a tile; half of the rows of W */
constexpr uint32_t DEPTH = CUDA_GLU_DEPTH;    /* of k in a stage: 128 bytes, a row of the swizzle */
constexpr uint32_t W_BYTES = 2 * COLS * 128;  /* of a stage */
constexpr uint32_t GROUP_BYTES = W_BYTES / 4; /* gate of one warpgroup, or up */
constexpr uint32_t OUT_ROWS = 16;             /* of act that go out at a time: one stmatrix of each warp */
constexpr uint32_t OUT_BYTES = OUT_ROWS * 128;
constexpr uint32_t SHARED_MAX = 227 * 1024;
constexpr uint32_t BARS_BYTES = 512; /* more than there are */
constexpr uint32_t STAGES_MAX = 6;
constexpr uint32_t BAR_OUT = 1; /* and 2 */
constexpr float LOG2E = 1.44269504f;
static_assert(COLS == CONSUMERS * 64 && DEPTH == 64, "one wgmma high, one row of the swizzle wide");

/* The rows of x that a tile may have. 80, 120, 136 and 160 were there, too, and fastest for no number of rows that was tried. */
#define EACH_N(F) F(96) F(112) F(128) F(144) F(152) F(168)

template <uint32_t ROWS, enum cuda_glu_share SHARE_>
struct glu_tile {
    static constexpr uint32_t N = ROWS; static constexpr enum cuda_glu_share SHARE = SHARE_;
    static constexpr uint32_t CLUSTER = SHARE == CUDA_GLU_ALONE ? 1 : 2;
    static constexpr uint32_t STAGE_BYTES = W_BYTES + N * 128;
    static constexpr uint32_t OUT_ALL = CONSUMERS * 2 * OUT_BYTES;
    static constexpr uint32_t FIT = (SHARED_MAX - BARS_BYTES - 1024 - OUT_ALL) / STAGE_BYTES;
    static constexpr uint32_t STAGES = FIT < STAGES_MAX ? FIT : STAGES_MAX;
    static constexpr uint32_t SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + OUT_ALL; /* 1024: to align it */
    static_assert(N % 8 == 0 && STAGE_BYTES % 1024 == 0, "swizzled in units of 8 rows");
    static_assert(STAGES >= 3, "too few loads under way");
};

struct glu_args {
    CUtensorMap w, x;
    __nv_bfloat16 *act;
    const float *bias;
    uint32_t rows, inner, k_tiles;
    uint32_t across, along, group; /* units of work in T and in I; so many in T are taken side by side */
    uint32_t lag;
};

template <uint32_t STAGES> struct glu_bars {
    uint64_t full[STAGES], empty[STAGES], ahead;
};

/* Of a tile: its first row of x and its first column of act. */
struct glu_place {
    uint32_t row, col;
};

/* Units side by side have the same W, one group of rows after the other; a unit is a tile of each block of the cluster. */
template <typename C> __device__ __forceinline__ glu_place place_of(const glu_args &a, uint32_t unit, uint32_t rank)
{
    const uint32_t group = unit / (a.group * a.along), rest = unit % (a.group * a.along);
    const uint32_t left = a.across - group * a.group, high = left < a.group ? left : a.group;
    uint32_t t = group * a.group + rest % high, i = rest / high;
    if (C::SHARE == CUDA_GLU_SHARES_W)
        t = 2 * t + rank;
    if (C::SHARE == CUDA_GLU_SHARES_X)
        i = 2 * i + rank;
    return {t * C::N, i * COLS};
}

/* ---- the warp that loads: one thread of it ---- */

template <typename C>
__device__ __forceinline__ void load_w(const glu_args &a, glu_place p, uint32_t k, uint32_t stage, uint32_t bar,
                                       uint32_t rank)
{
    const int32_t c = (int32_t)(k * DEPTH), gate = (int32_t)p.col, up = (int32_t)(a.inner + p.col);
    if constexpr (C::SHARE == CUDA_GLU_SHARES_W) { /* what warpgroup `rank` of both blocks multiplies */
        const int32_t at = (int32_t)(rank * 64);
        sm90_copy_box2_to(stage + rank * GROUP_BYTES, &a.w, bar, c, gate + at, 3, SM90_L2_NORMAL);
        sm90_copy_box2_to(stage + (2 + rank) * GROUP_BYTES, &a.w, bar, c, up + at, 3, SM90_L2_NORMAL);
    } else {
        sm90_copy_box2(stage, &a.w, bar, c, gate, SM90_L2_NORMAL);
        sm90_copy_box2(stage + W_BYTES / 2, &a.w, bar, c, up, SM90_L2_NORMAL);
    }
}

/* Blocks that share x load it in turn: halves of a box would not be multiples of 8 rows. */
template <typename C>
__device__ __forceinline__ void load_x(const glu_args &a, glu_place p, uint32_t k, uint32_t stage, uint32_t bar,
                                       uint32_t rank)
{
    const int32_t c = (int32_t)(k * DEPTH), row = (int32_t)p.row;
    if constexpr (C::SHARE != CUDA_GLU_SHARES_X)
        sm90_copy_box2(stage + W_BYTES, &a.x, bar, c, row, SM90_L2_EVICT_LAST);
    else if (k % 2 == rank)
        sm90_copy_box2_to(stage + W_BYTES, &a.x, bar, c, row, 3, SM90_L2_EVICT_LAST);
}

template <typename C>
__device__ __forceinline__ void produce(const glu_args &a, glu_bars<C::STAGES> *b, uint32_t shared, uint32_t rank)
{
    const uint32_t early = a.k_tiles < C::STAGES ? a.k_tiles : C::STAGES, units = a.across * a.along;
    uint32_t unit = blockIdx.x / C::CLUSTER, k;
    glu_place p = place_of<C>(a, unit, rank);
    sm90_ring_at<C::STAGES> at;
    for (k = 0; k < early; k++) { /* W is a constant */
        sm90_mbar_expect(sm90_shared(&b->full[k]), C::STAGE_BYTES);
        load_w<C>(a, p, k, shared + k * C::STAGE_BYTES, sm90_shared(&b->full[k]), rank);
    }
    cuda_wait_for_previous();
    for (k = 0; k < early; k++, at.next())
        load_x<C>(a, p, k, shared + k * C::STAGE_BYTES, sm90_shared(&b->full[k]), rank);
    for (;;) {
        for (; k < a.k_tiles; k++, at.next()) {
            const uint32_t full = sm90_shared(&b->full[at.slot]), stage = shared + at.slot * C::STAGE_BYTES;
            sm90_mbar_wait(sm90_shared(&b->empty[at.slot]), at.parity ^ 1);
            sm90_mbar_expect(full, C::STAGE_BYTES);
            load_w<C>(a, p, k, stage, full, rank);
            load_x<C>(a, p, k, stage, full, rank);
        }
        unit += gridDim.x / C::CLUSTER;
        if (unit >= units)
            return;
        p = place_of<C>(a, unit, rank);
        k = 0;
    }
}

/* ---- consumers ---- */

/* Lane i of each warp tells block i of the cluster. */
template <typename C> __device__ __forceinline__ void release(uint64_t *empty)
{
    const uint32_t lane = threadIdx.x % 32;
    if (lane >= C::CLUSTER)
        return;
    if (C::CLUSTER == 1)
        sm90_mbar_arrive(sm90_shared(empty));
    else
        sm90_mbar_arrive_at(sm90_shared(empty), lane);
}

/* gate and up [64][N] of a tile. On its first tile warpgroup 0 lets warpgroup 1 begin when it has done `lag` stages. */
template <typename C>
__device__ __forceinline__ void add_up(float (&gate)[C::N / 2], float (&up)[C::N / 2], sm90_ring_at<C::STAGES> &at,
                                       glu_bars<C::STAGES> *b, uint32_t shared, uint32_t group, uint32_t k_tiles,
                                       uint32_t lag)
{
    uint32_t last = 0;
    for (uint32_t k = 0; k < k_tiles; k++) {
        const uint32_t stage = shared + at.slot * C::STAGE_BYTES;
        const uint64_t g = sm90_desc(stage + group * GROUP_BYTES, 16);
        const uint64_t u = sm90_desc(stage + (2 + group) * GROUP_BYTES, 16), x = sm90_desc(stage + W_BYTES, 16);
        sm90_mbar_wait(sm90_shared(&b->full[at.slot]), at.parity);
        sm90_wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < DEPTH / 16; i++) { /* 32 bytes on are 2 units of a descriptor */
            sm90_wgmma(gate, g + 2 * i, x + 2 * i, k | i);
            sm90_wgmma(up, u + 2 * i, x + 2 * i, k | i);
        }
        sm90_wgmma_commit();
        sm90_wgmma_wait<1>();
        if (k)
            release<C>(&b->empty[last]);
        if (k + 1 == lag && threadIdx.x == 0)
            sm90_mbar_arrive(sm90_shared(&b->ahead));
        last = at.slot;
        at.next();
    }
    sm90_wgmma_wait<0>();
    sm90_pin(gate);
    sm90_pin(up);
    release<C>(&b->empty[last]);
}

/* 1 + e^-gate. Below -41 gate counts as -41: act is nothing there, and a product of two stays finite. */
__device__ __forceinline__ float one_and_exp(float gate)
{
    return 1 + sm90_exp2(fminf(-LOG2E * gate, 60.0f));
}

/* As cuda_swiglu, of sums that were not rounded, for two columns. Powers and reciprocals are what the unit for them is busy with
 * while nothing is added up: one reciprocal is enough for two. */
__device__ __forceinline__ uint32_t swiglu(float gate0, float up0, float gate1, float up1)
{
    const float a = one_and_exp(gate0), b = one_and_exp(gate1), r = sm90_reciprocal(a * b);
    return sm90_pack<true>(gate0 * (r * b) * up0, gate1 * (r * a) * up1);
}

/* What is added to a thread's sums: of rows lane / 4 of its warp's 16, and 8 more. */
struct glu_bias {
    float gate[2] = {0, 0}, up[2] = {0, 0};
};

__device__ __forceinline__ glu_bias load_bias(const glu_args &a, uint32_t col)
{
    glu_bias b;
    if (!a.bias)
        return b;
    const float *bias = a.bias + col + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4;
    for (uint32_t i = 0; i < 2; i++) {
        b.gate[i] = __ldg(bias + i * 8);
        b.up[i] = __ldg(bias + a.inner + i * 8);
    }
    return b;
}

/* A warpgroup's [N][64] of act, OUT_ROWS at a time through shared memory, since its threads have columns of it: of each 8 rows
 * of x a thread has rows 2 * (lane % 4) and 1 more, columns lane / 4 and 8 more of its warp's 16. */
template <typename C>
__device__ __forceinline__ void put_act(const glu_args &a, const float (&gate)[C::N / 2], const float (&up)[C::N / 2],
                                        uint32_t out, uint32_t group, uint32_t row, uint32_t col)
{
    const uint32_t tid = threadIdx.x % GROUP, warp = tid / 32, lane = tid % 32;
    const uint32_t to_row = lane / 16 * 8 + lane % 8, to_chunk = warp * 2 + lane / 8 % 2; /* matrices: columns first */
    const uint32_t to = to_row * 128 + ((to_chunk ^ lane % 8) << 4);
    const uint32_t from_row = tid / 8, from = from_row * 128 + ((tid % 8 ^ from_row % 8) << 4);
    __nv_bfloat16 *act = a.act + (uint64_t)(row + from_row) * a.inner + col + tid % 8 * 8;
    const glu_bias b = load_bias(a, col);
#pragma unroll
    for (uint32_t j = 0; j < C::N / 8; j += 2) {
        const uint32_t buffer = out + j / 2 % 2 * OUT_BYTES; /* whose last contents all have read at the last barrier */
        const uint32_t eights = j + 1 < C::N / 8 ? 2 : 1;
        uint32_t v[4] = {}; /* columns lane / 4, 8 more; the same of the next 8 rows */
#pragma unroll
        for (uint32_t i = 0; i < 2 * eights; i++) {
            const uint32_t at = 4 * j + 2 * i, s = i % 2;
            v[i] = swiglu(gate[at] + b.gate[s], up[at] + b.up[s], gate[at + 1] + b.gate[s], up[at + 1] + b.up[s]);
        }
        if (eights == 2)
            sm90_stmatrix_trans(buffer + to, v[0], v[1], v[2], v[3]);
        else
            sm90_stmatrix_trans(buffer + to, v[0], v[1]);
        sm90_bar_sync(BAR_OUT + group, GROUP);
        if (from_row < 8 * eights && row + j * 8 + from_row < a.rows)
            __stcg((uint4 *)(act + (uint64_t)j * 8 * a.inner), sm90_load_shared(buffer + from));
    }
    sm90_bar_sync(BAR_OUT + group, GROUP);
}

template <typename C>
__device__ __forceinline__ void consume(const glu_args &a, glu_bars<C::STAGES> *b, uint32_t shared, uint32_t group,
                                        uint32_t rank)
{
    const uint32_t units = a.across * a.along, out = shared + C::STAGES * C::STAGE_BYTES + group * 2 * OUT_BYTES;
    sm90_ring_at<C::STAGES> at;
    uint32_t lag = group == 0 ? a.lag : 0;
    cuda_wait_for_previous();
    if (group == 1 && a.lag)
        sm90_mbar_wait(sm90_shared(&b->ahead), 0);
    for (uint32_t unit = blockIdx.x / C::CLUSTER; unit < units; unit += gridDim.x / C::CLUSTER) {
        const glu_place p = place_of<C>(a, unit, rank);
        float gate[C::N / 2], up[C::N / 2];
        add_up<C>(gate, up, at, b, shared, group, a.k_tiles, lag);
        lag = 0;
        put_act<C>(a, gate, up, out, group, p.row, p.col + group * 64);
    }
}

template <uint32_t N, enum cuda_glu_share SHARE>
__global__ void __launch_bounds__(THREADS, 1) glu_kernel(const __grid_constant__ glu_args a)
{
    using C = glu_tile<N, SHARE>;
    extern __shared__ uint8_t dynamic[];
    __shared__ glu_bars<C::STAGES> bars;
    static_assert(sizeof bars <= BARS_BYTES, "barriers");
    const uint32_t shared = (sm90_shared(dynamic) + 1023) / 1024 * 1024;
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / GROUP, 0); /* the same in a warp, as the compiler sees */
    const uint32_t rank = C::CLUSTER == 1 ? 0 : sm90_cluster_rank();
    cuda_let_next_begin();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < C::STAGES; i++) {
            sm90_mbar_init(sm90_shared(&bars.full[i]), 1);
            sm90_mbar_init(sm90_shared(&bars.empty[i]), C::CLUSTER * CONSUMERS * GROUP / 32);
        }
        sm90_mbar_init(sm90_shared(&bars.ahead), 1);
        sm90_mbar_init_fence();
    }
    if (C::CLUSTER == 1)
        __syncthreads();
    else
        sm90_cluster_sync();
    if (group == CONSUMERS) {
        sm90_regs_less<24>();
        if (threadIdx.x == CONSUMERS * GROUP)
            produce<C>(a, &bars, shared, rank);
    } else {
        sm90_regs_more<240>();
        consume<C>(a, &bars, shared, group, rank);
    }
    if (C::CLUSTER != 1)
        sm90_cluster_sync(); /* no block ends while the other copies to it or arrives at its barriers */
}

/* ---- launches ---- */

typedef void (*glu_function)(const glu_args);

struct glu_variant {
    uint32_t rows, share, shared_bytes;
    glu_function kernel;
};

template <uint32_t N, enum cuda_glu_share SHARE> constexpr glu_variant variant()
{
    return {N, SHARE, glu_tile<N, SHARE>::SHARED_BYTES, glu_kernel<N, SHARE>};
}

#define ALL_SHARES(n) variant<n, CUDA_GLU_ALONE>(), variant<n, CUDA_GLU_SHARES_X>(), variant<n, CUDA_GLU_SHARES_W>(),
const glu_variant variants[] = {EACH_N(ALL_SHARES)};
constexpr uint32_t VARIANTS = sizeof variants / sizeof *variants;

const glu_variant *variant_of(const struct cuda_glu_way *way)
{
    for (uint32_t i = 0; i < VARIANTS; i++)
        if (variants[i].rows == way->rows && variants[i].share == way->share)
            return &variants[i];
    return NULL;
}

/* A bf16 matrix [rows][cols] in boxes of `box` rows by DEPTH columns; what is out of bounds reads as zeros. */
cudaError_t encode(CUtensorMap *out, const struct cuda_glu *g, const void *matrix, uint32_t rows, uint32_t cols,
                   uint32_t box)
{
    const cuuint64_t dims[2] = {cols, rows}, strides[1] = {2ull * cols};
    const cuuint32_t boxes[2] = {DEPTH, box}, every[2] = {1, 1};
    CUresult rc = ((decltype(&cuTensorMapEncodeTiled))g->encode)(
        out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)matrix, dims, strides, boxes, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return rc == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t launch(cudaStream_t stream, glu_function kernel, uint32_t blocks, uint32_t cluster, uint32_t shared_bytes,
                   const glu_args &args)
{
    cudaError_t err = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (err != cudaSuccess)
        return err;
    cudaLaunchAttribute attrs[2] = {};
    attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attrs[0].val.programmaticStreamSerializationAllowed = 1;
    attrs[1].id = cudaLaunchAttributeClusterDimension;
    attrs[1].val.clusterDim.x = cluster;
    attrs[1].val.clusterDim.y = attrs[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = dim3(blocks);
    cfg.blockDim = dim3(THREADS);
    cfg.dynamicSmemBytes = shared_bytes;
    cfg.stream = stream;
    cfg.attrs = attrs;
    cfg.numAttrs = cluster == 1 ? 1 : 2;
    return cudaLaunchKernelEx(&cfg, kernel, args);
}

uint32_t over(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

/* What a product is expected to take, in rows of tiles that one SM works at: rounds by rows of a tile. The last term is what a
 * tile takes beside its sums, which also says no to narrow ones. */
uint32_t cost(const struct cuda_glu *g, const struct cuda_glu_way *way, uint32_t t, uint32_t inner)
{
    const uint32_t cols = inner / COLS, across = over(t, way->rows);
    uint32_t units = across * cols, at_once = g->blocks;
    if (way->share == CUDA_GLU_SHARES_W)
        units = over(across, 2) * cols;
    if (way->share == CUDA_GLU_SHARES_X)
        units = across * cols / 2;
    if (way->share != CUDA_GLU_ALONE)
        at_once /= 2;
    return over(units, at_once) * (way->rows + 10);
}
} // namespace

cudaError_t cuda_glu_open(struct cuda_glu *out)
{
    int device = 0, major = 0, minor = 0, sms = 0;
    void *fn = NULL;
    cudaDriverEntryPointQueryResult found;
    cudaError_t err = cudaGetDevice(&device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (err == cudaSuccess)
        err = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (err != cudaSuccess)
        return err;
    if (major != 9 || minor != 0)
        return cudaErrorNotSupported;
    err = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &found);
    if (err != cudaSuccess)
        return err;
    if (found != cudaDriverEntryPointSuccess || !fn)
        return cudaErrorNotSupported;
    out->encode = fn;
    out->blocks = (uint32_t)sms;
    return cudaSuccess;
}

bool cuda_glu_fits(const struct cuda_glu *g, const struct cuda_glu_way *way, uint32_t t, uint32_t inner, uint32_t k)
{
    return g->encode && t && inner && k && inner % COLS == 0 && k % DEPTH == 0 && variant_of(way) && way->group &&
           way->lag < 3 && (way->share != CUDA_GLU_SHARES_X || inner / COLS % 2 == 0);
}

uint32_t cuda_glu_suggest(const struct cuda_glu *g, struct cuda_glu_way *out, uint32_t max, uint32_t t, uint32_t inner,
                          uint32_t k)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < VARIANTS; i++) {
        struct cuda_glu_way way = {variants[i].rows, variants[i].share, CUDA_GLU_ALL_ROWS, 0};
        uint32_t at = n < max ? n++ : max;
        if (!cuda_glu_fits(g, &way, t, inner, k)) {
            n -= at < max;
            continue;
        }
        for (; at && cost(g, &way, t, inner) < cost(g, &out[at - 1], t, inner); at--)
            if (at < max)
                out[at] = out[at - 1];
        if (at < max)
            out[at] = way;
    }
    return n;
}

cudaError_t cuda_glu_run(cudaStream_t stream, const struct cuda_glu *g, const struct cuda_glu_way *way, void *act,
                         const void *x, const void *w, const float *bias, uint32_t t, uint32_t inner, uint32_t k)
{
    if (!cuda_glu_fits(g, way, t, inner, k) || ((uintptr_t)act | (uintptr_t)x | (uintptr_t)w) % 16)
        return cudaErrorInvalidValue;
    const glu_variant *v = variant_of(way);
    const uint32_t cluster = way->share == CUDA_GLU_ALONE ? 1 : 2;
    glu_args args = {};
    cudaError_t err = encode(&args.w, g, w, 2 * inner, k, way->share == CUDA_GLU_SHARES_W ? COLS / 2 : COLS);
    if (err == cudaSuccess)
        err = encode(&args.x, g, x, t, k, way->rows);
    if (err != cudaSuccess)
        return err;
    args.act = (__nv_bfloat16 *)act;
    args.bias = bias;
    args.rows = t;
    args.inner = inner;
    args.k_tiles = k / DEPTH;
    args.across = over(t, way->rows);
    args.along = inner / COLS;
    if (way->share == CUDA_GLU_SHARES_W)
        args.across = over(args.across, 2);
    if (way->share == CUDA_GLU_SHARES_X)
        args.along /= 2;
    args.group = way->group < args.across ? way->group : args.across;
    args.lag = way->lag < args.k_tiles ? way->lag : 0;
    const uint32_t units = args.across * args.along, at_once = g->blocks / cluster;
    return launch(stream, v->kernel, (units < at_once ? units : at_once) * cluster, cluster, v->shared_bytes, args);
}
