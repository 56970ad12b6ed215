from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.rungs import FewStepsRung
from safetydpo.search.ladder import (
    RankCorrelation,
    count_promoted,
    count_promoted_at_once,
    is_trusted,
    promote,
    rank_correlation,
)


def test_rank_correlation_by_hand():
    """Ranks 1 2 3 4 against 1 2 4 3: rho = 1 - 6 * (0 + 0 + 1 + 1) / (4 * 15) = 0.8; tau = (5 - 1) / 6."""
    found = rank_correlation([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 4.0, 3.0])
    assert found.spearman == pytest.approx(0.8)
    assert found.kendall == pytest.approx(4 / 6)
    assert found.n == 4


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=20))
def test_rank_correlation_is_pearson_of_mean_ranks(pairs):
    one, other = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found = rank_correlation(one, other)

    def ranks(values):
        return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]

    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found == RankCorrelation(None, None, len(pairs))
    else:
        assert found.spearman == pytest.approx(np.corrcoef(ranks(one), ranks(other))[0, 1], abs=1e-9)


def test_nothing_is_correlated_with_too_few_or_equal_values():
    assert rank_correlation([1.0], [2.0]) == RankCorrelation(None, None, 1)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == RankCorrelation(None, None, 2)
    with pytest.raises(ValueError, match="one value of each measurement per candidate, found 1 and 0"):
        rank_correlation([1.0], [])


def test_promotion_by_hand():
    """Half of 5, rounded up, are 3: trials 7, 3 and, of the two at 0.4, the earlier one; trial 4 goes on anyway."""
    values = {3: 0.2, 4: 0.9, 5: 0.4, 6: 0.4, 7: 0.1}
    assert promote(values, keep=0.5) == [3, 5, 7]
    assert promote(values, keep=0.5, always=range(5)) == [3, 4, 5, 7]
    assert promote(values, keep=0.01) == [7]
    assert promote(dict.fromkeys(range(30), 0.0), keep=0.1) == [0, 1, 2]
    assert promote({}, keep=0.5) == []


@given(st.dictionaries(st.integers(0, 50), st.floats(-5, 5), min_size=1), st.floats(0.01, 1))
def test_nobody_that_stays_behind_is_better(values, keep):
    going_on = promote(values, keep=keep)
    assert 1 <= len(going_on) <= len(values)
    left = [values[trial] for trial in values if trial not in going_on]
    assert max(values[trial] for trial in going_on) <= min(left, default=np.inf)


def test_a_rung_is_trusted_until_enough_says_otherwise():
    assert is_trusted(RankCorrelation(0.1, 0.1, 20), least=-1.0)
    assert is_trusted(RankCorrelation(0.1, 0.1, 4), least=0.5)
    assert not is_trusted(RankCorrelation(0.1, 0.1, 5), least=0.5)
    assert not is_trusted(RankCorrelation(None, None, 9), least=0.5)
    assert is_trusted(RankCorrelation(0.6, 0.4, 9), least=0.5)


def test_how_many_come_to_each_rung_by_hand() -> None:
    """Generations of 4, 4 and 2: half go on, 2, 2 and 1; then a third, one each."""
    rungs = [FewStepsRung(keep=0.5), FewStepsRung(keep=0.34)]
    assert count_promoted(10, generation=4, rungs=rungs) == [10, 5, 3]
    assert count_promoted(10, generation=4, rungs=[]) == [10]
    # The first three trials go on anyway; at most 2 + 3 of the first generation, which has 4.
    assert count_promoted(10, generation=4, rungs=[FewStepsRung(keep=0.5, calibrate=3)]) == [10, 4 + 2 + 1]


@given(
    trials=st.integers(1, 40),
    generation=st.integers(1, 12),
    keeps=st.lists(st.floats(0.05, 1.0), max_size=3),
    calibrate=st.integers(0, 6),
    data=st.data(),
)
def test_how_many_come_to_each_rung_against_promotions(
    trials: int, generation: int, keeps: list[float], calibrate: int, data: st.DataObject
) -> None:
    """Never fewer than are promoted, and without `calibrate` just as many."""
    rungs = [FewStepsRung(keep=keep, calibrate=calibrate) for keep in keeps]
    found = [0] * (len(rungs) + 1)
    for first in range(0, trials, generation):
        members = list(range(first, min(first + generation, trials)))
        for level, rung in enumerate(rungs):
            found[level] += len(members)
            values = {trial: data.draw(st.integers(0, 5)) for trial in members}
            members = promote(values, keep=rung.keep, always=range(rung.calibrate))
        found[-1] += len(members)
    planned = count_promoted(trials, generation=generation, rungs=rungs)
    assert all(there <= most for there, most in zip(found, planned, strict=True))
    if calibrate == 0:
        assert found == planned


def test_how_many_come_to_each_rung_one_after_another_by_hand() -> None:
    """keep 0.5: chances 1, 1/2, 2/3, 2/4 = 2.67; of as many at the next 1, 1/2 and two thirds of 2/3 = 1.94."""
    rung = FewStepsRung(keep=0.5)
    assert count_promoted_at_once(4, rungs=[rung]) == pytest.approx([4, 8 / 3])
    assert count_promoted_at_once(4, rungs=[rung, rung]) == pytest.approx([4, 8 / 3, 1.5 + 4 / 9])
    assert count_promoted_at_once(4, rungs=[FewStepsRung(keep=0.5, calibrate=2)]) == pytest.approx([4, 2 + 7 / 6])
    assert count_promoted_at_once(4, rungs=[]) == [4]


def test_how_many_come_to_each_rung_one_after_another_as_drawn() -> None:
    """The mean over 2,000 random orders of 16 candidates, each measured against all before it: within 0.15."""
    generator, rungs = np.random.default_rng(0), [FewStepsRung(keep=0.25), FewStepsRung(keep=0.5)]
    total = np.zeros(3)
    for _ in range(2000):
        arrivals = list(range(16))
        total[0] += 16
        for level, rung in enumerate(rungs):
            values, going_on = generator.permutation(len(arrivals)), []
            for place in range(len(arrivals)):
                seen = {trial: float(value) for trial, value in enumerate(values[: place + 1])}
                going_on += [place] if place in promote(seen, keep=rung.keep) else []
            arrivals = going_on
            total[level + 1] += len(arrivals)
    assert count_promoted_at_once(16, rungs=rungs) == pytest.approx(total / 2000, abs=0.15)
