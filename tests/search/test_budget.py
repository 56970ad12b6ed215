from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.search.budget import Budget, Span, price_per_second, spend_of, typical_seconds, why_not_start
from safetydpo.search.progress import progress_of

SPANS = (Span(0.0, 10.0), Span(5.0, 10.0), Span(30.0, 5.0))
"""Busy from 0 to 15 and from 30 to 35: 20 s; 25 worker seconds."""


def test_spend_by_hand():
    """2 CPUs at 0.9 and 1 GPU at 1.8 an hour are 3.6 / 3600 = 0.001 a second; 25 worker seconds cost 0.025."""
    price = price_per_second(cpus=2, gpus=1, per_cpu_hour=0.9, per_gpu_hour=1.8)
    assert price == pytest.approx(0.001)
    found = spend_of(SPANS, price_per_second=price)
    assert (found.busy_seconds, found.worker_seconds, found.cost) == (20.0, 25.0, pytest.approx(0.025))
    assert spend_of([], price_per_second=1.0).busy_seconds == 0.0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=12))
def test_busy_seconds_equal_brute_force(spans):
    """Whole seconds that at least one span covers."""
    covered = {second for start, length in spans for second in range(start, start + length)}
    found = spend_of([Span(float(start), float(length)) for start, length in spans], price_per_second=2.0)
    assert found.busy_seconds == len(covered)
    assert found.cost == 2.0 * sum(length for _, length in spans)


def refused(budget: Budget, *, running_since=(), now: float = 100.0, typical: float = 5.0) -> str | None:
    return why_not_start(SPANS, running_since=running_since, now=now, budget=budget, typical_seconds=typical)


def test_a_measurement_starts_only_if_it_fits():
    """20 s are spent, one of 5 s makes 25; beside one that runs since 98 until 103 it ends at 105: 27 s."""
    assert refused(Budget(seconds=25.0)) is None
    assert refused(Budget(seconds=24.9)) == "time budget of 24.9 s"
    assert refused(Budget(seconds=25.0), running_since=[98.0]) == "time budget of 25 s"
    assert refused(Budget(seconds=27.0), running_since=[98.0]) is None
    # 25 + 5 worker seconds; with a running one 35.
    assert refused(Budget(cost=30.0, price_per_second=1.0)) is None
    assert refused(Budget(cost=30.0, price_per_second=1.0), running_since=[98.0]) == "cost budget of 30"
    # One that runs longer than is typical counts for what it has taken: 25 + 20 + 5.
    assert refused(Budget(cost=50.0, price_per_second=1.0), running_since=[80.0]) is None
    assert refused(Budget(cost=49.0, price_per_second=1.0), running_since=[80.0]) == "cost budget of 49"
    assert refused(Budget()) is None


def test_the_first_of_its_kind_starts_while_anything_is_left():
    assert refused(Budget(seconds=20.1), typical=0.0) is None
    assert refused(Budget(seconds=20.0), typical=0.0) == "time budget of 20 s"


def test_typical_seconds_are_the_median():
    assert typical_seconds([9.0, 1.0, 2.0]) == 2.0
    assert typical_seconds([]) == 0.0


def test_progress_by_hand():
    """5 trials took 20 s, 4 a trial: 3 more take 12."""
    found = progress_of(ended=5, trials=8, spans=SPANS, price_per_second=0.0)
    assert (found.seconds_left, found.spend.busy_seconds) == (12.0, 20.0)
    assert progress_of(ended=0, trials=8, spans=SPANS, price_per_second=0.0).seconds_left is None
