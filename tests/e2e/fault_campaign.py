"""Faults at random moments under random load, by hand: every answer must be the one of a quiet run.

    fault_campaign.py --faults 1000 --seed 1        # environment as in cluster.py
    fault_campaign.py --groups 2 --tp 1 --faults 500
    fault_campaign.py --groups 2 --tp 1 --journal --faults 1000
    fault_campaign.py --worker-arg=--backend --worker-arg=cuda --worker-arg=--batch-invariant --worker-arg=1

A coordinator and mpirun as `tandem serve` starts them, but launched again at once and for ever. Clients repeat a fixed set
of requests: greedy, sampled, log probabilities, stop strings, penalties, several answers; some read slowly, some vanish.
Faults: a rank is killed, stopped, cut off from the coordinator; the whole mpirun is killed; of several groups, one is also
drained to be started again; with a journal the coordinator is killed and started again, its clients attach, or its disk is
full for a moment. SIGTERM ends it before its time. Exit
status 0 when
  - no token, text, log probability or reason differs from the quiet run, and no call failed
  - no stream paused for more than --hang seconds, the time without a group not counted
  - at the end no request, page or process is left, and the coordinator has no more descriptors than at the start
"""
import argparse
import itertools
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import grpc

from cluster import BIN, DEMO, children, control_pb2, free_port, inference_pb2, process_name, request

STORY = ["Once upon a time", "One day, a little girl", "The dog ran", "Tom and his mother went to the park"]
MPI = ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "plm", "isolated", "--mca",
       "mpi_yield_when_idle", "1"]


def requests():
    """[(request, whether it is read slowly)]: the same in every run."""
    sets = [dict(temperature=0), dict(temperature=1.0, seed=11), dict(temperature=0.8, top_p=0.9, seed=12, logprobs=3),
            dict(temperature=0, stop=["."], min_tokens=20), dict(temperature=1.0, seed=13, n=3, top_k=40),
            dict(temperature=0.9, seed=14, repetition_penalty=1.3, frequency_penalty=0.2),
            dict(temperature=1.0, seed=15, echo=True, prompt_logprobs=2, logprobs=1)]
    return [request(text, max_tokens=60 + 17 * (i + 3 * k) % 70, ignore_eos=True, **options)
            for i, text in enumerate(STORY) for k, options in enumerate(sets)]


def score(t):
    return (t.token_id, t.rank, tuple(t.top_token_ids)), (t.logprob, *t.top_logprobs)


class Answer:
    def __init__(self):
        self.ids, self.text, self.scores, self.values, self.end = {}, {}, {}, {}, {}
        self.counted = {}

    @property
    def replays(self):
        return sum(self.counted.values())

    def offsets(self):
        """For Attach. An answer without a token comes again from its beginning: what is there of it is forgotten."""
        for part in (self.ids, self.text, self.scores, self.values, self.end):
            for i in [i for i in part if not self.ids.get(i)]:
                del part[i]
        return [inference_pb2.AttachOffset(index=i, tokens=len(ids), text_bytes=len(self.text[i].encode()))
                for i, ids in self.ids.items()]

    def add(self, m):
        self.ids.setdefault(m.index, []).extend(m.token_ids)
        self.text[m.index] = self.text.get(m.index, "") + m.text
        for t in [*m.prompt_logprobs, *m.logprobs]:
            what, values = score(t)
            self.scores.setdefault(m.index, []).append(what)
            self.values.setdefault(m.index, []).extend(values)
        if m.HasField("finish"):
            f = m.finish
            self.end[m.index] = (f.reason, f.stop_index, f.usage.prompt_tokens, f.usage.completion_tokens)
            self.counted[m.index] = f.timing.replays

    def same(self, other):
        return (self.ids, self.text, self.scores, self.end) == (other.ids, other.text, other.scores, other.end)

    def apart(self, other):
        """Largest difference of two log probabilities; those of a different number are found by same()."""
        pairs = ((a, b) for i in self.values for a, b in zip(self.values[i], other.values.get(i, [])))
        return max((abs(a - b) for a, b in pairs if a != b), default=0.0)


