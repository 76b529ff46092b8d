/* bench_sm90_limits.cu - what the parts of Hopper that attention's kernels share can do, each alone and beside the others.
 *
 *     bench_sm90_limits [--power MS]
 *
 * 1  Bytes from L2 into shared memory by tensor copies: by one SM for itself, or by 2 and 4 for each other (multicast in a cluster).
 * 2  Products as a prefill has them (two warpgroups, m64n128k16, K from shared memory, then V with registers), a stream of
 *    device memory as decodes have it (a third warpgroup, four rings of 32 KiB), what decodes do with it (mma.sync, or wgmma with
 *    8 columns), and all of them on the same SM. There is no softmax for the prefill and nothing is written.
 *
 * Rates are medians of ROUNDS launches of some milliseconds with pauses; with --power of so many milliseconds without a pause as
 * well, with what the chip draws and the clock of its SMs.
 */
#include "attention/ptx_sm90.cuh"
#include "tests/bench/bench_draw.h"

namespace
{
constexpr uint32_t ROUNDS = 9;

/* ---- 1: from L2 ---- */

constexpr uint32_t STAGES = 8, BOX_ROWS = 32, BOX_BYTES = BOX_ROWS * 128, STAGE_ROWS = 64, ROW_BYTES = 256,
                   STAGE_BYTES = STAGE_ROWS * ROW_BYTES, STAGE_BOXES = STAGE_BYTES / BOX_BYTES, L2_BYTES = 16u << 20,
                   L2_ROWS = L2_BYTES / ROW_BYTES, L2_STAGES = 8192;

struct ring_bars {
    alignas(8) uint64_t full[STAGES], empty[STAGES];
};

/* 32 tokens by 64 elements, as attention's kernels ask for them; to the same place in each block of the cluster. */
template <uint32_t CLUSTER>
__device__ __forceinline__ void copy_box(uint32_t dst, const CUtensorMap *map, uint32_t bar, int32_t element,
                                         int32_t row)
{
    if constexpr (CLUSTER == 1)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
            "[%2];" ::"r"(dst),
            "l"(map), "r"(bar), "r"(element), "r"(row)
            : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                     "l"(map), "r"(bar), "r"(element), "r"(row), "h"((uint16_t)((1u << CLUSTER) - 1))
                     : "memory");
}

__device__ __forceinline__ void copy_bytes(uint32_t dst, const char *src, uint32_t bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}

__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Each block of a cluster brings its share of every stage to all of them: a stage arrives everywhere, and costs L2 once. Its
 * bytes may be there before a block has said that it expects them, but not a phase early: who sends has been told by all
 * that the stage is free. Clusters begin `apart` rows from each other. */
template <uint32_t CLUSTER>
__global__ void __launch_bounds__(64, 1)
    from_l2(const __grid_constant__ CUtensorMap map, uint32_t stages, uint32_t apart)
{
    extern __shared__ __align__(1024) char memory[];
    __shared__ ring_bars bars;
    const uint32_t rank = CLUSTER == 1 ? 0 : sm90_cluster_rank();
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < STAGES; s++) {
            sm90_mbar_init(sm90_shared(&bars.full[s]), 1);
            sm90_mbar_init(sm90_shared(&bars.empty[s]), CLUSTER);
        }
        sm90_mbar_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1)
        cluster_sync();
    const uint32_t place = blockIdx.x / CLUSTER * apart;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < stages; i++) {
            uint32_t s = i % STAGES, parity = i / STAGES & 1;
            sm90_mbar_wait(sm90_shared(&bars.empty[s]), parity ^ 1);
            sm90_mbar_expect(sm90_shared(&bars.full[s]), STAGE_BYTES);
            for (uint32_t box = rank; box < STAGE_BOXES; box += CLUSTER)
                copy_box<CLUSTER>(sm90_shared(memory) + s * STAGE_BYTES + box * BOX_BYTES, &map,
                                  sm90_shared(&bars.full[s]), (int32_t)(box / 2 * 64),
                                  (int32_t)((place + i * STAGE_ROWS + box % 2 * BOX_ROWS) % L2_ROWS));
        }
    } else if (threadIdx.x == 32) {
        for (uint32_t i = 0; i < stages; i++) {
            uint32_t s = i % STAGES;
            sm90_mbar_wait(sm90_shared(&bars.full[s]), i / STAGES & 1);
            for (uint32_t r = 0; r < CLUSTER; r++)
                if (CLUSTER == 1)
                    sm90_mbar_arrive(sm90_shared(&bars.empty[s]));
                else
                    sm90_mbar_arrive_at(sm90_shared(&bars.empty[s]), r);
        }
    }
    __syncthreads();
    if (CLUSTER > 1)
        cluster_sync(); /* nobody's memory goes while others still write to it */
}

