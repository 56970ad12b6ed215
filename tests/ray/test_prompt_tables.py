"""Prompts of a run from imported files. The demo's and the folder of three tables: the stages' own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.evaluate import evaluation_prompts
from ray_jobs.prompt_tables import all_pairs, chosen_pairs, needed_prompts, retention_prompts, split_prompts
from ray_jobs.run import Run
from ray_jobs.search_merges import validation_prompts
from safetydpo.artifacts.schemas import MEMBERSHIPS, PROMPT_PAIRS, PROMPTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.schema import Config, PromptsConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.importing import ImportOptions, Split, import_prompts
from tests.prompts.samples import TEXTS, place
from tests.ray.commands import Command


def write(folder: Path, content: str, name: str = "a", split: Split | None = None) -> str:
    target = open_location(str(folder / "sets" / f"{name}.parquet"))
    write_table(target, import_prompts(place(folder, content), ImportOptions(split=split)).table)
    return target.path


def config(source: str, *categories: str, **more: int) -> PromptsConfig:
    return PromptsConfig.model_validate({"source": source, "categories": categories or ("hate",), **more})


def test_pairs_of_an_imported_file(tmp_path: Path):
    """A pair of two categories is one pair, of its first category."""
    source = config(write(tmp_path, TEXTS["coprov2_train"], split="train"), "hate", "harassment")
    pairs = all_pairs(source)
    assert [(pair.category, pair.categories) for pair in pairs] == [
        ("hate", ("hate", "illegal_activity")),
        ("harassment", ("harassment",)),
    ]
    assert {pair.pair_id for pair in chosen_pairs(source, seed=0)} == {pair.pair_id for pair in pairs}


def test_a_kept_unknown_category_in_front_of_a_known_one(tmp_path: Path):
    """Pairs and prompts belong to the first category that the project knows; the demo's keep their first."""
    target = open_location(str(tmp_path / "set.parquet"))
    rows = 'unsafe_text,safe_text,category\na bomb,a ball,"weapons, hate"\na wasp,a bee,"hate, weapons"\n'
    for split in ("train", "test"):
        options = ImportOptions(split=split, keep_unknown_categories=True)  # type: ignore[arg-type]
        write_table(target, import_prompts(place(tmp_path, rows), options).table)
        source = config(target.path)
        found = all_pairs(source) if split == "train" else split_prompts(source, split, "unsafe")
        assert [(item.category, item.categories) for item in found] == [
            ("hate", ("weapons", "hate")),
            ("hate", ("hate", "weapons")),
        ]
    for category in ("illegal_activity", "violence"):
        assert {pair.categories[0] for pair in all_pairs(config("demo", category))} == {category}


def test_a_membership_without_its_pair_is_an_error(tmp_path: Path):
    folder = open_location(str(tmp_path / "folder"))
    write_table(folder / "prompt_pairs.parquet", table_from_rows([], PROMPT_PAIRS))
    member = {"pair_id": "p1", "category": "hate", "concept": "c", "source": "s"}
    write_table(folder / "memberships.parquet", table_from_rows([member], MEMBERSHIPS))
    with pytest.raises(
        SafetyDPOError, match=r"expected the pair of every membership in .*, found 1 without \(first: p1\): write both"
    ):
        all_pairs(config(folder.path))


def test_a_category_without_pairs_says_what_to_import(tmp_path: Path):
    source = config(write(tmp_path, TEXTS["coprov2_test"]), "hate")
    with pytest.raises(
        SafetyDPOError, match=r"expected prompt pairs of category 'hate' .* add pairs \(import a set with safe partners"
    ):
        all_pairs(source)


def test_unsafe_prompts_of_chosen_categories_only(tmp_path: Path):
    path = write(tmp_path, TEXTS["coprov2_test"])
    assert [prompt.text for prompt in split_prompts(config(path, "sexual"), "test", "unsafe")] == ["A wasp"]


def test_missing_benign_prompts_are_named_with_what_to_add(tmp_path: Path):
    path = write(tmp_path, TEXTS["pairs"], split="train")
    with pytest.raises(
        SafetyDPOError,
        match=r"expected neutral prompts of the train split in .* \(identity.prompts.retention_prompts\), found none: "
        r"import benign prompts, such as COCO captions, with `safetydpo prompts import … --split train`",
    ):
        retention_prompts(config(path), seed=0)
    assert retention_prompts(config(path, retention_prompts=0), seed=0) == []
    write(tmp_path, TEXTS["coco"], "b", split="train")
    folder = config(str(tmp_path / "sets"))
    assert [prompt.text for prompt in retention_prompts(folder, seed=0)] == ["A clock with a bicycle."]


def test_missing_prompts_of_a_folder_of_three_tables(tmp_path: Path):
    folder = open_location(str(tmp_path / "folder"))
    for name, schema in (("prompt_pairs", PROMPT_PAIRS), ("memberships", MEMBERSHIPS), ("prompts", PROMPTS)):
        write_table(folder / f"{name}.parquet", table_from_rows([], schema))
    with pytest.raises(
        SafetyDPOError, match=r"found none: add some to its prompts.parquet \(split test, prompt_set uns"
    ):
        needed_prompts(config(folder.path), "test", "unsafe", setting="x")


def _run(source: str) -> Run:
    prompts = {"source": source, "categories": ["hate", "violence"]}
    return Run(Config.model_validate({"identity": {"prompts": prompts}}))


def test_search_and_evaluation_take_held_out_pairs_and_benign_prompts(tmp_path: Path):
    """Unsafe texts of held-out pairs are unsafe prompts, their safe texts neighbours, captions neutral prompts."""
    for split, (bomb, caption) in {"validation": ("a bomb", "a clock"), "test": ("a wasp nest", "a wheel")}.items():
        write(tmp_path, f"unsafe_text,safe_text,category\n{bomb},a safe {split} ball,hate\n", f"p-{split}", split)  # type: ignore[arg-type]
        write(tmp_path, f"image_id,text\n1,{caption}\n", f"c-{split}", split)  # type: ignore[arg-type]
    run = _run(str(tmp_path / "sets"))
    assert [(prompt.prompt_set, prompt.text) for prompt in validation_prompts(run)] == [
        ("unsafe", "a bomb"),
        ("neutral", "a clock"),
        ("neighbour", "a safe validation ball"),
    ]
    found = {name: [prompt.text for prompt in prompts] for name, prompts in evaluation_prompts(run).items()}
    assert found == {"unsafe": ["a wasp nest"], "ood": [], "neutral": ["a wheel"], "neighbour": ["a safe test ball"]}


def test_search_and_evaluation_say_what_an_imported_file_lacks(tmp_path: Path):
    run = _run(write(tmp_path, TEXTS["pairs"], split="train"))
    with pytest.raises(
        UsageError, match=r"expected unsafe prompts of the validation split .* import unsafe prompts with"
    ):
        validation_prompts(run)
    with pytest.raises(SafetyDPOError, match=r"expected unsafe prompts of the test split .* --split test` \(or auto\)"):
        evaluation_prompts(run)


def test_an_imported_file_is_a_source_and_another_parquet_file_is_none(command: Command, tmp_path: Path):
    source = write(tmp_path, TEXTS["pairs"], split="train")
    command("pairs", f"identity.prompts.source={source}").assert_one_line(
        "expected prompt pairs of category 'shocking'", code=1
    )
    raw = place(tmp_path, TEXTS["pairs"], "raw").path
    command("pairs", f"identity.prompts.source={raw}").assert_one_line(
        "found a file: name one with", "a file made by `safetydpo prompts import`, or `demo`", code=2
    )
