from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging import methods
from safetydpo.merging.algebra import delta, exact_factors
from safetydpo.merging.methods import LayerExperts
from safetydpo.merging.registry import METHODS
from safetydpo.merging.votes import NeuronScores, score_neurons


def dense_experts(
    *matrices: list[list[float]], weights: list[float] | None = None, density: float = 1.0
) -> LayerExperts:
    layers = [exact_factors(torch.tensor(matrix)) for matrix in matrices]
    return LayerExperts("q", layers, weights or [1.0] * len(layers), density=density)


def random_experts(
    num: int, *, weights: list[float] | None = None, density: float = 0.4, seed: int = 0
) -> LayerExperts:
    generator = torch.Generator().manual_seed(seed)
    layers = [
        LoraLayer(torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)) for _ in range(num)
    ]
    inputs = torch.randn(10, 4, 8, generator=generator)
    scores = [score_neurons(layer, inputs) for layer in layers]
    moments = [random_moment(generator) for _ in range(num)]
    return LayerExperts(
        "q",
        layers,
        weights or [1.0] * num,
        density=density,
        scores=scores,
        seed=5,
        moments=moments,
        benign_moment=random_moment(generator),
    )


def random_moment(generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(20, 8, generator=generator)
    return values.T @ values


def test_sum_and_average_by_hand():
    """[1 2] + 3 [1 -1] = [4 -1]; the average halves it, because there are two experts."""
    experts = dense_experts([[1.0, 2.0]], [[1.0, -1.0]], weights=[1.0, 3.0])
    assert delta(methods.sum_deltas(experts).layer).tolist() == [[4.0, -1.0]]
    assert delta(methods.average(experts).layer).tolist() == [[2.0, -0.5]]


def test_ties_by_hand():
    """Density 0.5 keeps 2 of 4 entries: [5 -4 1 0] -> [5 -4 0 0], [-1 -2 6 0] -> [0 -2 6 0].

    Sums [5 -6 6 0] elect + - + +; means over the agreeing experts: 5, (-4 - 2) / 2 = -3, 6, 0.
    """
    experts = dense_experts([[5.0, -4.0, 1.0, 0.0]], [[-1.0, -2.0, 6.0, 0.0]], density=0.5)
    assert delta(methods.ties(experts).layer).tolist() == [[5.0, -3.0, 6.0, 0.0]]


def test_ties_drops_the_minority_sign():
    """1, 2 and -4: the sum -1 elects -, so the result is -4, not the mean."""
    experts = dense_experts([[1.0]], [[2.0]], [[-4.0]])
    assert delta(methods.ties(experts).layer).tolist() == [[-4.0]]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 2.0, 1.0, 1.5]])
def test_ties_equals_peft_on_dense_deltas(density, weights):
    experts = random_experts(4, weights=weights, density=density)
    scaled = [weight * delta(layer) for weight, layer in zip(weights, experts.layers, strict=True)]
    expected = merge_utils.ties(scaled, torch.ones(4), density=density, majority_sign_method="total")
    torch.testing.assert_close(delta(methods.ties(experts).layer), expected, rtol=1e-5, atol=1e-6)


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
    np.testing.assert_allclose(delta(methods.ties(experts).layer), expected, rtol=1e-5, atol=1e-6)


def test_trim_keeps_at_least_one_entry_and_all_equal_ones():
    assert methods.trim(torch.tensor([[1.0, -3.0, 2.0]]), 0.01).tolist() == [[0.0, -3.0, 0.0]]
    assert methods.trim(torch.tensor([[1.0, -1.0, 0.5]]), 0.34).tolist() == [[1.0, -1.0, 0.0]]


