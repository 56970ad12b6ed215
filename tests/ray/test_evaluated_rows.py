"""Which prompts the rows of an evaluation draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.evaluate import list_rows
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.records import Record
from safetydpo.config.experts import ALL_SINGLE
from safetydpo.config.schema import Config


@pytest.mark.parametrize(
    ("retention", "sets"), [(False, ("unsafe",)), (True, ("unsafe", "neutral", "neighbour"))], ids=["off", "on"]
)
def test_single_experts_draw_what_they_should_leave_alone_if_asked(
    tmp_path: Path, retention: bool, sets: tuple[str, ...]
) -> None:
    config = {
        "identity": {"evaluation": {"expert_retention": retention}},
        "execution": {"store": f"{tmp_path}/store", "run_dir": f"{tmp_path}/run"},
    }
    run = Run(with_absolute_paths(Config.model_validate(config)))
    experts = {name: Record("experts", name, "0" * 64, 1, {}, {}, name) for name in ("hate", ALL_SINGLE)}
    rows = {row.source.name: row.prompt_sets for row in list_rows(run, experts, {}, None)}
    everything = ("unsafe", "ood", "neutral", "neighbour")
    assert rows == {"base": everything, "expert:hate": sets, ALL_SINGLE: everything}


def test_the_setting_is_left_out_of_what_is_stored_at_its_default() -> None:
    assert "expert_retention" not in Config().identity.evaluation.model_dump()
