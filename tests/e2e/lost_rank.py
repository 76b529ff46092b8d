"""A rank on a GPU is killed, or stopped, while sums over ranks are under way: the answers go on in a new group, with the tokens of a
quiet run, and no rank that waits for a lost one stays behind. By hand, on a machine with two GPUs; environment as in cluster.py:

    tests/e2e/lost_rank.py --serve-arg=--batch-invariant --serve-arg=1          sums by memory that the GPUs reach of each other
    tests/e2e/lost_rank.py --ways nccl --differ                                 NCCL's: bits depend on what else is in a step

Per fault: seconds until the loss is known, until the group serves again, and the longest pause of a stream.
"""
import argparse
import os
import signal
import sys
import threading
import time

from cluster import DEMO, Cluster, Result, process_name, wait_for

PROMPTS = [[1, 7, 9 + i] * 20 for i in range(4)]


class Stream(threading.Thread):
    def __init__(self, c, prompt, options):
        super().__init__()
        self.call, self.got, self.error, self.pause = c.generate(prompt, **options), [], None, 0.0
        self.begun = threading.Event()
        self.start()

    def run(self):
        last = time.monotonic()
        try:
            for m in self.call:
                now = time.monotonic()
                self.pause, last = max(self.pause, now - last), now
                self.got.append(m)
                self.begun.set()
        except Exception as e:  # noqa: BLE001  whatever it is, it is a failure
            self.error = str(e)
            self.begun.set()


def one(c, way, sign, rank, options, quiet, may_differ):
    """[what went wrong]"""
    streams = [Stream(c, p, options) for p in PROMPTS]
    begun = [s.begun.wait(30) for s in streams]
    before, epoch, replays = c.workers(), c.info().epoch, c.load().replays
    start = time.monotonic()
    os.kill(before[rank], sign)
    wait_for("the loss is seen", lambda: c.load().replays > replays or c.info().epoch > epoch, 20)
    known = time.monotonic() - start
    wait_for("a new group", lambda: c.info().epoch > epoch and c.is_ready(), 60)
    ready = time.monotonic() - start
    for s in streams:
        s.join(120)
    wrong = [s.error for s in streams if s.error]
    wrong += [f"stream {i} did not begin or end in time" for i, s in enumerate(streams) if not begun[i] or s.is_alive()]
    replayed = c.load().replays - replays
    if replayed == 0:
        wrong.append("no answer was under way: more --tokens are needed")
    results = [Result(s.got).ids for s in streams]
    wrong += [f"stream {i} has {len(ids)} tokens, {len(q)} expected" for i, (ids, q) in enumerate(zip(results, quiet))
              if len(ids) != len(q)]
    differ = sum(ids != q for ids, q in zip(results, quiet))
    if differ and not may_differ:
        wrong.append(f"{differ} streams have other tokens than the quiet run")
    try:
        wait_for("end of the old ranks", lambda: not any(process_name(p) == "tandem-worker" for p in before.values()), 20)
    except AssertionError as e:
        wrong.append(str(e))
    print(f"{way:5} {sign.name:8} rank {rank}: known after {known:5.2f} s, a new group after {ready:5.2f} s, longest pause "
          f"{max(s.pause for s in streams):5.2f} s, {replayed} replays, {differ} of {len(streams)} "
          f"streams differ; {wrong or 'nothing wrong'}", flush=True)
    return wrong


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", default=DEMO)
    p.add_argument("--backend", default="cuda")
    p.add_argument("--ways", default="peer")
    p.add_argument("--differ", action="store_true", help="tokens may differ from the quiet run's: count them")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--tokens", type=int, default=900)
    p.add_argument("--serve-arg", action="append", default=[])
    args = p.parse_args()
    options = dict(temperature=1.0, seed=5, ignore_eos=True, max_tokens=args.tokens)
    bad = 0
    for way in args.ways.split(","):
        with Cluster(model=args.model, tp=2, wait=False, args=["--backend", args.backend, "--all-reduce", way,
                                                               *args.serve_arg]) as c:
            c.wait_ready(120)
            quiet = [Result(c.generate(prompt, **options)).ids for prompt in PROMPTS]
            for _ in range(args.rounds):
                for sign in signal.SIGKILL, signal.SIGSTOP:
                    for rank in 1, 0:
                        bad += len(one(c, way, sign, rank, options, quiet, args.differ))
            c.wait_idle(30)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
