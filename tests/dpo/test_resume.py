"""An interrupted training that goes on ends with equal bytes, with each optimizer and in each strategy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from safetydpo.artifacts.schemas import canonical_json
from safetydpo.artifacts.storage import open_location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from tests.dpo.runs import KilledError, kill_after, largest_difference, train

Make = Callable[..., PreferenceData]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("ddp", "adamw"),
        ("single", "adafactor"),
        ("single", "prodigy"),
        ("single", "adamw_8bit"),
        pytest.param("ddp", "adafactor", marks=slow),
        pytest.param("ddp", "prodigy", marks=slow),
        pytest.param("ddp", "adamw_8bit", marks=slow),
        pytest.param("zero 2", "adamw", marks=slow),
        pytest.param("zero 3", "adamw", marks=slow),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_equal_bytes(
    strategy: str,
    optimizer: str,
    backbone: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    tmp_path: Path,
) -> None:
    """Three steps with a running mean, and the same with a kill in the last one: one checkpoint, one adapter."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    name, _, stage = strategy.partition(" ")
    changes = {
        "strategy": "deepspeed" if stage else name,
        "zero_stage": int(stage or 1),
        "optimizer": optimizer,
        "learning_rate": 1.0 if optimizer == "prodigy" else 2e-3,
        "ema_decay": 0.9,
        "steps": 3,
        "checkpoint_every": 1,
        "pairs_per_step": 2,
    }
    # A of rank 128 has 2048 or 4096 numbers: some moments are kept in 8 bits, some are not.
    config, lora = config.model_copy(update=changes), LoraConfig(rank=128, targets=("to_q",))
    whole_at, cut_at = open_location(str(tmp_path / "whole")), open_location(str(tmp_path / "cut"))
    whole = train(backbone, make_data(), config, lora, checkpoint=whole_at)
    with pytest.raises(KilledError):
        train(backbone, make_data(), config, lora, checkpoint=cut_at, report=kill_after(1))
    resumed = train(backbone, make_data(), config, lora, checkpoint=cut_at)
    assert resumed.resumed_at == 2
    assert largest_difference(whole.layers, resumed.layers) == 0.0
    assert whole_at.read_bytes() == cut_at.read_bytes()


def test_a_checkpoint_of_an_earlier_format_is_not_gone_on_from(
    backbone: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    lora: LoraConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line says so, and the expert is that of a training without any; the checkpoint is overwritten in time."""
    config = config.model_copy(update={"strategy": "single", "steps": 2, "checkpoint_every": 1})
    whole_at, old_at = open_location(str(tmp_path / "whole")), open_location(str(tmp_path / "old"))
    whole = train(backbone, make_data(), config, lora, checkpoint=whole_at)
    content = canonical_json({"format_version": 1, "step": 1}).decode()
    old_at.write_bytes(save({"history": torch.ones(1)}, metadata={"training": content}))
    with caplog.at_level(logging.WARNING):
        anew = train(backbone, make_data(), config, lora, checkpoint=old_at)
    assert [record.message for record in caplog.records] == [
        f"expert 'hate' is trained anew from its first step: the checkpoint at {old_at} has format 1, this version "
        "reads 2"
    ]
    assert anew.resumed_at == 0
    assert largest_difference(whole.layers, anew.layers) == 0.0
    assert whole_at.read_bytes() == old_at.read_bytes()
