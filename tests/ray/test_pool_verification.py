"""What a pool does with rows that were not asked for, or are missing; a function plays the part of Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import pyarrow as pa
import pytest

from ray_jobs import pools
from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.pool_index import read_pool
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, write_table
from safetydpo.config.schema import ExecutionConfig
from safetydpo.errors import SafetyDPOError
from tests.ray.toy_workers import INPUT, OUTPUT, LengthWorker, manifest

STAGE = PoolStage("toy", OUTPUT, "row_id", LengthWorker, {}, batch_size=4)
Write = Callable[[list[str]], list[str]]


def fill(store: Location, monkeypatch: pytest.MonkeyPatch, rows: int, write: Write) -> pa.Table:
    """Fill a pool; `write` says which rows come of those that a batch asks for, one file each."""
    numbers = count()

    def execute(batch: Any, data: Location, *_: object, **__: object) -> None:
        for name in write(read_table(batch.folder / pools.MANIFEST_FILE, INPUT).column("row_id").to_pylist()):
            row = {"row_id": [name], "length": [len(name)], "status": ["ok"]}
            write_table(data / f"{next(numbers):03d}.parquet", pa.table(row, schema=OUTPUT))

    @contextmanager
    def no_bar(_label: str, *, total: int) -> Iterator[None]:
        assert total > 0
        yield

    monkeypatch.setattr(pools, "_execute", execute)
    monkeypatch.setattr(pools, "progress_bar", no_bar)
    monkeypatch.setattr(pools, "checkpointing", lambda *_, **__: nullcontext())
    return fill_pool(store, manifest(rows), STAGE, execution=ExecutionConfig())


def test_what_is_missing_is_made_by_the_next_batch(
    store: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Five rows, two at a time: 2 + 2 + 1, each batch closed with what it has."""
    index = fill(store, monkeypatch, 5, lambda asked: asked[:2])
    assert index.column("row_id").to_pylist() == manifest(5).column("row_id").to_pylist()
    assert sorted(json.loads((batch / "record.json").read_bytes())["rows"] for batch in store.list()) == [1, 2, 2]
    assert "toy: 3 rows are missing in" in caplog.text


def test_rows_that_never_come_end_in_one_line(store: Location, monkeypatch: pytest.MonkeyPatch):
    """Nine rows, two at a time, three batches: three rows are left, and the next command makes them."""
    with pytest.raises(SafetyDPOError, match=r"toy: expected each of 9 rows once in .*, found 3 missing and 0 doubled"):
        fill(store, monkeypatch, 9, lambda asked: asked[:2])
    assert fill(store, monkeypatch, 9, lambda asked: asked[:2]).num_rows == 9


@pytest.mark.parametrize(("extra", "found"), [(["other"], "found 5, 1 of them not asked for"), (None, "found 0, 0 of")])
def test_a_batch_of_no_use_is_deleted(
    store: Location, monkeypatch: pytest.MonkeyPatch, extra: list[str] | None, found: str
):
    with pytest.raises(SafetyDPOError, match=f"toy: expected 4 rows once each in .*, {found}.*: run the same command"):
        fill(store, monkeypatch, 4, lambda asked: [] if extra is None else asked + extra)
    assert store.list() == []


def test_rows_that_two_attempts_wrote_stand_there_once(store: Location, monkeypatch: pytest.MonkeyPatch):
    index = fill(store, monkeypatch, 3, lambda asked: asked + asked)
    assert index.num_rows == read_pool(store, OUTPUT, id_column="row_id").num_rows == 3
    assert sum(read_table(batch / "data", OUTPUT).num_rows for batch in store.list()) == 3
