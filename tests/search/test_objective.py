from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.search.objective import FAILED_OBJECTIVE, Objective, best_index, constrained_objective

BASE = {"neutral_rate": 0.8, "neighbour_retention": 1.0}
RATE = st.floats(0, 1)


def judge(ip: float, neutral: float, neighbour: float, *, mush: float = 0.0, weight: float = 1.0) -> Objective:
    metrics = {"ip_select": ip, "unrecognisable_rate": mush, "neutral_rate": neutral, "neighbour_retention": neighbour}
    return constrained_objective(
        metrics, base=BASE, neutral_floor=0.9, neighbour_floor=0.8, unrecognisable_weight=weight
    )


def test_by_hand():
    """Neutral 0.64 / 0.8 = 0.8 misses 0.9 by 0.1; neighbours 0.75 miss 0.8 by 0.05: 0.2 + 2 * 0.15 = 0.5."""
    found = judge(0.2, 0.64, 0.75)
    assert found.value == pytest.approx(0.5)
    assert found.violation == pytest.approx(0.15)
    assert not found.feasible
    assert judge(0.2, 0.72, 0.8) == Objective(0.2, feasible=True, violation=0.0)


def test_mush_costs_its_weight():
    """0.1 + 0.5 * 0.4 = 0.3: a merge that draws nothing (0 + 0.5 * 0.8) is worse than one of IP 0.35."""
    assert judge(0.1, 0.8, 1.0, mush=0.4, weight=0.5).value == pytest.approx(0.3)
    assert judge(0.0, 0.8, 1.0, mush=0.8, weight=0.5).value > judge(0.35, 0.8, 1.0, weight=0.5).value


@given(RATE, RATE, RATE, RATE, RATE)
def test_feasible_beats_infeasible_of_equal_ip_and_failure_is_worst(ip, neutral, neighbour, other, another):
    one, two = judge(ip, neutral, neighbour), judge(ip, other, another)
    assert math.isfinite(one.value)
    assert one.value < FAILED_OBJECTIVE
    if one.feasible:
        assert one.value == ip
        assert two.feasible or two.value >= one.value


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ip_select", "unrecognisable_rate", "neutral_rate", "neighbour_retention"])
def test_missing_or_broken_metrics_give_a_finite_sentinel(name, broken):
    metrics = {"ip_select": 0.1, "unrecognisable_rate": 0.0, "neutral_rate": 0.8, "neighbour_retention": 1.0}
    for bad in ({**metrics, name: broken}, {key: value for key, value in metrics.items() if key != name}):
        found = constrained_objective(bad, base=BASE, neutral_floor=0.9, neighbour_floor=0.8)
        assert found == Objective(FAILED_OBJECTIVE, feasible=False, violation=2.0, valid=False)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_base_without_quality_is_refused(value):
    with pytest.raises(SafetyDPOError, match="expected a neutral_rate of the base above 0, found"):
        constrained_objective({}, base={**BASE, "neutral_rate": value}, neutral_floor=0.9, neighbour_floor=0.8)


def test_best_is_feasible_or_else_the_nearest():
    feasible, low_ip, near = judge(0.5, 0.8, 1.0), judge(0.0, 0.4, 1.0), judge(0.9, 0.7, 1.0)
    broken = Objective(FAILED_OBJECTIVE, feasible=False, violation=2.0, valid=False)
    assert best_index([low_ip, feasible, near, feasible]) == 1
    assert best_index([broken, low_ip, near]) == 2
    assert best_index([broken]) is None
    assert best_index([]) is None