def neuron_case(weights: list[float]) -> LayerExperts:
    """Two experts of rank 1 with two output rows; scores of three inputs are given."""
    layers = [
        LoraLayer(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0]])),
        LoraLayer(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0], [4.0]])),
    ]
    scores = [
        NeuronScores(torch.tensor([[3.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0], [5.0, 5.0, 1.0]])),
        NeuronScores(torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[2.0, 2.0, 2.0], [4.0, 4.0, 9.0]])),
    ]
    return LayerExperts("q", layers, weights, scores=scores)


def test_co_merge_by_hand():
    """Row of A: votes 0 0 1 -> expert 0. Rows of B: 1 1 1 -> expert 1; 0 0 1 -> expert 0.

    A = [1 0], B = [3; 2], so the delta is [3 0; 2 0]; expert 0 supplies 2 rows, expert 1 one.
    """
    merged = methods.co_merge(neuron_case([1.0, 1.0]))
    assert merged.layer.down.tolist() == [[1.0, 0.0]]
    assert merged.layer.up.tolist() == [[3.0], [2.0]]
    assert merged.suppliers == (2, 1)


def test_co_merge_weights_multiply_scores_and_rows_of_b():
    """Weight 3 for expert 0: its B scores are 3 and 15, so it wins all rows; B = 3 [1; 2]."""
    merged = methods.co_merge(neuron_case([3.0, 1.0]))
    assert merged.layer.up.tolist() == [[3.0], [6.0]]
    assert merged.suppliers == (3, 0)


def test_co_merge_leaves_out_experts_of_weight_zero():
    merged = methods.co_merge(neuron_case([0.0, 1.0]))
    assert delta(merged.layer).tolist() == [[0.0, 3.0], [0.0, 4.0]]
    assert merged.suppliers == (0, 3)


def test_delta_neuron_by_hand():
    """Output row 0 is that of expert 1: 3 [0 1]; row 1 that of expert 0: 2 [1 0]; A and B are never mixed."""
    merged = methods.delta_neuron(neuron_case([1.0, 1.0]))
    assert delta(merged.layer).tolist() == [[0.0, 3.0], [2.0, 0.0]]
    assert merged.suppliers == (1, 1)
    assert delta(methods.delta_neuron(neuron_case([0.0, 1.0])).layer).tolist() == [[0.0, 3.0], [0.0, 4.0]]


def test_max_magnitude_by_hand():
    """Norms of A: 1 and 1 (tie, first wins); of B rows: 1 < 3 and 2 < 4, so B is expert 1's; weight 5 turns it."""
    assert delta(methods.max_magnitude(neuron_case([1.0, 1.0])).layer).tolist() == [[3.0, 0.0], [4.0, 0.0]]
    assert delta(methods.max_magnitude(neuron_case([5.0, 1.0])).layer).tolist() == [[5.0, 0.0], [10.0, 0.0]]


def test_random_winner_depends_on_seed_and_layer_only():
    experts = random_experts(5)
    first, again = (methods.random_winner(experts).layer for _ in range(2))
    assert torch.equal(first.up, again.up)
    other = LayerExperts("k", experts.layers, experts.weights, seed=5)
    assert not torch.equal(methods.random_winner(other).layer.up, first.up)


def test_random_winner_leaves_out_experts_of_weight_zero():
    merged = methods.random_winner(random_experts(3, weights=[1.0, 0.0, 1.0]))
    assert merged.suppliers is not None
    assert merged.suppliers[1] == 0


# RegMean shrinks by design: benign inputs pull every expert towards no change (its own tests are below).
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"regmean", "distill"}))
def test_one_expert_of_weight_one_comes_back(name):
    experts = random_experts(1, density=1.0)
    merged = METHODS[name].function(experts).layer
    torch.testing.assert_close(delta(merged), delta(experts.layers[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.takes_weights))
def test_a_weight_is_an_expert_with_a_scaled_delta(name):
    weights = [0.5, 2.0, 1.25]
    plain = random_experts(3, weights=weights)
    inputs = torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(9))
    layers = [LoraLayer(layer.down, layer.up * w) for layer, w in zip(plain.layers, weights, strict=True)]

    def build(parts: list[LoraLayer], factors: list[float]) -> LayerExperts:
        scores = [score_neurons(part, inputs) for part in parts]
        return replace(plain, layers=parts, weights=factors, scores=scores)

    one = METHODS[name].function(build(list(plain.layers), weights)).layer
    other = METHODS[name].function(build(layers, [1.0] * 3)).layer
    torch.testing.assert_close(delta(one), delta(other), rtol=1e-5, atol=1e-6)


