from __future__ import annotations

import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.algebra import delta
from safetydpo.merging.method import LayerExperts
from safetydpo.merging.methods import selection
from safetydpo.merging.votes import NeuronScores
from tests.merging.layer_cases import random_experts

READINGS = (selection.co_merge, selection.element, selection.delta_neuron, selection.component)


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
    merged = selection.co_merge(neuron_case([1.0, 1.0]))
    assert merged.layer.down.tolist() == [[1.0, 0.0]]
    assert merged.layer.up.tolist() == [[3.0], [2.0]]
    assert merged.suppliers == (2, 1)


def test_co_merge_weights_multiply_scores_and_rows_of_b():
    """Weight 3 for expert 0: its B scores are 3 and 15, so it wins all rows; B = 3 [1; 2]."""
    merged = selection.co_merge(neuron_case([3.0, 1.0]))
    assert merged.layer.up.tolist() == [[3.0], [6.0]]
    assert merged.suppliers == (3, 0)


def test_co_merge_leaves_out_experts_of_weight_zero():
    merged = selection.co_merge(neuron_case([0.0, 1.0]))
    assert delta(merged.layer).tolist() == [[0.0, 3.0], [0.0, 4.0]]
    assert merged.suppliers == (0, 3)


def test_delta_neuron_by_hand():
    """Output row 0 is that of expert 1: 3 [0 1]; row 1 that of expert 0: 2 [1 0]; A and B are never mixed."""
    merged = selection.delta_neuron(neuron_case([1.0, 1.0]))
    assert delta(merged.layer).tolist() == [[0.0, 3.0], [2.0, 0.0]]
    assert merged.suppliers == (1, 1)
    assert delta(selection.delta_neuron(neuron_case([0.0, 1.0])).layer).tolist() == [[0.0, 3.0], [0.0, 4.0]]


def test_max_magnitude_by_hand():
    """Norms of A: 1 and 1 (tie, first wins); of B rows: 1 < 3 and 2 < 4, so B is expert 1's; weight 5 turns it."""
    assert delta(selection.max_magnitude(neuron_case([1.0, 1.0])).layer).tolist() == [[3.0, 0.0], [4.0, 0.0]]
    assert delta(selection.max_magnitude(neuron_case([5.0, 1.0])).layer).tolist() == [[5.0, 0.0], [10.0, 0.0]]


def test_random_winner_depends_on_seed_and_layer_only():
    experts = random_experts(5)
    first, again = (selection.random_winner(experts).layer for _ in range(2))
    assert torch.equal(first.up, again.up)
    other = LayerExperts("k", experts.layers, experts.weights, seed=5)
    assert not torch.equal(selection.random_winner(other).layer.up, first.up)


def test_random_winner_leaves_out_experts_of_weight_zero():
    merged = selection.random_winner(random_experts(3, weights=[1.0, 0.0, 1.0]))
    assert merged.suppliers is not None
    assert merged.suppliers[1] == 0


def test_element_by_hand():
    """A: |1| > |0| and |0| < |1|, so A = [1 1]. B, one column, times the hidden sizes 3 3 0 and 1 1 9:
    row 0: 3 3 0 against 3 3 27 -> 0, 0 (ties go to the first), 1 -> expert 0; row 1: 6 6 0 against 4 4 36 -> expert 0.
    """
    merged = selection.element(neuron_case([1.0, 1.0]))
    assert merged.layer.down.tolist() == [[1.0, 1.0]]
    assert merged.layer.up.tolist() == [[1.0], [2.0]]
    assert merged.suppliers == (3, 1)


def test_element_weights_multiply_scores_and_elements_of_b():
    """Weight 2 for expert 1: row 0: 3 3 0 against 6 6 54 -> B = 6; row 1: 6 6 0 against 8 8 72 -> 8."""
    merged = selection.element(neuron_case([1.0, 2.0]))
    assert merged.layer.down.tolist() == [[1.0, 1.0]]
    assert merged.layer.up.tolist() == [[6.0], [8.0]]
    assert selection.element(neuron_case([1.0, 0.0])).suppliers == (4, 0)


def test_component_by_hand():
    """One component. |B| = sqrt(5) = 2.24 and 5; times 3 3 0 and 1 1 9: 6.7 6.7 0 against 5 5 45 -> expert 0 whole."""
    merged = selection.component(neuron_case([1.0, 1.0]))
    assert delta(merged.layer).tolist() == [[1.0, 0.0], [2.0, 0.0]]
    assert merged.suppliers == (1, 0)
    assert delta(selection.component(neuron_case([1.0, -2.0])).layer).tolist() == [[0.0, -6.0], [0.0, -8.0]]


def test_components_of_different_ranks_are_contested_by_those_that_have_them():
    """Component 0 goes to the stronger expert 1 of rank 1; component 1 exists in expert 0 only and stays."""
    layers = [
        LoraLayer(torch.eye(2), torch.tensor([[1.0, 5.0]])),
        LoraLayer(torch.tensor([[0.0, 1.0]]), torch.tensor([[9.0]])),
    ]
    scores = [NeuronScores(torch.ones(2, 1), torch.ones(1, 1)), NeuronScores(torch.ones(1, 1), torch.ones(1, 1))]
    merged = selection.component(LayerExperts("q", layers, [1.0, 1.0], scores=scores))
    assert delta(merged.layer).tolist() == [[0.0, 14.0]]
    assert merged.suppliers == (1, 1)


@pytest.mark.parametrize("method", READINGS)
def test_every_reading_takes_whole_units_of_experts_that_take_part(method):
    merged = method(random_experts(4, weights=[1.0, 0.0, -0.5, 2.0]))
    assert merged.suppliers is not None
    assert merged.suppliers[1] == 0
    units = {"co_merge": 3 + 6, "element": 3 * 8 + 6 * 3, "delta_neuron": 6, "component": 3}
    assert sum(merged.suppliers) == units[method.__name__]


@pytest.mark.parametrize("method", READINGS)
def test_readings_without_scores_are_refused(method):
    bare = LayerExperts("q", random_experts(2).layers, [1.0, 1.0])
    with pytest.raises(SafetyDPOError, match="activation scores of 2 experts for 'q', found 0"):
        method(bare)