/* ---- 2: products, a stream of device memory, decode's products ---- */

enum beside { NOTHING, STREAM, STREAM_MMA, STREAM_WGMMA };

/* Shared memory: Q of each consumer [2 blocks][64 rows][128 bytes], K and V [2 blocks][128 rows][128 bytes], four rings of four
 * stages of 8 KiB: rows of 128 bytes, swizzled, 32 tokens by 128 elements. */
constexpr uint32_t Q_BYTES = 16384, K_BYTES = 32768, RING_AT = 2 * Q_BYTES + 2 * K_BYTES, RING_BYTES = 32768,
                   PIECE = 8192, PIECES = 4, SM_BYTES = RING_AT + 4 * RING_BYTES, THREADS = 384;

struct sm_shared {
    alignas(1024) char p[1024]; /* weights of decode's wgmma: 8 rows of 128 bytes */
    alignas(8) uint64_t full[4][PIECES];
    uint32_t ended;
};

__device__ __forceinline__ void wgmma_n8(float (&d)[4], uint64_t a, uint64_t b, bool add, bool a_across)
{
    if (a_across)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 1, 0;\n}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "l"(a), "l"(b), "r"((uint32_t)add));
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "l"(a), "l"(b), "r"((uint32_t)add));
}

/* S += Q K, then O += P V, over and over, 16 products of 64 clocks each, committed GROUP at a time. A sum that began anew each time would be dropped by
 * ptxas, all but the last. */
template <uint32_t GROUP> __device__ __forceinline__ float multiply(uint32_t smem, uint32_t group, uint32_t tiles)
{
    float s[64], o[64];
    uint32_t p[32];
    const uint32_t q = smem + group * Q_BYTES, k = smem + 2 * Q_BYTES, v = k + K_BYTES;
#pragma unroll
    for (uint32_t i = 0; i < 64; i++)
        s[i] = o[i] = 0;
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) /* weights of up to 1, no two the same */
        p[i] = sm90_pack<true>(1.f / (1 + threadIdx.x % 61 + i), 1.f / (2 + threadIdx.x % 53 + 3 * i));
    for (uint32_t t = 0; t < tiles; t++) {
        sm90_pin(s);
        sm90_pin(o);
        sm90_pin(p);
        sm90_wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            sm90_wgmma_ss<true>(s, sm90_desc(q + i / 4 * 64 * 128 + i % 4 * 32, 16),
                                sm90_desc(k + i / 4 * 128 * 128 + i % 4 * 32, 16), 1);
            if ((i + 1) % GROUP == 0)
                sm90_wgmma_commit();
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            sm90_wgmma_rs<true>(o, p + i * 4, sm90_desc(v + i * 16 * 128, K_BYTES / 2), 1);
            if ((i + 1) % GROUP == 0)
                sm90_wgmma_commit();
        }
        sm90_wgmma_wait<0>();
    }
    sm90_pin(s);
    sm90_pin(o);
    return s[0] + s[63] + o[0] + o[63];
}

/* Decode's state for 8 packed rows: a warp's with mma.sync, a warpgroup's with wgmma. */
struct decode_state {
    uint32_t q[8][2], p[2][2];
    float o[8][4];
};

/* Byte of row `row`, 16-byte column `column` (of 16) of 32 rows in two blocks of 128 swizzled bytes. */
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t column)
{
    return column / 8 * 4096 + row * 128 + ((column ^ row) & 7) * 16;
}

