/* check_attention_gpu.cu - every back end of attention/ on a GPU against softmax in double on the same GPU.
 *
 *     check_attention_gpu [--quick] [--once] [--f16] [--replay] [--back-end NAME] [--case TEXT]
 *
 * ends with 77 where there is no GPU.
 *
 * --quick leaves out large shapes, f16, groups and head dimensions; --once runs each policy and the fixed cut a single time,
 * without graphs and layers, for checkers under which a launch takes seconds: then --f16 has f16 instead of bf16, and --replay
 * graphs and layers by the policy AUTO.
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
#include "tests/gpu/attn_runner.cuh"

namespace
{
constexpr uint32_t FIXED_KEYS = 256;

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
    const uint32_t most = policy == ATTN_GPU_AUTO ? 12 : 5;
    uint32_t step = p->seq.size() > most ? (uint32_t)p->seq.size() / most : 1;
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

/* Without a fixed cut: some sequences alone are right, and near what they were in the whole batch. */
void check_alone(runner *r, const problem *p, const std::vector<uint16_t> &whole, const char *what)
{
    uint32_t step = p->seq.size() > 5 ? (uint32_t)p->seq.size() / 5 : 1;
    for (uint32_t i = 0; i < p->seq.size(); i += step) {
        set_batch(p, &p->seq[i], 1);
        plan_and_run(r, p);
        std::vector<uint16_t> out = result(r, p);
        compare_batch(p, {p->seq[i]}, out, what);
        if (!near_rows(p, p->seq[i], whole, out))
            fail(p, what, "a sequence alone is further from itself in the batch than rounding");
    }
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

/* One captured graph, replayed for one batch after the other: all, nobody, one, all, every second one backwards, the first
 * half, all. Each is right, and with a fixed cut has the bits of the whole batch. */
void check_graph(const problem *p, const attn_gpu_ops *ops, attn_gpu_policy policy, uint32_t fixed, const char *what)
{
    runner r;
    if (!start(&r, p, ops, policy, fixed))
        return;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_MUST(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeGlobal));
    plan_and_run(&r, p);
    plan_and_run(&r, p);
    CUDA_MUST(cudaStreamEndCapture(r.stream, &graph));
    CUDA_MUST(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<attn_seq> second;
    for (size_t i = p->seq.size(); i >= 2; i -= 2)
        second.push_back(p->seq[i - 1]);
    const std::vector<attn_seq> batches[] = {p->seq, {},     {p->seq.back()},
                                             p->seq, second, {p->seq.begin(), p->seq.begin() + (p->seq.size() + 1) / 2},
                                             p->seq};
    std::vector<uint16_t> whole;
    for (const std::vector<attn_seq> &batch : batches) {
        set_batch(p, batch.data(), (uint32_t)batch.size());
        CUDA_MUST(cudaGraphLaunch(exec, r.stream));
        std::vector<uint16_t> out = result(&r, p);
        compare_batch(p, batch, out, what);
        if (whole.empty())
            whole = out;
        for (const attn_seq &s : batch)
            if (fixed ? !same_rows(p, s, whole, out) : !near_rows(p, s, whole, out)) {
                fail(p, what,
                     fixed ? "another batch by the same graph has other bits"
                           : "another batch by the same graph is further off than rounding");
                break;
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

struct options {
    bool quick, once, f16, replay;
    const char *only, *back_end;
};

/* How much of a case is looked at. */
enum depth {
    ALL,
    NO_REPLAY, /* neither graphs nor layers */
};

/* A policy on the whole batch: false when the back end cannot do it. */
bool check_policy(const problem *p, const attn_gpu_ops *ops, attn_gpu_policy policy, const options &o, double *worst)
{
    runner r;
    char what[100];
    snprintf(what, sizeof what, "%s %s", ops->name, policy_names[policy]);
    if (!start(&r, p, ops, policy, 0))
        return false;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    std::vector<uint16_t> whole = result(&r, p);
    *worst = fmax(*worst, compare(p, whole, what));
    if (fault_of(&r))
        fail(p, what, "a fault is reported");
    if (!o.once && p->dtype == ATTN_BF16)
        check_alone(&r, p, whole, what);
    stop(&r);
    snprintf(what, sizeof what, "%s %s, fixed", ops->name, policy_names[policy]);
    const bool all = p->dtype == ATTN_BF16 || policy == ATTN_GPU_AUTO; /* of f16 one policy is enough */
    if (!o.once && all && (!o.quick || policy == ATTN_GPU_AUTO))
        check_fixed(p, ops, policy, what);
    return true;
}

void check_replays(const problem *p, const attn_gpu_ops *ops, const options &o)
{
    for (int policy = 0; policy <= ATTN_GPU_STREAMS; policy++) {
        char what[100];
        if (o.once && policy != ATTN_GPU_AUTO)
            continue;
        if (o.quick && !o.once && policy == ATTN_GPU_SERIAL)
            continue;
        snprintf(what, sizeof what, "%s %s, layers", ops->name, policy_names[policy]);
        check_layers(p, ops, (attn_gpu_policy)policy, what);
        if (p->dtype == ATTN_F16 && policy != ATTN_GPU_AUTO)
            continue;
        snprintf(what, sizeof what, "%s %s, graph", ops->name, policy_names[policy]);
        check_graph(p, ops, (attn_gpu_policy)policy, 0, what);
        snprintf(what, sizeof what, "%s %s, graph, fixed", ops->name, policy_names[policy]);
        if (!o.once)
            check_graph(p, ops, (attn_gpu_policy)policy, FIXED_KEYS, what);
    }
}

void check_case(const attn_case *c, attn_dtype dtype, const attn_gpu_ops *ops, const options &o, depth d, bool apart)
{
    problem p;
    make(&p, c, dtype, apart);
    compute_reference(&p);
    double worst = 0;
    bool did = false;
    for (int policy = 0; policy <= ATTN_GPU_STREAMS; policy++)
        if (!o.quick || o.once || policy != ATTN_GPU_SERIAL)
            did |= check_policy(&p, ops, (attn_gpu_policy)policy, o, &worst);
    char invariant[100];
    snprintf(invariant, sizeof invariant, "%s, batch-invariant", ops->name);
    if (did)
        check_invariant(&p, ops, invariant);
    if (did && o.once)
        check_fixed_once(&p, ops);
    if (did && d == ALL && !c->large && (!o.once || o.replay))
        check_replays(&p, ops, o);
    if (did)
        printf("%-10s %-28s %2u/%u x %3u %-4s %6u rows, %8llu keys: error %.2f of what is allowed\n", ops->name,
               c->name, c->H, c->HK, c->D, dtype == ATTN_F16 ? "f16" : "bf16", p.rows - 2 * SPARE_ROWS,
               (unsigned long long)p.tokens, worst);
    else
        printf("%-10s %-28s not done by this back end\n", ops->name, c->name);
    fflush(stdout);
    drop(&p);
}

bool wanted(const options &o, const char *name)
{
    return !o.only || strstr(name, o.only);
}

void check_groups_and_dims(const attn_gpu_ops *ops, const options &o)
{
    for (uint32_t G = 1; G <= ATTN_MAX_GROUP; G++) {
        char name[20];
        snprintf(name, sizeof name, "group %u", G);
        attn_case c = {name, 2 * G, 2, 64, 0, 0, 0, attn_group_spans};
        if (wanted(o, name))
            check_case(&c, ATTN_BF16, ops, o, NO_REPLAY, false);
    }
    for (uint32_t D = ATTN_HEAD_DIM_UNIT; D <= ATTN_MAX_HEAD_DIM; D += ATTN_HEAD_DIM_UNIT) {
        char name[20];
        snprintf(name, sizeof name, "head dim %u", D);
        attn_case c = {name, 6, 2, D, 0, 0, 0, attn_group_spans};
        if (wanted(o, name))
            check_case(&c, D % 16 ? ATTN_BF16 : ATTN_F16, ops, o, NO_REPLAY, false);
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
            check_case(&c, o.f16 ? ATTN_F16 : ATTN_BF16, ops, o, NO_REPLAY, true);
    }
}

void check_back_end(const attn_gpu_ops *ops, const options &o)
{
    for (uint32_t i = 0; i < ATTN_CASES; i++) {
        const attn_case *c = &attn_cases[i];
        if (!wanted(o, c->name) || (o.quick && c->large))
            continue;
        if (!o.f16)
            check_case(c, ATTN_BF16, ops, o, ALL, false);
        if (!o.quick || o.f16)
            check_case(c, ATTN_F16, ops, o, ALL, false);
    }
    check_pages(ops, o);
    if (!o.quick)
        check_groups_and_dims(ops, o);
    if (!o.only) {
        problem p;
        attn_case c = {"faults", 4, 2, 64, 0, 0, 0, attn_group_spans};
        make(&p, &c, ATTN_BF16);
        check_faults(&p, ops);
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
    printf("%s: %u failures\n", failures ? "FAILED" : "ok", failures);
    return failures != 0;
}
