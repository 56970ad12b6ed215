"""After which steps the workers of a lane look up; with a clock that the tests turn."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ray_jobs import looks
from ray_jobs.looks import LOOK_SECONDS, MOST_STEPS, Looks
from tests.ray.turned_clock import TurnedClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    made = TurnedClock(1000.0)
    monkeypatch.setattr(looks, "time", made)
    return made


def looked_after(clock: TurnedClock, seconds: list[float], *, is_alone: bool) -> list[int]:
    """The steps, from 1, after which a worker looked, if each took so long."""
    made, found = Looks(is_alone=is_alone), []
    for step, each in enumerate(seconds, start=1):
        clock.now += each
        if made.is_due():
            found.append(step)
            made.begin(made.next_steps())
    return found


@pytest.mark.parametrize(
    ("seconds", "after"),
    [
        (0.01, [1, 11, 21]),
        (0.5, [1, 7, 13, 19]),
        (1.2, [1, 3, 5, 7]),
        (3.1, [1, 2, 3, 4]),
        (60.0, [1, 2, 3, 4]),
    ],
)
def test_looks_are_three_seconds_apart_and_at_most_ten_steps(
    clock: TurnedClock, seconds: float, after: list[int]
) -> None:
    """3 s / 0.5 s = 6 steps, 3 / 1.2 = 2, of SDXL's 3.1 s each step; of short ones every tenth."""
    assert looked_after(clock, [seconds] * 25, is_alone=False)[: len(after)] == after


def test_a_look_after_what_took_long_comes_sooner_and_then_as_before(clock: TurnedClock) -> None:
    """The mean of ten steps of which one took 20 s with its validation is above 2 s: the next looks are at once."""
    seconds = [0.01] * 30
    seconds[14] = 20.0
    assert looked_after(clock, seconds, is_alone=False) == [1, 11, 21, 22]


def test_steps_that_become_slow_are_noticed_by_the_clock_of_a_single_worker(clock: TurnedClock) -> None:
    """Of several workers all wait for the tenth step, once."""
    seconds = [0.01] * 11 + [4.0] * 15
    assert looked_after(clock, seconds, is_alone=True)[1:5] == [11, 12, 13, 14]
    assert looked_after(clock, seconds, is_alone=False)[1:5] == [11, 21, 22, 23]


@pytest.mark.parametrize("seconds", [0.001, 0.3, 2.0, 2.9, 5.0])
def test_no_look_is_further_away_than_the_time_between_looks_and_a_step(clock: TurnedClock, seconds: float) -> None:
    found = looked_after(clock, [seconds] * 50, is_alone=True)
    assert all((later - earlier) * seconds <= LOOK_SECONDS + seconds for earlier, later in pairwise(found))
    assert all(later - earlier <= MOST_STEPS for earlier, later in pairwise(found))
