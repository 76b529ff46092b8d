"""Greedy ids of models with an expected.json, over every number of ranks, chunk budget and batch. By hand, not in ctest:

    TANDEM_BIN=build/release/bin TANDEM_PB=build/release/tests/py tests/e2e/greedy_matrix.py [OPTIONS] MODEL_DIR ...

MODEL_DIR holds a model and its expected.json (tests/data/README.md says what is in one). Default: the demo model. Where
a case has margins, its ids are compared up to the first step whose two best logits are closer than --margin, and "sure" says how
many of all ids that leaves. Then every step whose two best logits are further apart, behind that one, too, is asked for by
itself, with the expected ids in front of it ("forced"), as many at a time as the batch has. A case of which nothing is compared
is a failure. On GPUs, which compute in bf16: --backend cuda --ranks 1,2 --margin 0.5.
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


def forced_steps(case, margin):
    """[(prompt, the next id)]"""
    ids = case["greedy_ids"]
    return [(case["prompt_ids"] + ids[:i], ids[i]) for i, m in enumerate(case.get("margins", [1e9] * len(ids))) if m >= margin]


def wrong_forced(cluster, steps, batch):
    wrong = 0
    for first in range(0, len(steps), batch):
        todo = steps[first:first + batch]
        streams = [cluster.generate(prompt, temperature=0, ignore_eos=True, max_tokens=1) for prompt, _ in todo]
        wrong += sum(Result(s).ids != [want] for s, (_, want) in zip(streams, todo))
    return wrong


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
        forced = [forced_steps(c, args.margin) for c in cases]
        steps = [s for f in forced for s in f]
        for i in [i for i, f in enumerate(forced) if not f]:
            print(f"{model}: case {i} has no step whose margin is {args.margin} or more", flush=True)
            failed += 1
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
                        off = wrong_forced(c, steps, batch)
                        failed += wrong + off
                        counts.append(f"batch {batch}: {wrong} of {sent} wrong, forced {off} of {len(steps)}")
                print(f"{model} R={tp} budget={budget}: {', '.join(counts)}; {sure} of {all_ids} ids sure"
                      f" ({time.monotonic() - start:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
