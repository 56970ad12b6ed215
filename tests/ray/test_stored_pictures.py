from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.stored_pictures import StoredPictures
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import read_chosen, table_from_rows, write_table
from safetydpo.errors import SafetyDPOError

ROW = {
    "status": "ok", "error": "", "attempt": 1, "select_concept": "", "select_background": "", "select_unsafe": False,
    "select_unrecognisable": False, "audit_concept": "", "audit_background": "", "audit_unsafe": False,
    "audit_unrecognisable": False, "clip_embedding": [0.5], "micro_batch": None,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Location:
    """150 pictures in three row groups; every tenth failed."""
    rows = [{**ROW, "image_id": f"id-{n}", "image": None if n % 10 == 0 else bytes([n])} for n in range(150)]
    location = open_location(str(tmp_path / "outcomes.parquet"))
    write_table(location, table_from_rows(rows, OUTCOMES))
    return location


def test_only_what_is_asked_for_is_read(file: Location) -> None:
    pictures = StoredPictures(file, {("base", f"prompt-{n}", 0): f"id-{n}" for n in range(150)})
    keys = [("base", f"prompt-{n}", 0) for n in (149, 3, 70)]
    assert pictures.read(keys) == {keys[0]: bytes([149]), keys[1]: bytes([3]), keys[2]: None}
    assert pictures["base", "prompt-64", 0] == bytes([64])
    assert len(pictures) == len(list(pictures)) == 150
    assert pictures.read([]) == {}


def test_two_rows_of_one_picture_both_have_it(file: Location) -> None:
    pictures = StoredPictures(file, {("base", "a", 0): "id-5", ("ties", "a", 0): "id-5"})
    assert set(pictures.read(pictures).values()) == {bytes([5])}


def test_row_groups_without_a_wanted_row_are_passed_over(file: Location) -> None:
    found = read_chosen(file, OUTCOMES, columns=["image_id"], id_column="image_id", wanted={"id-63", "id-64", "none"})
    assert [row["image_id"] for row in found] == ["id-63", "id-64"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    pictures = StoredPictures(open_location(str(tmp_path / "broken.parquet")), {("base", "a", 0): "id-5"})
    with pytest.raises(SafetyDPOError, match="expected a complete Parquet file at .*broken.parquet"):
        pictures.read([("base", "a", 0)])
