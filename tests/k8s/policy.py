"""What this project demands of its own manifests, beyond what an API server takes. check(docs) lists what is wrong."""
import re

SERVE, RANKS = "serve", "ranks"
SECRET_MODE = 0o440
HEALTH_PORT = 50052


def templates(doc):
    """(name, pod template, number of pods) of a workload."""
    kind, spec, name = doc["kind"], doc.get("spec", {}), doc["metadata"]["name"]
    if kind in ("Deployment", "StatefulSet"):
        return [(name, spec["template"], spec.get("replicas", 1))]
    if kind == "LeaderWorkerSet":
        t = spec["leaderWorkerTemplate"]
        return [(name + " leader", t["leaderTemplate"], 1), (name + " worker", t["workerTemplate"], t["size"] - 1)]
    if kind == "MPIJob":
        return [(f"{name} {role}", r["template"], r.get("replicas", 1)) for role, r in spec["mpiReplicaSpecs"].items()]
    return []


def pods(docs):
    return [(where, t, n) for d in docs for where, t, n in templates(d)]


def labels(template):
    return template["metadata"].get("labels", {})


def component(template):
    return labels(template).get("app.kubernetes.io/component")


def selects(selector, of):
    return all(of.get(k) == v for k, v in selector.items())


def environment(container, docs, fields=None):
    """The environment of a container: ConfigMaps first, then its own entries; fieldRefs are taken from fields."""
    env = {}
    for source in container.get("envFrom", []):
        name = source["configMapRef"]["name"]
        for d in docs:
            if d["kind"] == "ConfigMap" and d["metadata"]["name"] == name:
                env.update(d["data"])
    for e in container.get("env", []):
        if "value" in e:
            env[e["name"]] = e["value"]
        elif "fieldRef" in e.get("valueFrom", {}):
            env[e["name"]] = (fields or {}).get(e["valueFrom"]["fieldRef"]["fieldPath"], "")
    return env


def quantity(q):
    """In bytes, or whatever one is."""
    m = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", q)
    scale = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(m.group(1)) * scale[m.group(2)]


# ---- of a pod ----

def _container(c, spec, init):
    s = c.get("securityContext", {})
    if s.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation: expected false"
    if s.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem: expected true"
    if s.get("privileged") or "ALL" not in s.get("capabilities", {}).get("drop", []):
        yield "capabilities: expected drop: [ALL], and not privileged"
    if s.get("capabilities", {}).get("add"):
        yield "capabilities: nothing may be added: a process that is not root would not have it"
    if s.get("runAsUser") == 0 or s.get("runAsGroup") == 0 or s.get("runAsNonRoot") is False:
        yield "runs as root"
    if s.get("seccompProfile", {"type": "RuntimeDefault"})["type"] != "RuntimeDefault":
        yield "seccompProfile: expected that of the pod"
    for e in c.get("env", []):
        if "secretKeyRef" in e.get("valueFrom", {}):
            yield f"env {e['name']}: secrets are files: an environment is seen by others"
    name, at, digest = c["image"].rsplit("/", 1)[-1].partition("@")
    tag = name.partition(":")[2]
    if tag == "latest" or not (re.fullmatch(r"sha256:[0-9a-f]{64}", digest) if at else tag):
        yield f"image {c['image']}: expected a tag or digest, and not latest"
    if not c.get("command", [""])[0].startswith("/"):
        yield "command: expected a full path: no shell and no PATH of the image counts"
    r = c.get("resources", {})
    if r.get("requests") != r.get("limits") or not {"cpu", "memory", "ephemeral-storage"} <= set(r.get("limits", {})):
        yield "resources: expected requests and limits, equal, of cpu, memory and ephemeral-storage"
    mounts, volumes = {m["name"] for m in c.get("volumeMounts", [])}, {v["name"] for v in spec.get("volumes", [])}
    for m in mounts - volumes:
        yield f"mounts {m}, which is no volume of the pod"
    for m in c.get("volumeMounts", []):
        v = next((v for v in spec.get("volumes", []) if v["name"] == m["name"]), {})
        if "emptyDir" not in v and not m.get("readOnly"):
            yield f"mount {m['mountPath']}: expected readOnly"
    if not init:
        yield from _lifecycle(c)


