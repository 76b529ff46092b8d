/* bench_glu_gpu.cu - gate and up with SwiGLU: the own kernel of Hopper (worker/cuda_glu.cu) against cuBLASLt and the kernel
 * behind it.
 *
 *     bench_glu_gpu [check]    check: results alone
 *
 * First the results: every variant, odd numbers of rows, with and without a bias, against cuBLASLt's product in float32 with
 * plain SwiGLU. Then times, for Llama-3-8B's shape and half of it: the best of cuBLASLt's 12 suggestions with cuda_swiglu, and
 * the best way of the own kernel among those that are tried; both as graphs of LAUNCHES launches with 4 matrices in turn, one
 * after the other ROUNDS times, medians. Ends with 1 when a result is wrong, with 77 where the kernel does not run.
 */
#include <algorithm>
#include <functional>
#include <string>

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <unistd.h>

#include "tests/bench/bench_cuda.h"
#include "worker/cuda_kernels.h"

namespace
{
constexpr uint32_t MATRICES = 4;
constexpr uint32_t LAUNCHES = 16;
constexpr uint32_t ROUNDS = 9;
constexpr uint32_t TRIES = 12;
constexpr uint32_t LIMIT_S = 150;
constexpr size_t WORKSPACE_BYTES = 64u << 20;
constexpr uint32_t WAYS = 64;
constexpr uint32_t GUARD_ROWS = 8; /* behind act, which nobody may write */

#define LT_MUST(call)                                                                                                  \
    do {                                                                                                               \
        cublasStatus_t lt_rc = (call);                                                                                 \
        if (lt_rc != CUBLAS_STATUS_SUCCESS) {                                                                          \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cublasLtGetStatusString(lt_rc));             \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

struct bench {
    cudaStream_t stream;
    cublasLtHandle_t lt;
    void *workspace;
    struct cuda_glu glu;
    cudaEvent_t begin, end;
    uint32_t failures;
};

/* ---- cuBLASLt: y[T][n] = x W^T ---- */

struct product {
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulHeuristicResult_t found[TRIES];
    int n;
};

void describe(struct bench *b, struct product *p, uint32_t t, uint32_t n, uint32_t k, cudaDataType_t out)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtMatmulPreference_t wish;
    LT_MUST(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT_MUST(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    LT_MUST(cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16BF, k, n, k));
    LT_MUST(cublasLtMatrixLayoutCreate(&p->x, CUDA_R_16BF, k, t, k));
    LT_MUST(cublasLtMatrixLayoutCreate(&p->y, out, n, t, n));
    LT_MUST(cublasLtMatmulPreferenceCreate(&wish));
    LT_MUST(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES,
                                                 sizeof WORKSPACE_BYTES));
    LT_MUST(cublasLtMatmulAlgoGetHeuristic(b->lt, p->desc, p->w, p->x, p->y, p->y, wish, (int)TRIES, p->found, &p->n));
    LT_MUST(cublasLtMatmulPreferenceDestroy(wish));
}

void forget(struct product *p)
{
    cublasLtMatrixLayoutDestroy(p->y);
    cublasLtMatrixLayoutDestroy(p->x);
    cublasLtMatrixLayoutDestroy(p->w);
    cublasLtMatmulDescDestroy(p->desc);
}

bool multiply(struct bench *b, const struct product *p, int algo, const void *w, const void *x, void *y)
{
    const float one = 1, zero = 0;
    return cublasLtMatmul(b->lt, p->desc, &one, w, p->w, x, p->x, &zero, y, p->y, y, p->y, &p->found[algo].algo,
                          b->workspace, WORKSPACE_BYTES, b->stream) == CUBLAS_STATUS_SUCCESS;
}

/* ---- results ---- */

struct verdict {
    unsigned long long first; /* element that is wrong; ~0: none */
    unsigned long long wrong;
    unsigned int largest; /* bits of the largest difference, as a float */
};

/* act rounded once to bf16 is off by half a unit of 8 bits: 2^-8. The sums are added up in another order: of K products of
 * which a sum has a variance of 4, that is some 1e-5, times what gate or up is multiplied by. */
__global__ void compare(struct verdict *v, const __nv_bfloat16 *act, const float *gate_up, const float *bias,
                        uint32_t rows, uint32_t inner)
{
    const uint64_t n = (uint64_t)rows * inner;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        const uint64_t row = i / inner, col = i % inner;
        const float g = gate_up[row * 2 * inner + col] + (bias ? bias[col] : 0);
        const float u = gate_up[row * 2 * inner + inner + col] + (bias ? bias[inner + col] : 0);
        const float want = g / (1 + expf(-g)) * u, off = fabsf(__bfloat162float(act[i]) - want);
        if (!(off <= fabsf(want) / 256 + 1e-3f)) {
            atomicMin(&v->first, i);
            atomicAdd(&v->wrong, 1);
        } else {
            atomicMax(&v->largest, __float_as_uint(off));
        }
    }
}

