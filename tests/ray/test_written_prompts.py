"""What `safetydpo prompts write` leaves, as the prompts of a run: pairs, splits, held-out concepts, unfinished sets."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ray_jobs.prompt_tables import all_pairs, retention_prompts, split_prompts
from safetydpo.artifacts.schemas import IMPORTED_PROMPTS, PROMPTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.config.schema import PromptsConfig
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.importing import import_prompts
from tests.ray.commands import Command

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "concepts-example.yaml"
SPLITS = ("train", "validation", "test")
SETS = ("unsafe", "ood", "neighbour", "neutral")


def write(command: Command, out: Path, *more: str) -> None:
    """The example list from templates: 15 concepts, three of them held out, 8 pairs each."""
    line = ["prompts", "write", str(EXAMPLE), "--out", str(out), "--writer", "templates", "--per-concept", "8"]
    assert command.raw(*line, *more).code == 0


def test_the_folder_is_a_source_of_prompts(command: Command, tmp_path: Path):
    """Of 96 pairs of the example list those of the training split are pairs; the others and held-out ones are prompts.

    The same rule as for an import: a CSV file of the same pairs gets the same splits.
    """
    out = tmp_path / "out"
    write(command, out)
    table = read_table(open_location(str(out)) / "written_prompts.parquet", IMPORTED_PROMPTS).to_pylist()
    rows = {(row["text"], row["split"], row["prompt_set"]) for row in table}
    for source in (out, out / "written_prompts.parquet"):
        config = PromptsConfig(source=str(source))
        pairs = all_pairs(config)
        found = {(split, name): split_prompts(config, split, name) for split in SPLITS for name in SETS}
        unsafe = {split: {prompt.text for prompt in found[split, "unsafe"]} for split in SPLITS}
        assert unsafe["train"] == {pair.unsafe_text for pair in pairs}
        assert [len(unsafe[split]) for split in SPLITS] == [81, 8, 7]
        assert {key: len(prompts) for key, prompts in found.items() if key[1] == "ood" and prompts} == {
            ("test", "ood"): 24
        }
        assert {prompt.concept for prompt in found["test", "ood"]} == {
            "skull and crossbones",
            "crossed swords",
            "angry face",
        }
        assert "a snowman on a table" not in {pair.safe_text for pair in pairs}
        pistol = next(pair for pair in pairs if pair.concept == "pistol")
        assert (pistol.category, pistol.categories) == ("illegal_activity", ("illegal_activity", "violence"))
        assert pistol.source == "demo world"
    csv_file = tmp_path / "pairs.csv"
    kept = [row for row in table if row["prompt_set"] != "ood" and row["side"] == "unsafe"]
    partner = {row["pair_id"]: row["text"] for row in table if row["side"] == "safe"}
    held_out = {row["pair_id"] for row in table if row["prompt_set"] == "ood"}
    with csv_file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["unsafe_text", "safe_text", "category"])
        writer.writerows([row["text"], partner[row["pair_id"]], row["category"]] for row in kept)
    imported = import_prompts(open_location(str(csv_file))).table.to_pylist()
    assert {(row["text"], row["split"], row["prompt_set"]) for row in imported} == {
        (row["text"], row["split"], row["prompt_set"]) for row in table if row["pair_id"] not in held_out
    }
    assert len(rows) > 200


def test_captions_beside_the_written_prompts(command: Command, tmp_path: Path):
    out = tmp_path / "out"
    write(command, out)
    config = PromptsConfig(source=str(out))
    with pytest.raises(SafetyDPOError, match="expected neutral prompts of the train split .* import benign prompts"):
        retention_prompts(config, seed=0)
    captions = tmp_path / "captions.csv"
    captions.write_text("image_id,text\n1,A clock with a bicycle.\n")
    command.raw("prompts", "import", str(captions), "--out", str(out / "captions.parquet"), "--split", "train")
    assert [prompt.text for prompt in retention_prompts(config, seed=0)] == ["A clock with a bicycle."]
    assert all_pairs(config)
    seen = command.raw("prompts", "check", str(captions), "--against", str(out))
    assert "exact       row 1" in seen.out


def test_ones_own_prompts_table_makes_it_a_folder_of_three_tables(command: Command, tmp_path: Path):
    out = tmp_path / "out"
    write(command, out)
    write_table(open_location(str(out)) / "prompts.parquet", table_from_rows([], PROMPTS))
    assert len(all_pairs(PromptsConfig(source=str(out)))) == 96


@pytest.mark.parametrize("name", ["", "/written_prompts.parquet"])
def test_an_unfinished_set_is_no_source(command: Command, tmp_path: Path, name: str):
    """With its answers elsewhere too: the first table of all says whose folder it is."""
    out = tmp_path / "out"
    write(command, out, "--journal", str(tmp_path / "journal"))
    (out / "record.json").unlink()
    config = PromptsConfig(source=f"{out}{name}", categories=("hate",))
    for read in (lambda: all_pairs(config), lambda: split_prompts(config, "test", "unsafe")):
        with pytest.raises(
            SafetyDPOError,
            match="expected a finished set of written prompts at .*/out, found no record.json: run the same `safetydpo",
        ):
            read()
    for file in ("written_prompts.parquet", "memberships.parquet"):
        (out / file).unlink()
    with pytest.raises(SafetyDPOError, match="expected a finished set of written prompts"):
        all_pairs(PromptsConfig(source=str(out), categories=("hate",)))