__device__ __forceinline__ void keys_by_mma(decode_state &x, uint32_t at)
{
    const uint32_t lane = threadIdx.x % 32;
    float s[2][4] = {};
#pragma unroll
    for (uint32_t k = 0; k < 8; k++)
#pragma unroll
        for (uint32_t m = 0; m < 2; m++) {
            uint32_t r[4];
            sm90_ldmatrix(r, at + swizzled(m * 16 + lane % 16, k * 2 + lane / 16));
            sm90_mma<true>(s[m], r, x.q[k][0], x.q[k][1]);
        }
#pragma unroll
    for (uint32_t m = 0; m < 2; m++)
#pragma unroll
        for (uint32_t h = 0; h < 2; h++)
            x.p[m][h] = sm90_transposed(sm90_pack<true>(sm90_exp2(s[m][h * 2]), sm90_exp2(s[m][h * 2 + 1])));
}

__device__ __forceinline__ void values_by_mma(decode_state &x, uint32_t at)
{
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t m = 0; m < 2; m++)
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            uint32_t r[4];
            sm90_ldmatrix_trans(r, at + swizzled(m * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
            sm90_mma<true>(x.o[i], r, x.p[m][0], x.p[m][1]);
        }
}

/* 128 keys and their values, one piece per warp each: whole rings of keys, then whole rings of values. `q`: 8 rows. */
__device__ __forceinline__ void tile_by_wgmma(float (&o)[2][4], uint32_t keys, uint32_t values, uint32_t q,
                                              sm_shared *sh)
{
    float s[2][4];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    sm90_wgmma_fence();
#pragma unroll
    for (uint32_t m = 0; m < 2; m++) /* 64 keys: a box of 64 rows and 64 elements, twice */
#pragma unroll
        for (uint32_t k = 0; k < 8; k++)
            wgmma_n8(s[m], sm90_desc(keys + m * 16384 + k / 4 * 8192 + k % 4 * 32, 16),
                     sm90_desc(q + k / 4 * 8192 + k % 4 * 32, 16), k > 0, false);
    sm90_wgmma_commit();
    sm90_wgmma_wait<0>();
#pragma unroll
    for (uint32_t m = 0; m < 2; m++) {
        sm90_pin(s[m]);
        /* rows (heads) of 64 keys: key = warp * 16 + lane / 4 (+ 8), head = lane % 4 * 2 (+ 1) */
        if (m)
            sm90_bar_sync(2, 128);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t key = warp * 16 + lane / 4 + i / 2 * 8, head = lane % 4 * 2 + i % 2;
            *(uint16_t *)(sh->p + head * 128 + ((key / 8 ^ head) & 7) * 16 + key % 8 * 2) =
                (uint16_t)sm90_pack<true>(sm90_exp2(s[m][i]), 0);
        }
        sm90_async_fence();
        sm90_bar_sync(2, 128);
        sm90_wgmma_fence();
#pragma unroll
        for (uint32_t d = 0; d < 2; d++)
#pragma unroll
            for (uint32_t k = 0; k < 4; k++)
                wgmma_n8(o[d], sm90_desc(values + m * 16384 + d * 8192 + k * 16 * 128, 8192),
                         sm90_desc(sm90_shared(sh->p) + k * 32, 16), true, true);
        sm90_wgmma_commit();
        sm90_wgmma_wait<0>();
    }
    sm90_pin(o[0]);
    sm90_pin(o[1]);
}

