/* attn_problem.cuh - of check_attention_gpu: a batch in guarded memory, and kernels that write it. */
#ifndef TANDEM_ATTN_PROBLEM_CUH
#define TANDEM_ATTN_PROBLEM_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/attention_internal.h"
#include "attention/attention_launch.cuh"
#include "tests/attn_cases.h"
#include "tests/bench/bench_cuda.h"

namespace
{
constexpr uint32_t LAYERS = 2, DEEP_LAYERS = 48;
constexpr uint32_t SPARE_ROWS = 2; /* in front and behind, of no sequence */
constexpr uint64_t Q_SEED = 77;
constexpr float STEEP_MOST = 6;   /* keys are up to 64 times as large as the last one */
constexpr uint32_t REF_ROWS = 48; /* of a long chunk: every so-manieth row is compared */

vmm driver;

/* ---- memory that ends where it ends ---- */

struct guarded {
    CUdeviceptr reserved, at;
    uint64_t bytes, pages;
};

void take(guarded *g, uint64_t bytes)
{
    g->pages = (bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    g->bytes = bytes;
    VMM_MUST(driver.reserve(&g->reserved, (g->pages + 2) * PAGE_BYTES, 0, 0, 0));
    g->at = g->reserved + PAGE_BYTES;
    vmm_page page;
    VMM_MUST(driver.create(&page, g->pages * PAGE_BYTES, &driver.prop, 0));
    VMM_MUST(driver.map(g->at, g->pages * PAGE_BYTES, 0, page, 0));
    VMM_MUST(driver.release(page));
    VMM_MUST(driver.set_access(g->at, g->pages * PAGE_BYTES, &driver.access, 1));
    CUDA_MUST(cudaMemset((void *)g->at, 0xff, g->pages * PAGE_BYTES));
}

void give(guarded *g)
{
    VMM_MUST(driver.unmap(g->at, g->pages * PAGE_BYTES));
    VMM_MUST(driver.address_free(g->reserved, (g->pages + 2) * PAGE_BYTES));
}

/* ---- data ---- */

__device__ __forceinline__ float noise(uint64_t i)
{
    i = (i + 1) * 0x9E3779B97F4A7C15ull;
    i ^= i >> 29;
    i *= 0xBF58476D1CE4E5B9ull;
    i ^= i >> 32;
    return (float)(uint32_t)i * (2.0f / 4294967296.0f) - 1;
}

__host__ __device__ __forceinline__ uint16_t narrow(float x, int f16)
{
    return f16 ? __half_as_ushort(__float2half(x)) : __bfloat16_as_ushort(__float2bfloat16(x));
}

__host__ __device__ __forceinline__ float wide(uint16_t x, int f16)
{
    if (!f16) {
        uint32_t u = (uint32_t)x << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    return __half2float(__ushort_as_half(x));
}

/* What a kernel writes of a batch: tokens of its sequences in one layer, rows of q. */
struct batch_fill {
    const attn_seq *seq; /* device memory */
    uint32_t seqs, side; /* elements of K, and of V, of a token */
    uint32_t window;
    uint64_t token_stride, kv_offset;
    char *q;
    uint32_t q_rows, q_run;
    uint64_t q_row_stride, q_seed;
    float q_size, steep;
    int f16;
    uint32_t parts;   /* PART_ bits */
    uint32_t poison;  /* not 0: these 16 bits everywhere, instead of what stands there at last */
    uint32_t late_ns; /* lets the next launch begin, and waits for so long; 0: neither */
};

constexpr uint32_t PART_NEW = 1;  /* K and V of each sequence's last `rows` tokens, this step's own */
constexpr uint32_t PART_PAST = 2; /* of those before */
constexpr uint32_t PART_Q = 4;

/* n pieces of `run` elements, each `stride` bytes behind the last; of the noise, `seed_step` between them. The first is 2^`log`
 * times as large as `size`, each one behind it smaller by `less` of a power of two. */
__device__ void fill_pieces(const batch_fill &a, char *at, uint64_t n, uint64_t stride, uint32_t run, float size,
                            uint64_t seed, uint32_t seed_step, float log = 0, float less = 0)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n * run;
         i += (uint64_t)gridDim.x * blockDim.x) {
        const float times = exp2f(fminf(log - less * (float)(i / run), STEEP_MOST));
        ((uint16_t *)(at + i / run * stride))[i % run] =
            a.poison ? (uint16_t)a.poison : narrow(times * size * noise(seed + i / run * seed_step + i % run), a.f16);
    }
}

__device__ __forceinline__ uint64_t nanoseconds()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

/* When late, a launch in front of attention as bad as it may be: it lets the next one begin at once, and writes at the end. */
__global__ void fill(const __grid_constant__ batch_fill a)
{
    if (a.late_ns)
        attn_let_next();
    attn_wait_earlier();
    for (const uint64_t begun = nanoseconds(); nanoseconds() - begun < a.late_ns;)
        __nanosleep(500);
    for (uint32_t i = 0; i < a.seqs && (a.parts & (PART_PAST | PART_NEW)); i++) {
        const attn_seq s = a.seq[i];
        /* Only what the first row sees on; with a window the rest stays NaN. */
        const uint32_t context = s.kv_len - s.rows, seen = context + 1;
        const uint32_t lo = a.window && seen > a.window ? seen - a.window : 0;
        const uint32_t from = a.parts & PART_PAST ? lo : context, to = a.parts & PART_NEW ? s.kv_len : context;
        const uint64_t at = a.kv_offset + from * a.token_stride;
        const uint64_t seed = 1000003ull * i + lo + (uint64_t)(from - lo) * 2 * a.side;
        fill_pieces(a, (char *)s.k + at, to - from, a.token_stride, a.side, 1, seed, 2 * a.side,
                    a.steep * (float)(s.kv_len - 1 - from), a.steep);
        fill_pieces(a, (char *)s.v + at, to - from, a.token_stride, a.side, 1, seed + a.side, 2 * a.side);
    }
    if (a.parts & PART_Q)
        fill_pieces(a, a.q, a.q_rows, a.q_row_stride, a.q_run, a.q_size, a.q_seed, a.q_run);
}

constexpr attn_grid FILL_GRID = {256, 256, 0, false, NULL};

/* ---- a batch ---- */

enum kv_place {
    TOGETHER, /* token-major, LAYERS layers of a token side by side */
    APART,    /* the same, every sequence in a mapping of its own */
    DEEP,     /* TOGETHER, of DEEP_LAYERS: tokens are hundreds of KB apart */
    DENSE,    /* one layer: all of a sequence's K, then its V */
};

constexpr uint32_t layers_of(kv_place place)
{
    return place == DENSE ? 1 : place == DEEP ? DEEP_LAYERS : LAYERS;
}

struct problem {
    const attn_case *c;
    attn_dtype dtype;
    float steep; /* each key is larger than the one behind it by so much of a power of two */
    std::vector<attn_seq> seq;
    uint32_t rows;   /* with spare ones */
    uint64_t tokens; /* of KV */
    uint32_t max_len;
    attn_gpu_config cfg;
    kv_place place;
    uint64_t token_bytes;    /* of K and V of all layers */
    std::vector<guarded> kv; /* one, or one each */
    guarded q, out;
    attn_seq *d_all; /* all sequences */
    attn_seq *d_seq; /* those of the step */
    uint32_t *d_count;
    std::vector<uint32_t> ref_row, ref_seq; /* rows to compare, and whose they are */
    std::vector<double> want;               /* [ref_row][H][D] */
    attn_gpu_io io;
};

void lay_out(problem *p)
{
    const attn_case *c = p->c;
    uint64_t token = p->token_bytes;
    uint32_t row = SPARE_ROWS;
    uint64_t at = 0;
    for (const attn_span *s = c->span; s->times; s++) {
        for (uint32_t i = 0; i < s->times; i++) {
            attn_seq q = {};
            q.k = (const void *)(at * token); /* from the start of KV, for now */
            q.first_row = row;
            q.rows = s->rows;
            q.kv_len = s->kv_len;
            p->seq.push_back(q);
            row += s->rows;
            at += s->kv_len;
            p->max_len = s->kv_len > p->max_len ? s->kv_len : p->max_len;
            uint32_t step = s->rows > REF_ROWS ? s->rows / REF_ROWS : 1;
            for (uint32_t r = 0; r < s->rows; r += r + step < s->rows || r == s->rows - 1 ? step : s->rows - 1 - r) {
                p->ref_row.push_back(q.first_row + r);
                p->ref_seq.push_back((uint32_t)p->seq.size() - 1);
            }
            at += 1 + i % 2 * 2; /* tokens of nobody, which are NaN */
        }
    }
    p->tokens = at;
    p->rows = row + SPARE_ROWS;
}

/* With a soft cap scores come near it. */
float q_size(const attn_case *c)
{
    return c->soft_cap > 5 ? 0.4f * c->soft_cap : 2;
}

/* `parts` as they are at last. */
batch_fill fill_of(const problem *p, uint32_t parts)
{
    const attn_case *c = p->c;
    batch_fill a = {};
    a.seq = p->d_all;
    a.seqs = (uint32_t)p->seq.size();
    a.side = c->HK * c->D;
    a.window = c->window;
    a.token_stride = p->cfg.token_stride;
    a.kv_offset = p->io.kv_offset;
    a.q = (char *)p->q.at + SPARE_ROWS * p->io.q_row_stride;
    a.q_rows = p->rows - 2 * SPARE_ROWS;
    a.q_run = c->H * c->D;
    a.q_row_stride = p->io.q_row_stride;
    a.q_seed = Q_SEED;
    a.q_size = q_size(c);
    a.steep = p->steep;
    a.f16 = p->dtype == ATTN_F16;
    a.parts = parts;
    return a;
}

void write_q(const problem *p, uint64_t seed, cudaStream_t stream)
{
    batch_fill a = fill_of(p, PART_Q);
    a.q_seed = seed;
    attn_grid g = FILL_GRID;
    g.stream = stream;
    CUDA_MUST(attn_launch(fill, g, a));
}

/* Memory of KV. Together: it ends, with the last layer's V of the last token, where the mapping ends. Apart: each sequence
 * begins with a page of its own and is followed by NaN up to the end of its last page, behind which nothing is mapped. */
void take_kv(problem *p)
{
    const uint64_t token = p->token_bytes;
    if (p->place == APART) {
        p->kv.resize(p->seq.size());
        for (size_t i = 0; i < p->seq.size(); i++) {
            take(&p->kv[i], p->seq[i].kv_len * token);
            p->seq[i].k = (const void *)p->kv[i].at;
        }
        return;
    }
    uint64_t bytes =
        (p->seq.back().kv_len * token) + (uintptr_t)p->seq.back().k; /* without nobody's tokens at the end */
    p->kv.resize(1);
    take(&p->kv[0], bytes);
    for (attn_seq &s : p->seq)
        s.k = (const char *)p->kv[0].at + (p->kv[0].pages * PAGE_BYTES - bytes) + (uintptr_t)s.k;
}

unsigned problems_made;

void make(problem *p, const attn_case *c, attn_dtype dtype, kv_place place = TOGETHER, float steep = 0)
{
    *p = problem();
    problems_made++;
    p->c = c;
    p->steep = steep;
    p->dtype = dtype;
    p->place = place;
    const uint64_t head = c->D * 2, side = c->HK * head;
    p->token_bytes = 2 * side * layers_of(place);
    attn_gpu_config *g = &p->cfg;
    g->dtype = dtype;
    g->heads = c->H;
    g->kv_heads = c->HK;
    g->head_dim = c->D;
    g->scale = 2 / sqrtf((float)c->D); /* sharper than usual: weights differ */
    g->soft_cap = c->soft_cap;
    g->window = c->window;
    g->token_stride = place == DENSE ? side : p->token_bytes;
    g->head_stride = head;
    lay_out(p);
    g->max_seqs = (uint32_t)p->seq.size();
    g->max_rows = p->rows;
    g->max_kv_len = p->max_len;

    take_kv(p);
    for (attn_seq &q : p->seq)
        q.v = (const char *)q.k + (place == DENSE ? q.kv_len : 1) * side;
    CUDA_MUST(cudaMalloc(&p->d_all, p->seq.size() * sizeof *p->d_all));
    CUDA_MUST(cudaMemcpy(p->d_all, p->seq.data(), p->seq.size() * sizeof *p->d_all, cudaMemcpyHostToDevice));
    p->io.q_row_stride = (c->H * c->D + 2 * c->HK * c->D) * 2; /* as a QKV product leaves it */
    p->io.out_row_stride = c->H * c->D * 2;
    p->io.kv_offset =
        (layers_of(place) - 1) * 2 * side; /* the last: what follows a sequence's last token is not its own */
    take(&p->q, p->rows * p->io.q_row_stride);
    take(&p->out, p->rows * p->io.out_row_stride);
    p->io.q = (void *)p->q.at;
    p->io.out = (void *)p->out.at;
    CUDA_MUST(attn_launch(fill, FILL_GRID, fill_of(p, PART_PAST | PART_NEW | PART_Q)));
    CUDA_MUST(cudaMalloc(&p->d_seq, p->seq.size() * sizeof *p->d_seq));
    CUDA_MUST(cudaMalloc(&p->d_count, sizeof *p->d_count));
    CUDA_MUST(cudaDeviceSynchronize());
}

void drop(problem *p)
{
    for (guarded &g : p->kv)
        give(&g);
    give(&p->q);
    give(&p->out);
    CUDA_MUST(cudaFree(p->d_all));
    CUDA_MUST(cudaFree(p->d_seq));
    CUDA_MUST(cudaFree(p->d_count));
}
} // namespace

#endif