__global__ void untouched(struct verdict *v, const uint16_t *at, uint64_t n, uint64_t first)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
        if (at[i] != 0xffff) {
            atomicMin(&v->first, first + i);
            atomicAdd(&v->wrong, 1);
        }
}

__global__ void random_bias(float *out, uint32_t n)
{
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        out[i] = (float)((i * 2654435761u) >> 8) * 0x1p-23f - 1;
}

const char *share_name(uint32_t share)
{
    return share == CUDA_GLU_ALONE ? "alone" : share == CUDA_GLU_SHARES_X ? "pair/x" : "pair/W";
}

std::string name_of(const struct cuda_glu_way *w)
{
    char text[64];
    if (w->group == CUDA_GLU_ALL_ROWS)
        snprintf(text, sizeof text, "%u %s all lag%u", w->rows, share_name(w->share), w->lag);
    else
        snprintf(text, sizeof text, "%u %s g%u lag%u", w->rows, share_name(w->share), w->group, w->lag);
    return text;
}

/* Device memory for one shape: x, matrices, bias, results. */
struct data {
    uint32_t t, inner, k, matrices;
    __nv_bfloat16 *x, *w[MATRICES], *act;
    float *bias, *sums; /* sums: [t][2 inner] float32, and for bf16 products */
};

float weight_scale(uint32_t k)
{
    return sqrtf(36.0f / (float)k); /* gate and up get a variance of 4 */
}

void make_data(struct bench *b, struct data *d, uint32_t t, uint32_t inner, uint32_t k, uint32_t matrices)
{
    *d = {};
    d->t = t;
    d->inner = inner;
    d->k = k;
    d->matrices = matrices;
    CUDA_MUST(cudaMalloc(&d->x, 2ull * t * k));
    CUDA_MUST(cuda_random(b->stream, d->x, 1, 0, (uint64_t)t * k, 1));
    for (uint32_t i = 0; i < matrices; i++) {
        CUDA_MUST(cudaMalloc(&d->w[i], 4ull * inner * k));
        CUDA_MUST(cuda_random(b->stream, d->w[i], 2 + i, 0, 2ull * inner * k, weight_scale(k)));
    }
    CUDA_MUST(cudaMalloc(&d->act, 2ull * (t + GUARD_ROWS) * inner));
    CUDA_MUST(cudaMalloc(&d->sums, 8ull * t * inner));
    CUDA_MUST(cudaMalloc(&d->bias, 8ull * inner));
    random_bias<<<64, 256, 0, b->stream>>>(d->bias, 2 * inner);
    CUDA_MUST(cudaGetLastError());
}

void free_data(struct data *d)
{
    CUDA_MUST(cudaFree(d->bias));
    CUDA_MUST(cudaFree(d->sums));
    CUDA_MUST(cudaFree(d->act));
    for (uint32_t i = 0; i < d->matrices; i++)
        CUDA_MUST(cudaFree(d->w[i]));
    CUDA_MUST(cudaFree(d->x));
}

