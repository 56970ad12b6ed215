from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ray_jobs.lanes
import safetydpo.planning.simulate
from safetydpo.artifacts.attempts import Standing
from safetydpo.planning.schedule import (
    LANE_DEATHS,
    LANE_LOSSES,
    Accidents,
    OpenTasks,
    WaitingTasks,
    choose_node,
    count_lanes_to_start,
    longest_first,
)

FREE, HELD, CLOSED, FAILED = Standing.FREE, Standing.HELD, Standing.CLOSED, Standing.FAILED
RULES = ("WaitingTasks", "OpenTasks", "Accidents", "choose_node", "count_lanes_to_start", "longest_first")


@pytest.mark.parametrize("name", RULES)
def test_real_and_simulated_lanes_follow_the_same_rule(name: str) -> None:
    """One object, and both call it: a rule that only one of them changed would make the simulation a story."""
    users = (ray_jobs.lanes, safetydpo.planning.simulate)
    assert getattr(users[0], name) is getattr(users[1], name)
    assert all(f"{name}(" in inspect.getsource(user) for user in users)


def test_the_longest_comes_first_and_equal_ones_by_name() -> None:
    assert longest_first([5, 9, 5, 9], ["d", "c", "b", "a"]) == [3, 1, 2, 0]


@given(st.lists(st.integers(0, 5), max_size=20))
def test_every_task_is_listed_once_in_falling_length(lengths: list[int]) -> None:
    order = longest_first(lengths, [str(index) for index in range(len(lengths))])
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)


def test_a_lane_takes_the_first_free_task_and_asks_for_held_ones_last() -> None:
    """Of 0 (closed), 1 (held), 2 (lost to another lane between look and lease), 3 (free): 3; then 1, which is free now.

    After the first take the order is 1, 2, 3.
    """
    standing, asked = {0: CLOSED, 1: HELD, 2: FREE, 3: FREE}, []

    def lease(index: int) -> tuple[Standing, str | None]:
        asked.append(index)
        return standing[index], f"lease of {index}" if standing[index] is FREE and index != 2 else None

    waiting = WaitingTasks([0, 1, 2, 3])
    assert waiting.take(lease) == (3, "lease of 3")
    assert asked == [0, 1, 2, 3]
    standing |= {1: FREE, 3: CLOSED}
    assert waiting.take(lease) == (1, "lease of 1")
    assert asked[4:] == [1]
    standing |= {1: FAILED, 2: HELD}
    assert waiting.take(lease) is None
    standing[2] = CLOSED
    assert waiting.take(lease) is None
    assert waiting.take(lease) is None
    assert asked[5:] == [2, 3, 1, 2], "what is settled is asked for once"


def test_the_launcher_sees_free_tasks_and_forgets_settled_ones() -> None:
    standing = {0: CLOSED, 1: FREE, 2: HELD, 3: FAILED, 4: FREE}
    tasks = OpenTasks(range(5))
    assert list(tasks.free(standing.__getitem__, taken={4})) == [1]
    assert (tasks.indices(), len(tasks)) == ([1, 2, 4], 3)
    assert list(tasks.free(standing.__getitem__)) == [1, 4]


@pytest.mark.parametrize(
    ("wanted", "ages", "free", "isolated", "started"),
    [
        (4, [100.0], 10, False, 3),
        (4, [100.0], 2, False, 2),
        (4, [10.0, 59.0], 3, False, 1),
        (4, [10.0, 61.0], 1, False, 0),
        (4, [10.0, 59.0], 3, True, 2),
        (1, [100.0, 100.0], 5, False, 0),
    ],
)
def test_lanes_to_start_by_hand(wanted: int, ages: list[float], free: int, isolated: bool, started: int) -> None:
    """Third case: 2 are missing, 3 are free, of which the 2 young lanes will take 2, so 1."""
    assert count_lanes_to_start(wanted, ages, num_free=free, is_isolated=isolated) == started


def test_the_roomiest_node_is_chosen() -> None:
    """Room for 2, 4, 4 with 0, 1, 3 lanes on them leaves 2, 3, 1."""
    room, running = {"a": 2, "b": 4, "head": 4}, ["b", "head", "head", "head"]
    assert choose_node(room, running, own="head", leaving=()) == "b"
    assert choose_node(room, running, own="head", leaving={"b"}) == "a"
    assert choose_node({"head": 1, "a": 1}, [], own="head", leaving=()) == "a", "rather not the head's"
    assert choose_node(room, ["a", "a", *"bbbb", *["head"] * 4], own="head", leaving=()) is None
    assert choose_node({}, [], own="head", leaving=()) is None


def test_deaths_add_up_until_a_task_is_settled() -> None:
    """Two lanes: 3 x 2 deaths in a row are too many; a task settled after the fifth makes the sixth the first again."""
    accidents = Accidents(num_lanes=2, num_open=9)
    limit = LANE_DEATHS * 2
    assert not any(accidents.is_one_too_many(is_lost=False, num_open=9) for _ in range(limit - 1))
    assert not any(accidents.is_one_too_many(is_lost=False, num_open=8) for _ in range(limit - 1))
    assert accidents.is_one_too_many(is_lost=False, num_open=8)


def test_a_lane_lost_with_its_node_is_no_death() -> None:
    accidents = Accidents(num_lanes=1, num_open=3)
    assert not any(accidents.is_one_too_many(is_lost=True, num_open=3) for _ in range(LANE_LOSSES - 1))
    assert accidents.is_one_too_many(is_lost=True, num_open=3)
