"""A cluster for a test: `tandem serve` as a process of its own, and a stock grpcio client for it.

The environment names what to test: TANDEM_BIN (folder of the programs), TANDEM_PB (folder of the generated *_pb2.py),
TANDEM_SOURCE (root of the project). ctest sets all three.
"""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

SOURCE = os.environ.get("TANDEM_SOURCE", os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
BIN = os.environ.get("TANDEM_BIN", os.path.join(SOURCE, "build/release/bin"))
PB = os.environ.get("TANDEM_PB", os.path.join(SOURCE, "build/release/tests/py"))
# A build with sanitizers is 5 to 20 times slower; the bounds on waits follow.
SLOW = float(os.environ.get("TANDEM_SLOW", "1"))
DEMO = os.path.join(SOURCE, "tests/data/demo-model")
TANDEM = os.path.join(BIN, "tandem")

os.environ["TANDEM_CONFIG"] = ""  # none: the tests say what counts

sys.path.insert(0, PB)
import grpc  # noqa: E402
from tandem.v1 import control_pb2, inference_pb2  # noqa: E402
import health_pb2  # noqa: E402

GENERATE = "/tandem.v1.Inference/Generate"


def expected(model=DEMO):
    with open(os.path.join(model, "expected.json")) as f:
        return json.load(f)["cases"]


def free_port():
    """A port that nobody has, below those that the system gives to outgoing connections: one of them could have taken it by
    the time that a server binds it."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as f:
        end = int(f.read().split()[0])
    for _ in range(100 if end > 11000 else 0):
        port = secrets.choice(range(10000, end))  # random is seeded alike in tests that run beside each other
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(pid):
    """All descendants of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            direct = [int(p) for p in f.read().split()]
    except OSError:
        return []
    return direct + [g for c in direct for g in children(c)]


def process_name(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return os.path.basename(f.read().split(b"\0")[0].decode())
    except OSError:
        return ""


def wait_for(what, condition, seconds=10):
    """Polls until condition() is true; fails the test otherwise. Returns the time that it took."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds * SLOW:
            raise AssertionError(f"not within {seconds * SLOW:.0f} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - start


def request(prompt, **options):
    """A GenerateRequest: prompt text, bytes of a message, or a list of ids; options by their field's name."""
    r = inference_pb2.GenerateRequest()
    if isinstance(prompt, str):
        r.text = prompt
    else:
        r.token_ids.ids.extend(prompt)
    for name, value in options.items():
        if name in ("stop_token_ids", "stop"):
            getattr(r.stopping, name).extend(value)
        elif name == "allowed_token_ids":
            r.sampling.allowed_token_ids.extend(value)
        elif name == "logit_bias":
            for token_id, bias in value.items():
                r.sampling.logit_bias.add(token_id=token_id, bias=bias)
        elif name in ("logprobs", "prompt_logprobs", "echo"):
            setattr(r.output, name, value)
        elif name in r.scheduling.DESCRIPTOR.fields_by_name:
            setattr(r.scheduling, name, value)
        elif name in r.sampling.DESCRIPTOR.fields_by_name:
            setattr(r.sampling, name, value)
        elif name in r.stopping.DESCRIPTOR.fields_by_name:
            setattr(r.stopping, name, value)
        else:
            setattr(r, name, value)
    return r


class Result:
    """What one Generate call gave."""

    def __init__(self, stream):
        self.ids, self.text, self.messages, self.finish, self.request_id = [], "", 0, None, ""
        self.answers = {}  # of each answer: ids, text
        for m in stream:
            self.messages += 1
            self.ids.extend(m.token_ids)
            self.text += m.text
            ids, text = self.answers.get(m.index, ([], ""))
            self.answers[m.index] = (ids + list(m.token_ids), text + m.text)
            if m.request_id:
                self.request_id = m.request_id
            if m.HasField("finish"):
                self.finish = m.finish


class Cluster:
    """Use as a context manager; leaving it stops the server and fails if anything is left running."""

    def __init__(self, model=DEMO, tp=1, args=(), wait=True):
        self.address = f"127.0.0.1:{free_port()}"
        self.log_file = tempfile.NamedTemporaryFile("w+", prefix="tandem-test-", suffix=".log")
        self.command = [TANDEM, "serve", *(("--model", model) if model else ()), "--tp", str(tp), "--listen",
                        self.address, "--threads", "1", *map(str, args)]
        self.wait = wait
        self.channels = []

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log_file,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        self.channel = self.connect()
        if self.wait:
            try:
                self.wait_ready()
            except BaseException:
                self.__exit__(*sys.exc_info())
                raise
        return self

    def __exit__(self, kind, *_):
        for c in self.channels:
            c.close()
        pids = children(self.process.pid)
        try:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(45 * SLOW)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                    if kind is None:
                        raise AssertionError("serve did not stop within its time\n" + self.log())
            if kind is None:
                wait_for("end of all processes", lambda: not any(process_name(p) in (
                    "tandem-coordinator", "tandem-worker", "mpirun", "orterun") for p in pids), 5)
                self.check_log()
        finally:
            for p in pids:
                if process_name(p).startswith("tandem") or process_name(p) in ("mpirun", "orterun"):
                    os.kill(p, signal.SIGKILL)
            if kind is not None:
                sys.stderr.write("---- log of the cluster ----\n" + self.log()[-8000:] + "\n")
            self.log_file.close()

    def check_log(self):
        """A sanitizer's report is a failure wherever it comes from."""
        text = self.log()
        for sign in ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "WARNING: ThreadSanitizer", "runtime error:"):
            if sign in text:
                at = text.index(sign)
                raise AssertionError("sanitizer report:\n" + text[max(0, at - 200):at + 6000])

    def log(self):
        with open(self.log_file.name, errors="replace") as f:
            return f.read()

    def events(self):
        """What a serve with --json has said so far."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith('{"event":')]

    def connect(self, options=()):
        c = grpc.insecure_channel(self.address, [
            ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1), *options])
        self.channels.append(c)
        return c

    def health(self, service="tandem.v1.Inference", timeout=5):
        call = self.channel.unary_unary("/grpc.health.v1.Health/Check",
                                        health_pb2.HealthCheckRequest.SerializeToString,
                                        health_pb2.HealthCheckResponse.FromString)
        return call(health_pb2.HealthCheckRequest(service=service), timeout=timeout).status

    def is_ready(self, within=0):
        return tandem("probe", "--address", self.address, "--timeout", 5, "--wait", within)[0] == 0

    def wait_ready(self, seconds=30):
        """Until the server serves. The channel is a new one then: an old one may still be waiting to connect again."""
        def ready():
            if self.process.poll() is not None:
                raise AssertionError(f"serve ended with status {self.process.returncode}\n" + self.log())
            return self.is_ready(2)  # one program that asks again and again takes less from the cluster than many
        seconds = wait_for("ready", ready, seconds)
        self.channel = self.connect()
        return seconds

    def generate(self, prompt, channel=None, timeout=None, **options):
        """The stream of a Generate call. timeout None: a bound against hanging, not a part of the test."""
        call = (channel or self.channel).unary_stream(GENERATE, inference_pb2.GenerateRequest.SerializeToString,
                                                      inference_pb2.GenerateResponse.FromString)
        r = prompt if isinstance(prompt, inference_pb2.GenerateRequest) else request(prompt, **options)
        return call(r, timeout=timeout or 120 * SLOW)

    def run(self, prompt, **options):
        return Result(self.generate(prompt, **options))

    def control(self, method, reply, message, timeout=20):
        call = self.channel.unary_unary(f"/tandem.v1.Control/{method}", type(message).SerializeToString,
                                        reply.FromString)
        return call(message, timeout=timeout * SLOW)

    def load(self):
        return self.control("GetLoad", control_pb2.Load, control_pb2.GetLoadRequest())

    def info(self):
        return self.control("GetServerInfo", control_pb2.ServerInfo, control_pb2.GetServerInfoRequest())

    def idle(self):
        load = self.load()
        return load.running_requests == 0 and load.queued_requests == 0 and load.used_pages == 0

    def wait_idle(self, seconds=10):
        """Nothing leaked: no request, no page."""
        return wait_for("no request and no page in use", self.idle, seconds)

    def workers(self):
        """{rank: pid}"""
        return {r.rank: r.pid for r in self.info().ranks}

    def coordinator_pid(self):
        return next((p for p in children(self.process.pid) if process_name(p) == "tandem-coordinator"), None)


def tandem(*args, stdin="", timeout=60):
    """Runs the command; returns (exit status, stdout, stderr)."""
    p = subprocess.run([TANDEM, *map(str, args)], input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       timeout=timeout * SLOW)
    return p.returncode, p.stdout.decode(errors="replace"), p.stderr.decode(errors="replace")


def slow_model(to):
    """A random model whose long answers take many seconds, for tests that need a request to be running for sure."""
    path = os.path.join(to, "slow")
    subprocess.run(["/usr/bin/python3", os.path.join(SOURCE, "tests/bench/make_model.py"), path, "--hidden", "256",
                    "--inner", "1024", "--layers", "8", "--heads", "4", "--kv-heads", "2", "--head-dim", "64",
                    "--vocab", "2048", "--context", "16384", "--tokenizer", DEMO], check=True, stdout=subprocess.DEVNULL)
    return path


# For slow_model: memory for a few requests of FOREVER, which lasts longer than any test.
SLOW_ARGS = ["--kv-memory", "600M"]
FOREVER = dict(temperature=0, ignore_eos=True, max_tokens=16000)


def copy_model(to, source=DEMO):
    """A copy of a model folder that a test may damage."""
    path = os.path.join(to, "model")
    shutil.copytree(source, path)
    return path
