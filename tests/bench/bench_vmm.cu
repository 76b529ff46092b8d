/* bench_vmm.cu - what the driver's virtual memory calls cost: alone, in ranges, under a running kernel, beside launches.
 *
 *     bin/bench_vmm [GiB of the large pool, default 100] [busy: only what runs beside a kernel]
 *
 * All times are of the calls on the host, in microseconds: median, 99th percentile, largest. Results are checked: what is
 * written through one address must be read through every other address of the same page.
 */
#include <pthread.h>

#include "bench_cuda.h"

constexpr unsigned PAGES = 512;        /* of the small pool that most sections use */
constexpr unsigned ALIASES = 64;       /* addresses of one page */
constexpr unsigned STEP_LAUNCHES = 64; /* launches in a step: about two a layer */
constexpr unsigned STEP_READS = 32;    /* reads of FLUSH_BYTES in a step that is bound by memory */
constexpr double CASE_LIMIT_US = 1e6;  /* a case ends after that, with the rounds it has */
constexpr double BUSY_LIMIT_US = 4e5;  /* and so under a kernel, which ends by itself later: a call may wait for it */
constexpr uint64_t BUSY_NS = 700000000;
constexpr size_t BUSY_BYTES = 1u << 30;

struct bench {
    struct vmm v;
    vmm_page page[PAGES];
    CUdeviceptr range; /* PAGES pages */
    uint4 *busy_buf;
    volatile unsigned *stop; /* in host memory; the kernel polls it */
    unsigned long long *busy_out;
    cudaStream_t busy, work;
    unsigned sms;
    unsigned failures;
};

