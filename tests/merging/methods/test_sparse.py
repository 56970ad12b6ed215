"""The element-wise methods, in hand-worked cases, against PEFT's functions on dense deltas and against numpy.

Against mergekit: test_mergekit.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import delta, exact_factors
from safetydpo.merging.method import LayerExperts, MethodOptions
from safetydpo.merging.methods import sparse
from tests.merging.layer_cases import dense_experts, draws, random_experts, scaled_deltas

DROPPING = {"dare": sparse.dare, "dare_ties": sparse.dare_ties, "della": sparse.della}


def test_ties_by_hand():
    """Density 0.5 keeps 2 of 4 entries: [5 -4 1 0] -> [5 -4 0 0], [-1 -2 6 0] -> [0 -2 6 0].

    Sums [5 -6 6 0] elect + - + +; means over the agreeing experts: 5, (-4 - 2) / 2 = -3, 6, 0.
    """
    experts = dense_experts([[5.0, -4.0, 1.0, 0.0]], [[-1.0, -2.0, 6.0, 0.0]], density=0.5)
    assert delta(sparse.ties(experts).layer).tolist() == [[5.0, -3.0, 6.0, 0.0]]


def test_ties_drops_the_minority_sign():
    """1, 2 and -4: the sum -1 elects -, so the result is -4, not the mean."""
    experts = dense_experts([[1.0]], [[2.0]], [[-4.0]])
    assert delta(sparse.ties(experts).layer).tolist() == [[-4.0]]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 2.0, 1.0, 1.5]])
def test_ties_equals_peft_on_dense_deltas(density, weights):
    experts = random_experts(4, weights=weights, density=density)
    expected = merge_utils.ties(scaled_deltas(experts), torch.ones(4), density=density, majority_sign_method="total")
    torch.testing.assert_close(delta(sparse.ties(experts).layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_equals_numpy(density):
    experts = random_experts(5, density=density, seed=2)
    stack = np.stack([(layer.up @ layer.down).numpy().astype(np.float64) for layer in experts.layers])
    for matrix in stack:
        order = np.argsort(-np.abs(matrix).ravel())
        matrix.ravel()[order[max(1, int(density * matrix.size)) :]] = 0.0
    elected = np.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(stack) == elected
    expected = np.where(agree.any(0), (stack * agree).sum(0) / np.maximum(agree.sum(0), 1), 0.0)
    np.testing.assert_allclose(delta(sparse.ties(experts).layer), expected, rtol=1e-5, atol=1e-6)


def test_trim_keeps_at_least_one_entry_and_all_equal_ones():
    assert sparse.trim(torch.tensor([[1.0, -3.0, 2.0]]), 0.01).tolist() == [[0.0, -3.0, 0.0]]
    assert sparse.trim(torch.tensor([[1.0, -1.0, 0.5]]), 0.34).tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_trims_are_those_of_a_sort_in_every_type(dtype):
    dense = torch.randn(9, 13, generator=torch.Generator().manual_seed(4)).to(dtype)
    falling = dense.abs().flatten().sort(descending=True).values
    for density in (0.02, 0.3, 0.99):
        kept = max(1, int(density * dense.numel()))
        assert torch.equal(sparse.trim(dense, density), dense * (dense.abs() >= falling[kept - 1]))
        dropped = min(int(0.1 * dense.numel()), dense.numel() - kept)
        middle = (dense.abs() <= falling[dropped]) & (dense.abs() >= falling[dropped + kept - 1])
        assert torch.equal(sparse.trim_both(dense, density, outliers=0.1), dense * middle)


def test_magnitude_by_hand():
    """Density 0.5 keeps 2 of 4 entries of each: [5 -4 0 0] + 2 [0 -2 6 0] = [5 -8 12 0]."""
    experts = dense_experts([[5.0, -4.0, 1.0, 0.0]], [[-1.0, -2.0, 6.0, 0.0]], weights=[1.0, 2.0], density=0.5)
    assert delta(sparse.magnitude(experts).layer).tolist() == [[5.0, -8.0, 12.0, 0.0]]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, -2.0, 1.0, 1.5]])
def test_magnitude_equals_peft_on_dense_deltas(density, weights):
    experts = random_experts(4, weights=weights, density=density)
    deltas = [delta(layer) for layer in experts.layers]
    expected = merge_utils.magnitude_prune(deltas, torch.tensor(weights), density=density)
    torch.testing.assert_close(delta(sparse.magnitude(experts).layer), expected, rtol=1e-5, atol=1e-6)


def test_dare_by_hand(monkeypatch):
    """Draws 0.1 0.6 0.4 at density 0.5 keep entries 1 and 3, doubled: [2 0 6]; a second expert, weight -1, likewise
    [8 0 4]: together [-6 0 2]."""
    monkeypatch.setattr(sparse, "_draws", lambda *_: torch.tensor([[0.1, 0.6, 0.4]]))
    experts = dense_experts([[1.0, 2.0, 3.0]], [[4.0, 5.0, 2.0]], weights=[1.0, -1.0], density=0.5)
    assert delta(sparse.dare(experts).layer).tolist() == [[-6.0, 0.0, 2.0]]


def test_dare_ties_by_hand(monkeypatch):
    """Kept and doubled: [2 0 -6] and [-8 0 -4]. Sums [-6 0 -10] elect - + -; means of those that agree: -8, 0, -5."""
    monkeypatch.setattr(sparse, "_draws", lambda *_: torch.tensor([[0.1, 0.6, 0.4]]))
    experts = dense_experts([[1.0, 2.0, -3.0]], [[-4.0, 5.0, -2.0]], density=0.5)
    assert delta(sparse.dare_ties(experts).layer).tolist() == [[-8.0, 0.0, -5.0]]


def masks(experts: LayerExperts) -> Iterator[torch.Tensor]:
    return iter([(draws(experts, index) < experts.density).float() for index in range(len(experts.layers))])


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_equals_peft_on_dense_deltas_with_the_same_draws(monkeypatch, name, density):
    """PEFT draws with torch.bernoulli, expert by expert; it is given our draws."""
    experts = random_experts(4, density=density)
    kept = masks(experts)
    deltas = [delta(layer) for layer in experts.layers]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda _: next(kept))
        expected = getattr(merge_utils, name)(deltas, torch.ones(4), density=density)
    ours = sparse.dare if name == "dare_linear" else sparse.dare_ties
    torch.testing.assert_close(delta(ours(experts).layer), expected, rtol=1e-5, atol=1e-6)


def test_della_by_hand(monkeypatch):
    """Density 0.5, window 0.4: by rising magnitude 1, 2, 3 the probabilities are 0.3, 0.5, 0.7. Draws 0.4 0.4 0.4 drop
    the smallest; the others become 2 / 0.5 = 4 and 3 / 0.7."""
    monkeypatch.setattr(sparse, "_draws", lambda *_: torch.full((1, 3), 0.4))
    experts = replace(dense_experts([[3.0, -1.0, 2.0]], density=0.5), options=MethodOptions(della_window=0.4))
    torch.testing.assert_close(delta(sparse.della(experts).layer), torch.tensor([[3 / 0.7, 0.0, 4.0]]))


@pytest.mark.parametrize(("density", "window"), [(0.5, 0.2), (0.3, 0.6), (0.9, 0.5)])
def test_della_equals_the_paper_in_numpy(density, window):
    """Row by row: rank r of n by magnitude is dropped with 1 - density + window' / 2 - window' r / (n - 1)."""
    experts = replace(random_experts(3, density=density), options=MethodOptions(della_window=window))
    narrowed = min(window, density, 2 * (1 - density))
    pruned = []
    for index, dense in enumerate(scaled_deltas(experts)):
        matrix, luck = dense.numpy().astype(np.float64), draws(experts, index).numpy()
        for row, row_luck in zip(matrix, luck, strict=True):
            for rank, j in enumerate(np.argsort(np.abs(row))):
                drop = 1 - density + narrowed / 2 - narrowed * rank / (len(row) - 1)
                row[j] = row[j] / (1 - drop) if row_luck[j] < 1 - drop else 0.0
        pruned.append(matrix)
    stack = np.stack(pruned)
    agree = np.sign(stack) == np.where(stack.sum(0) >= 0, 1.0, -1.0)
    expected = (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)
    np.testing.assert_allclose(delta(sparse.della(experts).layer), expected, rtol=1e-4, atol=1e-5)


@given(density=st.floats(0.01, 1.0), window=st.floats(0.0, 2.0), columns=st.integers(1, 9))
def test_della_keeps_each_entry_with_a_probability_that_averages_to_the_density(density, window, columns):
    dense = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    kept = sparse.keep_probabilities(dense, density, window=window)
    assert bool((kept > 0).all() and (kept <= 1 + 1e-6).all())
    torch.testing.assert_close(kept.mean(dim=1), torch.full((2,), density), rtol=1e-4, atol=1e-6)


def test_breadcrumbs_by_hand():
    """Of 5 entries int(0.2 * 5) = 1 is an outlier (9); int(0.5 * 5) = 2 of the rest are kept: -4 and 3."""
    experts = replace(
        dense_experts([[9.0, 1.0, -4.0, 3.0, 2.0]], density=0.5), options=MethodOptions(breadcrumbs_outliers=0.2)
    )
    assert delta(sparse.breadcrumbs(experts).layer).tolist() == [[0.0, 0.0, -4.0, 3.0, 0.0]]


@pytest.mark.parametrize(("density", "outliers"), [(0.3, 0.1), (0.9, 0.3), (1.0, 0.2), (0.01, 0.05)])
def test_breadcrumbs_equals_the_paper_in_numpy(density, outliers):
    weights = [1.0, -0.5, 2.0]
    experts = replace(
        random_experts(3, weights=weights, density=density), options=MethodOptions(breadcrumbs_outliers=outliers)
    )
    expected = np.zeros((6, 8))
    for dense in scaled_deltas(experts):
        matrix = dense.numpy().astype(np.float64)
        falling = np.argsort(-np.abs(matrix).ravel())
        kept = max(1, int(density * matrix.size))
        start = min(int(outliers * matrix.size), matrix.size - kept)
        mask = np.zeros(matrix.size)
        mask[falling[start : start + kept]] = 1.0
        expected += matrix * mask.reshape(matrix.shape)
    np.testing.assert_allclose(delta(sparse.breadcrumbs(experts).layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(DROPPING))
def test_an_experts_draws_depend_on_seed_layer_and_its_own_hash_only(name):
    """Merged alone, with others, or in another place of the list, an expert loses the same entries."""
    experts = random_experts(3, weights=[0.0, 1.0, 0.0])
    alone = replace(experts, layers=experts.layers[1:2], weights=[1.0], hashes=experts.hashes[1:2])
    merged = delta(DROPPING[name](experts).layer)
    torch.testing.assert_close(merged, delta(DROPPING[name](alone).layer))
    for other in (replace(alone, seed=6), replace(alone, name="k"), replace(alone, hashes=["other"])):
        assert not torch.equal(delta(DROPPING[name](other).layer), merged)


def test_dare_is_the_sum_on_average():
    """Mean of 400 seeds at density 0.5: an entry's standard error is |entry| / 20."""
    experts = random_experts(2, density=0.5)
    mean = torch.stack([delta(sparse.dare(replace(experts, seed=seed)).layer) for seed in range(400)]).mean(0)
    wanted = sum(scaled_deltas(experts))
    spread = sum(change.square() for change in scaled_deltas(experts)).sqrt() / 20
    assert bool(((mean - wanted).abs() < 5 * spread + 1e-6).all())


def test_errors_name_what_is_missing():
    for name, method in (("TIES", sparse.ties), ("magnitude", sparse.magnitude), ("breadcrumbs", sparse.breadcrumbs)):
        with pytest.raises(SafetyDPOError, match=rf"{name} density in \(0, 1\], found 0.0"):
            method(dense_experts([[1.0]], density=0.0))
    bare = LayerExperts("q", [exact_factors(torch.ones(1, 1))], [1.0], density=0.5)
    for name, method in (("DARE", sparse.dare), ("DARE", sparse.dare_ties), ("DELLA", sparse.della)):
        with pytest.raises(SafetyDPOError, match=rf"{name} density in \(0, 1\], found 1.5"):
            method(replace(bare, density=1.5))
        with pytest.raises(SafetyDPOError, match="one hash per expert to draw for 'q', found 0 of 1"):
            method(bare)
