/* check_attention_gpu.cu - every back end of attention/ on a GPU against softmax in double on the same GPU.
 *
 *     check_attention_gpu [--quick] [--once] [--back-end NAME] [--case TEXT]      ends with 77 where there is no GPU
 *
 * --quick leaves out large shapes, f16 and groups; --once runs each policy and the fixed cut a single time, without graphs and
 * layers, for checkers under which a launch takes seconds.
 *
 * KV is token-major with LAYERS layers, of which one is asked for; it lies against unmapped memory on both sides, and
 * whatever no row may read is NaN: other layers, rows of q and out that belong to no sequence, memory behind each length.
 *
 * Tolerance: weights and results are rounded to 16 bits, relatively by up to u = 2^-8 of bf16, 2^-11 of f16. With A, the mean
 * of |v| by a row's weights, an element may be off by u * (A + |element|), A <= 1. Allowed is half of that for A = 1, and a little
 * for sums in float: errors of many weights cancel out, and one weight above all others is exact where it is the maximum
 * that powers are relative to. A kernel that is further off has rounded that one as well. Where scores are tens (soft caps
 * of 30 and 50, scores up to 60 before them) few keys have nearly all the weight, nothing cancels out, and Hopper's prefill does
 * round the largest: the whole is allowed.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/attention_internal.h"
#include "tests/attn_cases.h"
#include "tests/bench/bench_cuda.h"

namespace
{
constexpr uint32_t LAYERS = 2, LAYER = 1; /* the last: what follows a sequence's last token is not its own */
constexpr uint32_t FIXED_KEYS = 256;
constexpr uint32_t SPARE_ROWS = 2; /* in front and behind, of no sequence */
constexpr uint64_t Q_SEED = 77;
constexpr uint32_t REF_THREADS = 256, REF_BLOCKS = 528;
constexpr uint32_t REF_ROWS = 48; /* of a long chunk: every so-manieth row is compared */

unsigned failures;
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
    guarded kv, q, out;
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

