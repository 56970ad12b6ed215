"""Trials that fail under the real Ray Tune: an error that is not ours, and a process that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs import merge_searcher
from ray_jobs.merge_searcher import run_trials
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.search_choice import choose, warnings_of
from ray_jobs.search_merges import make_plan
from ray_jobs.search_summary import describe_choice, describe_warnings
from ray_jobs.trial_log import MeasurementLog, TrialLog
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from safetydpo.search.plans import GenerationPlan
from safetydpo.search.space import build_space
from tests.ray.toy_trials import BASE, ToyTrial

pytestmark = pytest.mark.slow


def test_a_search_ends_with_what_its_other_trials_found(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 6 trials in generations of 3 the second always raises and the third kills its process: 4 have an answer."""
    monkeypatch.setattr(merge_searcher, "MergeTrial", ToyTrial)
    config = {
        "identity": {"search": {"trials": 6, "generation_size": 3, "methods": ["sum"], "plain_scales": {"sum": [0.5]}}},
        "execution": {"store": f"{tmp_path}/store", "run_dir": f"{tmp_path}/run", "num_workers": 1, "logical_cpus": 4},
    }
    run = Run(with_absolute_paths(Config.model_validate(config)))
    search = run.config.identity.search
    log = TrialLog(open_location(str(tmp_path / "trials")).make_folder())
    measurements = MeasurementLog(open_location(str(tmp_path / "measurements")).make_folder())
    plan = make_plan(run, build_space(search, ("hate", "violence"), density_methods=()), log, measurements, base=BASE)
    assert isinstance(plan, GenerationPlan)
    first = [task.candidate for task in plan.open_tasks()]
    evaluator = {
        "config": run.config.model_dump(mode="json"),
        "prompts": ["a red ball"],
        "raises": [first[1].hash],
        "dies": [first[2].hash],
    }
    run_trials(run, plan, (log, measurements), evaluator, {0: BASE})
    rows = log.rows()
    assert [row["status"] for row in rows] == ["ok", "error", "error", "ok", "ok", "ok"]
    told = "the trial's process ended without an answer 3 times: "
    assert rows[1]["error"] == f"{told}RuntimeError: the device has had enough"
    assert rows[2]["error"].startswith(told)
    assert "died" in rows[2]["error"]
    made = choose(log, BASE, search)
    assert made["counts"] == {"trials": 6, "failed": 2}
    assert made["details"]["trial"] in (0, 3, 4, 5)
    details = {**made["details"], **warnings_of(made["details"], log, search)}
    assert describe_choice(details, search).startswith("chosen trial")
    (warning,) = describe_warnings(details, search)
    assert warning.startswith("2 of 6 trials failed, the first one for")
    assert "the device has had enough" in warning
