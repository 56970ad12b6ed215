from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.dpo.loss import preference_loss, redirection_loss, retention_loss, squared_error


def errors(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def test_hand_worked_loss() -> None:
    """beta = 4, so beta / 2 = 2.

    Pair 1: safe 0.5 -> 0.25 (rise -0.25), unsafe 0.5 -> 1.0 (rise 0.5): logit = -2 * (-0.25 - 0.5) = 1.5,
    no penalty. Pair 2: safe 0.25 -> 0.5 (rise 0.25), unsafe 0.5 -> 0.5 (rise 0): logit = -2 * 0.25 = -0.5,
    penalty 2 * 0.25 = 0.5. Preference = (log(1 + e^-1.5) + log(1 + e^0.5)) / 2 = (0.20141 + 0.97408) / 2;
    penalty = (0 + 0.5) / 2 = 0.25; with weight 3: loss = 0.58775 + 0.75. Accuracy 1 of 2, margin (1.5 - 0.5) / 2.
    """
    policy_safe, policy_unsafe, reference_safe, reference_unsafe = errors(
        [0.25, 0.5], [1.0, 0.5], [0.5, 0.25], [0.5, 0.5]
    )
    result = preference_loss(
        policy_safe,
        policy_unsafe,
        error_reference_safe=reference_safe,
        error_reference_unsafe=reference_unsafe,
        beta=4.0,
        safe_rise_weight=3.0,
    )
    assert result.logits.tolist() == pytest.approx([1.5, -0.5])
    assert float(result.preference) == pytest.approx(0.58775, abs=1e-5)
    assert float(result.safe_rise) == pytest.approx(0.25)
    assert float(result.loss) == pytest.approx(0.58775 + 0.75, abs=1e-5)
    assert float(result.implicit_accuracy) == 0.5
    assert float(result.margin) == pytest.approx(0.5)


def test_equal_policy_and_reference_give_exactly_ln_2() -> None:
    """All rises are 0, so every logit is exactly 0 and -log sigmoid(0) = ln 2 to the last bit of float32."""
    safe, unsafe = torch.rand(8), torch.rand(8)
    result = preference_loss(
        safe,
        unsafe,
        error_reference_safe=safe,
        error_reference_unsafe=unsafe,
        beta=5000.0,
        safe_rise_weight=1.0,
        safe_likelihood_weight=1.0,
    )
    assert torch.equal(result.logits.abs(), torch.zeros(8))
    assert torch.equal(result.loss, torch.tensor(math.log(2), dtype=torch.float32))
    assert float(result.implicit_accuracy) == 0.5


def numpy_loss(
    ps: np.ndarray, pu: np.ndarray, rs: np.ndarray, ru: np.ndarray, beta: float, weight: float, likelihood: float
) -> float:
    inside = -0.5 * beta * ((ps - rs) - (pu - ru))
    rise = 0.5 * beta * (ps - rs)
    return float(np.mean(np.logaddexp(0.0, -inside) + weight * np.maximum(rise, 0.0) + likelihood * rise))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.floats(0.0, 2.0)] * 4), min_size=1, max_size=6),
    beta=st.floats(0.1, 5000.0),
    weight=st.floats(0.0, 5.0),
    likelihood=st.floats(0.0, 5.0),
)
def test_agrees_with_numpy(values: list[tuple[float, ...]], beta: float, weight: float, likelihood: float) -> None:
    columns = np.array(values, dtype=np.float64).T
    ps, pu, rs, ru = (torch.from_numpy(column.copy()) for column in columns)
    result = preference_loss(
        ps,
        pu,
        error_reference_safe=rs,
        error_reference_unsafe=ru,
        beta=beta,
        safe_rise_weight=weight,
        safe_likelihood_weight=likelihood,
    )
    # Terms of both signs may cancel, so the tolerance is relative to the largest of them.
    scale = 1e-12 * max(1.0, beta)
    assert float(result.loss) == pytest.approx(numpy_loss(*columns, beta, weight, likelihood), rel=1e-12, abs=scale)


def test_hand_worked_likelihood_term() -> None:
    """beta = 4; rises of the safe error -0.5 and 0.25, of the unsafe error 0.

    Likelihood = 2 * (-0.5 + 0.25) / 2 = -0.25, penalty = 2 * (0 + 0.25) / 2 = 0.25; logits = 1 and -0.5, so
    preference = (log(1 + e^-1) + log(1 + e^0.5)) / 2 = (0.31326 + 0.97408) / 2 = 0.64367;
    with weights 1 and 3: loss = 0.64367 + 0.25 - 0.75 = 0.14367.
    """
    safe, unsafe, reference_safe, reference_unsafe = errors([0.5, 0.75], [1.0, 1.0], [1.0, 0.5], [1.0, 1.0])
    result = preference_loss(
        safe,
        unsafe,
        error_reference_safe=reference_safe,
        error_reference_unsafe=reference_unsafe,
        beta=4.0,
        safe_rise_weight=1.0,
        safe_likelihood_weight=3.0,
    )
    assert float(result.safe_likelihood) == pytest.approx(-0.25)
    assert float(result.loss) == pytest.approx(0.14367, abs=1e-5)


def test_likelihood_term_pulls_on_after_the_preference_is_won() -> None:
    """With a logit of 50 the preference's slope is beta / 2 * e^-50; the likelihood's is beta / 2 * weight, always."""
    safe = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
    preference_loss(
        safe,
        torch.full((1,), 1.1, dtype=torch.float64),
        error_reference_safe=torch.full((1,), 0.1, dtype=torch.float64),
        error_reference_unsafe=torch.full((1,), 0.1, dtype=torch.float64),
        beta=100.0,
        safe_rise_weight=0.0,
        safe_likelihood_weight=2.0,
    ).loss.backward()
    assert safe.grad is not None
    assert float(safe.grad) == pytest.approx(100.0, rel=1e-12)


