from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.attacks.swaps import best_words, draw_trials, project_to_words, swap_scores


def test_scores_by_hand() -> None:
    """Gradient (1, -2) at embedding (1, 1): current part 1 - 2 = -1.

    Word (3, 0): 3 - (-1) = 4. Word (0, 2): -4 + 1 = -3. Word (1, 1): -1 + 1 = 0, no change.
    """
    scores = swap_scores(
        torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    )
    assert scores.tolist() == [[4.0, -3.0, 0.0]]
    assert best_words(scores, count=2).tolist() == [[1, 2]]
    assert best_words(scores, count=9).tolist() == [[1, 2, 0]]


def test_scores_are_exact_where_the_loss_is_linear() -> None:
    """L(e) = sum(w * e): putting word v at place i changes it by exactly the score."""
    generator = torch.Generator().manual_seed(0)
    weight, current, table = (torch.randn(size, 4, generator=generator, dtype=torch.double) for size in (3, 3, 5))
    scores = swap_scores(weight, current, table)
    for place in range(3):
        for word in range(5):
            changed = current.clone()
            changed[place] = table[word]
            assert scores[place, word].item() == pytest.approx(((changed - current) * weight).sum().item())


def test_projection_by_hand() -> None:
    """(0.9, 0.2) is 0.05 (squared) from (1, 0) and 1.45 from (0, 1); (0.5, 0.5) is as near to both: the first."""
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert project_to_words(torch.tensor([[0.9, 0.2], [0.1, 0.7], [0.5, 0.5]]), table).tolist() == [0, 1, 0]


@given(st.integers(0, 2**31))
def test_projection_agrees_with_numpy_and_keeps_words(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, table = torch.randn(4, 3, generator=generator), torch.randn(6, 3, generator=generator)
    distances = ((points.double().numpy()[:, None] - table.double().numpy()[None]) ** 2).sum(axis=2)
    assert project_to_words(points, table).tolist() == np.argmin(distances, axis=1).tolist()
    assert project_to_words(table, table).tolist() == list(range(6))


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_trials_change_one_place_each_and_none_twice(seed: int, count: int) -> None:
    current, best = torch.tensor([9, 9, 9]), torch.arange(6).reshape(3, 2)
    trials = draw_trials(current, best, count=count, generator=torch.Generator().manual_seed(seed))
    assert len(trials) == min(count, 6)
    assert ((trials != current).sum(dim=1) == 1).all()
    assert len({tuple(trial) for trial in trials.tolist()}) == len(trials)
    for trial in trials.tolist():
        (place,) = (i for i in range(3) if trial[i] != 9)
        assert trial[place] in best[place].tolist()


def test_equal_generators_draw_equal_trials() -> None:
    draws = [
        draw_trials(torch.zeros(4, dtype=torch.long), torch.arange(1, 13).reshape(4, 3), count=5,
                    generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*draws)
