"""Places that take the numbers of a training: TensorBoard always, Weights & Biases and MLflow if they are asked for.

A resumed training is a new run in the last two, which begins with all steps that were done before.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetydpo.artifacts.metric_sinks import MetricSink, check_logger, open_trackers
from safetydpo.dpo.training_log import TENSORBOARD_FOLDER


class TensorBoardSink:
    """Event files in `tensorboard/`, written by tensorboardX, which comes with Ray Tune and needs no TensorBoard."""

    def __init__(self, folder: Path) -> None:
        """Open a file of its own; files of an interrupted run go, because theirs are written once more."""
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder / TENSORBOARD_FOLDER, ignore_errors=True)
        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER))

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Add one scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is queued."""
        self._writer.close()


def open_sinks(
    folder: Path, *, loggers: Sequence[str], name: str, group: str, settings: Mapping[str, Any]
) -> list[MetricSink]:
    """Return TensorBoard in `folder` and every further logger.

    Args:
        folder: local folder of one expert.
        loggers: names of `execution.loggers`.
        name: what the run is called there.
        group: what the runs of one config have in common there.
        settings: shown beside the numbers; flat.

    Raises:
        UsageError: if a package or a setting of a logger is missing.
    """
    # Before TensorBoard's folder is made: what is refused leaves nothing behind.
    for logger in loggers:
        check_logger(logger)
    trackers = open_trackers(loggers, name=name, group=group, settings=settings, folder=folder)
    return [TensorBoardSink(folder), *trackers]
