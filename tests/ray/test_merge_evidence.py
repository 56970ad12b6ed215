"""Which merges are measured, what decides their numbers, and the pages of synthetic records; nothing is drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_jobs import merge_bench, merge_evidence
from ray_jobs.merge_evidence import measure_merges
from ray_jobs.merge_evidence_plan import PlannedMerge, ordered_concepts, plan_merges, unit_config
from ray_jobs.merge_evidence_tables import write_merge_tables
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.demo.concepts import get_concept
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.merge_units import dump_merge_unit
from safetydpo.merging.registry import METHODS
from tests.evaluation.measured_merges import make_merge
from tests.ray.commands import Command
from tests.ray.tiny_merges import EMPTY_PAGE, tiny_settings

NO_FACTOR_METHODS = "merge_evidence.factor_methods=[]"
GRID = [
    NO_FACTOR_METHODS,
    "merge_evidence.methods=[sum, ties]",
    "merge_evidence.counts=[1, 5]",
    "merge_evidence.factor_counts=[5]",
    "merge_evidence.factors=[rank_2r, independent]",
    "merge_evidence.seeds=[0, 1]",
    "merge_evidence.screen_count=5",
]


@pytest.fixture
def shipped(configs: Path) -> Config:
    return load_config(configs / "merge_evidence.yaml")


@pytest.fixture
def tiny(configs: Path, tmp_path: Path) -> Config:
    return load_config(configs / "smoke.yaml", tiny_settings(tmp_path))


def planned(config: Config, **changes: Any) -> PlannedMerge:
    return PlannedMerge(config, **{"method": "sum", "count": 10, "seed": 0, "factor": "main", **changes})


def write_records(config: Config) -> None:
    for unit in plan_merges(config):
        made = make_merge(unit.method, unit.count, seed=unit.seed, factor=unit.factor)
        unit.file.write_bytes(dump_merge_unit(replace(made, identity_hash=unit.identity_hash)).encode())


def test_the_screen_has_every_method_once_and_the_distillation_last(shipped: Config) -> None:
    units = plan_merges(shipped, part="screen")
    assert sorted(unit.method for unit in units) == sorted(METHODS)
    assert units[-1].method == "distill"
    assert {(unit.count, unit.seed, unit.factor) for unit in units} == {(10, 0, "main")}
    assert all(len(unit.tunings) == 18 for unit in units)


def test_units_come_in_the_order_of_work_and_once(configs: Path) -> None:
    """21 of the screen, 2 of which the grid has again; 2 x 2 x 2 - 2 of the grid; all_single twice; 2 factors x 2."""
    config = load_config(configs / "merge_evidence.yaml", GRID)
    units = plan_merges(config)
    keys = [(unit.method, unit.count, unit.seed, unit.factor) for unit in units]
    assert len(keys) == len(set(keys)) == 21 + 6 + 2 + 4
    assert keys[21:25] == [("sum", 1, 0, "main"), ("ties", 1, 0, "main"), ("sum", 1, 1, "main"), ("ties", 1, 1, "main")]
    assert keys[27:29] == [("all_single", 5, 0, "main"), ("all_single", 5, 0, "rank_sum")]
    assert keys[29:] == [(name, 5, 0, factor) for factor in ("rank_2r", "independent") for name in ("sum", "ties")]
    assert len({unit.file.name for unit in units}) == len(units)
    assert [unit.seed for unit in plan_merges(config, part="grid", method="ties", count=1)] == [0, 1]
    assert len(plan_merges(config, seed=1)) == 4


def test_smaller_sets_of_concepts_lie_within_larger_ones(shipped: Config) -> None:
    """Five concepts of five categories, seven of all seven, and none is more than one ahead of another."""
    for seed in (0, 1, 2):
        order = ordered_concepts(shipped.identity.prompts, seed)
        assert len(order) == len(set(order)) == 35
        for count in (1, 5, 7, 10, 20, 35):
            covered = planned(shipped, count=count, seed=seed).concepts
            assert covered == order[:count]
            numbers = Counter(get_concept(concept).categories[0] for concept in covered)
            assert max(numbers.values()) == -(-count // 7)
    assert len({ordered_concepts(shipped.identity.prompts, seed)[:1] for seed in (0, 1, 2, 3)}) > 1


def test_what_each_factor_changes(shipped: Config) -> None:
    def settings(**changes: Any) -> tuple[Any, ...]:
        identity = unit_config(planned(shipped, **changes)).identity
        return identity.lora.rank, identity.lora.init, identity.merge.output_rank, identity.merge.distill.rank

    assert settings() == (4, "shared", 4, 4)
    assert settings(factor="rank_2r") == (4, "shared", 8, 8)
    assert settings(factor="rank_sum") == (4, "shared", None, 40)
    assert settings(factor="independent") == (4, "independent", 4, 4)
    assert settings(factor="rank_1") == (1, "shared", 1, 1)
    assert settings(factor="rank_16") == (16, "shared", 16, 16)
    assert settings(method="all_single") == (4, "shared", None, 4)
    assert settings(method="all_single", factor="rank_sum")[:3] == (40, "shared", None)
    # A step of as many times the components moves as much at a rate as many times smaller.
    rates = [
        unit_config(planned(shipped, method="all_single", factor=factor)).identity.dpo.learning_rate
        for factor in ("main", "rank_sum")
    ]
    assert rates == [shipped.identity.dpo.learning_rate, shipped.identity.dpo.learning_rate / 10]


def test_one_adapter_for_all_has_their_pairs_and_as_many_times_the_steps(shipped: Config) -> None:
    unit = planned(shipped, method="all_single", count=7)
    identity = unit_config(unit).identity
    assert identity.dpo.steps == 7 * shipped.identity.dpo.steps
    assert list(identity.experts.groups) == list(unit.experts) == ["covered_7"]
    assert identity.experts.groups["covered_7"].concept == unit.concepts
    assert unit.merged_by == "sum"
    experts = unit_config(planned(shipped, count=7)).identity.experts
    assert [query.concept for query in experts.groups.values()] == [(concept,) for concept in unit.concepts]
    assert unit_config(planned(shipped, seed=2)).identity.seed == 2


def test_the_identity_of_a_unit_changes_with_what_decides_it(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_of(*settings: str, **changes: Any) -> str:
        return planned(load_config(configs / "merge_evidence.yaml", list(settings)), **changes).identity_hash

    before = hash_of()
    others = [hash_of(**change) for change in ({"count": 7}, {"seed": 1}, {"factor": "rank_2r"}, {"method": "svd"})]
    others += [hash_of("identity.dpo.steps=41"), hash_of("merge_evidence.full={unsafe: 50, benign: 26}")]
    assert len({before, *others}) == 7
    lists = ["merge_evidence.seeds=[0]", "merge_evidence.methods=[sum]", "merge_evidence.results=elsewhere"]
    assert hash_of(*lists, "identity.search.trials=3", "execution.num_workers=2") == before
    # Only a distillation depends on how one is trained.
    assert hash_of("identity.merge.distill.steps=90") == before
    assert hash_of("identity.merge.distill.steps=90", method="distill") != hash_of(method="distill")
    monkeypatch.setattr(merge_bench, "RECIPE_VERSION", merge_bench.RECIPE_VERSION + 1)
    assert hash_of() != before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"part": "grids"}, r"expected a part of merge_evidence \(screen, grid, factors\), found 'grids'"),
        ({"seed": 4}, r"expected a seed of merge_evidence \(0, 1, 2\), found 4"),
        ({"method": "all_single"}, "expected a method of merge_evidence .*found 'all_single': choose one"),
        ({"count": 3}, r"expected a count of merge_evidence \(10\), found 3"),
        ({"part": "grid", "count": 3}, "since merge_evidence names no methods"),
    ],
)
def test_what_there_is_not_is_refused(configs: Path, choice: dict[str, Any], message: str) -> None:
    """Of a screen alone."""
    screen = load_config(configs / "merge_evidence.yaml", ["merge_evidence.methods=[]", NO_FACTOR_METHODS])
    with pytest.raises(UsageError, match=message):
        plan_merges(screen, **choice)


def test_methods_and_numbers_that_there_are_not(configs: Path) -> None:
    with pytest.raises(UsageError, match="expected a merge method out of .*found 'tie': correct merge_evidence"):
        plan_merges(load_config(configs / "merge_evidence.yaml", ["merge_evidence.methods=[tie]"]))
    with pytest.raises(UsageError, match=r"as many experts as there are unsafe concepts \(35\).*found 36"):
        plan_merges(load_config(configs / "merge_evidence.yaml", ["merge_evidence.screen_count=36"]))


def test_what_is_done_is_not_done_again(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tiny)
    said: list[str] = []

    def refuse(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError("nothing is to be run")

    monkeypatch.setattr(merge_evidence, "open_bench", refuse)
    measure_merges(tiny, say=said.append)
    assert said == ["2 of 2 units are done, 0 to do"]
    plan_merges(tiny)[0].file.delete()
    measure_merges(tiny, minutes=0, say=said.append)
    assert said[-1] == "1 units are still to do: the same command goes on"
    with pytest.raises(AssertionError, match="nothing is to be run"):
        measure_merges(tiny, say=said.append)


def test_experts_that_cannot_be_made_leave_their_units_out_and_the_others_go_on(
    configs: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set of experts is tried; the end names the first unit and why. A wrong request ends it at once."""
    said: list[str] = []
    tried: list[str] = []

    def fail(units: list[PlannedMerge]) -> None:
        tried.extend(unit.name for unit in units)
        raise SafetyDPOError("expected finite losses, found nan")

    results = f"merge_evidence.results={tiny.merge_evidence.results}"
    config = load_config(configs / "merge_evidence.yaml", [*GRID, results])
    monkeypatch.setattr(merge_evidence, "open_bench", fail)
    monkeypatch.setattr(merge_evidence, "marked_pages", lambda _: [])
    monkeypatch.setattr(merge_evidence, "measure_unit", lambda unit, _, version: make_merge(unit.method, unit.count))
    with pytest.raises(SafetyDPOError, match="for 33 units; first .*: expected finite losses, found nan"):
        measure_merges(config, say=said.append)
    assert len(tried) == 33
    assert said[-1].startswith("left out, 2 units: expected finite losses")

    def fail_first(units: list[PlannedMerge]) -> str:
        if units[0].factor == "independent":
            raise SafetyDPOError("expected finite losses, found nan")
        return "opened"

    monkeypatch.setattr(merge_evidence, "open_bench", fail_first)
    with pytest.raises(SafetyDPOError, match="for 2 units; first sum, 5 experts, seed 0, independent: expected finite"):
        measure_merges(config, say=said.append)
    measured = {unit.name for unit in plan_merges(config) if unit.file.is_file()}
    assert len(measured) == 31
    assert not any("independent" in name for name in measured)
    # What was left out is told at a limit of time too.
    monkeypatch.setattr(merge_evidence, "open_bench", fail)
    monkeypatch.setattr(merge_evidence.time, "monotonic", iter([0.0, *[1.0] * 3, *[100.0] * 200]).__next__)
    with pytest.raises(SafetyDPOError, match="expected finite losses"):
        measure_merges(config, minutes=1, say=said.append)

    def refuse(_units: list[PlannedMerge]) -> None:
        raise UsageError("expected a GPU, found none")

    monkeypatch.setattr(merge_evidence, "open_bench", refuse)
    with pytest.raises(UsageError, match="expected a GPU"):
        measure_merges(config, say=said.append)


