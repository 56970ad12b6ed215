"""The keeper of placement groups on a real local Ray, and a worker's own log lines."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from ray_jobs.placement import group_keeper
from ray_jobs.run_context import enter, within
from tests.ray.smoke_place import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


class Controller:
    """As Ray Train's does, it makes a placement group and tells the keeper."""

    def __init__(self, keeper: Any) -> None:
        self._group = placement_group([{"CPU": 0.5}])
        ray.get(keeper.keep.remote(ray.get_runtime_context().get_actor_id(), self._group))

    def group(self) -> Any:
        return self._group


def test_a_controller_that_dies_leaves_no_placement_group_while_the_command_goes_on():
    keeper = group_keeper()
    actor = ray.remote(num_cpus=0)(Controller)
    dead, alive = actor.remote(keeper), actor.remote(keeper)
    groups = [ray.get(each.group.remote()) for each in (dead, alive)]
    ray.kill(dead)
    assert wait_for(lambda: placement_group_table(groups[0])["state"] == "REMOVED", seconds=30)
    assert placement_group_table(groups[1])["state"] == "CREATED"
    namespace = ray.get_runtime_context().namespace
    assert any(name.startswith(f"{namespace}-groups-") for name in ray.util.list_named_actors())
    ray.kill(alive)
    assert wait_for(lambda: placement_group_table(groups[1])["state"] == "REMOVED", seconds=30)


@ray.remote(num_cpus=0)
def _warn(told: Mapping[str, str]) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        enter(told)
        with within(expert="hate"):
            logging.getLogger("ray_jobs.lanes").warning("a spike")
    return said.getvalue()


def test_a_workers_line_says_run_stage_and_expert():
    with within(run="smoke-1", stage="train") as place:
        line = ray.get(_warn.remote(place.told()))
    assert line.endswith("WARNING [run=smoke-1 stage=train expert=hate] ray_jobs.lanes: a spike\n")
