"""Any subset of experts is merged from the scores of all, without another pass over the layer inputs.

The brute force goes back to the inputs, unit by unit and input by input, in plain Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.merging.algebra import delta
from safetydpo.merging.merge import Expert, MergeSettings, PreparedExperts, merge_with, prepare_experts

D_IN, D_OUT, RANK = 5, 4, 2
WEIGHTS = {"a": 1.0, "b": 0.7, "c": -1.3, "d": 1.1}
Score = Callable[[np.ndarray, np.ndarray, np.ndarray, float], float]


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(7, 3, D_IN, generator=torch.Generator().manual_seed(4)).half()


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    found = []
    for seed, name in enumerate(WEIGHTS):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            "q": LoraLayer(torch.randn(RANK, D_IN, generator=generator), torch.randn(D_OUT, RANK, generator=generator))
        }
        found.append(Expert(name, adapter_hash(layers), layers, AdapterMetadata("base")))
    return found


@pytest.fixture(scope="module")
def prepared(experts: list[Expert], inputs: torch.Tensor) -> PreparedExperts:
    return prepare_experts(experts, inputs={"q": inputs})


def elect(subset: Sequence[Expert], inputs: np.ndarray, score: Score) -> Expert:
    """Every input votes for the expert of the largest score; ties go to the smaller hash."""
    ballots = [
        max(subset, key=lambda e: (score(*matrices(e), h, WEIGHTS[e.name]), -rank_of_hash(e, subset))).name
        for h in inputs
    ]
    return max(subset, key=lambda e: (ballots.count(e.name), -rank_of_hash(e, subset)))


def rank_of_hash(expert: Expert, subset: Sequence[Expert]) -> int:
    return sorted(e.hash for e in subset).index(expert.hash)


def matrices(expert: Expert) -> tuple[np.ndarray, np.ndarray]:
    layer = expert.layers["q"]
    return layer.down.double().numpy(), layer.up.double().numpy()


def brute_co_merge(subset: Sequence[Expert], h: np.ndarray) -> np.ndarray:
    a = np.zeros((RANK, D_IN))
    for k in range(RANK):
        winner = elect(subset, h, lambda down, up, x, w, k=k: np.abs(x @ down[k]).mean())
        a[k] = matrices(winner)[0][k]
    return brute_rows_of_b(subset, h) @ a


def brute_rows_of_b(subset: Sequence[Expert], h: np.ndarray) -> np.ndarray:
    b = np.zeros((D_OUT, RANK))
    for i in range(D_OUT):
        winner = elect(subset, h, lambda down, up, x, w, i=i: np.abs(w * (x @ down.T @ up[i])).mean())
        b[i] = WEIGHTS[winner.name] * matrices(winner)[1][i]
    return b


def brute_element(subset: Sequence[Expert], h: np.ndarray) -> np.ndarray:
    a, b = np.zeros((RANK, D_IN)), np.zeros((D_OUT, RANK))
    for k in range(RANK):
        for j in range(D_IN):
            winner = elect(subset, h, lambda down, up, x, w, k=k, j=j: np.abs(down[k, j] * x[:, j]).mean())
            a[k, j] = matrices(winner)[0][k, j]
        for i in range(D_OUT):
            winner = elect(subset, h, lambda down, up, x, w, k=k, i=i: np.abs(w * up[i, k] * (x @ down[k])).mean())
            b[i, k] = WEIGHTS[winner.name] * matrices(winner)[1][i, k]
    return b @ a


def brute_delta_neuron(subset: Sequence[Expert], h: np.ndarray) -> np.ndarray:
    rows = []
    for i in range(D_OUT):
        winner = elect(subset, h, lambda down, up, x, w, i=i: np.abs(w * (x @ down.T @ up[i])).mean())
        down, up = matrices(winner)
        rows.append(WEIGHTS[winner.name] * up[i] @ down)
    return np.stack(rows)


def brute_component(subset: Sequence[Expert], h: np.ndarray) -> np.ndarray:
    total = np.zeros((D_OUT, D_IN))
    for k in range(RANK):
        winner = elect(
            subset, h, lambda down, up, x, w, k=k: abs(w) * np.linalg.norm(up[:, k]) * np.abs(x @ down[k]).mean()
        )
        down, up = matrices(winner)
        total += WEIGHTS[winner.name] * np.outer(up[:, k], down[k])
    return total


BRUTE = {
    "co_merge": brute_co_merge,
    "element": brute_element,
    "delta_neuron": brute_delta_neuron,
    "component": brute_component,
}


@pytest.mark.parametrize("method", sorted(BRUTE))
def test_votes_of_every_subset_equal_brute_force(experts, prepared, inputs, method):
    h = inputs.double().numpy()
    for size in range(1, 5):
        for subset in combinations(experts, size):
            names = {expert.name for expert in subset}
            weights = {name: WEIGHTS[name] if name in names else 0.0 for name in WEIGHTS}
            merged = merge_with(prepared, MergeSettings(method, weights=weights)).layers["q"]
            expected = BRUTE[method](subset, h)
            np.testing.assert_allclose(delta(merged).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(BRUTE))
def test_scores_that_are_not_kept_change_no_byte(experts, prepared, inputs, method):
    again = prepare_experts(experts, inputs={"q": inputs}, max_score_bytes=0)
    assert again.has_scores
    assert not again.scores
    one, other = (merge_with(which, MergeSettings(method, weights=WEIGHTS)) for which in (prepared, again))
    assert adapter_hash(one.layers) == adapter_hash(other.layers)
    assert one.shares == other.shares


def test_scores_are_kept_up_to_their_size(experts, inputs):
    """4 experts x 7 inputs x (2 rows of A + 4 of B) x 4 bytes = 672."""
    assert prepare_experts(experts, inputs={"q": inputs}, max_score_bytes=672).scores
    assert not prepare_experts(experts, inputs={"q": inputs}, max_score_bytes=671).scores


def test_another_expert_leaves_the_scores_of_the_others(experts, prepared, inputs):
    fewer = prepare_experts(experts[:3], inputs={"q": inputs})
    kept = {e.name: scores for e, scores in zip(prepared.experts, prepared.scores["q"], strict=True)}
    for expert, scores in zip(fewer.experts, fewer.scores["q"], strict=True):
        assert torch.equal(scores.up, kept[expert.name].up)
        assert torch.equal(scores.down, kept[expert.name].down)
