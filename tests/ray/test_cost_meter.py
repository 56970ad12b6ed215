from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.cost_meter import CostMeter, cpu_times, gpus_held, runs_on_local_ray
from ray_jobs.run import Run, add_known
from safetydpo.config.schema import Config, ExecutionConfig

# The kernel counts user and system time of another clock than this process reads, each in whole steps.
CLOCK_STEPS = 2 / os.sysconf("SC_CLK_TCK")
BUSY = "import time\nwhile time.process_time() < 0.6: pass\ntime.sleep(30)"


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_this_process_computes_is_counted() -> None:
    with CostMeter(ExecutionConfig()) as meter:
        busy(0.3)
    cpu = meter.cost()["cpu_seconds"]
    assert cpu is not None
    assert 0.3 - CLOCK_STEPS <= cpu < 2


def test_what_a_process_of_ours_computes_is_counted() -> None:
    """As a worker of Ray: it lives on when the stage is over."""
    with CostMeter(ExecutionConfig()) as meter:
        child = subprocess.Popen([sys.executable, "-c", BUSY])
        while cpu_times().get((child.pid, _started(child.pid)), 0.0) < 0.4:
            time.sleep(0.05)
    child.kill()
    child.wait()
    cpu = meter.cost()["cpu_seconds"]
    assert cpu is not None
    assert cpu >= 0.4


def _started(pid: int) -> float:
    import psutil

    return float(psutil.Process(pid).create_time())


def test_an_error_passes_and_is_measured_all_the_same() -> None:
    meter = CostMeter(ExecutionConfig())

    def fail() -> None:
        with meter:
            busy(0.3)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert (meter.cost()["cpu_seconds"] or 0) >= 0.3 - CLOCK_STEPS


def test_a_clusters_processes_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with CostMeter(ExecutionConfig(ray_address="auto")) as meter:
        busy(0.05)
    assert meter.cost() == {"cpu_seconds": None, "gpu_seconds": None}
    assert runs_on_local_ray(ExecutionConfig())
    monkeypatch.setitem(os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert not runs_on_local_ray(ExecutionConfig())


def test_costs_of_a_stage_add_up_until_a_part_is_unknown(tmp_path: Path) -> None:
    execution = ExecutionConfig(store=str(tmp_path / "store"), run_dir=str(tmp_path / "run"))
    run = Run(Config(name="costs", execution=execution))
    assert run.costs() == {}
    run.add_cost("pairs", {"cpu_seconds": 1.5, "gpu_seconds": 0.0})
    run.add_cost("pairs", {"cpu_seconds": 2.0, "gpu_seconds": None})
    run.add_cost("pairs", {"cpu_seconds": 0.25, "gpu_seconds": 1.0})
    run.add_cost("train", {"cpu_seconds": 1.0, "gpu_seconds": 2.0})
    assert run.costs() == {
        "pairs": {"cpu_seconds": 3.75, "gpu_seconds": None},
        "train": {"cpu_seconds": 1.0, "gpu_seconds": 2.0},
    }
    assert add_known(None, 1.0) is None


@pytest.mark.parametrize(("cap", "held"), [(None, 8.0), (2.0, 2.0), (16.0, 8.0)], ids=["none", "below", "above"])
def test_a_run_answers_for_its_cap_of_a_shared_cluster(cap: float | None, held: float) -> None:
    assert gpus_held(8.0, cap) == held
