"""Comparators tuned by tasks of a real local Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_jobs.baselines import CANDIDATES_FILE, comparator_key, measure_here, tune
from ray_jobs.baselines_tuning import tune_comparators
from ray_jobs.run import Run
from safetydpo.artifacts.records import Record
from safetydpo.config.schema import Config
from tests.ray.closed_artifacts import open_run
from tests.ray.fresh_process import in_fresh_process
from tests.ray.smoke_place import SMOKE

pytestmark = pytest.mark.slow
SETTINGS = [
    "identity.search.trials=3",
    "identity.search.prompts_per_category=1",
    "identity.search.neutral_prompts=2",
    "identity.search.neighbour_prompts=2",
    "identity.evaluation.comparators=[uce]",
]


def rates_of(run: Run) -> list[object]:
    lines = (run.folder(comparator_key(run, "uce")) / CANDIDATES_FILE).read_bytes().decode().splitlines()
    return [(json.loads(line)["fingerprint"], json.loads(line)["metrics"]) for line in lines]


def tune_here(config: dict[str, object]) -> Record:
    run = Run(Config.model_validate(config))
    return tune(run, "uce", measure_here(run))


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_two_tasks_measure_what_one_process_does(tmp_path: Path) -> None:
    here, there = (
        open_run(SMOKE, [f"store={tmp_path}/{name}", f"run_dir={tmp_path}/{name}-run", *SETTINGS])
        for name in ("here", "there")
    )
    expected = in_fresh_process(tune_here, here.config.model_dump(mode="json"))
    records = tune_comparators(there)
    assert records["uce"].fingerprint == expected.fingerprint
    assert rates_of(there) == rates_of(here)
    # Closed: nothing is measured again.
    assert tune_comparators(there) == records
