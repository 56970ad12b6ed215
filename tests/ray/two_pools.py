"""One of two commands that fill one pool; run as `python -m tests.ray.two_pools FOLDER NAME COUNT`."""

from __future__ import annotations

import sys
from pathlib import Path

from ray_jobs.cluster import connect, disconnect
from ray_jobs.pools import PoolStage, fill_pool
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from tests.ray.smoke_place import wait_for
from tests.ray.toy_workers import OUTPUT, LengthWorker, manifest


def main() -> None:
    """Print how many rows there are in the end."""
    folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = Config.model_validate({"name": f"command-{name}", "execution": {"num_workers": 1, "logical_cpus": 4}})
    connect(config)
    (folder / f"ready-{name}").touch()
    assert wait_for(lambda: len(list(folder.glob("ready-*"))) == 2, seconds=120)
    stage = PoolStage("toy", OUTPUT, "row_id", LengthWorker, {"seconds": 1.0}, batch_size=4)
    rows = fill_pool(open_location(str(folder / "pool")), manifest(count), stage, execution=config.execution)
    print(rows.num_rows, rows.column("status").to_pylist().count("ok"))
    disconnect()


if __name__ == "__main__":
    main()
