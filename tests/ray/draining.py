"""What the spot watcher does to a node once its notice has come, at once and without a process."""

from __future__ import annotations

import time

import ray
from ray.core.generated import autoscaler_pb2


def drain(address: str, node_id: str, *, seconds: float) -> None:
    """Tell the cluster at `address` that a node is taken back in so many seconds."""
    client = ray._raylet.GcsClient(address=address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node_id, reason, "a test", int((time.time() + seconds) * 1000))
    assert accepted, why