void reference(struct bench *b, const struct data *d)
{
    struct product p = {};
    describe(b, &p, d->t, 2 * d->inner, d->k, CUDA_R_32F);
    if (p.n == 0 || !multiply(b, &p, 0, d->w[0], d->x, d->sums)) {
        fprintf(stderr, "cuBLASLt has no product of %u rows with a matrix of %u x %u\n", d->t, 2 * d->inner, d->k);
        exit(1);
    }
    forget(&p);
}

void check_way(struct bench *b, const struct data *d, const struct cuda_glu_way *way, bool with_bias, float *largest)
{
    const float *bias = with_bias ? d->bias : NULL;
    static struct verdict *v;
    struct verdict got = {~0ull, 0, 0};
    float off;
    if (!v)
        CUDA_MUST(cudaMalloc(&v, sizeof *v));
    CUDA_MUST(cudaMemcpyAsync(v, &got, sizeof got, cudaMemcpyHostToDevice, b->stream));
    CUDA_MUST(cudaMemsetAsync(d->act, 0xff, 2ull * (d->t + GUARD_ROWS) * d->inner, b->stream));
    CUDA_MUST(cuda_glu_run(b->stream, &b->glu, way, d->act, d->x, d->w[0], bias, d->t, d->inner, d->k));
    compare<<<512, 256, 0, b->stream>>>(v, d->act, d->sums, bias, d->t, d->inner);
    untouched<<<64, 256, 0, b->stream>>>(v, (const uint16_t *)(d->act + (uint64_t)d->t * d->inner),
                                         (uint64_t)GUARD_ROWS * d->inner, (uint64_t)d->t * d->inner);
    CUDA_MUST(cudaMemcpyAsync(&got, v, sizeof got, cudaMemcpyDeviceToHost, b->stream));
    CUDA_MUST(cudaStreamSynchronize(b->stream));
    memcpy(&off, &got.largest, sizeof off);
    *largest = std::max(*largest, off);
    if (!got.wrong)
        return;
    __nv_bfloat16 is;
    float g[2];
    const uint64_t row = got.first / d->inner, col = got.first % d->inner;
    CUDA_MUST(cudaMemcpy(&is, d->act + got.first, sizeof is, cudaMemcpyDeviceToHost));
    if (row < d->t) {
        CUDA_MUST(cudaMemcpy(&g[0], d->sums + row * 2 * d->inner + col, 4, cudaMemcpyDeviceToHost));
        CUDA_MUST(cudaMemcpy(&g[1], d->sums + row * 2 * d->inner + d->inner + col, 4, cudaMemcpyDeviceToHost));
    } else {
        g[0] = g[1] = NAN;
    }
    if (b->failures++ < 20)
        printf("\nFAILED %s, T %u I %u K %u%s: %llu wrong, the first in row %llu column %llu: %g of gate %g, up %g\n",
               name_of(way).c_str(), d->t, d->inner, d->k, with_bias ? ", bias" : "", got.wrong,
               (unsigned long long)row, (unsigned long long)col, (double)__bfloat162float(is), (double)g[0],
               (double)g[1]);
}

void check_shape(struct bench *b, uint32_t t, uint32_t inner, uint32_t k)
{
    struct data d;
    struct cuda_glu_way way[WAYS];
    float largest = 0;
    printf("T %4u I %5u K %4u: ", t, inner, k);
    fflush(stdout);
    const uint32_t n = cuda_glu_suggest(&b->glu, way, WAYS, t, inner, k);
    if (n == 0) {
        printf("FAILED no way\n");
        b->failures++;
        return;
    }
    make_data(b, &d, t, inner, k, 1);
    reference(b, &d);
    for (uint32_t i = 0; i < n; i++) {
        way[i].group = i % 3 == 0 ? CUDA_GLU_ALL_ROWS : i % 3;
        way[i].lag = i / 3 % 3;
        check_way(b, &d, &way[i], i % 2 == 0, &largest);
        check_way(b, &d, &way[i], i % 2 == 1, &largest);
    }
    printf("%u ways, largest difference %.4f\n", n, (double)largest);
    free_data(&d);
}

