/* bench_kv_layout.cu - which layout of K and V is best read by a decode step, and what scattered 2 MiB pages cost it.
 *
 *     bin/bench_kv_layout [KV heads, default 8] [GiB of pages, default 88] [seconds at most, default 150] [CSV file]
 *
 * Shape: Llama-3-8B, L = 32, D = 128, bf16; HK = 8, or 4, 2, 1 as on a rank of 2, 4, 8. Layouts of one sequence:
 *
 *     per-layer   [layer][k|v] in address ranges of their own, each [token][HK][D]
 *     token-all   [token][layer][k|v][HK][D]
 *     token-G     [layer / G] in ranges of their own, each [token][G][k|v][HK][D]
 *     page-block  [page][layer][k|v][tokens in the page][HK][D]
 *
 * Backing: one cudaMalloc, or pages of cuMemCreate in random order under one reserved range per sequence.
 * A cell is (tokens, sequences, layout). Timed: one layer of all sequences with the L2 cache flushed before, and all layers
 * one after the other; by CTAs that read all heads of a token (row) and by CTAs of one head (head), which is what
 * flash-decoding does. GB/s are of useful bytes. Sums are checked against the host in every cell of up to 16 MiB a layer.
 */
#include <random>

#include "bench_cuda.h"

constexpr unsigned L = 32, D = 128, ELEM = 2;
constexpr unsigned HEAD_BYTES = D * ELEM;
constexpr unsigned HEAD_VECS = HEAD_BYTES / 16;
constexpr unsigned MAX_TOKENS = 128u << 10; /* what a sequence's range is reserved for */
constexpr unsigned THREADS = 256;
constexpr unsigned UNROLL = 4; /* loads of K and as many of V in flight per thread */
constexpr unsigned MAX_CTAS = 1u << 17;
constexpr unsigned REPEATS = 9, REPEATS_ALL = 3;
constexpr uint64_t CHECK_BYTES = 16u << 20;

struct layout {
    const char *name;
    unsigned group; /* layers in a range; 0: K and V of a layer have a range each */
    bool blocked;   /* layers apart within a page */
};

static const struct layout LAYOUTS[] = {{"per-layer", 0, false}, {"token-all", L, false}, {"token-2", 2, false},
                                        {"token-4", 4, false},   {"token-8", 8, false},   {"page-block", L, true}};
constexpr unsigned N_LAYOUTS = sizeof LAYOUTS / sizeof *LAYOUTS;

static const unsigned CELLS[][2] = {
    /* tokens, sequences */
    {1024, 1},   {4096, 1},  {16384, 1}, {65536, 1},  {131072, 1}, {1024, 8},   {4096, 8},   {16384, 8},
    {131072, 4}, {1024, 64}, {4096, 64}, {16384, 64}, {1024, 256}, {2048, 256}, {4096, 256}, {16384, 256}};
constexpr unsigned N_CELLS = sizeof CELLS / sizeof *CELLS;

enum { ROW_ONE, ROW_ALL, HEAD_ONE, HEAD_ALL, N_METRICS };
static const char *const METRICS[] = {"row, one layer, L2 flushed", "row, all layers in turn",
                                      "head, one layer, L2 flushed", "head, all layers in turn"};

/* One layer of all sequences. Byte of token t: base + offset + (t >> shift) * hi + (t & mask) * lo. */
struct kv_read {
    const uint8_t *const *base; /* [sequence][range] */
    unsigned ranges, range_k, range_v;
    unsigned shift;
    uint64_t off_k, off_v, hi, lo;
    unsigned tokens, split_tokens, splits;
    unsigned heads_apart; /* CTAs beside each other that read one token's heads: 1 or HK */
    unsigned vec_shift;   /* log2 of the 16-byte vectors that a CTA reads of a token's K */
};

/* Grid: [sequence][heads_apart][splits], flat. A CTA reads K and V of split_tokens tokens and writes the sum of their
 * words; neighbouring threads read neighbouring vectors of a token. */
