/* bench_kv_pool.cu - the KV pool on a GPU, under steps: what growth, sharing and suspension cost.
 *
 *     for f in memory/memory*.c proto/status.c; do gcc -O2 -D_GNU_SOURCE -I. -I$CUDA/include -c $f -o /tmp/$(basename $f).o; done
 *     nvcc -std=c++17 -O2 -arch=sm_90a -I. -o bench_kv_pool tests/bench/bench_kv_pool.cu /tmp/memory*.o /tmp/status.c.o -ldl
 *     bench_kv_pool [GB of the large pool, default 100]
 *     bench_kv_pool quick       sharing and suspension alone, little memory: for compute-sanitizer
 *
 * Llama-3-8B on one rank: 32 layers, 8 KV heads of 128, bf16: 128 KiB per token, 16 tokens per page of 2 MiB. A step is a
 * kernel that reads STEP_BYTES of memory, as decode steps do; the step loop grows every slot by a token, launches, waits.
 */
extern "C" {
#include "memory/memory.h"
}

#include "bench_cuda.h"

constexpr uint32_t LAYERS = 32, HEADS = 8, DIM = 128, SEQS = 128;
constexpr uint64_t STEP_BYTES = 16ull << 30, QUICK_STEP_BYTES = 256ull << 20;
constexpr uint64_t TOKEN_BYTES = 2ull * LAYERS * HEADS * DIM * 2;

static __global__ void read_all(const uint4 *at, uint64_t n, uint32_t *sums)
{
    uint32_t sum = 0;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint4 v = at[i];
        sum += v.x + v.y + v.z + v.w;
    }
    if (sum == 0x12345678)
        sums[0] = sum;
}

/* Word w of the slot's memory is a mix of w and `salt`; check counts the words that are not. */
static __global__ void put(uint32_t *at, uint64_t from, uint64_t to, uint32_t salt)
{
    for (uint64_t i = from + blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < to;
         i += (uint64_t)gridDim.x * blockDim.x)
        at[i] = page_word(salt, i);
}

static __global__ void check(const uint32_t *at, uint64_t from, uint64_t to, uint32_t salt, unsigned long long *wrong)
{
    unsigned long long n = 0;
    for (uint64_t i = from + blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < to;
         i += (uint64_t)gridDim.x * blockDim.x)
        n += at[i] != page_word(salt, i);
    if (n)
        atomicAdd(wrong, n);
}

static void must(enum status_code rc, const struct status *st)
{
    if (rc == ST_OK)
        return;
    fprintf(stderr, "bench_kv_pool: %s: %s\n", status_name(rc), st->message);
    exit(1);
}

static struct kv_pool_config settings(uint32_t slots, uint32_t max_tokens, uint64_t pages, bool background,
                                      uint32_t heads)
{
    struct kv_pool_config cfg;
    memset(&cfg, 0, sizeof cfg);
    cfg.ops = &kv_ops_cuda;
    cfg.slots = slots;
    cfg.max_tokens = max_tokens;
    cfg.layers = LAYERS;
    cfg.kv_heads = heads;
    cfg.head_dim = DIM;
    cfg.elem_bytes = 2;
    cfg.page_bytes = PAGE_BYTES;
    cfg.total_pages = pages;
    cfg.background = background;
    cfg.ahead_tokens = 16;
    cfg.arrival_tokens = 256;
    return cfg;
}

static struct kv_pool *create(const struct kv_pool_config *cfg)
{
    struct status st = STATUS_INIT;
    struct kv_pool *pool;
    must(kv_pool_create(&pool, cfg, &st), &st);
    return pool;
}

static struct kv_pool *make(uint32_t slots, uint32_t max_tokens, uint64_t pages, bool background, uint32_t heads)
{
    struct kv_pool_config cfg = settings(slots, max_tokens, pages, background, heads);
    return create(&cfg);
}

static void grow(struct kv_pool *pool, uint32_t slot, uint32_t tokens)
{
    struct status st = STATUS_INIT;
    must(kv_slot_grow(pool, slot, tokens, &st), &st);
}

