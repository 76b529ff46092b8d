"""The images and the manifests at work, without a cluster and without a container engine: pods.py runs the pods of rendered
overlays on the file systems that rootfs.sh makes. Skipped (status 77) where namespaces are not permitted.

    test_pods.py [Class[.test]]    TANDEM_PODS_ALL=1: also those that the usual run leaves out
"""
import base64
import concurrent.futures
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request

import yaml

SOURCE = os.environ.get("TANDEM_SOURCE", os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
sys.path.insert(0, os.path.join(SOURCE, "tests/e2e"))

import pods  # noqa: E402
import policy  # noqa: E402
import render  # noqa: E402
from cluster import BIN, DEMO, GENERATE, SLOW, Result, control_pb2, expected, grpc, inference_pb2, request, slow_model  # noqa: E402
from pods import Node, Pod, wait_for  # noqa: E402

K8S = os.path.join(SOURCE, "k8s")
LONG = dict(temperature=0, ignore_eos=True)


def setUpModule():
    global ROOM, HOST, COORDINATOR, SLOW_MODEL
    ROOM = tempfile.mkdtemp(prefix="tandem-pods-", dir="/tmp")
    os.chmod(ROOM, 0o755)
    HOST, COORDINATOR = os.path.join(ROOM, "host"), os.path.join(ROOM, "coordinator")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        work = [pool.submit(make_image, "host", HOST), pool.submit(make_image, "coordinator", COORDINATOR),
                pool.submit(slow_model, ROOM)]
        SLOW_MODEL = [w.result() for w in work][-1]


def tearDownModule():
    shutil.rmtree(ROOM)


def make_image(variant, to):
    p = subprocess.run([os.path.join(K8S, "image/rootfs.sh"), variant, BIN, to], stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, text=True)
    if p.returncode:
        raise AssertionError(p.stdout)


def health_check():
    """HEALTHCHECK of the images."""
    with open(os.path.join(K8S, "image/Dockerfile")) as f:
        return json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", f.read(), re.M).group(1))


def folder_bytes(path):
    return sum(os.lstat(os.path.join(d, f)).st_size for d, _, files in os.walk(path) for f in files)


def generate(address, prompt, timeout=120, channel=None, metadata=None, **options):
    """(Result or None, gRPC's code or None) of a request over a connection of its own."""
    with channel or grpc.insecure_channel(f"{address}:50051", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_stream(GENERATE, inference_pb2.GenerateRequest.SerializeToString,
                                    inference_pb2.GenerateResponse.FromString)
        try:
            return Result(call(request(prompt, **options), timeout=timeout * SLOW, metadata=metadata)), None
        except grpc.RpcError as e:
            return None, e


def scrape(pod, docs):
    """What Prometheus gets that does as the PodMonitor says."""
    (endpoint,) = next(d for d in docs if d["kind"] == "PodMonitor")["spec"]["podMetricsEndpoints"]
    if set(endpoint) - {"port", "path", "scheme", "interval", "scrapeTimeout"} or endpoint["scheme"] != "http":
        raise AssertionError(f"not imitated: {endpoint}")
    port = next(p["containerPort"] for p in pod.main.c["ports"] if p["name"] == endpoint["port"])
    with urllib.request.urlopen(f"http://{pod.ip}:{port}{endpoint['path']}", timeout=10 * SLOW) as r:
        return r.read().decode()


class Stream(threading.Thread):
    """A request that runs beside the test. `count` tokens have come so far."""

    def __init__(self, address, prompt, **options):
        super().__init__(daemon=True)
        self.address, self.prompt, self.options = address, prompt, options
        self.count, self.ids, self.error, self.finish = 0, [], None, None
        self.start()

    def run(self):
        with grpc.insecure_channel(f"{self.address}:50051", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_stream(GENERATE, inference_pb2.GenerateRequest.SerializeToString,
                                        inference_pb2.GenerateResponse.FromString)
            try:
                for m in call(request(self.prompt, **self.options), timeout=180 * SLOW):
                    self.ids += m.token_ids
                    self.count = len(self.ids)
                    if m.HasField("finish"):
                        self.finish = m.finish
            except grpc.RpcError as e:
                self.error = e

    def wait_count(self, n):
        wait_for(f"{n} tokens", lambda: self.count >= n or self.error or self.finish, 60)


class Image(unittest.TestCase):
    def test_closed_small_and_without_a_shell(self):
        for variant, most in (("coordinator", 60), ("host", 120)):
            root = HOST if variant == "host" else COORDINATOR
            with self.subTest(variant):
                size = folder_bytes(root)
                print(f"image {variant}: {size / 1e6:.1f} MB")
                self.assertLess(size, most * 1e6)
                names = {f for _, _, files in os.walk(root) for f in files}
                self.assertFalse(names & {"sh", "bash", "dash", "busybox", "perl", "python3"})
                writable = [f for d, _, files in os.walk(root) for f in files
                            if not os.path.islink(os.path.join(d, f)) and os.lstat(os.path.join(d, f)).st_mode & 0o6022]
                self.assertEqual(writable, [])
                # Every program starts with nothing but what is in the image.
                for program in ("tandem", "tandem-coordinator", "tandem-agent", "mpirun") + (
                        ("tandem-worker",) if variant == "host" else ()):
                    p = subprocess.run([shutil.which("chroot"), root, "/usr/bin/" + program, "--version"], stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env={}, text=True)
                    self.assertEqual(p.returncode, 0, program + ": " + p.stdout)

    def test_licences_and_packages_are_listed(self):
        doc = os.path.join(HOST, "usr/share/doc")
        with open(os.path.join(doc, "sbom.spdx.json")) as f:
            sbom = json.load(f)
        names = {p["name"] for p in sbom["packages"]}
        self.assertLessEqual({"tandem", "libc6", "libgrpc29", "libopenmpi3"} if "libgrpc29" in names else
                             {"tandem", "libc6"}, names)
        self.assertEqual(len(names), len(sbom["packages"]))
        self.assertIn("tandem-demo-model", names)
        for p in sbom["packages"]:
            self.assertTrue(p["versionInfo"] and p["licenseComments"], p)
            self.assertFalse(p["licenseComments"].startswith(";"), p)
            if not p["name"].startswith("tandem"):
                self.assertTrue(os.path.getsize(os.path.join(doc, p["name"], "copyright")) > 0, p["name"])


class PodsTest(unittest.TestCase):
    def make_node(self, folder, docs, model, images=None, secrets=None):
        self.room = tempfile.mkdtemp(dir=ROOM)
        os.chmod(self.room, 0o755)
        secret = yaml.safe_load(subprocess.run([os.path.join(K8S, "group-secret.sh")], stdout=subprocess.PIPE, check=True).stdout)
        self.assertEqual(secret["metadata"]["name"], "tandem-group")
        group = {k: base64.b64decode(v).decode() for k, v in secret["data"].items()}
        node = Node(self.room, docs, {"tandem-host": HOST, **(images or {})}, {"tandem-model": model},
                    {"tandem-group": group, **(secrets or {})})
        self.addCleanup(node.close)
        return node

    def tell(self, *pods_):
        for p in pods_:
            print(f"  {p.hostname}: " + ", ".join(f"{t} s {what}" for t, what in p.history))

    def check_confined(self, pod, uid):
        """No process has more rights than the manifest gives, and listens elsewhere than on the ports of the manifest and on
        those of Open MPI, which test_manifests.py finds in the policy of groups."""
        seen = pod.main.processes()
        self.assertTrue(seen)
        for pid, name in seen.items():
            try:
                with open(f"/proc/{pid}/status") as f:
                    status = dict(re.findall(r"^(\w+):\s*(.*)$", f.read(), re.M))
            except OSError:
                continue  # it has just ended
            self.assertEqual(status["Uid"].split(), [str(uid)] * 4, name)
            for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                self.assertEqual(int(status[field], 16), 0, f"{name}: {field}")
            self.assertEqual(status["NoNewPrivs"], "1", name)
            self.assertEqual(status["Seccomp"], "2" if platform.machine() == "x86_64" else "0", name)
        flags = os.statvfs(f"/proc/{pod.main.pid}/root/").f_flag
        self.assertTrue(flags & os.ST_RDONLY)
        self.assertTrue(os.statvfs(f"/proc/{pod.main.pid}/root/etc/").f_flag & os.ST_RDONLY)
        declared = {p["containerPort"] for p in pod.main.c["ports"]}
        for port in self.listening(pod):
            self.assertTrue(port in declared or 50100 <= port <= 50399, f"{pod.hostname} listens on {port}")

    def listening(self, pod):
        """TCP ports that others can reach."""
        ports = set()
        for table in ("tcp", "tcp6"):
            with open(f"/proc/{pod.main.pid}/net/{table}") as f:
                for line in f.readlines()[1:]:
                    address, port = line.split()[1].split(":")
                    if line.split()[3] == "0A" and not address.endswith("0100007F") and address != "0" * 24 + "01000000":
                        ports.add(int(port, 16))
        return ports


class Group(PodsTest):
    """Two pods that hold one rank each."""

    def start_group(self):
        docs = render.render(os.path.join(SOURCE, "tests/k8s/site/multi-node"))
        templates = policy.pods(docs)
        node = self.make_node("group", docs, SLOW_MODEL)
        # What the controller of LeaderWorkerSets gives its pods.
        leader_ip, worker_ip = node.name("tandem-0.tandem.default", "tandem-0"), node.name("tandem-0-1.tandem.default", "tandem-0-1")
        env = {"LWS_LEADER_ADDRESS": "tandem-0.tandem.default", "LWS_GROUP_SIZE": "2"}
        made = []
        for (_, template, _), name, ip, index in zip(templates, ("tandem-0", "tandem-0-1"), (leader_ip, worker_ip), "01"):
            pod = Pod(node, name, ip, template, {**env, "LWS_WORKER_INDEX": index})
            made.append(pod)
            if index == "0":
                time.sleep(0.5)  # the leader waits for its worker
                self.assertFalse(pod.ready or pod.main.starts)
        return made

    def test_life(self):
        leader, worker = self.start_group()
        worker.wait_ready()
        leader.wait_ready()
        self.tell(leader, worker)
        names = [sorted(p.main.processes().values()) for p in (leader, worker)]
        self.assertEqual([n.count("tandem-worker") for n in names], [1, 1], names)
        self.check_confined(leader, 65532)
        self.check_confined(worker, 65532)
        for p in (leader, worker):
            self.assertEqual([w for _, w in p.history], ["running", "started", "ready"])
        self.assertRegex(scrape(leader, leader.node.docs), r"(?m)^tandem_ranks 2$")

        quiet, error = generate(leader.ip, "Once upon a time", max_tokens=300, **LONG)
        self.assertIsNone(error, leader.logs())
        self.rank_dies(leader, worker, quiet)
        self.worker_pod_dies(leader, worker, quiet)
        self.group_is_deleted(leader, worker, quiet)

    def rank_dies(self, leader, worker, quiet):
        stream = Stream(leader.ip, "Once upon a time", max_tokens=300, **LONG)
        stream.wait_count(20)
        rank = next(pid for pid, name in worker.main.processes().items() if name == "tandem-worker")
        os.kill(rank, 9)
        stream.join(120 * SLOW)
        self.assertIsNone(stream.error, leader.logs())
        self.assertEqual(stream.ids, quiet.ids)
        self.assertEqual((leader.main.starts, worker.main.starts), (1, 1), "no container was started again")

    def worker_pod_dies(self, leader, worker, quiet):
        stream = Stream(leader.ip, "Once upon a time", max_tokens=300, **LONG)
        stream.wait_count(20)
        os.kill(worker.main.pid, 9)
        stream.join(120 * SLOW)
        self.assertIsNone(stream.error, leader.logs())
        self.assertEqual(stream.ids, quiet.ids)
        self.assertEqual((leader.main.starts, worker.main.starts), (1, 2), leader.logs())
        leader.wait_ready()

    def group_is_deleted(self, leader, worker, quiet):
        """Both get SIGTERM at the same time, with a request running."""
        wait_for("ready again", lambda: leader.ready and worker.ready, 30)
        stream = Stream(leader.ip, "Once upon a time", max_tokens=1500, **LONG)  # not over before SIGTERM on any machine
        stream.wait_count(20)
        ends = [p.delete() for p in (leader, worker)]
        wait_for("SIGTERM", lambda: any(w == "SIGTERM" for _, w in leader.history), 10)
        code = None
        while code is None and not stream.finish:  # the signal takes a moment; whoever comes in before is served
            late, error = generate(leader.ip, "The dog", max_tokens=1, **LONG)
            code = error.code() if error else None
        self.assertEqual(code, grpc.StatusCode.UNAVAILABLE)
        self.assertIsNone(stream.finish, "new requests are refused while old ones run")
        stream.join(120 * SLOW)
        self.assertIsNone(stream.error, leader.logs())
        self.assertEqual(stream.ids[: len(quiet.ids)], quiet.ids)
        self.assertEqual(len(stream.ids), 1500)
        for t in ends:
            t.join(60 * SLOW)
        self.tell(leader, worker)
        self.assertEqual([p.main.exit_codes[-1] for p in (leader, worker)], [0, 0], leader.logs() + worker.logs())


class Tls(PodsTest):
    """What cert-manager and a person put into Secrets, and a pod of overlays/tls that takes them."""

    def certificate(self, docs):
        c = next(d for d in docs if d["kind"] == "Certificate" and d["metadata"]["name"] == "tandem")["spec"]
        names = ",".join("DNS:" + n for n in c["dnsNames"])
        with tempfile.TemporaryDirectory(dir=ROOM) as dir:
            key, crt = os.path.join(dir, "key"), os.path.join(dir, "crt")
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                            "-days", "2", "-subj", "/CN=tandem", "-addext", "subjectAltName=" + names, "-keyout", key, "-out",
                            crt], check=True, stderr=subprocess.DEVNULL)
            with open(key) as k, open(crt) as t:
                cert = t.read()
                return c["secretName"], {"tls.key": k.read(), "tls.crt": cert, "ca.crt": cert}

    def test_tls_and_tokens(self):
        docs = render.render(os.path.join(SOURCE, "tests/k8s/site/tls"))
        name, tls = self.certificate(docs)
        token = "0123456789abcdef" * 4
        node = self.make_node("tls", docs, DEMO, secrets={name: tls, "tandem-tokens": {"tokens": token + "\n"}})
        pod = Pod(node, "tandem-0", node.name("tandem-0"), policy.pods(docs)[0][1])
        pod.wait_ready()  # by plaintext probes
        self.tell(pod)
        self.check_confined(pod, 65532)

        def ask(metadata):
            trusted = grpc.ssl_channel_credentials(tls["ca.crt"].encode())
            channel = grpc.secure_channel(f"{pod.ip}:50051", trusted, [("grpc.ssl_target_name_override", "tandem"),
                                                                      ("grpc.use_local_subchannel_pool", 1)])
            return generate(pod.ip, "Once upon a time", max_tokens=4, channel=channel, metadata=metadata)
        result, error = ask([("authorization", "Bearer " + token)])
        self.assertIsNone(error, pod.logs())
        self.assertEqual(len(result.ids), 4)
        self.assertEqual(ask([("authorization", "Bearer " + token[::-1])])[1].code(), grpc.StatusCode.UNAUTHENTICATED)
        self.assertEqual(ask(None)[1].code(), grpc.StatusCode.UNAUTHENTICATED)
        self.assertEqual(generate(pod.ip, "x", max_tokens=1)[1].code(), grpc.StatusCode.UNAVAILABLE)  # without TLS
        self.assertRegex(scrape(pod, docs), r"(?m)^tandem_ready 1$")
        with self.assertRaises(urllib.error.HTTPError) as e:  # what else there is over HTTP would be in plaintext
            urllib.request.urlopen(f"http://{pod.ip}:8000/v1/models", timeout=10 * SLOW)
        self.assertEqual(e.exception.code, 403)


@unittest.skipUnless(os.environ.get("TANDEM_PODS_ALL"), "TANDEM_PODS_ALL is not set")
class Launcher(PodsTest):
    """A pod without a GPU, from an image that has no ranks' program, serves and launches ranks in two others."""

    def life(self, site, ranks_name, domain, loses_a_pod, serve_env=(), files=()):
        docs = render.render(os.path.join(SOURCE, "tests/k8s/site", site))
        node = self.make_node(site, docs, DEMO, {"tandem-coordinator": COORDINATOR})
        names = ["tandem-launcher"] + [f"{ranks_name}-{i}" for i in range(2)]
        ips = [node.name(n, f"{n}.{domain}") for n in names]
        (_, serve, _), (_, ranks, _) = policy.pods(docs)
        made = [Pod(node, names[0], ips[0], serve, serve_env, files=files)]
        made += [Pod(node, n, ip, ranks) for n, ip in zip(names[1:], ips[1:])]
        for p in made[::-1]:
            p.wait_ready()
            self.check_confined(p, 65532)
        self.tell(*made)
        self.assertEqual([list(p.main.processes().values()).count("tandem-worker") for p in made], [0, 1, 1])
        stream = Stream(made[0].ip, "Once upon a time", max_tokens=400, **LONG)
        stream.wait_count(3)
        if loses_a_pod:
            os.kill(made[1].main.pid, 9)
        stream.join(120 * SLOW)
        self.assertIsNone(stream.error, made[0].logs())
        self.assertEqual(len(stream.ids), 400)

    def test_statefulset(self):
        self.life("statefulset", "tandem-ranks", "tandem-ranks", True)

    def test_mpijob(self):
        hosts = "".join(f"tandem-worker-{i}.tandem.default.svc slots=1\n" for i in range(2))
        # What the operator adds to the launcher's environment.
        env = {"OMPI_MCA_orte_keep_fqdn_hostnames": "true", "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
               "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10", "OMPI_MCA_orte_set_default_slots": "1",
               "K_MPI_JOB_ROLE": "launcher", "NVIDIA_VISIBLE_DEVICES": "", "NVIDIA_DRIVER_CAPABILITIES": ""}
        self.life("mpijob", "tandem-worker", "tandem.default.svc", False, env, {"/etc/mpi/hostfile": hosts})


@unittest.skipUnless(os.environ.get("TANDEM_PODS_ALL"), "TANDEM_PODS_ALL is not set")
class Journal(PodsTest):
    def test_answer_outlives_its_container(self):
        """All processes of a pod are killed; the journal in its /tmp is still there when the container starts again."""
        docs = render.render(os.path.join(K8S, "overlays/host-only"))
        node = self.make_node("journal", docs, DEMO)
        pod = Pod(node, "tandem-0", node.name("tandem-0"), policy.pods(docs)[0][1], {"TANDEM_SERVE_JOURNAL": "/tmp/journal"})
        pod.wait_ready()
        quiet, error = generate(pod.ip, "Once upon a time", max_tokens=300, **LONG)
        self.assertIsNone(error, pod.logs())
        stream = Stream(pod.ip, "Once upon a time", max_tokens=300, request_id="kept", **LONG)
        stream.wait_count(20)
        os.kill(pod.main.pid, 9)
        stream.join(30 * SLOW)
        self.assertEqual((stream.finish, stream.error.code()), (None, grpc.StatusCode.UNAVAILABLE))
        wait_for("started again", lambda: pod.main.starts == 2 and pod.ready, 60)
        with grpc.insecure_channel(f"{pod.ip}:50051", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_stream("/tandem.v1.Inference/Attach", inference_pb2.AttachRequest.SerializeToString,
                                        inference_pb2.GenerateResponse.FromString)
            offsets = [inference_pb2.AttachOffset(tokens=len(stream.ids))]
            rest = Result(call(inference_pb2.AttachRequest(request_id="kept", offsets=offsets), timeout=60 * SLOW))
        self.assertEqual(stream.ids + rest.ids, quiet.ids)
        self.tell(pod)


class Rolling(PodsTest):
    """Two replicas under load are replaced one after the other. One of them under a user that the platform chose."""

    def new_pod(self, node, docs, uid):
        self.made = getattr(self, "made", 0) + 1
        name = f"tandem-{self.made}"
        template = policy.pods(docs)[0][1]
        pod = Pod(node, name, self.addresses.pop(0), template, uid=uid, fs_group=uid)
        self.endpoints.append(pod)
        return pod

    def client(self, case):
        """Asks whoever is ready, over and over, as a balancer would; no answer may fail or differ."""
        n = 0
        while not self.enough.is_set():
            ready = [p for p in self.endpoints if p.ready and not p.terminating]
            if not ready:
                self.failures.append("no endpoint is ready")
                return
            n += 1
            pod = ready[n % len(ready)]
            result, error = generate(pod.ip, case["prompt"], max_tokens=len(case["greedy_ids"]), temperature=0)
            if error or result.ids[:len(case["greedy_ids"])] != case["greedy_ids"]:
                self.failures.append(str(error or result.ids))
                return
            self.answers[pod.hostname] = self.answers.get(pod.hostname, 0) + 1

    def test_rolling_restart_gives_no_error(self):
        docs = render.render(os.path.join(K8S, "overlays/openshift"))
        node = self.make_node("rolling", docs, DEMO)
        self.endpoints, self.failures, self.answers, self.enough = [], [], {}, threading.Event()
        self.addresses = [node.name(f"tandem-{i}") for i in range(1, 5)]
        strategy = policy.templates(next(d for d in docs if d["kind"] == "Deployment"))
        self.assertEqual(strategy[0][2], 2)
        old = [self.new_pod(node, docs, 1000650000) for _ in range(2)]
        for p in old:
            seconds = p.wait_ready()
            print(f"host-only: ready {seconds} s after the start of the pod")
            self.assertLess(seconds, 10 * SLOW)
        self.check_confined(old[0], 1000650000)
        self.assertEqual(old[0].main.run(health_check(), 10 * SLOW), 0)
        self.assertNotEqual(old[0].main.run([*health_check(), "--service", "no such"], 10 * SLOW), 0)
        case = min(expected(), key=lambda c: len(c["greedy_ids"]))
        clients = [threading.Thread(target=self.client, args=(case,), daemon=True) for _ in range(3)]
        for c in clients:
            c.start()
        wait_for("an answer of both", lambda: len(self.answers) == 2 or self.failures, 30)
        for p in old:  # maxSurge 1, maxUnavailable 0
            self.new_pod(node, docs, 1000650000).wait_ready()
            p.delete().join(120 * SLOW)
            self.assertEqual(p.main.exit_codes, [0], p.logs())
        wait_for("an answer of every pod", lambda: len(self.answers) == 4 or self.failures, 30)
        self.enough.set()
        for c in clients:
            c.join(60 * SLOW)
        self.tell(*self.endpoints)
        print(f"  answers: {self.answers}")
        self.assertEqual(self.failures, [])

    @unittest.skipUnless(os.environ.get("TANDEM_PODS_ALL"), "TANDEM_PODS_ALL is not set")
    def test_restart_of_groups_in_a_pod_gives_no_error(self):
        docs = render.render(os.path.join(SOURCE, "tests/k8s/site/groups"))
        node = self.make_node("groups", docs, DEMO)
        self.endpoints, self.failures, self.answers, self.enough = [], [], {}, threading.Event()
        self.addresses = [node.name("tandem-1")]
        pod = self.new_pod(node, docs, None)
        pod.wait_ready()
        ranks = lambda: {p for p, name in pod.main.processes().items() if name == "tandem-worker"}  # noqa: E731
        wait_for("both groups", lambda: len(ranks()) == 2, 30)
        first = ranks()
        case = min(expected(), key=lambda c: len(c["greedy_ids"]))
        clients = [threading.Thread(target=self.client, args=(case,), daemon=True) for _ in range(2)]
        for c in clients:
            c.start()
        for group in ("g0", "g1"):
            self.wait_groups(pod)
            before = ranks()
            self.ask(pod, "Drain", control_pb2.DrainResponse,
                     control_pb2.DrainRequest(group=group, timeout_ms=1000, restart=True))
            wait_for("its rank is gone", lambda: len(ranks() & before) == 1, 30)
        self.wait_groups(pod)
        self.enough.set()
        for c in clients:
            c.join(60 * SLOW)
        print(f"  answers: {self.answers}; {pod.history}")
        self.assertEqual(self.failures, [])
        self.assertFalse(ranks() & first, "each rank is a new process")
        self.assertEqual([w for _, w in pod.history], ["running", "started", "ready"])

    def ask(self, pod, method, reply, message):
        with grpc.insecure_channel(f"{pod.ip}:50051", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(f"/tandem.v1.Control/{method}", type(message).SerializeToString, reply.FromString)
            return call(message, timeout=30 * SLOW)

    def wait_groups(self, pod):
        def serve():
            load = self.ask(pod, "GetLoad", control_pb2.Load, control_pb2.GetLoadRequest())
            return [g.name for g in load.groups if g.serving] == ["g0", "g1"]
        wait_for("both groups serve", serve, 60)


if __name__ == "__main__":
    try:
        pods.enter()
    except pods.CannotRun as why:
        print(f"skipped: pods cannot be run here: {why}")
        sys.exit(77)
    unittest.main(verbosity=2)
