"""Pods without a cluster: runs pods of rendered manifests as processes in network, mount, process and UTS namespaces of their
own, as the kubelet would: init containers in order, probes in their phases, restarts, preStop and SIGTERM. Needs root and
`ip`; enter() puts the calling program into namespaces that take everything along when it ends.

Time between probes and in preStop is that of the manifest divided by HASTE.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import policy
from cluster import SLOW, SOURCE, grpc, health_pb2

HERE = os.path.dirname(os.path.abspath(__file__))
HASTE = 20
BRIDGE, NET = "pods0", "10.77.0."


class CannotRun(Exception):
    """Why this machine has no namespaces for us."""


def enter():
    """Runs the program again within namespaces of its own; raises CannotRun where that is not permitted."""
    if os.environ.get("TANDEM_PODS_INSIDE"):
        for command in (["link", "set", "lo", "up"], ["link", "add", BRIDGE, "type", "bridge"],
                        ["addr", "add", NET + "1/24", "dev", BRIDGE], ["link", "set", BRIDGE, "up"]):
            subprocess.run(["ip", *command], check=True)
        return
    if os.geteuid() != 0:
        raise CannotRun("it is not root")
    inside = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    try:
        p = subprocess.run([*inside, "ip", "link", "add", BRIDGE, "type", "bridge"], stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as e:
        raise CannotRun(f"{e.filename} is missing") from None
    if p.returncode:
        raise CannotRun("no namespaces or bridges: " + p.stderr.strip().replace("\n", "; "))
    os.environ["TANDEM_PODS_INSIDE"] = "1"
    os.execvp(inside[0], [*inside, sys.executable, *sys.argv])


def wait_for(what, condition, seconds):
    end = time.monotonic() + seconds * SLOW
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds * SLOW:.0f} s: {what}")
        time.sleep(0.02)


def first_child(pid):
    """The process that `unshare --fork` has started."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return int(f.read().split()[0])
    except (OSError, IndexError):
        return None


def image_environment(stage):
    """ENV of a stage of the Dockerfile, those of the stages below it included."""
    env, stages = {}, {}
    with open(os.path.join(SOURCE, "k8s/image/Dockerfile")) as f:
        for line in f:
            m = re.match(r"FROM (\S+) AS (\S+)", line)
            if m:
                env = stages[m.group(2)] = dict(stages.get(m.group(1), {}))
            if line.startswith("ENV "):
                env.update((k, v.strip('"')) for k, v in re.findall(r'(\w+)=("[^"]*"|\S*)', line))
    return stages[stage]


class Node:
    """What pods share: folders, root file systems by image, volumes that are not theirs, names."""

    n = 1  # addresses given: links of nodes before may take a moment to vanish

    def __init__(self, folder, docs, images, claims, secrets):
        self.folder, self.docs, self.images, self.claims, self.secrets = folder, docs, images, claims, secrets
        self.pods, self.hosts = [], {}

    def name(self, *names):
        """An address for a pod, under all of names. Before the pods are made: all of them see all names."""
        Node.n += 1
        for n in names:
            self.hosts[n] = f"{NET}{Node.n}"
        return f"{NET}{Node.n}"

    def close(self):
        for p in self.pods:
            p.kill()


