from __future__ import annotations

import os
from typing import Any

import pytest

from ray_jobs.resources import at_most, for_stage, most_workers, own_nodes, task_options, workers_for
from ray_jobs.run import Run, run_id
from ray_jobs.stage_use import num_devices
from safetydpo.config.schema import Config, ExecutionConfig


@pytest.mark.parametrize(
    ("settings", "each", "wanted"),
    [
        ({"num_workers": 8}, 1, 8),
        ({"num_workers": 8, "gpus_per_worker": 1, "max_gpus": 3}, 1, 3),
        ({"num_workers": 8, "gpus_per_worker": 1, "max_gpus": 3}, 2, 1),
        ({"num_workers": 8, "gpus_per_worker": 0.1, "max_gpus": 0.3}, 1, 3),
        ({"num_workers": 2, "gpus_per_worker": 1, "max_gpus": 30}, 1, 2),
        ({"num_workers": 8, "max_gpus": 1}, 1, 8),
    ],
    ids=["no cap", "cap", "two each", "fractions", "large cap", "no GPUs"],
)
def test_no_more_workers_than_the_cap_has_gpus_for(settings: dict[str, Any], each: int, wanted: int):
    """3 GPUs at 1 each are 3 workers; at 2 processes of 1 each, 1; without GPUs a cap says nothing."""
    execution = ExecutionConfig(**settings)
    assert most_workers(execution, processes_each=each) == wanted
    assert workers_for(execution, tasks=100, passes_per_task=64, processes_each=each) == wanted


def test_a_cap_leaves_one_worker():
    assert at_most(5, 0.5, 1.0) == 1


def test_a_stage_has_the_smaller_cap():
    execution = ExecutionConfig(num_workers=8, gpus_per_worker=1, max_gpus=4, stage_max_gpus={"train": 2, "pairs": 6})
    run = Run(Config(execution=execution), made=["x"])
    found = {stage: most_workers(for_stage(run, stage).config.execution) for stage in ("pairs", "train", "evaluate")}
    assert found == {"pairs": 4, "train": 2, "evaluate": 4}
    assert for_stage(run, "train").made is run.made


def test_a_task_asks_for_one_workers_share_on_the_runs_nodes():
    execution = ExecutionConfig(cpus_per_worker=2, gpus_per_worker=0.5, label_selector={"team": "a"})
    assert task_options(execution) == {"num_cpus": 2, "num_gpus": 0.5, "label_selector": {"team": "a"}}
    assert task_options(ExecutionConfig(), with_gpu=False) == {"num_cpus": 1, "num_gpus": 0}


def test_nodes_that_are_gone_or_of_others_are_not_ours():
    nodes = [
        {"Alive": True, "NodeID": "a", "Labels": {"team": "a"}},
        {"Alive": False, "NodeID": "b", "Labels": {"team": "a"}},
        {"Alive": True, "NodeID": "c", "Labels": {}},
    ]
    assert [node["NodeID"] for node in own_nodes(nodes, ExecutionConfig(label_selector={"team": "a"}))] == ["a"]
    assert [node["NodeID"] for node in own_nodes(nodes, ExecutionConfig())] == ["a", "c"]


def test_runs_of_one_name_are_two_if_user_or_folders_differ(monkeypatch: pytest.MonkeyPatch):
    """However a folder is written; and the same run is the same one each time."""

    def named(user: str, **places: str) -> str:
        monkeypatch.setenv("LOGNAME", user)
        return run_id(Config(name="same", execution=ExecutionConfig(**places)))

    mine = named("ann", store="/s", run_dir="runs/x")
    assert mine == named("ann", store="/s", run_dir=f"{os.getcwd()}/runs/x")
    others = [named("bob", store="/s", run_dir="runs/x"), named("ann", store="/s", run_dir="runs/y")]
    others.append(named("ann", store="s3://s", run_dir="runs/x"))
    assert len({mine, *others}) == 4
    assert all(name.startswith("same-") and len(name) == len("same-") + 8 for name in (mine, *others))


def test_devices_that_a_plan_counts_on_are_within_the_cap():
    """Six workers on half a GPU each are three GPUs, or two if no more may be reserved; or six CPUs."""

    def devices(**settings: Any) -> float:
        return num_devices(Run(Config(execution=ExecutionConfig(num_workers=6, **settings))))

    assert devices(gpus_per_worker=0.5) == 3
    assert devices(gpus_per_worker=0.5, max_gpus=2.2) == 2
    assert devices() == 6
