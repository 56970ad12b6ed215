"""How a pool plans its work: rows per task, and columns that workers read from another pool."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_jobs import pools
from ray_jobs.pools import Attachment, PoolStage, attach_columns, rows_per_block
from safetydpo.artifacts import pool_index
from safetydpo.artifacts.pool_index import read_index
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.errors import SafetyDPOError
from tests.artifacts.test_pool_index import PICTURES, close, picture


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


def test_tasks_of_small_rows_are_larger_where_there_are_many():
    """20,000 rows of one worker: 256 at most; 1,000 are 32 batches of 32, over 4 tasks 8 each: 256; 500: 4 each."""
    found = [rows_per_block(rows, batch_size=32, workers=1, most=256) for rows in (20_000, 1_000, 500)]
    assert found == [256, 256, 128]


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
