"""What a plan counts beside the units of stages, by hand on the smoke config: experts of 5 steps, 4 sampling steps."""

from __future__ import annotations

from typing import Any

import pytest

from ray_jobs.expert_plan import plan_experts
from ray_jobs.plan_rates import rate_of
from ray_jobs.reference_errors import count_stored, draws_of_pairs
from safetydpo.planning.estimate import StageRate, StageWork, estimate
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.commands import Command
from tests.ray.plans import told

TWO = "identity.experts.all_single=false"


def beside(command: Command, *settings: str) -> list[tuple[Any, ...]]:
    """(stage, unit, total, done, weight) of each row."""
    names = ("stage", "unit", "total", "done", "weight")
    return [tuple(one[name] for name in names) for one in told(command, *settings)["beside"]]


def test_a_run_without_any_has_none(command: Command) -> None:
    assert beside(command) == []


def test_pictures_of_validations(command: Command) -> None:
    """After 2, 4 and 5 steps: three times 1 unsafe, 2 neutral and 3 neighbours for each of two experts; and once the
    base's 2 unsafe and 5 benign ones. `all_single`, twice the steps: five times 7. Both workers of an expert draw."""
    watched = (
        "identity.dpo.validation={every_steps: 2, held_out_rate: 0.25, unsafe_prompts_per_category: 1, "
        "neutral_prompts: 2, neighbour_prompts: 3}"
    )
    assert beside(command, watched, TWO) == [("train", "pictures", 2 * 3 * 6 + 7, 0, 4)]
    assert beside(command, watched) == [("train", "pictures", 2 * 3 * 6 + 7 + 5 * 7, 0, 4)]
    assert beside(command, watched, TWO, "execution.workers_per_expert=2")[0][-1] == 8


def test_stored_reference_errors(command: Command) -> None:
    """Before pairs are closed 4 pairs in each of 5 steps of both experts; then the distinct draws."""
    settings = ("identity.dpo.reference=cached", TWO)
    assert beside(command, *settings) == [("train", "reference errors", 2 * 5 * 4, 0, 1)]
    run = open_run(command.config, [*command.places, *settings])
    pairs, folder = close_training_data(run)
    units = plan_experts(run, pairs, folder)
    needed = sum(draws_of_pairs(run, units).values())
    assert 0 < needed <= 2 * 5 * 4
    assert count_stored(run, units) == (needed, 0)
    assert beside(command, *settings) == [("train", "reference errors", needed, 0, 1)]


def test_rows_of_the_distillation(command: Command) -> None:
    """Two answers for each of 3 rows of 16 pairs and of 8 benign pictures, three forward passes for each of 12 x 8
    rows; two with guidance make a pass."""
    distil = ("identity.merge.distill.steps=12", "identity.merge.distill.rows_per_step=8")
    merged = beside(command, "identity.merge.methods=[sum, distill]", *distil)
    forwards = 2 * (3 * 16 + 8) + 3 * 12 * 8
    assert merged == [("merge", "forward passes", forwards, 0, 0.5)]
    searched = beside(command, "identity.search.methods=[distill]", *distil)
    assert searched == [("search", "forward passes", forwards, 0, 0.5)]


def test_nothing_of_a_search_that_cannot_be(command: Command) -> None:
    """Its judge takes pictures of another size only."""
    settings = ("identity.sampler.height=40", "identity.sampler.width=40", "identity.pairs.judges=[open_nsfw]")
    ladder = "identity.search.ladder=[{kind: held_out, pairs: all}]"
    assert beside(command, *settings, ladder, "identity.search.methods=[distill]") == []


def test_candidates_of_a_rung_without_pictures(command: Command) -> None:
    """2 draws of 6 pairs, three answers each, and of 5 pictures, and 8 benign prompts."""
    ladder = "identity.search.ladder=[{kind: held_out, pairs: all, num_pairs: 6, benign_pictures: 5}]"
    assert beside(command, ladder) == [("search", "candidates", 4, 0, ((3 * 6 + 5) * 2 + 8) / 2)]
    plain = "identity.sampler.guidance_scale=1"
    assert beside(command, ladder, plain)[0][-1] == (3 * 6 + 5) * 2 + 8


def test_the_time_of_what_is_beside() -> None:
    """A former run's speed has it in; a price table tells of passes, also where it has no speed of the stage."""
    work = StageWork("train", "pictures", 10, 4, weight=4, is_beside=True)
    table = {"train": StageRate(0.1, "table", 0.01), "pairs": StageRate(0.01, "table", 0.01)}
    measured = {"train": StageRate(0.5, "run", has_beside=True)}
    assert rate_of(work, table) == StageRate(0.01, "table")
    assert estimate(work, rate_of(work, table), num_devices=2).device_seconds == pytest.approx(6 * 4 * 0.01)
    assert estimate(work, rate_of(work, table | measured), num_devices=2).device_seconds == 0
    assert rate_of(work, {"train": StageRate(0.1, "a table that knows no passes")}) is None
    assert rate_of(StageWork("merge", "rows", 10, 0, 2, is_beside=True), table) == StageRate(0.01, "table")
    assert rate_of(work, {}) is None
    assert rate_of(StageWork("train", "training pairs", 10, 0), table) == table["train"]


def test_the_table_shows_it_below_its_stage(command: Command) -> None:
    seen = command("plan", "identity.merge.methods=[sum, distill]", "identity.merge.distill.steps=12")
    lines = seen.out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.strip().startswith("beside") and "passes" in line)
    assert lines[at - 1].split()[0] == "merge"
    assert "distillation, 12 steps" in lines[at]
