from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import UsageError
from safetydpo.planning.choose_workers import (
    SimulationSettings,
    best_choice,
    expert_durations,
    head_bytes,
    simulate_choices,
)
from safetydpo.planning.costs import LaneCosts, SpeedUp
from safetydpo.planning.simulate import Faults

FREE = LaneCosts(start_seconds=0, expert_seconds=0, look_seconds=0)
TABLE = [
    SpeedUp(workers=1, times=1, source="measured"),
    SpeedUp(workers=2, times=1.6, source="assumed"),
    SpeedUp(workers=4, times=2.0, source="assumed"),
]


def choose(durations: list[float], settings: SimulationSettings, lanes: LaneCosts = FREE) -> list[tuple[int, float]]:
    choices = simulate_choices(
        durations, settings, speed_ups=TABLE, lanes=lanes, faults=Faults(), max_attempts=3, seed=0
    )
    return [(one.speed_up.workers, one.makespan_seconds) for one in (*choices, best_choice(choices))]


def test_a_choice_by_hand() -> None:
    """Five experts of 80 s on one node of 4 GPUs.

    One worker: 4 lanes, two rounds, 160 s. Two: 50 s each, 2 lanes, three rounds, 150 s. Four: 40 s, 1 lane, 200 s.
    """
    settings = SimulationSettings(nodes=1, gpus_per_node=4, repeats=1)
    assert choose([80.0] * 5, settings) == [(1, 160), (2, 150), (4, 200), (2, 150)]


def test_shares_by_hand() -> None:
    """Two workers of above: 5 x 50 s on 2 lanes in 150 s: 250 / 300 of the GPUs; one worker's 400 s of 4 x 150."""
    settings = SimulationSettings(nodes=1, gpus_per_node=4, repeats=2, workers=2)
    (only,) = simulate_choices(
        [80.0] * 5, settings, speed_ups=TABLE, lanes=FREE, faults=Faults(), max_attempts=3, seed=0
    )
    assert (only.lanes, only.bound_seconds, only.worst_over_bound) == (2, 125, 150 / 125)
    assert only.utilisation == pytest.approx(250 / 300)
    assert only.efficiency == pytest.approx(400 / 600)


def test_gpus_that_no_lane_fits_on_count_as_unused() -> None:
    """Two workers on a node of three: one lane, 2 of 3 GPUs at work all the time."""
    settings = SimulationSettings(nodes=1, gpus_per_node=3, repeats=1, workers=2)
    (only,) = simulate_choices([80.0], settings, speed_ups=TABLE, lanes=FREE, faults=Faults(), max_attempts=3, seed=0)
    assert only.utilisation == pytest.approx(2 / 3)


def test_a_number_of_workers_without_a_speed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected workers of the speed-up table \(1, 2, 4\).*found workers=3"):
        choose([1.0], SimulationSettings(nodes=1, workers=3))


def test_the_head_holds_so_much_a_lane() -> None:
    """800 lanes of 5 MiB, and 150 of their keeper."""
    assert head_bytes(800, LaneCosts(head_mb=5, keeper_mb=150)) == 4150 * 2**20


def test_durations_by_hand() -> None:
    """10 and 15 steps of 2 s."""
    assert expert_durations([10, 15], step_seconds=2, spread=0, seed=0) == [20, 30]


@given(st.lists(st.integers(1, 100), min_size=1), st.floats(0, 0.9), st.integers(0, 100))
def test_durations_stay_within_their_spread(steps: list[int], spread: float, seed: int) -> None:
    found = expert_durations(steps, step_seconds=3, spread=spread, seed=seed)
    assert found == expert_durations(steps, step_seconds=3, spread=spread, seed=seed)
    for count, seconds in zip(steps, found, strict=True):
        assert 3 * count * (1 - spread) - 1e-6 <= seconds <= 3 * count * (1 + spread) + 1e-6
