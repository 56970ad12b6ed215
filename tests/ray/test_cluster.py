from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

from ray_jobs import cluster as cluster_module
from ray_jobs.cluster import check_resources, connect, keep_credentials_from_trials
from ray_jobs.resources import workers_for
from ray_jobs.state_folder import ray_state_folder
from safetydpo.artifacts.object_store import SECRET_VARIABLES
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.errors import UsageError


def test_the_folder_of_rays_state_goes_with_its_block():
    with ray_state_folder() as folder:
        (Path(folder) / "state").write_text("x")
    assert not Path(folder).exists()


def test_trials_are_not_handed_credentials_which_ray_would_log(monkeypatch: pytest.MonkeyPatch):
    """Looks at the environment that Ray Tune itself puts together for a trial's process."""
    from ray.tune.execution import class_cache

    class Trial:
        pass

    for name in SECRET_VARIABLES:
        monkeypatch.setenv(name, "hush")
    keep_credentials_from_trials()
    handed_on = class_cache._ActorClassCache().get(Trial)._default_options["runtime_env"]["env_vars"]
    assert "PL_DISABLE_FORK" in handed_on
    assert "hush" not in handed_on.values()


@pytest.mark.parametrize(
    ("message", "failures", "starts"),
    [("The current node timed out during startup.", 2, 3), ("timed out during startup", 3, 3), ("no space", 1, 1)],
)
def test_a_local_ray_that_comes_up_too_slowly_is_started_again(
    monkeypatch: pytest.MonkeyPatch, message: str, failures: int, starts: int
):
    """Two slow starts and a good one; three slow ones, or another error: Ray's own exception. No Ray is started."""
    calls: list[dict[str, object]] = []
    flag = "RAY_prestart_worker_first_driver"
    before = dict(os.environ)

    def init(**arguments: object) -> None:
        calls.append({**arguments, "prestart": os.environ[flag]})
        if len(calls) <= failures:
            raise Exception(message)

    monkeypatch.setattr(cluster_module.ray, "init", init)
    monkeypatch.setattr(cluster_module.ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster_module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster_module, "check_resources", lambda _execution, **_rest: None)
    if failures < starts:
        connect(Config())
    else:
        with pytest.raises(Exception, match=message):
            connect(Config())
    assert len(calls) == starts
    assert all(call["prestart"] == "0" and call["address"] == "local" for call in calls)
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    assert not any(name.startswith(("OMP", "DS_", "MALLOC", "RAY_prestart")) for name in changed)


def test_processes_of_a_distillation_are_asked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch):
    """Three processes on two CPUs: refused where the run distils, whatever the stage, and not where it does not."""
    monkeypatch.setattr(cluster_module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster_module.ray, "cluster_resources", lambda: {"CPU": 2.0})
    distill = {"processes": 3, "rows_per_step": 6, "benign_rate": 0.5}
    for methods, refused in ((["sum"], False), (["sum", "distill"], True)):
        identity = {"merge": {"distill": distill}, "search": {"methods": methods}}
        config = Config.model_validate({"identity": identity, "execution": {"num_workers": 1}})
        if refused:
            with pytest.raises(
                UsageError, match=r"expected 3 CPUs \(identity\.merge\.distill\.processes 3 x .* found 2"
            ):
                connect(config)
        else:
            connect(config)


@pytest.mark.parametrize(
    ("tasks", "passes", "wanted"),
    [(6, 4, 1), (12, 4, 1), (17, 4, 2), (16, 10, 3), (100, 10, 4), (3, 64, 3), (1, 1000, 1), (0, 64, 1)],
)
def test_small_work_gets_fewer_processes(tasks: int, passes: int, wanted: int):
    """A process per 64 passes, at most 4, at most one per task: 17 batches x 4 = 68 passes -> 2."""
    assert workers_for(ExecutionConfig(num_workers=4), tasks=tasks, passes_per_task=passes) == wanted


@pytest.mark.slow
def test_a_second_call_joins_what_is_there(cluster: None, small: Config):
    before = ray.get_runtime_context().get_node_id()
    connect(small)
    assert ray.get_runtime_context().get_node_id() == before
    assert ray.cluster_resources()["CPU"] == 4


@pytest.mark.slow
def test_what_fits_is_let_through(cluster: None):
    check_resources(ExecutionConfig(cpus_per_worker=2), num_workers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (
            {"num_workers": 3, "cpus_per_worker": 1.5},
            r"expected 5\.5 CPUs \(execution\.num_workers 3 x execution\.cpus_per_worker 1\.5, and 1 that reads and "
            r"writes\), "
            r"found 4 in the cluster: lower either, or add nodes",
        ),
        (
            {"num_workers": 4},
            r"expected 5 CPUs \(execution\.num_workers 4 x execution\.cpus_per_worker 1, and 1 that reads and writes\)",
        ),
        (
            {"gpus_per_worker": 1},
            r"expected 2 GPUs \(execution\.num_workers 2 x execution\.gpus_per_worker 1\), found 0 in the cluster",
        ),
    ],
)
def test_more_than_the_cluster_has(cluster: None, execution: dict[str, float], message: str):
    asked = ExecutionConfig.model_validate(execution)
    with pytest.raises(UsageError, match=message):
        check_resources(asked, num_workers=asked.num_workers, spare_cpus=1)
