"""Every kind of loss on preferences: by hand, at step 0, against numpy, against finite differences."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safetydpo.config.training import DpoConfig
from safetydpo.dpo.loss import (
    MAPO_SHARPNESS,
    PreferenceLoss,
    ReferenceLoss,
    preference_loss,
    reference_free_loss,
    squared_error,
    utility_loss,
    utility_reference_point,
)

KINDS: tuple[ReferenceLoss, ...] = get_args(ReferenceLoss)
AT_STEP_ZERO = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 0.25, "kto": 0.5}


def loss_of(
    columns: tuple[Tensor, ...], kind: ReferenceLoss, *, beta: float, weights: tuple[float, float] = (0.0, 0.0)
) -> PreferenceLoss:
    """Columns: policy safe and unsafe, reference safe and unsafe; weights: rise and likelihood."""
    point = None
    if kind == "kto":
        rises = torch.cat([columns[0] - columns[2], columns[1] - columns[3]])
        point = utility_reference_point(-(beta / 2) * rises.mean())
    return preference_loss(
        columns[0],
        columns[1],
        error_reference_safe=columns[2],
        error_reference_unsafe=columns[3],
        beta=beta,
        safe_rise_weight=weights[0],
        safe_likelihood_weight=weights[1],
        kind=kind,
        reference_point=point,
    )


def hand_worked() -> tuple[Tensor, ...]:
    """beta = 4. Pair 1: rises -0.25 and 0.5, so u = 0.5 and -1, z = 1.5. Pair 2: rises 0.25 and 0, u = -0.5 and 0,
    z = -0.5."""
    columns = ([0.25, 0.5], [1.0, 0.5], [0.5, 0.25], [0.5, 0.5])
    return tuple(torch.tensor(column, dtype=torch.float64) for column in columns)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sigmoid", (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(0.5))) / 2),
        # max(0, 1 - 1.5) = 0 and 1 + 0.5.
        ("hinge", (0 + 1.5) / 2),
        # (1.5 - 0.5)^2 and (-0.5 - 0.5)^2.
        ("ipo", (1 + 1) / 2),
        # Mean reward (0.5 - 0.5 - 1 + 0) / 4 < 0, so q = 0: 1 - sigmoid(0.5), 1 - sigmoid(-0.5), 1 - sigmoid(1), 1/2.
        ("kto", (1 - sigmoid(0.5) + 1 - sigmoid(-0.5) + 1 - sigmoid(1.0) + 0.5) / 4),
    ],
)
def test_hand_worked(kind: ReferenceLoss, expected: float):
    result = loss_of(hand_worked(), kind, beta=4.0)
    assert float(result.loss) == float(result.preference) == pytest.approx(expected, rel=1e-12)
    assert result.logits.tolist() == pytest.approx([1.5, -0.5])
    assert (float(result.implicit_accuracy), float(result.margin)) == (0.5, pytest.approx(0.5))


def test_hand_worked_utility_with_a_reference_point():
    """Rewards 1, 3 (safe) and 0, -2 (unsafe): mean 0.5 = q; above it 0.5, 2.5, -0.5, -2.5.

    1 - sigmoid(0.5), 1 - sigmoid(2.5) for the safe ones; sigmoid(-0.5), sigmoid(-2.5) for the unsafe: the same two."""
    rewards = torch.tensor([1.0, 3.0, 0.0, -2.0], dtype=torch.float64)
    point = utility_reference_point(rewards.mean())
    assert float(point) == 0.5
    found = utility_loss(rewards, torch.tensor([True, True, False, False]), reference_point=point)
    assert found.tolist() == pytest.approx([sigmoid(-0.5), sigmoid(-2.5), sigmoid(-0.5), sigmoid(-2.5)], rel=1e-12)


def test_a_picture_needs_no_partner():
    """The utility of three safe pictures and one unsafe one is that of each alone."""
    rewards, is_safe = torch.tensor([0.3, -1.0, 2.0, 0.7]), torch.tensor([True, True, False, True])
    together = utility_loss(rewards, is_safe)
    alone = [utility_loss(rewards[i : i + 1], is_safe[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_the_reference_point_never_falls_below_zero_and_carries_no_gradient():
    mean = torch.tensor(0.25, requires_grad=True)
    point = utility_reference_point(mean)
    assert float(point) == 0.25
    assert not point.requires_grad
    assert float(utility_reference_point(torch.tensor(-3.0))) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_value_at_step_zero_is_exact(kind: ReferenceLoss):
    """Equal errors give logits of exactly 0 and the value of the table, to the last bit of float32."""
    safe, unsafe = torch.rand(2, 7, generator=torch.Generator().manual_seed(0))
    result = loss_of((safe, unsafe, safe, unsafe), kind, beta=5000.0, weights=(1.0, 1.0))
    assert torch.equal(result.loss, torch.tensor(AT_STEP_ZERO[kind], dtype=torch.float32))
    assert torch.equal(result.logits.abs(), torch.zeros(7))
    assert float(result.implicit_accuracy) == 0.5


def numpy_loss(kind: str, ps: np.ndarray, pu: np.ndarray, rs: np.ndarray, ru: np.ndarray, beta: float) -> float:
    up, down = -beta * (ps - rs) / 2, -beta * (pu - ru) / 2
    gap = up - down
    if kind == "sigmoid":
        return float(np.logaddexp(0, -gap).mean())
    if kind == "hinge":
        return float(np.maximum(0, 1 - gap).mean())
    if kind == "ipo":
        # (h - 1 / (2 tau))^2 of the paper with h = gap / beta and tau = beta, times beta^2.
        return float(beta**2 * ((gap / beta - 1 / (2 * beta)) ** 2).mean())
    point = max(0.0, float(np.concatenate([up, down]).mean()))
    gains = np.concatenate([up - point, point - down])
    return float((1 - 1 / (1 + np.exp(-np.clip(gains, -500, 500)))).mean())


FOUR_ERRORS = st.lists(st.tuples(*[st.floats(0.0, 2.0)] * 4), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@given(values=FOUR_ERRORS, beta=st.floats(0.1, 100.0))
def test_agrees_with_numpy(kind: ReferenceLoss, values: list[tuple[float, ...]], beta: float):
    columns = np.array(values, dtype=np.float64).T
    tensors = tuple(torch.from_numpy(column.copy()) for column in columns)
    found = float(loss_of(tensors, kind, beta=beta).loss)
    # Differences of rewards of size beta lose their last digits; `ipo` squares them.
    assert found == pytest.approx(numpy_loss(kind, *columns, beta), rel=1e-9, abs=1e-12 * max(1.0, beta**2))


def test_mapo_agrees_with_numpy_and_with_the_released_loss():
    """Released: mean(e_safe) + 0.1 * mean(log(1 + exp(-T (f(e_safe / 2) - f(e_unsafe / 2))))), T = 1000."""
    generator = np.random.default_rng(0)
    safe, unsafe = 0.02 + 0.01 * generator.random((2, 50))

    def odds(values: np.ndarray) -> np.ndarray:
        return 0.5 * values / (np.exp(0.5 * values) - 1)

    released = safe.mean() + 0.1 * np.logaddexp(0, -1000 * (odds(safe) - odds(unsafe))).mean()
    ours = reference_free_loss(
        torch.from_numpy(safe), torch.from_numpy(unsafe), beta=500.0, safe_likelihood_weight=0.04
    )
    assert 0.1 * float(ours.loss) == pytest.approx(released, rel=1e-9)
    assert float(ours.safe_rise) == 0.0
    assert float(ours.safe_likelihood) == pytest.approx(250 * safe.mean())
    assert float(ours.implicit_accuracy) == pytest.approx((safe < unsafe).mean())


def test_hand_worked_mapo():
    """s = 1/2, beta = 8: m = 16 (f(e_safe / 2) - f(e_unsafe / 2)); e = 2 ln 2 gives f(ln 2) = ln 2 / (2 - 1) and
    e = 4 ln 2 gives f(2 ln 2) = 2 ln 2 / (4 - 1); m = 16 ln 2 (1 - 2/3) = 3.69678."""
    error = torch.tensor([2 * math.log(2)], dtype=torch.float64)
    result = reference_free_loss(error, 2 * error, beta=8.0, safe_likelihood_weight=0.5)
    assert float(result.logits) == pytest.approx(3.69678, abs=1e-5)
    assert float(result.preference) == pytest.approx(math.log(1 + math.exp(-3.69678)), abs=1e-6)
    assert float(result.loss) == pytest.approx(float(result.preference) + 0.5 * 4 * 2 * math.log(2))


@given(safe=st.floats(0.0, 0.05), unsafe=st.floats(0.0, 0.05), beta=st.floats(1.0, 1000.0))
def test_mapo_is_the_logit_without_its_reference_for_small_errors(safe: float, unsafe: float, beta: float):
    """f(x) = 1 - x/2 + x^2/12 - ..., so m differs from -(beta / 2)(e_safe - e_unsafe) by at most
    (beta / s) (s e)^2 / 12, and by the 2e-6 below which errors are not told apart."""
    one, other = (torch.tensor([value], dtype=torch.float64) for value in (safe, unsafe))
    found = float(reference_free_loss(one, other, beta=beta, safe_likelihood_weight=0.0).logits)
    bound = beta / MAPO_SHARPNESS * (MAPO_SHARPNESS * max(safe, unsafe)) ** 2 / 12 + beta * 1e-6
    assert found == pytest.approx(-(beta / 2) * (safe - unsafe), abs=bound + 1e-9)


@pytest.mark.parametrize("error", [0.0, 1e-12, 50.0, 1e4])
def test_mapo_stays_finite_at_both_ends(error: float):
    """x / (e^x - 1) is 0 / 0 at 0 and overflows above x = 88 in float32."""
    safe, unsafe = (torch.tensor([error], requires_grad=True) for _ in "ab")
    result = reference_free_loss(safe, unsafe, beta=500.0, safe_likelihood_weight=0.0)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(math.log(2))
    assert safe.grad is not None
    assert bool(safe.grad.isfinite().all())


@pytest.mark.parametrize("kind", [*KINDS, "mapo"])
def test_gradient_agrees_with_finite_differences(kind: str):
    """torch.autograd.gradcheck: central differences in float64, through predictions; no kink is near.

    The reference point of `kto` is held still, as its gradient is: it is a number, not a part of the loss."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 2, 2)
    target, *reference = torch.randn((3, *shape), generator=generator, dtype=torch.float64)

    def loss(safe: Tensor, unsafe: Tensor) -> Tensor:
        policy = squared_error(safe, target), squared_error(unsafe, target)
        if kind == "mapo":
            return reference_free_loss(*policy, beta=6.0, safe_likelihood_weight=0.4).loss
        base = [squared_error(one, target) for one in reference]
        return preference_loss(
            *policy,
            error_reference_safe=base[0],
            error_reference_unsafe=base[1],
            beta=0.6,
            safe_rise_weight=0.7,
            safe_likelihood_weight=0.4,
            kind=kind,  # type: ignore[arg-type]
            reference_point=torch.tensor(0.1, dtype=torch.float64),
        ).loss

    safe, unsafe = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "ab")
    assert torch.autograd.gradcheck(loss, (safe, unsafe))


@pytest.mark.parametrize("kind", [*KINDS, "mapo"])
@given(values=st.tuples(*[st.floats(0.01, 2.0)] * 4))
def test_no_loss_rewards_a_worse_safe_picture_before_its_aim_is_reached(kind: str, values: tuple[float, ...]):
    """The slope by the safe error is >= 0 and by the unsafe error <= 0; for `ipo` while z < 1/2, where its aim lies."""
    columns = [torch.tensor([value], dtype=torch.float64) for value in values]
    safe, unsafe = (column.requires_grad_() for column in columns[:2])
    if kind == "mapo":
        result = reference_free_loss(safe, unsafe, beta=5.0, safe_likelihood_weight=0.0)
    else:
        result = loss_of((safe, unsafe, *columns[2:]), kind, beta=5.0)  # type: ignore[arg-type]
    result.loss.backward()
    assert safe.grad is not None
    assert unsafe.grad is not None
    if kind != "ipo" or float(result.logits) < 0.5:
        assert float(safe.grad) >= 0 >= float(unsafe.grad)


def test_every_kind_can_be_asked_for_in_a_config():
    for kind in (*KINDS, "mapo"):
        assert DpoConfig.model_validate({"loss": kind, "safe_rise_weight": 0.0}).loss == kind
