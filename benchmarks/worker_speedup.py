"""How much faster several workers train one expert: the table of `safetydpo plan --simulate`, measured.

    python -m benchmarks.worker_speedup [--workers 1 2] [--steps 40] [--rounds 3] [--strategy ddp] [key=value ...]

One expert in one lane of Ray Train for each number of workers, in turn, on the demo's prompt pairs and latents of noise
(what is on the pictures does not change a step's time). Settings choose model and machine, as in `base.model=folder
base.dtype=bfloat16 execution.gpus_per_worker=1 identity.dpo.pairs_per_step=16`. `times:N` is the median step of one
worker over the median step of N, start and first steps left out. It prints lines for the `speed_up` of a price table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import print_result
from ray_jobs.cluster import connect, disconnect
from ray_jobs.expert_files import record_files
from ray_jobs.expert_plan import plan_experts
from ray_jobs.expert_worker import train_lane
from ray_jobs.lanes import Task, run_lanes
from ray_jobs.progress import progress_bar
from ray_jobs.run import Run
from ray_jobs.train_experts import LABEL, lane_settings
from safetydpo.artifacts.records import find_closed
from safetydpo.artifacts.storage import Location
from safetydpo.dpo.training_log import SPEED_FILE
from tests.ray.closed_artifacts import close_training_data, open_run

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"
FIRST_STEPS = 5
"""Not counted: kernels are chosen and memory is taken in them."""


def main() -> None:
    """Train with each number of workers in turn; print the speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("settings", nargs="*", help="key=value settings of the config")
    given = parser.parse_args()
    if given.workers[0] != 1 or given.steps <= FIRST_STEPS:
        parser.error(f"expected --workers from 1 on and more than {FIRST_STEPS} --steps")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    seconds: dict[int, list[float]] = {workers: [] for workers in given.workers}
    with tempfile.TemporaryDirectory() as place:
        dpo = f"identity.dpo={{steps: {given.steps}, warmup_steps: 1, pairs_per_step: 8, strategy: {given.strategy}}}"
        settings = [f"store={place}/store", f"run_dir={place}/run", dpo, "identity.experts.all_single=false"]
        run = open_run(SMOKE, [*settings, "execution.num_workers=1", *given.settings])
        pairs, folder = close_training_data(run)
        connect(run.config)
        for turn in range(given.rounds):
            for workers in given.workers[:: 1 if turn % 2 == 0 else -1]:
                seconds[workers].append(median_step(run, pairs, folder, workers=workers, turn=turn))
                print(f"{workers} workers: {seconds[workers][-1]:.4f} s a step", flush=True)
        disconnect()
    times = {workers: statistics.median(seconds[1]) / statistics.median(seconds[workers]) for workers in given.workers}
    for workers in given.workers:
        print(f"  - {{workers: {workers}, times: {times[workers]:.2f}, source: measured}}")
    print_result(
        "worker_speedup",
        ratios={f"times:{workers}": round(times[workers], 4) for workers in given.workers},
        raw={
            "seconds_per_step": {str(workers): found for workers, found in seconds.items()},
            "pairs_per_step": run.config.identity.dpo.pairs_per_step,
            "strategy": given.strategy,
            "load": os.getloadavg(),
        },
    )


def median_step(run: Run, pairs: Any, folder: Location, *, workers: int, turn: int) -> float:
    """Train one expert with so many workers; return the median seconds of a step, as its own log has them."""
    execution = run.config.execution.model_copy(update={"workers_per_expert": workers})
    run = Run(run.config.model_copy(update={"execution": execution}))
    unit = plan_experts(run, pairs, folder)[0]
    name = f"workers-{workers}-{turn}"
    unit = replace(unit, name=name, key=replace(unit.key, name=name, identity={**unit.key.identity, "name": name}))
    with progress_bar(LABEL, total=1) as board:
        settings = lane_settings(run, [unit], folder, board)
        failures = run_lanes(
            run, [Task(unit.name, run.folder(unit.key), unit.dpo.steps)], train_lane, settings, num_lanes=1
        )
    record = find_closed(run.store, unit.key)
    if failures or record is None:
        raise SystemExit(f"expected a trained expert, found {failures}")
    lines = (record_files(run, record) / SPEED_FILE).read_bytes().decode().splitlines()
    steps = [row["seconds"] for row in map(json.loads, lines) if row["step"] > FIRST_STEPS and "seconds" in row]
    return statistics.median(steps)


if __name__ == "__main__":
    main()