def test_gradient_agrees_with_finite_differences() -> None:
    """torch.autograd.gradcheck compares with central differences in float64, through network-like predictions."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 2, 2)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    reference = torch.randn((2, *shape), generator=generator, dtype=torch.float64)

    def loss(safe: torch.Tensor, unsafe: torch.Tensor) -> torch.Tensor:
        return preference_loss(
            squared_error(safe, target),
            squared_error(unsafe, target),
            error_reference_safe=squared_error(reference[0], target),
            error_reference_unsafe=squared_error(reference[1], target),
            beta=6.0,
            safe_rise_weight=0.7,
            safe_likelihood_weight=0.4,
        ).loss

    safe, unsafe = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "ab")
    assert torch.autograd.gradcheck(loss, (safe, unsafe))


def test_penalty_cancels_the_bargain_of_letting_both_errors_rise() -> None:
    """At beta = 100, rises (safe 0.01, unsafe 0.03) lower the preference loss: its slope by the safe error is
    (beta / 2) * sigmoid(-logit) < beta / 2, the penalty's is exactly beta / 2 on top."""
    reference = torch.full((1,), 0.1, dtype=torch.float64)
    for weight, least in ((0.0, 0.0), (1.0, 50.0)):
        safe = torch.full((1,), 0.11, dtype=torch.float64, requires_grad=True)
        preference_loss(
            safe,
            torch.full((1,), 0.13, dtype=torch.float64),
            error_reference_safe=reference,
            error_reference_unsafe=reference,
            beta=100.0,
            safe_rise_weight=weight,
        ).loss.backward()
        assert safe.grad is not None
        assert least < float(safe.grad) < least + 50.0


def test_only_the_loss_carries_a_gradient() -> None:
    safe = torch.rand(2, requires_grad=True)
    ones = torch.ones(2)
    result = preference_loss(
        safe, ones, error_reference_safe=ones, error_reference_unsafe=ones, beta=2.0, safe_rise_weight=1.0
    )
    assert result.loss.requires_grad
    others = (result.preference, result.safe_rise, result.logits, result.implicit_accuracy, result.margin)
    assert not any(one.requires_grad for one in others)


def test_hand_worked_squared_error() -> None:
    """Picture 1: differences 1, 1, 3, 1 -> (1 + 1 + 9 + 1) / 4 = 3; picture 2: all 0.5 -> 0.25."""
    prediction = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[0.5, 0.5]], [[0.5, 0.5]]]])
    target = torch.tensor([[[[0.0, 1.0]], [[0.0, 3.0]]], [[[0.0, 1.0]], [[1.0, 0.0]]]])
    assert squared_error(prediction, target).tolist() == [3.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_reduced_in_float32(dtype: torch.dtype) -> None:
    """At MSE 0.5 a reduction in float16 errs by up to 2.4e-4, which beta / 2 = 2500 turns into a logit of 0.6."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(4, 4, 16, 16, generator=generator).to(dtype)
    target = prediction.float() + 0.7 * torch.randn(4, 4, 16, 16, generator=generator)
    exact = ((prediction.double() - target.double()) ** 2).mean(dim=(1, 2, 3))
    found = squared_error(prediction, target)
    assert found.dtype == torch.float32
    assert 2500 * float((found.double() - exact).abs().max()) < 1e-3


def test_retention_is_the_mean_squared_change() -> None:
    """Two pictures, changes of 1 everywhere and 0 everywhere: (1 + 0) / 2."""
    reference = torch.zeros(2, 1, 2, 2)
    policy = reference.clone()
    policy[0] = 1.0
    assert float(retention_loss(policy, reference)) == 0.5


@given(
    values=st.lists(st.floats(-3, 3), min_size=16, max_size=16),
    weights=st.tuples(st.floats(0, 5), st.floats(0, 5)),
)
def test_retention_agrees_with_numpy_and_vanishes_only_without_change(
    values: list[float], weights: tuple[float, float]
) -> None:
    policy, reference = np.array(values).reshape(2, 2, 1, 2, 2)
    expected = (np.array(weights) * ((policy - reference) ** 2).mean(axis=(1, 2, 3))).mean()
    pair = torch.from_numpy(policy.copy()), torch.from_numpy(reference.copy())
    found = float(retention_loss(*pair, weights=torch.tensor(weights, dtype=torch.float64)))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert float(retention_loss(pair[0], pair[0])) == 0.0
    assert (float(retention_loss(*pair)) == 0.0) == bool((np.square(policy - reference) == 0).all())


def test_redirection_by_hand() -> None:
    """Distances of 2 everywhere and 1 everywhere, weights 1 and 3: beta / 2 * (4 * 1 + 1 * 3) / 2 = 5 * 3.5."""
    wanted = torch.zeros(2, 1, 2, 2)
    policy = wanted.clone()
    policy[0], policy[1] = 2.0, -1.0
    assert float(redirection_loss(policy, wanted, beta=10.0, weights=torch.tensor([1.0, 3.0]))) == 17.5
    assert float(redirection_loss(wanted, wanted, beta=10.0)) == 0.0


def test_shapes_in_annotations_hold() -> None:
    from beartype import beartype
    from jaxtyping import jaxtyped

    checked = jaxtyped(typechecker=beartype)(squared_error)
    assert checked(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).shape == (2,)
    with pytest.raises(Exception, match="squared_error"):
        checked(torch.zeros(2, 1, 2, 2), torch.zeros(3, 1, 2, 2))
