"""The methods in a common basis, against their dense forms in numpy, written from the papers.

Their authors publish code, but no package; none of it is used here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import delta, rank_of
from safetydpo.merging.method import LayerExperts
from safetydpo.merging.methods import subspace
from tests.merging.layer_cases import dense_experts, random_experts, scaled_deltas

WEIGHTS = [1.0, -0.5, 2.0]


def dense(layer: LoraLayer) -> np.ndarray:
    return delta(layer).double().numpy()


def many(num: int, *, rank: int = 2, d_in: int = 20, d_out: int = 15) -> LayerExperts:
    generator = torch.Generator().manual_seed(3)
    layers = [
        LoraLayer(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for _ in range(num)
    ]
    return LayerExperts("q", layers, [1.0] * num)


def test_knots_by_hand():
    """diag(2, 0) and diag(0, 3) side by side have the unit vectors as left singular vectors, so TIES runs on the rows
    as they are; no entry meets another: diag(2, 3)."""
    merged = subspace.knots(dense_experts([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]))
    torch.testing.assert_close(delta(merged.layer), torch.diag(torch.tensor([2.0, 3.0])))


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_knots_equals_the_dense_form_in_numpy(density):
    experts = random_experts(3, weights=WEIGHTS, density=density)
    side_by_side = np.concatenate([change.double().numpy() for change in scaled_deltas(experts)], axis=1)
    u, s, vh = np.linalg.svd(side_by_side, full_matrices=False)
    aligned = np.stack(np.split(s[:, None] * vh, 3, axis=1))
    for matrix in aligned:
        falling = np.argsort(-np.abs(matrix).ravel())
        matrix.ravel()[falling[max(1, int(density * matrix.size)) :]] = 0.0
    agree = np.sign(aligned) == np.where(aligned.sum(0) >= 0, 1.0, -1.0)
    expected = u @ ((aligned * agree).sum(0) / np.maximum(agree.sum(0), 1))
    np.testing.assert_allclose(dense(subspace.knots(experts).layer), expected, rtol=1e-4, atol=1e-5)


def test_knots_leaves_out_directions_that_no_expert_uses():
    """Two experts of rank 2 use 4 of 15 directions; a third that is a multiple of the first adds none."""
    experts = many(2)
    twin = LoraLayer(experts.layers[0].down, -0.5 * experts.layers[0].up)
    assert rank_of(subspace.knots(experts).layer) == 4
    merged = subspace.knots(replace(experts, layers=[*experts.layers, twin], weights=[1.0] * 3))
    assert rank_of(merged.layer) == 4


def test_knots_turns_with_the_outputs():
    """Rotating the outputs of all experts rotates the merge: it depends on no basis of them, as TIES does."""
    experts = many(3)
    turn, _ = torch.linalg.qr(torch.randn(15, 15, generator=torch.Generator().manual_seed(1)))
    turned = replace(experts, layers=[LoraLayer(layer.down, turn @ layer.up) for layer in experts.layers])
    expected = turn @ delta(subspace.knots(replace(experts, density=0.5)).layer)
    found = delta(subspace.knots(replace(turned, density=0.5)).layer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tsv_by_hand():
    """Two experts, both 2 e1 e1' and 3 e1 e2': U = [e1 e1] has the polar factor e1 [1 1] / sqrt 2, V = [e1 e2] stays.
    delta = e1 (2 e1' + 3 e2') / sqrt 2."""
    merged = subspace.tsv(dense_experts([[2.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, 0.0]]))
    expected = torch.tensor([[2.0, 3.0], [0.0, 0.0]]) / 2**0.5
    torch.testing.assert_close(delta(merged.layer), expected)


def test_tsv_leaves_orthogonal_experts_as_their_sum():
    merged = subspace.tsv(dense_experts([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]))
    torch.testing.assert_close(delta(merged.layer), torch.diag(torch.tensor([2.0, 3.0])))


@pytest.mark.parametrize("num", [2, 3, 5])
def test_tsv_equals_the_dense_form_in_numpy(num):
    """min(6, 8) = 6 directions are shared out: 3 each for 2 experts, 2 for 3, 1 for 5. A weight scales its expert."""
    experts = random_experts(num, weights=[1.0, -0.5, 2.0, 1.0, 0.3][:num])
    us, ss, vs = [], [], []
    for change in scaled_deltas(experts):
        u, s, vh = np.linalg.svd(change.double().numpy())
        kept = min(3, 6 // num)
        us, ss, vs = [*us, u[:, :kept]], [*ss, s[:kept]], [*vs, vh[:kept].T]

    def polar(matrix: np.ndarray) -> np.ndarray:
        p, _, q = np.linalg.svd(matrix, full_matrices=False)
        return p @ q

    expected = polar(np.hstack(us)) @ np.diag(np.hstack(ss)) @ polar(np.hstack(vs)).T
    np.testing.assert_allclose(dense(subspace.tsv(experts).layer), expected, rtol=1e-4, atol=1e-4)


def test_tsv_does_not_count_experts_without_a_change():
    experts = random_experts(3, weights=[1.0, 0.0, 1.0])
    two = replace(experts, layers=experts.layers[::2], weights=[1.0, 1.0])
    torch.testing.assert_close(delta(subspace.tsv(experts).layer), delta(subspace.tsv(two).layer))


def test_iso_by_hand():
    """diag(2, 0) + diag(0, 4): both directions get the mean strength 3. A single expert is flattened too."""
    merged = subspace.iso(dense_experts([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(delta(merged.layer), torch.diag(torch.tensor([3.0, 3.0])))
    alone = subspace.iso(dense_experts([[2.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(delta(alone.layer), torch.diag(torch.tensor([3.0, 3.0])))


def test_iso_equals_the_dense_form_in_numpy():
    experts = random_experts(3, weights=WEIGHTS)
    u, s, vh = np.linalg.svd(sum(scaled_deltas(experts)).double().numpy(), full_matrices=False)
    np.testing.assert_allclose(dense(subspace.iso(experts).layer), s.mean() * u @ vh, rtol=1e-4, atol=1e-4)


def test_iso_counts_only_directions_of_the_sum():
    """Three experts of rank 2 in a 15 x 20 layer: six equal singular values, not fifteen."""
    experts = many(3)
    values = np.linalg.svd(dense(subspace.iso(experts).layer), compute_uv=False)
    wanted = np.linalg.svd(sum(scaled_deltas(experts)).double().numpy(), compute_uv=False)[:6].mean()
    np.testing.assert_allclose(values[:6], wanted, rtol=1e-5)
    np.testing.assert_allclose(values[6:], 0.0, atol=1e-4)


@pytest.mark.parametrize("method", [subspace.tsv, subspace.iso, subspace.knots])
def test_experts_without_any_change_merge_to_none(method):
    merged = method(dense_experts([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]))
    assert not delta(merged.layer).any()


def test_knots_refuses_a_density_of_nothing():
    with pytest.raises(SafetyDPOError, match=r"KnOTS density in \(0, 1\], found 0.0"):
        subspace.knots(dense_experts([[1.0]], density=0.0))
