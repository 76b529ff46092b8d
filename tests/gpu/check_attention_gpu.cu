/* check_attention_gpu.cu - every back end of attention/ on a GPU against softmax in double on the same GPU.
 *
 *     check_attention_gpu [--quick] [--once] [--f16] [--replay] [--back-end NAME] [--case TEXT]
 *
 * ends with 77 where there is no GPU.
 *
 * --quick leaves out large shapes, f16, groups and head dimensions; --once runs each policy, each way and the fixed cut a single time,
 * without graphs and layers, for checkers under which a launch takes seconds: then --f16 has f16 instead of bf16, and --replay
 * graphs and layers by the policy AUTO. --case takes the cases with TEXT in their name, "early" those of attn_early.cuh.
 *
 * KV is token-major with LAYERS layers, of which one is asked for, or of one layer alone (kv_place); it lies against unmapped
 * memory on both sides, and whatever no row may read is NaN: other layers, rows of q and out that belong to no sequence, memory
 * behind each length.
 *
 * Tolerance: weights and results are rounded to 16 bits, relatively by up to u = 2^-8 of bf16, 2^-11 of f16. With A, the mean
 * of |v| by a row's weights, an element may be off by u * (A + |element|), A <= 1. Allowed is half of that for A = 1, and a little
 * for sums in float: errors of many weights cancel out, and one weight above all others is exact where it is the maximum
 * that powers are relative to. A kernel that is further off has rounded that one as well. Where scores are tens (soft caps
 * of 30 and 50, scores up to 60 before them) or hundreds ("steep") few keys have nearly all the weight, nothing cancels out, and
 * Hopper's prefill does round the largest: the whole is allowed.
 */
#include <cstddef>

#include "attention/attention_items.cuh"
#include "tests/gpu/attn_early.cuh"
#include "tests/gpu/attn_faults.cuh"
#include "tests/gpu/attn_same.cuh"

