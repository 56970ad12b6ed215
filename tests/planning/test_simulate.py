from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.planning import simulate as module
from safetydpo.planning.schedule import LANE_DEATHS
from safetydpo.planning.simulate import Faults, Machines, Simulated, bound_seconds, simulate_lanes

DURATIONS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def test_the_bound_by_hand() -> None:
    """6 + 4 + 2 = 12 over 2 lanes is 6, as long as the longest; over 3 lanes 4, and the longest decides."""
    assert bound_seconds([6, 4, 2], 2) == 6
    assert bound_seconds([6, 4, 2], 3) == 6
    assert bound_seconds([3, 3, 3, 3], 2) == 6
    assert bound_seconds([], 2) == 0


def test_no_lane_has_no_bound() -> None:
    with pytest.raises(UsageError, match="expected room for at least one lane, found 0: simulate more nodes"):
        bound_seconds([1.0], 0)


def test_a_schedule_by_hand() -> None:
    """Two lanes start in 10 s. One takes 8 (10 to 18) and 3 (18 to 21), the other 5 (to 15), 4 (to 19) and 2 (to 21).

    Bound: 22 / 2 = 11. Work 22 over 2 x 21 lane seconds. The first lane looks at 8, 5, 4, 3: held or closed but the
    last; then at what is left in its list.
    """
    found = simulate_lanes([4, 8, 5, 2, 3], Machines(1, 2, lane_start_seconds=10))
    assert (found.makespan_seconds, found.bound_seconds, found.work_seconds) == (21, 11, 22)
    assert found.utilisation == pytest.approx(22 / 42)
    assert (found.closed, found.given_up, found.attempts, found.lanes_started) == (5, 0, 5, 2)
    assert found.over_bound == pytest.approx(21 / 11)


def test_looks_cost_a_lane_time() -> None:
    """One lane, two tasks of 5 s, 1 s a look: 1 + 5, again 1 + 5, then 2 to see that both are closed."""
    found = simulate_lanes([5, 5], Machines(1, 1, look_seconds=1.0))
    assert found.lane_looks == 4
    assert found.makespan_seconds == 1 + 5 + 1 + 5 + 2


class Scripted:
    """Chance as a test wants it."""

    def __init__(self, draws: list[float], losses: list[float]) -> None:
        self._draws, self._losses = draws, losses

    def random(self) -> float:
        return self._draws.pop(0) if self._draws else 0.99

    def expovariate(self, _hazard: float) -> float:
        return self._losses.pop(0) if self._losses else math.inf


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float], list[float]], None]:
    def use(draws: list[float], losses: list[float]) -> None:
        monkeypatch.setattr(module.random, "Random", lambda _seed: Scripted(draws, losses))

    return use


def test_a_lost_node_by_hand(script: Callable[..., None]) -> None:
    """One lane on one node, one task of 100 s with a checkpoint each 30 s. At 70 s the node goes: 60 s are kept.

    Seen 5 s later, at 75, from when on the launcher looks each 5 s; a node is there again at 70 + 20 = 90, and a lane
    works the last 40 on it: 130.
    """
    script([], [70.0])
    faults = Faults(0.5, checkpoint_seconds=30, detection_seconds=5, replacement_seconds=20)
    found = simulate_lanes([100.0], Machines(1, 1, lane_start_seconds=0.0), faults)
    assert (found.attempts, found.preemptions, found.lanes_started, found.closed) == (2, 1, 2, 1)
    assert found.makespan_seconds == 90 + 40
    assert found.work_seconds == 100


def test_a_failed_attempt_by_hand(script: Callable[..., None]) -> None:
    """A task of 10 s fails at half of it, begins anew in another lane, which starts at once, and takes 10 s: 15 s.

    Checkpoints each 6 s had kept nothing; each 2 s they would have kept 4 of the 5.
    """
    script([0.0, 0.5], [])
    found = simulate_lanes([10.0], Machines(1, 1), Faults(failure_rate=0.1, checkpoint_seconds=6))
    assert (found.makespan_seconds, found.attempts, found.lanes_started) == (15, 2, 2)
    script([0.0, 0.5], [])
    assert simulate_lanes([10.0], Machines(1, 1), Faults(failure_rate=0.1, checkpoint_seconds=2)).makespan_seconds == 11


def test_a_task_that_fails_each_time_is_given_up() -> None:
    found = simulate_lanes([10.0], Machines(1, 1), Faults(failure_rate=1.0), max_attempts=2)
    assert (found.closed, found.given_up, found.attempts, found.work_seconds) == (0, 1, 2, 0)


def test_lanes_that_only_die_end_the_simulation_as_they_end_a_command() -> None:
    with pytest.raises(SafetyDPOError, match="so many that end early .* lower failure_rate"):
        simulate_lanes([10.0] * 9, Machines(1, 1), Faults(failure_rate=1.0), max_attempts=LANE_DEATHS + 1)


@settings(deadline=None)
@given(DURATIONS, st.integers(1, 5), st.integers(1, 3))
def test_no_schedule_beats_its_bound_and_greedy_ones_are_close(durations: list[int], nodes: int, each: int) -> None:
    """Graham: a lane that never idles while there is work ends within (2 - 1 / lanes) x the bound."""
    found = simulate_lanes(durations, Machines(nodes, each))
    assert found.bound_seconds <= found.makespan_seconds + 1e-9
    assert found.makespan_seconds <= (2 - 1 / (nodes * each)) * found.bound_seconds + 1e-9
    assert (found.closed, found.attempts) == (len(durations), len(durations))
    assert 0 < found.utilisation <= 1


@settings(deadline=None, max_examples=50)
@given(DURATIONS, st.integers(0, 10_000))
def test_whatever_happens_every_task_ends_once_and_again_the_same(durations: list[int], seed: int) -> None:
    faults = Faults(0.9999, 0.1, checkpoint_seconds=7, detection_seconds=3, replacement_seconds=20)

    def go() -> Simulated:
        return simulate_lanes([60.0 * d for d in durations], Machines(2, 2), faults, max_attempts=50, seed=seed)

    try:
        found = go()
    except SafetyDPOError:
        return
    assert found.closed == len(durations)
    again = go()
    assert (again.makespan_seconds, again.attempts) == (found.makespan_seconds, found.attempts)


def test_twenty_equal_experts_a_lane_with_preemptions_stay_near_the_bound() -> None:
    """At 20 equal experts a lane, one more for one lane is already 21 / 20 = 1.05 x the bound; at 40 it is 1.025."""
    faults = Faults(0.05, checkpoint_seconds=30, detection_seconds=30, replacement_seconds=120)
    for each, limit in ((20, 1.06), (40, 1.05)):
        found = [simulate_lanes([600.0] * 50 * each, Machines(50, 1, 20.0), faults, seed=seed) for seed in range(5)]
        assert max(one.over_bound for one in found) <= limit
