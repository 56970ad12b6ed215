"""The shipped manifest of KubeRay obeys our rules; every rule is broken once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.cluster_file import check_cluster_file
from safetydpo.errors import UsageError

Documents = list[dict[str, Any]]
Change = Callable[[Documents], object]


@pytest.fixture
def changed(root: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Write the shipped manifest with one change."""

    def write(change: Change) -> Path:
        # Through JSON's shapes: what YAML's anchors share would be changed in every place at once.
        documents = [yaml.safe_load(yaml.dump(one, Dumper=_Plain)) for one in _shipped(root)]
        change(documents)
        path = tmp_path / "changed.yaml"
        path.write_text("---\n".join(yaml.dump(one, Dumper=_Plain) for one in documents))
        return path

    return write


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _shipped(root: Path) -> Documents:
    return list(yaml.safe_load_all((root / "configs" / "cluster" / "kuberay-rayjob.yaml").read_text()))


def cluster(documents: Documents) -> dict[str, Any]:
    found: dict[str, Any] = documents[0]["spec"]["rayClusterSpec"]
    return found


def head(documents: Documents) -> dict[str, Any]:
    found: dict[str, Any] = cluster(documents)["headGroupSpec"]
    return found


def worker(documents: Documents) -> dict[str, Any]:
    found: dict[str, Any] = cluster(documents)["workerGroupSpecs"][0]
    return found


