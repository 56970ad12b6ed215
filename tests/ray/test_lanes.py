"""The parts of lanes that need no Ray; lanes at work are in `test_lanes_slow`."""

from __future__ import annotations

import pytest

from ray_jobs.lanes import _lanes_that_fit
from ray_jobs.progress import ProgressBoard


@pytest.mark.parametrize(
    ("has", "needs", "lanes"),
    [
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 0.0}, 8),
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, 2),
        ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 0.1}, 10),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ({}, {"CPU": 1.0, "GPU": 0.0}, 0),
        ({"CPU": 3.0}, {"CPU": 2.0, "GPU": 0.0}, 1),
    ],
)
def test_lanes_on_a_node(has: dict[str, float], needs: dict[str, float], lanes: int) -> None:
    """The scarcest resource decides: 1 GPU / 0.1 = 10 lanes although 8 CPUs / 0.5 = 16."""
    assert _lanes_that_fit({"Resources": has}, needs) == lanes


def test_an_expert_that_is_begun_again_is_not_counted_twice() -> None:
    """30 steps, lost; gone on with from step 20 and done at 40: 40 steps, not 50; other counters add to it."""
    board = ProgressBoard()
    board.add("steps", 5)
    for done in (10, 30, 21, 40):
        board.put("steps", "hate", done)
    board.put("steps", "violence", 2)
    board.put("other", "hate", 7)
    assert board.count("steps") == 5 + 40 + 2
    board.reset("steps")
    assert board.count("steps") == 0