static __global__ void __launch_bounds__(THREADS) read_kv(struct kv_read p, uint32_t *sums)
{
    unsigned split = blockIdx.x % p.splits, item = blockIdx.x / p.splits;
    unsigned head = item % p.heads_apart, seq = item / p.heads_apart;
    const uint8_t *k = p.base[(size_t)seq * p.ranges + p.range_k] + p.off_k + head * HEAD_BYTES;
    const uint8_t *v = p.base[(size_t)seq * p.ranges + p.range_v] + p.off_v + head * HEAD_BYTES;
    unsigned first = split * p.split_tokens;
    unsigned last = min(first + p.split_tokens, p.tokens);
    unsigned mask = (1u << p.shift) - 1, vec_mask = (1u << p.vec_shift) - 1;
    uint32_t sum = 0;
    for (unsigned i = (first << p.vec_shift) + threadIdx.x; i < last << p.vec_shift; i += THREADS * UNROLL) {
        uint4 x[2 * UNROLL];
#pragma unroll
        for (unsigned u = 0; u < UNROLL; u++) {
            unsigned j = i + u * THREADS, t = j >> p.vec_shift;
            x[u] = x[u + UNROLL] = make_uint4(0, 0, 0, 0);
            if (t < last) {
                uint64_t at = (t >> p.shift) * p.hi + (t & mask) * p.lo + (j & vec_mask) * 16;
                x[u] = __ldcs((const uint4 *)(k + at));
                x[u + UNROLL] = __ldcs((const uint4 *)(v + at));
            }
        }
#pragma unroll
        for (unsigned u = 0; u < 2 * UNROLL; u++)
            sum += x[u].x + x[u].y + x[u].z + x[u].w;
    }
    __shared__ uint32_t part[THREADS / 32];
    sum = __reduce_add_sync(~0u, sum);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned w = 1; w < THREADS / 32; w++)
            sum += part[w];
        sums[blockIdx.x] = sum;
    }
}

/* The reference: each CTA reads a contiguous share. */
static __global__ void __launch_bounds__(THREADS) read_plain(const uint4 *at, size_t vecs, uint32_t *sums)
{
    size_t share = vecs / gridDim.x;
    const uint4 *mine = at + blockIdx.x * share;
    uint32_t sum = 0;
    for (size_t i = threadIdx.x; i < share; i += THREADS * 8) {
        uint4 x[8];
#pragma unroll
        for (unsigned u = 0; u < 8; u++)
            x[u] = i + u * THREADS < share ? __ldcs(mine + i + u * THREADS) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (unsigned u = 0; u < 8; u++)
            sum += x[u].x + x[u].y + x[u].z + x[u].w;
    }
    atomicAdd(&sums[blockIdx.x], __reduce_add_sync(~0u, sum));
}

static __global__ void fill(uint32_t *at, uint64_t first_page, uint64_t words)
{
    for (uint64_t w = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; w < words; w += (uint64_t)gridDim.x * blockDim.x)
        at[w] = page_word(first_page, w);
}

struct bench {
    struct vmm v;
    unsigned heads, sms;
    uint64_t pages;             /* of the pool, or of the one allocation */
    std::vector<vmm_page> page; /* empty: one allocation stands behind everything */
    uint8_t *whole;
    uint4 *flush;
    uint32_t *sums;
    const uint8_t **bases; /* on the device */
    cudaEvent_t begin, end;
    double best; /* plain read, GB/s */
    double stop_us;
    unsigned checked, failures;
    FILE *csv;
};

/* Where the sequences of a cell stand. Page i of range r of sequence s is pool page page_of[(s * ranges + r) * per + i]. */
struct placed {
    const struct layout *how;
    unsigned tokens, seqs, ranges;
    uint64_t per, range_bytes; /* pages of a range that are there; addresses of it */
    std::vector<uint32_t> page_of;
    std::vector<uint8_t *> base;
    double map_us, unmap_us;
};

static uint64_t row_bytes(const struct bench *b)
{
    return (uint64_t)b->heads * HEAD_BYTES;
}

