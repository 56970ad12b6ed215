"""Our rules for a manifest of KubeRay: a RayJob and the network rules around its pods. Pure.

Kubernetes checks a manifest against KubeRay's full schema when it is applied. What is checked here without it are the
names of the keys that KubeRay itself reads, and what our rules are about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ray_jobs.cluster_file_rules import MIN_OPEN_FILES, Finding, is_pinned, leaves, looks_secret, wanted_tag
from ray_jobs.submit_secrets import is_secret_name

API = "ray.io/v1"
QUEUE = "kueue.x-k8s.io/queue-name"
# Of KubeRay 1.7, of those parts of a RayJob that are KubeRay's own.
_JOB_KEYS = frozenset(
    [
        "activeDeadlineSeconds",
        "backoffLimit",
        "rayClusterSpec",
        "submitterPodTemplate",
        "metadata",
        "clusterSelector",
        "submitterConfig",
        "managedBy",
        "deletionStrategy",
        "entrypoint",
        "runtimeEnvYAML",
        "jobId",
        "submissionMode",
        "entrypointResources",
        "entrypointNumCpus",
        "entrypointNumGpus",
        "ttlSecondsAfterFinished",
        "preRunningDeadlineSeconds",
        "shutdownAfterJobFinishes",
        "suspend",
    ]
)
_CLUSTER_KEYS = frozenset(
    [
        "upgradeStrategy",
        "authOptions",
        "suspend",
        "managedBy",
        "autoscalerOptions",
        "headServiceAnnotations",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "historyServerOptions",
        "networkPolicy",
        "tlsOptions",
        "headGroupSpec",
        "rayVersion",
        "workerGroupSpecs",
    ]
)
_HEAD_KEYS = frozenset(
    ["template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"]
)
_WORKER_KEYS = frozenset(
    [
        "suspend",
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "idleTimeoutSeconds",
        "resources",
        "labels",
        "rayStartParams",
        "template",
        "scaleStrategy",
        "numOfHosts",
    ]
)
_AUTH_KEYS = frozenset(["enableK8sTokenAuth", "secretName", "mode"])
Documents = Sequence[Mapping[str, Any]]
Rule = Callable[[Documents], Iterator[Finding]]


def is_manifest(document: Mapping[str, Any]) -> bool:
    """Return whether a document is one of Kubernetes."""
    return "apiVersion" in document and "kind" in document


def _job(documents: Documents) -> Mapping[str, Any]:
    return next(document for document in documents if document.get("kind") == "RayJob")


def _cluster(documents: Documents) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _job(documents)["spec"]["rayClusterSpec"]
    return found


def _groups(documents: Documents) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (key, head group or worker group)."""
    base, cluster = "spec.rayClusterSpec", _cluster(documents)
    yield f"{base}.headGroupSpec", cluster["headGroupSpec"]
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        yield f"{base}.workerGroupSpecs.{index}", group


