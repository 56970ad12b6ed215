"""A lane whose machine is about to be taken away: it stops within seconds, with its state in storage, and goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from ray_jobs.lanes import Task, run_lanes
from ray_jobs.run import Run
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from tests.ray.draining import drain
from tests.ray.lane_faults import ENVIRONMENT, node_of
from tests.ray.lane_notice import STEPS
from tests.ray.small_cluster import small_cluster, told_by
from tests.ray.smoke_place import PATIENCE, wait_for
from tests.ray.toy_lanes import STATE_FILE, toy_lane

pytestmark = pytest.mark.slow
GRACE_SECONDS = 30
"""Google's."""


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and two workers of two."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with small_cluster(nodes=2, cpus=2) as cluster:
        yield cluster


@pytest.mark.long
def test_two_workers_with_steps_of_seconds_leave_after_the_same_step(
    two_workers: Cluster, small: Config, tmp_path: Path
) -> None:
    """Steps of 2 s, as a large model has: they are told after two of them, and are gone long before the tenth."""
    run = Run(small.model_copy(update={"execution": small.execution.model_copy(update={"workers_per_expert": 2})}))
    folder, found = open_location(str(tmp_path / "task")), {}
    (tmp_path / "processes").mkdir()

    def steps_of(number: int) -> int:
        file = folder / f"attempt-{number}" / STATE_FILE
        return int(json.loads(file.read_bytes())["step"]) if file.is_file() else 0

    def tell() -> None:
        assert wait_for(lambda: steps_of(1) >= 2, seconds=200)
        drain(two_workers.address, node_of(two_workers, folder, 1).node_id, seconds=GRACE_SECONDS)
        found["told"] = steps_of(1), time.time()
        assert wait_for((folder / "lease" / "attempt-1.end").is_file, seconds=100)
        found["left"] = steps_of(1), time.time()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    settings: dict[str, Any] = {"folders": [folder.path], "processes": str(tmp_path / "processes"), "faults": {}}
    settings |= {"steps": 13, "seconds": 2.0}
    assert run_lanes(run, [Task("task", folder, 13)], toy_lane, settings, num_lanes=1) == {}
    thread.join(timeout=10)
    (told, told_at), (left, left_at) = found["told"], found["left"]
    assert told <= left <= told + 4, found
    assert left_at - told_at < 10 * PATIENCE
    ending = json.loads((folder / "lease" / "attempt-1.end").read_bytes())
    assert ending == {"how": "released", "reason": "its machine is going away"}
    record = json.loads((folder / "record.json").read_bytes())
    assert (record["attempt"], record["resumed_at"]) == (2, left)


def test_a_notice_is_followed_by_a_checkpoint_within_the_grace_period(tmp_path: Path) -> None:
    """A true expert that writes no checkpoint by itself, a metadata server, the watcher, Ray Train's own times.

    Its node then goes, it is finished on the other, and has the bytes of an undisturbed one.
    """
    found = told_by("tests.ray.lane_notice", tmp_path, seconds=280)
    assert not found["checkpoint_before"], "the notice must come before any checkpoint"
    assert found["seconds"] < GRACE_SECONDS * PATIENCE, found
    assert found["ending"] == {"how": "released", "reason": "its machine is going away"}
    assert found["attempt"] == 2
    assert 0 < found["steps_before"] <= found["steps_left_at"] < STEPS
    assert found["resumed_at"] == found["steps_left_at"]
    assert found["hash"] == found["undisturbed"]
