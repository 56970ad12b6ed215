from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.overlap import (
    cosine_matrix,
    delta_norm,
    inner_products,
    overlap_matrix,
    principal_angles,
    subspace,
)


def layer(up: list[list[float]], down: list[list[float]]) -> LoraLayer:
    return LoraLayer(down=torch.tensor(down), up=torch.tensor(up))


def random_layer(generator: torch.Generator, *, rank: int, d_out: int = 9, d_in: int = 7) -> LoraLayer:
    return LoraLayer(
        down=torch.randn(rank, d_in, generator=generator), up=torch.randn(d_out, rank, generator=generator)
    )


def dense(one: LoraLayer) -> np.ndarray:
    return one.up.double().numpy() @ one.down.double().numpy()


# Deltas [[2, 0], [0, 0]] and [[2, 0], [0, 2]] (rank 2).
FIRST = layer([[2.0], [0.0]], [[1.0, 0.0]])
SECOND = layer([[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]])


def test_inner_products_and_norms_by_hand():
    """<F, F> = 4, <F, S> = 2 * 2 = 4, <S, S> = 4 + 4 = 8."""
    assert inner_products([FIRST, SECOND]).tolist() == [[4.0, 4.0], [4.0, 8.0]]
    assert delta_norm(FIRST) == 2.0
    assert delta_norm(SECOND) == pytest.approx(8**0.5)


def test_cosine_by_hand():
    """4 / (2 * sqrt 8) = 0.7071; with a second layer on which they are opposite (1, -1, 1): 3 / sqrt(5 * 9)."""
    found = cosine_matrix([{"q": FIRST}, {"q": SECOND}])
    assert torch.allclose(found, torch.tensor([[1.0, 0.5**0.5], [0.5**0.5, 1.0]], dtype=torch.float64))
    plus, minus = layer([[1.0], [0.0]], [[0.0, 1.0]]), layer([[-1.0], [0.0]], [[0.0, 1.0]])
    both = cosine_matrix([{"q": FIRST, "v": plus}, {"q": SECOND, "v": minus}])
    assert float(both[0, 1]) == pytest.approx(3 / math.sqrt(45))


def test_an_expert_that_changes_nothing_is_like_none():
    nothing = layer([[0.0], [0.0]], [[1.0, 0.0]])
    assert cosine_matrix([{"q": FIRST}, {"q": nothing}])[0].tolist() == [1.0, 0.0]
    assert subspace(nothing, "columns").shape == (2, 0)
    assert overlap_matrix([{"q": FIRST}, {"q": nothing}], side="rows").tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_angles_and_overlap_by_hand():
    """Columns: span(e1) lies in the plane: 0. Lines 60 degrees apart: cos^2 = 1/4. Rows e1, e2: 90 degrees."""
    assert principal_angles(FIRST, SECOND, side="columns").tolist() == pytest.approx([0.0], abs=1e-7)
    tilted = layer([[0.5], [3**0.5 / 2]], [[0.0, 1.0]])
    assert principal_angles(FIRST, tilted, side="columns").tolist() == pytest.approx([math.pi / 3])
    assert principal_angles(FIRST, tilted, side="rows").tolist() == pytest.approx([math.pi / 2])
    found = overlap_matrix([{"q": FIRST}, {"q": SECOND}, {"q": tilted}], side="columns")
    expected = torch.tensor([[1.0, 1.0, 0.25], [1.0, 1.0, 1.0], [0.25, 1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(found, expected)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 10_000))
def test_against_dense_matrices(ranks: list[int], seed: int):
    """numpy on dense deltas, scipy's subspace_angles on bases of their singular vectors; ranks differ."""
    generator = torch.Generator().manual_seed(seed)
    experts = [{name: random_layer(generator, rank=rank) for name in ("q", "v")} for rank in ranks]
    flat = np.stack([np.concatenate([dense(expert[name]).ravel() for name in ("q", "v")]) for expert in experts])
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(cosine_matrix(experts).numpy(), flat @ flat.T / np.outer(norms, norms), atol=1e-12)
    for side, transpose in (("columns", False), ("rows", True)):
        overlaps = []
        for name in ("q", "v"):
            matrices = [dense(expert[name]).T if transpose else dense(expert[name]) for expert in experts]
            bases = [scipy.linalg.orth(matrix, rcond=1e-6) for matrix in matrices]
            angles = scipy.linalg.subspace_angles(bases[0], bases[1])
            found = principal_angles(experts[0][name], experts[1][name], side=side)
            np.testing.assert_allclose(np.cos(found.numpy()), np.cos(np.sort(angles)), atol=1e-9)
            overlaps.append([[np.mean(np.cos(scipy.linalg.subspace_angles(a, b)) ** 2) for b in bases] for a in bases])
        np.testing.assert_allclose(overlap_matrix(experts, side=side).numpy(), np.mean(overlaps, axis=0), atol=1e-9)


@given(st.integers(0, 10_000))
def test_another_basis_of_the_same_factors_changes_nothing(seed: int):
    """B A = (B M)(M^-1 A): cosine, overlap and norm see the delta only."""
    generator = torch.Generator().manual_seed(seed)
    one, other = random_layer(generator, rank=3), random_layer(generator, rank=3)
    mixed = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=generator).triu(1)
    same = LoraLayer(down=torch.linalg.solve(mixed, one.down), up=one.up @ mixed)
    assert delta_norm(same) == pytest.approx(delta_norm(one), rel=1e-5)
    assert float(cosine_matrix([{"q": one}, {"q": same}])[0, 1]) == pytest.approx(1.0, abs=1e-6)
    found = overlap_matrix([{"q": one}, {"q": same}, {"q": other}], side="rows")
    assert float(found[0, 1]) == pytest.approx(1.0, abs=1e-5)
    assert float(found[0, 2]) == pytest.approx(float(found[1, 2]), abs=1e-4)


def test_a_convolution_is_the_linear_layer_of_its_patches():
    generator = torch.Generator().manual_seed(0)
    flat = [random_layer(generator, rank=2, d_in=12), random_layer(generator, rank=3, d_in=12)]
    deep = [LoraLayer(one.down.unflatten(1, (3, 2, 2)), one.up[:, :, None, None]) for one in flat]
    assert torch.equal(inner_products(deep), inner_products(flat))
    assert torch.equal(
        overlap_matrix([{"c": one} for one in deep], side="rows"),
        overlap_matrix([{"c": one} for one in flat], side="rows"),
    )


def test_experts_that_cannot_be_compared_are_refused():
    with pytest.raises(SafetyDPOError, match="expected layers of at least one expert, found 0 experts"):
        cosine_matrix([])
    with pytest.raises(SafetyDPOError, match="first difference at 'v' of expert number 1"):
        cosine_matrix([{"q": FIRST}, {"q": FIRST, "v": FIRST}])
    with pytest.raises(
        SafetyDPOError, match=r"expected deltas of one shape \[d_out, d_in\], found \[2, 2\] and \[1, 2\]"
    ):
        principal_angles(FIRST, layer([[1.0]], [[1.0, 0.0]]), side="rows")
    with pytest.raises(SafetyDPOError, match="found none"):
        inner_products([])
