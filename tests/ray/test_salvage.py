from __future__ import annotations

import json
import time
from dataclasses import asdict

import pyarrow as pa

from ray_jobs.salvage import salvage_open_batches
from safetydpo.artifacts.attempts import this_process
from safetydpo.artifacts.pool_index import read_pool
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import write_table
from tests.ray.toy_workers import OUTPUT


def rows(*names: str, status: str = "ok") -> pa.Table:
    return pa.table(
        {"row_id": list(names), "length": [len(name) for name in names], "status": [status] * len(names)}, schema=OUTPUT
    )


def open_batch(pool: Location, name: str = "batch-1") -> Location:
    """A batch whose command was killed: two whole files, one torn, a checkpoint, no record."""
    batch = pool / name
    write_table(batch / "data" / "1.parquet", rows("row-000", "row-001"))
    write_table(batch / "data" / "2.parquet", rows("row-002", status="error"))
    whole = (batch / "data" / "1.parquet").read_bytes()
    (batch / "data" / "3.parquet").write_bytes(whole[: len(whole) // 2])
    (batch / "checkpoint" / "ids.parquet").write_bytes(b"x")
    return batch


def test_whole_files_are_closed_and_torn_ones_deleted(store: Location):
    batch = open_batch(store)
    (store / "other" / "file").write_bytes(b"not a batch")
    assert salvage_open_batches(store, OUTPUT, id_column="row_id", leave=store / "batch-9") == 3
    assert [row["row_id"] for row in read_pool(store, OUTPUT, id_column="row_id").to_pylist()] == [
        "row-000",
        "row-001",
        "row-002",
    ]
    record = json.loads((batch / "record.json").read_bytes())
    assert (record["rows"], record["failed_units"]) == (3, ["row-002"])
    assert sorted(file.name for file in batch.walk()) == ["1.parquet", "2.parquet", "index.parquet", "record.json"]
    assert (store / "other" / "file").is_file()
    assert salvage_open_batches(store, OUTPUT, id_column="row_id", leave=store / "batch-9") == 0


def test_what_is_gone_on_with_or_written_to_is_left_alone(store: Location):
    batch = open_batch(store)
    assert salvage_open_batches(store, OUTPUT, id_column="row_id", leave=batch) == 0
    lease = {**asdict(this_process(run="x", lane="x")), "host": "another", "renewed": time.time()}
    (batch / "lease" / "attempt-1").write_bytes(json.dumps(lease).encode())
    assert salvage_open_batches(store, OUTPUT, id_column="row_id", leave=store / "batch-9") == 0
    assert not (batch / "record.json").exists()


def test_a_batch_without_a_whole_row_goes(store: Location):
    (store / "batch-1" / "data" / "1.parquet").write_bytes(b"PAR1")
    write_table(store / "batch-2" / "manifest.parquet", rows("row-000"))
    assert salvage_open_batches(store, OUTPUT, id_column="row_id", leave=store / "batch-9") == 0
    assert store.list() == []