static void sound(struct kv_pool *pool)
{
    struct status st = STATUS_INIT;
    must(kv_pool_check(pool, &st), &st);
}

struct step {
    uint4 *buffer;
    uint64_t bytes;
    uint32_t *sums;
    cudaStream_t stream;
};

static void run_step(const struct step *s)
{
    read_all<<<132 * 8, 512, 0, s->stream>>>(s->buffer, s->bytes / sizeof *s->buffer, s->sums);
    CUDA_MUST(cudaGetLastError());
}

/* 128 sequences, each of its own length, replaced by another when it ends. */
static void steady_state(const struct step *s, bool no_clear)
{
    struct kv_pool_config cfg = settings(SEQS, 2048, 12288, true, HEADS);
    cfg.no_clear = no_clear;
    struct kv_pool *pool = create(&cfg);
    uint32_t length[SEQS], end[SEQS], arrivals = 0;
    for (uint32_t i = 0; i < SEQS; i++)
        length[i] = end[i] = 0;
    struct kv_stats from = kv_pool_stats(pool);
    uint64_t host_ns = 0;
    constexpr uint32_t WARM = 6000, STEPS = 1000;
    for (uint32_t step = 1; step <= WARM + STEPS; step++) {
        if (step == WARM + 1) {
            kv_pool_settle(pool);
            from = kv_pool_stats(pool);
            host_ns = arrivals = 0;
        }
        double t = now_us();
        kv_pool_complete(pool, step - 1);
        for (uint32_t i = 0; i < SEQS; i++) {
            if (length[i] == end[i]) {
                kv_slot_release(pool, i, step - 1);
                length[i] = 64 + (i * 37 + step * 11) % 448;      /* a prompt, */
                end[i] = length[i] + 128 + (i * 53 + step) % 512; /* and tokens that follow */
                arrivals++;
            } else {
                length[i]++;
            }
            grow(pool, i, length[i]);
        }
        host_ns += (uint64_t)((now_us() - t) * 1000);
        if (step > WARM && step % 2 == 0) { /* the kernel's length does not matter here */
            run_step(s);
            CUDA_MUST(cudaStreamSynchronize(s->stream));
        } else if (step <= WARM) { /* as if a step had run */
            kv_pool_settle(pool);
        }
        if (step == 1000 || step == 2000 || step == 4000)
            printf("  after %u steps: %llu calls\n", step, (unsigned long long)kv_pool_stats(pool).map_calls);
    }
    struct kv_stats to = kv_pool_stats(pool);
    printf(
        "steady state%s, %u steps of %u sequences, %u arrivals: %llu map/access/unmap calls, %llu clears, failed %llu; "
        "host %.1f us a step, of it in the driver or waiting %.1f us; parked %llu pages\n",
        no_clear ? " without clears" : "", STEPS, SEQS, arrivals, (unsigned long long)(to.map_calls - from.map_calls),
        (unsigned long long)(to.clear_calls - from.clear_calls), (unsigned long long)to.failed_ahead,
        host_ns * 1e-3 / STEPS, (double)(to.exposed_ns - from.exposed_ns) * 1e-3 / STEPS,
        (unsigned long long)to.parked_pages);
    sound(pool);
    kv_pool_destroy(pool);
}

enum growth { NONE, AHEAD, ON_THE_WAY };

/* Step times while 128 sequences decode from 64 tokens on: all pages are there from the start; or every page is mapped
 * when it is needed first, by the thread or on the way, and cleared or not. In phase: all cross a page's edge in the same step.
 * Returns the mean. */
