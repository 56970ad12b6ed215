"""A real node is drained when a metadata server on loopback says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from ray_jobs.spot_watcher import find_own_node
from tests.cluster.metadata_server import Server
from tests.ray.smoke_place import PATIENCE, ROOT, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """A head and a worker on this machine: (address, id of the worker)."""
    # Another file's, in the same process.
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
    worker = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster.address, worker.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_notice_drains_the_node_and_no_other(two_nodes: tuple[str, str], server: Server):
    from ray._private.state import state

    address, worker = two_nodes
    assert find_own_node(address) in {node["NodeID"] for node in ray.nodes()}
    watcher = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.spot_watcher", "gcp", address, server.url, worker],
        cwd=ROOT,
    )
    try:
        assert wait_for(lambda: len(server.asked) > 0, seconds=60)
        assert not state.get_draining_nodes()
        server.notice = "TRUE"
        assert watcher.wait(timeout=90 * PATIENCE) == 0
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        # An idle node may have left by now.
        assert set(state.get_draining_nodes()) == {worker} or worker not in alive
        assert len(alive - {worker}) == 1
    finally:
        watcher.kill()
        watcher.wait()