/* What a warp reads in all while the products run, or `pieces` of it. Returns how many pieces have come. */
template <beside BESIDE>
__device__ __forceinline__ uint32_t stream(uint32_t smem, sm_shared *sh, const char *at, uint64_t bytes,
                                           uint32_t pieces, float *left)
{
    const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, ring = smem + RING_AT;
    const uint64_t share = bytes / gridDim.x / 4 / PIECE * PIECE;
    const char *from = at + (blockIdx.x * 4 + warp) * share;
    decode_state x = {};
    float o[2][4] = {};
    uint32_t asked = 0, n = 0;
    auto ask = [&] {
        /* With wgmma a stage is of all warps: 128 keys, or their values. */
        uint32_t stage = asked % PIECES, dst = BESIDE == STREAM_WGMMA ? ring + stage * RING_BYTES + warp * PIECE
                                                                      : ring + warp * RING_BYTES + stage * PIECE;
        if (lane == 0) {
            sm90_mbar_expect(sm90_shared(&sh->full[warp][stage]), PIECE);
            copy_bytes(dst, from + (uint64_t)asked * PIECE % share, PIECE, sm90_shared(&sh->full[warp][stage]));
        }
        asked++;
    };
    auto arrived = [&](uint32_t i) {
        if (BESIDE == STREAM_WGMMA)
            for (uint32_t w = 0; w < 4; w++)
                sm90_mbar_wait(sm90_shared(&sh->full[w][i % PIECES]), i / PIECES & 1);
        else
            sm90_mbar_wait(sm90_shared(&sh->full[warp][i % PIECES]), i / PIECES & 1);
    };
#pragma unroll
    for (uint32_t k = 0; k < 8; k++)
        x.q[k][0] = x.q[k][1] = sm90_pack<true>(0.01f * lane, -0.02f * k);
    while (asked < PIECES)
        ask();
    for (;; n += 2) {
        arrived(n);
        if (BESIDE == STREAM_MMA)
            keys_by_mma(x, ring + warp * RING_BYTES + n % PIECES * PIECE);
        if (BESIDE != STREAM_WGMMA) {
            __syncwarp();
            ask();
        }
        arrived(n + 1);
        if (BESIDE == STREAM_MMA)
            values_by_mma(x, ring + warp * RING_BYTES + (n + 1) % PIECES * PIECE);
        if (BESIDE == STREAM_WGMMA) {
            tile_by_wgmma(o, ring + n % PIECES * RING_BYTES, ring + (n + 1) % PIECES * RING_BYTES, smem, sh);
            sm90_bar_sync(2, 128);
            ask();
        }
        __syncwarp();
        ask();
        uint32_t end = pieces ? n + 2 >= pieces : *(volatile uint32_t *)&sh->ended;
        if (BESIDE == STREAM_WGMMA) { /* all warps end at the same piece */
            if (threadIdx.x % 128 == 0)
                *(volatile uint32_t *)&sh->p[0] = end;
            sm90_bar_sync(2, 128);
            end = *(volatile uint32_t *)&sh->p[0];
            sm90_bar_sync(2, 128);
        }
        if (__shfl_sync(0xffffffff, end, 0))
            break;
    }
    for (n += 2; n < asked; n++)
        arrived(n);
    *left = x.o[0][0] + x.o[7][3] + o[0][0] + o[1][3] + (float)x.p[1][1];
    return n;
}

/* tiles: of products per consumer, 0 for none; pieces: of the stream per warp where there are no products. *read: bytes. */
template <beside BESIDE, uint32_t GROUP>
__global__ void __launch_bounds__(THREADS, 1)
    together(const char *at, uint64_t bytes, uint32_t tiles, uint32_t pieces, unsigned long long *read, float *sink)
{
    extern __shared__ __align__(1024) char memory[];
    __shared__ sm_shared sh;
    const uint32_t smem = sm90_shared(memory);
    float left = 0;
    for (uint32_t i = threadIdx.x * 16; i < SM_BYTES; i += THREADS * 16)
        *(uint4 *)(memory + i) = *(const uint4 *)(at + i);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 4 * PIECES; i++)
            sm90_mbar_init(sm90_shared(&sh.full[i / PIECES][i % PIECES]), 1);
        sm90_mbar_init_fence();
        sh.ended = 0;
    }
    sm90_async_fence();
    __syncthreads();
    if (threadIdx.x < 256) {
        sm90_regs_more<200>();
        if (tiles) {
            left = multiply<GROUP>(smem, threadIdx.x / 128, tiles);
            sm90_bar_sync(1, 256);
            if (threadIdx.x == 0)
                *(volatile uint32_t *)&sh.ended = 1;
        }
    } else {
        sm90_regs_less<104>();
        uint32_t n = BESIDE == NOTHING ? 0 : stream<BESIDE>(smem, &sh, at, bytes, pieces, &left);
        if (threadIdx.x % 32 == 0 && n)
            atomicAdd(read, (unsigned long long)n * PIECE);
    }
    if (left == 1.25e-30f)
        *sink = left; /* keeps the sums */
}

/* ---- measuring ---- */

struct bench {
    draw_power power;
    cudaStream_t stream;
    cudaEvent_t begin, end;
    uint32_t sms;
    char *memory;
    uint64_t bytes;
    unsigned long long *read;
    float *sink;
    CUtensorMap map; /* [L2_ROWS][128] of memory */
};

