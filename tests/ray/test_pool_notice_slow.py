"""A node on which a pool's actor works gets a notice: the actor hands back what it cannot make, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from ray_jobs.looks import LOOK_SECONDS
from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from tests.ray.draining import drain
from tests.ray.small_cluster import small_cluster
from tests.ray.smoke_place import PATIENCE, wait_for
from tests.ray.toy_workers import OUTPUT, NotingWorker, manifest

pytestmark = pytest.mark.slow
ROWS, BATCH_SIZE, BATCH_SECONDS = 256, 4, 1.0
BATCHES_PER_TASK = 8
"""Of 64 for two actors."""


@pytest.fixture
def three_nodes() -> Iterator[Cluster]:
    """A head without CPUs, which is where this process is, and three nodes of two."""
    with small_cluster(nodes=3, cpus=2, memory=100_000_000) as cluster:
        yield cluster


def calls_in(folder: Path) -> list[dict[str, Any]]:
    """Every batch that was begun, in the order of time."""
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines(keepends=True)]
    return sorted((json.loads(line) for line in lines if line.endswith("\n")), key=lambda call: float(call["at"]))


def fingerprint(table: pa.Table) -> str:
    return hashlib.sha256(json.dumps(table.sort_by("row_id").to_pylist()).encode()).hexdigest()


def handed_back(cluster: Cluster) -> int:
    """How many processes said that they hand back their rows."""
    logs = Path(cluster.head_node.get_logs_dir_path()).glob("worker-*.err")
    return sum("its rows are handed back" in file.read_text(errors="replace") for file in logs)


@pytest.mark.parametrize(("seconds", "is_enough"), [pytest.param(3.0, False, marks=pytest.mark.long), (600.0, True)])
def test_a_task_that_would_not_end_in_time_is_handed_back(
    three_nodes: Cluster, tmp_path: Path, seconds: float, is_enough: bool
) -> None:
    """Told after its second batch of 8, with 3 s or 600 s left: it goes soon, or makes the two tasks that it has.

    The machine stays, so that nothing but the actor itself can have ended its work.
    """
    calls = tmp_path / "calls"
    calls.mkdir()
    told: dict[str, Any] = {}

    def tell() -> None:
        assert wait_for(lambda: len({call["pid"] for call in calls_in(calls)}) == 2, seconds=200)
        told["node"] = calls_in(calls)[0]["node"]
        assert wait_for(lambda: sum(call["node"] == told["node"] for call in calls_in(calls)) >= 2, seconds=30)
        told["at"] = time.time()
        drain(three_nodes.address, told["node"], seconds=seconds)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    config = Config.model_validate({"name": "notice", "execution": {"num_workers": 2}})
    arguments = {"folder": str(calls), "seconds": BATCH_SECONDS}
    stage = PoolStage("toy", OUTPUT, "row_id", NotingWorker, arguments, batch_size=BATCH_SIZE, passes_per_batch=10**6)
    pool = open_location(str(tmp_path / "pool"))
    rows = fill_pool(pool, manifest(ROWS), stage, execution=config.execution)
    thread.join(timeout=10)
    assert rows.num_rows == ROWS
    stored = pa.concat_tables([pq.read_table(file) for file in (tmp_path / "pool").glob("batch-*/data/*.parquet")])
    undisturbed = [
        {"row_id": name, "length": len(name), "status": "ok"} for name in manifest(ROWS).column("row_id").to_pylist()
    ]
    assert fingerprint(stored) == fingerprint(pa.Table.from_pylist(undisturbed, schema=OUTPUT))
    begun = Counter(row for call in calls_in(calls) for row in call["rows"])
    there = [call for call in calls_in(calls) if call["node"] == told["node"]]
    assert {call["node"] for call in calls_in(calls)} - {told["node"]}, "another node must have worked on"
    assert handed_back(three_nodes) == (0 if is_enough else 1)
    if is_enough:
        assert set(begun.values()) == {1}, "nothing was made twice"
        assert len(there) <= 2 * BATCHES_PER_TASK, "the tasks that it had, and no other"
    else:
        assert there[-1]["at"] - told["at"] < (LOOK_SECONDS + 2 * BATCH_SECONDS) * PATIENCE
        assert len(there) < BATCHES_PER_TASK, "it went in the middle of its first task"
        assert sum(begun.values()) - ROWS == len(there) * BATCH_SIZE, "what it had begun was made again, once"
