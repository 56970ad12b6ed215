"""One of two commands that work on the same tasks; run as `python -m tests.ray.two_commands FOLDER NAME COUNT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ray_jobs.cluster import connect, disconnect
from ray_jobs.lanes import Task, run_lanes
from ray_jobs.run import Run
from safetydpo.artifacts.storage import open_location
from safetydpo.config.schema import Config
from tests.ray.smoke_place import wait_for
from tests.ray.toy_lanes import toy_lane


def main() -> None:
    """Print what failed; the records tell who made what."""
    folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = Config.model_validate({"name": f"command-{name}", "execution": {"num_workers": 1, "logical_cpus": 4}})
    connect(config)
    (folder / f"ready-{name}").touch()
    assert wait_for(lambda: len(list(folder.glob("ready-*"))) == 2, seconds=120)
    tasks = [Task(f"task-{index}", open_location(str(folder / f"task-{index}")), 1) for index in range(count)]
    processes = folder / f"processes-{name}"
    processes.mkdir()
    settings = {
        "folders": [task.folder.path for task in tasks],
        "processes": str(processes),
        "faults": {},
        "steps": 5,
        "seconds": 0.2,
    }
    print(json.dumps(run_lanes(Run(config), tasks, toy_lane, settings, num_lanes=1)))
    disconnect()


if __name__ == "__main__":
    main()
