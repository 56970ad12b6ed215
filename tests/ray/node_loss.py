"""Fill a pool on a cluster of three raylets and take one away in the middle; run by `test_pool_faults_slow`.

Usage: python -m tests.ray.node_loss POOL
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from tests.ray.toy_workers import OUTPUT, LengthWorker, manifest

ROWS = 120


def main() -> None:
    """Print {"rows": index rows, "alive": nodes at the end, "written_before": files when the node went}."""
    pool = open_location(sys.argv[1])
    nodes = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **nodes})
    workers = [cluster.add_node(num_cpus=2, object_store_memory=100_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    config = Config.model_validate(
        {"name": "loss", "execution": {"num_workers": 4, "cpus_per_worker": 1, "ray_address": cluster.address}}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    written: list[int] = []

    def take_a_node() -> None:
        data = Path(pool.path)
        while len(list(data.glob("batch-*/data/*.parquet"))) < 4:
            time.sleep(0.1)
        written.append(len(list(data.glob("batch-*/data/*.parquet"))))
        cluster.remove_node(workers[0], allow_graceful=False)

    thread = threading.Thread(target=take_a_node, daemon=True)
    thread.start()
    stage = PoolStage("toy", OUTPUT, "row_id", LengthWorker, {"seconds": 0.5}, batch_size=2, passes_per_batch=64)
    rows = fill_pool(pool, manifest(ROWS), stage, execution=config.execution)
    thread.join(timeout=30)
    alive = sum(node["Alive"] for node in ray.nodes())
    print(json.dumps({"rows": rows.num_rows, "alive": alive, "written_before": written}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
