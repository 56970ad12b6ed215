"""How long workers of pools were at work, and the share of held GPUs that this is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import busy_time
from ray_jobs.busy_time import BusyTime, note_worker_seconds
from ray_jobs.cost_meter import CostMeter
from ray_jobs.run import Run
from ray_jobs.stage_use import stage_utilisation
from safetydpo.config.schema import Config, ExecutionConfig
from tests.ray.turned_clock import TurnedClock

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    clock = TurnedClock()
    monkeypatch.setattr(busy_time, "time", clock)
    return clock


def test_calls_at_the_same_time_count_once(clock: TurnedClock) -> None:
    """One from 1 to 4, one from 2 to 6, one from 8 to 9: 5 s and 1 s. Asked at 3: 2 s, the rest later."""
    busy = BusyTime()
    clock.now = 1.0
    busy.__enter__()
    clock.now = 2.0
    busy.__enter__()
    clock.now = 3.0
    assert busy.take() == 2.0
    clock.now = 4.0
    busy.__exit__(None, None, None)
    clock.now = 6.0
    busy.__exit__(None, None, None)
    clock.now = 8.0
    with busy:
        clock.now = 9.0
    assert busy.take() == 4.0
    assert busy.take() == 0.0


def test_a_call_that_fails_counts_too(clock: TurnedClock) -> None:
    busy = BusyTime()

    def fail() -> None:
        with busy:
            clock.now = 2.0
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert busy.take() == 2.0


def test_a_stage_has_what_was_noted_within_it() -> None:
    """3 s of workers with half a GPU each; without GPUs nobody asks."""
    note_worker_seconds(7.0)
    with CostMeter(ExecutionConfig(ray_address="auto", gpus_per_worker=0.5)) as meter:
        note_worker_seconds(3.0)
    note_worker_seconds(9.0)
    assert meter.cost()["pool_gpu_seconds"] == pytest.approx(1.5)
    with CostMeter(ExecutionConfig(ray_address="auto")) as meter:
        note_worker_seconds(3.0)
    assert "pool_gpu_seconds" not in meter.cost()


def test_the_share_of_the_gpus_that_a_stage_held(tmp_path: Path) -> None:
    """4 of 16 GPU-seconds; merging, of which pools are a part, full pools and older versions say nothing."""
    execution = ExecutionConfig(store=str(tmp_path / "store"), run_dir=str(tmp_path / "run"), gpus_per_worker=1)
    run = Run(Config(name="used", execution=execution))
    run.add_cost("pairs", {"cpu_seconds": None, "gpu_seconds": 16.0, "pool_gpu_seconds": 4.0})
    run.add_cost("merge", {"cpu_seconds": None, "gpu_seconds": 16.0, "pool_gpu_seconds": 4.0})
    run.add_cost("evaluate", {"cpu_seconds": None, "gpu_seconds": 16.0})
    assert stage_utilisation(run, "pairs", []) == pytest.approx(0.25)
    assert stage_utilisation(run, "merge", []) is None
    found = Run(Config(name="full", execution=execution.model_copy(update={"run_dir": str(tmp_path / "other")})))
    found.add_cost("pairs", {"cpu_seconds": None, "gpu_seconds": 1.0, "pool_gpu_seconds": 0.0})
    assert stage_utilisation(found, "pairs", []) is None
    assert stage_utilisation(run, "evaluate", []) is None
    run.add_cost("evaluate", {"cpu_seconds": None, "gpu_seconds": 16.0, "pool_gpu_seconds": 8.0})
    assert stage_utilisation(run, "evaluate", []) is None, "half of it was not measured"


@pytest.mark.slow
def test_a_pool_on_a_gpu_that_ray_believes_in(tmp_path: Path) -> None:
    """Two workers of half a GPU, twelve batches of 0.3 s: 3.6 worker-seconds, 1.8 GPU-seconds of those held.

    What a worker has just told may be under way when the pool is closed: one batch may be missing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray.gpu_pool", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cost = json.loads(done.stdout.splitlines()[-1])
    assert 1.8 - 0.15 <= cost["pool_gpu_seconds"] < 3.6
    assert cost["pool_gpu_seconds"] < cost["gpu_seconds"]
