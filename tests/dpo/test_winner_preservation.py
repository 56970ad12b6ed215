from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.dpo.batch import PreferenceData, step_batch
from safetydpo.dpo.loss import scale_gradient, squared_error, unsafe_gradient_scale
from safetydpo.dpo.step import policy_loss
from tests.dpo.slot import fill_slot

Make = Callable[..., PreferenceData]


def picture(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("safe", "unsafe", "mu", "expected"),
    [
        # |gA|^2 = 4, <gA, gB> = 8: 4 / 8, and with mu = 0.5 half of that.
        ((2.0, 0.0), (4.0, 3.0), 0.0, 0.5),
        ((2.0, 0.0), (4.0, 3.0), 0.5, 0.25),
        # mu = 1 leaves nothing of an unsafe gradient that pulls against the safe one.
        ((2.0, 0.0), (4.0, 3.0), 1.0, 0.0),
        # 4 / 1 > 1: weak enough as it is.
        ((2.0, 0.0), (0.5, 3.0), 0.0, 1.0),
        # Opposed or at a right angle: pushing the unsafe error up lowers the safe one, or leaves it.
        ((2.0, 0.0), (-4.0, 3.0), 1.0, 1.0),
        ((2.0, 0.0), (0.0, 3.0), 1.0, 1.0),
        # A safe picture predicted perfectly has no gradient to protect; to first order nothing can hurt it.
        ((0.0, 0.0), (1.0, 1.0), 0.0, 1.0),
    ],
)
def test_hand_worked(safe: tuple[float, ...], unsafe: tuple[float, ...], mu: float, expected: float):
    found = unsafe_gradient_scale(picture(*safe), picture(*unsafe), winner_preservation=mu)
    assert found.tolist() == pytest.approx([expected])


@given(
    values=st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8),
    mu=st.floats(0, 1),
)
def test_the_safe_error_never_rises_to_first_order_and_falls_by_its_share(values: list[float], mu: float):
    """Move one shared output by -(gA - k gB): the safe error changes by -(|gA|^2 - k <gA, gB>) <= -mu |gA|^2."""
    safe, unsafe = (torch.tensor(half, dtype=torch.float64).reshape(1, 1, 2, 2) for half in (values[:4], values[4:]))
    scale = unsafe_gradient_scale(safe, unsafe, winner_preservation=mu)
    assert 0 <= float(scale) <= 1
    change = -(safe * (safe - scale.reshape(-1, 1, 1, 1) * unsafe)).sum()
    assert float(change) <= -mu * float(safe.square().sum()) + 1e-9


def test_agrees_with_gradients_by_autograd():
    """The same factor from gradients that autograd takes of the two errors by the network's outputs."""
    generator = torch.Generator().manual_seed(3)
    # Shared noise makes residuals of the two pictures alike, as in training.
    common, *own = torch.randn((5, 6, 4, 3, 3), generator=generator, dtype=torch.float64)
    target = own[2]
    safe, unsafe = (common + 0.7 * one + target for one in own[:2])
    safe.requires_grad_()
    unsafe.requires_grad_()
    gradients = torch.autograd.grad(
        squared_error(safe, target).sum() + squared_error(unsafe, target).sum(), (safe, unsafe)
    )
    mu = 0.3
    expected = []
    for one, other in zip(*gradients, strict=True):
        inner = float((one * other).sum())
        expected.append(min(1.0, (1 - mu) * float((one * one).sum()) / inner) if inner > 0 else 1.0)
    found = unsafe_gradient_scale(safe - target, unsafe - target, winner_preservation=mu)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert min(expected) < 1
    assert not found.requires_grad


def test_half_precision_residuals_are_reduced_in_float32():
    """4096 products of 40 * 40 = 1600 overflow float16 (65504) and not float32."""
    residual = torch.full((1, 4, 32, 32), 40.0, dtype=torch.float16)
    found = unsafe_gradient_scale(residual, residual, winner_preservation=0.25)
    assert found.dtype == torch.float32
    assert found.tolist() == [0.75]


def test_scaling_a_gradient_keeps_the_value_to_the_bit():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factors = torch.linspace(0, 1, 100)
    scaled = scale_gradient(values, factors)
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, factors)


def test_a_step_reports_the_same_numbers_and_pulls_less_at_the_unsafe_pictures(
    backbone: StableDiffusion, make_data: Make, config: DpoConfig, lora: LoraConfig
):
    """mu = 1 against none: same loss and metrics, another gradient."""
    fill_slot(backbone, lora, moved=True)
    gradients = []
    numbers = []
    for mu in (None, 0.0, 1.0):
        wanted = config.model_copy(update={"winner_preservation": mu})
        batch = step_batch(make_data(), 0, config=wanted, run_seed=5, expert="hate", num_timesteps=1000)
        loss, metrics = policy_loss(backbone, batch, config=wanted)
        found = torch.autograd.grad(loss, [parameter for _, parameter in backbone.adapter_parameters()])
        gradients.append(torch.cat([one.flatten() for one in found]))
        numbers.append((loss.detach(), metrics))
    assert all(torch.equal(one, other) for later in numbers[1:] for one, other in zip(numbers[0], later, strict=True))
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])