void describe(bench *b)
{
    void *fn = NULL;
    cudaDriverEntryPointQueryResult found;
    CUDA_MUST(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &found));
    const cuuint64_t dims[2] = {ROW_BYTES / 2, L2_ROWS}, strides[1] = {ROW_BYTES};
    const cuuint32_t box[2] = {64, BOX_ROWS}, every[2] = {1, 1};
    VMM_MUST(((decltype(&cuTensorMapEncodeTiled))fn)(&b->map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, b->memory, dims,
                                                     strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

template <typename F> double median_us(bench *b, F launch)
{
    samples s;
    for (uint32_t i = 0; i < ROUNDS + 1; i++) {
        float ms;
        CUDA_MUST(cudaEventRecord(b->begin, b->stream));
        launch();
        CUDA_MUST(cudaEventRecord(b->end, b->stream));
        CUDA_MUST(cudaEventSynchronize(b->end));
        CUDA_MUST(cudaEventElapsedTime(&ms, b->begin, b->end));
        if (i)
            s.us.push_back(ms * 1e3);
    }
    return sample_at(&s, 0.5);
}

template <typename K, typename... A>
void launch(bench *b, K kernel, uint32_t blocks, uint32_t cluster, uint32_t threads, size_t shared, A... args)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr = {};
    attr.id = cudaLaunchAttributeClusterDimension;
    attr.val.clusterDim.x = cluster;
    attr.val.clusterDim.y = attr.val.clusterDim.z = 1;
    cfg.gridDim = dim3(blocks);
    cfg.blockDim = dim3(threads);
    cfg.dynamicSmemBytes = shared;
    cfg.stream = b->stream;
    cfg.attrs = &attr;
    cfg.numAttrs = 1;
    CUDA_MUST(cudaLaunchKernelEx(&cfg, kernel, args...));
}

/* How many blocks of the kernel are there at once, in whole clusters. */
template <typename K> uint32_t blocks_at_once(K kernel, uint32_t cluster, size_t shared)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr = {};
    int clusters = 0;
    attr.id = cudaLaunchAttributeClusterDimension;
    attr.val.clusterDim.x = cluster;
    attr.val.clusterDim.y = attr.val.clusterDim.z = 1;
    cfg.gridDim = dim3(cluster);
    cfg.blockDim = dim3(64);
    cfg.dynamicSmemBytes = shared;
    cfg.attrs = &attr;
    cfg.numAttrs = 1;
    CUDA_MUST(cudaOccupancyMaxActiveClusters(&clusters, kernel, &cfg));
    return (uint32_t)clusters * cluster;
}

template <uint32_t CLUSTER> void l2_row(bench *b, const char *name, uint32_t apart)
{
    const size_t shared = STAGES * STAGE_BYTES;
    CUDA_MUST(cudaFuncSetAttribute(from_l2<CLUSTER>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    const uint32_t blocks = blocks_at_once(from_l2<CLUSTER>, CLUSTER, shared);
    auto go = [&] { launch(b, from_l2<CLUSTER>, blocks, CLUSTER, 64, shared, b->map, L2_STAGES, apart); };
    const double bytes = (double)blocks * L2_STAGES * STAGE_BYTES, us = median_us(b, go);
    printf("%u SMs for each other, %-26s %3u SMs: %6.2f TB/s arrive, %5.2f leave L2", CLUSTER, name, blocks,
           bytes / us * 1e-6, bytes / us * 1e-6 / CLUSTER);
    if (b->power.ms) {
        draw_result d = draw_of(&b->power, b->stream, go);
        printf(" | %6.2f TB/s, %3.0f W, %4.0f MHz, %3.0f B per clock and SM, %4.0f pJ/B", bytes / d.us * 1e-6, d.watts,
               d.mhz, bytes / d.us / d.mhz / blocks, d.mj * 1e9 / bytes);
    }
    printf("\n");
}

template <beside BESIDE, uint32_t GROUP = 8> void together_row(bench *b, const char *name, uint32_t tiles)
{
    const uint32_t pieces = tiles ? 0 : 4096;
    const double flops = 2.0 * b->sms * tiles * 16 * 64 * 128 * 16 * 2;
    CUDA_MUST(
        cudaFuncSetAttribute(together<BESIDE, GROUP>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)SM_BYTES));
    auto go = [&] {
        launch(b, together<BESIDE, GROUP>, b->sms, 1, THREADS, SM_BYTES, (const char *)b->memory, b->bytes, tiles,
               pieces, b->read, b->sink);
    };
    unsigned long long bytes = 0;
    double us = median_us(b, go);
    auto clear = [&] { CUDA_MUST(cudaMemset(b->read, 0, sizeof *b->read)); };
    auto fetch = [&] { CUDA_MUST(cudaMemcpy(&bytes, b->read, sizeof bytes, cudaMemcpyDeviceToHost)); };
    clear();
    go();
    CUDA_MUST(cudaStreamSynchronize(b->stream));
    fetch();
    printf("%-44s %4.0f TFLOP/s, %4.2f TB/s", name, flops / us * 1e-6, (double)bytes / us * 1e-6);
    if (b->power.ms) {
        clear();
        uint32_t n = 0;
        draw_result d = draw_of(&b->power, b->stream, [&] {
            go();
            n++;
        });
        fetch();
        double per_launch = (double)bytes / n;
        printf(" | %4.0f TFLOP/s (%2.0f %% of 4096 a clock), %4.2f TB/s, %3.0f W, %4.0f MHz, %6.1f mJ of %6.0f us",
               flops / d.us * 1e-6, 100 * flops / d.us / d.mhz / b->sms / 4096, per_launch / d.us * 1e-6, d.watts,
               d.mhz, d.mj, d.us);
    }
    printf("\n");
}
} // namespace

