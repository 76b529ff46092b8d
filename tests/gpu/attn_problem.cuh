/* attn_problem.cuh - of check_attention_gpu: a batch in guarded memory, and what is to come out, by softmax in double. */
#ifndef TANDEM_ATTN_PROBLEM_CUH
#define TANDEM_ATTN_PROBLEM_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/attention_internal.h"
#include "tests/attn_cases.h"
#include "tests/bench/bench_cuda.h"

namespace
{
constexpr uint32_t LAYERS = 2, LAYER = 1; /* the last: what follows a sequence's last token is not its own */
constexpr uint32_t SPARE_ROWS = 2;        /* in front and behind, of no sequence */
constexpr uint64_t Q_SEED = 77;
constexpr uint32_t REF_THREADS = 256, REF_BLOCKS = 528;
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

/* n pieces of `run` elements, each `stride` bytes behind the last. */
__global__ void fill(char *at, uint64_t n, uint64_t stride, uint32_t run, float size, uint64_t seed, int f16)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n * run;
         i += (uint64_t)gridDim.x * blockDim.x)
        ((uint16_t *)(at + i / run * stride))[i % run] = narrow(size * noise(seed + i), f16);
}

/* ---- a batch ---- */

struct problem {
    const attn_case *c;
    attn_dtype dtype;
    std::vector<attn_seq> seq;
    uint32_t rows;   /* with spare ones */
    uint64_t tokens; /* of KV */
    uint32_t max_len;
    attn_gpu_config cfg;
    bool apart;              /* every sequence in a mapping of its own */
    std::vector<guarded> kv; /* one, or one each */
    guarded q, out;
    attn_seq *d_seq;
    uint32_t *d_count;
    std::vector<uint32_t> ref_row, ref_seq; /* rows to compare, and whose they are */
    std::vector<double> want;               /* [ref_row][H][D] */
    attn_gpu_io io;
};

