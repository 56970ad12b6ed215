"""A train function on Ray Train's workers: resources, retries, and errors of ours as they were raised."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ray_jobs.run import Run
from safetydpo.errors import SafetyDPOError, UsageError

WORKER_FAILURES = 2
"""Times a run starts its workers again: they died, or something failed that is no error of ours."""
CONTROLLER_FAILURES = 3


def train_on_workers(
    run: Run,
    function: Callable[[Mapping[str, Any]], Any],
    settings: Mapping[str, Any],
    *,
    name: str,
    state: str,
    num_workers: int = 1,
    node: str | None = None,
) -> Any:
    """Run `function(settings)` on `num_workers` workers of a TorchTrainer; return what it returned on the first.

    `state` is a folder for Ray's own files. With `node`, a node's id, all workers run there.

    Raises:
        SafetyDPOError: the one that `function` raised on a single worker, at once: bad data is as bad at the next
            attempt.
        Exception: Ray's, if the workers died, or one of several failed, more than `WORKER_FAILURES` times.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from ray_jobs.placement import NODE_LABEL, KeptGroups, KeptTrainer, group_keeper

    execution = run.config.execution
    resources: dict[str, float] = {"CPU": execution.cpus_per_worker}
    if execution.gpus_per_worker > 0:
        resources["GPU"] = execution.gpus_per_worker

    def guarded(loop_settings: Mapping[str, Any]) -> Mapping[str, Any]:
        return _call(function, loop_settings)

    result = KeptTrainer(
        guarded,
        train_loop_config=dict(settings),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=execution.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector={**execution.label_selector, **({NODE_LABEL: node} if node else {})} or None,
        ),
        # NCCL refuses two processes on one GPU.
        torch_config=TorchConfig(backend="nccl" if execution.gpus_per_worker >= 1 else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=state,
            callbacks=[KeptGroups(group_keeper()), *([_watcher_on(node)] if node else [])],
            failure_config=FailureConfig(max_failures=WORKER_FAILURES, controller_failure_limit=CONTROLLER_FAILURES),
        ),
    ).fit()
    returned = result.return_value
    if "message" in returned:
        kind = UsageError if returned["kind"] == UsageError.__name__ else SafetyDPOError
        raise kind(returned["message"])
    return returned["value"]


def _watcher_on(node: str) -> Any:
    """Return Ray Train's own watcher for preemption notices, on this node; Ray's default one is not started.

    Ray puts an actor that asks for no CPU on any node. On the head one takes 190 MB for each run, and one on a third
    node dies with that. Written against the private parts of Ray 2.60, which pyproject.toml pins.
    """
    import ray
    from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
    from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
    from ray.train.v2._internal.execution import preemption

    from ray_jobs.placement import NODE_LABEL

    # Handed on to the controller by Ray Train.
    os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"

    class Watcher(PreemptionCallback):  # type: ignore[misc]
        def after_worker_group_start(self, worker_group: Any) -> None:
            self._stop_watcher()
            ranks: dict[str, list[int]] = {}
            actors: dict[int, Any] = {}
            for worker in worker_group.get_workers():
                rank = worker.distributed_context.world_rank
                ranks.setdefault(worker.metadata.node_id, []).append(rank)
                actors[rank] = worker.actor
            kind = ray.remote(num_cpus=0, max_restarts=-1, label_selector={NODE_LABEL: node})(
                preemption.PreemptionWatcher
            )
            self._watcher = kind.remote(
                node_to_ranks=ranks, poll_interval_s=self._poll_interval_s, worker_actors_by_rank=actors
            )

    return Watcher()


def _call(function: Callable[[Mapping[str, Any]], Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call the function; return an error of ours as a value, because Ray tries again after one that is raised.

    Among several workers it is raised all the same: the others may be waiting for this one.
    """
    import ray.train

    try:
        return {"value": function(settings)}
    except SafetyDPOError as error:
        if ray.train.get_context().get_world_size() > 1:
            raise
        return {"kind": type(error).__name__, "message": str(error)}
