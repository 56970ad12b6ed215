"""Tracking servers that take named numbers: Weights & Biases and MLflow, if `execution.loggers` asks for them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from safetydpo.errors import UsageError

PROJECT = "safetydpo"
MLFLOW_PLACE = "MLFLOW_TRACKING_URI"


class MetricSink(Protocol):
    """A place that takes named numbers."""

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Take numbers of step `step`; steps never go back."""
        ...

    def close(self) -> None:
        """Write what is left and let go."""
        ...


class WandbSink:
    """A run of Weights & Biases; place and mode come from its own variables (WANDB_PROJECT, WANDB_MODE, …)."""

    def __init__(self, folder: Path | None, *, name: str, group: str, settings: Mapping[str, Any]) -> None:
        """Start a run.

        Raises:
            UsageError: if the package is missing.
        """
        check_logger("wandb")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            group=group,
            config=dict(settings),
            dir=None if folder is None else str(folder),
            # One process trains many experts, each a run of its own.
            reinit="create_new",
        )

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Log one row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowSink:
    """A run of the MLflow server, or folder, that MLFLOW_TRACKING_URI names."""

    def __init__(self, *, name: str, group: str, settings: Mapping[str, Any]) -> None:
        """Start a run in the experiment `group`.

        Raises:
            UsageError: if the package or the variable is missing.
        """
        check_logger("mlflow")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(group)
        experiment = self._client.create_experiment(group) if found is None else found.experiment_id
        self._run_id: str = self._client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        self._client.log_batch(self._run_id, params=params)

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Log one row."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)


def check_logger(logger: str) -> None:
    """Refuse a logger that cannot be used here.

    Raises:
        UsageError: if its package is not installed, or it is MLflow and nothing says where its server is.
    """
    if find_spec(logger) is None:
        raise UsageError(
            f"expected the package {logger!r} for execution.loggers, found none: pip install 'safetydpo[{logger}]', or "
            "leave it out"
        )
    if logger == "mlflow" and not os.environ.get(MLFLOW_PLACE):
        raise UsageError(
            f"expected {MLFLOW_PLACE} in the environment for execution.loggers 'mlflow', found none: set it to the "
            "address of a server or to a folder"
        )


def open_trackers(
    loggers: Sequence[str], *, name: str, group: str, settings: Mapping[str, Any], folder: Path | None = None
) -> list[MetricSink]:
    """Return a run at each of `loggers` that is a tracking server.

    Args:
        loggers: names of `execution.loggers`.
        name: what the run is called there.
        group: what the runs of one config have in common there.
        settings: shown beside the numbers; flat.
        folder: where the client of Weights & Biases keeps its files; None = where it likes.

    Raises:
        UsageError: if a package or a setting of a logger is missing.
    """
    for logger in loggers:
        check_logger(logger)
    sinks: list[MetricSink] = []
    if "wandb" in loggers:
        sinks.append(WandbSink(folder, name=name, group=group, settings=settings))
    if "mlflow" in loggers:
        sinks.append(MlflowSink(name=name, group=group, settings=settings))
    return sinks
