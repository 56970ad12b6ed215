"""How Ray Data runs the pipelines of pools: it resumes, it does not give up on a lost node, it is quiet."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.data
from ray.data.checkpoint import CheckpointConfig

from ray_jobs.resources import selecting
from ray_jobs.salvage import CHECKPOINT_FOLDER
from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import ExecutionConfig

NO_PROGRESS_SECONDS = 6 * 3600


@contextmanager
def checkpointing(folder: Location, id_column: str, *, execution: ExecutionConfig) -> Iterator[None]:
    """Let Ray Data resume what it makes in `folder`, on nodes of the run, while the block runs."""
    context = ray.data.DataContext.get_current()
    checkpoint = (folder / CHECKPOINT_FOLDER).make_folder()
    wanted = {
        "checkpoint_config": CheckpointConfig(
            id_column=id_column,
            checkpoint_path=checkpoint.path,
            delete_checkpoint_on_success=False,
            override_filesystem=checkpoint.filesystem,
        ),
        # Every task and actor of the pipeline, those that read and write too.
        "execution_options": _options(context.execution_options, execution),
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        # The second version starts an actor to read the footer of what is always one small file.
        "use_datasource_v2": False,
        "execution_no_progress_timeout_s": NO_PROGRESS_SECONDS,
        # The file system waits for an object store that is gone (artifacts/object_store.py); Ray would do it ten times.
        "retried_io_errors": [],
        # Actors that die (a lost node, out of memory) are started again; Ray's defaults give up at once.
        "retried_map_errors": True,
        "max_map_retries": 2,
    }
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _options(before: Any, execution: ExecutionConfig) -> Any:
    options = copy.copy(before)
    options.label_selector = selecting(execution).get("label_selector")
    return options
