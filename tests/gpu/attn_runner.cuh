/* attn_runner.cuh - of check_attention_gpu: a back end on a problem, and whether what comes out is right. */
#ifndef TANDEM_ATTN_RUNNER_CUH
#define TANDEM_ATTN_RUNNER_CUH

#include "tests/gpu/attn_reference.cuh"

namespace
{
unsigned failures;

/* ---- what is asked for ---- */

struct options {
    bool quick, once, f16, replay;
    const char *only, *back_end;
};

bool wanted(const options &o, const char *name)
{
    return !o.only || strstr(name, o.only);
}

/* A policy, and the way of AUTO. */
struct launches {
    attn_gpu_policy policy;
    attn_gpu_way way;
    launches(attn_gpu_policy p, attn_gpu_way w = ATTN_WAY_APART) : policy(p), way(w)
    {
    }
    const char *name() const
    {
        const char *const policies[] = {"auto", "fused", "serial", "streams"};
        const char *const ways[] = {"auto apart", "auto fused", "auto serial"};
        return policy == ATTN_GPU_AUTO ? ways[way] : policies[policy];
    }
};

/* All that a back end has. */
std::vector<launches> launches_of(const attn_gpu_ops *ops)
{
    std::vector<launches> all = {ATTN_GPU_AUTO, ATTN_GPU_FUSED, ATTN_GPU_SERIAL, ATTN_GPU_STREAMS};
    for (int w = 1; ops->choose && w < ATTN_GPU_WAYS; w++)
        all.push_back({ATTN_GPU_AUTO, (attn_gpu_way)w});
    return all;
}
constexpr uint32_t FIXED_KEYS = 256;

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
bool start(runner *r, const problem *p, const attn_gpu_ops *ops, launches how, uint32_t fixed)
{
    attn_gpu_config cfg = p->cfg;
    cfg.ops = ops;
    cfg.policy = how.policy;
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
    r->step.way = how.way;
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

void report(const problem *p, const attn_gpu_ops *ops, bool did, double worst)
{
    const attn_case *c = p->c;
    if (did)
        printf("%-10s %-28s %2u/%u x %3u %-4s %6u rows, %8llu keys: error %.2f of what is allowed\n", ops->name,
               c->name, c->H, c->HK, c->D, p->dtype == ATTN_F16 ? "f16" : "bf16", p->rows - 2 * SPARE_ROWS,
               (unsigned long long)p->tokens, worst);
    else
        printf("%-10s %-28s not done by this back end\n", ops->name, c->name);
    fflush(stdout);
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

/* What an element may be off by. */
double allowed(const problem *p, double want)
{
    const double unit = p->dtype == ATTN_F16 ? 0x1p-12 : 0x1p-9;
    return 1.05 * unit * (q_size(p->c) > 2 || p->steep > 0 ? 2 : 1) * (1 + fabs(want)) + 1e-5;
}

/* One row of the reference; returns the largest error, in units of what is allowed. */
double compare_row(const problem *p, const std::vector<uint16_t> &out, size_t i, double *squares, double *all,
                   const char *what)
{
    const attn_case *c = p->c;
    const uint64_t row = (uint64_t)c->H * c->D;
    double worst = 0;
    for (uint64_t j = 0; j < row; j++) {
        double want = p->want[i * row + j], got = wide(out[p->ref_row[i] * row + j], p->dtype == ATTN_F16);
        double err = fabs(got - want), share = err / allowed(p, want);
        *squares += err * err;
        *all += want * want;
        if (!(share <= worst))
            worst = share;
        if (!(share <= 1)) {
            char text[200];
            snprintf(text, sizeof text, "row %u, head %u, d %u: %g, expected %g", p->ref_row[i], (uint32_t)(j / c->D),
                     (uint32_t)(j % c->D), got, want);
            fail(p, what, text);
            return share > 1 ? share : HUGE_VAL; /* NaN */
        }
    }
    return worst;
}

/* The rows that are `there` (NULL: all) against the reference. Returns the largest error, in units of what is allowed. */
double compare(const problem *p, const std::vector<uint16_t> &out, const char *what,
               const std::vector<char> *there = NULL)
{
    double worst = 0, squares = 0, all = 0;
    for (size_t i = 0; i < p->ref_row.size() && worst <= 1; i++)
        if (!there || (*there)[p->ref_row[i]])
            worst = fmax(worst, compare_row(p, out, i, &squares, &all, what));
    if (worst <= 1 && !(sqrt(squares) <= sqrt(all) * (p->dtype == ATTN_F16 ? 1e-3 : 6e-3))) {
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

/* Rows of seq within twice what each may be off by. */
bool near_rows(const problem *p, const attn_seq &s, const std::vector<uint16_t> &a, const std::vector<uint16_t> &b)
{
    const uint64_t row = (uint64_t)p->c->H * p->c->D;
    for (uint64_t i = s.first_row * row; i < (s.first_row + s.rows) * row; i++) {
        double x = wide(a[i], p->dtype == ATTN_F16), y = wide(b[i], p->dtype == ATTN_F16);
        if (!(fabs(x - y) <= 2 * allowed(p, y)))
            return false;
    }
    return true;
}

/* A batch of some of the problem's sequences: their rows are right, those of the others as they were. */
void compare_batch(const problem *p, const std::vector<attn_seq> &batch, const std::vector<uint16_t> &out,
                   const char *what)
{
    const uint64_t row = (uint64_t)p->c->H * p->c->D;
    std::vector<char> there(p->rows);
    for (const attn_seq &s : batch)
        for (uint32_t r = 0; r < s.rows; r++)
            there[s.first_row + r] = 1;
    compare(p, out, what, &there);
    for (uint32_t r = 0; r < p->rows; r++)
        for (uint64_t i = 0; i < row && !there[r]; i++)
            if (out[r * row + i] != 0xffff)
                return fail(p, what, "a row of a sequence that is not in the batch was written");
}
} // namespace

#endif
