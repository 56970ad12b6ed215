"""Faults of a pool on a real local Ray: an actor that dies, a row that never works, a batch that was left open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.pool_index import read_index
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import Config
from tests.ray.test_salvage import open_batch
from tests.ray.toy_workers import OUTPUT, LengthWorker, manifest


def _stage(**arguments: object) -> PoolStage:
    return PoolStage("toy", OUTPUT, "row_id", LengthWorker, arguments, batch_size=4)


@pytest.mark.slow
def test_a_dead_actor_and_a_hopeless_row(cluster: None, small: Config, tmp_path: Path) -> None:
    """The first actor dies in mid-batch; row-001 fails three times and is handed back as it is."""
    pool = open_location(str(tmp_path / "pool"))
    stage = _stage(never="row-001", die_once=str(tmp_path / "died"))
    rows = fill_pool(pool, manifest(6), stage, execution=small.execution)
    assert (tmp_path / "died").exists()
    assert rows.column("status").to_pylist() == ["ok", "error", "ok", "ok", "ok", "ok"]


@pytest.mark.slow
def test_a_command_that_wants_one_row_more_makes_that_row_only(cluster: None, small: Config, store: Location):
    """Killed with three of four rows made, then asked for five: two are made, and the failed one again."""
    open_batch(store)
    stage = PoolStage("toy", OUTPUT, "row_id", LengthWorker, {}, batch_size=4)
    found = fill_pool(store, manifest(5), stage, execution=small.execution)
    assert found.column("status").to_pylist() == ["ok"] * 5
    asked = [
        json.loads((batch / "record.json").read_bytes())["rows"] for batch in store.list() if batch.name != "batch-1"
    ]
    # row-002 to row-004, then row-003, which fails at its first attempt, again.
    assert sorted(asked) == [1, 3]
    assert read_index(store, OUTPUT, id_column="row_id").num_rows == 5
