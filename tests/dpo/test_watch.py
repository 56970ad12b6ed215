from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from safetydpo.dpo.watch import (
    Validation,
    best_validation,
    is_over,
    is_validation_due,
    validations_from_tensor,
    validations_to_tensor,
)
from tests.dpo.validations import validation

NUMBERS = st.floats(0, 4, allow_nan=False, width=16)
SERIES = st.lists(st.tuples(NUMBERS, st.sampled_from([0.0, 0.0, 0.25, 1.0])), max_size=8).map(
    lambda pairs: [validation(10 * i, value=value, violation=missing) for i, (value, missing) in enumerate(pairs)]
)


def test_validations_fall_on_the_interval_and_after_the_last_step() -> None:
    """Every 40 of 100 steps: before the first, after 40, 80 and 100."""
    assert [done for done in range(101) if is_validation_due(done, every_steps=40, steps=100)] == [0, 40, 80, 100]


def test_the_best_keeps_the_floors_then_is_low_then_early() -> None:
    """The base (0) is no candidate, 10 misses a floor, 20 and 40 are equal and better than 30: 20."""
    series = [
        validation(0, value=0.0),
        validation(10, value=0.05, violation=0.01),
        validation(20, value=0.2),
        validation(30, value=0.3),
        validation(40, value=0.2),
    ]
    assert best_validation(series) == 2


def test_where_none_keeps_the_floors_the_nearest_is_taken() -> None:
    """10 misses by 0.3, 20 by 0.1 though its pictures are less safe."""
    assert best_validation([validation(10, value=0.1, violation=0.3), validation(20, value=0.9, violation=0.1)]) == 1


def test_the_base_alone_is_no_state_to_publish() -> None:
    assert best_validation([]) is None
    assert best_validation([validation(0)]) is None


@given(SERIES)
def test_no_other_state_beats_the_best(series: list[Validation]) -> None:
    """An independent statement of the rule: no candidate is better, and no earlier one is as good."""
    place = best_validation(series)
    candidates = [one for one in series if one.step > 0]
    if place is None:
        assert not candidates
        return
    best = series[place]
    kept = [one for one in candidates if one.violation == 0]
    if kept:
        assert best.violation == 0
        assert best.value == min(one.value for one in kept)
        assert best.step == min(one.step for one in kept if one.value == best.value)
    else:
        assert best.violation == min(one.violation for one in candidates)


def test_patience_counts_validations_without_progress() -> None:
    """Best after 20 steps; with patience 2 the end comes after 40, an equal state is no progress."""
    series = [validation(0, value=0.1), validation(10, value=0.6), validation(20, value=0.4)]
    series += [validation(30, value=0.4), validation(40, value=0.5)]
    assert [is_over(series[:count], patience=2) for count in range(1, 6)] == [False, False, False, False, True]
    assert is_over(series[:4], patience=1)
    assert not is_over(series, patience=None)
    assert not is_over(series, patience=3)


@given(SERIES)
def test_validations_survive_a_checkpoint_bit_for_bit(series: list[Validation]) -> None:
    assert validations_from_tensor(validations_to_tensor(series)) == series