def container(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return found


def variable(group: dict[str, Any], name: str, value: str) -> None:
    container(group)["env"] = [one for one in container(group)["env"] if one["name"] != name]
    container(group)["env"].append({"name": name, "value": value})


HEAD, GROUP = r"spec\.rayClusterSpec\.headGroupSpec", r"spec\.rayClusterSpec\.workerGroupSpecs\.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The shape.
        (lambda d: d.pop(0), "kind: expected one RayJob of ray.io/v1, found NetworkPolicy"),
        (
            lambda d: d[0].update(apiVersion="ray.io/v1alpha1"),
            "kind: expected one RayJob of ray.io/v1, found RayJob, Net",
        ),
        (lambda d: d[0]["spec"].update(entrypont="x"), r"spec\.entrypont: expected a key that KubeRay knows"),
        (
            lambda d: cluster(d).update(authOption={}),
            r"spec\.rayClusterSpec\.authOption: expected a key that KubeRay knows",
        ),
        (lambda d: head(d).update(replicas=1), rf"{HEAD}\.replicas: expected a key that KubeRay knows"),
        (lambda d: worker(d).update(minReplica=1), rf"{GROUP}\.minReplica: expected a key that KubeRay knows"),
        (
            lambda d: cluster(d)["authOptions"].update(token="x"),
            r"authOptions\.token: expected a key that KubeRay knows",
        ),
        (lambda d: d[0]["spec"].pop("entrypoint"), r"spec\.entrypoint: expected a value, found none"),
        (
            lambda d: cluster(d).pop("workerGroupSpecs"),
            r"rayClusterSpec\.workerGroupSpecs: expected a value, found none",
        ),
        (
            lambda d: worker(d).pop("template"),
            rf"{GROUP}\.template\.spec\.containers: expected a container, found none",
        ),
        (lambda d: d[0].update(spec=[1]), "expected the shape of the shipped files .*, found another: "),
        # No secret.
        (
            lambda d: d.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}),
            "kind: expected no secret in this file .*, found a Secret",
        ),
        (
            lambda d: variable(worker(d), "HF_TOKEN", "abc"),
            r"env\.HF_TOKEN: expected valueFrom.secretKeyRef, found a value written out",
        ),
        (
            lambda d: variable(head(d), "STORE", "s3://AKIAIOSFODNN7EXAMPLE:word@bucket/x"),
            r"env\.\d\.value: expected no secret in this file .*, found what looks like one",
        ),
        (
            lambda d: d[0]["spec"].update(runtimeEnvYAML="env_vars: {RAY_AUTH_TOKEN: abc, my_password: word}"),
            r"spec\.runtimeEnvYAML: expected no secret in this file",
        ),
        # The dashboard.
        (
            lambda d: head(d).update(serviceType="LoadBalancer"),
            rf"{HEAD}\.serviceType: expected ClusterIP, found LoadB",
        ),
        (lambda d: head(d).pop("serviceType"), rf"{HEAD}\.serviceType: expected ClusterIP, found none written"),
        (lambda d: head(d).update(enableIngress=True), rf"{HEAD}\.enableIngress: expected false"),
        (
            lambda d: d.append({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress"}),
            "kind: expected nothing that leads into the pods from outside, found Ingress",
        ),
        (
            lambda d: d.append({"apiVersion": "v1", "kind": "Service", "spec": {"type": "NodePort"}}),
            "kind: expected nothing that leads into the pods from outside, found Service",
        ),
        (
            lambda d: head(d)["template"]["spec"].update(hostNetwork=True),
            rf"{HEAD}\.template\.spec\.hostNetwork: expected false, found true",
        ),
        # The network.
        (lambda d: d.pop(1), "kind: expected a NetworkPolicy around the pods, found none"),
        (
            lambda d: worker(d)["template"]["metadata"].update(labels={"app": "other"}),
            rf"{GROUP}\.template\.metadata\.labels: expected labels that a NetworkPolicy of this file selects",
        ),
        (
            lambda d: d[1]["spec"].update(policyTypes=["Egress"]),
            r"spec\.policyTypes: expected Ingress, found .'Egress'.",
        ),
        (
            lambda d: d[1]["spec"]["ingress"].append({}),
            r"spec\.ingress\.2\.from: expected pods or namespaces .* everybody in",
        ),
        (
            lambda d: d[1]["spec"]["ingress"][0].update({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}),
            r"spec\.ingress\.0\.from: expected pods or namespaces",
        ),
        (
            lambda d: d[1]["spec"]["ingress"][1].update({"from": [{"namespaceSelector": {}}]}),
            r"spec\.ingress\.1\.from: expected pods or namespaces",
        ),
        # The image.
        (
            lambda d: container(head(d)).update(image="rayproject/ray:latest"),
            rf"{HEAD}\.template\.spec\.containers\.0\.image: expected the tag 2\.60\.0-py311-… .*, found 'rayproject",
        ),
        (
            lambda d: container(worker(d)).update(image="registry.example.com/safetydpo"),
            r"image: expected the tag 2\.60",
        ),
        (
            lambda d: d[0]["spec"]["submitterPodTemplate"]["spec"]["containers"][0].update(
                image="rayproject/ray:nightly"
            ),
            r"spec\.submitterPodTemplate\.spec\.containers\.0\.image: expected the tag",
        ),
        (
            lambda d: worker(d)["template"]["spec"].update(initContainers=[{"name": "x", "image": "busybox"}]),
            r"initContainers\.0\.image: expected the tag",
        ),
        (
            lambda d: cluster(d).update(rayVersion="2.59.0"),
            r"rayClusterSpec\.rayVersion: expected 2\.60\.0, found '2\.59\.0'",
        ),
        # The head.
        (
            lambda d: head(d)["rayStartParams"].update({"num-gpus": "1"}),
            rf"{HEAD}\.rayStartParams\.num-gpus: expected \"0\" on the head, found '1'",
        ),
        (lambda d: head(d)["rayStartParams"].pop("num-gpus"), r"num-gpus: expected \"0\" on the head, found None"),
        (
            lambda d: container(head(d))["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
            rf"{HEAD}\.template\.spec\.containers\.0\.resources\.limits\.nvidia.com/gpu: expected no GPU",
        ),
        # The token.
        (lambda d: cluster(d).pop("authOptions"), r"authOptions\.mode: expected token, found none"),
        (
            lambda d: cluster(d)["authOptions"].update(mode="disabled"),
            r"authOptions\.mode: expected token, found disabled",
        ),
        (
            lambda d: cluster(d)["authOptions"].pop("secretName"),
            r"authOptions\.secretName: expected the name of the Secret",
        ),
        (
            lambda d: variable(head(d), "RAY_AUTH_MODE", "disabled"),
            r"env\.RAY_AUTH_MODE: expected token, found disabled",
        ),
        # The pods.
        (
            lambda d: worker(d)["template"]["spec"]["securityContext"].pop("runAsNonRoot"),
            rf"{GROUP}\.template\.spec\.securityContext\.runAsNonRoot: expected true, found None",
        ),
        (
            lambda d: head(d)["template"]["spec"].pop("automountServiceAccountToken"),
            r"automountServiceAccountToken: expected false, found not so",
        ),
        (
            lambda d: container(worker(d))["securityContext"].update(privileged=True),
            r"securityContext: expected allowPrivilegeEscalation: false, privileged: false, found .*True",
        ),
        (
            lambda d: container(worker(d)).pop("resources"),
            r"resources\.limits: expected limits of CPU and memory, found none",
        ),
        # Memory and files.
        (
            lambda d: worker(d)["template"]["spec"]["volumes"][0].update(emptyDir={"sizeLimit": "10Gi"}),
            rf"{GROUP}\.template\.spec\.containers\.0\.volumeMounts: expected /dev/shm from an emptyDir in memory",
        ),
        (
            lambda d: container(head(d)).update(volumeMounts=[]),
            rf"{HEAD}\.template\.spec\.containers\.0\.volumeMounts: expected /dev/shm",
        ),
        (
            lambda d: variable(head(d), "RAY_START_ULIMIT_OPEN_FILES", "1024"),
            r"env\.RAY_START_ULIMIT_OPEN_FILES: expected 65536, found 1024",
        ),
        # The queue.
        (lambda d: d[0]["metadata"].pop("labels"), "queue-name: expected the name of a Kueue queue, found none"),
        (
            lambda d: cluster(d).update(enableInTreeAutoscaling=True),
            r"enableInTreeAutoscaling: expected false \(Kueue admits a fixed size\), found true",
        ),
        (
            lambda d: worker(d).update(maxReplicas=9),
            rf"{GROUP}: expected minReplicas = replicas = maxReplicas, found .2, 2, 9",
        ),
    ],
)
def test_a_broken_rule_is_named_by_its_key(changed: Callable[[Change], Path], change: Change, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        check_cluster_file(changed(change))
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_an_image_by_its_digest_is_pinned(changed: Callable[[Change], Path]):
    check_cluster_file(changed(lambda d: container(head(d)).update(image="r/safetydpo@sha256:" + "0" * 64)))


def test_the_image_is_built_from_the_pinned_one(root: Path):
    """The tag in the Dockerfile, that of `ray up`, and the one that the manifest names."""
    lines = (root / "configs" / "cluster" / "Dockerfile").read_text().splitlines()
    base = next(line for line in lines if line.startswith("FROM ")).removeprefix("FROM ")
    assert base == yaml.safe_load((root / "cluster.yaml").read_text())["docker"]["image"]
    assert container(head(_shipped(root)))["image"].rpartition(":")[2] == base.rpartition(":")[2]
