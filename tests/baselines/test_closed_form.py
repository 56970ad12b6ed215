from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.baselines.closed_form import as_layer, edit_map
from safetydpo.errors import SafetyDPOError

NONE = torch.zeros(0, 2)


def test_a_two_by_two_edit_by_hand():
    """c = (1, 0), t = (0, 1), e = lambda = 1: M = diag(2, 1), (t - c) c^T = [[-1, 0], [1, 0]], D = half of it.

    W = [[1, 2], [3, 4]]: W* c = (1.5, 3.5), half-way from W c = (1, 3) to W t = (2, 4); W* (0, 1) stays (2, 4).
    """
    change = edit_map(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), NONE, erase_scale=1.0, preserve_scale=1.0, ridge=1.0
    )
    expected = torch.tensor([[-0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(change, expected)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    edited = weight + weight @ change
    torch.testing.assert_close(edited @ torch.tensor([1.0, 0.0]).double(), torch.tensor([1.5, 3.5]).double())
    torch.testing.assert_close(edited @ torch.tensor([0.0, 1.0]).double(), torch.tensor([2.0, 4.0]).double())


def test_it_equals_the_papers_formula_and_least_squares():
    """Independently: the paper's closed form with numpy's inverse, and numpy's lstsq on stacked rows."""
    generator = np.random.default_rng(0)
    erased, targets, kept = (generator.normal(size=(n, 5)) for n in (7, 7, 9))
    weight = generator.normal(size=(3, 5))
    e, p, ridge = 2.0, 0.5, 0.3
    change = edit_map(
        *(torch.tensor(values) for values in (erased, targets, kept)), erase_scale=e, preserve_scale=p, ridge=ridge
    )
    found = weight + weight @ change.numpy()
    left = e * (weight @ targets.T) @ erased + p * (weight @ kept.T) @ kept + ridge * weight
    right = e * erased.T @ erased + p * kept.T @ kept + ridge * np.eye(5)
    np.testing.assert_allclose(found, left @ np.linalg.inv(right), rtol=1e-10)
    rows = np.vstack([e**0.5 * erased, p**0.5 * kept, ridge**0.5 * np.eye(5)])
    wanted = np.vstack([e**0.5 * targets @ weight.T, p**0.5 * kept @ weight.T, ridge**0.5 * weight.T])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 10.0))
def test_what_is_its_own_target_is_not_changed(seed: int, scale: float):
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    change = edit_map(features, features, features[:1], erase_scale=scale, preserve_scale=1.0, ridge=0.1)
    assert torch.equal(change, torch.zeros(3, 3, dtype=torch.float64))


def test_without_anything_to_lean_on_it_is_refused():
    with pytest.raises(SafetyDPOError, match="system of 2 unknowns without a unique solution .* raise ridge"):
        edit_map(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2), NONE, erase_scale=1.0, preserve_scale=1.0, ridge=0.0)


def test_a_change_becomes_factors_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(6, 2, generator=generator) @ torch.randn(2, 5, generator=generator)
    layer = as_layer(delta)
    assert layer is not None
    assert layer.down.shape == (2, 5)
    torch.testing.assert_close(layer.up @ layer.down, delta)
    assert as_layer(torch.zeros(3, 4)) is None
