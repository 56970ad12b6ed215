"""What the report reads from the store beside the scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.report_sources import read_costs
from ray_jobs.run import Run
from ray_jobs.trial_log import MeasurementLog
from safetydpo.artifacts.records import ArtifactKey, Record
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import Config, ExecutionConfig
from safetydpo.search.space import Candidate

CANDIDATE = Candidate("sum", 0.7, (("hate", 1.0), ("violence", 0.5)))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Config(name="costs", execution=ExecutionConfig(store=f"{tmp_path}/store", run_dir=f"{tmp_path}/run")))


def closed_search(run: Run, drawn: Mapping[tuple[str, int], int] | None) -> Record:
    """A closed search that drew so many pictures for (base or candidate, rung); None = it kept no account."""

    def make(folder: Location) -> Mapping[str, Any]:
        if drawn is not None:
            log = MeasurementLog((folder / "measurements").make_folder())
            for number, ((who, rung), pictures) in enumerate(drawn.items()):
                result = {"status": "ok", "objective": 0.0, "metrics": "{}", "error": "", "pictures": pictures}
                result |= {"started_at": float(number), "seconds": 1.0}
                log.add(None if who == "base" else CANDIDATE, rung, result)
        return {"fingerprint": "f", "counts": {"trials": 2, "failed": 0}}

    return run.make(ArtifactKey("search", "costs", {"drawn": sorted(map(str, drawn or ()))}, {}, 1), make)


def test_a_search_without_a_ladder_says_how_many_pictures_it_drew(run: Run) -> None:
    """The base's 26 and a candidate's 26."""
    record = closed_search(run, {("base", 0): 26, ("candidate", 0): 26})
    cost = {one.stage: one for one in read_costs(run, {"search": [record]})}["search"]
    assert (cost.pictures, cost.detail) == (52, "2 trials, 0 failed")


def test_pictures_of_rungs_of_the_full_evaluation_and_of_finalists_count(run: Run) -> None:
    """A rung that draws nothing, one of 8, the full evaluation of 26 and a finalist's fresh 26, and the base's: 120."""
    drawn = {("base", 1): 8, ("base", 2): 26, ("base", 3): 26}
    drawn |= {("candidate", 0): 0, ("candidate", 1): 8, ("candidate", 2): 26, ("candidate", 3): 26}
    record = closed_search(run, drawn)
    assert read_costs(run, {"search": [record]})[3].pictures == 120


def test_a_search_that_kept_no_account_says_nothing(run: Run) -> None:
    assert read_costs(run, {"search": [closed_search(run, None)]})[3].pictures is None
    assert read_costs(run, {})[3].pictures is None
