"""What a run reserves of a cluster: how many processes at a time, with what, on which nodes. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ray_jobs.run import Run
from safetydpo.config.labels import satisfies
from safetydpo.config.schema import ExecutionConfig

NETWORK_PASSES_PER_WORKER = 64
"""Passes through the denoiser that are worth a process of their own: starting one costs about as much."""
_SLACK = 1e-9
"""Keeps 0.3 / 0.1 at 3 in floating point."""


def most_workers(execution: ExecutionConfig, *, processes_each: int = 1) -> int:
    """Return how many workers of `processes_each` processes may run at a time: `num_workers`, within `max_gpus`."""
    return at_most(execution.num_workers, execution.max_gpus, execution.gpus_per_worker * processes_each)


def at_most(wanted: int, max_gpus: float | None, gpus_each: float) -> int:
    """Return how many of `wanted` workers fit into `max_gpus` (None = no limit); at least one."""
    if max_gpus is None or gpus_each <= 0:
        return wanted
    return min(wanted, max(1, int(max_gpus / gpus_each + _SLACK)))


def workers_for(execution: ExecutionConfig, *, tasks: int, passes_per_task: int, processes_each: int = 1) -> int:
    """Return how many workers share `tasks`: all that may run, unless the work is too small to be worth them.

    Args:
        execution: `num_workers` and `max_gpus` are the upper limits.
        tasks: units that cannot be divided (batches, trials, experts).
        passes_per_task: passes through the denoiser in one unit, about.
        processes_each: processes of one worker, each with `gpus_per_worker`.
    """
    worth = -(-tasks * passes_per_task // NETWORK_PASSES_PER_WORKER)
    return max(1, min(most_workers(execution, processes_each=processes_each), tasks, worth))


def calls_per_worker(execution: ExecutionConfig, *, waits: bool = False) -> int:
    """Return how many batches a worker that draws has under way: one is drawn while the one before it is finished.

    On a CPU alone both would want the same cores; then there is one, unless finishing it `waits` for another machine.
    """
    return 2 if waits or execution.gpus_per_worker > 0 else 1


def task_options(execution: ExecutionConfig, *, with_gpu: bool = True) -> dict[str, Any]:
    """Return the options of a Ray task that does one worker's work."""
    return {
        "num_cpus": execution.cpus_per_worker,
        "num_gpus": execution.gpus_per_worker if with_gpu else 0,
        **selecting(execution),
    }


def selecting(execution: ExecutionConfig) -> dict[str, Any]:
    """Return the option of a Ray task or actor that keeps it on the run's nodes; none if all nodes are."""
    return {"label_selector": dict(execution.label_selector)} if execution.label_selector else {}


def own_nodes(nodes: Iterable[Mapping[str, Any]], execution: ExecutionConfig) -> list[Mapping[str, Any]]:
    """Return those of `ray.nodes()` that are alive and take work of this run."""
    return [node for node in nodes if node["Alive"] and satisfies(node.get("Labels") or {}, execution.label_selector)]


def for_stage(run: Run, stage: str) -> Run:
    """Return the run as one stage has it: its `max_gpus` is also that of the stage."""
    execution = run.config.execution
    caps: Mapping[Any, float] = execution.stage_max_gpus
    if stage not in caps:
        return run
    cap = caps[stage] if execution.max_gpus is None else min(execution.max_gpus, caps[stage])
    narrowed = execution.model_copy(update={"max_gpus": cap})
    of_stage = replace(run, config=run.config.model_copy(update={"execution": narrowed}))
    # Reading all files of a large model again for it would take minutes.
    vars(of_stage)["base_fingerprint"] = run.base_fingerprint
    return of_stage
