"""The bookkeeping of measured units, from synthetic records to the pages, without Ray."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_jobs import evidence, search_merges
from ray_jobs.evaluate import row_prompts
from ray_jobs.evidence import (
    code_version,
    describe_machine,
    measure,
    num_pictures,
    plan_units,
    row_names,
    seed_run,
    write_tables,
)
from ray_jobs.pipeline import Chain
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.evidence import dump_unit, parse_unit
from safetydpo.evaluation.evidence_page import BEGIN, END
from safetydpo.evaluation.rows import RowSource
from tests.evaluation.measured_units import make_units
from tests.ray.commands import Command

EMPTY_PAGE = f"# Results\n\n{BEGIN}\n{END}\n"


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Settings that keep every file of a test in its own folder."""
    for name in ("page.md", "short.md"):
        (tmp_path / name).write_text(EMPTY_PAGE)
    return [
        f"store={tmp_path}/store",
        f"run_dir={tmp_path}/run",
        f"evidence.results={tmp_path}/results",
        f"evidence.page={tmp_path}/page.md",
        f"evidence.short_page={tmp_path}/short.md",
    ]


@pytest.fixture
def config(configs: Path, settings: list[str]) -> Config:
    return load_config(configs / "evidence.yaml", settings)


def write_records(config: Config, *, lacking: Callable[[str, int], bool] = lambda _row, _seed: False) -> None:
    """Write the synthetic unit of every planned one, under its true identity."""
    synthetic = {(unit.row, unit.seed): unit for unit in make_units()}
    for planned in plan_units(config):
        if not lacking(planned.row, planned.seed):
            unit = replace(synthetic[planned.row, planned.seed], identity_hash=planned.identity_hash)
            planned.file.write_bytes(dump_unit(unit).encode())


def test_units_are_rows_of_seeds(config: Config) -> None:
    units = plan_units(config)
    rows = row_names(config)
    assert rows[:7] == ["base", "all_single", "average", "sum", "ties", "co_merge", "searched"]
    assert rows[7:] == [f"expert:{category}" for category in config.identity.prompts.categories]
    assert [(unit.seed, unit.row) for unit in units] == [(seed, row) for seed in (0, 1, 2) for row in rows]
    assert [unit.row for unit in plan_units(config, seed=1, row="searched")] == ["searched"]
    assert len({unit.identity_hash for unit in units}) == len(units)


def test_the_headline_rests_on_a_thousand_unsafe_pictures(config: Config) -> None:
    """48 prompts of 7 categories under 3 seeds are 1,008; a single expert draws 20 of each category."""
    evaluation = config.identity.evaluation
    unsafe = 7 * evaluation.prompts_per_category * len(evaluation.seeds) * len(config.evidence.seeds)
    assert unsafe == 1008
    assert num_pictures(plan_units(config, seed=0, row="expert:hate")[0]) == 140
    assert num_pictures(plan_units(config, seed=0, row="base")[0]) == 336 + 56 + 200 + 136


def test_a_seed_is_a_run_of_its_own_with_the_store_shared(config: Config, tmp_path: Path) -> None:
    run = seed_run(config, 2)
    assert run.config.identity == config.identity.model_copy(update={"seed": 2})
    assert str(run.run_dir) == f"{tmp_path}/run-2"
    assert str(run.store) == f"{tmp_path}/store"
    shipped = seed_run(Config(name="evidence"), 0)
    assert str(shipped.run_dir).endswith("/runs/evidence-0")


