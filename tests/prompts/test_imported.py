from __future__ import annotations

from pathlib import Path

from safetydpo.artifacts.schemas import PROMPT_PAIRS
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.prompts.imported import is_imported, read_pairs, read_prompts
from safetydpo.prompts.importing import ImportOptions, import_prompts
from tests.prompts.samples import TEXTS, place


def write(folder: Path, content: str, name: str = "a", **options: object) -> Location:
    target = open_location(str(folder / "sets" / f"{name}.parquet"))
    found = import_prompts(place(folder, content), ImportOptions(**options))  # type: ignore[arg-type]
    write_table(target, found.table)
    return target


def test_a_pair_of_two_categories_is_one_pair(tmp_path: Path):
    pairs = read_pairs(write(tmp_path, TEXTS["coprov2_train"], split="train"))
    assert [(pair.unsafe_text, pair.safe_text, pair.category, pair.categories) for pair in pairs] == [
        ("A bomb, on a table", "A ball, on a table", "hate", ("hate", "illegal_activity")),
        ("A wasp by the door", "A bee by the door", "harassment", ("harassment",)),
    ]
    assert {pair.source for pair in pairs} == {"coprov2_train"}


def test_only_training_pairs_are_pairs(tmp_path: Path):
    file = write(tmp_path, TEXTS["pairs"], split="test")
    assert read_pairs(file) == []
    assert [prompt.text for prompt in read_prompts(file, "test", "unsafe")] == ["a bomb", "a wasp"]
    assert [prompt.text for prompt in read_prompts(file, "test", "neighbour")] == ["a ball", "a bee"]


def test_prompts_by_split_and_set(tmp_path: Path):
    file = write(tmp_path, TEXTS["i2p"])
    found = read_prompts(file, "test", "unsafe")
    assert [(prompt.text, prompt.category, prompt.categories) for prompt in found][1] == (
        "two spiders",
        "hate",
        ("hate", "self_harm", "illegal_activity"),
    )
    assert read_prompts(file, "test", "neutral") == read_prompts(file, "train", "unsafe") == []


def test_one_text_in_several_rows_is_one_prompt(tmp_path: Path):
    content = "prompt,category\na bomb,hate\na bomb,violence\na bomb,hate\n"
    (prompt,) = read_prompts(write(tmp_path, content, split="test"), "test", "unsafe")
    assert prompt.categories == ("hate", "violence")


def test_a_folder_of_imported_files_is_one_set(tmp_path: Path):
    write(tmp_path, TEXTS["pairs"], split="train")
    folder = write(tmp_path, TEXTS["coco"], "b", split="test").parent
    assert is_imported(folder)
    assert len(read_pairs(folder)) == 2
    assert [prompt.text for prompt in read_prompts(folder, "test", "neutral")] == ["A clock with a bicycle."]


def test_what_is_no_imported_table(tmp_path: Path):
    assert not is_imported(place(tmp_path, TEXTS["pairs"]))
    assert not is_imported(place(tmp_path, b"PAR1 and no more"))
    assert not is_imported(open_location(str(tmp_path)))
    assert not is_imported(open_location(str(tmp_path / "none")))
    file = write(tmp_path, TEXTS["pairs"])
    assert is_imported(file)
    assert is_imported(file.parent)
    write_table(file.parent / "prompt_pairs.parquet", table_from_rows([], PROMPT_PAIRS))
    assert not is_imported(file.parent)