static double decode(const struct step *s, enum growth growth, bool no_clear, bool in_phase, const char *what)
{
    constexpr uint32_t STEPS = 512;
    struct kv_pool_config cfg = settings(SEQS, 1024, SEQS * 50, growth == AHEAD, HEADS);
    cfg.no_clear = no_clear;
    struct kv_pool *pool = create(&cfg);
    if (growth == NONE) { /* mapped by earlier owners, and clean */
        for (uint32_t i = 0; i < SEQS; i++)
            grow(pool, i, 64 + STEPS + 32);
        for (uint32_t i = 0; i < SEQS; i++)
            kv_slot_release(pool, i, 0);
        kv_pool_complete(pool, 0);
        for (uint32_t i = 0; i < SEQS; i++)
            grow(pool, i, 64 + STEPS + 32);
    }
    for (uint32_t i = 0; i < SEQS; i++)
        grow(pool, i, 64 + (in_phase ? 0 : i % 16));
    kv_pool_settle(pool);
    struct kv_stats from = kv_pool_stats(pool);
    struct samples t;
    double begin = now_us(), all = begin;
    for (uint32_t step = 1; step <= STEPS; step++) {
        for (uint32_t i = 0; i < SEQS; i++)
            grow(pool, i, 64 + (in_phase ? 0 : i % 16) + step);
        run_step(s);
        kv_pool_complete(pool, step - 1);
        CUDA_MUST(cudaStreamSynchronize(s->stream));
        double now = now_us();
        t.us.push_back(now - begin);
        begin = now;
    }
    all = (now_us() - all) / STEPS;
    struct kv_stats to = kv_pool_stats(pool);
    printf("%-52s mean %8.1f median %8.1f p99 %8.1f max %8.1f us; %6llu map calls, exposed %7.2f us a step\n", what,
           all, sample_at(&t, 0.5), sample_at(&t, 0.99), sample_at(&t, 1.0),
           (unsigned long long)(to.map_calls - from.map_calls),
           (double)(to.exposed_ns - from.exposed_ns) * 1e-3 / STEPS);
    kv_pool_destroy(pool);
    return all;
}

static void growth_ahead(const struct step *s, bool in_phase)
{
    double none = decode(s, NONE, false, in_phase, in_phase ? "in phase, all pages there" : "decode, all pages there");
    double clear = decode(s, AHEAD, false, in_phase, "  pages mapped and cleared ahead");
    double ahead = decode(s, AHEAD, true, in_phase, "  pages mapped ahead");
    double again = decode(s, NONE, false, in_phase, "  all pages there, again");
    none = (none + again) / 2;
    printf("  against all pages there: %+.2f %% mapped and cleared ahead, %+.2f %% mapped ahead, %+.2f %% the same "
           "again\n",
           100 * (clear / none - 1), 100 * (ahead / none - 1), 100 * (again / none - 1));
}

/* Sequences of mixed lengths until the pool is full: how many, against a paged cache with blocks of 16 tokens. */
static void capacity(uint64_t pages, uint32_t heads)
{
    struct kv_pool *pool = make(4096, 16384, pages, false, heads);
    struct kv_account a = kv_pool_account(pool);
    uint64_t random = 1, blocks = pages * PAGE_BYTES / (16 * a.token_bytes), used = 0, waste256 = 0, used256 = 0;
    uint32_t n = 0, paged = 0;
    bool full = false, paged_full = false;
    while (!full || !paged_full) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        uint32_t tokens = 256u << (random >> 33) % 5; /* 256 to 8191, short ones as often as long ones */
        tokens += (uint32_t)(random >> 40) % tokens;
        struct status st = STATUS_INIT;
        if (!full && n < 4096 && kv_slot_grow(pool, n, tokens, &st) == ST_OK)
            n++;
        else
            full = true;
        used += (tokens + 15) / 16;
        paged_full = paged_full || used > blocks;
        paged += !paged_full;
        if (n <= 256) {
            struct kv_stats s = kv_pool_stats(pool);
            waste256 = s.wasted_bytes;
            used256 = s.mapped_pages * PAGE_BYTES;
        }
    }
    printf(
        "%u KV heads, %.1f GB: %u sequences of 256 to 8191 tokens, paging with blocks of 16 tokens %u: %.2f %%; at 256 "
        "sequences (or all) wasted %.0f of %.0f MB: %.2f %%\n",
        heads, (double)(pages * PAGE_BYTES) * 1e-9, n, paged, 100.0 * n / paged, (double)waste256 * 1e-6,
        (double)used256 * 1e-6, 100.0 * (double)waste256 / (double)used256);
    sound(pool);
    kv_pool_destroy(pool);
}

