from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from safetydpo.artifacts.schemas import sha256_of
from safetydpo.artifacts.storage import open_location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.preferences import (
    TIE,
    GivenPreference,
    LeftOut,
    count_rows,
    has_categories,
    read_preferences,
    read_row,
)
from tests.pairs.given_files import draw, noise, row, write_file


def read(path: Path) -> list[GivenPreference | LeftOut]:
    return list(read_preferences(open_location(str(path))))


def test_the_winner_is_jpg_0_if_label_0_is_1():
    """Rows 1 and 2 hold the same pictures the other way round: they are one preference."""
    first, second = (read_row(row(3, label=label), 1) for label in (1, 0))
    assert first == second == GivenPreference("a disc number 3", "a disc number 3", safe=draw(6), unsafe=draw(7))
    assert read_row(row(3, label=1.0), 1) == read_row(row(3, label=True) | {"label_0": 1}, 1)


@pytest.mark.parametrize("as_struct", [False, True])
def test_rows_come_in_order_with_what_is_wrong(tmp_path: Path, as_struct: bool):
    same = draw(1)
    rows = [
        row(1),
        row(2, label=0.5),
        row(3, label=0.7),
        row(4, label=None),
        row(5, "  "),
        row(6) | {"jpg_1": None},
        row(7) | {"jpg_0": b""},
        row(8) | {"jpg_0": same, "jpg_1": same},
        row(9, label=0),
        row(10) | {"caption": None},
    ]
    found = read(write_file(tmp_path / "a.parquet", rows, as_struct=as_struct))
    reasons = [(one.row, one.reason) if isinstance(one, LeftOut) else one.unsafe_text for one in found]
    assert reasons == [
        "a disc number 1",
        (2, TIE),
        (3, "label_0 is none of 1, 0 and 0.5"),
        (4, "label_0 is none of 1, 0 and 0.5"),
        (5, "no caption"),
        (6, "a picture is missing"),
        (7, "a picture is missing"),
        (8, "both pictures are the same"),
        "a disc number 9",
        (10, "no caption"),
    ]
    assert [one.is_fault for one in found if isinstance(one, LeftOut)] == [False] + [True] * 7


def test_columns_of_our_own_export_are_read(tmp_path: Path):
    own = {"safe_prompt": " a leaf ", "categories": ["hate", "violence"], "concept": "thorn", "source": "demo"}
    path = write_file(tmp_path / "a.parquet", [row(1, **own), row(2, **{**own, "safe_prompt": None, "categories": []})])
    first, second = read(path)
    assert isinstance(first, GivenPreference)
    assert isinstance(second, GivenPreference)
    assert (first.unsafe_text, first.safe_text) == ("a disc number 1", "a leaf")
    assert (first.categories, first.concept, first.source) == (("hate", "violence"), "thorn", "demo")
    assert (second.safe_text, second.categories) == ("a disc number 2", ())
    assert has_categories(open_location(str(path)))
    plain = write_file(tmp_path / "b.parquet", [row(1)])
    assert not has_categories(open_location(str(plain)))
    (one,) = read(write_file(tmp_path / "c.parquet", [row(1, category="Hate, self-harm")]))
    assert isinstance(one, GivenPreference)
    assert one.categories == ("Hate", "self-harm")


def test_ids_are_of_captions_and_pictures():
    one = read_row(row(1), 1)
    assert isinstance(one, GivenPreference)
    text = "a disc number 1"
    pictures = {
        "safe_picture": hashlib.sha256(draw(2)).hexdigest(),
        "unsafe_picture": hashlib.sha256(draw(3)).hexdigest(),
    }
    assert one.preference_id == sha256_of({"safe": text, "unsafe": text, **pictures})
    others: list[dict[str, Any]] = [row(1, "other"), row(2, "a disc number 1"), row(1, safe_prompt="a leaf")]
    ids = {one.preference_id, *(read_row(other, 1).preference_id for other in others)}  # type: ignore[union-attr]
    assert len(ids) == 4


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """15 MB of pictures: a few pages are in memory where the writer made small ones, else a row group or two."""
    rows = [row(1, f"text {number}") | {"jpg_0": noise(number, side=90)} for number in range(600)]
    plain = {"use_dictionary": False}
    for settings, limit in (
        ({"row_group_size": 600, "data_page_size": 1 << 18, "write_batch_size": 8}, 4e6),
        ({"row_group_size": 60}, 4e6),
    ):
        path = write_file(tmp_path / "big.parquet", rows, **plain, **settings)
        assert path.stat().st_size > 14e6
        before = pa.total_allocated_bytes()
        most = max(pa.total_allocated_bytes() - before for _ in read_preferences(open_location(str(path))))
        assert most < limit


def test_what_is_no_file_of_preferences_is_refused(tmp_path: Path):
    path = write_file(tmp_path / "a.parquet", [row(1), row(2)])
    assert count_rows(open_location(str(path))) == 2
    cut, pointer, text = (tmp_path / name for name in ("cut.parquet", "pointer.parquet", "text.csv"))
    cut.write_bytes(path.read_bytes()[:-30])
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    text.write_text("caption\nx\n")
    lacking = write_file(tmp_path / "b.parquet", [{"jpg_0": draw(1), "caption": "x"}])
    for file, error, said in (
        (tmp_path, UsageError, "expected a Parquet file of preferences at .*, found a folder: name its files"),
        (tmp_path / "no", UsageError, "found nothing: name its files"),
        (cut, SafetyDPOError, "expected a complete Parquet file at .*cut.parquet, found .* bytes that do not parse"),
        (pointer, SafetyDPOError, "found a git-LFS pointer: run `git lfs pull`"),
        (text, SafetyDPOError, "found a file of another kind: name the .parquet files"),
        (lacking, SafetyDPOError, "found jpg_0, caption, without jpg_1, label_0: rename its columns"),
    ):
        with pytest.raises(error, match=said):
            read(file)
