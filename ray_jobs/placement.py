"""Placement groups of trainings: removed when their controller is gone, and nothing of that outlives the command.

Ray Train has a cleaner of its own for this, a detached actor per training. In Ray 2.60 it does not end itself when the
controller has died (`exit_actor` in a thread ends the thread), so that after a stopped job one process per lane stays
on the cluster for good. Written against the private parts of Ray 2.60, which pyproject.toml pins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from ray_jobs.group_keeper import GroupKeeper

NODE_LABEL = "ray.io/node-id"


def group_keeper() -> Any:
    """Return this command's keeper, from whichever of its processes; it ends with the process that asked first."""
    context = ray.get_runtime_context()
    return _keeper(context.namespace, context.get_job_id(), context.get_node_id())


@lru_cache(maxsize=1)
def _keeper(namespace: str, job: str, node: str) -> Any:
    kind = ray.remote(num_cpus=0, max_restarts=-1)(GroupKeeper)
    # Where the command runs: an actor that asks for no CPU may be put anywhere, and would be lost with that node.
    here = {NODE_LABEL: node}
    return kind.options(name=f"{namespace}-groups-{job}", get_if_exists=True, label_selector=here).remote()


class KeptGroups(WorkerGroupCallback):  # type: ignore[misc]  # ray ships no types
    """Tells the keeper of a training's placement group; runs in its controller."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell it before anything is trained."""
        state = worker_group.get_worker_group_state()
        controller = ray.get_runtime_context().get_actor_id()
        ray.get(self._keeper.keep.remote(controller, state.placement_group_handle.placement_group))


class KeptTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer without Ray's cleaner."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]
