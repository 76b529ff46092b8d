/* bench_attention_gpu.cu - back ends and policies of attention/ on a GPU against each other, without PyTorch.
 *
 *     bench_attention_gpu [--rounds N] [--back-end NAME] [--policies auto,fused,serial,streams,apart,plan] [--tag TEXT]
 *                         [--dim D] [--window KEYS] [--cap C] [--seqs N] [--rest MS] [--power MS] [--between 1] [--pages 1|2] BATCH ...
 *
 * A batch is one argument: "HEADS/KV_HEADS [ROWS:CONTEXT ..] [NxCONTEXT ..]": prefill chunks and decodes, for example
 * "32/8 2048:16384 48x16384". Head dimension 128 or --dim, bf16, KV token-major. Each contender is a CUDA graph of a plan and one run per layer
 * over as many layers (8 to 64) as make 2 GB of KV; replays take turns, in another order in each round: what ran before is worth up to
 * 5 % of a small batch. us per layer, with its share of the plan: median, p10, p90; and
 * the SMs' clock during replays, by one SM's counter, median.
 *
 * apart is what one graph for all steps does, whatever attn_gpu_choose says: auto by ATTN_WAY_APART; plan is the plan alone, us of one.
 *
 * --seqs: the step may have so many sequences, as one of a bucket may; without, those that it has.
 *
 * With --rest the GPU does nothing for so long before each replay: what it draws in the mean stays below its cap. Its clock falls in a
 * replay all the same: see the last column.
 *
 * With --between 1 a kernel stands in front of each run, as in a step, where layers of attention do not touch: it writes q, and K and
 * V of the step's own tokens, which then come from L2, and lets what is behind it begin early. It is in the times, and by itself is a contender, too ("none").
 *
 * With --power each is then repeated without a pause for so long: us per layer again, what the GPU draws, the SMs' clock (mean
 * of samples), and the energy of a layer; and again as it is timed above, each when the one before has ended (the pauses are in its us).
 * First of all what it draws while one thread alone runs.
 *
 * With --pages 1 KV is 2 MiB pages that are mapped in random order, as a pool has them that has served for a while, with 2 such pages in the
 * order in which they were made; else one piece.
 */
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include <unistd.h>

#include "attention/attention_internal.h"
#include "attention/attention_launch.cuh"
#include "tests/bench/bench_cuda.h"
#include "tests/bench/bench_draw.h"

