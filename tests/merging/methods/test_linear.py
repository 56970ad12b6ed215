from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import UsageError
from safetydpo.merging.algebra import delta, rank_of
from safetydpo.merging.methods import linear
from tests.merging.layer_cases import dense_experts, random_experts, scaled_deltas


def test_sum_and_average_by_hand():
    """[1 2] + 3 [1 -1] = [4 -1]; the average halves it, because there are two experts."""
    experts = dense_experts([[1.0, 2.0]], [[1.0, -1.0]], weights=[1.0, 3.0])
    assert delta(linear.sum_deltas(experts).layer).tolist() == [[4.0, -1.0]]
    assert delta(linear.average(experts).layer).tolist() == [[2.0, -0.5]]


def test_linear_by_hand():
    """([1 2] + 3 [1 -1]) / (1 + 3) = [1 -0.25]."""
    experts = dense_experts([[1.0, 2.0]], [[1.0, -1.0]], weights=[1.0, 3.0])
    assert delta(linear.linear(experts).layer).tolist() == [[1.0, -0.25]]


@given(factor=st.floats(0.1, 10.0), weights=st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3))
def test_shares_matter_not_their_size(factor, weights):
    one = linear.linear(random_experts(3, weights=weights)).layer
    other = linear.linear(random_experts(3, weights=[factor * weight for weight in weights])).layer
    torch.testing.assert_close(delta(one), delta(other), rtol=1e-5, atol=1e-5)


def test_linear_equals_numpys_average():
    weights = [0.5, 2.0, 1.25]
    experts = random_experts(3, weights=weights)
    stack = np.stack([(layer.up @ layer.down).numpy() for layer in experts.layers])
    expected = np.average(stack, axis=0, weights=weights)
    np.testing.assert_allclose(delta(linear.linear(experts).layer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.3, -0.1, -0.2]])
def test_weights_that_add_up_to_nothing_are_refused(weights):
    with pytest.raises(UsageError, match=r"add up to a number other than 0 for merge method 'linear', found \["):
        linear.linear(random_experts(len(weights), weights=weights))


def test_svd_by_hand():
    """Two experts of rank 1, diag(3, 0) and diag(0, 4): the sum diag(3, 4) cut to rank 1 keeps 4 and loses 3."""
    experts = dense_experts([[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]])
    experts = type(experts)(**{**vars(experts), "output_rank": 1})
    merged = linear.svd(experts)
    torch.testing.assert_close(delta(merged.layer), torch.diag(torch.tensor([0.0, 4.0])))
    assert merged.lost == pytest.approx((9.0, 25.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_is_the_nearest_change_of_the_rank_of_one_expert(dtype):
    """numpy's dense SVD of the dense sum, cut to 3 of 6 singular values."""
    experts = random_experts(4, weights=[1.0, -0.5, 2.0, 0.7], dtype=dtype)
    u, s, vh = np.linalg.svd(sum(scaled_deltas(experts)).double().numpy())
    expected = (u[:, :3] * s[:3]) @ vh[:3]
    merged = linear.svd(experts)
    assert rank_of(merged.layer) == 3
    limit = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert np.linalg.norm(delta(merged.layer).double().numpy() - expected) <= limit * np.linalg.norm(s)
    assert merged.lost == pytest.approx((float((s[3:] ** 2).sum()), float((s**2).sum())), rel=1e-5)
