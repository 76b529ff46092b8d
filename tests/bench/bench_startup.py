#!/usr/bin/python3
"""Time from starting `tandem serve` to the first token of an answer, for the demo model.

    tests/bench/bench_startup.py [RUNS] [TP]      # needs the release build; prints one line per run and the median
"""
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))
from cluster import Cluster  # noqa: E402


def once(tp):
    start = time.monotonic()
    with Cluster(tp=tp, wait=False) as c:
        c.wait_ready(60)
        ready = time.monotonic() - start
        next(c.generate("Once upon a time", max_tokens=4, temperature=0))
        return ready, time.monotonic() - start


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    tp = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    times = []
    for i in range(runs):
        ready, first = once(tp)
        times.append(first)
        print(f"run {i + 1}: ready after {ready:.2f} s, first token after {first:.2f} s (tp {tp})", flush=True)
    print(f"median {statistics.median(times):.2f} s, maximum {max(times):.2f} s")


if __name__ == "__main__":
    main()
