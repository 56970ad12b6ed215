"""The element-wise methods against mergekit's own functions on dense deltas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safetydpo.merging.algebra import delta
from safetydpo.merging.method import LayerExperts, MethodOptions
from safetydpo.merging.methods import sparse
from tests.merging.layer_cases import draws, random_experts, scaled_deltas

arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
sparsify = pytest.importorskip("mergekit.sparsify")
WEIGHTS = [1.0, -0.5, 2.0, 1.5]


def fused(changes: list[Tensor]) -> Tensor:
    """Changes of weight 1 as mergekit fuses them: signs elected by the sum, divided by how many agree."""
    stack = torch.stack(changes)
    mask = arithmetic.get_mask(stack, method=arithmetic.ConsensusMethod.sum, mask_dtype=stack.dtype)
    return (stack * mask).sum(0) / mask.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7, 1.0])
def test_ties(density: float):
    experts = random_experts(5, density=density)
    pruned = [sparsify.magnitude(change, density) for change in scaled_deltas(experts)]
    torch.testing.assert_close(delta(sparse.ties(experts).layer), fused(pruned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7, 1.0])
def test_magnitude(density: float):
    experts = random_experts(4, weights=WEIGHTS, density=density)
    expected = sum(sparsify.magnitude(change, density) for change in scaled_deltas(experts))
    torch.testing.assert_close(delta(sparse.magnitude(experts).layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("density", "outliers"), [(0.3, 0.1), (0.9, 0.3), (0.5, 0.5), (0.1, 0.0)])
def test_breadcrumbs(density: float, outliers: float):
    options = MethodOptions(breadcrumbs_outliers=outliers)
    experts = replace(random_experts(4, weights=WEIGHTS, density=density), options=options)
    expected = sum(sparsify.magnitude_outliers(change, density, gamma=outliers) for change in scaled_deltas(experts))
    torch.testing.assert_close(delta(sparse.breadcrumbs(experts).layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("density", "window"), [(0.5, 0.2), (0.3, 0.25), (0.8, 0.3)])
def test_della(monkeypatch: pytest.MonkeyPatch, density: float, window: float):
    """With the same draws the same entries go. Each that stays is divided by its own probability, as in the paper;
    mergekit rescales a whole tensor instead, so its probabilities are taken and the division is done here.
    """
    experts = replace(random_experts(4, density=density), options=MethodOptions(della_window=window))
    pruned = [prune_by_mergekit(monkeypatch, experts, index, window=window) for index in range(4)]
    torch.testing.assert_close(delta(sparse.della(experts).layer), fused(pruned), rtol=1e-5, atol=1e-5)


def prune_by_mergekit(monkeypatch: pytest.MonkeyPatch, experts: LayerExperts, index: int, *, window: float) -> Tensor:
    """Return a change as mergekit drops entries of it, each that stays divided by the probability that it had there."""
    asked: list[Tensor] = []

    def decide(probabilities: Tensor) -> Tensor:
        asked.append(probabilities)
        return (draws(experts, index) < probabilities).float()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", decide)
        # Its epsilon is half of the paper's window.
        change = scaled_deltas(experts)[index]
        kept: Tensor = sparsify.della_magprune(change, experts.density, epsilon=window / 2)
    return kept / asked[0]