def test_pages_and_plots_are_written_from_records_alone(tiny: Config, tmp_path: Path) -> None:
    assert write_merge_tables(tiny) == []
    write_records(tiny)
    assert write_merge_tables(tiny) == [f"{tmp_path}/page.md"]
    page = (tmp_path / "page.md").read_text()
    assert "2 of 2 units are measured" in page
    assert "](images/merging-screen.png)" in page
    assert (tmp_path / "images" / "merging-screen.png").read_bytes().startswith(b"\x89PNG")
    write_merge_tables(tiny)
    assert (tmp_path / "page.md").read_text() == page


def test_pages_are_looked_at_before_the_work(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SafetyDPOError, match="expected one line <!-- merging:begin -->"):
        measure_merges(tiny)
    (tmp_path / "page.md").unlink()
    with pytest.raises(UsageError, match=r"expected a page at .*page.md \(merge_evidence.page\), found none"):
        measure_merges(tiny)


def test_the_command_lists_units(command: Command, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(EMPTY_PAGE)
    seen = command("merge-evidence", *tiny_settings(tmp_path)[2:], "--list", "--method", "ties")
    assert seen.code == 0, seen.err
    assert "ties, 2 experts, seed 3" in seen.out
    assert "0 of 1 units are done" in seen.out
    seen = command("merge-evidence", *tiny_settings(tmp_path)[2:], "--tables")
    assert "no table is written: no unit is measured yet" in seen.out


def test_experts_of_another_kind_are_refused(command: Command) -> None:
    command("merge-evidence", "--list").assert_one_line("identity.experts.group_by 'concept'", "'category'", code=2)