void lay_out(problem *p)
{
    const attn_case *c = p->c;
    uint64_t token = p->cfg.token_stride;
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
            at += (i % 2) * 3; /* tokens of nobody */
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

void write_q(const problem *p, uint64_t seed, cudaStream_t stream)
{
    const attn_case *c = p->c;
    fill<<<256, 256, 0, stream>>>((char *)p->q.at + SPARE_ROWS * p->io.q_row_stride, p->rows - 2 * SPARE_ROWS,
                                  p->io.q_row_stride, c->H * c->D, q_size(c), seed, p->dtype == ATTN_F16);
}

/* Memory of KV. Together: it ends, with the last layer's V of the last token, where the mapping ends. Apart: each sequence
 * begins with a page of its own and is followed by NaN up to the end of its last page, behind which nothing is mapped. */
void take_kv(problem *p)
{
    const uint64_t token = p->cfg.token_stride;
    if (p->apart) {
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

void make(problem *p, const attn_case *c, attn_dtype dtype, bool apart = false)
{
    *p = problem();
    p->c = c;
    p->dtype = dtype;
    p->apart = apart;
    uint64_t head = c->D * 2, side = c->HK * head;
    attn_gpu_config *g = &p->cfg;
    g->dtype = dtype;
    g->heads = c->H;
    g->kv_heads = c->HK;
    g->head_dim = c->D;
    g->scale = 2 / sqrtf((float)c->D); /* sharper than usual: weights differ */
    g->soft_cap = c->soft_cap;
    g->window = c->window;
    g->token_stride = LAYERS * 2 * side;
    g->head_stride = head;
    lay_out(p);
    g->max_seqs = (uint32_t)p->seq.size();
    g->max_rows = p->rows;
    g->max_kv_len = p->max_len;

    take_kv(p);
    int f16 = dtype == ATTN_F16;
    for (size_t i = 0; i < p->seq.size(); i++) {
        attn_seq *s = &p->seq[i];
        s->v = (const char *)s->k + side;
        /* Only what the first row sees on; with a window the rest stays NaN. */
        uint32_t seen = s->kv_len - s->rows + 1;
        uint32_t lo = c->window && seen > c->window ? seen - c->window : 0;
        char *at = (char *)s->k + LAYER * 2 * side + lo * g->token_stride;
        fill<<<256, 256>>>(at, s->kv_len - lo, g->token_stride, 2 * c->HK * c->D, 1, 1000003 * i + lo, f16);
    }
    p->io.q_row_stride = (c->H * c->D + 2 * c->HK * c->D) * 2; /* as a QKV product leaves it */
    p->io.out_row_stride = c->H * c->D * 2;
    p->io.kv_offset = LAYER * 2 * side;
    take(&p->q, p->rows * p->io.q_row_stride);
    take(&p->out, p->rows * p->io.out_row_stride);
    p->io.q = (void *)p->q.at;
    p->io.out = (void *)p->out.at;
    write_q(p, Q_SEED, NULL);
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
    CUDA_MUST(cudaFree(p->d_seq));
    CUDA_MUST(cudaFree(p->d_count));
}

/* ---- the reference ---- */

struct ref_args {
    const char *q;
    const attn_seq *seq;
    const uint32_t *row, *of;
    double *want, *scratch; /* [REF_BLOCKS][max_len] */
    uint64_t q_row_stride, token_stride, kv_offset;
    uint32_t rows, H, HK, D, window, max_len;
    float scale, soft_cap;
    int f16;
};

/* One block per row and head: scores to scratch, then each thread some of D. */
__global__ void reference(ref_args a)
{
    __shared__ double part[REF_THREADS];
    __shared__ float q[256];
    double *score = a.scratch + (uint64_t)blockIdx.x * a.max_len;
    for (uint32_t job = blockIdx.x; job < a.rows * a.H; job += gridDim.x) {
        uint32_t i = job / a.H, h = job % a.H, row = a.row[i];
        const attn_seq s = a.seq[a.of[i]];
        uint64_t head = a.kv_offset + (uint64_t)(h / (a.H / a.HK)) * a.D * 2;
        uint32_t keys = s.kv_len - s.rows + (row - s.first_row) + 1;
        uint32_t lo = a.window && keys > a.window ? keys - a.window : 0;
        const uint16_t *qr = (const uint16_t *)(a.q + row * a.q_row_stride) + h * a.D;
        __syncthreads();
        for (uint32_t d = threadIdx.x; d < a.D; d += REF_THREADS)
            q[d] = wide(qr[d], a.f16);
        __syncthreads();
        double top = -1e300;
        for (uint32_t t = lo + threadIdx.x; t < keys; t += REF_THREADS) {
            const uint4 *k = (const uint4 *)((const char *)s.k + head + t * a.token_stride);
            double dot = 0;
            for (uint32_t d = 0; d < a.D; d += 8) {
                uint4 x = k[d / 8];
                const uint16_t *e = (const uint16_t *)&x;
                for (uint32_t j = 0; j < 8; j++)
                    dot += (double)q[d + j] * wide(e[j], a.f16);
            }
            dot *= a.scale;
            if (a.soft_cap > 0)
                dot = a.soft_cap * tanh(dot / a.soft_cap);
            score[t] = dot;
            top = fmax(top, dot);
        }
        part[threadIdx.x] = top;
        __syncthreads();
        for (uint32_t j = 0; j < REF_THREADS; j++)
            top = fmax(top, part[j]);
        __syncthreads();
        double sum = 0;
        for (uint32_t t = lo + threadIdx.x; t < keys; t += REF_THREADS)
            sum += score[t] = exp(score[t] - top);
        part[threadIdx.x] = sum;
        __syncthreads();
        sum = 0;
        for (uint32_t j = 0; j < REF_THREADS; j++)
            sum += part[j];
        __syncthreads();
        /* Threads of one d take every lanes-th key. */
        uint32_t lanes = REF_THREADS / a.D > 0 ? REF_THREADS / a.D : 1, lane = threadIdx.x / a.D, d = threadIdx.x % a.D;
        double o = 0;
        if (lane < lanes) {
            const char *v = (const char *)s.v + head + d * 2;
            for (uint32_t t = lo + lane; t < keys; t += lanes)
                o += score[t] * wide(*(const uint16_t *)(v + t * a.token_stride), a.f16);
        }
        part[threadIdx.x] = o;
        __syncthreads();
        if (threadIdx.x < a.D) {
            for (uint32_t l = 1; l < lanes; l++)
                o += part[l * a.D + threadIdx.x];
            a.want[(uint64_t)job * a.D + threadIdx.x] = o / sum;
        }
    }
}

template <typename T> T *upload(const std::vector<T> &v)
{
    T *d;
    CUDA_MUST(cudaMalloc(&d, v.size() * sizeof(T) + 16));
    CUDA_MUST(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return d;
}

void compute_reference(problem *p)
{
    const attn_case *c = p->c;
    ref_args a = {};
    a.q = (const char *)p->io.q;
    attn_seq *seq = upload(p->seq);
    uint32_t *row = upload(p->ref_row), *of = upload(p->ref_seq);
    a.seq = seq;
    a.row = row;
    a.of = of;
    a.q_row_stride = p->io.q_row_stride;
    a.token_stride = p->cfg.token_stride;
    a.kv_offset = p->io.kv_offset;
    a.rows = (uint32_t)p->ref_row.size();
    a.H = c->H;
    a.HK = c->HK;
    a.D = c->D;
    a.window = c->window;
    a.max_len = p->max_len;
    a.scale = p->cfg.scale;
    a.soft_cap = c->soft_cap;
    a.f16 = p->dtype == ATTN_F16;
    p->want.resize((uint64_t)a.rows * a.H * a.D);
    CUDA_MUST(cudaMalloc(&a.want, p->want.size() * sizeof(double)));
    CUDA_MUST(cudaMalloc(&a.scratch, (uint64_t)REF_BLOCKS * p->max_len * sizeof(double)));
    reference<<<REF_BLOCKS, REF_THREADS>>>(a);
    CUDA_MUST(cudaGetLastError());
    CUDA_MUST(cudaMemcpy(p->want.data(), a.want, p->want.size() * sizeof(double), cudaMemcpyDeviceToHost));
    CUDA_MUST(cudaFree(a.want));
    CUDA_MUST(cudaFree(a.scratch));
    CUDA_MUST(cudaFree(seq));
    CUDA_MUST(cudaFree(row));
    CUDA_MUST(cudaFree(of));
}
} // namespace

#endif
