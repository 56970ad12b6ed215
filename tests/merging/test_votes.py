from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.errors import SafetyDPOError
from safetydpo.merging.votes import score_neurons, vote


def test_scores_by_hand():
    """One input of two tokens h1 = (1, 0), h2 = (0, 2); A = [1 -1], B = [2; -3].

    A h = 1, -2: mean |.| = 1.5. B A h = (2, -3), (-4, 6): mean |.| = 3 and 4.5.
    """
    layer = LoraLayer(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [-3.0]]))
    scores = score_neurons(layer, torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
    assert scores.down.tolist() == [[1.5]]
    assert scores.up.tolist() == [[3.0], [4.5]]


def test_scores_equal_numpy_and_take_float16_inputs():
    generator = torch.Generator().manual_seed(0)
    layer = LoraLayer(torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator))
    inputs = torch.randn(4, 7, 6, generator=generator).half()
    scores = score_neurons(layer, inputs)
    a, b, h = layer.down.double().numpy(), layer.up.double().numpy(), inputs.double().numpy()
    np.testing.assert_allclose(scores.down, np.abs(np.einsum("rd,ntd->rnt", a, h)).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(scores.up, np.abs(np.einsum("or,rd,ntd->ont", b, a, h)).mean(-1), rtol=1e-5)


def test_votes_by_hand():
    """Unit 0: inputs choose experts 0, 1, 1 -> 1 wins although expert 0 has the largest single score.

    Unit 1: one input chooses 0, one 1, one is a tie that goes to 0 -> 0 wins.
    """
    scores = torch.tensor([[[9.0, 1.0, 1.0], [2.0, 1.0, 1.0]], [[1.0, 2.0, 2.0], [1.0, 2.0, 1.0]]])
    assert vote(scores).tolist() == [1, 0]


def test_ties_of_votes_go_to_the_first_expert():
    scores = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]], [[0.0, 0.0]]])
    assert vote(scores).tolist() == [0]


def test_votes_of_every_subset_equal_brute_force():
    scores = torch.rand(4, 5, 9, generator=torch.Generator().manual_seed(3)).mul(4).round()
    for size in range(1, 5):
        for subset in combinations(range(4), size):
            found = vote(scores[list(subset)]).tolist()
            for unit in range(5):
                ballots = [max(subset, key=lambda e: (scores[e, unit, i].item(), -e)) for i in range(9)]
                assert subset[found[unit]] == max(subset, key=lambda e: (ballots.count(e), -e))


def test_weights_multiply_the_scores_before_the_vote():
    """Unit 0: 3 and 2 against 2 x 1 and 2 x 2: the first input stays, the second turns; the tie goes to the first.

    Unit 1: 1 and 1 against 2 x 1 and 2 x 1: both turn.
    """
    scores = [torch.tensor([[3.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [1.0, 1.0]])]
    assert vote(scores, torch.tensor([1.0, 2.0])).tolist() == [0, 1]


def test_weighted_votes_equal_those_of_an_argmax_for_any_number_of_experts():
    """300 experts are more than a byte counts."""
    generator = torch.Generator().manual_seed(5)
    for num in (1, 7, 256, 300):
        scores = torch.rand(num, 6, 11, generator=generator).mul(50).round()
        weights = torch.rand(num, generator=generator)
        ballots = (scores * weights[:, None, None]).numpy().argmax(axis=0)
        expected = [np.bincount(row, minlength=num).argmax() for row in ballots]
        assert vote(list(scores), weights).tolist() == expected


def test_errors_name_the_shapes():
    layer = LoraLayer(torch.ones(1, 3), torch.ones(2, 1))
    with pytest.raises(SafetyDPOError, match=r"layer inputs \[input, token, 3\], found \[1, 2, 4\]"):
        score_neurons(layer, torch.ones(1, 2, 4))
    with pytest.raises(SafetyDPOError, match=r"found \[0, 2, 3\]"):
        score_neurons(layer, torch.ones(0, 2, 3))
    with pytest.raises(SafetyDPOError, match=r"at least one expert and input, found \[0, 2, 3\]"):
        vote(torch.ones(0, 2, 3))
    with pytest.raises(SafetyDPOError, match=r"at least one expert and input, found \[2, 3, 0\]"):
        vote(torch.ones(2, 3, 0))
