"""Run the generation stage on a cluster of three raylets and take one away in the middle; for `test_node_loss_slow`.

Usage: python -m tests.ray.node_loss_pictures FOLDER
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ray_jobs.generate_pairs import generate_pairs
from ray_jobs.places import image_pool
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.config.schema import Config

NUM_WORKERS = 3
"""Of the four CPUs of two nodes, so that each node has an actor, and one is left for what reads and writes."""


def make_config(folder: Path, address: str | None) -> Config:
    """Return a small run of the demo model: 48 pictures of pairs, 4 benign ones, in passes of 4."""
    return Config.model_validate(
        {
            "name": "loss",
            "identity": {
                "prompts": {"categories": ["violence", "hate"], "pairs_per_category": 12, "retention_prompts": 4},
                "sampler": {"steps": 16, "batch_size": 4},
                "pairs": {"min_kept_per_category": 1},
            },
            "execution": {
                "num_workers": NUM_WORKERS,
                "ray_address": address,
                "store": str(folder / "store"),
                "run_dir": str(folder / "run"),
            },
        }
    )


def main() -> None:
    """Print {"alive": nodes at the end, "actors_lost": on the node that went, "files_before": written by then}."""
    folder = Path(sys.argv[1])
    nodes: dict[str, Any] = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **nodes})
    by_id = {node.node_id: node for node in (cluster.add_node(num_cpus=2, **nodes) for _ in range(2))}
    cluster.wait_for_nodes()
    run = Run(with_absolute_paths(make_config(folder, cluster.address)))
    found: dict[str, int] = {"actors_lost": 0, "files_before": 0}

    def take_a_node() -> None:
        data = Path(image_pool(run).path)
        while len(list(data.glob("batch-*/data/*.parquet"))) < 2:
            time.sleep(0.05)
        # The added node with most actors; the process that runs the stage sits on the head.
        actors = Counter(
            actor["Address"]["NodeID"] for actor in ray._private.state.actors().values() if is_worker(actor)
        )
        node_id = max(by_id, key=lambda node: actors[node])
        found.update(actors_lost=actors[node_id], files_before=len(list(data.glob("batch-*/data/*.parquet"))))
        cluster.remove_node(by_id[node_id], allow_graceful=False)

    threading.Thread(target=take_a_node, daemon=True).start()
    record = generate_pairs(run)
    found["alive"] = sum(node["Alive"] for node in ray.nodes())
    print(json.dumps({**found, "pictures": record.counts["pictures"]}))
    ray.shutdown()
    cluster.shutdown()


def is_worker(actor: dict[str, Any]) -> bool:
    """Return whether an actor of the cluster is one that draws and is at work."""
    return actor["State"] == "ALIVE" and "MapWorker" in actor["ActorClassName"]


if __name__ == "__main__":
    main()