class Proxy:
    """Between ranks and coordinator: a stream can be cut. All streams of a killed rank end by themselves."""

    def __init__(self, path, target):
        self.target, self.pairs, self.lock = target, [], threading.Lock()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(path)
        self.server.listen(64)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            rank, _ = self.server.accept()
            coordinator = socket.socket(socket.AF_UNIX)
            try:
                coordinator.connect(self.target)
            except OSError:  # it is being started
                rank.close()
                coordinator.close()
                continue
            with self.lock:
                self.pairs.append((rank, coordinator))
            for a, b in ((rank, coordinator), (coordinator, rank)):
                threading.Thread(target=self.pump, args=(a, b, (rank, coordinator)), daemon=True).start()

    def pump(self, source, sink, pair):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        with self.lock:
            if pair not in self.pairs:  # the other pump was first
                return
            self.pairs.remove(pair)
        self.end(pair)

    @staticmethod
    def end(pair):
        for s in pair:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()

    def cut(self, rng):
        with self.lock:
            pair = rng.choice(self.pairs) if self.pairs else None
        if pair:
            for s in pair:
                try:
                    s.shutdown(socket.SHUT_RDWR)  # the pumps close it
                except OSError:
                    pass


class Group:
    """The ranks of one mpirun, launched again at once when it ends."""

    def __init__(self, server, name):
        self.server, self.name, self.ranks, self.ready = server, name, None, False
        threading.Thread(target=self.launch, daemon=True).start()

    def launch(self):
        name = ["--group", self.name] if self.name else []
        own = f"{self.server.folder}/mpi{self.name}"  # its files: of several launches at a time none meets another's
        os.mkdir(own)
        while not self.server.stopping:
            self.ranks = subprocess.Popen([*MPI, "--mca", "orte_tmpdir_base", own, "-np", str(self.server.tp),
                                           f"{BIN}/tandem-worker", "--model", DEMO, "--threads", "1", "--coordinator",
                                           f"unix:{self.server.folder}/proxy", "--kv-memory", "64M",
                                           *self.server.worker_args, *name],
                                          env=self.server.env, stdout=self.server.log,
                                          stderr=self.server.log, start_new_session=True)
            self.ranks.wait()

    def workers(self):
        return [p for p in children(self.ranks.pid) if process_name(p) == "tandem-worker"] if self.ranks else []

    def end(self, launch=None):
        """Of this launch only, if one is given."""
        if launch and launch is not self.ranks:
            return
        for p in [*self.workers(), self.ranks.pid]:
            self.server.signal(p, signal.SIGKILL)


