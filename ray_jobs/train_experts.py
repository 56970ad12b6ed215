"""Stage 2: one safety expert per group of pairs, trained by Ray Train with DeepSpeed, several at once.

Experts are trained in lanes (`ray_jobs/lanes.py`): Ray Train runs whose workers load the base model once and train one
expert after another. An expert is published by creating its record; a lane that is killed loses the steps since its
last checkpoint, from which the next attempt goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.cluster import connect
from ray_jobs.expert_plan import ExpertUnit, lane_units, plan_experts
from ray_jobs.expert_watch import GRIDS_FOLDER, prompts_to_watch
from ray_jobs.lanes import Task, run_lanes
from ray_jobs.progress import progress_bar
from ray_jobs.reference_errors import make_reference_errors
from ray_jobs.resources import workers_for
from ray_jobs.run import Run, config_for_workers
from ray_jobs.run_context import current
from ray_jobs.run_progress import ToldExpert, told_progress
from ray_jobs.training_tables import check_training_pools
from safetydpo.artifacts.attempts import clear_attempts
from safetydpo.artifacts.records import Record, find_closed, write_pointers
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

CHECKPOINT_FILE = "checkpoint.safetensors"
PASSES_PER_STEP = 2
"""A training step costs about as much as this many passes through the denoiser when sampling."""
LABEL = "expert steps"
EXPERTS = "experts"
TOLD_FAILURES = 5
"""Failed experts that the error of a command tells of."""


def train_experts(run: Run, pairs: Record, pairs_folder: Location) -> dict[str, Record]:
    """Make or find every expert of a run; return their records by name, `all_single` among them if wanted."""
    units = plan_experts(run, pairs, pairs_folder)
    pending = [unit for unit in units if find_closed(run.store, unit.key) is None]
    failures: Mapping[str, str] = {}
    if pending:
        # Every lane would find it too, after it has loaded the base.
        check_training_pools(run)
        make_reference_errors(run, pending, pairs_folder)
        failures = _train(run, pending, pairs_folder)
    trained = {unit.name for unit in pending}
    records: dict[str, Record] = {}
    for unit in units:
        record = find_closed(run.store, unit.key)
        if record is not None:
            if unit.name in trained:
                run.made.append(unit.key.folder_name)
            # Killed between the record and this, a command leaves it behind, and nothing else would ever look.
            _clear(run.folder(unit.key), record)
            records[unit.name] = record
        elif unit.name not in failures:
            raise SafetyDPOError(
                f"expected a finished expert {unit.name!r} in {run.folder(unit.key)}, found none: run the command again"
            )
    # All at once: on an object store each writing of the file costs several round trips.
    write_pointers(run.run_dir, {f"expert:{unit.name}": unit.key for unit in units if unit.name in records})
    # Another command may have published one that this one gave up.
    failures = {name: reason for name, reason in failures.items() if name not in records}
    if failures:
        raise _failed(failures, len(units))
    return records


def _clear(folder: Location, record: Record) -> None:
    # Before experts had attempts, the checkpoint lay beside the record.
    (folder / CHECKPOINT_FILE).delete()
    if "attempt" in record.details:
        clear_attempts(folder, keep=record.details["attempt"], without=CHECKPOINT_FILE, gather=GRIDS_FOLDER)


def _failed(failures: Mapping[str, str], total: int) -> SafetyDPOError:
    told = [f"{name} ({reason})" for name, reason in sorted(failures.items())[:TOLD_FAILURES]]
    rest = f" and {len(failures) - TOLD_FAILURES} more" if len(failures) > TOLD_FAILURES else ""
    return SafetyDPOError(
        f"expected {total} trained experts, found {len(failures)} that failed: {'; '.join(told)}{rest}; the others are "
        "closed. Mend the cause, then run the same command again, which tries these anew"
    )


def _train(run: Run, units: Sequence[ExpertUnit], pairs_folder: Location) -> dict[str, str]:
    """Train what is open; return {name: reason} of the experts that failed."""
    from ray_jobs.expert_worker import train_lane

    connect(run.config)
    steps = max(unit.dpo.steps for unit in units)
    execution = run.config.execution
    num_lanes = workers_for(
        execution,
        tasks=len(units),
        passes_per_task=steps * PASSES_PER_STEP,
        processes_each=execution.workers_per_expert,
    )
    tasks = [Task(unit.name, run.folder(unit.key), unit.dpo.steps) for unit in units]
    told = told_progress()
    if told is not None:
        told.list_experts([_told_expert(unit) for unit in units])
    steps_in_all = sum(unit.dpo.steps for unit in units)
    with progress_bar(LABEL, total=steps_in_all, beside={EXPERTS: len(units)}) as board:
        settings = lane_settings(run, units, pairs_folder, board)
        return run_lanes(run, tasks, train_lane, settings, num_lanes=num_lanes)


def lane_settings(run: Run, units: Sequence[ExpertUnit], pairs_folder: Location, board: Any) -> dict[str, Any]:
    """Return what every lane is told: `expert_worker.train_lane` reads it."""
    return {
        "config": config_for_workers(run.config).model_dump(mode="json"),
        "units": lane_units(units),
        "pairs_folder": pairs_folder.name,
        "validation_prompts": {unit.name: prompts_to_watch(run.config.identity, unit.categories) for unit in units},
        "board": board,
        "context": current().told(),
    }


def _told_expert(unit: ExpertUnit) -> ToldExpert:
    return ToldExpert(unit.name, f"{unit.key.stage}/{unit.key.folder_name}", unit.dpo.steps)
