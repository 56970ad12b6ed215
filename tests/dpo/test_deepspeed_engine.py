from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.storage import open_location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.descent import Part, descend
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.step import policy_loss
from safetydpo.errors import SafetyDPOError, UsageError
from tests.dpo.alone import run_alone
from tests.dpo.runs import KilledError, disturb, kill_after, largest_difference, train

Make = Callable[..., PreferenceData]


def with_strategy(config: DpoConfig, strategy: str, zero_stage: int = 1) -> DpoConfig:
    # With redirection: it switches the adapter off and on once more in every step.
    return config.model_copy(update={"strategy": strategy, "zero_stage": zero_stage, "redirection_weight": 1.0})


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_without_a_process_group_it_says_so(strategy: str) -> None:
    told = run_alone(f"""
import torch
from safetydpo.config.training import DpoConfig
from safetydpo.dpo.deepspeed_engine import DeepSpeedEngine
from safetydpo.dpo.plain_engine import DdpEngine
from safetydpo.errors import SafetyDPOError
kind = {{"ddp": DdpEngine, "deepspeed": DeepSpeedEngine}}[{strategy!r}]
try:
    kind([("a", torch.nn.Parameter(torch.zeros(1)))], config=DpoConfig())
except SafetyDPOError as error:
    print(error)
""")
    assert told == (
        f"expected an initialised torch.distributed process group for dpo.strategy {strategy!r}, found none: train "
        "through Ray Train, or set dpo.strategy to 'single'"
    )


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.usefixtures("process_group")
def test_equals_the_plain_loop(
    zero_stage: int, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """One process: the same weights to 1e-6 of their size and the same metrics, four steps with clipping active."""
    config = config.model_copy(update={"max_grad_norm": 1e-3})
    single = train(backbone, make_data(), with_strategy(config, "single"), lora)
    zero = train(backbone, make_data(), with_strategy(config, "deepspeed", zero_stage), lora)
    assert all(one.gradient_norm > 1e-3 for one in single.history)
    assert largest_difference(single.layers, zero.layers) == 0.0
    assert single.history == zero.history


@pytest.mark.usefixtures("process_group")
def test_resumed_equals_uninterrupted(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig, tmp_path: Path
) -> None:
    config = with_strategy(config, "deepspeed")
    whole_at, cut_at = open_location(str(tmp_path / "whole")), open_location(str(tmp_path / "cut"))
    whole = train(backbone, make_data(), config, lora, checkpoint=whole_at)
    with pytest.raises(KilledError):
        train(backbone, make_data(), config, lora, checkpoint=cut_at, report=kill_after(2))
    resumed = train(backbone, make_data(), config, lora, checkpoint=cut_at)
    assert resumed.resumed_at == 2
    assert largest_difference(whole.layers, resumed.layers) == 0.0
    assert whole_at.read_bytes() == cut_at.read_bytes()


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_passes_from_one_strategy_to_the_other(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig, tmp_path: Path
) -> None:
    place = open_location(str(tmp_path / "c"))
    with pytest.raises(KilledError):
        train(
            backbone,
            make_data(),
            with_strategy(config, "deepspeed"),
            lora,
            checkpoint=place,
            report=kill_after(2),
        )
    resumed = train(backbone, make_data(), with_strategy(config, "single"), lora, checkpoint=place)
    whole = train(backbone, make_data(), with_strategy(config, "single"), lora)
    assert resumed.resumed_at == 2
    assert largest_difference(whole.layers, resumed.layers) == 0.0


@pytest.mark.usefixtures("process_group")
def test_one_engine_trains_experts_one_after_another(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    config = with_strategy(config.model_copy(update={"steps": 3}), "deepspeed")
    alone = train(backbone, make_data(seed=2), config, lora, expert="sexual")
    engine = open_engine(backbone, config=config, lora=lora)
    train(backbone, make_data(seed=1), config, lora, engine=engine)
    second = train(backbone, make_data(seed=2), config, lora, engine=engine, expert="sexual")
    assert largest_difference(alone.layers, second.layers) == 0.0
    parameters = backbone.adapter_parameters()
    before = [parameter.detach().clone() for _, parameter in parameters]
    engine.close()
    assert all(torch.equal(now, old) for (_, now), old in zip(parameters, before, strict=True))


@pytest.mark.usefixtures("process_group")
def test_infinite_gradient_ends_at_once(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    config = with_strategy(config, "deepspeed")
    engine = open_engine(backbone, config=config, lora=lora)
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * float("inf"))  # type: ignore[method-assign]
    with pytest.raises(SafetyDPOError, match="expected a finite gradient norm at step 0"):
        train(backbone, make_data(), config, lora, engine=engine)
    engine.close()


@pytest.mark.usefixtures("process_group")
def test_nothing_is_compiled(backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig) -> None:
    import deepspeed.comm.comm

    open_engine(backbone, config=with_strategy(config, "deepspeed"), lora=lora).close()
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.usefixtures("process_group")
def test_parts_and_the_running_mean_equal_those_of_the_plain_loop(
    zero_stage: int, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Two parts of two pairs in each of two steps: equal bits in one process."""
    config = config.model_copy(update={"steps": 2, "pairs_per_forward": 2, "ema_decay": 0.9, "max_grad_norm": 1e-3})
    single = train(backbone, make_data(), with_strategy(config, "single"), lora)
    zero = train(backbone, make_data(), with_strategy(config, "deepspeed", zero_stage), lora)
    assert largest_difference(single.layers, zero.layers) == 0.0
    assert single.history == zero.history


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.usefixtures("process_group")
def test_an_overflow_under_a_loss_scale_is_computed_again(
    zero_stage: int, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """The scale is a power of two, so the result is that of the undisturbed plain loop, bit for bit."""
    config = config.model_copy(update={"steps": 2})
    single = train(backbone, make_data(), with_strategy(config, "single"), lora)
    config = with_strategy(config, "deepspeed", zero_stage).model_copy(update={"loss_scaling": "dynamic"})
    engine = open_engine(backbone, config=config, lora=lora)
    disturb(engine, calls={0, 2})
    zero = train(backbone, make_data(), config, lora, engine=engine)
    assert engine.loss_scale is not None
    assert (engine.loss_scale.value, engine.loss_scale.skipped) == (2.0**14, 2)
    assert largest_difference(single.layers, zero.layers) == 0.0
    engine.close()


@pytest.mark.usefixtures("process_group")
def test_another_optimizer_is_refused(backbone: StableDiffusion, config: DpoConfig, lora: LoraConfig) -> None:
    config = with_strategy(config, "deepspeed").model_copy(update={"optimizer": "adafactor"})
    with pytest.raises(UsageError, match=r"dpo.optimizer 'adamw' for dpo.strategy 'deepspeed', found 'adafactor'"):
        open_engine(backbone, config=config, lora=lora)


class _Breaks(torch.autograd.Function):
    """Passes its input on, and fails on the way back."""

    @staticmethod
    def forward(context: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the way back is closed")


@pytest.mark.parametrize("engine_of", [("single", 1), ("ddp", 1), ("deepspeed", 1), ("deepspeed", 2)])
@pytest.mark.usefixtures("process_group")
def test_a_step_that_is_broken_off_leaves_no_gradient_to_the_next_expert(
    engine_of: tuple[str, int],
    backbone: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    lora: LoraConfig,
) -> None:
    """A whole part is on its way when the second one fails: an error of ours, one of the library, a loss that is NaN.

    The expert after each of the three has the bits of one that was trained alone.
    """
    config = with_strategy(config.model_copy(update={"steps": 2, "pairs_per_forward": 2}), *engine_of)
    alone = train(backbone, make_data(), config, lora)
    engine = open_engine(backbone, config=config, lora=lora)
    # Not the start of an expert, where some gradients are 0.
    train(backbone, make_data(seed=1), config, lora, engine=engine)
    batch = step_batch(make_data(seed=2), 0, config=config, run_seed=5, expert="sexual", num_timesteps=1000)

    def good() -> tuple[torch.Tensor, torch.Tensor]:
        return policy_loss(backbone, batch, config=config)

    def bad(where: str) -> tuple[torch.Tensor, torch.Tensor]:
        if where == "between parts":
            raise SafetyDPOError("the second part's pictures are gone")
        loss, numbers = good()
        if where == "before the update":
            return loss * float("nan"), numbers * float("nan")
        return loss + sum(_Breaks.apply(one).sum() for _, one in backbone.adapter_parameters()[:3]), numbers

    for where, message in (
        ("between parts", "pictures are gone"),
        ("on the way back", "way back is closed"),
        ("before the update", "expected a finite loss at step 0, found nan"),
    ):
        parts: list[Part] = [good, partial(bad, where)]
        with pytest.raises((SafetyDPOError, RuntimeError), match=message):
            descend(engine, parts, config=config, step=0, who="expert 'sexual'", advice="none")
        # Whatever was replaced is collected in the middle of the next training.
        after = train(backbone, make_data(), config, lora, engine=engine, report=lambda _: gc.collect())
        assert largest_difference(alone.layers, after.layers) == 0.0, where
        assert alone.history == after.history, where
    engine.close()
