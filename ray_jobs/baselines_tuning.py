"""Comparators tuned on Ray: candidates of one comparator side by side, each a task of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from ray_jobs.baselines import Candidates, ComparatorBench, tune
from ray_jobs.cluster import connect
from ray_jobs.progress import progress_bar
from ray_jobs.resources import most_workers, task_options
from ray_jobs.run import Run
from safetydpo.artifacts.records import Record
from safetydpo.artifacts.storage import Location

LABEL = "candidates of comparators"


def tune_comparators(run: Run) -> dict[str, Record]:
    """Make or find the tuned comparators of `identity.evaluation.comparators`, in its order."""

    def measure(folder: Location, name: str, candidates: Candidates) -> None:
        connect(run.config)
        execution = run.config.execution
        # Neighbouring candidates to different tasks: those at the front may all be of the slow kind.
        workers = most_workers(execution)
        shares = [candidates[start::workers] for start in range(workers)]
        task = _measure.options(**task_options(execution))
        config = run.config.model_dump(mode="json")
        with progress_bar(f"{LABEL}: {name}", total=len(candidates)) as board:
            ray.get([task.remote(config, folder.path, name, list(share), board) for share in shares if share])

    return {name: tune(run, name, measure) for name in run.config.identity.evaluation.comparators}


@ray.remote
def _measure(config: Mapping[str, Any], path: str, name: str, candidates: Candidates, board: Any) -> None:
    bench = ComparatorBench(config)
    folder = Location(bench.run.store.filesystem, path)
    for index, settings in candidates:
        bench.measure(folder, name, index, settings)
        board.add.remote(f"{LABEL}: {name}", 1)
