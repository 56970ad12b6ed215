"""What a stage uses: CPU time of this process and of all processes of its local Ray, and GPUs held.

Processes of Ray come and go within a stage, and nothing adds up their CPU time when they are gone. So the process tree
is looked at now and then; what a process did between the last look and its end is lost (a fraction of a per cent).
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType

import psutil
import ray

from ray_jobs.busy_time import worker_seconds
from safetydpo.config.schema import ExecutionConfig

LOOK_EVERY_SECONDS = 2.0
ProcessKey = tuple[int, float]
"""Process id and the time of its start: ids are used again."""


class CostMeter:
    """Measures what is used between entering and leaving it."""

    def __init__(self, execution: ExecutionConfig) -> None:
        """Measure nothing yet.

        Args:
            execution: Whether its workers are processes of this machine; those of a cluster cannot be seen from here.
        """
        self._is_local, self._max_gpus = runs_on_local_ray(execution), execution.max_gpus
        self._gpus_per_worker = execution.gpus_per_worker
        self._workers_before = self._workers_after = 0.0
        self._before: dict[ProcessKey, float] = {}
        self._latest: dict[ProcessKey, float] = {}
        self._started = self._stopped = 0.0
        self._gpus: float | None = None
        self._leave = threading.Event()
        self._watch = threading.Thread(target=self._look_on, name="cost-meter", daemon=True)

    def __enter__(self) -> CostMeter:
        """Begin."""
        self._started = time.time()
        self._workers_before = worker_seconds()
        self._before = cpu_times() if self._is_local else {}
        self._latest = dict(self._before)
        if self._is_local:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End; an error passes."""
        self._leave.set()
        if self._is_local:
            self._watch.join()
            self._latest.update(cpu_times())
        self._stopped, self._workers_after = time.time(), worker_seconds()
        if ray.is_initialized():
            self._gpus = gpus_held(float(ray.cluster_resources().get("GPU", 0.0)), self._max_gpus)

    def cost(self) -> dict[str, float | None]:
        """Return `cpu_seconds` and `gpu_seconds`, None = not measured; of workers with GPUs also `pool_gpu_seconds`.

        The last are those in which workers of pools were at work, x GPUs of each.
        """
        cpu = sum(seconds - self._before.get(key, 0.0) for key, seconds in self._latest.items())
        gpu = None if self._gpus is None else self._gpus * (self._stopped - self._started)
        cost = {"cpu_seconds": cpu if self._is_local else None, "gpu_seconds": gpu}
        if self._gpus_per_worker > 0:
            cost["pool_gpu_seconds"] = (self._workers_after - self._workers_before) * self._gpus_per_worker
        return cost

    def _look_on(self) -> None:
        while not self._leave.wait(LOOK_EVERY_SECONDS):
            self._latest.update(cpu_times())


def gpus_held(there: float, max_gpus: float | None) -> float:
    """Return for how many GPUs of a cluster a run answers: for all, or for its cap where others use the rest."""
    return there if max_gpus is None else min(there, max_gpus)


def cpu_times() -> dict[ProcessKey, float]:
    """Return CPU seconds so far of this process and of each of its descendants that is alive."""
    me = psutil.Process()
    found = {}
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            # It ended while we looked.
            continue
    return found


def runs_on_local_ray(execution: ExecutionConfig) -> bool:
    """Return whether a run starts a Ray of its own, whose processes descend from this one."""
    return execution.ray_address is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