static __device__ uint64_t clock_ns(void)
{
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

enum busy_kind { BUSY_SPIN, BUSY_READ, BUSY_POLL };
static const char *const BUSY_NAME[] = {"a kernel that spins", "a kernel that reads memory at full speed",
                                        "a kernel that reads memory and polls the host's"};

/* Runs for limit_ns; kinds above. out: bytes read, begin, end. */
static __global__ void busy_kernel(enum busy_kind kind, const uint4 *buf, size_t vecs, const volatile unsigned *stop,
                                   uint64_t limit_ns, unsigned long long *out)
{
    constexpr size_t CHUNK = 16384; /* 256 KiB between two looks at the clock */
    uint64_t begin = clock_ns();
    uint64_t end = begin;
    unsigned sum = 0;
    unsigned long long done = 0;
    /* A share for each CTA: in a common order the CTAs would gather behind the first and read the L2 cache. */
    size_t chunks = vecs / CHUNK / gridDim.x;
    for (size_t c = 0;; c = (c + 1) % chunks) {
        const uint4 *at = buf + (blockIdx.x * chunks + c) * CHUNK;
        for (size_t i = threadIdx.x; kind != BUSY_SPIN && i < CHUNK; i += 8 * blockDim.x) {
            uint4 x[8];
            for (int u = 0; u < 8; u++)
                x[u] = __ldcs(at + i + u * blockDim.x);
            for (int u = 0; u < 8; u++)
                sum += x[u].x ^ x[u].y ^ x[u].z ^ x[u].w;
        }
        done += kind == BUSY_SPIN ? 0 : CHUNK * sizeof *buf;
        end = clock_ns();
        if (__syncthreads_or(threadIdx.x == 0 && (end - begin > limit_ns || (kind == BUSY_POLL && *stop))))
            break;
    }
    if (threadIdx.x == 0) {
        atomicAdd(&out[0], done);
        atomicMin(&out[1], (unsigned long long)begin);
        atomicMax(&out[2], (unsigned long long)end);
    }
    if (sum == 0x12345678)
        out[3] = sum; /* keeps the loads */
}

static __global__ void tiny(unsigned *at)
{
    if (threadIdx.x == 0 && at)
        atomicAdd(at, 1);
}

static __global__ void page_write(uint32_t *at, uint64_t seed)
{
    for (size_t w = blockIdx.x * blockDim.x + threadIdx.x; w < PAGE_WORDS; w += gridDim.x * blockDim.x)
        at[w] = page_word(seed, w);
}

static __global__ void page_check(const uint32_t *at, uint64_t seed, unsigned *wrong)
{
    for (size_t w = blockIdx.x * blockDim.x + threadIdx.x; w < PAGE_WORDS; w += gridDim.x * blockDim.x)
        if (at[w] != page_word(seed, w))
            atomicAdd(wrong, 1);
}

static void busy_start(struct bench *b, enum busy_kind kind, uint64_t limit_ns)
{
    unsigned long long zero[4] = {0, ~0ull, 0, 0};
    *b->stop = 0;
    CUDA_MUST(cudaMemcpy(b->busy_out, zero, sizeof zero, cudaMemcpyHostToDevice));
    /* Three CTAs of 512 threads per SM leave room for small kernels beside them. */
    busy_kernel<<<b->sms * 3, 512, 0, b->busy>>>(kind, b->busy_buf, BUSY_BYTES / sizeof(uint4), b->stop, limit_ns,
                                                 b->busy_out);
    CUDA_MUST(cudaGetLastError());
    double t = now_us();
    while (now_us() - t < 2000) /* let it begin */
        ;
}

/* Says whether the kernel was still there when the calls were done (if not, they may have waited for it), and how fast
 * it read. */
static void busy_stop(struct bench *b)
{
    cudaError_t rc = cudaStreamQuery(b->busy);
    if (rc != cudaErrorNotReady)
        CUDA_MUST(rc);
    *b->stop = 1;
    CUDA_MUST(cudaStreamSynchronize(b->busy));
    unsigned long long out[4];
    CUDA_MUST(cudaMemcpy(out, b->busy_out, sizeof out, cudaMemcpyDeviceToHost));
    printf("    kernel: %s, read %.0f GB/s for %.0f ms\n", rc == cudaSuccess ? "had ended" : "still ran",
           (double)out[0] / (double)(out[2] - out[1]), (double)(out[2] - out[1]) * 1e-6);
}

static void bench_reserve(struct bench *b)
{
    printf("\n## cuMemAddressReserve, cuMemAddressFree\n%10s | %28s | %28s\n", "GiB", "reserve: median, p99, max",
           "free: median, p99, max");
    for (uint64_t gib = 1; gib <= 16384; gib *= 16) {
        struct samples take, give;
        for (int i = 0; i < 200; i++) {
            CUdeviceptr at;
            double t0 = now_us();
            VMM_MUST(b->v.reserve(&at, gib << 30, PAGE_BYTES, 0, 0));
            double t1 = now_us();
            VMM_MUST(b->v.address_free(at, gib << 30));
            take.us.push_back(t1 - t0);
            give.us.push_back(now_us() - t1);
        }
        printf("%10llu |", (unsigned long long)gib);
        sample_print(&take);
        sample_print(&give);
        printf("\n");
    }
}

static void bench_create(struct bench *b, const char *when)
{
    printf("\n## cuMemCreate, cuMemRelease, %s\n%10s | %28s | %28s | per page\n", when, "MiB",
           "create: median, p99, max", "release: median, p99, max");
    for (uint64_t pages = 1; pages <= 512; pages *= 8) {
        struct samples take, give;
        std::vector<vmm_page> h(512 / pages);
        for (int round = 0; round < 4; round++) {
            for (vmm_page &p : h) {
                double t = now_us();
                VMM_MUST(b->v.create(&p, pages * PAGE_BYTES, &b->v.prop, 0));
                take.us.push_back(now_us() - t);
            }
            for (vmm_page p : h) {
                double t = now_us();
                VMM_MUST(b->v.release(p));
                give.us.push_back(now_us() - t);
            }
        }
        printf("%10llu |", (unsigned long long)(pages * PAGE_BYTES >> 20));
        sample_print(&take);
        sample_print(&give);
        printf(" %.2f, %.2f\n", sample_at(&take, 0.5) / (double)pages, sample_at(&give, 0.5) / (double)pages);
    }
}

struct map_times {
    struct samples map, access, again, unmap_range, unmap_one;
};

/* Maps n pages, gives access in one call, gives it once more, unmaps them in one call or one by one in turn. */
static void map_round(struct bench *b, unsigned n, bool by_range, struct map_times *m)
{
    double t;
    for (unsigned i = 0; i < n; i++) {
        t = now_us();
        VMM_MUST(b->v.map(b->range + i * PAGE_BYTES, PAGE_BYTES, 0, b->page[i], 0));
        m->map.us.push_back(now_us() - t);
    }
    t = now_us();
    VMM_MUST(b->v.set_access(b->range, n * PAGE_BYTES, &b->v.access, 1));
    m->access.us.push_back(now_us() - t);
    t = now_us();
    VMM_MUST(b->v.set_access(b->range, n * PAGE_BYTES, &b->v.access, 1));
    m->again.us.push_back(now_us() - t);
    if (by_range) {
        t = now_us();
        VMM_MUST(b->v.unmap(b->range, n * PAGE_BYTES));
        m->unmap_range.us.push_back(now_us() - t);
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        t = now_us();
        VMM_MUST(b->v.unmap(b->range + i * PAGE_BYTES, PAGE_BYTES));
        m->unmap_one.us.push_back(now_us() - t);
    }
}

/* busy: NULL when the GPU is idle. */
static void bench_map(struct bench *b, const enum busy_kind *busy)
{
    printf("\n## cuMemMap (a page a call), cuMemSetAccess (a range a call), cuMemUnmap; %s\n",
           busy ? BUSY_NAME[*busy] : "GPU idle");
    printf("%6s | %28s | %28s | %28s | %28s | %28s | per page: access, unmap\n", "pages", "map: median, p99, max",
           "access: median, p99, max", "access given again", "unmap of the range", "unmap of one page");
    for (unsigned n = 1; n <= (busy ? 64 : PAGES); n *= busy ? 4 : 2) {
        struct map_times m;
        double begin = now_us();
        unsigned rounds = std::max(4096 / n, 32u);
        if (busy)
            busy_start(b, *busy, BUSY_NS);
        for (unsigned r = 0; r < rounds && now_us() - begin < (busy ? BUSY_LIMIT_US : CASE_LIMIT_US); r++)
            map_round(b, n, r % 2 == 0, &m);
        double access = sample_at(&m.access, 0.5) / n, unmap = sample_at(&m.unmap_range, 0.5) / n;
        printf("%6u |", n);
        sample_print(&m.map);
        sample_print(&m.access);
        sample_print(&m.again);
        sample_print(&m.unmap_range);
        sample_print(&m.unmap_one);
        printf(" %.2f, %.2f\n", access, unmap);
        if (busy)
            busy_stop(b);
    }
}

/* One handle of several pages: does the cost go by handles or by pages? */
static void bench_large_handles(struct bench *b)
{
    printf("\n## one handle of more than a page, GPU idle\n%6s | %28s | %28s | %28s | per page: access, unmap\n", "MiB",
           "map: median, p99, max", "access: median, p99, max", "unmap: median, p99, max");
    for (uint64_t pages = 1; pages <= 128; pages *= 2) {
        vmm_page h;
        struct map_times m;
        VMM_MUST(b->v.create(&h, pages * PAGE_BYTES, &b->v.prop, 0));
        for (int r = 0; r < 200; r++) {
            double t0 = now_us();
            VMM_MUST(b->v.map(b->range, pages * PAGE_BYTES, 0, h, 0));
            double t1 = now_us();
            VMM_MUST(b->v.set_access(b->range, pages * PAGE_BYTES, &b->v.access, 1));
            double t2 = now_us();
            VMM_MUST(b->v.unmap(b->range, pages * PAGE_BYTES));
            m.unmap_range.us.push_back(now_us() - t2);
            m.access.us.push_back(t2 - t1);
            m.map.us.push_back(t1 - t0);
        }
        VMM_MUST(b->v.release(h));
        printf("%6llu |", (unsigned long long)(pages * PAGE_BYTES >> 20));
        sample_print(&m.map);
        sample_print(&m.access);
        sample_print(&m.unmap_range);
        printf(" %.2f, %.2f\n", sample_at(&m.access, 0.5) / (double)pages,
               sample_at(&m.unmap_range, 0.5) / (double)pages);
    }
}

/* The thread that maps while the other launches. */
struct mapper {
    struct bench *b;
    unsigned pages;
    double pause_us; /* between two rounds */
    volatile bool quit;
    struct map_times m;
    unsigned rounds;
};

static void *mapper_run(void *arg)
{
    struct mapper *p = (struct mapper *)arg;
    CUDA_MUST(cudaSetDevice(0));
    while (!p->quit) {
        map_round(p->b, p->pages, true, &p->m);
        p->rounds++;
        for (double t = now_us(); p->pause_us > 0 && !p->quit && now_us() - t < p->pause_us;)
            ;
    }
    return NULL;
}

static void launch_steps(struct bench *b, cudaGraphExec_t graph, struct samples *call, struct samples *step)
{
    double begin = now_us();
    for (int s = 0; s < 600 && now_us() - begin < CASE_LIMIT_US; s++) {
        double t0 = now_us();
        for (unsigned i = 0; i < (graph ? 1 : STEP_LAUNCHES); i++) {
            double t = now_us();
            if (graph)
                CUDA_MUST(cudaGraphLaunch(graph, b->work));
            else
                tiny<<<1, 32, 0, b->work>>>(NULL);
            call->us.push_back(now_us() - t);
        }
        CUDA_MUST(cudaStreamSynchronize(b->work));
        step->us.push_back(now_us() - t0);
    }
    CUDA_MUST(cudaGetLastError());
}

/* A step as one graph: empty kernels, or reads as a decode step makes them. */
static cudaGraphExec_t capture_step(struct bench *b, bool reads)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_MUST(cudaStreamBeginCapture(b->work, cudaStreamCaptureModeRelaxed));
    for (unsigned i = 0; i < (reads ? STEP_READS : STEP_LAUNCHES); i++)
        if (reads)
            flush_read<<<b->sms * 8, 256, 0, b->work>>>(b->busy_buf + i % 4 * (FLUSH_BYTES / sizeof *b->busy_buf),
                                                        (uint32_t *)b->busy_out);
        else
            tiny<<<1, 32, 0, b->work>>>(NULL);
    CUDA_MUST(cudaStreamEndCapture(b->work, &graph));
    CUDA_MUST(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_MUST(cudaGraphDestroy(graph));
    CUDA_MUST(cudaGraphLaunch(exec, b->work));
    CUDA_MUST(cudaStreamSynchronize(b->work));
    return exec;
}

static void launch_case(struct bench *b, const char *name, unsigned pages, double pause_us, cudaGraphExec_t graph)
{
    struct mapper p = {b, pages, pause_us, false, {}, 0};
    pthread_t thread;
    struct samples call, step;
    if (pages && pthread_create(&thread, NULL, mapper_run, &p)) {
        fprintf(stderr, "bench_vmm: no thread\n");
        exit(1);
    }
    launch_steps(b, graph, &call, &step);
    p.quit = true;
    if (pages)
        pthread_join(thread, NULL);
    printf("%-28s |", name);
    sample_print(&call);
    sample_print(&step);
    sample_print(&p.m.map);
    sample_print(&p.m.access);
    sample_print(&p.m.unmap_range);
    printf(" %u\n", p.rounds);
}

static void bench_launches(struct bench *b)
{
    cudaGraphExec_t exec[3] = {NULL, capture_step(b, false), capture_step(b, true)};
    const char *const step[] = {"64 launches of an empty kernel", "a graph of 64 empty kernels",
                                "a graph of 32 kernels that read 256 MiB each"};
    for (int g = 0; g < 3; g++) {
        printf(
            "\n## launches beside a thread that maps, gives access twice and unmaps; a step is %s, and a wait\n%-28s | "
            "%28s | %28s | %28s | %28s | %28s | rounds\n",
            step[g], "the other thread", "launch call: median, p99, max", "step: median, p99, max", "its map",
            "its access", "its unmap");
        launch_case(b, "is not there", 0, 0, exec[g]);
        launch_case(b, "1 page, no pause", 1, 0, exec[g]);
        launch_case(b, "16 pages, no pause", 16, 0, exec[g]);
        launch_case(b, "128 pages, no pause", 128, 0, exec[g]);
        launch_case(b, "1 page, pause 1 ms", 1, 1000, exec[g]);
        launch_case(b, "16 pages, pause 10 ms", 16, 10000, exec[g]);
        launch_case(b, "is not there (again)", 0, 0, exec[g]);
    }
    CUDA_MUST(cudaGraphExecDestroy(exec[1]));
    CUDA_MUST(cudaGraphExecDestroy(exec[2]));
}

static void alias_check(struct bench *b, unsigned *wrong, const char *when)
{
    struct samples map, access;
    CUDA_MUST(cudaMemsetAsync(wrong, 0, sizeof *wrong, b->work));
    for (unsigned i = 0; i < ALIASES; i++) {
        double t0 = now_us();
        VMM_MUST(b->v.map(b->range + i * PAGE_BYTES, PAGE_BYTES, 0, b->page[0], 0));
        double t1 = now_us();
        VMM_MUST(b->v.set_access(b->range + i * PAGE_BYTES, PAGE_BYTES, &b->v.access, 1));
        map.us.push_back(t1 - t0);
        access.us.push_back(now_us() - t1);
    }
    for (unsigned writer = 0; writer < ALIASES; writer++) { /* each address writes once, all others read */
        page_write<<<64, 256, 0, b->work>>>((uint32_t *)(b->range + writer * PAGE_BYTES), writer + 1);
        for (unsigned i = 0; i < ALIASES; i++)
            page_check<<<64, 256, 0, b->work>>>((const uint32_t *)(b->range + i * PAGE_BYTES), writer + 1, wrong);
    }
    unsigned bad = 1;
    CUDA_MUST(cudaGetLastError());
    CUDA_MUST(cudaMemcpyAsync(&bad, wrong, sizeof bad, cudaMemcpyDeviceToHost, b->work));
    CUDA_MUST(cudaStreamSynchronize(b->work));
    /* A look by the host itself, so that the check is not the GPU's word alone. */
    uint32_t host[16];
    CUDA_MUST(cudaMemcpyAsync(host, (void *)(b->range + 7 * PAGE_BYTES), sizeof host, cudaMemcpyDeviceToHost, b->work));
    CUDA_MUST(cudaStreamSynchronize(b->work));
    for (unsigned w = 0; w < 16; w++)
        bad += host[w] != page_word(ALIASES, w);
    page_check<<<64, 256, 0, b->work>>>((const uint32_t *)b->range, 999,
                                        wrong); /* must not match: the check can fail */
    unsigned control = 0;
    CUDA_MUST(cudaMemcpyAsync(&control, wrong, sizeof control, cudaMemcpyDeviceToHost, b->work));
    CUDA_MUST(cudaStreamSynchronize(b->work));
    VMM_MUST(b->v.unmap(b->range, ALIASES * PAGE_BYTES));
    bool ok = bad == 0 && control > PAGE_WORDS / 2;
    b->failures += !ok;
    printf("%s: %u addresses, %u x %u reads: %s (%u words wrong; control %u)\n    map, access:", when, ALIASES, ALIASES,
           ALIASES, ok ? "ok" : "FAIL", bad, control);
    sample_print(&map);
    sample_print(&access);
    printf("\n");
}

static void bench_alias(struct bench *b)
{
    unsigned *wrong;
    CUDA_MUST(cudaMalloc(&wrong, sizeof *wrong));
    printf("\n## one page at many addresses\n");
    alias_check(b, wrong, "GPU idle");
    busy_start(b, BUSY_READ, 3 * BUSY_NS);
    alias_check(b, wrong, "under a kernel that reads memory");
    busy_stop(b);
    CUDA_MUST(cudaFree(wrong));
}

/* What the driver lets one do; facts for the design. */
static void bench_rules(struct bench *b)
{
    size_t best = 0;
    vmm_page big;
    VMM_MUST(b->v.granularity(&best, &b->v.prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
    VMM_MUST(b->v.create(&big, 8 * PAGE_BYTES, &b->v.prop, 0));
    printf("\n## rules\nleast page %llu bytes, recommended %zu\n", (unsigned long long)PAGE_BYTES, best);
    CUresult rc = b->v.map(b->range, PAGE_BYTES, PAGE_BYTES, big, 0);
    printf("map 2 MiB at an offset of a 16 MiB handle: %s\n", vmm_name(&b->v, rc));
    if (rc == CUDA_SUCCESS)
        VMM_MUST(b->v.unmap(b->range, PAGE_BYTES));
    rc = b->v.map(b->range, PAGE_BYTES, 0, big, 0);
    printf("map the first 2 MiB of it: %s\n", vmm_name(&b->v, rc));
    if (rc == CUDA_SUCCESS)
        VMM_MUST(b->v.unmap(b->range, PAGE_BYTES));
    VMM_MUST(b->v.map(b->range, 8 * PAGE_BYTES, 0, big, 0));
    rc = b->v.set_access(b->range, 2 * PAGE_BYTES, &b->v.access, 1);
    printf("access to a part of a mapped handle: %s\n", vmm_name(&b->v, rc));
    rc = b->v.map(b->range + 7 * PAGE_BYTES, PAGE_BYTES, 0, b->page[1], 0);
    printf("map over what is mapped: %s\n", vmm_name(&b->v, rc));
    rc = b->v.set_access(b->range, 16 * PAGE_BYTES, &b->v.access, 1);
    printf("access to a range with a hole at its end: %s\n", vmm_name(&b->v, rc));
    rc = b->v.unmap(b->range, 2 * PAGE_BYTES);
    printf("unmap a part of a mapped handle: %s\n", vmm_name(&b->v, rc));
    if (rc != CUDA_SUCCESS)
        VMM_MUST(b->v.unmap(b->range, 8 * PAGE_BYTES));
    else
        VMM_MUST(b->v.unmap(b->range + 2 * PAGE_BYTES, 6 * PAGE_BYTES));
    rc = b->v.unmap(b->range, 16 * PAGE_BYTES);
    printf("unmap a range that is not mapped: %s\n", vmm_name(&b->v, rc));
    VMM_MUST(b->v.release(big));
}

struct creator {
    struct vmm *v;
    vmm_page *page;
    size_t count;
};

static void *creator_run(void *arg)
{
    struct creator *c = (struct creator *)arg;
    CUDA_MUST(cudaSetDevice(0));
    for (size_t i = 0; i < c->count; i++)
        VMM_MUST(c->v->create(&c->page[i], PAGE_BYTES, &c->v->prop, 0));
    return NULL;
}

/* The whole budget at once: create with `threads` threads, map, one access call, unmap, release. */
static void pool_case(struct bench *b, size_t pages, unsigned threads)
{
    std::vector<vmm_page> h(pages);
    std::vector<creator> part(threads);
    std::vector<pthread_t> id(threads);
    double t[6];
    CUdeviceptr at;
    t[0] = now_us();
    for (unsigned i = 0; i < threads; i++) {
        size_t from = pages * i / threads;
        part[i] = {&b->v, &h[from], pages * (i + 1) / threads - from};
        if (pthread_create(&id[i], NULL, creator_run, &part[i]))
            exit(1);
    }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(id[i], NULL);
    t[1] = now_us();
    VMM_MUST(b->v.reserve(&at, pages * PAGE_BYTES, PAGE_BYTES, 0, 0));
    for (size_t i = 0; i < pages; i++)
        VMM_MUST(b->v.map(at + i * PAGE_BYTES, PAGE_BYTES, 0, h[i], 0));
    t[2] = now_us();
    VMM_MUST(b->v.set_access(at, pages * PAGE_BYTES, &b->v.access, 1));
    t[3] = now_us();
    VMM_MUST(b->v.unmap(at, pages * PAGE_BYTES));
    t[4] = now_us();
    for (vmm_page p : h)
        VMM_MUST(b->v.release(p));
    t[5] = now_us();
    VMM_MUST(b->v.address_free(at, pages * PAGE_BYTES));
    printf("%8zu | %7u |", pages, threads);
    for (int i = 0; i < 5; i++)
        printf(" %8.1f ms %6.2f us |", (t[i + 1] - t[i]) * 1e-3, (t[i + 1] - t[i]) / (double)pages);
    printf("\n");
}

static void bench_pool(struct bench *b, size_t pages)
{
    size_t idle = 0, total = 0;
    CUDA_MUST(cudaMemGetInfo(&idle, &total));
    pages = std::min(pages, (size_t)((idle - (2ull << 30)) / PAGE_BYTES));
    printf("\n## a pool of %.1f GiB: total and per page\n%8s | %7s | %21s | %21s | %21s | %21s | %21s\n",
           (double)pages * PAGE_BYTES / (1 << 30), "pages", "threads", "create", "map, one by one", "access, one call",
           "unmap, one call", "release, one by one");
    pool_case(b, pages, 1);
    pool_case(b, pages, 4);
    pool_case(b, pages, 1);
}

int main(int argc, char **argv)
{
    static struct bench b;
    double gib = argc > 1 ? atof(argv[1]) : 100;
    vmm_load(&b.v);
    print_device();
    CUDA_MUST(cudaMalloc(&b.busy_buf, BUSY_BYTES));
    CUDA_MUST(cudaMemset(b.busy_buf, 0x5a, BUSY_BYTES));
    CUDA_MUST(cudaMalloc(&b.busy_out, 4 * sizeof *b.busy_out));
    CUDA_MUST(cudaHostAlloc((void **)&b.stop, sizeof *b.stop, cudaHostAllocMapped));
    CUDA_MUST(cudaStreamCreateWithFlags(&b.busy, cudaStreamNonBlocking));
    CUDA_MUST(cudaStreamCreateWithFlags(&b.work, cudaStreamNonBlocking));
    int sms;
    CUDA_MUST(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    b.sms = (unsigned)sms;
    VMM_MUST(b.v.reserve(&b.range, PAGES * PAGE_BYTES, PAGE_BYTES, 0, 0));
    for (vmm_page &p : b.page)
        VMM_MUST(b.v.create(&p, PAGE_BYTES, &b.v.prop, 0));
    bool all = argc < 3 || strcmp(argv[2], "busy");
    if (all) {
        bench_rules(&b);
        bench_reserve(&b);
        bench_create(&b, "GPU idle");
        bench_map(&b, NULL);
        bench_large_handles(&b);
    }
    for (enum busy_kind kind : {BUSY_SPIN, BUSY_READ, BUSY_POLL}) {
        printf("\n## %s, alone\n", BUSY_NAME[kind]);
        busy_start(&b, kind, BUSY_NS / 4);
        CUDA_MUST(cudaStreamSynchronize(b.busy));
        busy_stop(&b);
        bench_map(&b, &kind);
    }
    busy_start(&b, BUSY_READ, BUSY_NS);
    bench_create(&b, BUSY_NAME[BUSY_READ]);
    busy_stop(&b);
    bench_alias(&b);
    if (all) {
        bench_launches(&b);
        bench_pool(&b, (size_t)(gib * (1 << 30) / PAGE_BYTES));
    }
    CUDA_MUST(cudaDeviceSynchronize());
    printf("\n%s\n", b.failures ? "FAIL" : "all checks passed");
    return b.failures ? 1 : 0;
}
