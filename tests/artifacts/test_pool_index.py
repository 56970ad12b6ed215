from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts import pool_index
from safetydpo.artifacts.pool_index import close_index, good_rows, index_schema, read_index, read_pool
from safetydpo.artifacts.schemas import IMAGES, LATENTS, OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table

PICTURES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=True),
        pa.field("status", pa.string(), nullable=False),
    ]
)


def picture(image_id: str, status: str = "ok") -> dict[str, object]:
    return {"image_id": image_id, "image": f"picture {image_id}".encode(), "status": status}


def close(pool: Location, name: str, files: dict[str, list[dict[str, object]]], *, indexed: bool = True) -> Location:
    batch = pool / name
    for file, rows in files.items():
        write_table(batch / "data" / file, table_from_rows(rows, PICTURES))
    if indexed:
        close_index(batch, PICTURES, id_column="image_id")
    (batch / "record.json").write_bytes(b"{}")
    return batch


def test_the_index_leaves_out_pictures_and_vectors():
    assert "image" not in index_schema(IMAGES).names
    assert "latent" not in index_schema(LATENTS).names
    assert not {"image", "clip_embedding"} & set(index_schema(OUTCOMES).names)
    assert index_schema(IMAGES).names[-1] == "file"


def test_the_index_names_each_row_and_its_file(store: Location):
    """Two files of two rows; the second file repeats a, which is dropped there."""
    batch = close(store, "batch-1", {"1": [], "2.parquet": [picture("b"), picture("a")], "3.parquet": [picture("a")]})
    assert not (batch / "data" / "3.parquet").exists()
    index = read_index(store, PICTURES, id_column="image_id")
    assert index.to_pylist() == [
        {"image_id": "a", "status": "ok", "file": "batch-1/data/2.parquet"},
        {"image_id": "b", "status": "ok", "file": "batch-1/data/2.parquet"},
    ]


def test_a_batch_closed_without_an_index_is_read_all_the_same(store: Location):
    close(store, "batch-1", {"1.parquet": [picture("b", "error"), picture("c")]}, indexed=False)
    close(store, "batch-2", {"1.parquet": [picture("a"), picture("b")]})
    index = read_index(store, PICTURES, id_column="image_id")
    assert [(row["image_id"], row["status"], row["file"][:7]) for row in index.to_pylist()] == [
        ("a", "ok", "batch-2"),
        ("b", "ok", "batch-2"),
        ("c", "ok", "batch-1"),
    ]
    assert read_pool(store, PICTURES, wanted={"c", "x"}, id_column="image_id").to_pylist() == [picture("c")]


@pytest.mark.parametrize("rows_per_look_up", [1, 2, 100])
def test_rows_that_nobody_wants_are_left_out_on_the_way(
    store: Location, monkeypatch: pytest.MonkeyPatch, rows_per_look_up: int
):
    """Three batches, `b` failed in the first and was made in the last: the same whenever ids are looked up."""
    monkeypatch.setattr(pool_index, "ROWS_PER_LOOK_UP", rows_per_look_up)
    close(store, "batch-1", {"1.parquet": [picture("a"), picture("b", "error")]})
    close(store, "batch-2", {"1.parquet": [picture("c")]})
    close(store, "batch-3", {"1.parquet": [picture("b"), picture("d")]})
    rows = read_index(store, PICTURES, wanted=["b", "c", "x"], id_column="image_id").to_pylist()
    assert [(row["image_id"], row["status"], row["file"][:7]) for row in rows] == [
        ("b", "ok", "batch-3"),
        ("c", "ok", "batch-2"),
    ]
    assert read_index(store, PICTURES, id_column="image_id").num_rows == 4


def test_files_are_read_in_name_order_by_many_readers(store: Location):
    """Forty files, each repeating a row of the one before: the first in name order keeps it."""
    files = {f"{n:02d}.parquet": [picture(f"row-{n:02d}"), picture(f"row-{max(0, n - 1):02d}")] for n in range(40)}
    close(store, "batch-1", files)
    index = read_index(store, PICTURES, id_column="image_id").to_pylist()
    assert [(row["image_id"], row["file"]) for row in index] == [
        (f"row-{n:02d}", f"batch-1/data/{n:02d}.parquet") for n in range(40)
    ]
    assert read_pool(store, PICTURES, id_column="image_id").to_pylist() == [picture(f"row-{n:02d}") for n in range(40)]


def test_planning_reads_no_picture(store: Location, monkeypatch: pytest.MonkeyPatch):
    """With the data files gone, the index still says what there is."""
    batch = close(store, "batch-1", {"1.parquet": [picture("a"), picture("b")]})
    (batch / "data" / "1.parquet").delete()
    assert read_index(store, PICTURES, wanted=pa.array(["b"]), id_column="image_id").num_rows == 1


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=12))
def test_the_best_row_is_the_first_good_one_else_the_first(rows: list[tuple[str, bool]]):
    """Compared with a dictionary filled row by row."""
    table = pa.table(
        {
            "image_id": pa.array([row_id for row_id, _ in rows], type=pa.string()),
            "status": pa.array(["ok" if ok else "error" for _, ok in rows], type=pa.string()),
            "file": pa.array([str(index) for index in range(len(rows))], type=pa.string()),
        }
    )
    expected: dict[str, tuple[bool, str]] = {}
    for index, (row_id, ok) in enumerate(rows):
        if row_id not in expected or (ok and not expected[row_id][0]):
            expected[row_id] = (ok, str(index))
    best = pool_index._best_rows(table, id_column="image_id")
    assert best.column("image_id").to_pylist() == sorted(expected)
    assert best.column("file").to_pylist() == [expected[row_id][1] for row_id in sorted(expected)]


def test_rows_without_a_status_are_good():
    table = pa.table({"image_id": ["a", "b"]})
    assert good_rows(table).to_pylist() == [True, True]
    assert table.slice(2).filter(good_rows(table.slice(2))).num_rows == 0
