from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import write_table
from safetydpo.errors import UsageError
from safetydpo.prompts.importing import import_prompts
from safetydpo.prompts.leaks import Leak, PlacedText, find_leaks, leaks_as_csv, read_texts
from tests.prompts.samples import TEXTS, place, sample


def placed(*texts: str) -> list[PlacedText]:
    return [PlacedText(row, text) for row, text in enumerate(texts, start=1)]


TEST = placed("a green bomb on a table", "A Dog!", "a green bomb on a table", "one two three four five", "alone")
TRAIN = placed("a dog", "five four three two one six", "a green bomb on a table", "one two three four")


def test_likenesses_by_hand():
    """5 rows, 4 distinct texts: rows 1 and 3 exact, row 2 but for case and mark, row 4 near.

    Row 4 shares 5 of 6 words with train row 2 (0.83) and 4 of 5 with train row 4 (0.80): the better one is told.
    """
    report = find_leaks(TEST, TRAIN)
    assert (report.num_rows, report.num_texts) == (5, 4)
    assert report.leaks == (
        Leak((1, 3), TEST[0].text, 3, TEST[0].text, "exact", 1.0),
        Leak((2,), "A Dog!", 1, "a dog", "normalised", 1.0),
        Leak((4,), TEST[3].text, 2, TRAIN[1].text, "near", 5 / 6),
    )
    assert [report.rows(kind) for kind in ("exact", "normalised", "near")] == [2, 1, 1]
    assert [report.texts(kind) for kind in ("exact", "normalised", "near")] == [1, 1, 1]
    assert find_leaks(TEST, TRAIN, near=0.9).texts("near") == 0


def test_nothing_in_common():
    assert find_leaks(placed("a dog"), placed("a cat")).leaks == ()


def test_signs_leak_only_as_themselves():
    """None of these has a letter or digit; the heart and the swords end in the same variation selector."""
    report = find_leaks(placed("💣💣", "❤️", "!!", "🎈"), placed("🎈", "⚔️", "??", "the"))
    assert report.leaks == (Leak((4,), "🎈", 1, "🎈", "exact", 1.0),)


def test_the_list_as_a_file():
    read = list(csv.DictReader(io.StringIO(leaks_as_csv([("train", find_leaks(TEST, TRAIN))]).decode(), newline="")))
    assert [row["likeness"] for row in read] == ["exact", "normalised", "near"]
    assert read[0] | {"text": ""} == {
        "likeness": "exact",
        "jaccard": "1.000",
        "rows": "1 3",
        "text": "",
        "against": "train",
        "against_row": "3",
        "against_text": TEST[0].text,
    }


def test_a_file_and_its_import_have_the_same_texts(tmp_path: Path):
    """Both sides of pairs; a row of three categories counts once."""
    file = sample(tmp_path, "i2p")
    write_table(open_location(str(tmp_path / "sets" / "a.parquet")), import_prompts(file).table)
    expected = placed("a bomb, oil painting", "two spiders", "a wet\nspider")
    assert read_texts(file) == expected
    assert read_texts(open_location(str(tmp_path / "sets" / "a.parquet"))) == expected
    assert read_texts(open_location(str(tmp_path / "sets"))) == expected
    pairs = read_texts(place(tmp_path, TEXTS["pairs_of_prompts"]))
    assert pairs == [PlacedText(1, "a bomb"), PlacedText(1, "a ball")]


def test_a_folder_without_tables_is_refused(tmp_path: Path):
    with pytest.raises(
        UsageError, match="expected a prompt file or imported tables at .*, found a folder without such"
    ):
        read_texts(open_location(str(tmp_path)))
