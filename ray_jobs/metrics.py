"""What a run tells Prometheus, through Ray's own metrics: each node's agent exports them with `ray_` before the name.

Every series bears `run` and `stage`. Counters are counted where the work is done, gauges set by the command. The names
stand here and in the dashboard `configs/cluster/grafana.json`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ray_jobs.run_context import current

GPU_SECONDS = 5.0
"""Between two looks at how busy a GPU is."""


@dataclass(frozen=True)
class Metric:
    """One exported number."""

    kind: Literal["Counter", "Gauge"]
    description: str
    tags: tuple[str, ...] = ()
    """Beside `run` and `stage`."""


METRICS = {
    "safetydpo_done": Metric("Gauge", "Finished units: pictures, steps, experts, trials", ("work",)),
    "safetydpo_wanted": Metric("Gauge", "Units that there will be", ("work",)),
    "safetydpo_rows": Metric("Counter", "Rows made by pool workers: pictures, verdicts, latents", ("work",)),
    "safetydpo_training_pairs": Metric("Counter", "Pairs that trainings of experts have seen"),
    "safetydpo_best_objective": Metric("Gauge", "Objective of the search's best trial so far; lower is better"),
    "safetydpo_gpu_utilisation": Metric("Gauge", "Share of time in which the GPU of a worker was busy"),
}


def set_gauge(name: str, value: float, **tags: str) -> None:
    """Export a value; outside of a run nothing."""
    if current().run:
        _metric(name).set(value, tags=_tags(tags))


def count(name: str, number: float, **tags: str) -> None:
    """Add to a counter; outside of a run, or of nothing, nothing."""
    if current().run and number > 0:
        _metric(name).inc(number, tags=_tags(tags))


def _tags(tags: dict[str, str]) -> dict[str, str]:
    return {"run": current().run, "stage": current().stage, **tags}


@lru_cache(maxsize=len(METRICS))
def _metric(name: str) -> Any:
    import ray.util.metrics

    metric = METRICS[name]
    kind = getattr(ray.util.metrics, metric.kind)
    return kind(name, description=metric.description, tag_keys=("run", "stage", *metric.tags))


class GpuGauge:
    """Exports how busy this process's GPU is, now and then; without a GPU, or its driver's library, nothing."""

    def __init__(self) -> None:
        self._told = 0.0
        self._is_there: bool | None = None

    def look(self) -> None:
        """Export, unless that was done a moment ago."""
        if self._is_there is False or time.monotonic() - self._told < GPU_SECONDS:
            return
        self._told = time.monotonic()
        share = gpu_utilisation()
        self._is_there = share is not None
        if share is not None:
            set_gauge("safetydpo_gpu_utilisation", share)


def gpu_utilisation() -> float | None:
    """Return the share of time in [0, 1] in which this process's GPU was busy of late; None if nobody knows."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.utilization() / 100
    except (ImportError, RuntimeError):
        # torch asks NVIDIA's management library, which a machine may lack.
        return None
