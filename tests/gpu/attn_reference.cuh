/* attn_reference.cuh - of check_attention_gpu: what is to come out of a batch, by softmax in double. */
#ifndef TANDEM_ATTN_REFERENCE_CUH
#define TANDEM_ATTN_REFERENCE_CUH

#include "tests/gpu/attn_problem.cuh"

namespace
{
constexpr uint32_t REF_THREADS = 256, REF_BLOCKS = 528;

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
    uint32_t *row = upload(p->ref_row), *of = upload(p->ref_seq);
    a.seq = p->d_all;
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
    CUDA_MUST(cudaFree(row));
    CUDA_MUST(cudaFree(of));
}
} // namespace

#endif
