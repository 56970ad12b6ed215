from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs import pool_index, pools
from ray_jobs.pool_index import close_index, good_rows, index_schema, read_index, read_pool
from ray_jobs.pools import Attachment, PoolStage, attach_columns, rows_per_block
from safetydpo.artifacts.schemas import IMAGES, LATENTS, OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, table_from_rows, write_table
from safetydpo.errors import SafetyDPOError

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


def test_attached_pictures_come_in_the_order_of_the_rows(store: Location):
    close(store, "batch-1", {"1.parquet": [picture("b"), picture("a")], "2.parquet": [picture("c")]})
    index = read_index(store, PICTURES, id_column="image_id")
    rows = index.select(["image_id", "file"]).take([2, 0, 1])
    attach = Attachment(store, PICTURES.remove(2), "image_id")
    found = attach_columns(rows, attach)
    assert found.column_names == ["image_id", "image"]
    assert found.column("image").to_pylist() == [b"picture c", b"picture a", b"picture b"]
    wrong = rows.set_column(1, "file", pc.replace_substring(rows.column("file"), "2.parquet", "1.parquet"))
    with pytest.raises(SafetyDPOError, match="expected the row c in .*, where its index says it is, found it gone"):
        attach_columns(wrong, attach)


@pytest.mark.parametrize(
    ("rows", "batch_size", "workers", "expected"),
    [
        (32, 16, 2, 16),  # 2 batches, 2 workers: one each
        (1000, 16, 2, 64),  # 63 batches: 7 a task would do, 64 rows are 4
        (200, 16, 2, 16),  # 13 batches over 8 tasks: one each
        (1000, 100, 2, 100),  # a batch is never divided
        (256, 8, 1, 64),
        (1, 4, 8, 4),
    ],
)
def test_rows_of_a_task(rows: int, batch_size: int, workers: int, expected: int):
    assert rows_per_block(rows, batch_size=batch_size, workers=workers) == expected


def test_attached_rows_open_each_file_once(store: Location, monkeypatch: pytest.MonkeyPatch):
    """Ids in hash order jump between files; planned by file, 4 files are opened 4 times."""
    names = [f"{index * 7919 % 16:02d}" for index in range(16)]
    close(store, "batch-1", {f"{n}.parquet": [picture(name) for name in names[n::4]] for n in range(4)})
    index = read_index(store, PICTURES, id_column="image_id").select(["image_id", "file"])
    stage = PoolStage("toy", PICTURES, "image_id", dict, {}, 4, attach=Attachment(store, PICTURES, "image_id"))
    plan = pools._plan_batch(store / "empty", index, stage)
    assert plan is not None
    assert plan.manifest.column("file").to_pylist() == sorted(index.column("file").to_pylist())
    opened = []

    def counted(place: Location, *rest: object, **more: object) -> pa.Table:
        opened.append(place)
        return read_table(place, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pool_index, "read_table", counted)
    for start in range(0, 16, 4):
        attach_columns(plan.manifest.slice(start, 4), Attachment(store, PICTURES.remove(2), "image_id"))
    assert len(opened) == 4