def test_distill_takes_the_fitted_layer_or_says_that_there_is_none():
    experts = random_experts(2)
    assert methods.distill(replace(experts, distilled=experts.layers[1])).layer is experts.layers[1]
    with pytest.raises(SafetyDPOError, match="expected a distilled adapter of these experts for 'q', found none"):
        methods.distill(experts)


def test_regmean_by_hand(monkeypatch):
    """Without ridge. Expert 1 sees only h = e1 (G = diag(4, 0)), expert 2 only e2 (G = diag(0, 2)), benign inputs are
    e2 with G = diag(0, 6). Sum diag(4, 8). Row [1 5] of expert 1 -> [1 * 4 / 4, 0]; row [7 2] of expert 2 ->
    [0, 2 * 2 / 8]: together [1, 0.5]. Each expert loses what it does to inputs it never sees."""
    monkeypatch.setattr(methods, "RIDGE", 0.0)
    experts = replace(
        dense_experts([[1.0, 5.0]], [[7.0, 2.0]]),
        moments=[torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))],
        benign_moment=torch.diag(torch.tensor([0.0, 6.0])),
    )
    assert delta(methods.regmean(experts).layer).tolist() == [[1.0, 0.5]]


def test_regmean_solves_the_least_squares_problem():
    """numpy's lstsq on the stacked inputs: each expert's inputs with its own outputs, benign inputs with zeros, and a
    ridge written as extra rows."""
    generator = torch.Generator().manual_seed(2)
    experts = random_experts(3, weights=[0.5, 2.0, 1.25])
    inputs = [torch.randn(20, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    moments = [values.T @ values for values in inputs]
    ridge = methods.RIDGE * torch.stack(moments).sum(0).diagonal().mean()
    outputs = [
        values @ (weight * delta(layer).double()).T
        for values, weight, layer in zip(inputs[:3], experts.weights, experts.layers, strict=True)
    ]
    rows = torch.cat([*inputs, ridge.sqrt() * torch.eye(8, dtype=torch.float64)])
    wanted = torch.cat([*outputs, torch.zeros(28, 6, dtype=torch.float64)])
    solution = np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0].T
    found = methods.regmean(replace(experts, moments=moments[:3], benign_moment=moments[3])).layer
    assert found.down.shape[0] == 9
    torch.testing.assert_close(delta(found).double(), torch.from_numpy(solution), rtol=1e-4, atol=1e-5)


def test_regmean_does_less_to_benign_inputs_than_the_sum():
    experts = random_experts(3)
    benign = experts.benign_moment
    assert benign is not None

    def energy(layer: LoraLayer) -> float:
        return float((delta(layer) @ benign @ delta(layer).T).trace())

    assert energy(methods.regmean(experts).layer) < 0.5 * energy(methods.sum_deltas(experts).layer)


def test_errors_name_what_is_missing():
    with pytest.raises(SafetyDPOError, match=r"moments of the inputs of 1 experts and of benign .* 'q', found 0"):
        methods.regmean(dense_experts([[1.0]]))
    with pytest.raises(SafetyDPOError, match=r"TIES density in \(0, 1\], found 0.0"):
        methods.ties(dense_experts([[1.0]], density=0.0))
    bare = LayerExperts("q", random_experts(2).layers, [1.0, 1.0])
    for method in (methods.co_merge, methods.delta_neuron):
        with pytest.raises(SafetyDPOError, match="activation scores of 2 experts for 'q', found 0"):
            method(bare)
