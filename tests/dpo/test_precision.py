"""What spares memory must not change what is learned: half precision, activations computed again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safetydpo.artifacts.storage import open_location
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.engine import open_engine
from safetydpo.dpo.loss_scale import LossScale
from safetydpo.dpo.step import policy_loss
from safetydpo.errors import SafetyDPOError
from tests.dpo.lessons import random_layers
from tests.dpo.runs import KilledError, disturb, kill_after, largest_difference, train

Make = Callable[..., PreferenceData]


@pytest.fixture(scope="module")
def half(tiny_folder: Path) -> StableDiffusion:
    return StableDiffusion.from_folder(tiny_folder, dtype=torch.float16)


def gradients(backbone: StableDiffusion, data: PreferenceData, config: DpoConfig, lora: LoraConfig) -> list[Tensor]:
    """Gradients of an adapter that is no longer 0, with the redirection's second pass with the adapter off."""
    config = config.model_copy(update={"redirection_weight": 1.0})
    engine = open_engine(backbone, config=config, lora=lora)
    backbone.load_adapter(random_layers(backbone, seed=3, size=0.02))
    batch = step_batch(data, 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)
    loss, _ = policy_loss(backbone, batch, config=config)
    engine.backward(loss)
    found = []
    for _, parameter in backbone.adapter_parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    engine.close()
    return found


def test_activations_computed_again_give_equal_gradients(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Bit for bit: the same operations on the same numbers; and no block is computed again without a gradient."""
    plain = gradients(backbone, make_data(), config, lora)
    again = gradients(backbone, make_data(), config.model_copy(update={"activation_checkpointing": True}), lora)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_an_adapter_in_the_bases_type(tiny_folder: Path, make_data: Make, config: DpoConfig, lora: LoraConfig) -> None:
    """In float32 the same bits; in bfloat16 no further from float32's gradient than the base's own rounding, twice."""
    low_config = config.model_copy(update={"adapter_compute": "base"})
    data, found = make_data(), {}
    for dtype in (torch.float32, torch.bfloat16):
        backbone = StableDiffusion.from_folder(tiny_folder, dtype=dtype)
        for name, one in (("full", config), ("low", low_config), ("again", config)):
            found[dtype, name] = torch.cat([part.flatten() for part in gradients(backbone, data, one, lora)])
            assert found[dtype, name].dtype == torch.float32
        assert torch.equal(found[dtype, "full"], found[dtype, "again"])
    exact = found[torch.float32, "full"]
    assert torch.equal(exact, found[torch.float32, "low"])
    off = {name: float((found[torch.bfloat16, name] - exact).norm()) for name in ("full", "low")}
    assert 0 < off["low"] <= 2 * off["full"], off


def test_a_reference_pass_computes_nothing_again(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Each attention layer runs once in the pass with the adapter off, and twice in one with a gradient."""
    config = config.model_copy(update={"activation_checkpointing": True})
    open_engine(backbone, config=config, lora=lora)
    batch = step_batch(make_data(), 0, config=config, run_seed=5, expert="hate", num_timesteps=1000)
    layer = next(name for name, _ in backbone.named_linear_layers(("to_q",)))
    with backbone.layer_inputs([layer]) as seen:
        with torch.no_grad(), backbone.adapter_off():
            backbone.predict(batch.latents_safe, batch.timesteps, batch.condition)
        assert len(seen[layer]) == 1
        predicted = backbone.predict(batch.latents_safe, batch.timesteps, batch.condition)
        torch.autograd.backward(predicted.sum())
    assert len(seen[layer]) == 3


def test_half_precision_gradients_are_near_those_of_float32(
    half: StableDiffusion, backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """Of the whole gradient, scaled by 65536 on its way back: a cosine above 0.999 and a length within a hundredth.

    Without the one-sided penalty: whether the error on the safe picture has risen at all is, for an adapter near 0, a
    matter of float16's last digits.
    """
    config = config.model_copy(update={"safe_rise_weight": 0.0})
    full = torch.cat([one.flatten() for one in gradients(backbone, make_data(), config, lora)])
    found = torch.cat([one.flatten() for one in gradients(half, make_data(), config, lora)]) / LossScale().value
    half.remove_adapter()
    assert float(torch.nn.functional.cosine_similarity(full, found, dim=0)) > 0.999
    assert float(found.norm() / full.norm()) == pytest.approx(1.0, abs=0.01)


def test_half_precision_resumes_with_its_loss_scale(
    half: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig, tmp_path: Path
) -> None:
    """An overflow in the first step halves the scale; the run that goes on from step 2 ends with equal bytes."""
    whole_at, cut_at = open_location(str(tmp_path / "whole")), open_location(str(tmp_path / "cut"))
    for place, stop in ((whole_at, 99), (cut_at, 2)):
        engine = open_engine(half, config=config, lora=lora)
        disturb(engine, calls={0})
        try:
            train(half, make_data(), config, lora, checkpoint=place, report=kill_after(stop), engine=engine)
        except KilledError:
            assert stop == 2
    resumed = train(half, make_data(), config, lora, checkpoint=cut_at)
    half.remove_adapter()
    assert resumed.resumed_at == 2
    assert whole_at.read_bytes() == cut_at.read_bytes()


def test_an_overflow_is_logged_and_counted_and_no_step_goes_missing(
    backbone: StableDiffusion,
    make_data: Make,
    config: DpoConfig,
    lora: LoraConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two attempts at step 1 overflow; the result is that of the undisturbed run, bit for bit."""
    config = config.model_copy(update={"steps": 3})
    plain = train(backbone, make_data(), config, lora)
    config = config.model_copy(update={"loss_scaling": "dynamic"})
    engine = open_engine(backbone, config=config, lora=lora)
    disturb(engine, calls={1, 2})
    with caplog.at_level(logging.WARNING):
        found = train(backbone, make_data(), config, lora, engine=engine)
    assert [record.getMessage() for record in caplog.records if "overflowed" in record.getMessage()] == [
        f"expert 'hate': gradients of step 1 overflowed; computed again with the loss scale {value} ({count} attempts "
        "skipped so far)"
        for value, count in ((32768, 1), (16384, 2))
    ]
    assert engine.loss_scale is not None
    assert engine.loss_scale.skipped == 2
    assert largest_difference(plain.layers, found.layers) == 0.0
    assert found.history == plain.history


def test_gradients_that_overflow_at_every_scale_end_the_training(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
) -> None:
    """17 attempts: 65536 down to 1."""
    config = config.model_copy(update={"loss_scaling": "dynamic", "pairs_per_step": 1, "retention_weight": 0.0})
    engine = open_engine(backbone, config=config, lora=lora)
    disturb(engine, calls=set(range(100)))
    with pytest.raises(SafetyDPOError, match=r"expert 'hate': expected a finite gradient norm at step 0, found"):
        train(backbone, make_data(), config, lora, engine=engine)
    assert engine.loss_scale is not None
    assert engine.loss_scale.skipped == 17
