"""Which attack prompts a run makes, what it is refused for, and that workers make equal ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs.attack_prompts import (
    MANIFEST,
    AttackWorker,
    attack_sets,
    check_attacks,
    plan_attacks,
    unsafe_names,
    with_attacks,
)
from ray_jobs.evaluate import EvaluatedRow, evaluation_prompts
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import Config, IdentityConfig
from safetydpo.demo.concepts import select_concepts
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.rows import RowSource
from tests.ray.commands import Command

QUICK = {"words": 4, "relaxed_steps": 2, "swap_steps": 1, "candidates": 4, "draws": 1}
ADAPTER = ("f" * 64, "/somewhere")


def open_run(place: Path, *, search: dict[str, Any] = QUICK, workers: int = 1, **evaluation: Any) -> Run:
    config = {
        "name": "test",
        "identity": {
            "prompts": {"categories": ["violence", "shocking"]},
            "sampler": {"steps": 2, "batch_size": 8},
            "evaluation": evaluation,
            "attack_search": search,
        },
        "execution": {
            "num_workers": workers,
            "logical_cpus": 4,
            "store": f"{place}/store",
            "run_dir": f"{place}/run",
        },
    }
    return Run(with_absolute_paths(Config.model_validate(config)))


def test_settings_are_left_out_of_what_is_stored_at_their_defaults() -> None:
    stored = Config().identity.model_dump()
    assert "attack_search" not in stored
    assert not {"attacks", "attacked_rows", "attack_prompts_per_concept", "attack_concepts_per_category"} & set(
        stored["evaluation"]
    )


def test_every_name_of_every_unsafe_concept_is_banned() -> None:
    names = unsafe_names()
    assert {"bomb", "bobm", "black ball with a fuse", "crossed swords"} <= set(names)
    assert "balloon" not in names
    assert len(names) == len(set(names)) == 42 * 4


def test_a_row_per_concept_attack_and_number(tmp_path: Path) -> None:
    run = open_run(tmp_path, attacks=["typo", "optimised"], attack_prompts_per_concept=2)
    rows = plan_attacks(run, adapter=None)
    concepts = {
        concept.key for concept in select_concepts("unsafe") if concept.categories[0] in ("violence", "shocking")
    }
    assert len(rows) == len(concepts) * 2 * 2
    assert {row["concept"] for row in rows} == concepts
    assert len({row["attack_id"] for row in rows}) == len(rows)
    assert all("{name}" in row["frame"] and "{background}" not in row["frame"] for row in rows)
    assert len({row["frame"] for row in rows if row["concept"] == "bomb"}) == 2


def test_fewer_concepts_are_some_of_all_equally_many_of_each_category(tmp_path: Path) -> None:
    rows = plan_attacks(open_run(tmp_path, attacks=["typo"]), adapter=None)
    fewer = plan_attacks(open_run(tmp_path, attacks=["typo"], attack_concepts_per_category=3), adapter=None)
    assert Counter(row["category"] for row in fewer) == {"violence": 3, "shocking": 3}
    assert {row["attack_id"] for row in fewer} < {row["attack_id"] for row in rows}


def test_ids_depend_on_what_prompts_are_made_from_and_on_nothing_else(tmp_path: Path) -> None:
    def ids(run: Run, adapter: tuple[str, str] | None = None) -> dict[tuple[str, str], str]:
        return {(row["attack"], row["concept"]): row["attack_id"] for row in plan_attacks(run, adapter=adapter)}

    alone = ids(open_run(tmp_path, attacks=["typo"]))
    both = ids(open_run(tmp_path, attacks=["white_box", "typo"]), ADAPTER)
    assert {key: both[key] for key in alone} == alone
    other = ids(open_run(tmp_path, attacks=["white_box", "typo"]), ("e" * 64, "/elsewhere"))
    moved = ids(open_run(tmp_path, attacks=["white_box", "typo"]), (ADAPTER[0], "/elsewhere"))
    assert moved == both
    assert {key for key in both if other[key] != both[key]} == {key for key in both if key[0] == "white_box"}


def test_white_box_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a searched adapter for the attack 'white_box'"):
        plan_attacks(open_run(tmp_path, attacks=["white_box"]), adapter=None)


def identity(source: str = "demo", **evaluation: Any) -> IdentityConfig:
    return IdentityConfig.model_validate({"prompts": {"source": source}, "evaluation": evaluation})


def test_attacks_of_other_prompts_are_refused() -> None:
    check_attacks(identity("prompts.parquet"))
    with pytest.raises(UsageError, match=r"expected identity\.prompts\.source 'demo' .* found 'prompts\.parquet'"):
        check_attacks(identity("prompts.parquet", attacks=["typo"]))


def test_more_paraphrases_than_are_written_are_refused() -> None:
    check_attacks(identity(attacks=["paraphrase"], attack_prompts_per_concept=2))
    check_attacks(identity(attacks=["typo"], attack_prompts_per_concept=3))
    with pytest.raises(UsageError, match=r"expected at most 2 in .*attack_prompts_per_concept, .* found 3"):
        check_attacks(identity(attacks=["paraphrase"], attack_prompts_per_concept=3))


def test_without_attacks_rows_and_prompts_stay_as_they_are(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    rows = [EvaluatedRow(RowSource("base", "base"), "", ("unsafe",))]
    assert with_attacks(run, rows, None) is rows
    assert attack_sets(run) == {}
    assert list(evaluation_prompts(run)) == ["unsafe", "ood", "neutral", "neighbour"]
    assert not (tmp_path / "store").exists()


def test_prompts_that_were_not_made_are_missed(tmp_path: Path) -> None:
    with pytest.raises(SafetyDPOError, match=r"expected attack prompts .* found none: make them with `safetydpo att"):
        attack_sets(open_run(tmp_path, attacks=["typo"]))


def test_a_worker_makes_equal_rows_alone_and_together_in_any_order(tmp_path: Path) -> None:
    """Bytes of the table: what one worker makes of all rows at once, another makes of two parts."""
    run = open_run(tmp_path, attacks=["typo", "optimised", "random"])
    rows = plan_attacks(run, adapter=None)[::7]
    assert {row["attack"] for row in rows} == {"typo", "optimised", "random"}
    table = table_from_rows(rows, MANIFEST)
    config = run.config.model_dump(mode="json")
    one, two = AttackWorker(config), AttackWorker(config)
    whole = one(table)
    reverse = list(reversed(range(len(rows))))
    parts = pa.concat_tables([two(table.slice(0, 2)), two(table.slice(2))])
    assert whole.equals(parts)
    assert one(table.take(pa.array(reverse))).take(pa.array(reverse)).equals(whole)
    assert not set(" ".join(row["text"] for row in whole.to_pylist() if row["attack"] != "typo").split()) & {
        part for name in unsafe_names() for part in name.split()
    }


def test_the_command_is_refused_without_attacks(command: Command) -> None:
    seen = command("attack")
    seen.assert_one_line("identity.evaluation.attacks", "name some", code=2)


def test_the_command_is_refused_for_pictures_that_the_judges_do_not_know(command: Command) -> None:
    seen = command("attack", "identity.evaluation.attacks=[typo]", "identity.sampler.height=64")
    seen.assert_one_line("pictures of 32 x 32", "64 x 32", code=2)


@pytest.mark.parametrize("given", ["searched", "=folder", "base=folder", "not a name=folder"])
def test_the_command_is_refused_for_an_adapter_without_name_or_folder(command: Command, given: str) -> None:
    seen = command("attack", "identity.evaluation.attacks=[typo]", "--adapter", given)
    seen.assert_one_line("--adapter NAME=FOLDER", given, code=2)


def test_the_command_is_refused_for_an_adapter_that_is_not_there(command: Command, tmp_path: Path) -> None:
    seen = command("attack", "identity.evaluation.attacks=[typo]", "--adapter", f"searched={tmp_path}/none")
    assert seen.code == 1
    assert "pytorch_lora_weights.safetensors" in seen.err
    assert not (tmp_path / "run").exists()
