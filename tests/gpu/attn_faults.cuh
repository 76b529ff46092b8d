/* attn_faults.cuh - of check_attention_gpu: batches that break a rule, or are more than a back end was made for. */
#ifndef TANDEM_ATTN_FAULTS_CUH
#define TANDEM_ATTN_FAULTS_CUH

#include "tests/gpu/attn_runner.cuh"

namespace
{
/* Sequences that break a rule are named and left out; the others are computed, with a fixed cut to the bit. */
void check_faults(const problem *p, const attn_gpu_ops *ops, launches how, uint32_t fixed)
{
    runner r;
    if (!start(&r, p, ops, how, fixed))
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
            if (i != 2 && (fixed ? !same_rows(p, p->seq[i], whole, out) : !near_rows(p, p->seq[i], whole, out)))
                fail(p, "faults",
                     fixed ? "another sequence has other bits" : "another sequence is further off than rounding");
    }
    uint32_t n = (uint32_t)p->seq.size() + 5;
    CUDA_MUST(cudaMemcpy(p->d_seq, p->seq.data(), p->seq.size() * sizeof(attn_seq), cudaMemcpyHostToDevice));
    CUDA_MUST(cudaMemcpy(p->d_count, &n, sizeof n, cudaMemcpyHostToDevice));
    plan_and_run(&r, p);
    if (result(&r, p), fault_of(&r) != ATTN_FAULT_SEQS)
        fail(p, "faults", "too many sequences are not reported");
    r.step.max_seqs = 0; /* a bucket of nobody */
    plan_and_run(&r, p);
    if (result(&r, p), fault_of(&r) != ATTN_FAULT_SEQS)
        fail(p, "faults", "sequences where there may be none are not reported");
    set_batch(p, p->seq.data(), 0);
    plan_and_run(&r, p);
    if (result(&r, p), fault_of(&r))
        fail(p, "faults", "a step of nobody has the fault of the one before");
    stop(&r);
}

/* What no back end may see, attn_gpu_pick refuses before it asks one. */
void check_pick(const problem *p)
{
    attn_gpu_config cfg = p->cfg;
    if (attn_gpu_pick(&cfg, NULL) != ST_OK || !cfg.ops)
        fail(p, "pick", "no back end");
    cfg.kv_heads = 0;
    if (attn_gpu_pick(&cfg, NULL) != ST_INVALID_ARGUMENT)
        fail(p, "pick", "no KV heads are not refused");
    cfg.kv_heads = p->cfg.heads + 1;
    if (attn_gpu_pick(&cfg, NULL) != ST_INVALID_ARGUMENT)
        fail(p, "pick", "more KV heads than heads are not refused");
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
} // namespace

#endif