def _lifecycle(c):
    ports = {p["containerPort"] for p in c.get("ports", [])} | {p["name"] for p in c.get("ports", [])}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        p = c.get(kind)
        if not p:
            yield f"{kind}: missing"
            continue
        if "exec" in p and p["exec"]["command"][0].endswith("sh"):
            yield f"{kind}: there is no shell"
        if kind == "livenessProbe" and (p.get("failureThreshold", 3) < 3
                                        or p.get("periodSeconds", 10) * p.get("failureThreshold", 3) > 60):
            yield f"{kind}: expected three failures or more, and at most 60 s until a pod that hangs is killed"
        if kind == "readinessProbe" and p.get("periodSeconds", 10) * p.get("failureThreshold", 3) > 15:
            yield f"{kind}: expected at most 15 s until nobody is sent there"
        port = (p.get("grpc") or p.get("tcpSocket") or p.get("httpGet") or {}).get("port")
        if port is not None and port not in ports:
            yield f"{kind}: port {port} is not one of the container's"
    paths = {m["mountPath"] for m in c.get("volumeMounts", [])}
    for need in ("/tmp", "/dev/shm"):
        if need not in paths:
            yield f"{need}: expected a mount: the root is read-only, and the runtime's /dev/shm is 64 MiB"


def _serving(c, spec, docs):
    """What holds of a container that takes requests."""
    if c.get("command") != ["/usr/bin/tandem"]:
        yield "command: expected /usr/bin/tandem"
    for kind, service in (("startupProbe", "startup"), ("livenessProbe", "liveness"), ("readinessProbe", "readiness")):
        if c.get(kind, {}).get("grpc") != {"port": HEALTH_PORT, "service": service}:
            yield f"{kind}: expected grpc on {HEALTH_PORT}, service {service}"
    p = c.get("startupProbe", {})
    if p.get("failureThreshold", 3) * p.get("periodSeconds", 10) < 600:
        yield "startupProbe: a model may take 10 minutes to load"
    drain = float(environment(c, docs).get("TANDEM_SERVE_DRAIN_TIMEOUT", 30))
    sleep = c.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if drain < 60:
        yield "TANDEM_SERVE_DRAIN_TIMEOUT: expected 60 s or more, so that answers come to their end"
    if sleep < 10:
        yield "preStop: expected a sleep of 10 s or more, until the endpoints are known to have changed"
    if spec.get("terminationGracePeriodSeconds", 30) < sleep + drain + 10:
        yield f"terminationGracePeriodSeconds: expected {sleep} of preStop + {drain:.0f} of drain + 10 or more"
    env, gpus = environment(c, docs), int(c.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
    ranks = int(env.get("TANDEM_SERVE_TP", 1)) * int(env.get("TANDEM_SERVE_GROUPS", 1))
    alone = all(component(t) == SERVE for _, t, _ in pods(docs))
    if alone and gpus != (0 if env.get("TANDEM_SERVE_BACKEND") == "host" else ranks):
        yield f"resources: {gpus} GPUs for {ranks} ranks"
    listens = {int(m.group(1)) for a in c.get("args", []) for m in [re.match(r"--(?:[a-z]+-)?(?:listen|http)=.*:(\d+)(?:,[a-z,]+)?$", a)] if m}
    if listens != {p["containerPort"] for p in c.get("ports", [])}:
        yield f"ports: it listens on {sorted(listens)}"


def _ranks(c, spec, serve_spec):
    """What holds of an agent's container, given the spec of the pods that serve."""
    m = re.search(r"--drain-timeout=(\d+)", " ".join(c.get("args", [])))
    drain = int(m.group(1)) if m else 0
    if spec.get("terminationGracePeriodSeconds", 30) < drain + 10:
        yield f"terminationGracePeriodSeconds: expected {drain} of drain + 10 or more"
    if drain < serve_spec.get("terminationGracePeriodSeconds", 30) - 60:
        yield "--drain-timeout: ranks have to outlive the streams of the pod that serves"


def _pod(template, docs):
    spec = template["spec"]
    s = spec.get("securityContext", {})
    if s.get("runAsNonRoot") is not True or s.get("runAsUser") == 0 or s.get("runAsGroup") == 0:
        yield "securityContext: expected runAsNonRoot"
    if len({"runAsUser", "runAsGroup", "fsGroup"} & set(s)) not in (0, 3):
        yield "securityContext: expected runAsUser, runAsGroup and fsGroup, or none of them where the platform chooses"
    for t in spec.get("tolerations", []):
        if "key" not in t:
            yield "tolerations: expected a key: not every node that is kept free is for this"
    if s.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile: expected RuntimeDefault"
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken: expected false"
    if spec.get("enableServiceLinks") is not False:
        yield "enableServiceLinks: expected false: they fill the environment"
    for field in ("hostNetwork", "hostIPC", "hostPID"):
        if spec.get(field):
            yield f"{field}: not here"
    if not spec.get("priorityClassName"):
        yield "priorityClassName: missing"
    used = {m["name"] for c in spec["containers"] + spec.get("initContainers", []) for m in c.get("volumeMounts", [])}
    for v in spec.get("volumes", []):
        if v["name"] not in used:
            yield f"volume {v['name']}: nobody mounts it"
        if "hostPath" in v:
            yield f"volume {v['name']}: hostPath ties the pod to a node"
        if "emptyDir" in v and "sizeLimit" not in v["emptyDir"]:
            yield f"volume {v['name']}: expected a sizeLimit"
        if v["name"] == "shm" and (v.get("emptyDir", {}).get("medium") != "Memory"
                                   or quantity(v["emptyDir"]["sizeLimit"]) < 2**28):
            yield "volume shm: expected 256Mi of memory or more"
        if "persistentVolumeClaim" in v and not v["persistentVolumeClaim"].get("readOnly"):
            yield f"volume {v['name']}: expected readOnly"
        if "secret" in v and v["secret"].get("defaultMode") != SECRET_MODE:
            yield f"volume {v['name']}: expected defaultMode 0440"
    shm = sum(quantity(v["emptyDir"]["sizeLimit"]) for v in spec.get("volumes", [])
              if v.get("emptyDir", {}).get("medium") == "Memory")
    if len(spec["containers"]) != 1:
        yield "containers: expected one: no other is tested"
    if component(template) == SERVE and not spec.get("topologySpreadConstraints") and _replicated(docs, template):
        yield "topologySpreadConstraints: missing"
    serving = next((t["spec"] for _, t, _ in pods(docs) if component(t) == SERVE), {})
    for init in (False, True):
        for c in spec.get("initContainers" if init else "containers", []):
            for problem in _container(c, spec, init):
                yield f"{c['name']}: {problem}"
            if not init and shm > quantity(c.get("resources", {}).get("limits", {}).get("memory", "0")) / 2:
                yield f"{c['name']}: volumes in memory take over half of its memory"
            if not init and component(template) == SERVE:
                for problem in _serving(c, spec, docs):
                    yield f"{c['name']}: {problem}"
            if not init and component(template) == RANKS:
                for problem in _ranks(c, spec, serving):
                    yield f"{c['name']}: {problem}"


def _replicated(docs, template):
    """Whether there may be several of these pods: a Job has one, and so has what is replaced by Recreate."""
    return any(template is t and d["kind"] != "MPIJob" for d in docs for _, t, _ in templates(d))


# ---- between documents ----

def allowed_ports(docs, template, sources):
    """Ports of a pod that the network policies open to `sources`: "clients" (anyone but pods of tandem) or "group"."""
    ports = []
    for d in docs:
        if d["kind"] != "NetworkPolicy" or not selects(d["spec"]["podSelector"].get("matchLabels", {}), labels(template)):
            continue
        for rule in d["spec"].get("ingress", []):
            group = any("app.kubernetes.io/name" in p.get("podSelector", {}).get("matchLabels", {}) for p in rule.get("from", []))
            if group == (sources == "group"):
                ports += [(p["port"], p.get("endPort", p["port"])) for p in rule.get("ports", [{"port": 1, "endPort": 65535}])]
    return ports


def _rules(policy):
    """What a policy opens is opened to somebody by labels, and on ports by number."""
    for side, peers in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(side, []):
            if not rule.get(peers) or not rule.get("ports"):
                yield f"{side}: expected {peers} and ports: without them it is open to all"
            for p in rule.get(peers, []):
                if "ipBlock" in p or not all(s.get("matchLabels") for s in p.values()):
                    yield f"{side}: expected labels: {p} is anyone"


def _network(docs):
    policies = [d for d in docs if d["kind"] == "NetworkPolicy"]
    for d in policies:
        for problem in _rules(d):
            yield f"NetworkPolicy {d['metadata']['name']}: {problem}"
    for where, t, _ in pods(docs):
        denies = [d for d in policies if selects(d["spec"]["podSelector"].get("matchLabels", {}), labels(t))
                  and sorted(d["spec"]["policyTypes"]) == ["Egress", "Ingress"]
                  and not d["spec"].get("ingress") and not d["spec"].get("egress")]
        if not denies:
            yield f"{where}: no policy that denies all by default"
        for c in t["spec"]["containers"]:
            for p in c.get("ports", []):
                opens = [s for s in ("clients", "group")
                         if any(a <= p["containerPort"] <= b for a, b in allowed_ports(docs, t, s))]
                want = {"grpc": "clients", "http": "clients", "control": "group", "agent": "group"}.get(p["name"])
                if want and want not in opens:
                    yield f"{where}: port {p['name']}: no policy lets {want} in"
                if want != "clients" and "clients" in opens:
                    yield f"{where}: port {p['name']}: open to clients"


def _routes(docs):
    """What a gateway hands on: to ports of our services, and only what is for clients."""
    services = {d["metadata"]["name"]: {p["port"]: p for p in d["spec"]["ports"]} for d in docs if d["kind"] == "Service"}
    for d in docs:
        if d["kind"] not in ("GRPCRoute", "HTTPRoute"):
            continue
        name = f"{d['kind']} {d['metadata']['name']}"
        port, app = (50051, "kubernetes.io/h2c") if d["kind"] == "GRPCRoute" else (8000, "http")
        if not d["spec"].get("hostnames"):
            yield f"{name}: hostnames: expected one: it would take those of others"
        for rule in d["spec"].get("rules", [{}]):
            for b in rule.get("backendRefs", [{}]):
                to = services.get(b.get("name"), {}).get(b.get("port"))
                if not to or b["port"] != port or to.get("appProtocol") != app:
                    yield f"{name}: backendRefs: expected port {port} of a service of ours, with appProtocol {app}"
            for m in rule.get("matches", [{}]):
                method, path = m.get("method", {}), m.get("path", {})
                if d["kind"] == "GRPCRoute" and (method.get("service") not in ("tandem.v1.Inference", "grpc.health.v1.Health")
                                                 or method.get("type", "Exact") != "Exact"):
                    yield f"{name}: matches: expected services for clients by name: others control the server"
                if d["kind"] == "HTTPRoute" and (path.get("type") != "PathPrefix" or path.get("value") != "/v1"):
                    yield f"{name}: matches: expected the prefix /v1: metrics are not for clients"
            if d["kind"] == "HTTPRoute" and rule.get("timeouts", {}).get("request") != "0s":
                yield f"{name}: timeouts: expected request: 0s: a stream may take long"
    hosts = [h for d in docs if d["kind"] in ("GRPCRoute", "HTTPRoute") for h in d["spec"].get("hostnames", [])]
    if len(hosts) != len(set(hosts)):
        yield "routes: hostnames: gRPC and HTTP may not share one"


def _references(docs):
    names = {(d["kind"], d["metadata"]["name"]) for d in docs}
    for where, t, _ in pods(docs):
        spec = t["spec"]
        for kind, name in [("ServiceAccount", spec.get("serviceAccountName")), ("PriorityClass", spec.get("priorityClassName"))]:
            if (kind, name) not in names:
                yield f"{where}: {kind} {name} is not here"
        for c in spec["containers"] + spec.get("initContainers", []):
            for e in c.get("envFrom", []):
                if ("ConfigMap", e["configMapRef"]["name"]) not in names:
                    yield f"{where}: ConfigMap {e['configMapRef']['name']} is not here"
            declared = {e["name"] for e in c.get("env", [])}
            for a in c.get("args", []):
                for v in re.findall(r"\$\((\w+)\)", a):
                    if v not in declared:
                        yield f"{where}: {a}: $({v}) is no variable of its env"
    for d in docs:
        name = f"{d['kind']} {d['metadata']['name']}"
        if d["kind"] in ("Deployment", "StatefulSet"):
            if not selects(d["spec"]["selector"]["matchLabels"], labels(d["spec"]["template"])):
                yield f"{name}: its selector does not match its pods"
        if d["kind"] == "Service":
            hit = [t for _, t, _ in pods(docs) if selects(d["spec"]["selector"], labels(t))]
            if not hit:
                yield f"{name}: selects no pod"
            for p in d["spec"]["ports"]:
                for t in hit:
                    if p["targetPort"] not in [q["name"] for c in t["spec"]["containers"] for q in c.get("ports", [])]:
                        yield f"{name}: no port {p['targetPort']} in its pods"
        if d["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            hit = [component(t) for _, t, _ in pods(docs) if selects(d["spec"]["selector"]["matchLabels"], labels(t))]
            if hit != [SERVE]:
                yield f"{name}: expected to select the pods that serve, and no others"
        if d["kind"] == "PodMonitor":
            for e in d["spec"]["podMetricsEndpoints"]:
                if e["port"] != "http":
                    yield f"{name}: metrics are on the port http"
                if e.get("tlsConfig", {}).get("insecureSkipVerify"):
                    yield f"{name}: insecureSkipVerify: not here"
        if d["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = d["spec"]["scaleTargetRef"]
            found = [x for x in docs if (x["kind"], x["metadata"]["name"]) == (target["kind"], target["name"])]
            if not found:
                yield f"{name}: its target is not here"
            elif "replicas" in found[0]["spec"]:
                yield f"{name}: its target sets replicas, too"


def _controllers(docs):
    """What the controllers of these kinds would make of them."""
    serve_in_job = any(component(t) == SERVE for d in docs if d["kind"] == "MPIJob" for _, t, _ in templates(d))
    sets = [d["spec"]["serviceName"] for d in docs if d["kind"] == "StatefulSet"]
    for d in docs:
        name, spec = f"{d['kind']} {d['metadata']['name']}", d.get("spec", {})
        if d["kind"] == "PodDisruptionBudget":
            # How many there should be, a budget's controller knows of what has replicas; of a Job it does not.
            want = {"minAvailable": 0} if serve_in_job else {"maxUnavailable": 1}
            if {k: v for k, v in spec.items() if k in ("minAvailable", "maxUnavailable")} != want:
                yield f"{name}: expected {want}, so that nodes can be emptied"
        if d["kind"] == "Deployment" and spec.get("replicas", 2) > 1 and spec.get("strategy", {}).get("type") == "Recreate":
            yield f"{name}: Recreate takes all replicas away at once"
        if d["kind"] == "PriorityClass" and d.get("globalDefault"):
            yield f"{name}: globalDefault: not for all pods of the cluster"
        if d["kind"] == "StatefulSet" and spec.get("podManagementPolicy") != "Parallel":
            yield f"{name}: podManagementPolicy: expected Parallel: each pod waits for the others"
        if d["kind"] == "Service" and d["metadata"]["name"] in sets and not spec.get("publishNotReadyAddresses"):
            yield f"{name}: publishNotReadyAddresses: expected true: pods of a set look for each other before they are ready"


def check(docs, monitored=True):
    problems = []
    for where, t, _ in pods(docs):
        problems += [f"{where}: {p}" for p in _pod(t, docs)]
    if sorted({component(t) for _, t, _ in pods(docs)}) not in ([SERVE], [RANKS, SERVE]):
        problems.append("pods: expected the components serve and ranks")
    problems += list(_network(docs)) + list(_routes(docs)) + list(_references(docs)) + list(_controllers(docs))
    for kind in ("PodDisruptionBudget", "NetworkPolicy", "Service") + (("PodMonitor", "PrometheusRule") if monitored else ()):
        if kind not in [d["kind"] for d in docs]:
            problems.append(f"{kind}: missing")
    return problems
