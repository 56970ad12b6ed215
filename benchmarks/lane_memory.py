"""Memory on the head node for each lane, with real lanes on nodes of their own.

Run `python -m benchmarks.lane_memory [--lanes 8]`. A head without CPUs and one node per lane are raylets on this
machine (`ray.cluster_utils.Cluster`); the lanes train true experts of the demo model until the measurement is done.
What belongs to the head: its raylet and everything the raylet started, the control store, and this process, which is
the launcher. Measured before the first lane starts and when every lane has written a checkpoint.

`head_mb_per_lane_beyond_keeper` leaves out `GroupKeeper`, of which there is one for all lanes of a command
(`head_mb_of_keeper`); it stands for Ray Train's own cleaner, one for each lane.
Memory is resident set size, in which pages shared between processes count once for each; `pss` shares them out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.harness import print_result
from benchmarks.lane_overhead import SMOKE, plan
from ray_jobs.expert_worker import train_lane
from ray_jobs.lanes import Task, run_lanes
from ray_jobs.progress import progress_bar
from ray_jobs.train_experts import LABEL, lane_settings
from tests.ray.closed_artifacts import close_training_data, open_run

ENVIRONMENT = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}
KEEPER = "GroupKeeper"
STEPS = 100_000


def memory_by_process(pids: set[int]) -> dict[str, dict[str, float]]:
    """Return {name: {"rss_mb", "pss_mb", "processes"}} of these processes."""
    found: dict[str, dict[str, float]] = {}
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            command = process.cmdline()
            name = command[0].split("(")[0] if command and command[0].startswith("ray::") else process.name()
            memory = process.memory_full_info()
            entry = found.setdefault(name, {"rss_mb": 0.0, "pss_mb": 0.0, "processes": 0})
            entry["rss_mb"] += memory.rss / 2**20
            entry["pss_mb"] += memory.pss / 2**20
            entry["processes"] += 1
    return found


def of_node(node: Any) -> set[int]:
    """Return the pids of a node: what was started for it, and what they started."""
    pids = {entry.process.pid for entries in node.all_processes.values() for entry in entries}
    for pid in list(pids):
        with suppress(psutil.Error):
            pids |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return pids


def total(memory: Mapping[str, Mapping[str, float]], kind: str, *, without: str = "nothing") -> float:
    """Return the sum over processes in MB."""
    return sum(entry[kind] for name, entry in memory.items() if without not in name)


def measure(lanes: int, place: str) -> tuple[Cluster, dict[str, Any]]:
    """Start the cluster and the lanes; return it and memory before and with them."""
    settings = [f"store={place}/store", f"run_dir={place}/run", f"execution.num_workers={lanes}"]
    dpo = f"identity.dpo={{steps: {STEPS}, warmup_steps: 1, pairs_per_step: 2, strategy: single, checkpoint_every: 1}}"
    run = open_run(SMOKE, [*settings, dpo, "identity.experts.all_single=false"])
    pairs, folder = close_training_data(run)
    units = plan(run, pairs, folder, experts=lanes, name="lane")
    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(lanes):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    tasks = [Task(unit.name, run.folder(unit.key), unit.dpo.steps) for unit in units]
    with progress_bar(LABEL, total=1) as board:
        settings_of_lanes = lane_settings(run, units, folder, board)
        ray.get(board.count.remote(LABEL))
        before = memory_by_process(of_node(cluster.head_node) | {os.getpid()})

        def launch() -> None:
            run_lanes(run, tasks, train_lane, settings_of_lanes, num_lanes=lanes)

        threading.Thread(target=launch, daemon=True).start()
        deadline = time.time() + 1500
        checkpoints = [task.folder / "attempt-1" / "checkpoint.safetensors" for task in tasks]
        while not all(file.is_file() for file in checkpoints):
            assert time.time() < deadline, f"{sum(file.is_file() for file in checkpoints)} lanes work"
            time.sleep(1)
        during = memory_by_process(of_node(cluster.head_node) | {os.getpid()})
        workers = [memory_by_process(of_node(node)) for node in cluster.worker_nodes]
    return cluster, {"before": before, "during": during, "one_worker_node": workers[0], "worker_nodes": workers}


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=8)
    lanes = parser.parse_args().lanes
    # Ray's processes inherit it.
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as place:
        cluster, found = measure(lanes, place)
        tell(lanes, found)
        sys.stdout.flush()
        # A client may not take its own head away, nor does it matter any more to it.
        ray.shutdown()
        cluster.shutdown()
    # The launcher's thread still waits for its lanes, which would have gone on for hours.
    os._exit(0)


def tell(lanes: int, found: dict[str, Any]) -> None:
    """Print the result."""
    before, during = found["before"], found["during"]

    def per_lane(kind: str, without: str) -> float:
        return (total(during, kind, without=without) - total(before, kind, without=without)) / lanes

    nodes = found.pop("worker_nodes")
    print_result(
        "lane_memory",
        ratios={
            "head_mb_per_lane": per_lane("rss_mb", "nothing"),
            "head_mb_per_lane_beyond_keeper": per_lane("rss_mb", KEEPER),
            "head_mb_of_keeper": total(during, "rss_mb") - total(during, "rss_mb", without=KEEPER),
            "head_pss_mb_per_lane": per_lane("pss_mb", "nothing"),
            "head_pss_mb_per_lane_beyond_keeper": per_lane("pss_mb", KEEPER),
            "worker_node_mb_per_lane": sum(total(node, "rss_mb") for node in nodes) / lanes,
        },
        raw={"lanes": lanes, **found},
    )


if __name__ == "__main__":
    main()
