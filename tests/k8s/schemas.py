"""What the API servers take of the kinds that k8s/ uses, as JSON schemas: a field that is not listed is an error, as with
`kubectl --validate=strict`. Of each kind the parts that the manifests use and their near neighbours, written from the API's
documentation (Kubernetes 1.30 to 1.34 and the custom resources at the versions named). SCHEMAS: (apiVersion, kind) -> schema.
"""


def obj(required="", **properties):
    """An object of these fields and no others; required: names, blank between them."""
    return {"type": "object", "properties": {k.rstrip("_"): v for k, v in properties.items()},
            "required": required.split(), "additionalProperties": False}


def arr(items, least=0, most=1000):
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def enum(*values):
    return {"enum": list(values)}


def mapping(values, keys=r"^[A-Za-z0-9._/-]+$"):
    return {"type": "object", "additionalProperties": values, "propertyNames": {"pattern": keys}}


def number(least, most=2**31 - 1):
    return {"type": "integer", "minimum": least, "maximum": most}


def text(pattern=None, most=100000):
    return {"type": "string", "maxLength": most, **({"pattern": pattern} if pattern else {})}


STR, BOOL = text(), {"type": "boolean"}
NAME = text(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", 253)
LABEL = text(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", 63)
PORT_NAME = text(r"^(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?$", 15)
PORT = number(1, 65535)
PORT_REF = {"anyOf": [PORT, PORT_NAME]}
COUNT_OR_PERCENT = {"anyOf": [number(0), text(r"^[0-9]{1,3}%$")]}
PATH = text(r"^/[^:]*$")
# A quantity is written as text here throughout, so that no YAML parser makes another number of it.
QUANTITY = text(r"^([0-9]+(\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")
PROMETHEUS_TIME = text(r"^([0-9]+(ms|s|m|h|d|w|y))+$")
GO_TIME = text(r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$")
LABELS = mapping(text(r"^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$", 63))
META = obj("name", name=NAME, namespace=LABEL, labels=LABELS, annotations=mapping(STR))
POD_META = obj(labels=LABELS, annotations=mapping(STR))
SELECTOR = obj(matchLabels=LABELS, matchExpressions=arr(obj(
    "key operator", key=STR, operator=enum("In", "NotIn", "Exists", "DoesNotExist"), values=arr(STR))))

# ---- pods ----

CAPABILITIES = obj(add=arr(STR), drop=arr(STR))
SECCOMP = obj("type", type=enum("RuntimeDefault", "Localhost", "Unconfined"), localhostProfile=STR)
CONTAINER_SECURITY = obj(allowPrivilegeEscalation=BOOL, readOnlyRootFilesystem=BOOL, privileged=BOOL, runAsNonRoot=BOOL,
                         runAsUser=number(0), runAsGroup=number(0), capabilities=CAPABILITIES, seccompProfile=SECCOMP)
POD_SECURITY = obj(runAsNonRoot=BOOL, runAsUser=number(0), runAsGroup=number(0), fsGroup=number(0),
                   fsGroupChangePolicy=enum("OnRootMismatch", "Always"), seccompProfile=SECCOMP,
                   supplementalGroups=arr(number(0)))
ENV = obj("name", name=text(r"^[A-Za-z_][A-Za-z0-9_]*$"), value=STR, valueFrom={
    "type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False, "properties": {
        "fieldRef": obj("fieldPath", apiVersion=STR, fieldPath=text(
            r"^(metadata\.(name|namespace|uid|labels\['.+'\]|annotations\['.+'\])|status\.(podIP|podIPs|hostIP)|spec\.nodeName)$")),
        "configMapKeyRef": obj("name key", name=NAME, key=STR, optional=BOOL),
        "secretKeyRef": obj("name key", name=NAME, key=STR, optional=BOOL)}})
ENV_FROM = obj(prefix=STR, configMapRef=obj("name", name=NAME, optional=BOOL), secretRef=obj("name", name=NAME, optional=BOOL))


def one_of(fields, **others):
    """An object with exactly one of the fields, and any of the others."""
    return {"type": "object", "additionalProperties": False, "properties": {**fields, **others},
            "oneOf": [{"required": [f]} for f in fields]}


PROBE = one_of({"grpc": obj("port", port=PORT, service=STR), "exec": obj("command", command=arr(STR, 1)),
                "tcpSocket": obj("port", port=PORT_REF, host=STR),
                "httpGet": obj("port", port=PORT_REF, path=PATH, scheme=enum("HTTP", "HTTPS"))},
               periodSeconds=number(1), timeoutSeconds=number(1), failureThreshold=number(1), successThreshold=number(1, 1),
               initialDelaySeconds=number(0), terminationGracePeriodSeconds=number(1))
HANDLER = one_of({"sleep": obj("seconds", seconds=number(1)), "exec": obj("command", command=arr(STR, 1))})
RESOURCES = obj(requests=mapping(QUANTITY), limits=mapping(QUANTITY))
MOUNT = obj("name mountPath", name=LABEL, mountPath=PATH, readOnly=BOOL, subPath=STR)
CONTAINER_PORT = obj("containerPort", name=PORT_NAME, containerPort=PORT, protocol=enum("TCP", "UDP"))
CONTAINER = obj("name image", name=LABEL, image=STR, imagePullPolicy=enum("Always", "IfNotPresent", "Never"),
                command=arr(STR), args=arr(STR), workingDir=PATH, env=arr(ENV), envFrom=arr(ENV_FROM),
                ports=arr(CONTAINER_PORT), startupProbe=PROBE, livenessProbe=PROBE, readinessProbe=PROBE,
                lifecycle=obj(preStop=HANDLER, postStart=HANDLER), resources=RESOURCES, securityContext=CONTAINER_SECURITY,
                volumeMounts=arr(MOUNT), terminationMessagePath=PATH)
INIT_CONTAINER = {**CONTAINER, "properties": {**CONTAINER["properties"], "restartPolicy": enum("Always")}}
VOLUME = one_of({"emptyDir": obj(medium=enum("", "Memory"), sizeLimit=QUANTITY),
                 "secret": obj("secretName", secretName=NAME, defaultMode=number(0, 0o777), optional=BOOL,
                               items=arr(obj("key path", key=STR, path=STR))),
                 "configMap": obj("name", name=NAME, defaultMode=number(0, 0o777), optional=BOOL),
                 "persistentVolumeClaim": obj("claimName", claimName=NAME, readOnly=BOOL),
                 "hostPath": obj("path", path=PATH, type=STR),
                 "image": obj("reference", reference=STR, pullPolicy=STR)}, name=LABEL)
VOLUME["required"] = ["name"]
TOLERATION = obj(key=STR, operator=enum("Exists", "Equal"), value=STR,
                 effect=enum("NoSchedule", "PreferNoSchedule", "NoExecute"), tolerationSeconds=number(0))
SPREAD = obj("maxSkew topologyKey whenUnsatisfiable", maxSkew=number(1), topologyKey=STR,
             whenUnsatisfiable=enum("DoNotSchedule", "ScheduleAnyway"), labelSelector=SELECTOR, minDomains=number(1))
POD = obj("containers", serviceAccountName=NAME, automountServiceAccountToken=BOOL, enableServiceLinks=BOOL,
          priorityClassName=NAME, terminationGracePeriodSeconds=number(0), securityContext=POD_SECURITY,
          tolerations=arr(TOLERATION), topologySpreadConstraints=arr(SPREAD), nodeSelector=mapping(STR),
          restartPolicy=enum("Always", "OnFailure", "Never"), hostNetwork=BOOL, hostIPC=BOOL, hostPID=BOOL,
          initContainers=arr(INIT_CONTAINER), containers=arr(CONTAINER, 1), volumes=arr(VOLUME),
          schedulerName=STR, runtimeClassName=NAME, subdomain=LABEL, hostname=LABEL)
TEMPLATE = obj("metadata spec", metadata=POD_META, spec=POD)

# ---- kinds ----

SCHEMAS = {}


def kind(api, name, required="", **properties):
    SCHEMAS[api, name] = obj("apiVersion kind metadata " + required, apiVersion=enum(api), kind=enum(name), metadata=META,
                             **properties)


kind("v1", "ServiceAccount", automountServiceAccountToken=BOOL)
kind("v1", "ConfigMap", "data", data=mapping(STR, r"^[-._a-zA-Z0-9]+$"), immutable=BOOL)
kind("v1", "Service", "spec", spec=obj(
    "ports", type=enum("ClusterIP", "NodePort", "LoadBalancer"), clusterIP=STR, selector=LABELS, sessionAffinity=STR,
    publishNotReadyAddresses=BOOL, internalTrafficPolicy=STR, ports=arr(obj(
        "port", name=PORT_NAME, port=PORT, targetPort=PORT_REF, protocol=enum("TCP", "UDP"), appProtocol=STR), 1)))
kind("policy/v1", "PodDisruptionBudget", "spec", spec=obj(
    "selector", maxUnavailable=COUNT_OR_PERCENT, minAvailable=COUNT_OR_PERCENT, selector=SELECTOR,
    unhealthyPodEvictionPolicy=enum("IfHealthyBudget", "AlwaysAllow")))
kind("scheduling.k8s.io/v1", "PriorityClass", "value", value=number(-2**31, 10**9), globalDefault=BOOL, description=STR,
     preemptionPolicy=enum("PreemptLowerPriority", "Never"))
POLICY_PORTS = arr(obj(protocol=enum("TCP", "UDP", "SCTP"), port=PORT_REF, endPort=PORT))
PEERS = arr(obj(podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=obj("cidr", cidr=STR, except_=arr(STR))))
kind("networking.k8s.io/v1", "NetworkPolicy", "spec", spec=obj(
    "podSelector policyTypes", podSelector=SELECTOR, policyTypes=arr(enum("Ingress", "Egress"), 1),
    ingress=arr(obj(from_=PEERS, ports=POLICY_PORTS)), egress=arr(obj(to=PEERS, ports=POLICY_PORTS))))
kind("apps/v1", "Deployment", "spec", spec=obj(
    "selector template", replicas=number(0), revisionHistoryLimit=number(0), progressDeadlineSeconds=number(1),
    minReadySeconds=number(0), selector=SELECTOR, template=TEMPLATE, paused=BOOL, strategy=obj(
        type=enum("RollingUpdate", "Recreate"), rollingUpdate=obj(maxSurge=COUNT_OR_PERCENT, maxUnavailable=COUNT_OR_PERCENT))))
kind("apps/v1", "StatefulSet", "spec", spec=obj(
    "selector template serviceName", serviceName=NAME, replicas=number(0), revisionHistoryLimit=number(0),
    minReadySeconds=number(0), podManagementPolicy=enum("OrderedReady", "Parallel"), selector=SELECTOR, template=TEMPLATE,
    updateStrategy=obj(type=enum("RollingUpdate", "OnDelete"), rollingUpdate=obj(partition=number(0)))))
SCALING_POLICY = obj(stabilizationWindowSeconds=number(0, 3600), selectPolicy=enum("Max", "Min", "Disabled"),
                     policies=arr(obj("type value periodSeconds", type=enum("Pods", "Percent"), value=number(1),
                                      periodSeconds=number(1, 1800))))
BEHAVIOR = obj(scaleUp=SCALING_POLICY, scaleDown=SCALING_POLICY)
TARGET = obj("kind name", apiVersion=STR, kind=STR, name=NAME)
kind("autoscaling/v2", "HorizontalPodAutoscaler", "spec", spec=obj(
    "scaleTargetRef maxReplicas", scaleTargetRef=TARGET, minReplicas=number(0), maxReplicas=number(1), behavior=BEHAVIOR,
    metrics=arr(obj("type pods", type=enum("Pods"), pods=obj(
        "metric target", metric=obj("name", name=STR, selector=SELECTOR),
        target=obj("type averageValue", type=enum("AverageValue"), averageValue=QUANTITY))), 1)))

# leaderworkerset.x-k8s.io/v1, LWS 0.10
kind("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "spec", spec=obj(
    "leaderWorkerTemplate", replicas=number(0), startupPolicy=enum("LeaderCreated", "LeaderReady"),
    rolloutStrategy=obj("type", type=enum("RollingUpdate"), rollingUpdateConfiguration=obj(
        partition=number(0), maxUnavailable=COUNT_OR_PERCENT, maxSurge=COUNT_OR_PERCENT)),
    networkConfig=obj("subdomainPolicy", subdomainPolicy=enum("Shared", "UniquePerReplica")),
    leaderWorkerTemplate=obj(
        "workerTemplate", size=number(1), leaderTemplate=TEMPLATE, workerTemplate=TEMPLATE,
        restartPolicy=enum("Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        subGroupPolicy=obj(subGroupPolicyType=enum("LeaderWorker", "LeaderExcluded"), subGroupSize=number(1)))))

# kubeflow.org/v2beta1, mpi-operator 0.6 to 0.8
REPLICA = obj("template", replicas=number(1), restartPolicy=enum("Never", "OnFailure"), template=TEMPLATE)
kind("kubeflow.org/v2beta1", "MPIJob", "spec", spec=obj(
    "mpiReplicaSpecs", slotsPerWorker=number(1), mpiImplementation=enum("OpenMPI", "Intel", "MPICH"), sshAuthMountPath=PATH,
    launcherCreationPolicy=enum("AtStartup", "WaitForWorkersReady"), runLauncherAsWorker=BOOL,
    runPolicy=obj(cleanPodPolicy=enum("None", "Running", "All"), ttlSecondsAfterFinished=number(0),
                  activeDeadlineSeconds=number(1), backoffLimit=number(0), suspend=BOOL,
                  schedulingPolicy=obj(minAvailable=number(1), queue=STR, priorityClass=STR, scheduleTimeoutSeconds=number(0))),
    mpiReplicaSpecs=obj("Launcher Worker", Launcher=REPLICA, Worker=REPLICA)))

# monitoring.coreos.com/v1, Prometheus operator 0.60 and later
SECRET_KEY = obj("name key", name=NAME, key=STR, optional=BOOL)
kind("monitoring.coreos.com/v1", "PodMonitor", "spec", spec=obj(
    "selector podMetricsEndpoints", selector=SELECTOR, jobLabel=STR, podTargetLabels=arr(STR), sampleLimit=number(1),
    namespaceSelector=obj(any=BOOL, matchNames=arr(STR)), podMetricsEndpoints=arr(obj(
        port=PORT_NAME, path=PATH, scheme=enum("http", "https"), interval=PROMETHEUS_TIME, scrapeTimeout=PROMETHEUS_TIME,
        params=mapping(arr(STR)), tlsConfig=obj(serverName=STR, insecureSkipVerify=BOOL,
                                                ca=one_of({"secret": SECRET_KEY, "configMap": SECRET_KEY}))), 1)))
RULE = one_of({"record": text(r"^[a-zA-Z_:][a-zA-Z0-9_:]*$"), "alert": text(r"^[A-Z][A-Za-z0-9]+$")}, expr=STR,
              for_=PROMETHEUS_TIME, labels=mapping(STR), annotations=mapping(STR))
RULE["properties"]["for"] = RULE["properties"].pop("for_")
RULE["required"] = ["expr"]
kind("monitoring.coreos.com/v1", "PrometheusRule", "spec", spec=obj("groups", groups=arr(
    obj("name rules", name=STR, interval=PROMETHEUS_TIME, rules=arr(RULE, 1)), 1)))

# cert-manager.io/v1
ISSUER_REF = obj("name", name=NAME, kind=enum("Issuer", "ClusterIssuer"), group=STR)
kind("cert-manager.io/v1", "Issuer", "spec", spec=one_of({"selfSigned": obj(), "ca": obj("secretName", secretName=NAME)}))
kind("cert-manager.io/v1", "Certificate", "spec", spec=obj(
    "secretName issuerRef", secretName=NAME, issuerRef=ISSUER_REF, isCA=BOOL, commonName=text(most=64), dnsNames=arr(STR),
    duration=GO_TIME, renewBefore=GO_TIME, usages=arr(enum("digital signature", "key encipherment", "server auth", "client auth")),
    privateKey=obj(algorithm=enum("RSA", "ECDSA", "Ed25519"), size=number(256), rotationPolicy=enum("Never", "Always"))))

# gateway.networking.k8s.io/v1, Gateway API 1.1 and later
PARENTS = arr(obj("name", group=STR, kind=STR, namespace=LABEL, name=NAME, sectionName=NAME, port=PORT), 0, 32)
BACKENDS = arr(obj("name port", group=STR, kind=STR, namespace=LABEL, name=NAME, port=PORT, weight=number(0, 10**6)), 0, 16)
HOSTNAMES = arr(text(r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", 253), 0, 16)
GATEWAY_TIME = text(r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")
kind("gateway.networking.k8s.io/v1", "GRPCRoute", "spec", spec=obj(
    parentRefs=PARENTS, hostnames=HOSTNAMES, rules=arr(obj(name=NAME, backendRefs=BACKENDS, matches=arr(obj(method=obj(
        type=enum("Exact", "RegularExpression"), service=text(r"^[A-Za-z0-9_][A-Za-z0-9_.]*$", 1024),
        method=text(r"^[A-Za-z0-9_]+$", 1024))), 0, 64)), 0, 16)))
kind("gateway.networking.k8s.io/v1", "HTTPRoute", "spec", spec=obj(
    parentRefs=PARENTS, hostnames=HOSTNAMES, rules=arr(obj(
        name=NAME, backendRefs=BACKENDS, timeouts=obj(request=GATEWAY_TIME, backendRequest=GATEWAY_TIME),
        matches=arr(obj(path=obj(type=enum("Exact", "PathPrefix", "RegularExpression"), value=text(r"^/", 1024)),
                        method=enum("GET", "POST")), 0, 64)), 0, 16)))

# keda.sh/v1alpha1, KEDA 2
kind("keda.sh/v1alpha1", "ScaledObject", "spec", spec=obj(
    "scaleTargetRef triggers", scaleTargetRef=TARGET, minReplicaCount=number(0), maxReplicaCount=number(1),
    pollingInterval=number(1), cooldownPeriod=number(0), fallback=obj("failureThreshold replicas", failureThreshold=number(0),
                                                                      replicas=number(0)),
    advanced=obj(restoreToOriginalReplicaCount=BOOL, horizontalPodAutoscalerConfig=obj(name=NAME, behavior=BEHAVIOR)),
    triggers=arr(obj("type metadata", type=STR, name=STR, metricType=enum("AverageValue", "Value"), metadata=mapping(STR)), 1)))