int main(int argc, char **argv)
{
    bench b = {};
    cudaDeviceProp p;
    if (argc == 3 && !strcmp(argv[1], "--power"))
        b.power.ms = (uint32_t)atoi(argv[2]);
    if (argc != 1 && !b.power.ms) {
        fprintf(stderr, "usage: %s [--power MS]\n", argv[0]);
        return 2;
    }
    CUDA_MUST(cudaGetDeviceProperties(&p, 0));
    if (p.major != 9) {
        fprintf(stderr, "%s: compute capability %d.%d, expected 9.0\n", p.name, p.major, p.minor);
        return 77;
    }
    print_device();
    if (b.power.ms)
        draw_start(&b.power);
    b.sms = (uint32_t)p.multiProcessorCount;
    b.bytes = 4ull << 30;
    CUDA_MUST(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    CUDA_MUST(cudaEventCreate(&b.begin));
    CUDA_MUST(cudaEventCreate(&b.end));
    CUDA_MUST(cudaMalloc(&b.memory, b.bytes));
    CUDA_MUST(cudaMalloc(&b.read, sizeof *b.read));
    CUDA_MUST(cudaMalloc(&b.sink, sizeof *b.sink));
    draw_fill<<<1024, 256>>>((uint16_t *)b.memory, b.bytes / 2);
    CUDA_MUST(cudaDeviceSynchronize());
    describe(&b);

    printf("from L2 (%u MiB, boxes of %u KiB)\n", L2_BYTES >> 20, BOX_BYTES >> 10);
    l2_row<1>(&b, "all at the same place", 0);
    l2_row<2>(&b, "all at the same place", 0);
    l2_row<4>(&b, "all at the same place", 0);
    l2_row<1>(&b, "1 MiB and more apart", 4224);
    l2_row<2>(&b, "1 MiB and more apart", 4224);
    l2_row<4>(&b, "1 MiB and more apart", 4224);

    printf("products and a stream\n");
    const uint32_t tiles = 2000;
    together_row<NOTHING>(&b, "products", tiles);
    together_row<STREAM>(&b, "stream", 0);
    together_row<STREAM_MMA>(&b, "stream with mma.sync", 0);
    together_row<STREAM_WGMMA>(&b, "stream with wgmma", 0);
    together_row<STREAM>(&b, "products beside a stream", tiles);
    together_row<STREAM_MMA>(&b, "products beside a stream with mma.sync", tiles);
    together_row<STREAM_WGMMA>(&b, "products beside a stream with wgmma", tiles);
    together_row<STREAM_MMA, 2>(&b, "products by twos, a stream with mma.sync", tiles);
    together_row<STREAM_MMA, 1>(&b, "products by ones, a stream with mma.sync", tiles);
    return 0;
}
