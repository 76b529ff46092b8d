/* bench_kv_tlb.cu - what the reach of the GPU's TLBs costs: latency of an access and bandwidth, by the number of 2 MiB pages.
 *
 *     bin/bench_kv_tlb [GiB of pages, default 64]
 *
 * Latency: one thread follows a chain with one line in each page; the same chain in lines side by side is the time without
 * TLB misses (both fit the L2 cache). Bandwidth: a run of bytes out of each of N pages, at another offset in each repeat.
 */
#include <random>

#include "bench_cuda.h"

constexpr unsigned THREADS = 256;
constexpr unsigned UNROLL = 8;
constexpr uint64_t LINE = 128;

/* Each line holds the byte offset of the next one. */
static __global__ void chase(const uint8_t *base, unsigned steps, uint64_t *out)
{
    uint64_t at = 0;
    for (unsigned i = 0; i < steps; i++)
        at = *(const volatile uint64_t *)(base + at);
    long long t0 = clock64();
    for (unsigned i = 0; i < steps; i++)
        at = __ldcg((const unsigned long long *)(base + at));
    long long t1 = clock64();
    out[0] = (uint64_t)(t1 - t0);
    out[1] = at;
}

static __global__ void set_lines(uint8_t *base, const uint64_t *from, const uint64_t *to, unsigned n)
{
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        *(uint64_t *)(base + from[i]) = to[i];
}