static unsigned page_tokens(const struct bench *b)
{
    return (unsigned)(PAGE_BYTES / (row_bytes(b) * 2 * L));
}

static uint64_t range_pages(const struct bench *b, const struct layout *how, unsigned tokens)
{
    if (how->blocked)
        return (tokens + page_tokens(b) - 1) / page_tokens(b);
    uint64_t per_token = row_bytes(b) * (how->group ? 2 * how->group : 1);
    return (tokens * per_token + PAGE_BYTES - 1) / PAGE_BYTES;
}

static bool place(struct bench *b, struct placed *p, const struct layout *how, const unsigned *cell)
{
    p->how = how;
    p->tokens = cell[0];
    p->seqs = cell[1];
    p->ranges = how->group ? L / how->group : 2 * L;
    p->per = range_pages(b, how, p->tokens);
    p->range_bytes = range_pages(b, how, MAX_TOKENS) * PAGE_BYTES;
    uint64_t need = (uint64_t)p->seqs * p->ranges * p->per;
    if (need > b->pages)
        return false;
    p->page_of.resize(b->pages);
    for (uint32_t i = 0; i < b->pages; i++)
        p->page_of[i] = i;
    if (!b->page.empty())
        std::shuffle(p->page_of.begin(), p->page_of.end(), std::mt19937(p->tokens + p->seqs));
    p->page_of.resize(need);
    p->base.resize((size_t)p->seqs * p->ranges);
    double t = now_us();
    for (unsigned s = 0; s < p->seqs; s++) {
        CUdeviceptr at = 0;
        if (!b->page.empty())
            VMM_MUST(b->v.reserve(&at, p->ranges * p->range_bytes, PAGE_BYTES, 0, 0));
        for (unsigned r = 0; r < p->ranges; r++) {
            size_t n = (size_t)s * p->ranges + r;
            if (b->page.empty()) {
                p->base[n] = b->whole + n * p->per * PAGE_BYTES;
                continue;
            }
            CUdeviceptr from = at + r * p->range_bytes;
            p->base[n] = (uint8_t *)from;
            for (uint64_t i = 0; i < p->per; i++)
                VMM_MUST(b->v.map(from + i * PAGE_BYTES, PAGE_BYTES, 0, b->page[p->page_of[n * p->per + i]], 0));
            VMM_MUST(b->v.set_access(from, p->per * PAGE_BYTES, &b->v.access, 1));
        }
    }
    p->map_us = (now_us() - t) / (double)need;
    CUDA_MUST(cudaMemcpy(b->bases, p->base.data(), p->base.size() * sizeof p->base[0], cudaMemcpyHostToDevice));
    return true;
}

static void unplace(struct bench *b, struct placed *p)
{
    CUDA_MUST(cudaDeviceSynchronize());
    double t = now_us();
    for (size_t n = 0; n < p->base.size() && !b->page.empty(); n++) {
        VMM_MUST(b->v.unmap((CUdeviceptr)p->base[n], p->per * PAGE_BYTES));
        if (n % p->ranges == p->ranges - 1)
            VMM_MUST(b->v.address_free((CUdeviceptr)p->base[n - p->ranges + 1], p->ranges * p->range_bytes));
    }
    p->unmap_us = (now_us() - t) / (double)p->page_of.size();
}

