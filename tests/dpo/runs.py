"""Training in a test: start, kill, disturb, compare."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.artifacts.storage import Location
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
    checkpoint: Location | None = None,
    report: Callable[[StepMetrics], None] = lambda _: None,
    engine: Engine | None = None,
    expert: str = "hate",
) -> TrainedExpert:
    own = engine or open_engine(backbone, config=config, lora=lora)
    try:
        return train_expert(
            backbone,
            data,
            config=config,
            lora=lora,
            run_seed=5,
            expert_name=expert,
            engine=own,
            checkpoint=checkpoint,
            report=report,
        )
    finally:
        if engine is None:
            own.close()


def largest_difference(one: dict[str, LoraLayer], other: dict[str, LoraLayer]) -> float:
    assert one.keys() == other.keys()
    pairs = [(one[n].down, other[n].down) for n in one] + [(one[n].up, other[n].up) for n in one]
    return max(float((a - b).abs().max()) for a, b in pairs)


def disturb(engine: Engine, *, calls: set[int]) -> None:
    """Make the loss infinite on the way back in these calls of `backward`, counted from 0."""
    backward, done = engine.backward, 0

    def infinite(loss: Tensor) -> None:
        nonlocal done
        backward(loss * float("inf") if done in calls else loss)
        done += 1

    engine.backward = infinite  # type: ignore[method-assign]