namespace
{
/* How much of a case is looked at. */
enum depth {
    ALL,
    NO_REPLAY, /* neither graphs nor layers */
};

/* What some cases are for, on the GPU that they were made for: else they would be tested no more without a word. */
void check_purpose(const problem *p, const runner *r, const char *what)
{
    int sms = 0;
    attn_lists l;
    CUDA_MUST(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    CUDA_MUST(cudaMemcpy(&l, (const char *)attn_gpu_fault(r->attn) - offsetof(attn_lists, fault), sizeof l,
                         cudaMemcpyDeviceToHost));
    const uint32_t all = (uint32_t)sms / 2, prefill = l.count[ROLE_PREFILL];
    if (sms != 132)
        return;
    if (strstr(p->c->name, "some SMs") && (l.clusters == 0 || l.clusters >= all / 2))
        fail(p, what, "prefill is not on some of the SMs");
    if (strstr(p->c->name, "some SMs") && p->c->D > 64 && /* narrow heads take this way by being told to alone */
        attn_gpu_choose(r->attn, p->seq.data(), (uint32_t)p->seq.size()) != ATTN_WAY_APART)
        fail(p, what, "both roles are chosen to be on every SM");
    if (!strcmp(p->c->name, "three parts") && prefill != 3 * p->c->HK * 704 * (p->c->H / p->c->HK) / 256)
        fail(p, what, "prefill is not in three parts");
    if (!strcmp(p->c->name, "window, cut") && prefill <= p->c->HK)
        fail(p, what, "prefill is not cut");
}

/* The whole batch: false when the back end cannot do it. */
bool check_launches(const problem *p, const attn_gpu_ops *ops, launches how, const options &o, double *worst)
{
    runner r;
    char what[100];
    snprintf(what, sizeof what, "%s %s", ops->name, how.name());
    if (!start(&r, p, ops, how, 0))
        return false;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    std::vector<uint16_t> whole = result(&r, p);
    *worst = fmax(*worst, compare(p, whole, what));
    if (fault_of(&r))
        fail(p, what, "a fault is reported");
    if (how.policy == ATTN_GPU_AUTO && how.way == ATTN_WAY_APART && !strcmp(ops->name, "sm90"))
        check_purpose(p, &r, what);
    if (!o.once && p->dtype == ATTN_BF16)
        check_alone(&r, p, whole, what);
    stop(&r);
    snprintf(what, sizeof what, "%s %s, fixed", ops->name, how.name());
    const bool all = p->dtype == ATTN_BF16 || how.policy == ATTN_GPU_AUTO; /* of f16 one policy is enough */
    const bool once = how.way == ATTN_WAY_APART;                           /* with a fixed cut all ways are one */
    if (!o.once && all && once && (!o.quick || how.policy == ATTN_GPU_AUTO))
        check_fixed(p, ops, how, what);
    return true;
}

void check_replays(const problem *p, const attn_gpu_ops *ops, const options &o)
{
    for (const launches &how : launches_of(ops)) {
        char what[100];
        if (o.once && how.policy != ATTN_GPU_AUTO)
            continue;
        if (o.quick && !o.once && how.policy == ATTN_GPU_SERIAL)
            continue;
        snprintf(what, sizeof what, "%s %s, layers", ops->name, how.name());
        check_layers(p, ops, how, what);
        if (p->dtype == ATTN_F16 && how.policy != ATTN_GPU_AUTO)
            continue;
        snprintf(what, sizeof what, "%s %s, graph", ops->name, how.name());
        check_graph(p, ops, how, 0, what);
        snprintf(what, sizeof what, "%s %s, graph, fixed", ops->name, how.name());
        if (!o.once && how.way == ATTN_WAY_APART)
            check_graph(p, ops, how, FIXED_KEYS, what);
    }
}

void check_case(const attn_case *c, attn_dtype dtype, const attn_gpu_ops *ops, const options &o, depth d,
                kv_place place = TOGETHER, float steep = 0)
{
    problem p;
    make(&p, c, dtype, place, steep);
    compute_reference(&p);
    double worst = 0;
    bool did = false;
    for (const launches &how : launches_of(ops))
        if (!o.quick || o.once || how.policy != ATTN_GPU_SERIAL)
            did |= check_launches(&p, ops, how, o, &worst);
    char invariant[100];
    snprintf(invariant, sizeof invariant, "%s, batch-invariant", ops->name);
    if (did)
        check_invariant(&p, ops, invariant);
    if (did && o.once)
        check_fixed_once(&p, ops);
    if (did && d == ALL && !c->large && (!o.once || o.replay))
        check_replays(&p, ops, o);
    report(&p, ops, did, worst);
    drop(&p);
}

void check_groups_and_dims(const attn_gpu_ops *ops, const options &o)
{
    for (uint32_t G = 1; G <= ATTN_MAX_GROUP; G++) {
        char name[20];
        for (uint32_t D = 64; D <= 128; D += 64) {
            snprintf(name, sizeof name, "group %u D %u", G, D);
            attn_case c = {name, 2 * G, 2, D, 0, 0, 0, attn_group_spans};
            if (wanted(o, name))
                check_case(&c, ATTN_BF16, ops, o, NO_REPLAY);
        }
    }
    for (uint32_t D = ATTN_HEAD_DIM_UNIT; D <= ATTN_MAX_HEAD_DIM; D += ATTN_HEAD_DIM_UNIT) {
        char name[20];
        snprintf(name, sizeof name, "head dim %u", D);
        attn_case c = {name, 6, 2, D, 0, 0, 0, attn_group_spans};
        if (wanted(o, name))
            check_case(&c, D % 16 ? ATTN_BF16 : ATTN_F16, ops, o, NO_REPLAY);
    }
}

/* Sequences whose KV ends with a page, a token before it and a token behind, of one page and of two. */
void check_pages(const attn_gpu_ops *ops, const options &o)
{
    static const struct {
        uint32_t H, HK, D;
    } shapes[] = {{32, 8, 128}, {8, 2, 128}, {4, 2, 64}, {6, 2, 80}, {4, 4, 40}, {4, 1, 256}};
    for (const auto &s : shapes) {
        const uint32_t page = (uint32_t)(PAGE_BYTES / (LAYERS * 2 * s.HK * s.D * 2)), chunk = 40;
        const attn_span spans[] = {{1, 1, page - 1},     {1, 1, page},
                                   {1, 1, page + 1},     {1, 1, 2 * page - 1},
                                   {1, 1, 2 * page},     {1, 1, 2 * page + 1},
                                   {1, chunk, page - 1}, {1, chunk, page},
                                   {1, chunk, page + 1}, {1, chunk, 2 * page - 1},
                                   {1, chunk, 2 * page}, {1, chunk, 2 * page + 1},
                                   {1, 130, page},       {0, 0, 0}};
        char name[40];
        snprintf(name, sizeof name, "pages of %u tokens", page);
        const attn_case c = {name, s.H, s.HK, s.D, 0, 0, 0, spans};
        if (wanted(o, name))
            check_case(&c, o.f16 ? ATTN_F16 : ATTN_BF16, ops, o, NO_REPLAY, APART);
    }
}

/* A token's layers side by side as in a large model: 192 KiB from token to token with 32/8 heads, 768 KiB with MHA. */
void check_strides(const attn_gpu_ops *ops, const options &o)
{
    static const struct {
        uint32_t H, HK, D;
    } shapes[] = {{32, 8, 128}, {4, 1, 128}, {32, 32, 128}, {16, 4, 64}};
    for (const auto &s : shapes) {
        char name[40];
        snprintf(name, sizeof name, "stride %u KiB", DEEP_LAYERS * 2 * s.HK * s.D * 2 / 1024);
        const attn_case c = {name, s.H, s.HK, s.D, 0, 0, 0, attn_few};
        if (wanted(o, name))
            check_case(&c, o.f16 ? ATTN_F16 : ATTN_BF16, ops, o, NO_REPLAY, DEEP);
    }
}

/* Scores that grow towards the first keys, which prefill of Hopper comes to last: from tile to tile by as little as asks for no new
 * base, by more, and so far that powers of them are infinite. */
void check_steep(const attn_gpu_ops *ops, const options &o)
{
    static const attn_span chunks[] = {{1, 40, 40}, {1, 200, 900}, {1, 1, 700}, {1, 64, 3000}, {2, 1, 2000}, {0, 0, 0}};
    static const struct {
        uint32_t H, HK, D, window;
        float steep;
    } shapes[] = {{8, 2, 128, 0, 1 / 1024.f}, {8, 2, 128, 0, 1 / 256.f}, {8, 2, 128, 0, 1 / 64.f},
                  {32, 8, 128, 0, 1 / 64.f},  {4, 4, 64, 0, 1 / 256.f},  {8, 2, 64, 0, 1 / 64.f},
                  {6, 2, 96, 0, 1 / 64.f},    {4, 1, 256, 0, 1 / 64.f},  {8, 2, 128, 500, 1 / 64.f},
                  {16, 1, 128, 0, 1 / 128.f}};
    for (const auto &s : shapes) {
        char name[40];
        snprintf(name, sizeof name, "steep %g%s", s.steep, s.window ? ", window" : "");
        const attn_case c = {name, s.H, s.HK, s.D, s.window, 0, 0, chunks};
        if (!wanted(o, name))
            continue;
        if (!o.f16)
            check_case(&c, ATTN_BF16, ops, o, NO_REPLAY, TOGETHER, s.steep);
        if (!o.quick || o.f16)
            check_case(&c, ATTN_F16, ops, o, NO_REPLAY, TOGETHER, s.steep);
    }
}

void check_back_end(const attn_gpu_ops *ops, const options &o)
{
    for (uint32_t i = 0; i < ATTN_CASES; i++) {
        const attn_case *c = &attn_cases[i];
        if (!wanted(o, c->name) || (o.quick && c->large))
            continue;
        if (!o.f16)
            check_case(c, ATTN_BF16, ops, o, ALL);
        if (!o.quick || o.f16)
            check_case(c, ATTN_F16, ops, o, ALL);
    }
    check_steep(ops, o);
    check_pages(ops, o);
    check_strides(ops, o);
    check_early(ops, o);
    if (!o.quick)
        check_groups_and_dims(ops, o);
    if (!o.only) {
        problem p;
        attn_case c = {"faults", 4, 2, 64, 0, 0, 0, attn_group_spans};
        make(&p, &c, ATTN_BF16);
        check_pick(&p);
        check_faults(&p, ops, ATTN_GPU_AUTO, FIXED_KEYS);
        for (const launches &how : launches_of(ops))
            check_faults(&p, ops, how, 0);
        drop(&p);
        check_overflow(ops);
    }
}

bool read_options(int argc, char **argv, options *o)
{
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            o->quick = true;
        else if (!strcmp(argv[i], "--once"))
            o->once = true;
        else if (!strcmp(argv[i], "--f16"))
            o->f16 = true;
        else if (!strcmp(argv[i], "--replay"))
            o->replay = true;
        else if (!strcmp(argv[i], "--case") && i + 1 < argc)
            o->only = argv[++i];
        else if (!strcmp(argv[i], "--back-end") && i + 1 < argc)
            o->back_end = argv[++i];
        else
            return false;
    }
    return true;
}
} // namespace

int main(int argc, char **argv)
{
    options o = {};
    if (!read_options(argc, argv, &o)) {
        fprintf(stderr, "usage: %s [--quick] [--once] [--f16] [--replay] [--back-end NAME] [--case TEXT]\n", argv[0]);
        return 2;
    }
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("no GPU: skipped\n");
        return 77;
    }
    vmm_load(&driver);
    print_device();
    check_overlap(o);
    uint32_t checked = 0;
    for (uint32_t i = 0; attn_gpu_back_ends[i]; i++) {
        if (o.back_end && strcmp(o.back_end, attn_gpu_back_ends[i]->name))
            continue;
        check_back_end(attn_gpu_back_ends[i], o);
        checked++;
    }
    if (!checked) {
        fprintf(stderr, "no back end is named %s\n", o.back_end);
        return 2;
    }
    if (!problems_made) {
        fprintf(stderr, "no case has %s in its name\n", o.only);
        return 2;
    }
    printf("%s: %u failures\n", failures ? "FAILED" : "ok", failures);
    return failures != 0;
}