static struct kv_read layer_read(const struct bench *b, const struct placed *p, unsigned layer, bool by_head)
{
    uint64_t row = row_bytes(b);
    struct kv_read r = {};
    r.base = b->bases;
    r.ranges = p->ranges;
    r.tokens = p->tokens;
    r.shift = 31;
    if (!p->how->group) {
        r.range_k = 2 * layer;
        r.range_v = r.range_k + 1;
        r.lo = row;
    } else if (!p->how->blocked) {
        r.range_k = r.range_v = layer / p->how->group;
        r.off_k = layer % p->how->group * 2 * row;
        r.off_v = r.off_k + row;
        r.lo = p->how->group * 2 * row;
    } else {
        r.shift = (unsigned)__builtin_ctz(page_tokens(b));
        r.off_k = layer * 2 * page_tokens(b) * row;
        r.off_v = r.off_k + page_tokens(b) * row;
        r.hi = PAGE_BYTES;
        r.lo = row;
    }
    r.heads_apart = by_head ? b->heads : 1;
    r.vec_shift = (unsigned)__builtin_ctz(HEAD_VECS * (by_head ? 1 : b->heads));
    /* About 16 CTAs for each SM, of 32 tokens at the least: a short sequence alone cannot fill the GPU. */
    uint64_t all = (uint64_t)p->tokens * p->seqs * r.heads_apart;
    uint64_t split = std::max<uint64_t>((all / (b->sms * 16) + 15) / 16 * 16, 32);
    r.split_tokens = (unsigned)std::min<uint64_t>(split, p->tokens);
    r.splits = (p->tokens + r.split_tokens - 1) / r.split_tokens;
    return r;
}

static unsigned read_launch(const struct bench *b, const struct placed *p, const struct kv_read *r)
{
    unsigned ctas = p->seqs * r->heads_apart * r->splits;
    if (ctas > MAX_CTAS) {
        fprintf(stderr, "bench_kv_layout: %u CTAs\n", ctas);
        exit(1);
    }
    read_kv<<<ctas, THREADS>>>(*r, b->sums);
    return ctas;
}

/* The sum by the host, from the layout's definition in the head of this file and not from kv_read. */
static uint32_t host_sum(const struct bench *b, const struct placed *p, unsigned layer)
{
    uint64_t row = row_bytes(b);
    unsigned g = p->how->group, pt = page_tokens(b);
    uint32_t sum = 0;
    for (unsigned s = 0; s < p->seqs; s++)
        for (unsigned kv = 0; kv < 2; kv++)
            for (uint64_t t = 0; t < p->tokens; t++) {
                uint64_t range = g ? layer / g : layer * 2 + kv;
                uint64_t at = g ? ((t * g + layer % g) * 2 + kv) * row : t * row;
                if (p->how->blocked)
                    at = t / pt * PAGE_BYTES + ((layer * 2 + kv) * pt + t % pt) * row;
                uint32_t page = p->page_of[(s * p->ranges + range) * p->per + at / PAGE_BYTES];
                for (uint64_t w = 0; w < row / 4; w++)
                    sum += page_word(page, at % PAGE_BYTES / 4 + w);
            }
    return sum;
}

static void check_sum(struct bench *b, const struct placed *p, unsigned layer, unsigned ctas)
{
    std::vector<uint32_t> part(ctas);
    CUDA_MUST(cudaMemcpy(part.data(), b->sums, ctas * sizeof part[0], cudaMemcpyDeviceToHost));
    uint32_t got = 0, want = host_sum(b, p, layer);
    for (uint32_t x : part)
        got += x;
    b->checked++;
    if (got != want && ++b->failures)
        printf("FAIL: %s, %u tokens, %u sequences, layer %u: sum %08x, expected %08x\n", p->how->name, p->tokens,
               p->seqs, layer, got, want);
}

static double elapsed_ms(const struct bench *b)
{
    float ms;
    CUDA_MUST(cudaEventRecord(b->end));
    CUDA_MUST(cudaEventSynchronize(b->end));
    CUDA_MUST(cudaGetLastError());
    CUDA_MUST(cudaEventElapsedTime(&ms, b->begin, b->end));
    return ms;
}