void check(struct bench *b)
{
    static const struct {
        uint32_t t, inner, k;
    } shape[] = {
        {1, 256, 64},     {127, 384, 128},  {129, 1024, 192},   {1000, 640, 320},    {1056, 2048, 1024},
        {2047, 512, 448}, {1, 14336, 4096}, {129, 14336, 4096}, {1056, 14336, 4096}, {1056, 7168, 4096},
    };
    for (const auto &s : shape)
        check_shape(b, s.t, s.inner, s.k);
}

/* ---- times ---- */

typedef std::function<bool(uint32_t)> launch_fn; /* the i-th launch; false: it does not run */

/* NULL when it does not run. */
cudaGraphExec_t capture(struct bench *b, uint32_t launches, const launch_fn &launch)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    bool ok = true;
    CUDA_MUST(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; ok && i < launches; i++)
        ok = launch(i);
    CUDA_MUST(cudaStreamEndCapture(b->stream, &graph));
    if (ok)
        CUDA_MUST(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_MUST(cudaGraphDestroy(graph));
    return exec;
}

/* Microseconds of one launch. */
double time_graph(struct bench *b, cudaGraphExec_t graph, uint32_t launches)
{
    float ms = 0;
    CUDA_MUST(cudaEventRecord(b->begin, b->stream));
    CUDA_MUST(cudaGraphLaunch(graph, b->stream));
    CUDA_MUST(cudaEventRecord(b->end, b->stream));
    CUDA_MUST(cudaEventSynchronize(b->end));
    CUDA_MUST(cudaEventElapsedTime(&ms, b->begin, b->end));
    return (double)ms * 1e3 / launches;
}

/* The better of two, after one that is not counted. */
double time_once(struct bench *b, uint32_t launches, const launch_fn &launch)
{
    cudaGraphExec_t graph = capture(b, launches, launch);
    if (!graph)
        return INFINITY;
    time_graph(b, graph, launches);
    double us = time_graph(b, graph, launches);
    us = std::min(us, time_graph(b, graph, launches));
    CUDA_MUST(cudaGraphExecDestroy(graph));
    return us;
}

struct timed_way {
    struct cuda_glu_way way;
    double us;
};

bool faster(const timed_way &a, const timed_way &b)
{
    return a.us < b.us;
}

launch_fn own(struct bench *b, const struct data *d, const struct cuda_glu_way *way)
{
    return [=](uint32_t i) {
        return cuda_glu_run(b->stream, &b->glu, way, d->act, d->x, d->w[i % MATRICES], NULL, d->t, d->inner, d->k) ==
               cudaSuccess;
    };
}

launch_fn library(struct bench *b, const struct data *d, const struct product *p, int algo, bool swiglu)
{
    return [=](uint32_t i) {
        return multiply(b, p, algo, d->w[i % MATRICES], d->x, d->sums) &&
               (!swiglu || cuda_swiglu(b->stream, d->act, d->sums, NULL, d->t, d->inner) == cudaSuccess);
    };
}

/* The suggestions, then groups and lags of the best three; the fastest first. */
std::vector<timed_way> try_ways(struct bench *b, const struct data *d, uint32_t launches)
{
    struct cuda_glu_way way[WAYS];
    std::vector<timed_way> all;
    const uint32_t n = std::min(cuda_glu_suggest(&b->glu, way, WAYS, d->t, d->inner, d->k), 15u);
    for (uint32_t i = 0; i < n; i++)
        all.push_back({way[i], time_once(b, launches, own(b, d, &way[i]))});
    printf("    suggested:");
    for (const auto &w : all)
        printf(" %u/%s %.1f", w.way.rows, share_name(w.way.share), w.us);
    printf("\n");
    std::sort(all.begin(), all.end(), faster);
    const size_t base = std::min(all.size(), (size_t)3);
    for (size_t i = 0; i < base; i++)
        for (uint32_t lag = 0; lag < 3; lag++)
            for (uint32_t group : {CUDA_GLU_ALL_ROWS, 4u, 8u, 16u}) {
                struct cuda_glu_way w = all[i].way;
                if ((group != CUDA_GLU_ALL_ROWS && group * w.rows >= d->t) || (lag == 0 && group == CUDA_GLU_ALL_ROWS))
                    continue;
                w.group = group;
                w.lag = lag;
                all.push_back({w, time_once(b, launches, own(b, d, &w))});
            }
    std::sort(all.begin(), all.end(), faster);
    return all;
}

