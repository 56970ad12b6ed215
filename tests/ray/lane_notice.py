"""Train an expert in a lane on a node that gets a notice of 30 s in the middle; for `test_lane_notice_slow`.

Usage: python -m tests.ray.lane_notice FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from ray_jobs.run import Run
from ray_jobs.train_experts import plan_experts, train_experts
from safetydpo.artifacts.storage import Location
from tests.cluster.metadata_server import metadata_server
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.lane_faults import CHECKPOINT, ENVIRONMENT, lease_of, node_of, steps_in
from tests.ray.small_cluster import small_cluster
from tests.ray.smoke_place import ROOT, SMOKE, wait_for
from tests.ray.undisturbed import undisturbed_experts

STEPS = 20
SETTINGS = [
    "identity.prompts.categories=[shocking]",
    "identity.prompts.pairs_per_category=4",
    f"identity.dpo={{steps: {STEPS}, warmup_steps: 1, pairs_per_step: 2, checkpoint_every: 1000, strategy: single}}",
    "identity.experts.all_single=false",
    "execution.num_workers=1",
]
PAUSE_SECONDS = 2.5
"""Added to each step before the notice is acted upon, by stopping the process: as long as steps of a large model."""


class Notice:
    """The cloud takes the machine of the first attempt back, once that has done a few slow steps."""

    def __init__(self, cluster: Cluster, folder: Location) -> None:
        self.cluster, self.folder = cluster, folder
        self.found: dict[str, Any] = {}
        self.thread = threading.Thread(target=self.happen, daemon=True)

    def happen(self) -> None:
        steps = Path(self.folder.path) / "attempt-1" / "training.jsonl"
        assert wait_for(lambda: _lines(steps) > 0, seconds=200), "the expert was never begun"
        slow = threading.Thread(target=self._slow_down, args=(psutil.Process(lease_of(self.folder, 1)["pid"]), steps))
        slow.start()
        node = node_of(self.cluster, self.folder, 1)
        with metadata_server() as server:
            watcher = [sys.executable, "-m", "ray_jobs.spot_watcher", "gcp", self.cluster.address]
            started = subprocess.Popen([*watcher, server.url, node.node_id], cwd=ROOT)
            assert wait_for(lambda: bool(server.asked), seconds=60), "the watcher never asked"
            self.found |= {"checkpoint_before": self._checkpoint.is_file(), "steps_before": _lines(steps)}
            server.notice, began = "TRUE", time.time()
            assert wait_for(self._checkpoint.is_file, seconds=200), "no checkpoint was written"
            self.found |= {"seconds": time.time() - began, "steps_left_at": steps_in(self._checkpoint)}
            assert started.wait(timeout=60) == 0
        slow.join()
        # Where the machine ends, everything on it does.
        self.cluster.remove_node(node, allow_graceful=False)
        self.found["ending"] = json.loads((self.folder / "lease" / "attempt-1.end").read_bytes())

    @property
    def _checkpoint(self) -> Location:
        return self.folder / "attempt-1" / CHECKPOINT

    def _slow_down(self, process: psutil.Process, steps: Path) -> None:
        while not (self.folder / "lease" / "attempt-1.end").is_file() and process.is_running():
            done = _lines(steps)
            wait_for(lambda done=done: _lines(steps) > done, seconds=1)  # type: ignore[misc]
            # It may end at any time.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                time.sleep(PAUSE_SECONDS)
                process.resume()


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0


def main() -> None:
    """Print what happened, the hash of the expert, and that of the same expert trained undisturbed."""
    # Ray's processes inherit it; Ray Train looks for notices as often as it does by itself.
    os.environ.update(ENVIRONMENT)
    del os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"]
    place = Path(sys.argv[1])
    run: Run = open_run(SMOKE, [f"store={place}/store", f"run_dir={place}/run", *SETTINGS])
    pairs, pairs_folder = close_training_data(run)
    undisturbed = undisturbed_experts(run, pairs, pairs_folder)
    with small_cluster(nodes=2, cpus=1) as cluster:
        (unit,) = plan_experts(run, pairs, pairs_folder)
        notice = Notice(cluster, run.folder(unit.key))
        notice.thread.start()
        (record,) = train_experts(run, pairs, pairs_folder).values()
        notice.thread.join(timeout=60)
    about = {"hash": record.fingerprint, "undisturbed": undisturbed[unit.name], "attempt": record.details["attempt"]}
    print(json.dumps({**notice.found, **about, "resumed_at": record.counts["resumed_at"]}))


if __name__ == "__main__":
    main()
