"""Lanes on a real Ray: what fails, what dies, and two commands on one folder; toy tasks and true experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.lanes import Task, run_lanes
from ray_jobs.run import Run
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from tests.ray.small_cluster import told_by
from tests.ray.smoke_place import PATIENCE, ROOT
from tests.ray.toy_lanes import toy_lane

pytestmark = pytest.mark.slow


def with_execution(small: Config, **changes: object) -> Run:
    return Run(small.model_copy(update={"execution": small.execution.model_copy(update=changes)}))


def work(run: Run, folder: Path, *, count: int, faults: dict[str, str], num_lanes: int) -> dict[str, str]:
    """Run toy tasks; the first ones are the longest."""
    tasks = [Task(f"task-{index}", open_location(str(folder / f"task-{index}")), 9 - index) for index in range(count)]
    (folder / "processes").mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "folders": [task.folder.path for task in tasks],
        "processes": str(folder / "processes"),
        "faults": faults,
        "steps": 4,
        "seconds": 0.01,
    }
    return run_lanes(run, tasks, toy_lane, settings, num_lanes=num_lanes)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("task-*/record.json")}


def leases(folder: Path, task: str) -> list[str]:
    return sorted(file.name for file in (folder / task / "lease").iterdir() if "." not in file.name)


def test_failures_and_a_kill_leave_the_others_alone(cluster: None, small: Config, tmp_path: Path) -> None:
    """One lane, five tasks: bad data once, a crash twice (`expert_attempts`), a SIGKILL once; then a second command."""
    run = with_execution(small, expert_attempts=2)
    faults = {"0": "killed once", "1": "bad data", "2": "always"}
    failures = work(run, tmp_path, count=5, faults=faults, num_lanes=1)
    assert failures == {
        "task-1": "expected light, found none: switch it on",
        "task-2": "CUDA error: an illegal thing",
    }
    done = records(tmp_path)
    assert sorted(done) == ["task-0", "task-3", "task-4"]
    assert done["task-0"]["attempt"] == 2
    assert done["task-0"]["resumed_at"] == 3, "the killed attempt had written its third step"
    attempts = {task: len(leases(tmp_path, task)) for task in (f"task-{index}" for index in range(5))}
    assert attempts == {"task-0": 2, "task-1": 1, "task-2": 2, "task-3": 1, "task-4": 1}
    assert done["task-3"]["pid"] == done["task-4"]["pid"] != done["task-0"]["pid"], (
        "a crash ends a process, no task does"
    )
    assert work(run, tmp_path, count=5, faults={}, num_lanes=1) == {}
    assert sorted(records(tmp_path)) == [f"task-{index}" for index in range(5)]
    assert records(tmp_path)["task-2"]["attempt"] == 3


def test_isolated_lanes_and_two_workers(cluster: None, small: Config, tmp_path: Path) -> None:
    """Each task has two processes of its own; rank 0 alone publishes."""
    run = with_execution(small, lanes="isolated", workers_per_expert=2)
    assert work(run, tmp_path, count=2, faults={}, num_lanes=1) == {}
    done = records(tmp_path)
    assert sorted(done) == ["task-0", "task-1"]
    assert len(list((tmp_path / "processes").iterdir())) == 4
    assert done["task-0"]["by"] != done["task-1"]["by"]


def test_a_lane_that_fits_on_no_node_is_refused(cluster: None, small: Config, tmp_path: Path) -> None:
    run = with_execution(small, workers_per_expert=50)
    with pytest.raises(UsageError, match="expected a node with 50 CPUs for one lane .*, found none: lower them"):
        work(run, tmp_path, count=1, faults={}, num_lanes=1)


@pytest.mark.long
def test_two_commands_on_one_folder_share_the_work(tmp_path: Path) -> None:
    """Two drivers, each with a Ray of its own; every task has one attempt and one result, and both worked."""
    count = 30
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ray.two_commands", str(tmp_path), name, str(count)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for command in commands:
        output, _ = command.communicate(timeout=200 * PATIENCE)
        assert command.returncode == 0
        assert json.loads(output.splitlines()[-1]) == {}
    done = records(tmp_path)
    assert len(done) == count
    assert {task: leases(tmp_path, task) for task in done} == {task: ["attempt-1"] for task in done}
    assert len({record["pid"] for record in done.values()}) == 2


@pytest.mark.long
def test_an_expert_killed_preempted_and_bereft_of_its_node_has_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    """One SIGKILL of the worker, one preemption notice, one lost node; four raylets, the head without CPUs."""
    found = told_by("tests.ray.lane_faults", tmp_path, seconds=600)
    assert found["hash"] == found["undisturbed"]
    assert found["faults"] == ["killed", "preempted", "node lost"]
    assert found["attempts"] == 1 + len(found["faults"])
    # Never less than what stood in storage when the fault came.
    assert all(after >= before > 0 for before, after in zip(found["checkpoints"], found["went_on_from"], strict=True))
    assert found["resumed_at"] == found["went_on_from"][-1]