def _pods(documents: Documents) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (key, pod template) of the groups and of the pod that submits."""
    for key, group in _groups(documents):
        yield f"{key}.template", group["template"]
    submitter = _job(documents)["spec"].get("submitterPodTemplate")
    if submitter is not None:
        yield "spec.submitterPodTemplate", submitter


def _containers(documents: Documents) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, pod in _pods(documents):
        for kind in ("initContainers", "containers"):
            for index, container in enumerate(pod["spec"].get(kind) or []):
                yield f"{key}.spec.{kind}.{index}", container


def _shape(documents: Documents) -> Iterator[Finding]:
    jobs = [document for document in documents if document.get("kind") == "RayJob"]
    if len(jobs) != 1 or jobs[0].get("apiVersion") != API:
        yield "kind", f"one RayJob of {API}", ", ".join(f"{one.get('kind')}" for one in documents)
        return
    spec = jobs[0].get("spec") or {}
    cluster = spec.get("rayClusterSpec") or {}
    parts: list[tuple[str, Any, frozenset[str]]] = [
        ("spec", spec, _JOB_KEYS),
        ("spec.rayClusterSpec", cluster, _CLUSTER_KEYS),
        ("spec.rayClusterSpec.headGroupSpec", cluster.get("headGroupSpec") or {}, _HEAD_KEYS),
        ("spec.rayClusterSpec.authOptions", cluster.get("authOptions") or {}, _AUTH_KEYS),
    ]
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        parts.append((f"spec.rayClusterSpec.workerGroupSpecs.{index}", group, _WORKER_KEYS))
    for place, part, known in parts:
        for key in part:
            if key not in known:
                yield f"{place}.{key}", "a key that KubeRay knows", f"{key!r}"
    for place, part in (("spec", spec), ("spec.rayClusterSpec", cluster)):
        for key in {"spec": ("entrypoint", "rayClusterSpec")}.get(place, ("headGroupSpec", "workerGroupSpecs")):
            if not part.get(key):
                yield f"{place}.{key}", "a value", "none"
    for place, group, _ in parts[2:3] + parts[4:]:
        if not ((group.get("template") or {}).get("spec") or {}).get("containers"):
            yield f"{place}.template.spec.containers", "a container", "none"


def _no_secret(documents: Documents) -> Iterator[Finding]:
    for document in documents:
        if document.get("kind") == "Secret":
            yield "kind", "no secret in this file (make it by kubectl)", "a Secret"
        for key, value in leaves(document):
            if looks_secret(key, value):
                yield key, "no secret in this file (refer to a Secret of the cluster)", "what looks like one"
    for key, container in _containers(documents):
        for variable in container.get("env") or []:
            if "value" in variable and is_secret_name(str(variable.get("name"))):
                yield f"{key}.env.{variable['name']}", "valueFrom.secretKeyRef", "a value written out"


def _dashboard_is_closed(documents: Documents) -> Iterator[Finding]:
    key, head = next(_groups(documents))
    if head.get("serviceType") != "ClusterIP":
        yield f"{key}.serviceType", "ClusterIP", f"{head.get('serviceType', 'none written')}"
    if head.get("enableIngress"):
        yield f"{key}.enableIngress", "false (tunnel with kubectl port-forward)", "true"
    for document in documents:
        service = document.get("kind") == "Service" and (document.get("spec") or {}).get("type") not in (
            None,
            "ClusterIP",
        )
        if service or document.get("kind") in ("Ingress", "Gateway", "HTTPRoute"):
            yield "kind", "nothing that leads into the pods from outside", f"{document['kind']}"
    for place, pod in _pods(documents):
        if pod["spec"].get("hostNetwork"):
            yield f"{place}.spec.hostNetwork", "false", "true"


def _network_is_closed(documents: Documents) -> Iterator[Finding]:
    policies = [one for one in documents if one.get("kind") == "NetworkPolicy"]
    if not policies:
        yield "kind", "a NetworkPolicy around the pods", "none"
    for place, pod in _pods(documents):
        labels = (pod.get("metadata") or {}).get("labels") or {}
        chosen = [(one["spec"].get("podSelector") or {}).get("matchLabels") or {} for one in policies]
        if policies and not any(all(labels.get(key) == value for key, value in want.items()) for want in chosen):
            yield f"{place}.metadata.labels", "labels that a NetworkPolicy of this file selects", f"{labels!r}"
    for policy in policies:
        spec = policy["spec"]
        if "Ingress" not in (spec.get("policyTypes") or []):
            yield "spec.policyTypes", "Ingress", f"{spec.get('policyTypes')!r}"
        for index, rule in enumerate(spec.get("ingress") or []):
            sources = rule.get("from") or []
            wide = [one for one in sources if "ipBlock" in one or not any(one.values())]
            if not sources or wide:
                yield f"spec.ingress.{index}.from", "pods or namespaces by their labels", "what lets everybody in"


def _image_is_pinned(documents: Documents) -> Iterator[Finding]:
    for key, container in _containers(documents):
        if not is_pinned(str(container.get("image", ""))):
            expected = f"the tag {wanted_tag()}-… (the Ray and Python of this machine) or a digest"
            yield f"{key}.image", expected, f"{container.get('image', 'none')!r}"
    found = _cluster(documents).get("rayVersion")
    if found != wanted_tag().partition("-")[0]:
        yield "spec.rayClusterSpec.rayVersion", wanted_tag().partition("-")[0], f"{found!r}"


def _head_has_no_gpu(documents: Documents) -> Iterator[Finding]:
    key, head = next(_groups(documents))
    found = (head.get("rayStartParams") or {}).get("num-gpus")
    if found != "0":
        yield f"{key}.rayStartParams.num-gpus", '"0" on the head', f"{found!r}"
    for index, container in enumerate(head["template"]["spec"]["containers"]):
        for kind, amounts in (container.get("resources") or {}).items():
            for name in amounts or {}:
                if "gpu" in name:
                    yield f"{key}.template.spec.containers.{index}.resources.{kind}.{name}", "no GPU", name


def _token_is_on(documents: Documents) -> Iterator[Finding]:
    options = _cluster(documents).get("authOptions") or {}
    key = "spec.rayClusterSpec.authOptions"
    if options.get("mode") != "token":
        yield f"{key}.mode", "token", f"{options.get('mode', 'none')}"
    if not options.get("secretName"):
        yield f"{key}.secretName", "the name of the Secret that holds the token", "none"
    for place, container in _containers(documents):
        for variable in container.get("env") or []:
            if variable.get("name") == "RAY_AUTH_MODE" and variable.get("value") != "token":
                yield f"{place}.env.RAY_AUTH_MODE", "token", f"{variable.get('value')}"


def _pods_are_confined(documents: Documents) -> Iterator[Finding]:
    for key, pod in _pods(documents):
        context = pod["spec"].get("securityContext") or {}
        if context.get("runAsNonRoot") is not True:
            yield f"{key}.spec.securityContext.runAsNonRoot", "true", f"{context.get('runAsNonRoot')!r}"
        if pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{key}.spec.automountServiceAccountToken", "false", "not so"
    for key, container in _containers(documents):
        context = container.get("securityContext") or {}
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{key}.securityContext", "allowPrivilegeEscalation: false, privileged: false", f"{context!r}"
        if not (container.get("resources") or {}).get("limits"):
            yield f"{key}.resources.limits", "limits of CPU and memory", "none"


def _limits_are_set(documents: Documents) -> Iterator[Finding]:
    for key, group in _groups(documents):
        pod = group["template"]["spec"]
        memory = {
            volume["name"]
            for volume in pod.get("volumes") or []
            if (volume.get("emptyDir") or {}).get("medium") == "Memory" and volume["emptyDir"].get("sizeLimit")
        }
        for index, container in enumerate(pod["containers"][:1]):
            place = f"{key}.template.spec.containers.{index}"
            mounts = {one.get("mountPath"): one.get("name") for one in container.get("volumeMounts") or []}
            if mounts.get("/dev/shm") not in memory:
                yield f"{place}.volumeMounts", "/dev/shm from an emptyDir in memory with a sizeLimit", "none"
            values = {one.get("name"): str(one.get("value", "")) for one in container.get("env") or []}
            files = values.get("RAY_START_ULIMIT_OPEN_FILES", "")
            if not files.isdigit() or int(files) < MIN_OPEN_FILES:
                yield f"{place}.env.RAY_START_ULIMIT_OPEN_FILES", f"{MIN_OPEN_FILES}", files or "none"


def _size_is_fixed_and_queued(documents: Documents) -> Iterator[Finding]:
    if not ((_job(documents).get("metadata") or {}).get("labels") or {}).get(QUEUE):
        yield f"metadata.labels.{QUEUE}", "the name of a Kueue queue", "none"
    if _cluster(documents).get("enableInTreeAutoscaling"):
        yield "spec.rayClusterSpec.enableInTreeAutoscaling", "false (Kueue admits a fixed size)", "true"
    for index, group in enumerate(_cluster(documents)["workerGroupSpecs"]):
        sizes = [group.get(name) for name in ("minReplicas", "replicas", "maxReplicas")]
        if len(set(sizes)) != 1 or sizes[0] is None:
            yield f"spec.rayClusterSpec.workerGroupSpecs.{index}", "minReplicas = replicas = maxReplicas", f"{sizes}"


KUBERAY_RULES: tuple[Rule, ...] = (
    _shape,
    _no_secret,
    _dashboard_is_closed,
    _network_is_closed,
    _image_is_pinned,
    _head_has_no_gpu,
    _token_is_on,
    _pods_are_confined,
    _limits_are_set,
    _size_is_fixed_and_queued,
)