class Server:
    """The part of `tandem serve` that matters here, without its pauses and without giving up."""

    def __init__(self, folder, log, groups, tp, journal, worker_args):
        self.worker_args = worker_args
        self.log, self.folder, self.stopping, self.tp, self.journal = log, folder, False, tp, journal
        self.address = f"127.0.0.1:{free_port()}"
        self.env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.down, self.down_since, self.ready = [], time.monotonic(), threading.Event()
        self.lock = threading.Lock()
        self.start()
        self.proxy = Proxy(f"{folder}/proxy", f"{folder}/control")
        self.groups = [Group(self, f"g{i}" if groups > 1 else "") for i in range(groups)]
        self.watch()

    def start(self):
        journal = ["--journal", f"{self.folder}/journal", "--journal-keep-ms", "10000"] if self.journal else []
        read, write = os.pipe()
        self.coordinator = subprocess.Popen(
            [f"{BIN}/tandem-coordinator", "--model", DEMO, "--tp", str(self.tp), "--listen", self.address,
             "--control-listen", f"unix:{self.folder}/control", "--supervisor-fd", str(write), "--heartbeat-interval-ms",
             "100", "--heartbeat-timeout-ms", "700", "--replay-limit", "50", *journal], pass_fds=[write],
            stdout=self.log, stderr=self.log)
        os.close(write)
        self.events = os.fdopen(read)
        self.expect("listening")

    def watch(self):
        self.watcher = threading.Thread(target=self.follow, args=(self.events,), daemon=True)
        self.watcher.start()

    def crash(self):
        """kill -9 of the coordinator; the ranks end by themselves when their stream does."""
        self.coordinator.kill()
        self.coordinator.wait()
        self.watcher.join()
        self.events.close()
        for g in self.groups:
            self.lost(g)
            for p in g.workers():  # the next coordinator does not know one that is stopped
                self.signal(p, signal.SIGCONT)
        self.start()
        self.watch()

    @staticmethod
    def signal(pid, number):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    def limit_files(self, size):
        resource.prlimit(self.coordinator.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def expect(self, word):
        """Until it says so; a rank may attach before that."""
        self.early = []
        for line in self.events:
            if line.startswith(word):
                return
            self.early.append(line)
        raise SystemExit(f"the coordinator ended before it said {word}: {self.early}")

    def follow(self, events):
        for line in itertools.chain(self.early, events):
            group = next((g for g in self.groups if f"group={g.name} " in line.strip() + " "), self.groups[0])
            if line.startswith("ready"):
                with self.lock:
                    if self.down_since:
                        self.down.append((self.down_since, time.monotonic()))
                    self.down_since, group.ready = None, True
                self.ready.set()
            elif line.startswith("group-lost"):
                self.lost(group)
                group.end()
            elif line.startswith("group-drained"):
                self.lost(group)
                threading.Timer(2.5, group.end, [group.ranks]).start()  # one that was stopped cannot leave by itself

    def lost(self, group):
        """When no other is there this is the time without a group."""
        with self.lock:
            group.ready = False
            if not any(g.ready for g in self.groups):
                self.ready.clear()
                self.down_since = self.down_since or time.monotonic()

    def tree(self):
        """What is there of each group, for whoever asks why it does not come."""
        def line(pid):
            with open(f"/proc/{pid}/stat") as f:
                return f"{process_name(pid)} {pid} {f.read().rsplit(')', 1)[1].split()[0]}"
        return [(g.name, g.ready, [line(p) for p in [g.ranks.pid, *children(g.ranks.pid)]]) for g in self.groups]

    def wait_all(self, seconds):
        """Until every group serves: of several one is always there."""
        until = time.monotonic() + seconds
        while not all(g.ready for g in self.groups):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def down_within(self, start, end):
        with self.lock:
            spans = [*self.down, *([(self.down_since, end)] if self.down_since else [])]
        return sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.coordinator.pid}/fd"))

    def memory_kb(self):
        with open(f"/proc/{self.coordinator.pid}/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))

    def stop(self):
        self.stopping = True
        self.coordinator.terminate()
        status = self.coordinator.wait(60)
        for g in self.groups:
            try:
                g.ranks.wait(10)
            except subprocess.TimeoutExpired:
                g.end()
                g.ranks.wait()
        return status


class Campaign:
    def __init__(self, options, server):
        self.o, self.server = options, server
        self.rng = random.Random(options.seed)
        self.channel = grpc.insecure_channel(server.address, options=[  # it may be back within a second
            ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.max_reconnect_backoff_ms", 200)])
        self.generate = self.channel.unary_stream(
            "/tandem.v1.Inference/Generate", inference_pb2.GenerateRequest.SerializeToString,
            inference_pb2.GenerateResponse.FromString)
        self.attach = self.channel.unary_stream(
            "/tandem.v1.Inference/Attach", inference_pb2.AttachRequest.SerializeToString,
            inference_pb2.GenerateResponse.FromString)
        self.requests, self.quiet = requests(), []
        self.lock, self.done = threading.Lock(), False
        self.peak, self.enough = 0, False
        self.errors, self.answers, self.vanished, self.replays, self.tokens = [], 0, 0, 0, 0
        self.longest, self.apart, self.attached, self.again = 0.0, 0.0, 0, [0, 0]

    def load(self):
        call = self.channel.unary_unary("/tandem.v1.Control/GetLoad", control_pb2.GetLoadRequest.SerializeToString,
                                        control_pb2.Load.FromString)
        return call(control_pb2.GetLoadRequest(), timeout=10, wait_for_ready=True)

    def fail(self, text):
        with self.lock:
            self.errors.append(text)
        print("FAILED:", text, flush=True)

    def ask(self, r, slow=0.0, leave_after=None):
        """The answer, or None when this client vanished."""
        named = inference_pb2.GenerateRequest()
        named.CopyFrom(r)
        named.request_id = f"r{random.getrandbits(64):x}"
        answer, call, until = Answer(), self.generate(named, timeout=300), None
        while True:
            try:
                return answer if self.listen(call, answer, slow, leave_after) else None
            except grpc.RpcError as e:
                until = until or time.monotonic() + 60
                lost = e.code() == grpc.StatusCode.NOT_FOUND
                if not self.server.journal or time.monotonic() > until or not (
                        lost or e.code() == grpc.StatusCode.UNAVAILABLE):
                    raise
            time.sleep(0.1)
            if lost:  # killed before its acceptance was on disk
                with self.lock:
                    self.again[bool(answer.ids)] += 1
                answer, call = Answer(), self.generate(named, timeout=300)
            else:
                with self.lock:
                    self.attached += 1
                call = self.attach(inference_pb2.AttachRequest(request_id=named.request_id, offsets=answer.offsets()),
                                   timeout=300)

    def listen(self, call, answer, slow, leave_after):
        """To the end of the call; False when this client vanished."""
        last = time.monotonic()
        for n, m in enumerate(call):
            now = time.monotonic()
            pause = now - last - self.server.down_within(last, now)
            with self.lock:
                self.longest = max(self.longest, pause)
            if pause > self.o.hang:
                self.fail(f"a stream paused for {pause:.1f} s while a group served, until {time.strftime('%T')}")
            answer.add(m)
            if leave_after is not None and n >= leave_after:
                call.cancel()
                return False
            time.sleep(slow)
            last = time.monotonic()
        return True

    def client(self, seed):
        rng = random.Random(seed)
        while not self.done:
            i = rng.randrange(len(self.requests))
            try:
                answer = self.ask(self.requests[i], slow=rng.choice([0, 0, 0, 0.02]),
                                  leave_after=rng.randrange(30) if rng.random() < 0.15 else None)
            except grpc.RpcError as e:
                self.fail(f"request {i}: {e.code().name}: {e.details()}")
                continue
            with self.lock:
                if answer is None:
                    self.vanished += 1
                    continue
                self.answers += 1
                self.replays += answer.replays
                self.tokens += sum(map(len, answer.ids.values()))
                self.apart = max(self.apart, answer.apart(self.quiet[i]))
            if not answer.same(self.quiet[i]):
                self.fail(f"request {i} after {answer.replays} replays: {answer.ids} {answer.end}, quiet: "
                          f"{self.quiet[i].ids} {self.quiet[i].end}")

    def drain(self, group):
        call = self.channel.unary_unary("/tandem.v1.Control/Drain", control_pb2.DrainRequest.SerializeToString,
                                        control_pb2.DrainResponse.FromString)
        request = control_pb2.DrainRequest(group=group.name, restart=True, timeout_ms=self.rng.choice([0, 20, 300]))
        for last in (not self.o.journal, True):  # once more: over the connection to one that was killed
            try:
                call(request, timeout=30, wait_for_ready=True)
            except grpc.RpcError as e:
                if e.code() == grpc.StatusCode.UNAVAILABLE and not last:
                    continue
                if e.code() != grpc.StatusCode.NOT_FOUND:  # it was lost just now
                    self.fail(f"Drain: {e.code().name}: {e.details()}")
            return

    def fault(self):
        several = len(self.server.groups) > 1
        group = self.rng.choice(self.server.groups)
        workers = group.workers()
        kinds = ["kill", "stop", "mpirun", "cut"] + several * ["drain"]
        kind = self.rng.choice(2 * kinds + self.o.journal * ["coordinator", "coordinator", "disk"])
        if kind == "coordinator":
            self.peak = max(self.peak, self.server.memory_kb())
            self.server.crash()
            return kind
        if kind == "disk":
            self.server.limit_files(64)
            time.sleep(self.rng.uniform(0, 0.5))
            self.server.limit_files(resource.RLIM_INFINITY)
            time.sleep(1.3)  # each second a new file is tried: the next crash finds a journal that is whole
            return kind
        if not several:
            self.server.lost(group)  # what follows is the fault's, not a hang; where another serves it may be one
        elif kind != "cut":
            group.ready = False  # until it is so again: nobody but mpirun knows a rank that is stopped before it attaches
        if kind == "cut":
            self.server.proxy.cut(self.rng)
        elif kind == "drain":
            self.drain(group)
        elif kind == "mpirun":
            os.kill(group.ranks.pid, signal.SIGKILL)
            for p in workers:
                os.kill(p, signal.SIGKILL)
        elif workers:
            os.kill(self.rng.choice(workers), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        return kind

    def run(self):
        if not self.server.ready.wait(60):
            raise SystemExit("no group became ready")
        self.quiet = [self.ask(r) for r in self.requests]
        clients = [threading.Thread(target=self.client, args=(self.o.seed * 1000 + i,)) for i in range(self.o.clients)]
        for c in clients:
            c.start()
        time.sleep(1)
        fds, memory, kinds, start = self.server.descriptors(), None, {}, time.monotonic()
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "enough", True))
        for k in range(self.o.faults):
            if self.enough:
                break
            if not self.server.wait_all(30):
                self.fail(f"no group came back within 30 s: {self.server.tree()}")
                break
            time.sleep(self.rng.uniform(0, 0.6))
            self.server.wait_all(30)
            try:
                kind = self.fault()
            except ProcessLookupError:  # it has just ended by itself: mpirun takes its time after a lost rank
                continue
            kinds[kind] = kinds.get(kind, 0) + 1
            if k == min(20, self.o.faults // 2):
                memory = self.server.memory_kb()
            if self.errors and len(self.errors) > 10:
                break
        seconds = time.monotonic() - start
        self.done = True
        for c in clients:
            c.join()
        self.settle(fds, memory)
        at_most = max(self.peak, self.server.memory_kb())
        print(f"{sum(kinds.values())} faults {kinds} in {seconds:.0f} s; {self.answers} answers of {self.tokens} tokens, "
              f"{self.vanished} clients vanished, {self.replays} replays (server: {self.load().replays}); longest pause "
              f"beside the restarts {self.longest:.2f} s; log probabilities apart {self.apart:.1e}; coordinator "
              f"{memory} kB, at most {at_most} kB, at the end {self.server.memory_kb()} kB, {fds} and "
              f"{self.server.descriptors()} descriptors; {len(self.errors)} errors")
        if self.o.journal:
            print(f"{self.attached} calls of Attach; unknown after a restart and asked for again: {self.again[0]} without "
                  f"a token, {self.again[1]} with some")

    def settle(self, fds, memory):
        if not self.server.ready.wait(60):
            self.fail("no group at the end")
        for _ in range(300 if self.o.journal else 100):  # of those without a client the keep time
            load = self.load()
            left = (load.running_requests, load.queued_requests, load.used_pages)
            if left == (0, 0, 0) and self.server.descriptors() <= fds:
                break
            time.sleep(0.1)
        if left != (0, 0, 0):
            self.fail(f"left at the end: {left} running, queued, pages")
        if self.server.descriptors() > fds:
            self.fail(f"{self.server.descriptors()} descriptors, {fds} at the start")
        if memory and self.server.memory_kb() > 1.2 * memory + 8192:
            self.fail(f"{self.server.memory_kb()} kB of memory, {memory} after the first faults")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--tp", type=int, default=2, help="ranks of each group")
    parser.add_argument("--journal", action="store_true", help="the coordinator is killed, too")
    parser.add_argument("--worker-arg", action="append", default=[], help="further options of tandem-worker, one each")
    parser.add_argument("--hang", type=float, default=5.0)
    parser.add_argument("--log", default=os.devnull, help="file for what the programs say")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(options.log, "w") as log:
        server = Server(folder, log, options.groups, options.tp, options.journal, options.worker_arg)
        campaign = Campaign(options, server)
        try:
            campaign.run()
        finally:
            campaign.done = True
            status = server.stop()
        if status:
            campaign.fail(f"the coordinator ended with status {status}")
    return 1 if campaign.errors else 0


if __name__ == "__main__":
    sys.exit(main())
