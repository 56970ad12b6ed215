"""The pre-check on a local Ray with logical CPUs: what a worker really says, and limits that an autoscaler reports."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_jobs import cluster as cluster_module
from ray_jobs import precheck
from ray_jobs.cluster import check_resources, connect, disconnect
from ray_jobs.precheck import check_cluster, describe, versions_here
from ray_jobs.precheck_room import read_room
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.errors import SafetyDPOError, UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    """A local Ray of 4 logical CPUs."""
    connect(Config.model_validate({"execution": {"num_workers": 2, "logical_cpus": 4}}))
    yield
    disconnect()


def config(store: Path, **execution: Any) -> Config:
    return Config.model_validate({"name": "t", "execution": {"store": str(store), **execution}})


def test_a_worker_has_the_same_versions_and_uses_the_store(local: None, tmp_path: Path):
    asked = config(tmp_path / "store")
    started = time.time()
    (answer,) = check_cluster(asked)
    assert answer.versions == versions_here()
    assert answer.problem == ""
    assert list((tmp_path / "store").iterdir()) == []
    assert time.time() - started < 60
    lines = describe(asked, [answer], with_store=True)
    assert lines[0].endswith("on 1 nodes that take work")
    assert lines[1:3] == [
        "ok  CPUs: 2 asked for by execution.num_workers, 4 there",
        "ok  GPUs: 0 asked for by execution.num_workers, 0 there",
    ]


def test_other_versions_are_told_with_the_node(local: None, tmp_path: Path):
    here = versions_here()
    with pytest.raises(
        UsageError, match=rf"expected ray 1\.0 on every node, .* found {here['ray']} on [\d.]+: install"
    ):
        check_cluster(config(tmp_path), expected={**here, "ray": "1.0"})
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_the_driver_cannot_write(local: None, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SafetyDPOError, match="expected to write .* bytes? to .*file/below"):
        check_cluster(config(tmp_path / "file" / "below"))


def test_a_store_that_a_worker_does_not_share(local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a local disk on each of two machines: the worker looks at a folder of the same name that is another."""
    original = precheck._ask_nodes

    def elsewhere(folder: Location | None) -> list[precheck.Answer]:
        return original(open_location(str(tmp_path / "other" / "disk")))

    monkeypatch.setattr(precheck, "_ask_nodes", elsewhere)
    with pytest.raises(
        SafetyDPOError,
        match=r"expected node [\d.]+ to read and write the store .* found: what the driver has just written",
    ):
        check_cluster(config(tmp_path / "store"))


def test_a_node_that_does_not_answer_in_time(local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precheck, "PROBE_SECONDS", 0.0)
    with pytest.raises(
        SafetyDPOError, match=r"expected an answer of node [\d.]+ within 0 s, found none: look at its logs"
    ):
        check_cluster(config(tmp_path), with_store=False)


def test_a_node_whose_worker_cannot_do_its_part(local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where the package is not installed: the task ends in an error of the worker's own."""

    @ray.remote(num_cpus=0, max_retries=0)
    def absent(_folder: Any) -> None:
        raise ModuleNotFoundError("No module named 'safetydpo'")

    monkeypatch.setattr(precheck, "_answer", absent)
    with pytest.raises(
        SafetyDPOError,
        match=r"expected a worker on node [\d.]+ that starts .*, found: .*No module named 'safetydpo'; install",
    ):
        check_cluster(config(tmp_path), with_store=False)


def test_a_process_that_fits_on_no_node_is_refused_in_a_moment(local: None, tmp_path: Path):
    started = time.time()
    with pytest.raises(
        UsageError, match=r"expected a node with 5 CPUs \(execution\.cpus_per_worker, gpus_per_worker\), found"
    ):
        check_cluster(config(tmp_path, cpus_per_worker=5))
    assert time.time() - started < 10


def test_what_an_autoscaler_may_add_is_let_through_and_no_more(
    local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It reports groups of 4 CPUs and 1 GPU, 3 nodes at most: 3 GPUs can come, 4 cannot."""
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    asked = config(tmp_path, gpus_per_worker=1, num_workers=3, ray_address="auto")
    with pytest.raises(UsageError, match=r"expected 3 GPUs .*, found 0 in the cluster: lower either, or add nodes"):
        check_resources(asked.execution, num_workers=3)
    group = NodeGroupConfig(resources={"CPU": 4, "GPU": 1}, min_count=0, max_count=3, name="gpu")
    key = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    space = ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    client.internal_kv_put(key, ClusterConfig(node_group_configs=[group]).SerializeToString(), True, space)
    try:
        assert read_room(ExecutionConfig()).most("GPU") == 3
        check_resources(asked.execution, num_workers=3)
        with pytest.raises(
            UsageError, match="expected 4 GPUs .*, found 0 in the cluster, at most 3 with its autoscaler"
        ):
            check_resources(asked.execution, num_workers=4)
        # A local Ray has none, whatever is reported.
        alone = asked.execution.model_copy(update={"ray_address": None})
        monkeypatch.delitem(os.environ, cluster_module._IN_A_JOB, raising=False)
        with pytest.raises(UsageError, match="found 0 in the cluster: lower"):
            check_resources(alone, num_workers=3)
    finally:
        client.internal_kv_del(key, False, space)