static void big_pool(uint64_t gb)
{
    uint64_t pages = gb * 1000000000 / PAGE_BYTES;
    double t = now_us();
    struct kv_pool *pool = make(512, 131072, pages, false, HEADS);
    double created = now_us();
    uint32_t tokens = 131072;
    for (uint32_t i = 0; i < pages / 8192; i++)
        grow(pool, i, tokens);
    double grown = now_us();
    uint64_t mapped = kv_pool_stats(pool).mapped_pages;
    CUDA_MUST(cudaDeviceSynchronize());
    printf("pool of %llu GB (%llu pages): created in %.3f s; %llu pages mapped and cleared in %.3f s = %.1f GB/s, %.1f "
           "us a "
           "page",
           (unsigned long long)gb, (unsigned long long)pages, (created - t) * 1e-6, (unsigned long long)mapped,
           (grown - created) * 1e-6, (double)(mapped * PAGE_BYTES) / (grown - created) * 1e-3,
           (grown - created) / (double)mapped);
    t = now_us();
    kv_pool_destroy(pool);
    printf("; destroyed in %.3f s\n", (now_us() - t) * 1e-6);
}

/* 64 slots get the same prefix while a kernel reads it and another reads memory at full speed; each writes on alone. */
static void aliasing(const struct step *s)
{
    constexpr uint32_t N = 64, PREFIX = 900, MORE = 50;
    struct kv_pool_config cfg = settings(N, 1024, 64 * 8 + 64, true, HEADS);
    cfg.suspend_bytes = 256ull << 20;
    struct kv_pool *pool = create(&cfg);
    struct status st = STATUS_INIT;
    uint64_t rate;
    must(kv_pool_suspend_rate(pool, &rate, &st), &st);
    unsigned long long *wrong;
    CUDA_MUST(cudaMallocManaged(&wrong, sizeof *wrong));
    *wrong = 0;
    cudaStream_t second;
    CUDA_MUST(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    const uint64_t words = PREFIX * TOKEN_BYTES / 4, end = (PREFIX + MORE) * TOKEN_BYTES / 4;
    grow(pool, 0, PREFIX);
    uint32_t *first = (uint32_t *)kv_slot_view(pool, 0, 0).k;
    put<<<1024, 256>>>(first, 0, words, 1);
    CUDA_MUST(cudaDeviceSynchronize());
    run_step(s);
    double t = now_us();
    for (uint32_t i = 1; i < N; i++) {
        struct status st = STATUS_INIT;
        must(kv_slot_share(pool, i, 0, PREFIX, &st), &st);
        check<<<64, 256, 0, second>>>(first, 0, words, 1, wrong);
    }
    t = now_us() - t;
    for (uint32_t i = 0; i < N; i++) {
        grow(pool, i, PREFIX + MORE);
        uint32_t *at = (uint32_t *)kv_slot_view(pool, i, 0).k;
        put<<<64, 256, 0, i % 2 ? second : s->stream>>>(at, words, end, 100 + i);
        check<<<64, 256, 0, i % 2 ? s->stream : second>>>(at, 0, words, 1, wrong);
    }
    CUDA_MUST(cudaDeviceSynchronize());
    for (uint32_t i = 0; i < N; i++)
        check<<<256, 256>>>((uint32_t *)kv_slot_view(pool, i, 0).k, words, end, 100 + i, wrong);
    CUDA_MUST(cudaDeviceSynchronize());
    struct kv_stats n = kv_pool_stats(pool);
    printf(
        "aliasing: %u slots of %u tokens, %u in common: %llu wrong words; %llu pages mapped, %llu shared, %llu saved; "
        "%.0f us a share under a reading kernel\n",
        N, PREFIX + MORE, PREFIX, *wrong, (unsigned long long)n.mapped_pages, (unsigned long long)n.shared_pages,
        (unsigned long long)n.saved_pages, t / (N - 1));
    uint8_t *address = kv_slot_view(pool, 5, 0).k;
    must(kv_slot_suspend(pool, 5, &st), &st); /* the first one touches the pinned memory */
    must(kv_slot_resume(pool, 5, &st), &st);
    double t0 = now_us();
    must(kv_slot_suspend(pool, 5, &st), &st);
    double t1 = now_us();
    must(kv_slot_resume(pool, 5, &st), &st);
    double t2 = now_us();
    bool same = kv_slot_view(pool, 5, 0).k == address;
    check<<<64, 256>>>((uint32_t *)address, 0, words, 1, wrong);
    check<<<64, 256>>>((uint32_t *)address, words, end, 105, wrong);
    CUDA_MUST(cudaDeviceSynchronize());
    double mb = (PREFIX + MORE) * TOKEN_BYTES * 1e-6;
    printf("suspend %.0f MB: %.2f ms, %.1f GB/s; resume %.2f ms, %.1f GB/s; the pool's own measurement %.1f GB/s; same "
           "address: %s; %llu wrong words\n",
           mb, (t1 - t0) * 1e-3, mb * 1e3 / (t1 - t0), (t2 - t1) * 1e-3, mb * 1e3 / (t2 - t1), (double)rate * 1e-9,
           same ? "yes" : "NO", *wrong);
    t0 = now_us();
    must(kv_pool_shrink(pool, 32, &st), &st);
    t1 = now_us();
    must(kv_pool_extend(pool, 32, &st), &st);
    t2 = now_us();
    printf("give back 32 pages: %.0f us a page; take them again: %.0f us a page\n", (t1 - t0) / 32, (t2 - t1) / 32);
    sound(pool);
    bool failed = *wrong || !same;
    kv_pool_destroy(pool);
    CUDA_MUST(cudaFree(wrong));
    if (failed)
        exit(1);
}

/* What it costs to have host memory for suspended slots: pinned, with the pool. */
static void pinned(void)
{
    struct kv_pool_config cfg = settings(4, 1024, 64, false, HEADS);
    cfg.suspend_bytes = 2ull << 30;
    double t0 = now_us();
    struct kv_pool *pool = create(&cfg);
    double t1 = now_us();
    kv_pool_destroy(pool);
    printf("2 GiB of pinned host memory: %.2f s, given back in %.2f s\n", (t1 - t0) * 1e-6, (now_us() - t1) * 1e-6);
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "quick") == 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t gb = argc > 1 ? (uint64_t)atoll(argv[1]) : 100;
    struct vmm v;
    struct step s;
    vmm_load(&v);
    print_device();
    if (!quick) {
        big_pool(gb);
        capacity(gb * 1000000000 / PAGE_BYTES, HEADS);
        capacity(gb * 1000000000 / PAGE_BYTES / 8, 1);
        pinned();
    }
    s.bytes = quick ? QUICK_STEP_BYTES : STEP_BYTES;
    CUDA_MUST(cudaMalloc(&s.buffer, s.bytes));
    CUDA_MUST(cudaMemset(s.buffer, 0, s.bytes));
    CUDA_MUST(cudaMalloc(&s.sums, 4096));
    CUDA_MUST(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking));
    run_step(&s);
    CUDA_MUST(cudaStreamSynchronize(s.stream));
    aliasing(&s);
    if (quick)
        return 0;
    steady_state(&s, false);
    steady_state(&s, true);
    for (int round = 0; round < 3; round++)
        growth_ahead(&s, false);
    growth_ahead(&s, true);
    decode(&s, ON_THE_WAY, false, false, "decode, pages mapped and cleared on the way");
    decode(&s, ON_THE_WAY, true, false, "decode, pages mapped on the way");
    return 0;
}
