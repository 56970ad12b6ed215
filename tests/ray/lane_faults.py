"""Train an expert in a lane on a cluster of four raylets, while its worker is killed, preempted and loses its node.

Usage: python -m tests.ray.lane_faults FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from ray_jobs.run import Run
from ray_jobs.train_experts import plan_experts, train_experts
from safetydpo.artifacts.attempts import newest_file
from safetydpo.artifacts.storage import Location
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.draining import drain
from tests.ray.small_cluster import small_cluster
from tests.ray.smoke_place import SMOKE, wait_for
from tests.ray.undisturbed import undisturbed_experts

SETTINGS = [
    "identity.prompts.categories=[shocking]",
    "identity.prompts.pairs_per_category=4",
    "identity.dpo={steps: 40, warmup_steps: 1, pairs_per_step: 2, checkpoint_every: 1, strategy: single}",
    "identity.experts.all_single=false",
    "execution.num_workers=1",
]
ENVIRONMENT = {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_prestart_worker_first_driver": "0",
    # Ray starts its workers with less claim on the CPU than whatever else runs on the machine.
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
CHECKPOINT = "checkpoint.safetensors"


def steps_in(file: Location) -> int:
    """Steps that a checkpoint holds: the rows of its history."""
    from safetensors.torch import load

    return int(load(file.read_bytes())["history"].shape[0])


class Faults:
    """What happens to the lane, one after another, each in the middle of the same expert."""

    def __init__(self, cluster: Cluster, folder: Location) -> None:
        self.cluster, self.folder = cluster, folder
        self.done: list[str] = []
        self.checkpoints: list[int] = []
        self.thread = threading.Thread(target=self.happen, daemon=True)

    def happen(self) -> None:
        self._wait_for_attempt(1)
        os.kill(lease_of(self.folder, 1)["pid"], signal.SIGKILL)
        self.done.append("killed")
        self._wait_for_attempt(2)
        drain(self.cluster.address, node_of(self.cluster, self.folder, 2).node_id, seconds=120)
        self.done.append("preempted")
        self._wait_for_attempt(3)
        self.cluster.remove_node(node_of(self.cluster, self.folder, 3), allow_graceful=False)
        self.done.append("node lost")

    def _wait_for_attempt(self, number: int) -> None:
        file = self.folder / f"attempt-{number}" / CHECKPOINT
        assert wait_for(file.is_file, seconds=200), f"attempt {number} has no checkpoint; {self.done}"
        self.checkpoints.append(steps_in(file))


class Resumed:
    """Notes, for each attempt after the first, how many steps the state held that it could go on from."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.steps: list[int] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        for number in (2, 3, 4):
            while not (self.folder / "lease" / f"attempt-{number}").is_file():
                if self.stop.wait(0.02):
                    return
            file = newest_file(self.folder, CHECKPOINT, before=number)
            self.steps.append(0 if file is None else steps_in(file))


def lease_of(folder: Location, number: int) -> Any:
    """The lease of an attempt."""
    return json.loads((folder / "lease" / f"attempt-{number}").read_bytes())


def node_of(cluster: Cluster, folder: Location, number: int) -> Any:
    """The node on which an attempt is at work."""
    ancestors = {process.pid for process in psutil.Process(lease_of(folder, number)["pid"]).parents()}
    nodes = [node for node in cluster.worker_nodes if _raylet(node) in ancestors]
    return nodes[0]


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def main() -> None:
    """Print what happened, the hash of the expert, and that of the same expert trained undisturbed."""
    # Ray's processes inherit it.
    os.environ.update(ENVIRONMENT)
    place = Path(sys.argv[1])
    run: Run = open_run(SMOKE, [f"store={place}/store", f"run_dir={place}/run", *SETTINGS])
    pairs, pairs_folder = close_training_data(run)
    undisturbed = undisturbed_experts(run, pairs, pairs_folder)
    with small_cluster(nodes=3, cpus=1) as cluster:
        (unit,) = plan_experts(run, pairs, pairs_folder)
        folder = run.folder(unit.key)
        faults, resumed = Faults(cluster, folder), Resumed(folder)
        faults.thread.start()
        resumed.thread.start()
        (record,) = train_experts(run, pairs, pairs_folder).values()
        faults.thread.join(timeout=10)
        resumed.stop.set()
    found = {
        "hash": record.fingerprint,
        "undisturbed": undisturbed[unit.name],
        "faults": faults.done,
        "attempts": sum(file.name.removeprefix("attempt-").isdecimal() for file in (folder / "lease").list()),
        "checkpoints": faults.checkpoints,
        "went_on_from": resumed.steps,
        "resumed_at": record.counts["resumed_at"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
