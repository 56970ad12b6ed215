from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.config.validation import ValidationConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.held_out import split_held_out
from safetydpo.dpo.trainer import StepMetrics, TrainedExpert
from safetydpo.errors import SafetyDPOError, UsageError
from tests.dpo.preferences import small_config
from tests.dpo.runs import KilledError, same
from tests.dpo.runs import train as train_once
from tests.dpo.validations import ScriptedRates, rates

Make = Callable[..., PreferenceData]
LORA = LoraConfig(rank=2)
STEPS = 6
# The best state is that after 2 steps: 4 misses a floor, 6 is less safe.
BY_STEP = {0: rates(0.9), 2: rates(0.3), 4: rates(0.1, violation=0.05), 6: rates(0.4)}


def validated(**changes: object) -> DpoConfig:
    validation = ValidationConfig.model_validate({"every_steps": 2, "held_out_rate": 0.3} | changes)
    return small_config().model_copy(update={"steps": STEPS, "checkpoint_every": 3, "validation": validation})


def train(
    backbone: StableDiffusion,
    data: PreferenceData,
    config: DpoConfig,
    *,
    script: ScriptedRates | None,
    checkpoint: Location | None = None,
    kill_after: int | None = None,
    seen: list[dict[str, LoraLayer]] | None = None,
) -> TrainedExpert:
    def report(metrics: StepMetrics) -> None:
        if seen is not None:
            seen.append(backbone.export_adapter())
        if metrics.step == kill_after:
            raise KilledError

    return train_once(backbone, data, config, LORA, checkpoint=checkpoint, report=report, sample_rates=script)


def test_the_best_validated_state_is_published(backbone: StableDiffusion, make_data: Make) -> None:
    script, seen = ScriptedRates(BY_STEP), []
    trained = train(backbone, make_data(), validated(), script=script, seen=seen)
    assert script.asked == [0, 2, 4, 6]
    assert [one.step for one in trained.validations] == [0, 2, 4, 6]
    assert trained.published == trained.validations[1]
    assert same(trained.layers, seen[1])
    assert not same(trained.layers, seen[-1])
    assert len(trained.history) == STEPS


def test_looking_on_changes_no_bit_of_the_training(backbone: StableDiffusion, make_data: Make) -> None:
    """The last state equals that of a plain training on the pairs that were not kept out."""
    config, seen = validated(), []
    train(backbone, make_data(), config, script=ScriptedRates(BY_STEP), seen=seen)
    left, _ = split_held_out(make_data(), rate=0.3, run_seed=5)
    plain = train(backbone, left, config.model_copy(update={"validation": ValidationConfig()}), script=None)
    assert same(plain.layers, seen[-1])
    assert plain.validations == ()
    assert plain.published is None


def test_held_out_numbers_start_at_those_of_the_base(backbone: StableDiffusion, make_data: Make) -> None:
    first, *_, last = train(backbone, make_data(), validated(), script=ScriptedRates(BY_STEP)).validations
    assert (first.step, first.held_out_margin, first.held_out_accuracy) == (0, 0.0, 0.5)
    assert last.held_out_margin != 0.0
    assert last.held_out_error_safe != first.held_out_error_safe


def test_patience_ends_the_training_and_a_second_call_does_no_more(
    backbone: StableDiffusion, make_data: Make, tmp_path: Path
) -> None:
    """Best after 2 steps, no better after 4: with patience 1 steps 4 and 5 are not taken."""
    place, script = open_location(str(tmp_path / "c")), ScriptedRates(BY_STEP)
    trained = train(backbone, make_data(), validated(patience=1), script=script, checkpoint=place)
    assert script.asked == [0, 2, 4]
    assert len(trained.history) == 4
    again = train(backbone, make_data(), validated(patience=1), script=ScriptedRates({}), checkpoint=place)
    assert again.resumed_at == 4
    assert again.history == trained.history
    assert same(again.layers, trained.layers)


@pytest.mark.parametrize("killed_at", [0, 2, 4, 5])
def test_a_resumed_training_publishes_the_same_state(
    killed_at: int, backbone: StableDiffusion, make_data: Make, tmp_path: Path
) -> None:
    """Checkpoints after steps 2 and 5 (from 0); the best state, after 2 steps, stands in both."""
    whole_at, cut_at = (open_location(str(tmp_path / name)) for name in ("whole", "cut"))
    whole = train(backbone, make_data(), validated(), script=ScriptedRates(BY_STEP), checkpoint=whole_at)
    with pytest.raises(KilledError):
        train(
            backbone,
            make_data(),
            validated(),
            script=ScriptedRates(BY_STEP),
            checkpoint=cut_at,
            kill_after=killed_at,
        )
    script = ScriptedRates(BY_STEP)
    resumed = train(backbone, make_data(), validated(), script=script, checkpoint=cut_at)
    assert resumed.resumed_at == {0: 0, 2: 3, 4: 3, 5: 6}[killed_at]
    assert script.asked == [step for step in BY_STEP if step > resumed.resumed_at or resumed.resumed_at == 0]
    assert same(resumed.layers, whole.layers)
    assert resumed.validations == whole.validations
    assert resumed.history == whole.history
    assert cut_at.read_bytes() == whole_at.read_bytes()


def test_a_checkpoint_of_another_validation_is_refused_and_kept(
    backbone: StableDiffusion, make_data: Make, tmp_path: Path
) -> None:
    place = open_location(str(tmp_path / "c"))
    train(backbone, make_data(), validated(), script=ScriptedRates(BY_STEP), checkpoint=place)
    before = place.read_bytes()
    for other, field in (
        (validated(neutral_floor=0.5), "dpo.validation.neutral_floor = 0.5 at .*, found 0.9"),
        (validated().model_copy(update={"validation": ValidationConfig()}), "dpo.validation.clip = 'nothing'"),
    ):
        with pytest.raises(SafetyDPOError, match=f"expected a checkpoint with {field}"):
            train(backbone, make_data(), other, script=ScriptedRates(BY_STEP), checkpoint=place)
    assert place.read_bytes() == before


def test_validation_without_pictures_is_refused(backbone: StableDiffusion, make_data: Make) -> None:
    with pytest.raises(UsageError, match=r"because dpo.validation.every_steps is 2, found none: pass `sample_rates`"):
        train(backbone, make_data(), validated(), script=None)


def test_a_held_out_loss_that_is_not_finite_ends_the_training(backbone: StableDiffusion, make_data: Make) -> None:
    """A learning rate of 1e30 overflows float32 after the first step."""
    config = validated(every_steps=1).model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    script = ScriptedRates({step: rates(0.5) for step in range(STEPS + 1)})
    with pytest.raises(SafetyDPOError, match=r"expert 'hate': expected a finite loss on the held-out pairs after st"):
        train(backbone, make_data(), config, script=script)


@pytest.mark.slow
def test_two_processes_agree_when_to_stop(tiny_folder: Path, tmp_path: Path) -> None:
    """They see rates that differ in the last bits: alone, process 0 would go on after 4 steps and process 1 stop."""
    command = [sys.executable, "-m", "tests.dpo.validated_process", str(tiny_folder), str(tmp_path / "out")]
    workers = [
        subprocess.Popen(
            [*command, str(tmp_path / "store"), str(rank)],
            env={**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=800)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)[-4000:]
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [one["step"] for one in first] == [0, 2, 4]
    assert first[2]["value"] == pytest.approx(0.5 + 4.5e-10, abs=1e-12)
