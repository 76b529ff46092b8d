"""Greedy ids of models with an expected.json, over every number of ranks, chunk budget and batch. By hand, not in ctest:

    TANDEM_BIN=build/release/bin TANDEM_PB=build/release/tests/py tests/e2e/greedy_matrix.py [OPTIONS] MODEL_DIR ...

MODEL_DIR holds a model and its expected.json (tests/data/README.md says what is in one). Default: the demo model. Where
a case has margins, its ids are compared up to the first step whose two best logits are closer than --margin, and "sure" says how
many of all ids that leaves. On GPUs, which compute in bf16: --backend cuda --ranks 1,2 --margin 0.5.
"""
import argparse
import sys
import time

from cluster import DEMO, Cluster, Result, expected

BATCHES = (1, 64)


def sure_ids(case, margin):
    want = case["greedy_ids"]
    return next((i for i, m in enumerate(case.get("margins", [])) if m < margin), len(want))


def wrong_of(case, ids, margin):
    want, sure = case["greedy_ids"], sure_ids(case, margin)
    return ids[:sure] != want[:sure] or len(ids) != len(want)


def numbers(text):
    return [int(n) for n in text.split(",")]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("models", nargs="*", default=[DEMO])
    p.add_argument("--ranks", type=numbers, default=[1, 2, 3, 4])
    p.add_argument("--budgets", type=numbers, default=[16, 64, 512])
    p.add_argument("--margin", type=float, default=5e-4)
    p.add_argument("--backend", default="host")
    p.add_argument("--serve-arg", action="append", default=[], help="further options of tandem serve, one each")
    args = p.parse_args()
    failed = 0
    for model in args.models:
        cases = expected(model)
        sure, all_ids = sum(sure_ids(c, args.margin) for c in cases), sum(len(c["greedy_ids"]) for c in cases)
        for tp in args.ranks:
            for budget in args.budgets:
                start = time.monotonic()
                counts = []
                options = ["--step-tokens", budget, "--backend", args.backend] + args.serve_arg
                with Cluster(model=model, tp=tp, args=options) as c:
                    for batch in BATCHES:
                        wrong = sent = 0
                        # one at a time: every case once; else `batch` of them at once
                        for first in range(0, len(cases) if batch == 1 else 1):
                            todo = [cases[(first + i) % len(cases)] for i in range(batch)]
                            streams = [c.generate(case["prompt_ids"], temperature=0, ignore_eos=True,
                                                  max_tokens=len(case["greedy_ids"])) for case in todo]
                            sent += len(todo)
                            wrong += sum(wrong_of(case, Result(s).ids, args.margin)
                                         for case, s in zip(todo, streams))
                        failed += wrong
                        counts.append(f"batch {batch}: {wrong} of {sent} wrong")
                print(f"{model} R={tp} budget={budget}: {', '.join(counts)}; {sure} of {all_ids} ids sure"
                      f" ({time.monotonic() - start:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
