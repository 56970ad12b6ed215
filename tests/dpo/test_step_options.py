from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, StepBatch, step_batch
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.step import METRICS, policy_loss
from safetydpo.dpo.trainer import TrainedExpert, train_expert
from tests.dpo.slot import fill_slot, start_layers

Make = Callable[..., PreferenceData]
MAPO = {"loss": "mapo", "safe_rise_weight": 0.0, "retention_weight": 0.0}


def batch_of(data: PreferenceData, config: DpoConfig) -> StepBatch:
    return step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)


def named(metrics: Tensor) -> dict[str, float]:
    return dict(zip(METRICS, metrics.tolist(), strict=True))


def passes(backbone: StableDiffusion, batch: StepBatch, config: DpoConfig) -> list[tuple[int, bool]]:
    """Rows of each forward pass of a step, and whether it had a gradient (the policy) or not (the reference)."""
    seen: list[tuple[int, bool]] = []

    def note(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0].shape[0], torch.is_grad_enabled()))

    handle = backbone.network.register_forward_pre_hook(note)
    try:
        policy_loss(backbone, batch, config=config)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(8, True)]),
        ({"retention_weight": 1.0}, [(2, False), (10, True)]),
        ({"output_preservation_weight": 1.0}, [(4, False), (12, True)]),
        ({"redirection_weight": 1.0}, [(4, False), (8, True)]),
        ({"loss": "sigmoid", "output_preservation_weight": 1.0}, [(12, False), (12, True)]),
    ],
)
def test_without_a_reference_its_pass_runs_for_terms_that_compare_with_it_alone(
    changes: dict[str, Any],
    expected: list[tuple[int, bool]],
    backbone: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    lora: LoraConfig,
) -> None:
    """4 pairs, 2 benign pictures: 8 rows of pairs; only they need no reference under `mapo`."""
    fill_slot(backbone, lora)
    wanted = config.model_copy(update=MAPO | changes)
    assert passes(backbone, batch_of(make_data(), wanted), wanted) == expected


def test_terms_that_compare_with_the_reference_start_at_rounding_error_under_mapo(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """2 + 4 rows by themselves and the same among 14: a convolution may add in another order."""
    fill_slot(backbone, lora)
    changes = {"retention_weight": 1.0, "output_preservation_weight": 1.0, "safe_likelihood_weight": 0.0}
    wanted = config.model_copy(update=MAPO | changes)
    loss, metrics = policy_loss(backbone, batch_of(make_data(), wanted), config=wanted)
    values = named(metrics)
    assert values["retention"] < 1e-10
    assert float(loss.detach()) == pytest.approx(values["preference_loss"], abs=1e-6)


def test_mapo_does_not_see_the_reference(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Its numbers are those of the formula on the policy's errors; the reference's stand as 0."""
    fill_slot(backbone, lora, moved=True)
    wanted = config.model_copy(update=MAPO | {"beta": 500.0, "safe_likelihood_weight": 0.04})
    batch = batch_of(make_data(), wanted)
    loss, metrics = policy_loss(backbone, batch, config=wanted)
    errors = []
    for latents in (batch.latents_safe, batch.latents_unsafe):
        with torch.no_grad():
            noisy = backbone.add_noise(latents, batch.noise, batch.timesteps)
            prediction = backbone.predict(noisy, batch.timesteps, batch.condition)
        errors.append((prediction - batch.noise).square().mean(dim=(1, 2, 3)).double())
    safe, unsafe = (0.5 * one / torch.expm1(0.5 * one) for one in errors)
    logits = 1000 * (safe - unsafe)
    values = named(metrics)
    assert values["margin"] == pytest.approx(float(logits.mean()), rel=1e-3)
    assert values["implicit_accuracy"] == float((logits > 0).double().mean())
    assert values["error_policy_safe"] == pytest.approx(float(errors[0].mean()), rel=1e-5)
    assert (values["error_reference_safe"], values["error_reference_unsafe"], values["safe_rise"]) == (0.0, 0.0, 0.0)
    expected = torch.log1p(torch.exp(-logits)).mean() + 10 * errors[0].mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "mapo"])
def test_output_preservation_is_the_change_on_pure_noise_under_the_empty_caption(
    loss: str, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    fill_slot(backbone, lora, moved=True)
    without = config.model_copy(update=MAPO | {"loss": loss, "error_weighting": "velocity"})
    wanted = without.model_copy(update={"output_preservation_weight": 7.0})
    batch = batch_of(make_data(), wanted)
    plain, _ = policy_loss(backbone, batch, config=without)
    found, metrics = policy_loss(backbone, batch, config=wanted)
    last = torch.full((4,), 999)
    empty = backbone.encode_prompts([""] * 4)
    with torch.no_grad():
        policy = backbone.predict(batch.noise, last, empty)
        with backbone.adapter_off():
            change = (policy - backbone.predict(batch.noise, last, empty)).square().mean()
    assert float(change) > 1e-4
    assert float(found.detach()) - float(plain.detach()) == pytest.approx(7.0 * float(change), rel=1e-3)
    assert named(metrics)["loss"] == float(found.detach())


def test_output_preservation_keeps_the_prediction_on_pure_noise(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """The same training with and without: the change on pure noise that none of them was trained on."""

    def change(weight: float) -> float:
        wanted = config.model_copy(
            update={"output_preservation_weight": weight, "steps": 8, "learning_rate": 1e-2, "retention_weight": 0.0}
        )
        train(backbone, make_data(), wanted, lora)
        noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(77))
        asked = noise, torch.full((8,), 999), backbone.encode_prompts([""] * 8)
        with torch.no_grad():
            policy = backbone.predict(*asked)
            with backbone.adapter_off():
                return float((policy - backbone.predict(*asked)).square().mean())

    assert change(100.0) < 0.5 * change(0.0)


def train(backbone: StableDiffusion, data: PreferenceData, config: DpoConfig, lora: LoraConfig) -> TrainedExpert:
    engine = open_engine(backbone, config=config, lora=lora)
    try:
        return train_expert(backbone, data, config=config, lora=lora, run_seed=5, expert_name="hate", engine=engine)
    finally:
        engine.close()


OPTIONS: dict[str, dict[str, Any]] = {
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "kto": {"loss": "kto"},
    "mapo": {"loss": "mapo", "safe_rise_weight": 0.0, "safe_likelihood_weight": 0.04},
    "winner preservation": {"winner_preservation": 0.2},
    "min-SNR": {"error_weighting": "min_snr"},
    "timesteps": {"timestep_range": (300, 700)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_training_lowers_the_loss_of_a_batch(
    option: str, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Six steps on one batch of random latents."""
    config = config.model_copy(update={"retention_weight": 0.0, **OPTIONS[option]})
    engine = open_engine(backbone, config=config, lora=lora)
    backbone.load_adapter(start_layers(backbone, lora))
    batch = batch_of(make_data(), config)
    losses = []
    for _ in range(6):
        loss, _ = policy_loss(backbone, batch, config=config)
        engine.backward(loss)
        engine.step(learning_rate=1e-2)
        losses.append(float(loss.detach()))
    engine.close()
    assert all(math.isfinite(one) for one in losses)
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0])


