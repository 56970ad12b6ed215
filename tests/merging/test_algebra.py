from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import (
    cap_rank,
    concatenate,
    delta,
    exact_factors,
    factor_dense,
    max_rank,
    rank_of,
    reduce_rank,
    scale_layer,
    singular_values,
)

EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def random_layer(rank: int, *, d_in: int, d_out: int, seed: int, dtype: torch.dtype = torch.float32) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    return LoraLayer(
        down=torch.randn(rank, d_in, generator=generator, dtype=dtype),
        up=torch.randn(d_out, rank, generator=generator, dtype=dtype),
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_concatenation_by_hand_has_no_cross_terms():
    """B1 A1 = [2][1 0] = [2 0], B2 A2 = [3][0 1] = [0 3]; 1 * first + 2 * second = [2 6].

    Adding A's and B's instead would give (2 + 2 * 3)[1 1] = [8 8].
    """
    one = LoraLayer(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
    two = LoraLayer(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0]]))
    assert torch.equal(delta(concatenate([one, two], [1.0, 2.0])), torch.tensor([[2.0, 6.0]]))


def test_scale_goes_into_up():
    layer = random_layer(2, d_in=3, d_out=4, seed=0)
    scaled = scale_layer(layer, 0.5)
    assert torch.equal(scaled.down, layer.down)
    assert torch.equal(scaled.up, 0.5 * layer.up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_sums_of_any_ranks_are_exact(dtype, ranks, d_in, d_out, seed):
    layers = [random_layer(r, d_in=d_in, d_out=d_out, seed=seed + i, dtype=torch.float64) for i, r in enumerate(ranks)]
    weights = [0.5 + i for i in range(len(ranks))]
    expected = sum(w * (layer.up.numpy() @ layer.down.numpy()) for w, layer in zip(weights, layers, strict=True))
    given_ = [LoraLayer(layer.down.to(dtype), layer.up.to(dtype)) for layer in layers]
    merged = cap_rank(concatenate(given_, weights))
    assert rank_of(merged) <= max_rank(merged) == min(d_in, d_out)
    scale = sum(
        w * np.linalg.norm(layer.up) * np.linalg.norm(layer.down) for w, layer in zip(weights, layers, strict=True)
    )
    assert np.linalg.norm(delta(merged).double().numpy() - expected) <= EXACT[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reducing_to_the_true_rank_is_exact(dtype):
    layer = concatenate([random_layer(3, d_in=40, d_out=30, seed=s, dtype=dtype) for s in range(4)], [1.0] * 4)
    twice = concatenate([layer, layer], [1.0, 1.0])
    reduced = reduce_rank(twice, 12)
    assert rank_of(reduced.layer) == 12
    assert error(delta(reduced.layer), delta(layer) * 2) < EXACT[dtype]
    assert reduced.truncation_error < 1e-12 if dtype is torch.float64 else reduced.truncation_error < 1e-6


@pytest.mark.parametrize(("d_in", "d_out"), [(40, 30), (30, 40), (8, 50), (5, 5)])
def test_singular_values_equal_those_of_the_dense_svd(d_in, d_out):
    layer = concatenate([random_layer(4, d_in=d_in, d_out=d_out, seed=s) for s in range(3)], [1.0, 0.5, 2.0])
    dense = np.linalg.svd(layer.up.double().numpy() @ layer.down.double().numpy(), compute_uv=False)
    found = singular_values(layer).numpy()
    num = min(len(dense), len(found))
    np.testing.assert_allclose(found[:num], dense[:num], atol=1e-12 * dense[0])
    assert np.all(dense[num:] < 1e-12 * dense[0])


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_truncation_equals_dense_truncation_and_states_its_error(rank):
    layer = concatenate([random_layer(4, d_in=20, d_out=30, seed=s) for s in range(3)], [1.0] * 3)
    dense = delta(layer)
    u, s, vh = np.linalg.svd(dense.double().numpy(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    for reduction in (reduce_rank(layer, rank), factor_dense(dense, rank)):
        assert rank_of(reduction.layer) == rank
        np.testing.assert_allclose(delta(reduction.layer).numpy(), expected, atol=1e-5 * s[0])
        assert reduction.truncation_error == pytest.approx(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), rel=1e-5)
        assert error(delta(reduction.layer), dense) == pytest.approx(reduction.truncation_error, rel=1e-4)


def test_truncation_by_hand():
    """diag(3, 4) cut to rank 1 keeps 4 and loses 3: relative error 3 / 5."""
    layer = LoraLayer(torch.eye(2), torch.diag(torch.tensor([3.0, 4.0])))
    reduction = reduce_rank(layer, 1)
    assert torch.allclose(delta(reduction.layer), torch.diag(torch.tensor([0.0, 4.0])), atol=1e-7)
    assert reduction.truncation_error == pytest.approx(0.6)


def test_a_delta_of_zeros_loses_nothing():
    assert reduce_rank(LoraLayer(torch.ones(3, 4), torch.zeros(5, 3)), 1).truncation_error == 0.0


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_exact_factors_are_the_dense_matrix(shape):
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = exact_factors(dense)
    assert rank_of(layer) == 3
    assert torch.equal(delta(layer), dense)


def test_errors_name_what_is_wrong():
    layer = random_layer(2, d_in=3, d_out=3, seed=0)
    with pytest.raises(SafetyDPOError, match="found 0 layers and 0 weights"):
        concatenate([], [])
    with pytest.raises(SafetyDPOError, match="found 1 layers and 2 weights"):
        concatenate([layer], [1.0, 2.0])
    with pytest.raises(SafetyDPOError, match="output rank of at least 1, found 0"):
        reduce_rank(layer, 0)
    with pytest.raises(SafetyDPOError, match="output rank of at least 1, found -1"):
        factor_dense(delta(layer), -1)