/* KV ends, with the last layer's V of the last token, where the mapping ends. */
void make(problem *p, const attn_case *c, attn_dtype dtype)
{
    *p = problem();
    p->c = c;
    p->dtype = dtype;
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

    uint64_t tokens = p->tokens;
    while (p->seq.back().kv_len + (uint64_t)(uintptr_t)p->seq.back().k / g->token_stride < tokens)
        tokens--; /* nobody's tokens at the end */
    uint64_t bytes = tokens * g->token_stride;
    take(&p->kv, bytes);
    char *base = (char *)p->kv.at + (p->kv.pages * PAGE_BYTES - bytes);
    int f16 = dtype == ATTN_F16;
    for (size_t i = 0; i < p->seq.size(); i++) {
        attn_seq *s = &p->seq[i];
        s->k = base + (uintptr_t)s->k;
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
    give(&p->kv);
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

/* ---- running ---- */

#define ATTN_MUST(call)                                                                                                \
    do {                                                                                                               \
        struct status must_st = STATUS_INIT;                                                                           \
        if ((call(&must_st)) != ST_OK) {                                                                               \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, must_st.message);                                       \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

struct runner {
    attn_gpu *attn;
    attn_gpu_step step;
    cudaStream_t stream;
};

/* False when the back end cannot do it. */
bool start(runner *r, const problem *p, const attn_gpu_ops *ops, attn_gpu_policy policy, uint32_t fixed)
{
    attn_gpu_config cfg = p->cfg;
    cfg.ops = ops;
    cfg.policy = policy;
    cfg.fixed_split_keys = fixed;
    struct status st = STATUS_INIT;
    enum status_code rc = attn_gpu_create(&r->attn, &cfg, &st);
    if (rc == ST_UNIMPLEMENTED)
        return false;
    if (rc != ST_OK) {
        fprintf(stderr, "%s, %s: %s\n", ops->name, p->c->name, st.message);
        exit(1);
    }
    CUDA_MUST(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking));
    r->step = {};
    r->step.seq = p->d_seq;
    r->step.counts = p->d_count;
    r->step.max_seqs = cfg.max_seqs;
    r->step.max_rows = cfg.max_rows;
    for (const attn_seq &s : p->seq)
        r->step.max_seq_rows = s.rows > r->step.max_seq_rows ? s.rows : r->step.max_seq_rows;
    r->step.stream = r->stream;
    return true;
}

void stop(runner *r)
{
    attn_gpu_destroy(r->attn);
    CUDA_MUST(cudaStreamDestroy(r->stream));
}

void set_batch(const problem *p, const attn_seq *seq, uint32_t n)
{
    CUDA_MUST(cudaMemcpy(p->d_seq, seq, n * sizeof *seq, cudaMemcpyHostToDevice));
    CUDA_MUST(cudaMemcpy(p->d_count, &n, sizeof n, cudaMemcpyHostToDevice));
    CUDA_MUST(cudaMemset((void *)p->out.at, 0xff, p->out.bytes));
    CUDA_MUST(cudaDeviceSynchronize());
}

void plan_and_run(runner *r, const problem *p)
{
    ATTN_MUST([&](struct status *st) { return attn_gpu_plan(r->attn, &r->step, st); });
    ATTN_MUST([&](struct status *st) { return attn_gpu_run(r->attn, &r->step, &p->io, st); });
}

uint32_t fault_of(const runner *r)
{
    uint32_t f;
    CUDA_MUST(cudaMemcpy(&f, attn_gpu_fault(r->attn), sizeof f, cudaMemcpyDeviceToHost));
    return f;
}

std::vector<uint16_t> result(const runner *r, const problem *p)
{
    CUDA_MUST(cudaStreamSynchronize(r->stream));
    std::vector<uint16_t> out(p->out.bytes / 2);
    CUDA_MUST(cudaMemcpy(out.data(), (void *)p->out.at, p->out.bytes, cudaMemcpyDeviceToHost));
    return out;
}

void fail(const problem *p, const char *what, const char *text)
{
    failures++;
    printf("FAIL %s, %s, %s: %s\n", p->c->name, p->dtype == ATTN_F16 ? "f16" : "bf16", what, text);
}

/* Rows of no sequence stay as they were. */
void compare_spare(const problem *p, const std::vector<uint16_t> &out, const char *what)
{
    uint64_t row = (uint64_t)p->c->H * p->c->D;
    for (uint32_t r = 0; r < p->rows; r = r + 1 == SPARE_ROWS ? p->rows - SPARE_ROWS : r + 1)
        for (uint64_t i = 0; i < row; i++)
            if (out[r * row + i] != 0xffff)
                return fail(p, what, "a row of no sequence was written");
}

/* Returns the largest error, in units of what is allowed. */
double compare(const problem *p, const std::vector<uint16_t> &out, const char *what)
{
    const attn_case *c = p->c;
    int f16 = p->dtype == ATTN_F16;
    double unit = (f16 ? 0x1p-12 : 0x1p-9) * (q_size(c) > 2 ? 2 : 1), worst = 0, squares = 0, all = 0;
    for (size_t i = 0; i < p->want.size(); i++) {
        uint64_t at = (uint64_t)p->ref_row[i / (c->H * c->D)] * c->H * c->D + i % (c->H * c->D);
        double want = p->want[i], err = fabs((double)wide(out[at], f16) - want);
        double share = err / (1.05 * unit * (1 + fabs(want)) + 1e-5);
        squares += err * err;
        all += want * want;
        if (!(share <= worst))
            worst = share;
        if (!(share <= 1)) {
            char text[200];
            snprintf(text, sizeof text, "row %u, head %u, d %u: %g, expected %g", p->ref_row[i / (c->H * c->D)],
                     (uint32_t)(i / c->D % c->H), (uint32_t)(i % c->D), wide(out[at], f16), want);
            fail(p, what, text);
            return share;
        }
    }
    if (!(sqrt(squares / all) <= (f16 ? 1e-3 : 6e-3))) {
        char text[100];
        snprintf(text, sizeof text, "relative error %.2e", sqrt(squares / all));
        fail(p, what, text);
    }
    compare_spare(p, out, what);
    return worst;
}

/* Same bits in the rows of seq. */
bool same_rows(const problem *p, const attn_seq &s, const std::vector<uint16_t> &a, const std::vector<uint16_t> &b)
{
    uint64_t row = (uint64_t)p->c->H * p->c->D;
    return !memcmp(&a[s.first_row * row], &b[s.first_row * row], s.rows * row * 2);
}

/* With a fixed cut: the whole batch, some sequences alone, and every second one, backwards; all bits the same. */
void check_fixed(const problem *p, const attn_gpu_ops *ops, attn_gpu_policy policy, const char *what)
{
    runner r;
    if (!start(&r, p, ops, policy, FIXED_KEYS))
        return;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    std::vector<uint16_t> whole = result(&r, p);
    compare(p, whole, what);
    uint32_t step = p->seq.size() > 12 ? (uint32_t)p->seq.size() / 12 : 1;
    for (uint32_t i = 0; i < p->seq.size(); i += step) {
        set_batch(p, &p->seq[i], 1);
        plan_and_run(&r, p);
        if (!same_rows(p, p->seq[i], whole, result(&r, p)))
            fail(p, what, "a sequence alone has other bits");
    }
    std::vector<attn_seq> half;
    for (size_t i = p->seq.size(); i >= 2; i -= 2)
        half.push_back(p->seq[i - 1]);
    if (!half.empty()) {
        set_batch(p, half.data(), (uint32_t)half.size());
        plan_and_run(&r, p);
        std::vector<uint16_t> out = result(&r, p);
        for (const attn_seq &s : half)
            if (!same_rows(p, s, whole, out))
                fail(p, what, "half of the batch has other bits");
    }
    stop(&r);
}

/* Batch-invariant: every sequence again in two chunks, and in single rows at its end, has the bits of the whole batch. */
void check_invariant(const problem *p, const attn_gpu_ops *ops, const char *what)
{
    problem q = *p;
    q.cfg.batch_invariant = true;
    runner r;
    if (!start(&r, &q, ops, ATTN_GPU_AUTO, 0))
        return;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    std::vector<uint16_t> whole = result(&r, p);
    compare(p, whole, what);
    const uint32_t kinds = 3;
    for (uint32_t kind = 0; kind < kinds; kind++) {
        std::vector<attn_seq> cut;
        for (const attn_seq &s : p->seq) {
            uint32_t rows = kind == 2 ? 1 : (s.rows + kind) / 2, first = kind == 2 ? s.rows - 1
                                                                         : kind    ? s.rows - rows
                                                                                   : 0;
            attn_seq c = s;
            if (rows == 0)
                continue;
            c.first_row += first;
            c.rows = rows;
            c.kv_len -= s.rows - first - rows;
            cut.push_back(c);
        }
        set_batch(p, cut.data(), (uint32_t)cut.size());
        plan_and_run(&r, p);
        std::vector<uint16_t> out = result(&r, p);
        for (const attn_seq &s : cut)
            if (!same_rows(p, s, whole, out)) {
                fail(p, what, kind == 2 ? "single rows have other bits" : "a half chunk has other bits");
                break;
            }
    }
    stop(&r);
}

/* One captured graph: the whole batch, nobody, one sequence, the whole batch. */
void check_graph(const problem *p, const attn_gpu_ops *ops, attn_gpu_policy policy, const char *what)
{
    runner r;
    if (!start(&r, p, ops, policy, FIXED_KEYS))
        return;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_MUST(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeGlobal));
    plan_and_run(&r, p);
    plan_and_run(&r, p);
    CUDA_MUST(cudaStreamEndCapture(r.stream, &graph));
    CUDA_MUST(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<uint16_t> whole;
    for (uint32_t pass = 0; pass < 4; pass++) {
        uint32_t n = pass == 1 ? 0 : pass == 2 ? 1 : (uint32_t)p->seq.size();
        set_batch(p, p->seq.data() + (pass == 2 ? p->seq.size() - 1 : 0), n);
        CUDA_MUST(cudaGraphLaunch(exec, r.stream));
        std::vector<uint16_t> out = result(&r, p);
        compare_spare(p, out, what);
        if (pass == 0) {
            compare(p, out, what);
            whole = out;
        } else if (pass == 1) {
            for (uint16_t x : out)
                if (x != 0xffff) {
                    fail(p, what, "a batch of nobody writes");
                    break;
                }
        } else if (pass == 2 && !same_rows(p, p->seq.back(), whole, out)) {
            fail(p, what, "one sequence by the graph has other bits");
        } else if (pass == 3 && out != whole) {
            fail(p, what, "the same batch by the same graph has other bits");
        }
        if (fault_of(&r))
            fail(p, what, "a fault is reported");
    }
    CUDA_MUST(cudaGraphExecDestroy(exec));
    CUDA_MUST(cudaGraphDestroy(graph));
    stop(&r);
}

/* Layers one after the other, each with a q that a kernel in front of it writes into the same memory: no launch may read it,
 * or write out, before its turn. */
void check_layers(const problem *p, const attn_gpu_ops *ops, attn_gpu_policy policy, const char *what)
{
    runner r;
    if (!start(&r, p, ops, policy, 0))
        return;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    CUDA_MUST(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeGlobal));
    ATTN_MUST([&](struct status *st) { return attn_gpu_plan(r.attn, &r.step, st); });
    for (uint32_t layer = 0; layer < 6; layer++) {
        write_q(p, layer % 2 ? Q_SEED : Q_SEED + 1, r.stream);
        ATTN_MUST([&](struct status *st) { return attn_gpu_run(r.attn, &r.step, &p->io, st); });
    }
    CUDA_MUST(cudaStreamEndCapture(r.stream, &graph));
    CUDA_MUST(cudaGraphInstantiate(&exec, graph, 0));
    for (uint32_t pass = 0; pass < 3; pass++) {
        CUDA_MUST(cudaGraphLaunch(exec, r.stream));
        compare(p, result(&r, p), what);
    }
    CUDA_MUST(cudaGraphExecDestroy(exec));
    CUDA_MUST(cudaGraphDestroy(graph));
    stop(&r);
}

/* Sequences that break a rule are named and left out; the others are computed. */
void check_faults(const problem *p, const attn_gpu_ops *ops)
{
    runner r;
    if (!start(&r, p, ops, ATTN_GPU_AUTO, FIXED_KEYS))
        return;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    std::vector<uint16_t> whole = result(&r, p);
    for (uint32_t kind = 0; kind < 5; kind++) {
        std::vector<attn_seq> bad = p->seq;
        attn_seq *s = &bad[2];
        s->rows = kind == 0 ? 0 : kind == 1 ? r.step.max_seq_rows + 1 : s->rows;
        s->kv_len = kind == 2 ? s->rows - 1 : kind == 3 ? p->max_len + 1 : s->kv_len;
        s->first_row = kind == 4 ? p->rows : s->first_row;
        set_batch(p, bad.data(), (uint32_t)bad.size());
        plan_and_run(&r, p);
        std::vector<uint16_t> out = result(&r, p);
        if (fault_of(&r) != 3)
            fail(p, "faults", "the sequence is not named");
        for (size_t i = 0; i < bad.size(); i++)
            if (i != 2 && !same_rows(p, p->seq[i], whole, out))
                fail(p, "faults", "another sequence has other bits");
    }
    uint32_t n = (uint32_t)p->seq.size() + 5;
    CUDA_MUST(cudaMemcpy(p->d_seq, p->seq.data(), p->seq.size() * sizeof(attn_seq), cudaMemcpyHostToDevice));
    CUDA_MUST(cudaMemcpy(p->d_count, &n, sizeof n, cudaMemcpyHostToDevice));
    plan_and_run(&r, p);
    if (result(&r, p), fault_of(&r) != ATTN_FAULT_SEQS)
        fail(p, "faults", "too many sequences are not reported");
    stop(&r);
}

/* Rows that were written are right; those of sequences that found no room are as they were. */
void compare_written(const problem *p, const std::vector<uint16_t> &out, const char *what)
{
    const uint64_t row = (uint64_t)p->c->H * p->c->D;
    std::vector<uint16_t> all = out;
    for (size_t i = 0; i < p->want.size(); i++) {
        uint16_t &x = all[p->ref_row[i / row] * row + i % row];
        if (x == 0xffff)
            x = narrow((float)p->want[i], p->dtype == ATTN_F16);
    }
    compare(p, all, what);
}

/* A batch with more keys, or rows, than the workspace was made for: said as such, nothing written that is wrong, and a batch
 * that fits is computed afterwards. */
void check_overflow(const attn_gpu_ops *ops)
{
    static const attn_span long_ones[] = {{12, 1, 3000}, {0, 0, 0}},
                           rows_of_one[] = {{1, 500, 700}, {7, 1, 10}, {0, 0, 0}};
    const attn_case keys = {"overflow of keys", 4, 2, 64, 0, 0, 0, long_ones},
                    rows = {"overflow of rows", 4, 2, 64, 0, 0, 0, rows_of_one};
    const uint32_t fits = 2;
    runner r;
    problem p;
    make(&p, &keys, ATTN_BF16);
    p.cfg.max_kv_tokens = fits * 3000;
    compute_reference(&p);
    if (start(&r, &p, ops, ATTN_GPU_AUTO, 64)) {
        set_batch(&p, p.seq.data(), (uint32_t)p.seq.size());
        plan_and_run(&r, &p);
        compare_written(&p, result(&r, &p), keys.name);
        if (fault_of(&r) != ATTN_FAULT_KV_TOKENS)
            fail(&p, "faults", "too many keys are not reported as such");
        set_batch(&p, p.seq.data(), fits);
        plan_and_run(&r, &p);
        std::vector<uint16_t> out = result(&r, &p);
        compare_written(&p, out, keys.name);
        for (uint32_t i = 0; i < fits; i++)
            if (out[(uint64_t)p.seq[i].first_row * keys.H * keys.D] == 0xffff)
                fail(&p, "faults", "after an overflow a batch that fits is not computed");
        if (fault_of(&r))
            fail(&p, "faults", "after an overflow a batch that fits is refused");
        stop(&r);
    }
    drop(&p);
    make(&p, &rows, ATTN_BF16);
    compute_reference(&p);
    if (start(&r, &p, ops, ATTN_GPU_AUTO, 64)) {
        std::vector<attn_seq> same(p.seq.size(), p.seq[0]); /* all write the same values to the same rows */
        set_batch(&p, same.data(), (uint32_t)same.size());
        plan_and_run(&r, &p);
        compare_written(&p, result(&r, &p), rows.name);
        if (fault_of(&r) != ATTN_FAULT_ROWS)
            fail(&p, "faults", "too many rows are not reported as such");
        stop(&r);
    }
    drop(&p);
}

const char *const policy_names[] = {"auto", "fused", "serial", "streams"};

/* With a fixed cut, the whole batch. */
void check_fixed_once(const problem *p, const attn_gpu_ops *ops)
{
    runner r;
    if (!start(&r, p, ops, ATTN_GPU_AUTO, FIXED_KEYS))
        return;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    compare(p, result(&r, p), "fixed");
    stop(&r);
}

void check_case(const attn_case *c, attn_dtype dtype, const attn_gpu_ops *ops, bool quick, bool once)
{
    problem p;
    make(&p, c, dtype);
    compute_reference(&p);
    double worst = 0;
    bool did = false;
    for (int policy = 0; policy <= ATTN_GPU_STREAMS; policy++) {
        if (quick && !once && policy == ATTN_GPU_SERIAL)
            continue;
        runner r;
        char what[100];
        snprintf(what, sizeof what, "%s %s", ops->name, policy_names[policy]);
        if (!start(&r, &p, ops, (attn_gpu_policy)policy, 0))
            continue;
        did = true;
        set_batch(&p, p.seq.data(), (uint32_t)p.seq.size());
        plan_and_run(&r, &p);
        worst = fmax(worst, compare(&p, result(&r, &p), what));
        if (fault_of(&r))
            fail(&p, what, "a fault is reported");
        stop(&r);
        if (once)
            continue;
        snprintf(what, sizeof what, "%s %s, fixed", ops->name, policy_names[policy]);
        if (policy == ATTN_GPU_AUTO || (!quick && policy == ATTN_GPU_STREAMS))
            check_fixed(&p, ops, (attn_gpu_policy)policy, what);
    }
    char invariant[100];
    snprintf(invariant, sizeof invariant, "%s, batch-invariant", ops->name);
    if (did)
        check_invariant(&p, ops, invariant);
    if (did && once)
        check_fixed_once(&p, ops);
    if (did && !once && !c->large)
        check_graph(&p, ops, ATTN_GPU_AUTO, "graph");
    for (int policy = 0; did && !once && !c->large && policy <= ATTN_GPU_STREAMS; policy++) {
        char what[100];
        snprintf(what, sizeof what, "%s %s, layers", ops->name, policy_names[policy]);
        check_layers(&p, ops, (attn_gpu_policy)policy, what);
    }
    if (did)
        printf("%-10s %-28s %2u/%u x %3u %-4s %6u rows, %8llu keys: error %.2f of what is allowed\n", ops->name,
               c->name, c->H, c->HK, c->D, dtype == ATTN_F16 ? "f16" : "bf16", p.rows - 2 * SPARE_ROWS,
               (unsigned long long)p.tokens, worst);
    else
        printf("%-10s %-28s not done by this back end\n", ops->name, c->name);
    fflush(stdout);
    drop(&p);
}

void check_back_end(const attn_gpu_ops *ops, const char *only, bool quick, bool once)
{
    for (uint32_t i = 0; i < ATTN_CASES; i++) {
        const attn_case *c = &attn_cases[i];
        if ((only && !strstr(c->name, only)) || (quick && c->large))
            continue;
        check_case(c, ATTN_BF16, ops, quick, once);
        if (!quick)
            check_case(c, ATTN_F16, ops, quick, once);
    }
    for (uint32_t G = 1; G <= ATTN_MAX_GROUP && !quick; G++) {
        char name[20];
        snprintf(name, sizeof name, "group %u", G);
        attn_case c = {name, 2 * G, 2, 64, 0, 0, 0, attn_group_spans};
        if (!only || strstr(c.name, only))
            check_case(&c, ATTN_BF16, ops, quick, once);
    }
    if (!only) {
        problem p;
        attn_case c = {"faults", 4, 2, 64, 0, 0, 0, attn_group_spans};
        make(&p, &c, ATTN_BF16);
        check_faults(&p, ops);
        drop(&p);
        check_overflow(ops);
    }
}
} // namespace

int main(int argc, char **argv)
{
    const char *only = NULL, *back_end = NULL;
    bool quick = false, once = false;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            quick = true;
        else if (!strcmp(argv[i], "--once"))
            once = true;
        else if (!strcmp(argv[i], "--case") && i + 1 < argc)
            only = argv[++i];
        else if (!strcmp(argv[i], "--back-end") && i + 1 < argc)
            back_end = argv[++i];
        else {
            fprintf(stderr, "usage: %s [--quick] [--once] [--back-end NAME] [--case TEXT]\n", argv[0]);
            return 2;
        }
    }
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU: skipped\n");
        return 77;
    }
    vmm_load(&driver);
    print_device();
    uint32_t checked = 0;
    for (uint32_t i = 0; attn_gpu_back_ends[i]; i++) {
        if (back_end && strcmp(back_end, attn_gpu_back_ends[i]->name))
            continue;
        check_back_end(attn_gpu_back_ends[i], only, quick, once);
        checked++;
    }
    if (!checked) {
        fprintf(stderr, "no back end is named %s\n", back_end);
        return 2;
    }
    printf("%s: %u failures\n", failures ? "FAILED" : "ok", failures);
    return failures != 0;
}
