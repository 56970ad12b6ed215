"""How much of what a stage held it used, and what that cost, from what records already say."""

from __future__ import annotations

from collections.abc import Iterable

from ray_jobs.expert_files import record_folder
from ray_jobs.resources import most_workers
from ray_jobs.run import Run
from ray_jobs.trial_log import MeasurementLog
from safetydpo.artifacts.records import Record
from safetydpo.planning.costs import Device
from safetydpo.planning.estimate import price_of, utilisation

POOLED_STAGES = ("pairs", "evaluate")
"""Those that do all of their work on devices in pools."""


def device_of(run: Run) -> Device:
    """Return what the work of a run is counted in."""
    return "gpu" if run.config.execution.gpus_per_worker > 0 else "cpu"


def num_devices(run: Run) -> float:
    """Return how many devices `execution` asks for, for one stage at a time, within its `max_gpus`."""
    execution = run.config.execution
    if device_of(run) == "cpu":
        return execution.num_workers * execution.cpus_per_worker
    return most_workers(execution) * execution.gpus_per_worker


def stage_utilisation(run: Run, stage: str, records: Iterable[Record]) -> float | None:
    """Return busy over held; None where no record says it.

    Of CPU cores: CPU time over wall time x cores asked for. Of GPUs: seconds of experts, of a search's measurements, or
    in which workers of pools were at work, x GPUs of each, over GPUs held. Experts that another run had made are taken
    for this run's, so that the number is too high where some were found.
    """
    used = run.costs().get(stage, {})
    if device_of(run) == "cpu":
        wall = run.seconds().get(stage)
        return utilisation(used.get("cpu_seconds"), None if wall is None else wall * num_devices(run))
    return utilisation(_busy_gpu_seconds(run, stage, records), used.get("gpu_seconds"))


def _busy_gpu_seconds(run: Run, stage: str, records: Iterable[Record]) -> float | None:
    execution = run.config.execution
    if stage == "train":
        return sum(record.seconds for record in records) * execution.gpus_per_worker * execution.workers_per_expert
    if stage == "search":
        logs = [MeasurementLog(record_folder(run, record) / "measurements") for record in records]
        return sum(span.seconds for log in logs for span in log.spans()) * execution.gpus_per_worker
    if stage not in POOLED_STAGES:
        # The layer inputs of a merge come from a pool; its distillation does not, and nothing tells its seconds here.
        return None
    # None too where a stage found its pools full.
    return run.costs().get(stage, {}).get("pool_gpu_seconds") or None


def stage_cost(run: Run, stage: str, *, per_hour: float | None) -> float | None:
    """Return what a stage's devices cost at a price per device and hour; None if it was not measured, or has no price.

    GPUs are paid for while they are held. Of CPU cores nobody measures how long they are held, but their CPU time.
    """
    return price_of(run.costs().get(stage, {}).get(f"{device_of(run)}_seconds"), per_hour)


def price_of_config(run: Run) -> float | None:
    """Return the price per device and hour of `execution.search`; None if it is 0."""
    limits = run.config.execution.search
    return (limits.price_per_gpu_hour if device_of(run) == "gpu" else limits.price_per_cpu_hour) or None
