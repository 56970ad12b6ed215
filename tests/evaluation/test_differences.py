"""Differences of rates: published examples, counts by hand, exact coverage, and another way to the same number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from safetydpo.evaluation.differences import (
    PairCounts,
    combine,
    independent_difference,
    mcnemar_p_value,
    paired_rate_difference,
    wilson,
)
from safetydpo.statistics import Interval

COUNTS = st.builds(PairCounts, st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(1, 30))


def test_the_published_example_of_independent_rates():
    """Newcombe 1998, table II: 56/70 - 48/80 has 0.0524 to 0.3339 by method 10."""
    found = independent_difference(56, 70, 48, 80)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_mcnemar_by_hand():
    """1 against 7 of 8 discordant pairs: 2 (1 + 8) / 256 = 0.0703."""
    assert mcnemar_p_value(PairCounts(50, 1, 7, 40)) == pytest.approx(18 / 256)
    assert mcnemar_p_value(PairCounts(50, 4, 4, 40)) == 1.0
    assert mcnemar_p_value(PairCounts(50, 0, 0, 40)) == 1.0


@given(COUNTS)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(counts: PairCounts):
    discordant = counts.only_first + counts.only_second
    expected = stats.binomtest(counts.only_first, discordant, 0.5).pvalue if discordant else 1.0
    assert mcnemar_p_value(counts) == pytest.approx(min(1.0, expected))


def test_pairs_by_hand():
    """40 both, 10 first only, 2 second only, 48 neither.

    phi: 40 x 48 - 10 x 2 = 1900, less n/2 = 50 is 1850; margins 50 x 50 x 42 x 58 = 6,090,000; 1850 / 2467.8 = 0.7497.
    """
    counts = PairCounts(40, 10, 2, 48)
    first, second = wilson(50, 100), wilson(42, 100)
    phi = 1850 / math.sqrt(6_090_000)
    down, up = first.value - first.low, second.high - second.value
    found = paired_rate_difference(counts)
    assert found.value == pytest.approx(0.08)
    assert found.low == pytest.approx(0.08 - math.sqrt(down**2 - 2 * phi * down * up + up**2))
    # Twelve discordant pairs of a hundred: far narrower than unrelated pictures.
    unrelated = independent_difference(50, 100, 42, 100)
    assert found.high - found.low < 0.6 * (unrelated.high - unrelated.low)
    assert found.low > 0 > unrelated.low


@given(COUNTS)
def test_sides_exchanged_change_the_sign_and_the_interval_holds_the_value(counts: PairCounts):
    there = paired_rate_difference(counts)
    back = paired_rate_difference(PairCounts(counts.both, counts.only_second, counts.only_first, counts.neither))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert -1 - 1e-9 <= there.low <= there.value <= there.high <= 1 + 1e-9
    assert there.high > there.low


def test_intervals_of_pairs_hold_the_truth_about_as_often_as_they_say():
    """2,000 experiments of 100 pairs with 0.3 / 0.15 / 0.05 / 0.5: the true difference is 0.1."""
    draws = np.random.default_rng(0).multinomial(100, [0.3, 0.15, 0.05, 0.5], size=2000)
    held = [(found := paired_rate_difference(PairCounts(*map(int, draw)))).low <= 0.1 <= found.high for draw in draws]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@given(st.integers(1, 200), st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject):
    """Each end is a rate p at which the score test is at its limit: |hits/n - p| = 1.96 sqrt(p (1 - p) / n)."""
    hits = data.draw(st.integers(0, n))
    found = wilson(hits, n)
    for end in (found.low, found.high):
        assert abs(hits / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)


def test_square_and_add_by_hand():
    """Ends 3 below and 4 above: 5 either way."""
    found = combine(Interval(10.0, 7.0, 14.0, 9), Interval(1.0, -2.0, 5.0, 5))
    assert (found.value, found.low, found.high, found.n) == (9.0, 4.0, 14.0, 5)
    assert combine(Interval(1.0, 0.0, 2.0, 9), Interval(1.0, 0.0, 2.0, 9), correlation=1.0).low == 0.0


def test_what_is_no_count_is_refused():
    with pytest.raises(ValueError, match="expected counts of at least 0 and at least 1 pair"):
        PairCounts(0, 0, 0, 0)
    with pytest.raises(ValueError, match="expected counts of at least 0 and at least 1 pair"):
        PairCounts(1, -1, 0, 0)
    with pytest.raises(ValueError, match="expected at least 1 picture, found n = 0: leave the rate out"):
        wilson(0, 0)