namespace
{
constexpr uint32_t MIN_LAYERS = 8, MAX_LAYERS = 64, WARM_ROUNDS = 2;
constexpr uint64_t DISTINCT_BYTES = 2ull << 30, MOST_BYTES = 60ull << 30;
constexpr double PEAK_FLOPS = 790e12, PEAK_BYTES = 4.3e12;

constexpr uint32_t FROM_ROWS = 64; /* different ones, of what is written between layers */

/* What is measured of a back end. none: what stands between layers, by itself, once. */
enum entry { AUTO, FUSED, SERIAL, STREAMS, APART, PLAN, NONE, ENTRIES };
const char *const entry_names[ENTRIES] = {"auto", "fused", "serial", "streams", "apart", "plan", "none"};
const attn_gpu_policy entry_policies[ENTRIES] = {ATTN_GPU_AUTO,    ATTN_GPU_FUSED, ATTN_GPU_SERIAL,
                                                 ATTN_GPU_STREAMS, ATTN_GPU_AUTO,  ATTN_GPU_AUTO};

#define ATTN_MUST(call)                                                                                                \
    do {                                                                                                               \
        struct status must_st = STATUS_INIT;                                                                           \
        if ((call) != ST_OK) {                                                                                         \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, must_st.message);                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Pages of KV, in the order of their addresses. */
struct mapped {
    vmm driver;
    CUdeviceptr at;
    uint64_t bytes;
    bool in_order;
    std::vector<vmm_page> page;
};

char *map_pages(mapped *m, uint64_t bytes)
{
    const uint64_t n = (bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    if (!m->driver.map)
        vmm_load(&m->driver);
    m->bytes = n * PAGE_BYTES;
    m->page.resize(n);
    for (vmm_page &p : m->page)
        VMM_MUST(m->driver.create(&p, PAGE_BYTES, &m->driver.prop, 0));
    if (!m->in_order)
        std::shuffle(m->page.begin(), m->page.end(), std::mt19937_64(n));
    VMM_MUST(m->driver.reserve(&m->at, m->bytes, 0, 0, 0));
    for (uint64_t i = 0; i < n; i++)
        VMM_MUST(m->driver.map(m->at + i * PAGE_BYTES, PAGE_BYTES, 0, m->page[i], 0));
    VMM_MUST(m->driver.set_access(m->at, m->bytes, &m->driver.access, 1));
    return (char *)m->at;
}

void unmap_pages(mapped *m)
{
    VMM_MUST(m->driver.unmap(m->at, m->bytes));
    VMM_MUST(m->driver.address_free(m->at, m->bytes));
    for (vmm_page p : m->page)
        VMM_MUST(m->driver.release(p));
    m->page.clear();
}

struct batch {
    std::string text;
    uint32_t heads, kv_heads, dim, window, layers, rows, max_seq_rows, max_len;
    uint32_t room; /* sequences that the step may have */
    float cap;
    uint64_t tokens, bytes; /* bytes: KV of decodes, a layer */
    double flops;
    std::vector<attn_seq> seq;
    char *kv, *q, *out, *from;
    attn_seq *d_seq;
    uint32_t *d_count;
    char **d_token; /* of each row: K of its token in layer 0 */
};

void add(batch *b, uint32_t times, uint32_t rows, uint32_t context)
{
    for (uint32_t i = 0; i < times; i++) {
        attn_seq s = {};
        s.k = (const void *)(uintptr_t)b->tokens; /* becomes an address later */
        s.first_row = b->rows;
        s.rows = rows;
        s.kv_len = context;
        b->seq.push_back(s);
        b->rows += rows;
        b->tokens += context;
    }
    b->max_seq_rows = std::max(b->max_seq_rows, rows);
    b->max_len = std::max(b->max_len, context);
    uint64_t seen = 0; /* keys, of all rows */
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t keys = context - rows + r + 1;
        seen += b->window && b->window < keys ? b->window : keys;
    }
    if (rows > 1)
        b->flops += times * 4.0 * b->heads * b->dim * (double)seen;
    else
        b->bytes += 4ull * b->kv_heads * b->dim * times * seen;
}

bool parse(batch *b, const char *text)
{
    b->text = text;
    std::string copy = text;
    for (char *word = strtok(&copy[0], " "); word; word = strtok(NULL, " ")) {
        uint32_t x, y;
        char between, end;
        if (sscanf(word, "%u%c%u%c", &x, &between, &y, &end) != 3 || x == 0 || y == 0)
            return false;
        if (between == '/' && x % y == 0) {
            b->heads = x;
            b->kv_heads = y;
        } else if (b->kv_heads && between == ':' && x <= y) {
            add(b, 1, x, y);
        } else if (b->kv_heads && between == 'x') {
            add(b, x, 1, y);
        } else {
            return false;
        }
    }
    return !b->seq.empty();
}

/* pages: NULL: one piece. */
void allocate(batch *b, mapped *pages)
{
    uint64_t layer = b->tokens * 4 * b->kv_heads * b->dim, q_bytes = (uint64_t)b->rows * b->heads * b->dim * 2;
    b->layers = (uint32_t)std::min<uint64_t>(MAX_LAYERS, (DISTINCT_BYTES + layer - 1) / layer);
    b->layers = std::max(b->layers, std::min(MIN_LAYERS, (uint32_t)(MOST_BYTES / layer)));
    if (pages)
        b->kv = map_pages(pages, layer * b->layers);
    else
        CUDA_MUST(cudaMalloc(&b->kv, layer * b->layers));
    CUDA_MUST(cudaMalloc(&b->q, q_bytes));
    CUDA_MUST(cudaMalloc(&b->out, q_bytes));
    draw_fill<<<1024, 256>>>((uint16_t *)b->kv, layer * b->layers / 2);
    draw_fill<<<1024, 256>>>((uint16_t *)b->q, q_bytes / 2);
    const uint64_t from_bytes = FROM_ROWS * (uint64_t)std::max(b->heads, 2 * b->kv_heads) * b->dim * 2;
    CUDA_MUST(cudaMalloc(&b->from, from_bytes));
    draw_fill<<<1024, 256>>>((uint16_t *)b->from, from_bytes / 2);
    for (attn_seq &s : b->seq) {
        s.k = b->kv + (uintptr_t)s.k * b->layers * 4 * b->kv_heads * b->dim;
        s.v = (const char *)s.k + b->kv_heads * b->dim * 2;
    }
    uint32_t n = (uint32_t)b->seq.size();
    std::vector<char *> token;
    for (const attn_seq &s : b->seq)
        for (uint32_t r = 0; r < s.rows; r++)
            token.push_back((char *)s.k + (uint64_t)(s.kv_len - s.rows + r) * b->layers * 4 * b->kv_heads * b->dim);
    CUDA_MUST(cudaMalloc(&b->d_token, token.size() * sizeof(char *)));
    CUDA_MUST(cudaMemcpy(b->d_token, token.data(), token.size() * sizeof(char *), cudaMemcpyHostToDevice));
    b->room = b->room > n ? b->room : n;
    CUDA_MUST(cudaMalloc(&b->d_seq, b->room * sizeof(attn_seq)));
    CUDA_MUST(cudaMalloc(&b->d_count, sizeof n));
    CUDA_MUST(cudaMemcpy(b->d_seq, b->seq.data(), n * sizeof(attn_seq), cudaMemcpyHostToDevice));
    CUDA_MUST(cudaMemcpy(b->d_count, &n, sizeof n, cudaMemcpyHostToDevice));
    CUDA_MUST(cudaDeviceSynchronize());
}

/* --between, as a step's kernels are: launched early, and lets the next one begin at once. */
struct between_args {
    const uint4 *from; /* [FROM_ROWS][words] */
    uint32_t words, q_words, kv_words;
    uint4 *q;
    char *const *token;
    uint64_t kv_offset;
};

/* A block for each row of q, which it writes, and K and V of the row's token. */
__global__ void write_rows(const between_args a)
{
    const uint4 *from = a.from + blockIdx.x % FROM_ROWS * a.words;
    attn_let_next();
    attn_wait_earlier();
    for (uint32_t i = threadIdx.x; i < a.q_words; i += blockDim.x)
        a.q[(uint64_t)blockIdx.x * a.q_words + i] = from[i];
    for (uint32_t i = threadIdx.x; i < a.kv_words; i += blockDim.x)
        ((uint4 *)(a.token[blockIdx.x] + a.kv_offset))[i] = from[i];
}

void launch_between(const batch *b, uint32_t layer, cudaStream_t stream)
{
    between_args a = {};
    a.from = (const uint4 *)b->from;
    a.q_words = b->heads * b->dim * 2 / 16;
    a.kv_words = 4 * b->kv_heads * b->dim / 16;
    a.words = std::max(a.q_words, a.kv_words);
    a.q = (uint4 *)b->q;
    a.token = b->d_token;
    a.kv_offset = (uint64_t)layer * 4 * b->kv_heads * b->dim;
    CUDA_MUST(attn_launch(write_rows, {b->rows, 256, 0, true, stream}, a));
}

/* When an SM's clock said what. */
struct stamp {
    uint64_t clocks, ns;
    uint32_t sm;
};

__global__ void put_stamp(stamp *to)
{
    asm volatile("mov.u32 %0, %%smid;" : "=r"(to->sm));
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(to->ns));
    to->clocks = clock64();
}

struct contender {
    const char *back_end, *policy;
    attn_gpu *attn;
    cudaGraphExec_t exec;
    samples times, mhz;
};

void print_power(const draw_power *p, const contender *c, const batch *b, cudaStream_t stream)
{
    for (bool pauses : {false, true}) {
        draw_result d = draw_of(
            p, stream, [&] { CUDA_MUST(cudaGraphLaunch(c->exec, stream)); }, pauses);
        printf("%-32s        %-5s %-8s %s: %8.1f us, %4.0f W, %4.0f MHz, %7.1f mJ\n", b->text.c_str(), c->back_end,
               c->policy, pauses ? "each for itself" : "without a pause", d.us / b->layers, d.watts, d.mhz,
               d.mj / b->layers);
    }
}

/* False: the back end cannot do this. */
bool create(contender *c, const batch *b, const attn_gpu_ops *ops, int e)
{
    attn_gpu_config cfg = {};
    cfg.ops = ops;
    cfg.dtype = ATTN_BF16;
    cfg.heads = b->heads;
    cfg.kv_heads = b->kv_heads;
    cfg.head_dim = b->dim;
    cfg.scale = 1 / sqrtf((float)b->dim);
    cfg.soft_cap = b->cap;
    cfg.window = b->window;
    cfg.token_stride = (uint64_t)b->layers * 4 * b->kv_heads * b->dim;
    cfg.head_stride = b->dim * 2;
    cfg.max_seqs = b->room;
    cfg.max_rows = std::max(b->rows, b->room);
    cfg.max_kv_len = b->max_len;
    cfg.policy = entry_policies[e];
    struct status st = STATUS_INIT;
    const status_code rc = attn_gpu_create(&c->attn, &cfg, &st);
    if (rc == ST_OK)
        return true;
    fprintf(stderr, "%s, %s: %s\n", ops->name, entry_names[e], st.message);
    if (rc != ST_UNIMPLEMENTED)
        exit(1);
    return false;
}

/* False: the back end cannot do this. */
bool capture(contender *c, const batch *b, const attn_gpu_ops *ops, int e, bool between, cudaStream_t stream)
{
    attn_gpu_step step = {};
    step.seq = b->d_seq;
    step.counts = b->d_count;
    step.max_seqs = b->room;
    step.max_rows = std::max(b->rows, b->room);
    step.max_seq_rows = b->max_seq_rows;
    step.stream = stream;
    if (e != NONE) {
        if (!create(c, b, ops, e))
            return false;
        step.way = e == APART ? ATTN_WAY_APART : attn_gpu_choose(c->attn, b->seq.data(), (uint32_t)b->seq.size());
    }
    cudaGraph_t graph;
    CUDA_MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (uint32_t i = 0; i < (e == NONE ? 0 : e == PLAN ? b->layers : 1); i++)
        ATTN_MUST(attn_gpu_plan(c->attn, &step, &must_st));
    for (uint32_t l = 0; l < b->layers && e != PLAN; l++) {
        attn_gpu_io io = {};
        io.q = b->q;
        io.out = b->out;
        io.q_row_stride = io.out_row_stride = b->heads * b->dim * 2;
        io.kv_offset = (uint64_t)l * 4 * b->kv_heads * b->dim;
        if (between)
            launch_between(b, l, stream);
        if (e != NONE)
            ATTN_MUST(attn_gpu_run(c->attn, &step, &io, &must_st));
    }
    CUDA_MUST(cudaStreamEndCapture(stream, &graph));
    CUDA_MUST(cudaGraphInstantiate(&c->exec, graph, 0));
    CUDA_MUST(cudaGraphDestroy(graph));
    c->back_end = ops->name;
    c->policy = entry_names[e];
    return true;
}

struct options {
    const char *back_end, *policies = "auto,fused,serial", *tag = "";
    uint32_t rounds = 7, dim = 128, window, rest_ms, seqs;
    float cap;
    bool between;
    draw_power drawn;
    mapped *pages;
};

std::vector<contender> contenders_of(const batch *b, const options &o, cudaStream_t stream)
{
    std::vector<contender> all;
    for (uint32_t i = 0; attn_gpu_back_ends[i]; i++)
        for (int e = 0; e < ENTRIES; e++)
            if (e == NONE ? o.between && i == 0
                          : strstr(o.policies, entry_names[e]) &&
                                (!o.back_end || !strcmp(o.back_end, attn_gpu_back_ends[i]->name))) {
                all.emplace_back();
                if (!capture(&all.back(), b, attn_gpu_back_ends[i], e, o.between, stream))
                    all.pop_back();
            }
    return all;
}

/* One replay, by events; and the mean clock from just before to just after it, where both stamps are of one SM. */
void replay(contender *c, const batch *b, cudaStream_t stream, const cudaEvent_t *event, stamp *at, uint32_t rest_ms,
            bool counts)
{
    float ms;
    if (rest_ms)
        usleep(rest_ms * 1000);
    put_stamp<<<1, 1, 0, stream>>>(&at[0]);
    CUDA_MUST(cudaEventRecord(event[0], stream));
    CUDA_MUST(cudaGraphLaunch(c->exec, stream));
    CUDA_MUST(cudaEventRecord(event[1], stream));
    put_stamp<<<1, 1, 0, stream>>>(&at[1]);
    CUDA_MUST(cudaStreamSynchronize(stream));
    CUDA_MUST(cudaEventElapsedTime(&ms, event[0], event[1]));
    if (!counts)
        return;
    c->times.us.push_back(ms * 1e3 / b->layers);
    if (at[0].sm == at[1].sm)
        c->mhz.us.push_back((double)(at[1].clocks - at[0].clocks) * 1e3 / (double)(at[1].ns - at[0].ns));
}

void measure(batch *b, const options &o)
{
    allocate(b, o.pages);
    cudaStream_t stream;
    cudaEvent_t event[2];
    stamp *at;
    CUDA_MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (cudaEvent_t &e : event)
        CUDA_MUST(cudaEventCreate(&e));
    CUDA_MUST(cudaMallocHost(&at, 2 * sizeof *at));
    std::vector<contender> all = contenders_of(b, o, stream);
    std::vector<contender *> turn;
    for (contender &c : all)
        turn.push_back(&c);
    std::mt19937 order(1);
    for (uint32_t r = 0; r < o.rounds + WARM_ROUNDS; r++) {
        std::shuffle(turn.begin(), turn.end(), order);
        for (contender *c : turn)
            replay(c, b, stream, event, at, o.rest_ms, r >= WARM_ROUNDS);
    }
    double limit = std::max(b->flops / PEAK_FLOPS, (double)b->bytes / PEAK_BYTES) * 1e6;
    for (contender &c : all) {
        double us = sample_at(&c.times, 0.5);
        printf("%-32s %-6s %-5s %-8s %8.1f %8.1f %8.1f %6.0f %6.2f %6.2f %6.0f\n", b->text.c_str(), o.tag, c.back_end,
               c.policy, us, sample_at(&c.times, 0.1), sample_at(&c.times, 0.9), b->flops / us * 1e-6,
               (double)b->bytes / us * 1e-6, limit / us, c.mhz.us.empty() ? 0 : sample_at(&c.mhz, 0.5));
        if (o.drawn.ms)
            print_power(&o.drawn, &c, b, stream);
        CUDA_MUST(cudaGraphExecDestroy(c.exec));
        attn_gpu_destroy(c.attn);
    }
    fflush(stdout);
    if (o.pages)
        unmap_pages(o.pages);
    else
        CUDA_MUST(cudaFree(b->kv));
    CUDA_MUST(cudaFree(b->q));
    CUDA_MUST(cudaFree(b->out));
    CUDA_MUST(cudaFree(b->from));
    CUDA_MUST(cudaFree(b->d_token));
    CUDA_MUST(cudaFree(b->d_seq));
    CUDA_MUST(cudaFree(b->d_count));
    CUDA_MUST(cudaFreeHost(at));
    for (cudaEvent_t e : event)
        CUDA_MUST(cudaEventDestroy(e));
    CUDA_MUST(cudaStreamDestroy(stream));
}
} // namespace

