from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safetydpo.artifacts.picture_listing import Listing, PictureReader, StoredPicture, list_pictures, manifest_of
from safetydpo.artifacts.pool_index import close_index
from safetydpo.artifacts.schemas import IMAGES, STORED_PICTURES
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.errors import SafetyDPOError, UsageError

SUFFIXES = (".png", ".jpg")


def listed(place: Path) -> Listing:
    return list_pictures(open_location(str(place)), SUFFIXES)


def read_all(listing: Listing) -> dict[str, bytes]:
    reader = PictureReader(listing.root)
    return {each.name: reader.read(file=each.file, row_group=each.row_group, row=each.row) for each in listing.pictures}


def test_a_folder_of_files_with_what_is_none_of_them(tmp_path: Path):
    for name, data in {
        "a.png": b"1",
        "deep/b.JPG": b"",
        "notes.txt": b"x",
        ".hidden.png": b"h",
        "z.parquet": b"p",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    listing = listed(tmp_path)
    assert [picture.name for picture in listing.pictures] == ["a.png", "deep/b.JPG"]
    assert list(listing.other_files) == ["notes.txt", "z.parquet"]
    assert read_all(listing) == {"a.png": b"1", "deep/b.JPG": b""}


def test_other_bytes_under_the_same_name_are_another_picture(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"1")
    before = listed(tmp_path).pictures[0].picture_id
    assert listed(tmp_path).pictures[0].picture_id == before
    (tmp_path / "a.png").write_bytes(b"2")
    assert listed(tmp_path).pictures[0].picture_id != before
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert listed(tmp_path).pictures[0].picture_id not in (before, "")


@pytest.mark.parametrize("as_folder", [False, True])
def test_rows_of_parquet_files_in_several_row_groups(tmp_path: Path, as_folder: bool):
    table = pa.table(
        {
            "id": [f"p{index}" for index in range(7)],
            "image": [str(index).encode() if index != 3 else None for index in range(7)],
            "prompt": [f"prompt {index}" for index in range(7)],
            "category": ["hate", None] * 3 + ["hate"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    listing = listed(tmp_path if as_folder else tmp_path / "x.parquet")
    assert [(each.name, each.row_group, each.row) for each in listing.pictures][2:5] == [
        ("p2", 0, 2),
        ("p3", 1, 0),
        ("p4", 1, 1),
    ]
    third = listing.pictures[3]
    assert (third.failure, third.prompt, third.category) == ("missing: no picture in its row", "prompt 3", "")
    assert read_all(listing) == {f"p{index}": str(index).encode() if index != 3 else b"" for index in range(7)}


def test_rows_without_a_name_are_called_by_their_place(tmp_path: Path):
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "x.parquet")
    assert [each.name for each in listed(tmp_path).pictures] == ["x.parquet:0:0", "x.parquet:0:1"]


def image_row(image_id: str, image: bytes | None, attempt: int = 1) -> dict[str, object]:
    return {
        "image_id": image_id,
        "image": image,
        "sha256": "",
        "status": "ok" if image else "error",
        "error": "" if image else "no memory",
        "attempt": attempt,
        "width": 1,
        "height": 1,
        "format": "png",
        "micro_batch": 1,
    }


def test_of_a_pool_each_picture_once_and_those_that_failed_by_name(tmp_path: Path):
    """`b` failed in the first batch and was drawn by the second; `c` never was; a batch without a record is none."""
    batches = {
        "batch-1": [image_row("a", b"A"), image_row("b", None), image_row("c", None)],
        "batch-2": [image_row("b", b"B", 2), image_row("c", None, 2)],
        "batch-3": [image_row("d", b"D")],
    }
    pool = open_location(str(tmp_path))
    for name, rows in batches.items():
        write_table(pool / name / "data" / "part.parquet", table_from_rows(rows, IMAGES))
        close_index(pool / name, IMAGES, id_column="image_id")
        if name != "batch-3":
            (pool / name / "record.json").write_bytes(json.dumps({}).encode())
    listing = listed(tmp_path)
    assert {each.name: each.failure for each in listing.pictures} == {"a": "", "b": "", "c": "not drawn: no memory"}
    assert read_all(listing) == {"a": b"A", "b": b"B", "c": b""}


def test_the_manifest_goes_along_the_files():
    pictures = [StoredPicture("z", "b", 1, 0), StoredPicture("y", "b", 0, 1), StoredPicture("x", "a")]
    table = manifest_of(pictures)
    assert table.schema == STORED_PICTURES
    assert table.column("name").to_pylist() == ["x", "y", "z"]
    assert len(set(table.column("picture_id").to_pylist())) == 3


def test_what_holds_no_pictures(tmp_path: Path):
    with pytest.raises(UsageError, match="expected a folder of pictures or a Parquet file at .*gone, found nothing"):
        listed(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SafetyDPOError, match=r"found none among 1 files: their names must end in \.png, \.jpg or"):
        listed(tmp_path)
    with pytest.raises(UsageError, match=r"found the file .*notes\.txt: name its folder"):
        listed(tmp_path / "notes.txt")
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(SafetyDPOError, match=r"expected a complete Parquet file at .*x\.parquet"):
        listed(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": ["text"]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="expected a column image or picture with the bytes of pictures in"):
        listed(tmp_path / "x.parquet")
    pq.write_table(pa.table({"id": ["a", "a"], "image": [b"1", b"2"]}), tmp_path / "x.parquet")
    with pytest.raises(SafetyDPOError, match="expected each picture once in .*, found 'a' twice"):
        listed(tmp_path / "x.parquet")
