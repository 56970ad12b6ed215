"""Faults of a pool on a real local Ray: an actor that dies, a row that never works."""

from __future__ import annotations

from pathlib import Path

from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from tests.ray.toy_workers import OUTPUT, LengthWorker, manifest


def _stage(**arguments: object) -> PoolStage:
    return PoolStage("toy", OUTPUT, "row_id", LengthWorker, arguments, batch_size=4)


def test_a_dead_actor_and_a_hopeless_row(cluster: None, small: Config, tmp_path: Path) -> None:
    """The first actor dies in mid-batch; row-001 fails three times and is handed back as it is."""
    pool = open_location(str(tmp_path / "pool"))
    stage = _stage(never="row-001", die_once=str(tmp_path / "died"))
    rows = fill_pool(pool, manifest(6), stage, execution=small.execution)
    assert (tmp_path / "died").exists()
    assert rows.column("status").to_pylist() == ["ok", "error", "ok", "ok", "ok", "ok"]
