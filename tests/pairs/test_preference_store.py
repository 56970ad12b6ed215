from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from safetydpo.artifacts.pool_index import read_index, read_pool
from safetydpo.artifacts.records import ArtifactKey, Record, write_record
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES, MEMBERSHIPS, PROMPT_PAIRS, make_given_image_id
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs import preference_store
from safetydpo.pairs.preference_store import open_preferences, picture_pool, write_preferences
from safetydpo.pairs.preferences import REPEATED, TIE, GivenPreference
from tests.pairs.given_files import draw, row, write_file


def everything_is_hateful(_row: GivenPreference) -> tuple[tuple[str, ...], str]:
    return ("hate", "violence"), "disc"


def take(folder: Path, *files: Path, bad: float = 0.5, find: Any = everything_is_hateful) -> Record:
    locations = [open_location(str(file)) for file in files]
    return write_preferences(
        open_location(str(folder)), locations, categories_of=find, source="made-up", max_bad_rate=bad
    )


def test_two_rows_of_a_pair_share_their_pictures(tmp_path: Path):
    """The released form: the same two pictures under the unsafe and under the safe caption are two preferences."""
    pair = [row(1, "a disc with a thorn"), row(1, "a plain disc", label=0)]
    record = take(tmp_path / "out", write_file(tmp_path / "a.parquet", [*pair, row(2)]))
    out = open_location(str(tmp_path / "out"))
    assert record.counts == {
        "rows": 3, "preferences": 3, "pictures": 4, "left_out": 0, "faults": 0, "one_caption": 3
    }  # fmt: skip
    assert record.details["base"] == "unknown"
    texts = read_table(out / "prompt_pairs.parquet", PROMPT_PAIRS).to_pylist()
    assert [(one["unsafe_text"], one["safe_text"]) for one in texts] == [
        (text, text) for text in ("a disc with a thorn", "a plain disc", "a disc number 2")
    ]
    manifest = read_table(out / "images.parquet", IMAGE_MANIFEST).to_pylist()
    ids = {
        side: make_given_image_id(hashlib.sha256(draw(2 + (side == "unsafe"))).hexdigest())
        for side in ("safe", "unsafe")
    }
    assert [(one["side"], one["image_id"], one["prompt"]) for one in manifest[:4]] == [
        (side, ids[side], text) for text in ("a disc with a thorn", "a plain disc") for side in ("unsafe", "safe")
    ]
    members = read_table(out / "memberships.parquet", MEMBERSHIPS).to_pylist()
    assert [(one["category"], one["concept"], one["source"]) for one in members[:2]] == [
        ("hate", "disc", "made-up"),
        ("violence", "disc", "made-up"),
    ]
    pictures = read_pool(picture_pool(out), IMAGES, id_column="image_id").to_pylist()
    assert {one["image"] for one in pictures} == {draw(number) for number in (2, 3, 4, 5)}
    assert {(one["format"], one["width"], one["height"]) for one in pictures} == {("jpeg", 40, 32)}
    assert open_preferences(out) == record


def test_rows_that_are_no_preference_are_counted_by_reason(tmp_path: Path):
    def find(found: GivenPreference) -> tuple[tuple[str, ...], str]:
        return (() if found.unsafe_text == "nowhere" else ("hate",)), ""

    broken = draw(5)[:60]
    rows = [row(1), row(1), row(2, label=0.5), row(3) | {"jpg_1": broken}, row(4, "nowhere"), row(5, label=0)]
    first, second = write_file(tmp_path / "a.parquet", rows[:4]), write_file(tmp_path / "b.parquet", rows[4:])
    record = take(tmp_path / "out", first, second, find=find)
    assert record.details["left_out"] == {
        REPEATED: 1,
        TIE: 1,
        "a picture does not decode": 1,
        "no known category": 1,
    }
    assert record.details["faults"] == [
        f"{first}, row 4: a picture does not decode",
        f"{second}, row 1: no known category",
    ]
    assert (record.counts["preferences"], record.counts["faults"]) == (2, 2)
    # The good picture of a bad row is not kept.
    assert record.counts["pictures"] == 4


