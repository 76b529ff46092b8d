#!/usr/bin/env python3
"""A timeline with kernels (tandem-worker --trace FILE --trace-kernels 1) against itself: what says that it is of a step lies within
it, nothing on a track overlaps, and the sums are those of the bars.

    check_timeline.py FILE        prints them; exit status 1: something is wrong
"""
import json
import sys

EDGE_US = 20  # how far a bar may stand out of its step: copies in front of it that set a slot's options are taken for its own


def union(bars, begin, end):
    """How much of [begin, end) they cover, and the longest piece that they do not."""
    covered, longest, at = 0, 0, begin
    for b, e in [*sorted((max(b, begin), min(e, end)) for b, e in bars), (end, end)]:
        longest = max(longest, b - at)
        covered += max(0, e - max(b, at))
        at = max(at, e)
    return covered, longest


def main(path):
    with open(path) as f:
        events = json.load(f)
    steps, bars, tracks, wrong = [], {}, {}, []
    # Numbers of steps begin anew with each attachment, so those of one number are told apart by time.
    for e in events:
        e["end"] = e["ts"] + e["dur"]
        if e["tid"] == "device":
            steps.append((e["ts"], e["end"], int(e["name"].split()[1])))
        elif e["tid"].startswith(("kernels", "copies")):
            tracks.setdefault(e["tid"], []).append(e)
    for track, of in tracks.items():
        of.sort(key=lambda e: e["ts"])
        overlaps = sum(a["end"] > b["ts"] + 0.0015 for a, b in zip(of, of[1:]))
        if overlaps and not track.endswith(" 8"):
            wrong.append(f"{overlaps} overlaps on {track}")
        for e in of:
            if "step" in e["args"]:
                bars.setdefault(e["args"]["step"], []).append(e)
    count = busy = gaps = longest = outside = 0
    for begin, end, number in steps:
        mine = [e for e in bars.get(number, []) if begin - 1e6 < e["ts"] < end + 1e6]
        outside += sum(e["ts"] < begin - EDGE_US or e["end"] > end + EDGE_US for e in mine)
        kernels = [(e["ts"], e["end"]) for e in mine if e["tid"].startswith("kernels")]
        if not kernels:
            continue
        covered, gap = union(kernels, begin, end)
        count, busy, gaps, longest = count + len(kernels), busy + covered, gaps + end - begin - covered, max(longest, gap)
    said = next(e["args"] for e in reversed(events) if e["name"].startswith("summary"))
    if outside:
        wrong.append(f"{outside} bars out of their steps")
    for key, got, slack in (("kernels", count, 0), ("kernel_busy_us", busy, 0.01 * busy),
                            ("inside_gap_us", gaps, 0.01 * (busy + gaps)), ("longest_gap_us", longest, 50)):
        if abs(said.get(key, -1) - got) > slack + 1:
            wrong.append(f"{key}: {said.get(key)}, the bars have {got:.0f}")
    for key in ("dropped", "late", "steps_lost", "steps_without_kernels"):
        if said.get(key) != 0:
            wrong.append(f"{key}: {said.get(key)}")
    if not count:
        wrong.append("no kernels")
    print(json.dumps({k: v for k, v in said.items() if k != "top_kernels"}))
    for top in said.get("top_kernels", []):
        print(f"{top['us']:12.0f} us {top['count']:8d}  {top['name']}")
    print(f"{len(steps)} steps, {count / max(1, len(steps)):.0f} kernels each; tracks {', '.join(sorted(tracks))}")
    print("\n".join(wrong) or "sound")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