def test_the_reference_point_of_kto_is_that_of_all_processes(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """It is asked for once, of the mean reward, and what comes back counts: 0.5 raises the utility's zero."""
    fill_slot(backbone, lora)
    config = config.model_copy(update={"loss": "kto", "retention_weight": 0.0})
    asked: list[float] = []

    def mean(values: Tensor) -> Tensor:
        asked.append(float(values))
        return values + 0.5

    batch = batch_of(make_data(), config)
    loss, _ = policy_loss(backbone, batch, config=config, mean_over_processes=mean)
    assert asked == [0.0]
    # All rewards are 0: 1 - sigmoid(-0.5) for the safe pictures, 1 - sigmoid(0.5) for the unsafe ones.
    assert float(loss.detach()) == pytest.approx(0.5, rel=1e-6)
    for kind in ("sigmoid", "hinge", "ipo"):
        policy_loss(backbone, batch, config=config.model_copy(update={"loss": kind}), mean_over_processes=mean)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "kto"},
        {"loss": "ipo", "output_preservation_weight": 5.0, "error_weighting": "min_snr"},
        {"loss": "mapo", "safe_rise_weight": 0.0, "output_preservation_weight": 5.0},
        {"winner_preservation": 0.2, "timestep_range": (100, 800)},
    ],
)
def test_two_processes_share_the_loss_of_one(
    changes: dict[str, Any], backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """The mean of both halves' losses and of their gradients is that of the whole step, in float32."""
    fill_slot(backbone, lora, moved=True)
    config = config.model_copy(update=changes)
    parameters = [parameter for _, parameter in backbone.adapter_parameters()]

    def outcome(mean: Callable[[Tensor], Tensor], rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        where = {"rank": rank, "world_size": world_size}
        batch = step_batch(make_data(), 0, config=config, run_seed=5, expert="hate", num_timesteps=1000, **where)
        loss, _ = policy_loss(backbone, batch, config=config, mean_over_processes=mean)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.detach(), torch.cat([one.flatten() for one in gradients])

    seen: list[Tensor] = []

    def note(values: Tensor) -> Tensor:
        seen.append(values)
        return values

    # The rewards of these random pictures fall; 2 lifts the reference point above its floor of 0.
    whole = outcome(lambda values: values + 2.0)
    for rank in (0, 1):
        outcome(note, rank, 2)
    halves = [outcome(lambda _: sum(seen, torch.tensor(0.0)) / 2 + 2.0, rank, 2) for rank in (0, 1)]
    assert len(seen) == (2 if config.loss == "kto" else 0)
    for one, both in zip(whole, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(sum(both) / 2, one, rtol=1e-4, atol=1e-4)


def test_timesteps_of_a_step_lie_in_the_range(make_data: Make, config: DpoConfig) -> None:
    wanted = config.model_copy(update={"timestep_range": (400, 402), "retention_per_step": 3})
    for step in range(4):
        batch = step_batch(make_data(), step, config=wanted, run_seed=5, expert="hate", num_timesteps=1000)
        everything = torch.cat([batch.timesteps, batch.retention_timesteps])
        assert set(everything.tolist()) <= {400, 401, 402}


def test_min_snr_weights_multiply_the_errors(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    fill_slot(backbone, lora)
    wanted = config.model_copy(update={"error_weighting": "min_snr", "min_snr_gamma": 0.5})
    batch = batch_of(make_data(), wanted)
    _, metrics = policy_loss(backbone, batch, config=wanted)
    noisy = backbone.add_noise(batch.latents_safe, batch.noise, batch.timesteps)
    with torch.no_grad(), backbone.adapter_off():
        prediction = backbone.predict(noisy, batch.timesteps, batch.condition)
    native = (prediction - batch.noise).square().mean(dim=(1, 2, 3))
    weights = backbone.min_snr_weights(batch.timesteps, gamma=0.5)
    assert named(metrics)["error_reference_safe"] == pytest.approx(float((native * weights).mean()), rel=1e-4)
    assert float(weights.min()) < 1
