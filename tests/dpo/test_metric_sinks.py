from __future__ import annotations

import struct
from pathlib import Path

import pytest

from safetydpo.artifacts import metric_sinks
from safetydpo.dpo.metric_sinks import TensorBoardSink, open_sinks
from safetydpo.dpo.training_log import TENSORBOARD_FOLDER
from safetydpo.errors import UsageError


def read_scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Every scalar of the event files, by the format's definition: length, its checksum, an Event message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_files_hold_every_number(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write({"train/loss": 0.5, "train/margin": 2.0}, step=0)
    sink.write({"train/loss": 0.25}, step=1)
    sink.close()
    assert read_scalars(tmp_path / TENSORBOARD_FOLDER) == [
        (0, "train/loss", 0.5),
        (0, "train/margin", 2.0),
        (1, "train/loss", 0.25),
    ]


def test_event_files_of_an_interrupted_training_are_replaced(tmp_path: Path) -> None:
    for value in (0.5, 0.25):
        sink = TensorBoardSink(tmp_path)
        sink.write({"train/loss": value}, step=0)
        sink.close()
    assert read_scalars(tmp_path / TENSORBOARD_FOLDER) == [(0, "train/loss", 0.25)]


def test_tensorboard_is_always_there(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path, loggers=[], name="hate", group="demo", settings={})
    assert [type(sink) for sink in sinks] == [TensorBoardSink]
    sinks[0].close()


def test_what_is_refused_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metric_sinks, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="expected the package 'wandb' for execution.loggers, found none"):
        open_sinks(tmp_path, loggers=["wandb"], name="hate", group="demo", settings={})
    assert list(tmp_path.iterdir()) == [], "nothing is begun"