/* GB/s of useful bytes: [0] one layer at a time, [1] all of them. */
static void measure(struct bench *b, const struct placed *p, bool by_head, double *gbps)
{
    double bytes = 2.0 * p->tokens * p->seqs * (double)row_bytes(b);
    struct samples one, all;
    for (unsigned n = 0; n < REPEATS + 2; n++) {
        unsigned layer = n * 7 % L;
        struct kv_read r = layer_read(b, p, layer, by_head);
        flush_read<<<b->sms * 8, THREADS>>>(b->flush, b->sums);
        CUDA_MUST(cudaEventRecord(b->begin));
        unsigned ctas = read_launch(b, p, &r);
        double ms = elapsed_ms(b);
        if (n == (by_head ? 0 : 1) && bytes <= (double)CHECK_BYTES) /* layers 0 and 7 */
            check_sum(b, p, layer, ctas);
        if (n >= 2)
            one.us.push_back(ms * 1e3);
    }
    for (unsigned n = 0; n < REPEATS_ALL + 1; n++) {
        CUDA_MUST(cudaEventRecord(b->begin));
        for (unsigned layer = 0; layer < L; layer++) {
            struct kv_read r = layer_read(b, p, layer, by_head);
            read_launch(b, p, &r);
        }
        double ms = elapsed_ms(b);
        if (n)
            all.us.push_back(ms * 1e3);
    }
    gbps[0] = bytes / sample_at(&one, 0.5) * 1e-3;
    gbps[1] = bytes * L / sample_at(&all, 0.5) * 1e-3;
}

/* The best of several grids over one large allocation. */
static double plain_best(struct bench *b, uint64_t bytes)
{
    double best = 0;
    for (unsigned per_sm = 2; per_sm <= 64; per_sm *= 2) {
        struct samples s;
        for (unsigned n = 0; n < REPEATS; n++) {
            CUDA_MUST(cudaEventRecord(b->begin));
            read_plain<<<b->sms * per_sm, THREADS>>>((const uint4 *)b->whole, bytes / 16, b->sums);
            s.us.push_back(elapsed_ms(b) * 1e3);
        }
        double gbps = (double)bytes / sample_at(&s, 0.5) * 1e-3;
        printf("plain read of %.0f GiB, %u CTAs per SM: %.0f GB/s\n", (double)bytes / (1 << 30), per_sm, gbps);
        best = std::max(best, gbps);
    }
    return best;
}

struct result {
    bool there;
    double gbps[N_METRICS];
    uint64_t pages;
    double map_us;
};

static void print_tables(const struct bench *b, const struct result (*res)[N_LAYOUTS], const char *backing)
{
    for (unsigned m = 0; m < N_METRICS; m++) {
        if (m >= HEAD_ONE && b->heads == 1)
            continue; /* the same as by row */
        printf("\n## HK %u, %s, %s: GB/s, %% of the plain read\n%7s %5s %9s |", b->heads, backing, METRICS[m], "tokens",
               "seqs", "MiB/layer");
        for (const struct layout &l : LAYOUTS)
            printf(" %10s  |", l.name);
        printf("\n");
        for (unsigned c = 0; c < N_CELLS; c++) {
            if (!res[c][0].there && !res[c][1].there)
                continue;
            printf("%7u %5u %9.0f |", CELLS[c][0], CELLS[c][1],
                   2.0 * CELLS[c][0] * CELLS[c][1] * (double)row_bytes(b) / (1 << 20));
            for (unsigned l = 0; l < N_LAYOUTS; l++)
                if (res[c][l].there)
                    printf(" %5.0f %4.1f%% |", res[c][l].gbps[m], 100 * res[c][l].gbps[m] / b->best);
                else
                    printf(" %11s |", "-");
            printf("\n");
        }
    }
}

static void bench_backing(struct bench *b, const char *backing)
{
    static struct result res[N_CELLS][N_LAYOUTS];
    unsigned late = 0;
    memset(res, 0, sizeof res);
    for (unsigned c = 0; c < N_CELLS; c++)
        for (unsigned l = 0; l < N_LAYOUTS; l++) {
            struct placed p;
            struct result *r = &res[c][l];
            late += now_us() > b->stop_us;
            if (late || !place(b, &p, &LAYOUTS[l], CELLS[c]))
                continue;
            measure(b, &p, false, &r->gbps[ROW_ONE]);
            if (b->heads > 1)
                measure(b, &p, true, &r->gbps[HEAD_ONE]);
            unplace(b, &p);
            r->there = true;
            if (b->csv)
                fprintf(b->csv, "%u,%s,%s,%u,%u,%zu,%.1f,%.1f,%.1f,%.1f,%.2f,%.2f,%.1f\n", b->heads, backing,
                        LAYOUTS[l].name, p.tokens, p.seqs, p.page_of.size(), r->gbps[0], r->gbps[1], r->gbps[2],
                        r->gbps[3], p.map_us, p.unmap_us, b->best);
        }
    print_tables(b, res, backing);
    if (late)
        printf("no time was left for %u cells\n", late);
}