int main(int argc, char **argv)
{
    options o = {};
    mapped pages = {};
    int devices = 0;
    int i = 1;
    for (; i + 1 < argc && !strncmp(argv[i], "--", 2); i += 2) {
        if (!strcmp(argv[i], "--rounds"))
            o.rounds = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--back-end"))
            o.back_end = argv[i + 1];
        else if (!strcmp(argv[i], "--policies"))
            o.policies = argv[i + 1];
        else if (!strcmp(argv[i], "--tag"))
            o.tag = argv[i + 1];
        else if (!strcmp(argv[i], "--dim"))
            o.dim = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--window"))
            o.window = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--cap"))
            o.cap = strtof(argv[i + 1], NULL);
        else if (!strcmp(argv[i], "--seqs"))
            o.seqs = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--rest"))
            o.rest_ms = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--power"))
            o.drawn.ms = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--between"))
            o.between = strtoul(argv[i + 1], NULL, 10) != 0;
        else if (!strcmp(argv[i], "--pages")) {
            pages.in_order = strtoul(argv[i + 1], NULL, 10) == 2;
            o.pages = strtoul(argv[i + 1], NULL, 10) ? &pages : NULL;
        } else
            break;
    }
    if (i >= argc || o.rounds == 0 || o.dim == 0 || o.dim % 8 || o.dim > 256 || !strncmp(argv[i], "--", 2)) {
        fprintf(stderr,
                "usage: %s [--rounds N] [--back-end NAME] [--policies NAME,..] [--tag TEXT] [--dim D] [--window KEYS] "
                "[--cap C] [--seqs N] [--rest MS] [--power MS] [--between 1] [--pages 1|2] "
                "\"HEADS/KV_HEADS [ROWS:CONTEXT ..] [NxCONTEXT ..]\" ...\n",
                argv[0]);
        return 2;
    }
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU\n");
        return 77;
    }
    if (o.drawn.ms)
        draw_start(&o.drawn);
    printf("%-32s %-6s %-5s %-8s %8s %8s %8s TFLOP/s TB/s  limit    MHz\n", "batch", "tag", "by", "policy", "us", "p10",
           "p90");
    for (; i < argc; i++) {
        batch b = {};
        b.dim = o.dim;
        b.window = o.window;
        b.cap = o.cap;
        b.room = o.seqs;
        if (!parse(&b, argv[i])) {
            fprintf(stderr, "%s: expected \"HEADS/KV_HEADS [ROWS:CONTEXT ..] [NxCONTEXT ..]\"\n", argv[i]);
            return 2;
        }
        measure(&b, o);
    }
    return 0;
}
