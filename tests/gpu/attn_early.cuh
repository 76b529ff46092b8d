/* attn_early.cuh - of check_attention_gpu: what a run reads before the launch in front of it has ended.
 *
 * A run may begin while that launch still writes q and the step's own tokens, the last `rows` of each sequence (attention.h,
 * "When"). The decode kernel fills its rings then, with groups of 16 keys that hold none of those, and waits before it touches
 * the rest. Here everything comes as late as it may:
 *
 *     poison: K, V and q | past tokens, late | plan | new tokens and q: lets the run begin, and writes LATE_NS later | run
 *
 * A copy from memory takes a microsecond or two, so whatever is read before its turn is the poison: NaN in one pass, a large
 * number in the other. What has come into a ring is not read again, and a NaN in K or V of a key that a row sees makes the whole
 * row one: a group that is taken too early is an error in each row that sees its new tokens. Lengths are such that any other
 * bound than "no new token in the group" takes one: the tokens before the new ones, and those with them, end at multiples
 * of 16, a key before and behind. Lengths to 64 are whole in the first filling of the smallest ring, those around 512 in
 * parts; there are fewer items than blocks of an H200, as only a block's first item may come early.
 *
 * That launches do overlap like this is not taken for granted: launches_overlap.
 */
#ifndef TANDEM_ATTN_EARLY_CUH
#define TANDEM_ATTN_EARLY_CUH

#include "tests/gpu/attn_runner.cuh"

