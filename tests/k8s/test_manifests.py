"""Every overlay of k8s/: rendered, checked strictly against schemas and against the project's policy; options that the
programs take, metrics that the coordinator has. Each check is shown to fail on manifests that were made wrong."""
import copy
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import unittest
import urllib.request

import jsonschema
import yaml

import policy
import render
from schemas import SCHEMAS

SOURCE = os.environ.get("TANDEM_SOURCE", os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
BIN = os.environ.get("TANDEM_BIN", os.path.join(SOURCE, "build/release/bin"))
K8S = os.path.join(SOURCE, "k8s")
OVERLAYS = sorted(os.listdir(os.path.join(K8S, "overlays")))
VALIDATORS = {k: jsonschema.Draft7Validator(s) for k, s in SCHEMAS.items()}
ON_ANY_CLUSTER = ("host-only", "openshift")  # to try it: without the Prometheus operator, too
RENDERED = {}


def rendered(overlay):
    """A copy that a test may change."""
    if overlay not in RENDERED:
        RENDERED[overlay] = render.render(os.path.join(K8S, "overlays", overlay))
    return copy.deepcopy(RENDERED[overlay])


def schema_errors(docs):
    errors = []
    for d in docs:
        validator = VALIDATORS.get((d.get("apiVersion"), d.get("kind")))
        name = f"{d.get('kind')} {d.get('metadata', {}).get('name')}"
        if validator is None:
            errors.append(f"{name}: {d.get('apiVersion')} {d.get('kind')} has no schema")
            continue
        for e in validator.iter_errors(d):
            errors.append(f"{name}: {'/'.join(map(str, e.absolute_path))}: {e.message[:200]}")
    return errors


def find(docs, kind, name="tandem"):
    return next(d for d in docs if d["kind"] == kind and d["metadata"]["name"] == name)


def pod(docs, component="serve"):
    return next(t["spec"] for _, t, _ in policy.pods(docs) if policy.component(t) == component)


class Overlays(unittest.TestCase):
    def test_schemas_are_schemas(self):
        for s in SCHEMAS.values():
            jsonschema.Draft7Validator.check_schema(s)

    def test_each_is_valid(self):
        self.assertGreaterEqual(len(OVERLAYS), 9)
        for o in OVERLAYS:
            with self.subTest(o):
                self.assertEqual(schema_errors(rendered(o)), [])

    def test_each_follows_the_policy(self):
        for o in OVERLAYS:
            with self.subTest(o):
                self.assertEqual(policy.check(rendered(o), monitored=o not in ON_ANY_CLUSTER), [])

    def test_those_for_any_cluster_need_no_custom_resource(self):
        for o in ON_ANY_CLUSTER:
            groups = {d["apiVersion"].rpartition("/")[0] for d in rendered(o)}
            self.assertLessEqual(groups, {"", "apps", "policy", "networking.k8s.io", "scheduling.k8s.io"})

    @unittest.skipUnless(shutil.which("kubectl"), "no kubectl on this machine")
    def test_kubectl_renders_the_same(self):
        def normal(docs):
            for _, t, _ in policy.pods(docs): # a merge may turn these round
                t["spec"]["volumes"].sort(key=lambda v: v["name"])
            return sorted(docs, key=lambda d: (d["kind"], d["metadata"]["name"]))
        for o in OVERLAYS:
            with self.subTest(o):
                out = subprocess.run(["kubectl", "kustomize", os.path.join(K8S, "overlays", o)], stdout=subprocess.PIPE,
                                     check=True, timeout=60).stdout
                self.assertEqual(normal(list(yaml.safe_load_all(out))), normal(rendered(o)))

    def test_groups_have_as_many_slots_as_ranks(self):
        for o in OVERLAYS:
            docs = rendered(o)
            ranks = [n for _, t, n in policy.pods(docs) if policy.component(t) == "ranks"]
            if not ranks:
                continue
            leader = pod(docs)
            env = policy.environment(leader["containers"][0], docs)
            text = " ".join(leader.get("initContainers", [{"args": []}])[0]["args"])
            with self.subTest(o):
                job = next((d for d in docs if d["kind"] == "MPIJob"), None)
                slots = job["spec"]["slotsPerWorker"] if job else int(re.search(r"--slots=(\d+)", text).group(1))
                pods_with_ranks = sum(ranks) + (1 if "nvidia.com/gpu" in leader["containers"][0]["resources"]["limits"] else 0)
                self.assertEqual(int(env["TANDEM_SERVE_TP"]), slots * pods_with_ranks)
                size = re.search(r"--size=(\d+)", text)
                if size:
                    self.assertEqual(int(size.group(1)), sum(ranks))

    def test_mpi_ports_are_those_of_the_policy(self):
        with open(os.path.join(K8S, "image/openmpi-mca-params.conf")) as f:
            conf = dict(re.findall(r"^(\w+) = (.*)$", f.read(), re.M))
        first, last = map(int, conf["oob_tcp_dynamic_ipv4_ports"].split("-"))
        low = int(conf["btl_tcp_port_min_v4"])
        docs = rendered("multi-node")
        ingress = find(docs, "NetworkPolicy", "tandem-group")["spec"]["ingress"][0]["ports"]
        self.assertEqual([(p["port"], p["endPort"]) for p in ingress],
                         [(50060, 50061), (first, last), (low, low + int(conf["btl_tcp_port_range_v4"]) - 1)])


class Programs(unittest.TestCase):
    """The real programs take what the manifests give them."""

    def run_program(self, *args, env=None):
        return subprocess.run([os.path.join(BIN, args[0]), *args[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=env, timeout=60, text=True)

    def test_options_of_serve(self):
        for o in OVERLAYS:
            docs = rendered(o)
            c = pod(docs)["containers"][0]
            with self.subTest(o):
                self.assertEqual(c["args"][0], "serve")
                p = self.run_program("tandem", "config", "--json", *c["args"], env=policy.environment(c, docs))
                self.assertEqual(p.returncode, 0, p.stderr)
                self.assertEqual(self.not_taken(policy.environment(c, docs), p.stdout), [])

    def test_ranks_are_as_many_as_a_worker_takes(self):
        p = self.run_program("tandem-worker", "--inspect", os.path.join(SOURCE, "tests/data/demo-model"))
        most = json.loads(p.stdout)["max_ranks"]
        for o in OVERLAYS:
            docs = rendered(o)
            ranks = int(policy.environment(pod(docs)["containers"][0], docs)["TANDEM_SERVE_TP"])
            with self.subTest(o):
                self.assertLessEqual(ranks, most)
        for ranks, code in ((most, 1), (most + 1, 2)):  # the first is taken: only the model is not there
            p = self.run_program("tandem", "serve", "--model", "/no/such/model", env={"TANDEM_CONFIG": "", "TANDEM_SERVE_TP": str(ranks)})
            self.assertEqual(p.returncode, code, p.stderr)
        self.assertIn(f"--tp {most + 1}: expected the number of ranks, 1 to {most}", p.stderr)

    def not_taken(self, env, settings):
        """Variables for options of `serve` that it does not have, or takes from elsewhere."""
        origins = {s["where"] for s in json.loads(settings)["serve"].values()}
        return [name for name in env if name.startswith("TANDEM_SERVE_") and name not in origins]

    def test_unknown_options_of_serve_are_found(self):
        p = self.run_program("tandem", "config", "serve", "--no-such-option=1", env={"TANDEM_CONFIG": ""})
        self.assertNotEqual(p.returncode, 0)
        env = {"TANDEM_CONFIG": "", "TANDEM_SERVE_NO_SUCH": "1", "TANDEM_SERVE_TP": "2"}
        p = self.run_program("tandem", "config", "--json", "serve", env=env)
        self.assertEqual(self.not_taken(env, p.stdout), ["TANDEM_SERVE_NO_SUCH"])

    def test_options_of_the_agent(self):
        text = self.run_program("tandem-agent", "--help").stdout
        for o in OVERLAYS:
            for _, t, _ in policy.pods(rendered(o)):
                for c in t["spec"]["containers"] + t["spec"].get("initContainers", []):
                    if c["command"] != ["/usr/bin/tandem-agent"]:
                        continue
                    self.assertIn(f"tandem-agent {c['args'][0]} ", text)
                    for a in c["args"][1:]:
                        self.assertIn(a.partition("=")[0] + " ", text)
                    for e in c.get("env", []):
                        self.assertIn(e["name"], text)

    def test_options_handed_to_the_coordinator(self):
        text = self.run_program("tandem-coordinator", "--help").stdout
        for o in OVERLAYS:
            for a in pod(rendered(o))["containers"][0]["args"]:
                m = re.match(r"--coordinator-arg=(--[a-z-]+)$", a)
                if m:
                    self.assertIn(m.group(1) + " ", text)


class Metrics(unittest.TestCase):
    """Dashboards, rules and scalers ask for what there is."""

    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.TemporaryDirectory()
        log = os.path.join(cls.dir.name, "log")
        with open(log, "w") as f:
            cls.process = subprocess.Popen(
                [os.path.join(BIN, "tandem-coordinator"), "--model", os.path.join(SOURCE, "tests/data/demo-model"), "--listen",
                 f"unix:{cls.dir.name}/public", "--control-listen", f"unix:{cls.dir.name}/control", "--http", "127.0.0.1:0"],
                stdout=f, stderr=f, stdin=subprocess.DEVNULL)
        try:
            for _ in range(600):
                with open(log) as f:
                    m = re.search(r"http[ =:/a-z]*127\.0\.0\.1:(\d+)", f.read())
                if m or cls.process.poll() is not None:
                    break
                time.sleep(0.05)
            with urllib.request.urlopen(f"http://127.0.0.1:{m.group(1)}/metrics", timeout=20) as r:
                cls.text = r.read().decode()
        finally:
            cls.process.terminate()
            cls.process.wait(30)
        cls.there = {re.sub(r"[{ ].*", "", line) for line in cls.text.splitlines() if line and line[0] != "#"}

    @classmethod
    def tearDownClass(cls):
        cls.dir.cleanup()

    def expressions(self, overlay):
        """(where, PromQL) of everything."""
        docs = rendered(overlay)
        for g in find(docs, "PrometheusRule")["spec"]["groups"]:
            for r in g["rules"]:
                yield r.get("alert") or r["record"], r["expr"]
        board = json.loads(find(docs, "ConfigMap", "tandem-dashboard")["data"]["tandem.json"])
        for p in board["panels"]:
            for t in p.get("targets", []):
                yield p["title"], t["expr"]
        for v in board["templating"]["list"]:
            if v["type"] == "query":
                yield v["name"], v["query"]["query"]
        for d in docs:
            if d["kind"] == "ScaledObject":
                for t in d["spec"]["triggers"]:
                    yield t["name"], t["metadata"]["query"]

    def unknown(self, expressions, recorded):
        wrong = []
        for where, e in expressions:
            plain = re.sub(r'"[^"]*"', '""', e)
            for name in re.findall(r"\btandem[_:][a-z0-9_:]+", plain):
                if name not in self.there | recorded:
                    wrong.append(f"{where}: {name}")
            for a, b in ("()", "{}", "[]"):
                if plain.count(a) != plain.count(b):
                    wrong.append(f"{where}: {a} and {b} do not match")
        return wrong

    def recorded(self, docs):
        return {r["record"] for g in find(docs, "PrometheusRule")["spec"]["groups"] for r in g["rules"] if "record" in r}

    def test_names_exist(self):
        for o in ("single-gpu", "autoscale"):
            expressions = list(self.expressions(o))
            self.assertGreater(len(expressions), 40)
            self.assertEqual(self.unknown(expressions, self.recorded(rendered(o))), [])

    def test_wrong_names_are_found(self):
        self.assertEqual(self.unknown([("x", "rate(tandem_no_such_total[5m])"), ("y", "sum(tandem_ready")], set()),
                         ["x: tandem_no_such_total", "y: ( and ) do not match"])

    def test_error_codes_of_alerts_exist(self):
        codes = set(re.findall(r'tandem_request_errors_total\{code="(\w+)"', self.text))
        for _, e in self.expressions("single-gpu"):
            for group in re.findall(r'code=~"([A-Z_|]+)"', e):
                self.assertLessEqual(set(group.split("|")), codes)

    def test_runbook_has_every_alert_and_no_other(self):
        with open(os.path.join(K8S, "README.md")) as f:
            rows = re.findall(r"^\| (Tandem[A-Za-z, ]*) \|", f.read(), re.M)
        alerts = [r["alert"] for g in find(rendered("single-gpu"), "PrometheusRule")["spec"]["groups"] for r in g["rules"]
                  if "alert" in r]
        self.assertEqual(sorted(", ".join(rows).split(", ")), sorted(alerts))

    def test_hpa_asks_for_the_recorded_backlog(self):
        docs = rendered("autoscale-hpa")
        name = find(docs, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
        self.assertIn(name.replace("tandem_", "tandem:", 1), self.recorded(docs))


PROMTOOL = os.environ.get("TANDEM_PROMTOOL", "promtool")


@unittest.skipUnless(shutil.which(PROMTOOL), "no promtool on this machine (package prometheus)")
class PromQL(unittest.TestCase):
    """Rules and queries as Prometheus itself reads them, and what the rules say of made-up series."""

    def promtool(self, docs, *command, queries=()):
        with tempfile.TemporaryDirectory() as dir:
            rules = find(docs, "PrometheusRule")["spec"]
            rules["groups"].append({"name": "queries", "rules": [
                {"record": f"query:{i}", "expr": re.sub(r"\$__rate_interval", "1m", q)} for i, (_, q) in enumerate(queries)]})
            with open(os.path.join(dir, "rules.yaml"), "w") as f:
                yaml.safe_dump(rules, f)
            shutil.copy(os.path.join(SOURCE, "tests/k8s/rules_test.yaml"), dir)
            return subprocess.run([shutil.which(PROMTOOL), *command], cwd=dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, timeout=120)

    def test_rules_and_queries_are_promql(self):
        docs = rendered("autoscale")
        queries = [q for q in Metrics.expressions(None, "autoscale") if not q[1].startswith("label_values(")]
        self.assertGreater(len(queries), 40)
        p = self.promtool(docs, "check", "rules", "rules.yaml", queries=queries)
        self.assertEqual(p.returncode, 0, p.stdout)
        p = self.promtool(docs, "check", "rules", "rules.yaml", queries=[("", "sum(rate(tandem_ready)")])
        self.assertNotEqual(p.returncode, 0, p.stdout)

    def test_what_rules_say(self):
        docs = rendered("single-gpu")
        p = self.promtool(docs, "test", "rules", "rules_test.yaml")
        self.assertEqual(p.returncode, 0, p.stdout)
        find(docs, "PrometheusRule")["spec"]["groups"][1]["rules"][0]["expr"] = "tandem_ready == 0"
        self.assertNotEqual(self.promtool(docs, "test", "rules", "rules_test.yaml").returncode, 0)


def container(docs):
    return pod(docs)["containers"][0]


def worker(docs):
    return pod(docs, "ranks")["containers"][0]


def volume(docs, name):
    return next(v for v in pod(docs)["volumes"] if v["name"] == name)


def clients(docs):
    return find(docs, "NetworkPolicy", "tandem-clients")["spec"]["ingress"][0]


def route(docs, kind):
    return find(docs, kind)["spec"]["rules"][0]


def open_to_the_world(docs):
    docs.append({"kind": "NetworkPolicy", "metadata": {"name": "more"}, "spec": {
        "podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 1}]}]}})


# (overlay, what is made wrong, part of the message)
SCHEMA_MUTANTS = [
    ("single-gpu", lambda d: find(d, "Deployment")["spec"].update(replicaz=2), "replicaz"),
    ("single-gpu", lambda d: find(d, "Deployment")["spec"].update(replicas="2"), "replicas"),
    ("single-gpu", lambda d: container(d)["ports"][0].update(containerPort="grpc"), "containerPort"),
    ("single-gpu", lambda d: container(d)["readinessProbe"]["grpc"].update(port="health"), "readinessProbe"),
    ("single-gpu", lambda d: container(d)["livenessProbe"].update(tcpSocket={"port": 1}), "livenessProbe"),
    ("single-gpu", lambda d: container(d).update(securityContext={"runAsNonroot": True}), "runAsNonroot"),
    ("single-gpu", lambda d: container(d)["resources"]["limits"].update(memory="64 GB"), "memory"),
    ("single-gpu", lambda d: container(d)["envFrom"][0].update(name="x"), "envFrom"),
    ("single-gpu", lambda d: pod(d)["volumes"][0].update(secret={"secretName": "x"}), "volumes"),
    ("single-gpu", lambda d: find(d, "PodDisruptionBudget")["spec"].update(unhealthyPodEvictionPolicy="Always"), "Always"),
    ("single-gpu", lambda d: find(d, "NetworkPolicy", "tandem-clients")["spec"]["ingress"][0].update(to=[]), "to"),
    ("single-gpu", lambda d: find(d, "PodMonitor")["spec"]["podMetricsEndpoints"][0].update(interval="15"), "interval"),
    ("single-gpu", lambda d: find(d, "PrometheusRule")["spec"]["groups"][0]["rules"][0].update(alert="Both"), "rules"),
    ("single-gpu", lambda d: find(d, "ConfigMap", "tandem-dashboard")["data"].update({"x": 1}), "data"),
    ("single-gpu", lambda d: find(d, "Service").update(apiVersion="v2"), "no schema"),
    ("multi-node", lambda d: find(d, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"].update(restartPolicy="Never"), "Never"),
    ("multi-node", lambda d: find(d, "LeaderWorkerSet")["spec"].update(size=2), "size"),
    ("statefulset", lambda d: find(d, "StatefulSet", "tandem-ranks")["spec"].pop("serviceName"), "serviceName"),
    ("mpijob", lambda d: find(d, "MPIJob")["spec"]["mpiReplicaSpecs"].update(launcher={}), "launcher"),
    ("mpijob", lambda d: find(d, "MPIJob")["spec"].update(cleanPodPolicy="All"), "cleanPodPolicy"),
    ("tls", lambda d: find(d, "Certificate")["spec"].update(duration="90d"), "duration"),
    ("autoscale", lambda d: find(d, "ScaledObject")["spec"]["triggers"][0]["metadata"].update(threshold=2), "threshold"),
    ("autoscale-hpa", lambda d: find(d, "HorizontalPodAutoscaler")["spec"]["metrics"][0].update(type="CPU"), "CPU"),
    ("gateway", lambda d: route(d, "GRPCRoute").update(timeouts={"request": "0s"}), "timeouts"),
    ("gateway", lambda d: route(d, "GRPCRoute")["backendRefs"][0].update(port="grpc"), "port"),
    ("gateway", lambda d: find(d, "HTTPRoute")["spec"].update(hostnames=["tandem_example"]), "hostnames"),
]
POLICY_MUTANTS = [
    ("single-gpu", lambda d: pod(d)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
    ("single-gpu", lambda d: pod(d)["securityContext"].pop("seccompProfile"), "seccompProfile"),
    ("single-gpu", lambda d: pod(d).pop("automountServiceAccountToken"), "automountServiceAccountToken"),
    ("single-gpu", lambda d: pod(d).update(hostIPC=True), "hostIPC"),
    ("single-gpu", lambda d: container(d)["securityContext"].update(readOnlyRootFilesystem=False), "readOnlyRootFilesystem"),
    ("single-gpu", lambda d: container(d)["securityContext"]["capabilities"].update(drop=["NET_RAW"]), "drop"),
    ("single-gpu", lambda d: container(d)["securityContext"]["capabilities"].update(add=["IPC_LOCK"]), "added"),
    ("single-gpu", lambda d: container(d).update(image="tandem-worker"), "image"),
    ("single-gpu", lambda d: container(d).update(image="r.example/tandem-worker:latest"), "latest"),
    ("single-gpu", lambda d: container(d).pop("startupProbe"), "startupProbe"),
    ("single-gpu", lambda d: container(d)["readinessProbe"]["grpc"].update(service="liveness"), "readiness"),
    ("single-gpu", lambda d: container(d)["livenessProbe"]["grpc"].update(port=50051), "livenessProbe"),
    ("single-gpu", lambda d: container(d)["resources"]["requests"].update(cpu="1"), "resources"),
    ("single-gpu", lambda d: container(d)["volumeMounts"].pop(1), "/dev/shm"),
    ("single-gpu", lambda d: container(d)["volumeMounts"][2].pop("readOnly"), "readOnly"),
    ("single-gpu", lambda d: pod(d).update(terminationGracePeriodSeconds=60), "terminationGracePeriodSeconds"),
    ("single-gpu", lambda d: container(d).pop("lifecycle"), "preStop"),
    ("single-gpu", lambda d: container(d)["args"].append("--control-listen=0.0.0.0:50060"), "listens"),
    ("single-gpu", lambda d: pod(d)["volumes"][0].update(emptyDir={}), "sizeLimit"),
    ("single-gpu", lambda d: pod(d)["volumes"].append({"name": "x", "emptyDir": {"sizeLimit": "1Gi"}}), "nobody mounts"),
    ("single-gpu", lambda d: container(d)["envFrom"][0]["configMapRef"].update(name="x"), "ConfigMap x"),
    ("single-gpu", lambda d: pod(d).update(priorityClassName="x"), "PriorityClass x"),
    ("single-gpu", lambda d: d.remove(find(d, "NetworkPolicy", "tandem-deny")), "denies all"),
    ("single-gpu", lambda d: d.remove(find(d, "NetworkPolicy", "tandem-clients")), "port grpc"),
    ("single-gpu", lambda d: d.remove(find(d, "PodDisruptionBudget")), "PodDisruptionBudget"),
    ("single-gpu", lambda d: d.remove(find(d, "PodMonitor")), "PodMonitor"),
    ("single-gpu", lambda d: find(d, "Service")["spec"]["selector"].update(x="y"), "selects no pod"),
    ("single-gpu", lambda d: find(d, "Service")["spec"]["ports"][0].update(targetPort="x"), "no port x"),
    ("single-gpu", lambda d: find(d, "Deployment")["spec"]["selector"]["matchLabels"].update(x="y"), "its selector"),
    ("multi-node", lambda d: [d.remove(find(d, "NetworkPolicy", n)) for n in ("tandem-group", "tandem-nccl")], "port agent"),
    ("multi-node", lambda d: find(d, "NetworkPolicy", "tandem-clients")["spec"]["ingress"][0]["ports"].append(
        {"protocol": "TCP", "port": 50060}), "open to clients"),
    ("multi-node", lambda d: worker(d).update(readinessProbe={"exec": {"command": ["/bin/sh"]}}), "no shell"),
    ("multi-node", lambda d: container(d)["env"].pop(0), "$(POD_IP)"),
    ("multi-node", lambda d: next(v for v in pod(d)["volumes"] if "secret" in v)["secret"].pop("defaultMode"), "0440"),
    ("multi-node", lambda d: find(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].pop(
        "app.kubernetes.io/component"), "no others"),
    ("single-gpu", lambda d: clients(d)["from"][0].update(namespaceSelector={}), "is anyone"),
    ("single-gpu", lambda d: clients(d)["from"].append({"podSelector": {}}), "is anyone"),
    ("single-gpu", lambda d: clients(d).pop("from"), "open to all"),
    ("single-gpu", lambda d: clients(d).pop("ports"), "open to all"),
    ("single-gpu", open_to_the_world, "NetworkPolicy more: egress"),
    ("single-gpu", lambda d: container(d)["securityContext"].update(seccompProfile={"type": "Unconfined"}), "that of the pod"),
    ("single-gpu", lambda d: pod(d)["securityContext"].update(runAsGroup=0), "runAsNonRoot"),
    ("single-gpu", lambda d: pod(d)["securityContext"].pop("runAsUser"), "or none of them"),
    ("single-gpu", lambda d: pod(d)["containers"].append({"name": "s", "image": "x:1"}), "expected one"),
    ("single-gpu", lambda d: container(d).update(image="r/x@sha256:"), "image"),
    ("single-gpu", lambda d: container(d).update(image="r/x:latest@sha256:" + "0" * 64), "latest"),
    ("single-gpu", lambda d: container(d).update(env=[{"name": "X", "valueFrom": {"secretKeyRef": {}}}]), "secrets are files"),
    ("single-gpu", lambda d: container(d)["livenessProbe"].update(failureThreshold=1), "livenessProbe"),
    ("single-gpu", lambda d: container(d)["readinessProbe"].update(failureThreshold=9), "readinessProbe"),
    ("single-gpu", lambda d: find(d, "PodDisruptionBudget")["spec"].update(maxUnavailable=0), "be emptied"),
    ("single-gpu", lambda d: volume(d, "shm")["emptyDir"].update(sizeLimit="64Mi"), "volume shm"),
    ("single-gpu", lambda d: volume(d, "shm")["emptyDir"].pop("medium"), "volume shm"),
    ("single-gpu", lambda d: volume(d, "model")["persistentVolumeClaim"].pop("readOnly"), "volume model"),
    ("single-gpu", lambda d: pod(d).update(tolerations=[{"operator": "Exists"}]), "expected a key"),
    ("single-gpu", lambda d: pod(d).pop("topologySpreadConstraints"), "topologySpreadConstraints"),
    ("single-gpu", lambda d: find(d, "PriorityClass", "tandem-serving").update(globalDefault=True), "globalDefault"),
    ("single-gpu", lambda d: next(x["data"] for x in d if "TANDEM_SERVE_TP" in x.get("data", {})).update(
        TANDEM_SERVE_DRAIN_TIMEOUT="0"), "come to their end"),
    ("single-node-tp", lambda d: container(d)["resources"]["limits"].update({"nvidia.com/gpu": "4"}), "4 GPUs for 8 ranks"),
    ("single-node-groups", lambda d: container(d)["resources"]["limits"].update({"nvidia.com/gpu": "2"}), "2 GPUs for 8"),
    ("host-only", lambda d: find(d, "Deployment")["spec"].update(strategy={"type": "Recreate"}), "takes all replicas"),
    ("multi-node", lambda d: pod(d, "ranks").update(terminationGracePeriodSeconds=30), "560 of drain"),
    ("multi-node", lambda d: worker(d)["args"].pop(), "outlive"),
    ("statefulset", lambda d: find(d, "Service", "tandem-ranks")["spec"].pop("publishNotReadyAddresses"), "publishNotReady"),
    ("statefulset", lambda d: find(d, "StatefulSet", "tandem-ranks")["spec"].pop("podManagementPolicy"), "Parallel"),
    ("mpijob", lambda d: find(d, "PodDisruptionBudget")["spec"].update(maxUnavailable=1), "'minAvailable': 0"),
    ("tls", lambda d: find(d, "PodMonitor")["spec"]["podMetricsEndpoints"][0].update(
        tlsConfig={"insecureSkipVerify": True}), "insecureSkipVerify"),
    ("autoscale", lambda d: find(d, "Deployment")["spec"].update(replicas=1), "sets replicas"),
    ("autoscale", lambda d: find(d, "ScaledObject")["spec"]["scaleTargetRef"].update(name="x"), "target"),
    ("gateway", lambda d: route(d, "GRPCRoute")["matches"][0]["method"].update(service="tandem.v1.Control"), "control the server"),
    ("gateway", lambda d: route(d, "GRPCRoute").pop("matches"), "control the server"),
    ("gateway", lambda d: route(d, "GRPCRoute")["backendRefs"][0].update(name="x"), "port 50051"),
    ("gateway", lambda d: route(d, "HTTPRoute")["backendRefs"][0].update(port=50051), "port 8000"),
    ("gateway", lambda d: route(d, "HTTPRoute")["matches"][0]["path"].update(value="/"), "not for clients"),
    ("gateway", lambda d: route(d, "HTTPRoute").pop("timeouts"), "may take long"),
    ("gateway", lambda d: find(d, "HTTPRoute")["spec"].update(hostnames=["grpc.tandem.example"]), "may not share"),
    ("gateway", lambda d: find(d, "Service")["spec"]["ports"][0].pop("appProtocol"), "appProtocol"),
]


class ChecksCanFail(unittest.TestCase):
    def mutants(self, table, check):
        for overlay, change, text in table:
            docs = rendered(overlay)
            change(docs)
            with self.subTest(overlay=overlay, text=text):
                self.assertTrue([e for e in check(docs) if text in e], check(docs)[:5])

    def test_schema(self):
        self.mutants(SCHEMA_MUTANTS, schema_errors)

    def test_policy(self):
        self.mutants(POLICY_MUTANTS, policy.check)

    def test_renderer(self):
        def fails(text, kustomization, **files):
            with tempfile.TemporaryDirectory() as dir:
                for name, body in {"kustomization.yaml": kustomization, **files}.items():
                    with open(os.path.join(dir, name.replace("_yaml", ".yaml")), "w") as f:
                        f.write(body)
                with self.assertRaisesRegex(render.RenderError, text):
                    render.render(dir)
        sa = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n"
        patch = "patches:\n- target: {kind: ServiceAccount, name: %s}\n  patch: '[{op: %s, path: /metadata/%s, value: x}]'\n"
        fails("not used here", "namePrefix: x\n")
        fails("stands twice", "resources: [a.yaml, b.yaml]\n", a_yaml=sa, b_yaml=sa)
        fails("key name stands twice", "resources: [a.yaml]\n", a_yaml=sa.replace("{name: a}", "{name: a, name: b}"))
        fails("no such resource", "resources: [a.yaml]\n" + patch % ("b", "replace", "name"), a_yaml=sa)
        fails("nothing to replace", "resources: [a.yaml]\n" + patch % ("a", "replace", "namespace"), a_yaml=sa)
        fails("is not there", "resources: [a.yaml]\n" + patch % ("a", "add", "labels/x"), a_yaml=sa)
        fails("nothing to merge", "configMapGenerator:\n- {name: x, behavior: merge, literals: [a=b]}\n")


if __name__ == "__main__":
    unittest.main()
