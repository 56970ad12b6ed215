"""A cluster of several raylets on this machine, and scripts that need a process of their own for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.ray.smoke_place import PATIENCE, ROOT


@contextmanager
def small_cluster(*, nodes: int, cpus: int, memory: int = 80_000_000) -> Iterator[Cluster]:
    """Connect to a head without CPUs and some nodes while the block runs; `memory` is of each object store."""
    # Another file's, in the same process.
    ray.shutdown()
    head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes):
        cluster.add_node(num_cpus=cpus, object_store_memory=memory)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def told_by(module: str, place: Path, *, seconds: float) -> dict[str, Any]:
    """Run a module of tests on a folder; return what its last line says."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(place)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=seconds * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
