/* attn_same.cuh - of check_attention_gpu: sequences in other batches and by graphs, layers one after the other: same bits, or near. */
#ifndef TANDEM_ATTN_SAME_CUH
#define TANDEM_ATTN_SAME_CUH

#include "tests/gpu/attn_runner.cuh"

namespace
{
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

/* A batch by steps of these bounds has the bits of the whole one. */
void same_by_step(runner *r, const problem *p, const std::vector<attn_seq> &batch, uint32_t max_seqs,
                  uint32_t max_seq_rows, const std::vector<uint16_t> &whole, const char *what, const char *text)
{
    const attn_gpu_step many = r->step;
    r->step.max_seqs = max_seqs;
    r->step.max_seq_rows = max_seq_rows;
    set_batch(p, batch.data(), (uint32_t)batch.size());
    plan_and_run(r, p);
    std::vector<uint16_t> out = result(r, p);
    for (const attn_seq &s : batch)
        if (!same_rows(p, s, whole, out)) {
            fail(p, what, text);
            break;
        }
    r->step = many;
}

/* With a fixed cut: the whole batch, some sequences alone, also by steps that can have one only and by those of single rows, all single rows
 * by such a step, and every second sequence, backwards; all bits the same. These steps have launches of their own. */
void check_fixed(const problem *p, const attn_gpu_ops *ops, launches how, const char *what)
{
    runner r;
    if (!start(&r, p, ops, how, FIXED_KEYS))
        return;
    set_batch(p, p->seq.data(), (uint32_t)p->seq.size());
    plan_and_run(&r, p);
    std::vector<uint16_t> whole = result(&r, p);
    compare(p, whole, what);
    const uint32_t most = how.policy == ATTN_GPU_AUTO ? 12 : 5;
    uint32_t step = p->seq.size() > most ? (uint32_t)p->seq.size() / most : 1;
    for (uint32_t i = 0; i < p->seq.size(); i += step) {
        set_batch(p, &p->seq[i], 1);
        plan_and_run(&r, p);
        if (!same_rows(p, p->seq[i], whole, result(&r, p)))
            fail(p, what, "a sequence alone has other bits");
        same_by_step(&r, p, {p->seq[i]}, 1, r.step.max_rows, whole, what,
                     "a sequence alone by a step of one has other bits");
        if (p->seq[i].rows == 1)
            same_by_step(&r, p, {p->seq[i]}, 1, 1, whole, what, "a row alone by a step of one has other bits");
    }
    std::vector<attn_seq> half, single;
    for (const attn_seq &s : p->seq)
        if (s.rows == 1)
            single.push_back(s);
    if (!single.empty())
        same_by_step(&r, p, single, r.step.max_seqs, 1, whole, what, "single rows by a step of such have other bits");
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

/* Without a fixed cut: some sequences alone are right, and near what they were in the whole batch; by steps of many, and by steps that
 * have one at most, of any rows. */
void check_alone(runner *r, const problem *p, const std::vector<uint16_t> &whole, const char *what)
{
    const attn_gpu_step many = r->step;
    uint32_t step = p->seq.size() > 5 ? (uint32_t)p->seq.size() / 5 : 1;
    for (uint32_t i = 0; i < p->seq.size(); i += step) {
        for (uint32_t one = 0; one < 2; one++) {
            r->step.max_seqs = one ? 1 : many.max_seqs;
            r->step.max_seq_rows = one ? many.max_rows : many.max_seq_rows;
            set_batch(p, &p->seq[i], 1);
            plan_and_run(r, p);
            std::vector<uint16_t> out = result(r, p);
            compare_batch(p, {p->seq[i]}, out, what);
            if (!near_rows(p, p->seq[i], whole, out))
                fail(p, what, "a sequence alone is further from itself in the batch than rounding");
        }
        r->step = many;
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
void check_graph(const problem *p, const attn_gpu_ops *ops, launches how, uint32_t fixed, const char *what)
{
    runner r;
    if (!start(&r, p, ops, how, fixed))
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
void check_layers(const problem *p, const attn_gpu_ops *ops, launches how, const char *what)
{
    runner r;
    if (!start(&r, p, ops, how, 0))
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
} // namespace

#endif
