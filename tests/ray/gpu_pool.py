"""Fill a pool on a local Ray that is told of one GPU, and print what it used; for `test_busy_time`.

Usage: python -m tests.ray.gpu_pool FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyarrow as pa
import ray

from ray_jobs.cost_meter import CostMeter
from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import ExecutionConfig

ROWS = pa.schema([pa.field("row_id", pa.string(), nullable=False), pa.field("status", pa.string(), nullable=False)])
WANTED = pa.schema([pa.field("row_id", pa.string(), nullable=False), pa.field("attempt", pa.int32(), nullable=False)])


class Sleeper:
    """Needs 0.3 s for a batch."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a row for each."""
        time.sleep(0.3)
        return table_from_rows([{"row_id": row_id, "status": "ok"} for row_id in table["row_id"].to_pylist()], ROWS)


def main() -> None:
    """Print the cost as JSON."""
    folder = Path(sys.argv[1])
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, logging_level="error")
    execution = ExecutionConfig(num_workers=2, gpus_per_worker=0.5)
    manifest = table_from_rows([{"row_id": f"r{index:02d}", "attempt": 1} for index in range(24)], WANTED)
    stage = PoolStage("sleeps", ROWS, "row_id", Sleeper, {}, batch_size=2)
    with CostMeter(execution) as meter:
        fill_pool(open_location(str(folder)) / "pool", manifest, stage, execution=execution)
    print(json.dumps(meter.cost()))
    ray.shutdown()


if __name__ == "__main__":
    main()