/* Trades the one allocation for a pool of pages, filled with what says which page it is. */
static void make_pool(struct bench *b)
{
    CUdeviceptr at;
    CUDA_MUST(cudaFree(b->whole));
    b->whole = NULL;
    b->page.resize(b->pages);
    VMM_MUST(b->v.reserve(&at, b->pages * PAGE_BYTES, PAGE_BYTES, 0, 0));
    for (uint64_t i = 0; i < b->pages; i++) {
        VMM_MUST(b->v.create(&b->page[i], PAGE_BYTES, &b->v.prop, 0));
        VMM_MUST(b->v.map(at + i * PAGE_BYTES, PAGE_BYTES, 0, b->page[i], 0));
    }
    VMM_MUST(b->v.set_access(at, b->pages * PAGE_BYTES, &b->v.access, 1));
    fill<<<b->sms * 8, THREADS>>>((uint32_t *)at, 0, b->pages * PAGE_WORDS);
    CUDA_MUST(cudaDeviceSynchronize());
    VMM_MUST(b->v.unmap(at, b->pages * PAGE_BYTES));
    VMM_MUST(b->v.address_free(at, b->pages * PAGE_BYTES));
}

int main(int argc, char **argv)
{
    struct bench b = {};
    struct cudaDeviceProp prop;
    double seconds = argc > 3 ? atof(argv[3]) : 150;
    b.heads = argc > 1 ? (unsigned)atoi(argv[1]) : 8;
    b.pages = (uint64_t)((argc > 2 ? atof(argv[2]) : 88) * (1 << 30) / PAGE_BYTES);
    if ((b.heads != 1 && b.heads != 2 && b.heads != 4 && b.heads != 8) || b.pages < 1024) {
        fprintf(stderr, "usage: bench_kv_layout [KV heads: 1, 2, 4, 8] [GiB, at least 2] [seconds] [CSV file]\n");
        return 2;
    }
    b.csv = argc > 4 ? fopen(argv[4], "a") : NULL;
    b.stop_us = now_us() + seconds * 1e6;
    vmm_load(&b.v);
    print_device();
    CUDA_MUST(cudaGetDeviceProperties(&prop, 0));
    b.sms = (unsigned)prop.multiProcessorCount;
    CUDA_MUST(cudaMalloc(&b.flush, FLUSH_BYTES));
    CUDA_MUST(cudaMemset(b.flush, 0x5a, FLUSH_BYTES));
    CUDA_MUST(cudaMalloc(&b.sums, MAX_CTAS * sizeof *b.sums));
    CUDA_MUST(cudaMalloc(&b.bases, 256 * 2 * L * sizeof *b.bases));
    CUDA_MUST(cudaMalloc(&b.whole, b.pages * PAGE_BYTES));
    CUDA_MUST(cudaEventCreate(&b.begin));
    CUDA_MUST(cudaEventCreate(&b.end));
    fill<<<b.sms * 8, THREADS>>>((uint32_t *)b.whole, 0, b.pages * PAGE_WORDS);
    CUDA_MUST(cudaDeviceSynchronize());
    b.best = plain_best(&b, std::min<uint64_t>(b.pages * PAGE_BYTES, 8ull << 30));
    bench_backing(&b, "cudaMalloc");
    make_pool(&b);
    bench_backing(&b, "pages");
    if (b.csv)
        fclose(b.csv);
    printf("\n%u sums checked against the host: %s\n", b.checked, b.failures ? "FAIL" : "ok");
    return b.failures ? 1 : 0;
}
