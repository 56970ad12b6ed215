"""Training in a test: start, kill, disturb, compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData
from safetydpo.dpo.engine import Engine, open_engine
from safetydpo.dpo.trainer import StepMetrics, TrainedExpert, train_expert


class KilledError(Exception):
    """Stands in for SIGKILL."""


def kill_after(step: int) -> Callable[[StepMetrics], None]:
    def report(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise KilledError

    return report


def train(
    backbone: StableDiffusion,
    data: PreferenceData,
    config: DpoConfig,
    lora: LoraConfig,
    *,
    engine: Engine | None = None,
    expert: str = "hate",
    run_seed: int = 5,
    **options: Any,
) -> TrainedExpert:
    """Train with an engine of its own unless one is given; `options` are those of `train_expert`."""
    own = engine or open_engine(backbone, config=config, lora=lora)
    try:
        return train_expert(
            backbone,
            data,
            config=config,
            lora=lora,
            run_seed=run_seed,
            expert_name=expert,
            engine=own,
            **options,
        )
    finally:
        if engine is None:
            own.close()


def same(one: dict[str, LoraLayer], other: dict[str, LoraLayer]) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.equal(one[name].down, other[name].down) and torch.equal(one[name].up, other[name].up) for name in one
    )


def differences(one: dict[str, LoraLayer], other: dict[str, LoraLayer]) -> Tensor:
    """How far each component of each layer is from the other's."""
    assert one.keys() == other.keys()
    pairs = [(one[n].down, other[n].down) for n in one] + [(one[n].up, other[n].up) for n in one]
    return torch.cat([(a - b).abs().flatten() for a, b in pairs])


def largest_difference(one: dict[str, LoraLayer], other: dict[str, LoraLayer]) -> float:
    return float(differences(one, other).max())


def disturb(engine: Engine, *, calls: set[int]) -> None:
    """Make the loss infinite on the way back in these calls of `backward`, counted from 0."""
    backward, done = engine.backward, 0

    def infinite(loss: Tensor) -> None:
        nonlocal done
        backward(loss * float("inf") if done in calls else loss)
        done += 1

    engine.backward = infinite  # type: ignore[method-assign]
