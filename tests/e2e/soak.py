"""Mixed load for a while: nothing grows, nothing fails, and no answer differs from that of a quiet server. By hand:

    TANDEM_BIN=build/release/bin TANDEM_PB=build/release/tests/py tests/e2e/soak.py --minutes 30 \\
        [--model DIR] [--tp N] [--backend cuda] [--serve-arg=--batch-invariant --serve-arg=1 ...]

First some requests, greedy and sampled, short and long, run one at a time: their ids are what is expected. Then `tandem bench`
keeps --concurrency requests of random lengths under way, while --clients clients send those requests again and again, some of
which they leave in the middle. Every 5 s the resident memory of all processes and, where there is nvidia-smi, what they have of the devices' memory
(all that is in use, where it cannot tell) are noted; a fifth of the time into the load, in its middle and at its end they are compared: the second half may
add a tenth of what all may, and what is mapped where it grew is said. Each minute says how it stands, so that a run which is cut
off has said something; SIGTERM ends it before its time. Answers are the same to the bit where the server's are by construction:
--batch-invariant 1 on CUDA; else the difference is a number and no failure (--differ).
"""
import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

from cluster import DEMO, SLOW, Cluster, Result, children, process_name, TANDEM

NAMES = ("tandem", "tandem-coordinator", "tandem-worker")


