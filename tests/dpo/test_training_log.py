from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from safetydpo.artifacts.storage import open_location
from safetydpo.config.training import LoraConfig
from safetydpo.config.validation import ValidationConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.trainer import METRIC_NAMES, StepMetrics, TrainedExpert, train_expert
from safetydpo.dpo.training_log import SPEED_FILE, TRAINING_FILE, VALIDATIONS_FILE, FolderLog, memory_bytes
from tests.dpo.preferences import small_config
from tests.dpo.validations import ScriptedRates, rates, validation

Make = Callable[..., PreferenceData]


class ListSink:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class KilledError(Exception):
    """Stands in for SIGKILL."""


def train(
    backbone: StableDiffusion, data: PreferenceData, folder: Path, *, kill_after: int = -1, look: bool = False
) -> tuple[TrainedExpert, ListSink]:
    """Train four steps with a checkpoint after two, logged in `folder`; as after a kill, nobody closes the log."""
    validation = ValidationConfig(every_steps=2) if look else ValidationConfig()
    config = small_config().model_copy(update={"validation": validation})
    sink = ListSink()
    log = FolderLog(folder, pairs_per_step=config.pairs_per_step, sinks=[sink])

    def report(metrics: StepMetrics) -> None:
        assert len(lines(folder / TRAINING_FILE)) == metrics.step + 1, "a step is in the file before the next begins"
        if metrics.step == kill_after:
            raise KilledError

    engine = open_engine(backbone, config=config, lora=LoraConfig(rank=2))
    try:
        trained = train_expert(
            backbone,
            data,
            config=config,
            lora=LoraConfig(rank=2),
            run_seed=5,
            expert_name="hate",
            engine=engine,
            checkpoint=open_location(str(folder / "checkpoint")),
            report=report,
            sample_rates=ScriptedRates({0: rates(0.9), 2: rates(0.5), 4: rates(0.6)}) if look else None,
            log=log,
        )
    finally:
        engine.close()
    log.close()
    return trained, sink


def test_every_step_is_in_the_file_at_once_and_without_times(
    backbone: StableDiffusion, make_data: Make, tmp_path: Path
) -> None:
    trained, sink = train(backbone, make_data(), tmp_path)
    rows = lines(tmp_path / TRAINING_FILE)
    assert [row.keys() for row in rows] == [set(METRIC_NAMES)] * 4
    assert rows == [asdict(step) for step in trained.history]
    assert (tmp_path / TRAINING_FILE).read_text() == "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    assert not (tmp_path / VALIDATIONS_FILE).exists()
    assert [step for step, _ in sink.rows] == [0, 1, 2, 3]
    assert {"train/loss", "train/error_reference_unsafe", "train/learning_rate"} <= sink.rows[0][1].keys()
    assert sink.is_closed


def test_speed_and_memory_stand_apart(backbone: StableDiffusion, make_data: Make, tmp_path: Path) -> None:
    """4 pairs per step: pairs per second = 4 / seconds."""
    _, sink = train(backbone, make_data(), tmp_path)
    rows = lines(tmp_path / SPEED_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["pairs_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["memory_bytes"] > 50e6, "a process with torch in it"
    assert sink.rows[0][1]["speed/pairs_per_second"] == rows[0]["pairs_per_second"]


def test_files_of_an_interrupted_training_equal_those_of_an_undisturbed_one(
    backbone: StableDiffusion, make_data: Make, tmp_path: Path
) -> None:
    """Killed after step 2, with a checkpoint after step 1: step 2 is taken twice and stands there once."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(backbone, make_data(), whole, look=True)
    with pytest.raises(KilledError):
        train(backbone, make_data(), cut, look=True, kill_after=2)
    assert len(lines(cut / TRAINING_FILE)) == 3
    _, sink = train(backbone, make_data(), cut, look=True)
    for name in (TRAINING_FILE, VALIDATIONS_FILE):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in lines(cut / VALIDATIONS_FILE)] == [0, 2, 4]
    assert [row["step"] for row in lines(cut / SPEED_FILE) if "seconds" in row] == [0, 1, 2, 2, 3]
    steps = [step for step, _ in sink.rows]
    assert steps == sorted(steps), "Weights & Biases drops steps that go back"
    assert [step for step, values in sink.rows if "train/loss" in values] == [0, 1, 2, 3]
    assert [step for step, values in sink.rows if "validation/unsafe_rate" in values] == [0, 2, 4]


def test_a_training_without_validations_leaves_none_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / VALIDATIONS_FILE).write_text("{}\n")
    log = FolderLog(tmp_path, pairs_per_step=1)
    log.start([], [])
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [SPEED_FILE, TRAINING_FILE]


def test_seconds_of_a_validation_are_logged(tmp_path: Path) -> None:
    sink = ListSink()
    log = FolderLog(tmp_path, pairs_per_step=1, sinks=[sink])
    log.start([], [])
    log.validation(validation(20), seconds=1.5)
    log.close()
    assert lines(tmp_path / SPEED_FILE) == [{"step": 20, "validation_seconds": 1.5}]
    assert lines(tmp_path / VALIDATIONS_FILE) == [asdict(validation(20))]
    assert sink.rows[0][0] == 20
    assert sink.rows[0][1]["speed/validation_seconds"] == 1.5


def test_memory_is_that_of_this_process() -> None:
    before = memory_bytes("cpu")
    # From the system itself: a tensor may get what an earlier test has freed and the process has kept.
    with mmap.mmap(-1, 120_000_000, flags=mmap.MAP_PRIVATE) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert memory_bytes("cpu") - before > 60e6