/* CTAs share the runs in order: vector j is vector j % run of the run in page j / run; pages are `stride` bytes apart. */
static __global__ void __launch_bounds__(THREADS)
    read_runs(const uint8_t *base, uint64_t stride, unsigned run_shift, uint64_t vecs, uint64_t offset, uint32_t *sums)
{
    uint64_t share = (vecs + gridDim.x - 1) / gridDim.x;
    uint64_t last = min(vecs, (blockIdx.x + 1) * share), mask = (1ull << run_shift) - 1;
    uint32_t sum = 0;
    for (uint64_t i = blockIdx.x * share + threadIdx.x; i < last; i += THREADS * UNROLL) {
        uint4 x[UNROLL];
#pragma unroll
        for (unsigned u = 0; u < UNROLL; u++) {
            uint64_t j = i + u * THREADS;
            x[u] = j < last ? __ldcs((const uint4 *)(base + (j >> run_shift) * stride + offset + (j & mask) * 16))
                            : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (unsigned u = 0; u < UNROLL; u++)
            sum += x[u].x + x[u].y + x[u].z + x[u].w;
    }
    if (sum == 0x12345678)
        sums[blockIdx.x] = sum;
}

struct bench {
    struct vmm v;
    uint64_t pages;
    unsigned sms;
    uint64_t *from, *to, *out;
    uint32_t *sums;
    uint4 *flush;
    std::vector<vmm_page> page; /* in random order */
    uint8_t *base[2];           /* the one allocation; the pages in random order */
};

/* Clocks of one step of a chain through n lines; line i lies at i * stride, or at an offset of its own in the
 * page that begins there. */
static double chase_clocks(struct bench *b, uint8_t *base, unsigned n, uint64_t stride)
{
    std::mt19937 rng(n);
    std::vector<uint32_t> order(n);
    std::vector<uint64_t> at(n), to(n);
    for (unsigned i = 0; i < n; i++) {
        order[i] = i;
        at[i] = i * stride + (i && stride > LINE ? rng() % (PAGE_BYTES / LINE) * LINE : 0);
    }
    std::shuffle(order.begin() + 1, order.end(), rng);
    for (unsigned i = 0; i < n; i++)
        to[order[i]] = at[order[(i + 1) % n]];
    CUDA_MUST(cudaMemcpy(b->from, at.data(), n * sizeof at[0], cudaMemcpyHostToDevice));
    CUDA_MUST(cudaMemcpy(b->to, to.data(), n * sizeof to[0], cudaMemcpyHostToDevice));
    set_lines<<<64, 256>>>(base, b->from, b->to, n);
    unsigned steps = std::max(n, 4096u);
    chase<<<1, 1>>>(base, steps, b->out);
    uint64_t out[2];
    CUDA_MUST(cudaGetLastError());
    CUDA_MUST(cudaMemcpy(out, b->out, sizeof out, cudaMemcpyDeviceToHost));
    if (out[1] != at[order[2ull * steps % n]]) {
        fprintf(stderr, "bench_kv_tlb: FAIL: the chain of %u lines ended at %llu\n", n, (unsigned long long)out[1]);
        exit(1);
    }
    return (double)out[0] / steps;
}

static void bench_latency(struct bench *b)
{
    printf("\n## latency of one access, SM clocks\n%7s %8s | %12s | %12s | %12s\n", "pages", "GiB", "side by side",
           "cudaMalloc", "pages");
    for (uint64_t n = 16; n <= b->pages; n *= 2)
        printf("%7llu %8.2f | %12.0f | %12.0f | %12.0f\n", (unsigned long long)n, (double)n * PAGE_BYTES / (1 << 30),
               chase_clocks(b, b->base[0], (unsigned)n, LINE), chase_clocks(b, b->base[0], (unsigned)n, PAGE_BYTES),
               chase_clocks(b, b->base[1], (unsigned)n, PAGE_BYTES));
}

static double runs_gbps(struct bench *b, uint8_t *base, uint64_t stride, uint64_t pages, uint64_t run)
{
    cudaEvent_t begin, end;
    struct samples s;
    CUDA_MUST(cudaEventCreate(&begin));
    CUDA_MUST(cudaEventCreate(&end));
    for (unsigned n = 0; n < 11; n++) {
        float ms;
        uint64_t offset = n * 5 * run % PAGE_BYTES;
        flush_read<<<b->sms * 8, THREADS>>>(b->flush, b->sums);
        CUDA_MUST(cudaEventRecord(begin));
        read_runs<<<b->sms * 16, THREADS>>>(base, stride, (unsigned)__builtin_ctzll(run / 16), pages * run / 16, offset,
                                            b->sums);
        CUDA_MUST(cudaEventRecord(end));
        CUDA_MUST(cudaEventSynchronize(end));
        CUDA_MUST(cudaEventElapsedTime(&ms, begin, end));
        if (n >= 2)
            s.us.push_back(ms * 1e3);
    }
    CUDA_MUST(cudaEventDestroy(begin));
    CUDA_MUST(cudaEventDestroy(end));
    return (double)(pages * run) / sample_at(&s, 0.5) * 1e-3;
}

static void bench_runs(struct bench *b)
{
    printf("\n## bandwidth of runs, one in each page, GB/s: cudaMalloc, pages (cells of 64 MiB and more)\n%7s |",
           "pages");
    for (uint64_t run = 2048; run <= PAGE_BYTES; run *= 4)
        printf(" %8llu KiB  |", (unsigned long long)run >> 10);
    printf("\n");
    for (uint64_t n = 512; n <= b->pages; n *= 4) {
        printf("%7llu |", (unsigned long long)n);
        for (uint64_t run = 2048; run <= PAGE_BYTES; run *= 4)
            if (n * run >= 64u << 20)
                printf(" %6.0f %6.0f |", runs_gbps(b, b->base[0], PAGE_BYTES, n, run),
                       runs_gbps(b, b->base[1], PAGE_BYTES, n, run));
            else
                printf(" %13s |", "");
        printf("\n");
    }
}

/* The same pages, one at each multiple of a larger stride: ranges that are reserved for much more than they hold. */
static void bench_sparse(struct bench *b)
{
    printf(
        "\n## one page at each multiple of a stride: latency in SM clocks; GB/s of a run of 64 KiB in each page\n%7s |",
        "pages");
    for (uint64_t stride = PAGE_BYTES; stride <= 256 * PAGE_BYTES; stride *= 4)
        printf(" %8llu MiB |", (unsigned long long)stride >> 20);
    printf("\n");
    for (uint64_t n = 1024; n <= std::min<uint64_t>(b->pages, 16384); n *= 4) {
        printf("%7llu |", (unsigned long long)n);
        for (uint64_t stride = PAGE_BYTES; stride <= 256 * PAGE_BYTES; stride *= 4) {
            CUdeviceptr at;
            VMM_MUST(b->v.reserve(&at, n * stride, PAGE_BYTES, 0, 0));
            for (uint64_t i = 0; i < n; i++) {
                VMM_MUST(b->v.map(at + i * stride, PAGE_BYTES, 0, b->page[i], 0));
                VMM_MUST(b->v.set_access(at + i * stride, PAGE_BYTES, &b->v.access, 1));
            }
            double clocks = chase_clocks(b, (uint8_t *)at, (unsigned)n, stride);
            printf(" %5.0f %6.0f |", clocks, runs_gbps(b, (uint8_t *)at, stride, n, 65536));
            for (uint64_t i = 0; i < n; i++)
                VMM_MUST(b->v.unmap(at + i * stride, PAGE_BYTES));
            VMM_MUST(b->v.address_free(at, n * stride));
        }
        printf("\n");
    }
}

static uint8_t *map_pages(struct bench *b)
{
    CUdeviceptr at;
    b->page.resize(b->pages);
    for (vmm_page &p : b->page)
        VMM_MUST(b->v.create(&p, PAGE_BYTES, &b->v.prop, 0));
    std::shuffle(b->page.begin(), b->page.end(), std::mt19937(1));
    VMM_MUST(b->v.reserve(&at, b->pages * PAGE_BYTES, PAGE_BYTES, 0, 0));
    for (uint64_t i = 0; i < b->pages; i++)
        VMM_MUST(b->v.map(at + i * PAGE_BYTES, PAGE_BYTES, 0, b->page[i], 0));
    VMM_MUST(b->v.set_access(at, b->pages * PAGE_BYTES, &b->v.access, 1));
    CUDA_MUST(cudaMemset((void *)at, 0x5a, b->pages * PAGE_BYTES));
    return (uint8_t *)at;
}

int main(int argc, char **argv)
{
    struct bench b = {};
    struct cudaDeviceProp prop;
    b.pages = (uint64_t)((argc > 1 ? atof(argv[1]) : 64) * (1 << 30) / PAGE_BYTES);
    vmm_load(&b.v);
    print_device();
    CUDA_MUST(cudaGetDeviceProperties(&prop, 0));
    b.sms = (unsigned)prop.multiProcessorCount;
    CUDA_MUST(cudaMalloc(&b.from, b.pages * sizeof *b.from));
    CUDA_MUST(cudaMalloc(&b.to, b.pages * sizeof *b.to));
    CUDA_MUST(cudaMalloc(&b.out, 2 * sizeof *b.out));
    CUDA_MUST(cudaMalloc(&b.sums, 65536 * sizeof *b.sums));
    CUDA_MUST(cudaMalloc(&b.flush, FLUSH_BYTES));
    CUDA_MUST(cudaMemset(b.flush, 0x5a, FLUSH_BYTES));
    CUDA_MUST(cudaMalloc(&b.base[0], b.pages * PAGE_BYTES));
    CUDA_MUST(cudaMemset(b.base[0], 0x5a, b.pages * PAGE_BYTES));
    b.base[1] = map_pages(&b);
    bench_latency(&b);
    bench_runs(&b);
    bench_sparse(&b);
    CUDA_MUST(cudaDeviceSynchronize());
    return 0;
}
