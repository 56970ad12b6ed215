"""The log of one expert's training in a folder of its own: JSON lines, TensorBoard, and further places on request.

| file | what |
|---|---|
| `training.jsonl` | one line per optimizer step: losses, errors, margin, gradient norm, learning rate; no times |
| `validations.jsonl` | one line per validation; no times |
| `speed.jsonl` | seconds, pairs per second and memory of each step, seconds of each validation |
| `tensorboard/` | the same numbers as event files |

All grow while the training runs. After an interruption the first two go on from the last checkpoint, so that a line
never stands there twice; they depend on the training's settings alone. Times are kept apart from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, TextIO

import psutil
import torch

from safetydpo.artifacts.metric_sinks import MetricSink
from safetydpo.dpo.watch import Validation

TRAINING_FILE = "training.jsonl"
VALIDATIONS_FILE = "validations.jsonl"
SPEED_FILE = "speed.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def json_line(values: Mapping[str, object]) -> str:
    """Return one line of a JSON lines file: keys sorted, equal values give equal bytes."""
    return json.dumps(values, sort_keys=True) + "\n"


def memory_bytes(device: torch.device | str) -> int:
    """Return the peak of a GPU's allocated memory since it was last reset, or this process's resident memory."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


class FolderLog:
    """Writes the files of one training; close it, also when the training fails."""

    def __init__(
        self,
        folder: Path,
        *,
        pairs_per_step: int,
        device: torch.device | str = "cpu",
        sinks: Sequence[MetricSink] = (),
    ) -> None:
        """Open nothing yet; `start` does. `pairs_per_step` counts the pairs of all processes."""
        self._folder, self._pairs_per_step, self._device, self._sinks = folder, pairs_per_step, device, list(sinks)
        self._files: dict[str, TextIO] = {}

    def start(self, history: Sequence[Mapping[str, float]], validations: Sequence[Validation]) -> None:
        """Write what an interrupted run had done up to its checkpoint, in place of what it had logged."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if torch.device(self._device).type == "cuda":
            # The peak of one expert, not of those before it in this process.
            torch.cuda.reset_peak_memory_stats(self._device)
        for name, rows in (
            (TRAINING_FILE, list(history)),
            (VALIDATIONS_FILE, [asdict(validation) for validation in validations]),
        ):
            if name == VALIDATIONS_FILE and not rows:
                # A training without validations has no such file.
                (self._folder / name).unlink(missing_ok=True)
                continue
            self._open(name, "w").writelines(json_line(row) for row in rows)
            self._files[name].flush()
        self._open(SPEED_FILE, "a" if history or validations else "w")
        # Sinks get the whole training once more: a place that keeps only what comes after a kill has gaps.
        events = [(int(row["step"]), 1, _train_values(row)) for row in history]
        events += [(one.step, 0, _validation_values(one)) for one in validations]
        for step, _, values in sorted(events, key=lambda event: event[:2]):
            self._send(values, step=step)

    def step(self, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Append one step."""
        speed = {"pairs_per_second": self._pairs_per_step / seconds, "memory_bytes": memory_bytes(self._device)}
        self._append(TRAINING_FILE, metrics)
        self._append(SPEED_FILE, {"step": metrics["step"], "seconds": seconds, **speed})
        values = _train_values(metrics) | {f"speed/{name}": value for name, value in speed.items()}
        self._send(values, step=int(metrics["step"]))

    def validation(self, validation: Validation, *, seconds: float) -> None:
        """Append one validation."""
        self._append(VALIDATIONS_FILE, asdict(validation))
        self._append(SPEED_FILE, {"step": validation.step, "validation_seconds": seconds})
        values = _validation_values(validation) | {"speed/validation_seconds": seconds}
        self._send(values, step=validation.step)

    def close(self) -> None:
        """Close files and sinks."""
        for file in self._files.values():
            file.flush()
            # The record that is written next vouches for the whole folder.
            os.fsync(file.fileno())
            file.close()
        for sink in self._sinks:
            sink.close()

    def _open(self, name: str, mode: Literal["w", "a"]) -> TextIO:
        self._files[name] = open(self._folder / name, mode, encoding="utf-8")  # noqa: SIM115
        return self._files[name]

    def _append(self, name: str, values: Mapping[str, object]) -> None:
        file = self._files.get(name) or self._open(name, "w")
        file.write(json_line(values))
        # So that `tail -f` shows it; not forced to the disk, since a checkpoint holds the same numbers.
        file.flush()

    def _send(self, values: Mapping[str, float], *, step: int) -> None:
        for sink in self._sinks:
            sink.write(values, step=step)


def _train_values(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in metrics.items() if name != "step"}


def _validation_values(validation: Validation) -> dict[str, float]:
    return {f"validation/{name}": value for name, value in asdict(validation).items() if name != "step"}
