from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, StepBatch, step_batch
from safetydpo.dpo.step import METRICS, policy_loss
from safetydpo.dpo.trainer import METRIC_NAMES
from tests.dpo.slot import fill_slot
from tests.tiny import build_tiny_model

Make = Callable[..., PreferenceData]


def batch_of(data: PreferenceData, config: DpoConfig) -> StepBatch:
    return step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)


def named(metrics: torch.Tensor) -> dict[str, float]:
    return dict(zip(METRICS, metrics.tolist(), strict=True))


@pytest.fixture(scope="session")
def backbone_bfloat16(tiny_folder: Path) -> StableDiffusion:
    return StableDiffusion.from_folder(tiny_folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_zero_is_exactly_ln_2(
    dtype: str,
    backbone: StableDiffusion,
    backbone_bfloat16: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    lora: LoraConfig,
) -> None:
    """B = 0 adds exact zeros, and the reference is the same network in the same compute type: with beta 5000 any
    difference in the last bit would show as a logit."""
    model = backbone if dtype == "float32" else backbone_bfloat16
    fill_slot(model, lora)
    config = config.model_copy(update={"beta": 5000.0})
    loss, metrics = policy_loss(model, batch_of(make_data(), config), config=config)
    values = named(metrics)
    assert torch.equal(loss.detach(), torch.tensor(math.log(2), dtype=torch.float32))
    assert (values["margin"], values["safe_rise"], values["retention"]) == (0.0, 0.0, 0.0)
    assert values["implicit_accuracy"] == 0.5
    assert values["error_policy_safe"] == values["error_reference_safe"] > 0
    assert values["error_policy_unsafe"] == values["error_reference_unsafe"] > 0


def test_velocity_weights_multiply_the_errors_and_keep_step_zero(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Mean errors are means of weight times native error of each picture; at step 0 they still cancel to ln 2."""
    fill_slot(backbone, lora)
    weighted = config.model_copy(update={"beta": 5000.0, "error_weighting": "velocity"})
    batch = batch_of(make_data(), weighted)
    loss, metrics = policy_loss(backbone, batch, config=weighted)
    assert torch.equal(loss.detach(), torch.tensor(math.log(2), dtype=torch.float32))
    noisy = backbone.add_noise(batch.latents_safe, batch.noise, batch.timesteps)
    with torch.no_grad(), backbone.adapter_off():
        prediction = backbone.predict(noisy, batch.timesteps, batch.condition)
    native = (prediction - batch.noise).square().mean(dim=(1, 2, 3))
    expected = (native * backbone.velocity_weights(batch.timesteps)).mean()
    assert named(metrics)["error_reference_safe"] == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > float(native.mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_agrees_with_the_network_called_picture_by_picture(
    kind: str, tmp_path: Path, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """The loss again by the formula, one picture at a time, with the adapter swapped out by hand."""
    build_tiny_model(tmp_path, prediction_type=kind)
    model = StableDiffusion.from_folder(tmp_path)
    fill_slot(model, lora, moved=True)
    config = config.model_copy(update={"retention_weight": 3.0, "beta": 200.0, "redirection_weight": 2.0})
    batch = batch_of(make_data(), config)
    loss, _ = policy_loss(model, batch, config=config)

    layers = model.export_adapter()

    def predictions(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, condition: object):
        noisy = model.add_noise(latents, noise, timesteps)
        rows = [torch.tensor([row]) for row in range(len(latents))]
        return torch.cat([model.predict(noisy[row], timesteps[row], condition.select(row)) for row in rows])  # type: ignore[attr-defined]

    def both() -> list[torch.Tensor]:
        common = (batch.noise, batch.timesteps, batch.condition)
        with torch.no_grad():
            return [
                predictions(batch.latents_safe, *common),
                predictions(batch.latents_unsafe, *common),
                predictions(
                    batch.retention_latents,
                    batch.retention_noise,
                    batch.retention_timesteps,
                    batch.retention_condition,
                ),
            ]

    policy = both()
    model.load_adapter(layers, scale=0.0)
    reference = both()
    with torch.no_grad():
        answer = predictions(batch.latents_unsafe, batch.noise, batch.timesteps, batch.safe_condition)
    targets = [model.target(x, batch.noise, batch.timesteps) for x in (batch.latents_safe, batch.latents_unsafe)]
    rises = [
        ((policy[side] - targets[side]) ** 2 - (reference[side] - targets[side]) ** 2).mean(dim=(1, 2, 3))
        for side in (0, 1)
    ]
    logits = -100.0 * (rises[0] - rises[1])
    expected = torch.log1p(torch.exp(-logits)).mean() + 100.0 * rises[0].clamp(min=0).mean()
    expected = expected + 3.0 * ((policy[2] - reference[2]) ** 2).mean()
    distances = ((policy[1] - answer) ** 2).mean(dim=(1, 2, 3)) * batch.is_unsafe_caption
    assert 0 < float(batch.is_unsafe_caption.sum()) < 4
    expected = expected + 2.0 * 100.0 * distances.mean()
    assert float(loss.detach()) != pytest.approx(math.log(2), abs=1e-3)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_redirection_is_the_squared_distance_of_the_captions_at_step_zero(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """With B = 0 the policy is the base: what is left is how differently it answers the two captions."""
    fill_slot(backbone, lora)
    changes = {"beta": 200.0, "redirection_weight": 2.0, "captions": "unsafe", "empty_caption_rate": 0.0}
    wanted = config.model_copy(update=changes)
    batch = batch_of(make_data(), wanted)
    loss, metrics = policy_loss(backbone, batch, config=wanted)
    noisy = backbone.add_noise(batch.latents_unsafe, batch.noise, batch.timesteps)
    with torch.no_grad():
        answers = [backbone.predict(noisy, batch.timesteps, given) for given in (batch.condition, batch.safe_condition)]
    distance = 100.0 * float((answers[0] - answers[1]).square().mean())
    assert distance > 0
    assert named(metrics)["redirection"] == pytest.approx(distance, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(math.log(2) + 2.0 * distance, rel=1e-5)
    # Under the safe and the empty caption there is nothing to redirect, whatever the adapter does.
    fill_slot(backbone, lora, moved=True)
    for changes in ({"captions": "safe"}, {"empty_caption_rate": 1.0}):
        other = wanted.model_copy(update=changes)
        _, metrics = policy_loss(backbone, batch_of(make_data(), other), config=other)
        assert named(metrics)["redirection"] == 0.0


def test_gradients_reach_the_adapter_only(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """At B = 0 the gradient of A is exactly 0 (it is multiplied by B) and that of B is not."""
    fill_slot(backbone, lora)
    loss, _ = policy_loss(backbone, batch_of(make_data(), config), config=config)
    loss.backward()
    for name, parameter in backbone.adapter_parameters():
        assert parameter.grad is not None
        if "lora_A" in name:
            assert float(parameter.grad.abs().max()) == 0.0
    assert sum(float(p.grad.abs().sum()) for n, p in backbone.adapter_parameters() if "lora_B" in n) > 0  # type: ignore[union-attr]
    trainable = {id(parameter) for _, parameter in backbone.adapter_parameters()}
    assert all(p.grad is None for p in backbone.network.parameters() if id(p) not in trainable)


def test_no_second_network_is_held(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """One policy and one reference pass over all pictures of the step, through the one network."""
    fill_slot(backbone, lora)
    seen: list[tuple[int, bool]] = []

    def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append((inputs[0].shape[0], torch.is_grad_enabled()))

    handle = backbone.network.register_forward_pre_hook(note)
    policy_loss(backbone, batch_of(make_data(), config), config=config)
    handle.remove()
    assert seen == [(4 + 4 + 2, False), (4 + 4 + 2, True)]


def test_retention_off_adds_nothing(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    fill_slot(backbone, lora, moved=True)
    config = config.model_copy(update={"retention_weight": 0.0, "safe_rise_weight": 0.0})
    loss, metrics = policy_loss(backbone, batch_of(make_data(), config), config=config)
    assert named(metrics)["retention"] == 0.0
    assert float(loss.detach()) == named(metrics)["preference_loss"]


def test_metric_names_are_those_of_the_record() -> None:
    assert ("step", *METRICS, "gradient_norm", "learning_rate") == METRIC_NAMES
