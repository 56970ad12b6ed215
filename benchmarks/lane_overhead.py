"""Seconds per expert that are not a training step: experts in lanes against one Train run each.

Run `python -m benchmarks.lane_overhead [--experts 100] [--steps 20] [--isolated 3] [--lanes 1]`. The demo model, its
prompt pairs, latents of noise (a step's time does not depend on what is on the pictures).

`overhead_seconds_per_expert` is (lanes x wall time from the launch to the last record - seconds inside training steps)
/ experts: with the start of Ray Train and the loading of the base shared by all experts of a lane. Seconds inside steps
are counted in the workers. Ray itself is started before the clock. On a machine that does other work at the same time,
look at `worker_cpu_seconds_beside_steps_per_expert`, which waits for nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import print_result
from ray_jobs.cluster import connect, disconnect
from ray_jobs.expert_plan import ExpertUnit, plan_experts
from ray_jobs.expert_worker import train_lane
from ray_jobs.lanes import Task, run_lanes
from ray_jobs.progress import progress_bar
from ray_jobs.run import Run
from ray_jobs.train_experts import LABEL, lane_settings
from safetydpo.artifacts.records import find_closed
from safetydpo.artifacts.storage import Location
from tests.ray.closed_artifacts import close_training_data, open_run

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"


def timed_lane(settings: Mapping[str, Any]) -> str | None:
    """Train as a lane does, and leave the seconds inside training steps in a file."""
    from safetydpo.dpo import trainer

    step, seconds, cpu_seconds = trainer._train_step, 0.0, 0.0

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal seconds, cpu_seconds
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            return step(*arguments, **named)
        finally:
            seconds += time.perf_counter() - started
            cpu_seconds += time.process_time() - cpu_started

    trainer._train_step = timed
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        return train_lane(settings)
    finally:
        trainer._train_step = step
        found = {
            "steps": seconds,
            "function": time.perf_counter() - began,
            "cpu_beside_steps": time.process_time() - cpu_began - cpu_seconds,
        }
        (Path(settings["times"]) / f"{settings['lane']['name']}.json").write_text(json.dumps(found))


def plan(run: Run, pairs: Any, folder: Location, *, experts: int, name: str) -> list[ExpertUnit]:
    """Return `experts` experts of equal length, on the pairs of the categories in turn."""
    categories = plan_experts(run, pairs, folder)
    units = []
    for index in range(experts):
        unit = categories[index % len(categories)]
        called = f"{name}-{index:03d}"
        key = replace(unit.key, name=called, identity={**unit.key.identity, "name": called})
        units.append(replace(unit, name=called, key=key))
    return units


def measure(run: Run, units: list[ExpertUnit], folder: Location, *, num_lanes: int, isolated: bool) -> dict[str, Any]:
    """Train the experts; return seconds."""
    if isolated:
        execution = run.config.execution.model_copy(update={"lanes": "isolated"})
        run = Run(run.config.model_copy(update={"execution": execution}))
    with tempfile.TemporaryDirectory() as times, progress_bar(LABEL, total=1) as board:
        settings = {**lane_settings(run, units, folder, board), "times": times}
        tasks = [Task(unit.name, run.folder(unit.key), unit.dpo.steps) for unit in units]
        started = time.perf_counter()
        failures = run_lanes(run, tasks, timed_lane, settings, num_lanes=num_lanes)
        wall = time.perf_counter() - started
        found = [json.loads(file.read_text()) for file in Path(times).iterdir()]
    records = [find_closed(run.store, unit.key) for unit in units]
    assert not failures, failures
    in_units = sum(record.seconds for record in records if record is not None)
    in_steps, in_function = (sum(each[name] for each in found) for name in ("steps", "function"))
    busy = num_lanes * wall
    return {
        "experts": len(units),
        "lanes": num_lanes,
        "wall_seconds": round(wall, 3),
        "overhead_seconds_per_expert": round((busy - in_steps) / len(units), 4),
        "step_seconds_per_expert": round(in_steps / len(units), 4),
        "of_the_overhead_per_expert": {
            "inside_one_expert": round((in_units - in_steps) / len(units), 4),
            "between_experts_and_loading_the_base": round((in_function - in_units) / len(units), 4),
            "start_and_end_of_train_runs": round((busy - in_function) / len(units), 4),
        },
        "worker_cpu_seconds_beside_steps_per_expert": round(
            sum(each["cpu_beside_steps"] for each in found) / len(units), 4
        ),
    }


def main() -> None:
    """Measure both ways and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--isolated", type=int, default=3, help="experts with a Train run each")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("settings", nargs="*", help="key=value settings of the config")
    given = parser.parse_args()
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    with tempfile.TemporaryDirectory() as place:
        dpo = f"identity.dpo={{steps: {given.steps}, warmup_steps: 1, pairs_per_step: 4, strategy: {given.strategy}}}"
        settings = [f"store={place}/store", f"run_dir={place}/run", dpo, "identity.experts.all_single=false"]
        run = open_run(SMOKE, [*settings, f"execution.num_workers={given.lanes}", *given.settings])
        pairs, folder = close_training_data(run)
        connect(run.config)
        common: dict[str, Any] = {"num_lanes": given.lanes}
        shared = plan(run, pairs, folder, experts=given.experts, name="shared")
        apart = plan(run, pairs, folder, experts=given.isolated, name="apart")
        found = {
            "shared": measure(run, shared, folder, isolated=False, **common),
            "isolated": measure(run, apart, folder, isolated=True, **common),
        }
        disconnect()
    seconds = {name: each["overhead_seconds_per_expert"] for name, each in found.items()}
    print_result(
        "lane_overhead",
        ratios={
            "overhead_seconds_per_expert": seconds["shared"],
            "overhead_seconds_per_isolated_expert": seconds["isolated"],
            "isolated_vs_shared": seconds["isolated"] / seconds["shared"],
        },
        raw={**found, "steps": given.steps, "strategy": given.strategy, "load": os.getloadavg()},
    )


if __name__ == "__main__":
    main()