def test_too_many_bad_rows_leave_nothing(tmp_path: Path):
    path = write_file(tmp_path / "a.parquet", [row(1), row(2, " "), row(3, label=0.5)])
    message = (
        r"at most 10.0% bad rows \(--max-bad-rate\), found 1 of 3 \(no caption: 1, tie .*\), the first in .*, row 2"
    )
    with pytest.raises(SafetyDPOError, match=message):
        take(tmp_path / "out", path, bad=0.1)
    assert not (tmp_path / "out").exists()
    assert take(tmp_path / "out", path, bad=0.4).counts["preferences"] == 1
    with pytest.raises(SafetyDPOError, match=r"expected at least one preference in 1 rows, found none \(tie .*: 1\)"):
        take(tmp_path / "none", write_file(tmp_path / "b.parquet", [row(3, label=0.5)]))
    assert not (tmp_path / "none").exists()


def test_the_fingerprint_is_of_the_content(tmp_path: Path):
    rows = [row(number) for number in range(5)]
    one = take(tmp_path / "1", write_file(tmp_path / "a.parquet", rows))
    two = take(
        tmp_path / "2", write_file(tmp_path / "b.parquet", rows[3:]), write_file(tmp_path / "c.parquet", rows[:3])
    )
    assert one.fingerprint == two.fingerprint
    other = take(tmp_path / "3", write_file(tmp_path / "d.parquet", [*rows[:4], row(4, "another")]))
    assert other.fingerprint != one.fingerprint
    renamed = take(tmp_path / "4", tmp_path / "a.parquet", find=lambda _row: (("hate",), "disc"))
    assert renamed.fingerprint != one.fingerprint


def test_many_pictures_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """70 rows are 140 pictures: groups of 64, a new file after each that holds more than a kilobyte."""
    monkeypatch.setattr(preference_store, "FILE_BYTES", 1000)
    rows = [row(number, f"text {number}") | {"jpg_0": draw(number, size=(20 + number, 20))} for number in range(70)]
    out = tmp_path / "out"
    record = take(out, write_file(tmp_path / "a.parquet", rows))
    files = sorted(path.name for path in (out / "pictures" / "batch-given" / "data").iterdir())
    assert files == [f"part-{number:05d}.parquet" for number in range(-(-record.counts["pictures"] // 64))]
    index = read_index(picture_pool(open_location(str(out))), IMAGES, id_column="image_id")
    assert index.num_rows == record.counts["pictures"] > 128
    assert json.loads((out / "pictures" / "batch-given" / "record.json").read_text())["rows"] == index.num_rows


def test_a_place_that_is_taken_is_refused(tmp_path: Path):
    path = write_file(tmp_path / "a.parquet", [row(1)])
    with pytest.raises(UsageError, match="expected nothing or an empty folder at .*a.parquet, found a file"):
        take(path, path)
    take(tmp_path / "out", path)
    with pytest.raises(UsageError, match=r"found \d files; choose another folder"):
        take(tmp_path / "out", path)
    (tmp_path / "out" / "record.json").unlink()
    with pytest.raises(UsageError, match=r"files and no record.json: an import that was killed; choose another folder"):
        take(tmp_path / "out", path)
    assert (tmp_path / "out" / "images.parquet").exists()


def test_what_is_no_finished_import_is_refused(tmp_path: Path):
    place = open_location(str(tmp_path / "out"))
    with pytest.raises(
        UsageError, match=r"`generate` or a folder that `safetydpo import-pairs` wrote .*, found nothing"
    ):
        open_preferences(place)
    path = write_file(tmp_path / "a.parquet", [row(1)])
    with pytest.raises(UsageError, match="found a file at"):
        open_preferences(open_location(str(path)))
    take(tmp_path / "out", path)
    (tmp_path / "out" / "record.json").unlink()
    with pytest.raises(
        SafetyDPOError, match=r"expected finished preferences at .*, found no record.json: an import that"
    ):
        open_preferences(place)
    other = open_location(str(tmp_path / "other")).make_folder()
    key = ArtifactKey("pairs", "x", {}, {}, 1)
    write_record(other, Record("pairs", "x", key.hash, 1, {}, {}, "f"))
    with pytest.raises(UsageError, match="found another at .*other: correct the path"):
        open_preferences(other)