def resident(pid):
    """Bytes of /proc/PID/status, anonymous and file; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS")), 0)
    except OSError:
        return 0


def mappings(pid):
    """{what is mapped: resident bytes}, by /proc/PID/smaps; empty when that cannot be read."""
    of, what = {}, None
    try:
        with open(f"/proc/{pid}/smaps", errors="replace") as f:
            for line in f:
                word = line.split()
                if not word[0].endswith(":"):
                    what = word[5] if len(word) > 5 else "anonymous"
                elif word[0] == "Rss:":
                    of[what] = of.get(what, 0) + int(word[1]) * 1024
    except (OSError, ValueError, IndexError):
        return {}
    return of


def nvidia_smi(query):
    """Rows of fields; none where there is no nvidia-smi or it does not know."""
    try:
        out = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout=10,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout.decode()
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in out.splitlines() if line.strip()]


class Devices:
    """Memory of devices in use: {device: bytes}, of some processes alone where the driver tells them apart, which the first look
    decides, else of whole devices. None when a look fails; `seen` is what the first one told, nothing where there is no nvidia-smi."""

    def __init__(self, pids):
        self.own = True
        self.own = bool(self.look(pids))
        self.seen = self.look(pids) or {}

    def look(self, pids):
        of = {}
        try:
            if not self.own:
                return {index: int(mib) << 20 for index, mib in nvidia_smi("--query-gpu=index,memory.used")} or None
            for uuid, pid, mib in nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory"):
                if int(pid) in pids:
                    of[uuid[:12]] = of.get(uuid[:12], 0) + (int(mib) << 20)
        except ValueError:
            return None
        return of or None


def make_requests(count, vocab, longest, rng):
    made = []
    for i in range(count):
        prompt = [rng.randrange(3, vocab) for _ in range(rng.choice([1, 7, 60, 300, longest // 2, longest]))]
        options = dict(ignore_eos=True, max_tokens=rng.choice([4, 30, 120, 200]))
        if i % 2:
            options.update(temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0]), seed=rng.randrange(1 << 32))
        else:
            options.update(temperature=0)
        made.append((prompt, options))
    return made


class Soak:
    def __init__(self, cluster, args):
        self.c, self.args = cluster, args
        self.lock = threading.Lock()
        self.checked = self.differ = self.left = self.load_requests = 0
        self.failures, self.samples = [], []
        self.devices = None
        self.mapped = {}  # of the middle and the end: {pid: mappings}
        self.end = 0

    def quiet(self, requests):
        self.requests = [(p, o, Result(self.c.generate(p, **o)).ids) for p, o in requests]

    def fail(self, text):
        with self.lock:
            self.failures.append(text)

    def client(self, seed):
        rng = random.Random(seed)
        channel = self.c.connect()
        while time.monotonic() < self.end:
            prompt, options, want = rng.choice(self.requests)
            try:
                stream = self.c.generate(prompt, channel=channel, **options)
                if rng.random() < 0.15:
                    next(stream)
                    stream.cancel()
                    with self.lock:
                        self.left += 1
                    continue
                ids = Result(stream).ids
            except Exception as e:  # noqa: BLE001  whatever it is, it is a failure of the run
                self.fail(f"a checked request: {e}"[:300])
                time.sleep(0.5)
                continue
            with self.lock:
                self.checked += 1
                self.differ += ids != want

    def load(self):
        seed = 1
        while time.monotonic() < self.end - 5:
            seed += 1
            a = self.args
            out = subprocess.run(
                [TANDEM, "bench", "--address", self.c.address, "--concurrency", str(a.concurrency), "--requests",
                 str(a.burst), "--input-tokens", a.input_tokens, "--output-tokens", a.output_tokens, "--seed", str(seed),
                 "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            text = out.stdout.decode(errors="replace")
            if out.returncode and time.monotonic() < self.end:
                self.fail(f"bench: status {out.returncode}: {text[-300:]}")
                time.sleep(0.5)
            else:
                self.load_requests += a.burst

    def watch(self):
        start = said = time.monotonic()
        while time.monotonic() < self.end:
            pids = [p for p in [self.c.process.pid] + children(self.c.process.pid) if process_name(p) in NAMES]
            self.devices = self.devices or Devices(pids)
            self.samples.append((time.monotonic() - start, {p: resident(p) for p in pids}, self.devices.look(pids)))
            if "middle" not in self.mapped and time.monotonic() > (start + self.end) / 2:
                self.mapped["middle"] = {p: mappings(p) for p in pids}
            if time.monotonic() >= said + 60:
                said = time.monotonic()
                self.say(*self.samples[-1])
            time.sleep(5)

    def say(self, seconds, processes, devices):
        with self.lock:
            print(f"{seconds:5.0f} s: {self.checked} checked, {self.differ} differ, {self.left} left, {self.load_requests} of load, "
                  f"{len(self.failures)} failures; processes {', '.join(f'{b / 2**20:.1f}' for b in processes.values())} MiB, "
                  f"devices {', '.join(f'{b / 2**20:.0f}' for b in (devices or {}).values())} MiB", flush=True)

    def run(self):
        self.end = time.monotonic() + 60 * self.args.minutes
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "end", time.monotonic()))
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(self.args.clients)]
        threads += [threading.Thread(target=self.load), threading.Thread(target=self.watch)]
        start = time.monotonic()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.seconds = time.monotonic() - start
        if self.samples:
            self.mapped["end"] = {p: mappings(p) for p in self.samples[-1][1]}

    def grown_mappings(self):
        """Lines: what of each process became larger in the second half, the three that did most."""
        for pid, end in self.mapped.get("end", {}).items():
            middle = self.mapped.get("middle", {}).get(pid)
            if not middle:
                continue
            more = sorted(((b - middle.get(what, 0), what) for what, b in end.items()), reverse=True)
            if more and more[0][0] > 0:
                grown = ", ".join(f"{b / 2**10:+.0f} KiB {what}" for b, what in more[:3] if b > 0)
                yield f"{process_name(pid)} {pid}, second half: {grown}"

    def growth(self):
        """[(what, [bytes a fifth into the load, in the middle, at the end])]: the median of three samples each."""
        at = [len(self.samples) // 5, len(self.samples) // 2, max(len(self.samples) - 3, 0)]
        parts = [self.samples[a:a + 3] for a in at]
        rows = []
        for pid in self.samples[-1][1]:
            rows.append((f"{process_name(pid) or 'process'} {pid}", [statistics.median_high(s[1].get(pid, 0) for s in part) for part in parts]))
        if self.args.backend == "cuda" and shutil.which("nvidia-smi") and not self.devices.seen:
            self.fail("nvidia-smi told nothing of any device's memory")
        for device in self.devices.seen:
            looks = [[s[2][device] for s in part if s[2] and device in s[2]] for part in parts]
            if not all(looks):
                self.fail(f"device {device}: nothing was told of its memory a fifth into the load, in the middle or at the end")
                continue
            rows.append((f"device {device}", [statistics.median_high(x) for x in looks]))
        return rows


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--model", default=DEMO)
    p.add_argument("--tp", type=int, default=1)
    p.add_argument("--backend", default="host")
    p.add_argument("--serve-arg", action="append", default=[], help="further options of tandem serve, one each")
    p.add_argument("--clients", type=int, default=6)
    p.add_argument("--concurrency", type=int, default=32)
    p.add_argument("--burst", type=int, default=400, help="requests of one tandem bench")
    p.add_argument("--input-tokens", default="lognormal:200")
    p.add_argument("--output-tokens", default="lognormal:100")
    p.add_argument("--checked", type=int, default=24, help="requests whose answers are known")
    p.add_argument("--vocab", type=int, default=500, help="ids of prompts are below it")
    p.add_argument("--longest", type=int, default=700, help="tokens of a checked prompt")
    p.add_argument("--differ", action="store_true", help="answers may differ from the quiet ones: count, do not fail")
    p.add_argument("--growth", type=float, default=0.02, help="of memory that is allowed, beside 8 MiB; a tenth of it, beside 2 MiB, in the second half")
    args = p.parse_args()
    with Cluster(model=args.model, tp=args.tp, wait=False, args=["--backend", args.backend] + args.serve_arg) as c:
        c.wait_ready(120)
        soak = Soak(c, args)
        soak.quiet(make_requests(args.checked, args.vocab, args.longest, random.Random(7)))
        soak.run()
        c.wait_idle(30)
        rows, load = soak.growth(), c.load()
        for line in soak.grown_mappings():
            print(line)
    bad = list(soak.failures)
    for what, (a, middle, b) in rows:
        print(f"{what:32} {a / 2**20:10.1f} MiB  {middle / 2**20:10.1f} MiB  {b / 2**20:10.1f} MiB")
        if b > a * (1 + args.growth) + (8 << 20):
            bad.append(f"{what} grew from {a} to {b} bytes")
        elif b > middle * (1 + args.growth / 10) + (2 << 20):
            bad.append(f"{what} grows on: from {middle} bytes in the middle to {b} at the end")
    if soak.differ and not args.differ:
        bad.append(f"{soak.differ} answers differ from those of the quiet server")
    if soak.checked == 0 or soak.load_requests == 0:
        bad.append("nothing was checked or loaded")
    print(json.dumps(dict(minutes=round(soak.seconds / 60, 1), checked=soak.checked, differ=soak.differ, left=soak.left,
                          load_requests=soak.load_requests, steps=load.steps, slow=SLOW, failures=bad[:10])))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