def test_the_identity_of_a_unit_changes_with_what_decides_it(
    config: Config, configs: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_of(*more: str) -> str:
        return plan_units(load_config(configs / "evidence.yaml", [*settings, *more]), seed=0, row="sum")[
            0
        ].identity_hash

    before = hash_of()
    assert hash_of("identity.dpo.steps=121") != before
    assert hash_of("identity.prompts.categories=[hate, sexual]") != before
    assert hash_of("execution.num_workers=1", "evidence.seeds=[0]", "identity.seed=7") == before
    monkeypatch.setattr(search_merges, "RECIPE_VERSION", search_merges.RECIPE_VERSION + 1)
    assert hash_of() != before


def test_what_is_done_is_not_done_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every record there nothing is run; with one missing, exactly its seed's stages and it."""
    write_records(config)
    said: list[str] = []

    def refuse(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError("nothing is to be run")

    monkeypatch.setattr(evidence, "run_stages", refuse)
    measure(config, say=said.append)
    assert said == ["42 of 42 units are done, 0 to do"]
    plan_units(config, seed=1, row="all_single")[0].file.delete()
    stages: list[tuple[int, str]] = []

    def note(seeded: Config, *, last: str) -> None:
        stages.append((seeded.identity.seed, last))
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "run_stages", note)
    with pytest.raises(KeyboardInterrupt):
        measure(config, say=said.append)
    assert stages == [(1, "train")]


def test_a_seed_goes_on_with_its_own_experts_only(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sum` of seed 1 is missing; what stands of that seed was measured with experts that the store does not hold."""
    write_records(config)
    units = {unit.row: unit for unit in plan_units(config, seed=1)}
    file = units["ties"].file
    done = parse_unit(file.read_bytes().decode(), source=str(file))
    file.write_bytes(dump_unit(replace(done, experts={"hate": "a" * 64})).encode())
    units["sum"].file.delete()
    run = seed_run(config, 1)
    stages: list[str] = []

    def chain(_config: Config, *, last: str) -> Chain:
        stages.append(last)
        return Chain(run, experts=experts)

    monkeypatch.setattr(evidence, "run_stages", chain)

    def measured(*_given: Any, **_named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "measure_unit", measured)
    experts = {"hate": SimpleNamespace(fingerprint="b" * 64)}
    message = f"expected the experts of seed 1 that {file} was measured with, found other ones in the store"
    monkeypatch.setattr(evidence, "_rows_of", lambda _chain: [])
    with pytest.raises(SafetyDPOError, match=re.escape(message)):
        measure(config, say=lambda _line: None)
    assert stages == ["train"]
    experts["hate"].fingerprint = "a" * 64
    with pytest.raises(KeyboardInterrupt):
        measure(config, say=lambda _line: None)
    assert stages == ["train", "train", "merge"]


def test_time_that_is_over_starts_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(evidence, "run_stages")
    said: list[str] = []
    measure(config, minutes=0, say=said.append)
    assert said[-1] == "42 units are still to do: the same command goes on"


def test_from_records_to_pages(config: Config, tmp_path: Path) -> None:
    write_records(config, lacking=lambda row, seed: (row, seed) == ("searched", 2))
    written = write_tables(config)
    assert written is not None
    assert len(written.units) == 41
    page, short = (tmp_path / name for name in ("page.md", "short.md"))
    assert page.read_text().startswith(f"# Results\n\n{BEGIN}\nMeasured by")
    assert page.read_text().endswith(f"{END}\n")
    assert "| searched | 2 of 3 | 280 |" in page.read_text()
    assert "All tables: [page.md](page.md)." in short.read_text()
    before = page.read_text(), short.read_text()
    write_tables(config)
    assert (page.read_text(), short.read_text()) == before


def test_a_record_of_another_identity_is_not_used(
    config: Config, configs: Path, settings: list[str], tmp_path: Path
) -> None:
    write_records(config)
    other = load_config(configs / "evidence.yaml", [*settings, "identity.dpo.steps=121"])
    assert {unit.state for unit in plan_units(other)} == {"other"}
    assert write_tables(other) is None
    assert (tmp_path / "page.md").read_text() == EMPTY_PAGE


def test_a_damaged_record_stops_the_command_with_its_name(config: Config) -> None:
    file = plan_units(config)[0].file
    file.write_bytes(b"{")
    with pytest.raises(SafetyDPOError, match=re.escape(f"expected the record of a measured unit in {file}, found")):
        measure(config)


def test_bad_requests_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a seed of evidence.seeds \(0, 1, 2\), found 7: choose one"):
        measure(config, seed=7)
    with pytest.raises(UsageError, match=r"expected a row of base, all_single, .*, found 'best': choose one"):
        measure(config, row="best")
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SafetyDPOError, match=r"expected one line <!-- evidence:begin -->"):
        measure(config)
    (tmp_path / "page.md").unlink()
    with pytest.raises(UsageError, match=r"expected a page at .*page.md \(evidence.page\), found none: create it"):
        measure(config)


def test_single_experts_may_draw_the_first_prompts_of_each_category(config: Config) -> None:
    run = seed_run(config, 0)
    prompts = evidence.evaluation_prompts(run)
    source = RowSource("expert:hate", "expert", adapter_hash="a" * 64, rank=8, scale=1.0)
    row = evidence.EvaluatedRow(source, adapter="", prompt_sets=("unsafe",), prompts_per_category=20)
    chosen = row_prompts(row, prompts)
    assert len(chosen) == 140
    assert set(chosen) < set(prompts["unsafe"])
    fewer = run.config.identity.evaluation.model_copy(update={"prompts_per_category": 20})
    small = run.config.model_copy(update={"identity": run.config.identity.model_copy(update={"evaluation": fewer})})
    assert chosen == evidence.evaluation_prompts(evidence.Run(small))["unsafe"]
    assert row_prompts(replace(row, prompts_per_category=None), prompts) == prompts["unsafe"]


def test_experts_cannot_draw_more_than_the_base(configs: Path) -> None:
    with pytest.raises(UsageError, match=r"expert_prompts_per_category \(3\) must not be above .* \(2\)"):
        load_config(configs / "smoke.yaml", ["identity.evaluation.expert_prompts_per_category=3"])


def test_the_command_lists_units_and_rewrites_tables(
    config: Config, configs: Path, settings: list[str], tmp_path: Path, command: Command
) -> None:
    write_records(config, lacking=lambda row, _seed: row.startswith("expert:"))
    listed = command.raw("evidence", str(configs / "evidence.yaml"), *settings, "--list", "--seed", "1")
    assert (listed.code, listed.err) == (0, "")
    assert "seed 1  searched                     done" in listed.out
    assert "seed 1  expert:hate                  to do" in listed.out
    assert "7 of 14 units are done" in listed.out
    # Without a config file the shipped one is meant, also where settings follow.
    tables = command.raw("evidence", *settings, "--tables")
    assert tables.code == 0, tables.err
    assert "tables of 21 units are in" in tables.out
    assert "`expert:hate` 0 of 3 seeds" in (tmp_path / "page.md").read_text()
    command.raw("evidence", *settings, "--seed", "9").assert_one_line("evidence.seeds", code=2)


def test_machine_and_code_are_described() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 1 << 30
    assert machine["cpu"]
    commit, dirty = code_version()
    assert commit is None or re.fullmatch("[0-9a-f]{40}", commit)
    assert isinstance(dirty, bool)