class Container:
    def __init__(self, pod, c, init):
        self.pod, self.c, self.init = pod, c, init
        self.name = c["name"]
        self.process, self.pid, self.starts, self.exit_codes = None, None, 0, []
        self.log = open(os.path.join(pod.folder, self.name + ".log"), "ab")

    def spec(self):
        pod, c, spec = self.pod, self.c, self.pod.spec
        s, p = c.get("securityContext", {}), spec["securityContext"]
        image = c["image"].rsplit("/", 1)[-1].split(":")[0]
        root = pod.node.images[image]
        env = {**image_environment(image.replace("tandem-", "")), "HOSTNAME": pod.hostname, **pod.extra_env,
               **policy.environment(c, pod.node.docs, {"status.podIP": pod.ip, "metadata.name": pod.hostname})}
        mounts = [{"source": pod.volumes[m["name"]], "target": m["mountPath"], "read_only": m.get("readOnly", False)}
                  for m in c.get("volumeMounts", [])]
        mounts += [{"source": os.path.join(pod.folder, f), "target": "/etc/" + f, "read_only": True}
                   for f in ("hosts", "hostname", "resolv.conf")] + pod.extra_mounts
        for m in mounts:  # a runtime makes mount points in the image
            at = root + m["target"]
            if m["target"] != "/dev/shm" and not os.path.exists(at):
                if os.path.isdir(m["source"]):
                    os.makedirs(at, exist_ok=True)
                else:
                    os.makedirs(os.path.dirname(at), exist_ok=True)
                    open(at, "w").close()
        argv = c["command"] + [re.sub(r"\$\((\w+)\)", lambda v: env[v.group(1)], a) for a in c.get("args", [])]
        return {"root": root, "argv": argv, "env": env, "mounts": mounts, "uid": p.get("runAsUser", pod.uid),
                "gid": p.get("runAsGroup", 0 if "runAsUser" not in p else p["runAsUser"]), "groups": [pod.fs_group],
                "read_only_root": s.get("readOnlyRootFilesystem", False),
                "drop_all": "ALL" in s.get("capabilities", {}).get("drop", []),
                "seccomp": p.get("seccompProfile", {}).get("type"),
                "no_new_privileges": s.get("allowPrivilegeEscalation") is False}

    def start(self):
        path = os.path.join(self.pod.folder, self.name + ".json")
        with open(path, "w") as f:
            json.dump(self.spec(), f)
        self.process = subprocess.Popen(
            ["nsenter", "--net", "--uts", "--ipc", "--target", str(self.pod.sandbox_pid), "unshare", "--mount", "--pid",
             "--fork", "--kill-child", sys.executable, os.path.join(HERE, "container.py"), path],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.starts += 1
        self.pid = None
        wait_for("process of " + self.name, lambda: self.find_pid() or self.process.poll() is not None, 10)

    def find_pid(self):
        self.pid = self.pid or first_child(self.process.pid)
        return self.pid

    def text(self):
        with open(self.log.name, errors="replace") as f:
            return f.read()

    def processes(self):
        """{pid: name} of all its processes, seen from outside; without those of exec probes, whose parent is not in it."""
        ns = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for p in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{p}/ns/pid") == ns:
                    with open(f"/proc/{p}/stat") as f:
                        name, _, rest = f.read().partition("(")[2].rpartition(")")
                    found[int(p)] = (name, int(rest.split()[1]))
            except OSError:
                pass
        return {p: name for p, (name, parent) in found.items() if p == self.pid or parent in found}

    def probe(self, kind):
        p = self.c[kind]
        timeout = p.get("timeoutSeconds", 1) * SLOW
        if "grpc" in p:
            with grpc.insecure_channel(f"{self.pod.ip}:{p['grpc']['port']}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
                call = channel.unary_unary("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest.SerializeToString,
                                           health_pb2.HealthCheckResponse.FromString)
                try:
                    return call(health_pb2.HealthCheckRequest(service=p["grpc"].get("service", "")), timeout=timeout).status == 1
                except grpc.RpcError:
                    return False
        if "tcpSocket" in p:
            port = p["tcpSocket"]["port"]
            port = next((q["containerPort"] for q in self.c["ports"] if q["name"] == port), port)
            try:
                socket.create_connection((self.pod.ip, port), timeout).close()
                return True
            except OSError:
                return False
        return self.run(p["exec"]["command"], timeout) == 0

    def run(self, command, timeout):
        """A command in the container, as its user; its status, None when it takes too long."""
        s = self.spec()
        env = [f"{k}={v}" for k, v in s["env"].items()]
        try:
            return subprocess.run(
                ["env", "-i", *env, "/usr/bin/nsenter", "--target", str(self.pid), "--mount", "--net", "--uts", "--ipc", "--pid",
                 "--root", "--setgid", str(self.pod.fs_group), "--setuid", str(s["uid"]), *command],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            return None


class Pod:
    """Started at once; `ready`, `started`, `log` tell how it fares."""

    def __init__(self, node, hostname, ip, template, extra_env=(), uid=None, fs_group=None, files=()):
        self.node, self.hostname, self.ip = node, hostname, ip
        self.spec, self.extra_env = template["spec"], dict(extra_env)
        self.uid, self.fs_group = uid, self.spec["securityContext"].get("fsGroup", fs_group)
        self.folder = os.path.join(node.folder, hostname)
        self.terminating, self.ready, self.started, self.stopped = False, False, False, threading.Event()
        self.history = []  # (seconds since the start, what)
        self.born = time.monotonic()
        os.makedirs(self.folder)
        for name, text in (("hosts", "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in node.hosts.items())),
                           ("hostname", hostname + "\n"), ("resolv.conf", "")):
            with open(os.path.join(self.folder, name), "w") as f:
                f.write(text)
        self.extra_mounts = []  # files that a controller adds: {path: text}
        for path, text in dict(files).items():
            source = os.path.join(self.folder, path.replace("/", "-"))
            with open(source, "w") as f:
                f.write(text)
            self.extra_mounts.append({"source": source, "target": path, "read_only": True})
        self.make_sandbox()
        self.mounted = []
        self.volumes = {v["name"]: self.make_volume(v) for v in self.spec.get("volumes", [])}
        self.inits = [Container(self, c, True) for c in self.spec.get("initContainers", [])]
        self.main = Container(self, self.spec["containers"][0], False)
        node.pods.append(self)
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def note(self, what):
        self.history.append((round(time.monotonic() - self.born, 2), what))

    def make_sandbox(self):
        self.sandbox = subprocess.Popen(["unshare", "--net", "--uts", "--ipc", "--fork", "--kill-child", "sleep", "infinity"])
        wait_for("a sandbox", lambda: first_child(self.sandbox.pid), 10)
        self.sandbox_pid = first_child(self.sandbox.pid)
        n = self.ip.rsplit(".", 1)[1]
        inside = ["nsenter", "--net", "--uts", "--target", str(self.sandbox_pid)]
        for command in (["ip", "link", "add", f"p{n}", "type", "veth", "peer", "name", "eth0", "netns", str(self.sandbox_pid)],
                        ["ip", "link", "set", f"p{n}", "master", BRIDGE, "up"], [*inside, "hostname", self.hostname],
                        [*inside, "ip", "link", "set", "lo", "up"], [*inside, "ip", "link", "set", "eth0", "up"],
                        [*inside, "ip", "addr", "add", self.ip + "/24", "dev", "eth0"]):
            subprocess.run(command, check=True)

    def make_volume(self, v):
        path = os.path.join(self.folder, "volume-" + v["name"])
        if "persistentVolumeClaim" in v:
            return self.node.claims[v["persistentVolumeClaim"]["claimName"]]
        os.mkdir(path)
        if "emptyDir" in v:
            if v["emptyDir"].get("medium") == "Memory":
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(policy.quantity(v['emptyDir']['sizeLimit']))}",
                                "tmpfs", path], check=True)
                self.mounted.append(path)
            os.chown(path, 0, self.fs_group)
            os.chmod(path, 0o2777)
            return path
        for key, value in self.node.secrets[v["secret"]["secretName"]].items():
            at = os.path.join(path, key)
            with open(at, "w") as f:
                f.write(value)
            os.chown(at, 0, self.fs_group)
            os.chmod(at, v["secret"]["defaultMode"])
        return path

    # ---- its life ----

    def live(self):
        for c in self.inits:
            while not self.terminating:
                c.start()
                c.exit_codes.append(c.process.wait())
                if c.exit_codes[-1] == 0:
                    break
                time.sleep(10 / HASTE)
        if self.terminating:
            return
        self.main.start()
        self.note("running")
        failures, next_live, next_ready, live, ready = 0, 0, 0, self.main.c["livenessProbe"], self.main.c["readinessProbe"]
        while not self.stopped.is_set():
            code = self.main.process.poll()
            if code is not None:
                self.main.exit_codes.append(code)
                self.set_ready(False)
                if self.terminating:
                    break
                self.note(f"ended with {code}, started again")
                self.started = False
                self.main.start()
            now = time.monotonic()
            if not self.started:
                self.started = self.main.probe("startupProbe")
                if self.started:
                    self.note("started")
                time.sleep(self.main.c["startupProbe"]["periodSeconds"] / HASTE)
                continue
            if now >= next_ready:
                next_ready = now + ready["periodSeconds"] / HASTE
                self.set_ready(self.main.probe("readinessProbe") and not self.terminating)
            if now >= next_live and not self.terminating:
                next_live = now + live["periodSeconds"] / HASTE
                failures = 0 if self.main.probe("livenessProbe") else failures + 1
                if failures >= live["failureThreshold"]:
                    self.note("not alive")
                    self.main.process.kill()
                    failures = 0
            self.stopped.wait(0.05)

    def set_ready(self, ready):
        if ready != self.ready:
            self.ready = ready
            self.note("ready" if ready else "not ready")

    def wait_ready(self, seconds=60):
        try:
            wait_for(f"{self.hostname} ready", lambda: self.ready, seconds)
        except AssertionError as e:
            raise AssertionError(f"{e}; {self.history}\n{self.logs()}") from None
        return next(t for t, what in self.history if what == "ready")

    def logs(self):
        return "".join(f"---- {self.hostname} {c.name} ----\n{c.text()[-4000:]}" for c in [*self.inits, self.main])

    # ---- its end ----

    def delete(self):
        """As the API server's deletion: out of the endpoints, preStop, SIGTERM, after the grace period SIGKILL. In a thread;
        returns it."""
        self.terminating = True
        t = threading.Thread(target=self.end, daemon=True)
        t.start()
        return t

    def end(self):
        begin = time.monotonic()
        grace = self.spec["terminationGracePeriodSeconds"]
        time.sleep(self.main.c.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) / HASTE)
        self.note("SIGTERM")
        if self.main.pid:
            try:
                os.kill(self.main.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
        while self.thread.is_alive() and time.monotonic() < begin + grace:
            time.sleep(0.02)
        self.note("ended" if not self.thread.is_alive() else "SIGKILL")
        self.kill()

    def kill(self):
        self.terminating = True
        self.stopped.set()
        for c in [*self.inits, self.main]:
            if c.process and c.process.poll() is None:
                c.process.kill()
                c.process.wait()
        self.thread.join(10)
        for c in [*self.inits, self.main]:
            c.log.close()
        while self.mounted:
            subprocess.run(["umount", "--lazy", self.mounted.pop()])
        if self.sandbox.poll() is None:
            self.sandbox.kill()
            self.sandbox.wait()
