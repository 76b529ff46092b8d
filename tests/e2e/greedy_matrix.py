"""Greedy ids of models with an expected.json, over every number of ranks, chunk budget and batch. By hand, not in ctest:

    TANDEM_BIN=build/release/bin TANDEM_PB=build/release/tests/py tests/e2e/greedy_matrix.py MODEL_DIR ...

MODEL_DIR holds a model and its expected.json (tests/data/README.md says what is in one). Default: the demo model. Where
a case has margins, its ids are compared up to the first step whose two best logits are closer than 5e-4.
"""
import sys
import time

from cluster import DEMO, Cluster, Result, expected

RANKS, BUDGETS, BATCHES = (1, 2, 3, 4), (16, 64, 512), (1, 64)


def wrong_of(case, ids):
    want = case["greedy_ids"]
    sure = next((i for i, m in enumerate(case.get("margins", [])) if m < 5e-4), len(want))
    return ids[:sure] != want[:sure] or len(ids) != len(want)


def main():
    failed = 0
    for model in sys.argv[1:] or [DEMO]:
        cases = expected(model)
        for tp in RANKS:
            for budget in BUDGETS:
                start = time.monotonic()
                counts = []
                with Cluster(model=model, tp=tp, args=["--step-tokens", budget]) as c:
                    for batch in BATCHES:
                        wrong = sent = 0
                        # one at a time: every case once; else `batch` of them at once
                        for first in range(0, len(cases) if batch == 1 else 1):
                            todo = [cases[(first + i) % len(cases)] for i in range(batch)]
                            streams = [c.generate(case["prompt_ids"], temperature=0, ignore_eos=True,
                                                  max_tokens=len(case["greedy_ids"])) for case in todo]
                            sent += len(todo)
                            wrong += sum(wrong_of(case, Result(s).ids) for case, s in zip(todo, streams))
                        failed += wrong
                        counts.append(f"batch {batch}: {wrong} of {sent} wrong")
                print(f"{model} R={tp} budget={budget}: {', '.join(counts)} ({time.monotonic() - start:.1f} s)",
                      flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