double median(std::vector<double> v)
{
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

void bench_shape(struct bench *b, uint32_t t, uint32_t inner, uint32_t k)
{
    struct data d;
    struct product p = {};
    const uint32_t launches = t <= 1152 ? LAUNCHES : LAUNCHES / 2;
    make_data(b, &d, t, inner, k, MATRICES);
    describe(b, &p, t, 2 * inner, k, CUDA_R_16BF);
    int best = -1;
    double best_us = INFINITY;
    for (int i = 0; i < p.n; i++) {
        const double us = time_once(b, launches, library(b, &d, &p, i, true));
        best = us < best_us ? i : best;
        best_us = std::min(us, best_us);
    }
    if (best < 0) {
        fprintf(stderr, "cuBLASLt has no product of %u rows with a matrix of %u x %u\n", t, 2 * inner, k);
        exit(1);
    }
    printf("T %u I %u K %u: cuBLASLt's suggestion %d of %d\n", t, inner, k, best, p.n);
    const std::vector<timed_way> ways = try_ways(b, &d, launches);
    printf("    fastest:");
    for (size_t i = 0; i < ways.size() && i < 6; i++)
        printf(" [%s] %.1f", name_of(&ways[i].way).c_str(), ways[i].us);
    printf("\n");
    cudaGraphExec_t graph[] = {capture(b, launches, library(b, &d, &p, best, true)),
                               capture(b, launches, library(b, &d, &p, best, false)),
                               capture(b, launches, own(b, &d, &ways[0].way))};
    std::vector<double> us[3];
    for (uint32_t r = 0; r <= ROUNDS; r++)
        for (uint32_t i = 0; i < 3; i++) {
            const double now = time_graph(b, graph[i], launches);
            if (r)
                us[i].push_back(now);
        }
    const double flops = 4.0 * t * inner * k, both = median(us[0]), alone = median(us[1]), mine = median(us[2]);
    printf(
        "    cuBLASLt + swiglu %7.1f us %4.0f TFLOP/s (without swiglu %7.1f us %4.0f) | own %7.1f us %4.0f TFLOP/s | "
        "ratio %.3f %s\n",
        both, flops / both * 1e-6, alone, flops / alone * 1e-6, mine, flops / mine * 1e-6, mine / both,
        mine < both ? "own is faster" : "");
    for (auto g : graph)
        CUDA_MUST(cudaGraphExecDestroy(g));
    forget(&p);
    free_data(&d);
}
} // namespace

int main(int argc, char **argv)
{
    struct bench b = {};
    int devices = 0;
    if (argc > 2 || (argc == 2 && strcmp(argv[1], "check") != 0)) {
        fprintf(stderr, "usage: %s [check]\n", argv[0]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(LIMIT_S); /* a kernel that does not end */
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 || cuda_glu_open(&b.glu) != cudaSuccess) {
        fprintf(stderr, "no device of compute capability 9.0\n");
        return 77;
    }
    print_device();
    CUDA_MUST(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    CUDA_MUST(cudaEventCreate(&b.begin));
    CUDA_MUST(cudaEventCreate(&b.end));
    CUDA_MUST(cudaMalloc(&b.workspace, WORKSPACE_BYTES));
    LT_MUST(cublasLtCreate(&b.lt));
    const double start_us = now_us();
    check(&b);
    printf("%s: %u failures, %.1f s\n", b.failures ? "FAILED" : "ok", b.failures, (now_us() - start_us) / 1e6);
    if (b.failures || argc == 2)
        return b.failures != 0;
    for (uint32_t inner : {14336u, 7168u})
        for (uint32_t t : {1056u, 1024u, 1152u, 2048u, 4096u, 768u, 512u, 384u, 256u})
            bench_shape(&b, t, inner, 4096);
    printf("%.1f s\n", (now_us() - start_us) / 1e6);
    return 0;
}