namespace
{
constexpr uint32_t LATE_NS = 50000;
constexpr uint32_t LATE_BLOCKS = 8; /* on SMs of their own: the run's blocks have all others */
constexpr uint32_t EARLY_ROWS = 4;  /* most of a decode */
constexpr uint32_t EARLY_FIXED_KEYS = 64;
constexpr float LARGE = 30000; /* f16 ends at 65504 */

attn_grid late_grid(cudaStream_t stream)
{
    int major = 0;
    CUDA_MUST(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    return {LATE_BLOCKS, 256, 0, major >= 9, stream};
}

void write_poison(const problem *p, uint32_t parts, uint16_t bits, cudaStream_t stream)
{
    batch_fill a = fill_of(p, parts);
    a.poison = bits;
    attn_grid g = FILL_GRID;
    g.stream = stream;
    CUDA_MUST(attn_launch(fill, g, a));
}

void write_late(const problem *p, uint32_t parts, const attn_grid &g)
{
    batch_fill a = fill_of(p, parts);
    a.late_ns = LATE_NS;
    CUDA_MUST(attn_launch(fill, g, a));
}

/* ---- whether a read that is too early would be seen ---- */

struct probe_args {
    const uint16_t *at;
    uint32_t *found; /* [2]: blocks that found poison before they waited, and behind */
    uint16_t poison;
};

__global__ void probe(const __grid_constant__ probe_args a)
{
    const volatile uint16_t *at = a.at;
    if (threadIdx.x == 0 && *at == a.poison)
        atomicAdd(&a.found[0], 1);
    attn_wait_earlier();
    if (threadIdx.x == 0 && *at == a.poison)
        atomicAdd(&a.found[1], 1);
}

/* A kernel of the decode kernel's size, two blocks with much shared memory per SM, in place of the run: most of its blocks must
 * find poison in the last new token before they wait, and none behind. */
void launches_overlap(const problem *p)
{
    int sms = 0, shared = 0, tries = 5;
    CUDA_MUST(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    CUDA_MUST(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0));
    shared = shared * 2 / 5;
    CUDA_MUST(cudaFuncSetAttribute((const void *)probe, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaStream_t stream;
    CUDA_MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    attn_grid late = late_grid(stream), g = {2 * (uint32_t)sms, 128, (uint32_t)shared, late.early, stream};
    const attn_seq &s = p->seq.back();
    const uint64_t last = p->io.kv_offset + (s.kv_len - 1) * p->cfg.token_stride;
    uint32_t found[2] = {0, 0};
    probe_args a = {};
    a.at = (const uint16_t *)((const char *)s.k + last);
    a.poison = 0xffff;
    CUDA_MUST(cudaMalloc(&a.found, sizeof found));
    while (late.early && tries-- && found[0] < g.blocks / 2 && !found[1]) { /* the host may be slow to launch, once */
        CUDA_MUST(cudaMemset(a.found, 0, sizeof found));
        CUDA_MUST(cudaDeviceSynchronize());
        write_poison(p, PART_NEW, a.poison, stream);
        write_late(p, PART_NEW, late);
        CUDA_MUST(attn_launch(probe, g, a));
        CUDA_MUST(cudaStreamSynchronize(stream));
        CUDA_MUST(cudaMemcpy(found, a.found, sizeof found, cudaMemcpyDeviceToHost));
    }
    printf("launches that begin early: %u of %u blocks before the launch in front has written\n", found[0], g.blocks);
    if (late.early && found[0] < g.blocks / 2)
        fail(p, "early", "launches do not overlap: what is read too early would not be seen");
    if (found[1])
        fail(p, "early", "a launch that has waited does not find what was written in front of it");
    CUDA_MUST(cudaFree(a.found));
    CUDA_MUST(cudaStreamDestroy(stream));
}

/* ---- runs behind launches that are late ---- */

/* Behind a poison of everything: a step of some layers, all of the same memory. */
void late_step(runner *r, const problem *p, uint32_t layers)
{
    const attn_grid late = late_grid(r->stream);
    attn_grid past = FILL_GRID;
    past.stream = r->stream;
    write_late(p, PART_PAST, past);
    ATTN_MUST([&](struct status *st) { return attn_gpu_plan(r->attn, &r->step, st); });
    for (uint32_t layer = 0; layer < layers; layer++) {
        if (layer > 0)
            write_poison(p, PART_NEW | PART_Q, 0xffff, r->stream);
        write_late(p, PART_NEW | PART_Q, late);
        ATTN_MUST([&](struct status *st) { return attn_gpu_run(r->attn, &r->step, &p->io, st); });
    }
}

/* Each poison once; a graph, of two layers, is replayed. Returns false when the back end cannot do it. */
bool check_late(const problem *p, const attn_gpu_ops *ops, launches how, uint32_t fixed, bool graph, double *worst)
{
    runner r;
    char what[100];
    if (!start(&r, p, ops, how, fixed))
        return false;
    snprintf(what, sizeof what, "%s %s%s%s", ops->name, how.name(), fixed ? ", fixed" : "", graph ? ", graph" : "");
    cudaGraph_t captured = NULL;
    cudaGraphExec_t exec = NULL;
    if (graph) {
        CUDA_MUST(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeGlobal));
        late_step(&r, p, 2);
        CUDA_MUST(cudaStreamEndCapture(r.stream, &captured));
        CUDA_MUST(cudaGraphInstantiate(&exec, captured, 0));
    }
    for (uint16_t bits : {(uint16_t)0xffff, narrow(LARGE, p->dtype == ATTN_F16)}) {
        set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
        write_poison(p, PART_PAST | PART_NEW | PART_Q, bits, r.stream);
        if (graph)
            CUDA_MUST(cudaGraphLaunch(exec, r.stream));
        else
            late_step(&r, p, 1);
        *worst = fmax(*worst, compare(p, result(&r, p), what));
        if (fault_of(&r))
            fail(p, what, "a fault is reported");
    }
    if (graph) {
        CUDA_MUST(cudaGraphExecDestroy(exec));
        CUDA_MUST(cudaGraphDestroy(captured));
    }
    stop(&r);
    return true;
}

void check_early_case(const attn_case *c, kv_place place, const attn_gpu_ops *ops, const options &o)
{
    problem p;
    double worst = 0;
    bool did = true;
    make(&p, c, o.f16 || (place == DENSE && !o.once) ? ATTN_F16 : ATTN_BF16, place);
    compute_reference(&p);
    for (const launches &how : launches_of(ops)) {
        did = did && check_late(&p, ops, how, 0, false, &worst);
        if (did && (!o.once || (o.replay && how.policy == ATTN_GPU_AUTO)))
            check_late(&p, ops, how, 0, true, &worst);
    }
    if (did && !o.once)
        check_late(&p, ops, ATTN_GPU_AUTO, EARLY_FIXED_KEYS, false, &worst);
    report(&p, ops, did, worst);
    drop(&p);
}

/* With r rows: all of them new; around 16 and 64, and, in parts, 512 keys, with and without the new ones. */
std::vector<attn_span> early_decodes()
{
    std::vector<attn_span> v;
    for (uint32_t r = 1; r <= EARLY_ROWS; r++) {
        v.push_back({1, r, r});
        for (uint32_t edge : {16, 64})
            for (uint32_t len = edge - 1; len <= edge + r + 1; len++)
                v.push_back({1, r, len});
        for (uint32_t len = 512 + r - 1; len <= 512 + r + 1; len++)
            v.push_back({1, r, len});
    }
    v.push_back({0, 0, 0});
    return v;
}

void check_early(const attn_gpu_ops *ops, const options &o)
{
    static const struct {
        uint32_t H, HK, D, window;
    } shapes[] = {{8, 2, 128, 0}, {4, 2, 64, 0},  {4, 1, 256, 0}, {6, 2, 80, 0},
                  {2, 2, 40, 0},  {4, 2, 64, 48}, {8, 2, 128, 49}}; /* groups of 16 begin with the window */
    static const attn_span hybrid[] = {{1, 1, 16},  {1, 100, 300}, {1, 2, 65},   {1, 4, 513}, {1, 40, 40},
                                       {2, 1, 513}, {1, 3, 64},    {1, 17, 500}, {0, 0, 0}};
    const std::vector<attn_span> decodes = early_decodes();
    for (const auto &s : shapes) {
        for (int i = 0; i < 4; i++) {
            const bool dense = i % 2 != 0, chunks = i / 2 != 0;
            char name[80];
            snprintf(name, sizeof name, "early %s D %u%s%s", chunks ? "hybrid" : "decodes", s.D,
                     s.window ? ", window" : "", dense ? ", dense" : "");
            const attn_case c = {name, s.H, s.HK, s.D, s.window, 0, 0, chunks ? hybrid : decodes.data()};
            if (wanted(o, name) && !(dense && o.once))
                check_early_case(&c, dense ? DENSE : TOGETHER, ops, o);
        }
    }
    const attn_case some = {"early some SMs", 8, 2, 128, 0, 0, 0, attn_some_sms};
    if (wanted(o, some.name))
        check_early_case(&some, TOGETHER, ops, o);
}

/* Once for all back ends. Not under checkers, which may launch one kernel after the other. */
void check_overlap(const options &o)
{
    static const attn_span one[] = {{1, 1, 16}, {0, 0, 0}};
    const attn_case c = {"early launches", 8, 2, 128, 0, 0, 0, one};
    problem p;
    if (o.once || !wanted(o, c.name))
        return;
    make(&p, &c, ATTN_BF16);
    launches_overlap(&p);
    drop(&p);
}
} // namespace

#endif
