"""Candidates, the order of concepts, retention, shortlist, and the curve of harm against retention."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.merge_curve import (
    CurvePoint,
    Tuning,
    choose,
    frontier,
    harm_at,
    list_tunings,
    order_concepts,
    price_of,
    retention_of,
    share,
    shortlist,
)

GRID = {"scales": (0.5, 1.0, 1.5, 2.0, 3.0), "densities": (0.1, 0.3, 0.6), "scale_factors": (0.45, 0.7, 1.0)}
CONCEPTS = {"hate": ["a", "b", "c"], "sexual": ["d", "e", "f"], "violence": ["g", "h"]}


def tally(ip: int, mush: int, neutral: int, neighbour: int) -> dict[str, tuple[int, int]]:
    """Ten pictures of each kind."""
    return {"ip": (ip, 10), "unrecognisable": (mush, 10), "neutral": (neutral, 10), "neighbour": (neighbour, 10)}


BASE = tally(10, 0, 10, 10)


@pytest.mark.parametrize("count", [1, 5, 7, 10, 20, 35])
@pytest.mark.parametrize("uses_density", [True, False])
def test_every_method_has_eighteen_candidates_no_two_alike(count: int, uses_density: bool) -> None:
    tunings = list_tunings(count, uses_density=uses_density, **GRID)
    assert len(tunings) == len(set(tunings)) == 18
    assert {tuning.scale for tuning in tunings if tuning.density == 0.3} == (
        {0.5, 1.0, 1.5, 2.0, 3.0, 0.25 if count == 1 else float(count)} if uses_density else set()
    )


def test_candidates_worked_by_hand() -> None:
    assert list_tunings(4, uses_density=True, scales=(1.0,), densities=(0.1, 0.5), scale_factors=(1.0, 2.0)) == [
        Tuning(1.0, 0.1),
        Tuning(4.0, 0.1),
        Tuning(1.0, 0.5),
        Tuning(4.0, 0.5),
    ]
    assert list_tunings(1, uses_density=False, scales=(1.0,), densities=(0.1, 0.5), scale_factors=(0.5, 1.0)) == [
        Tuning(0.5),
        Tuning(1.0),
        Tuning(0.25),
        Tuning(0.5),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_concepts_are_spread_over_categories_and_lie_within_one_another(seed: int) -> None:
    """Categories take turns: any first E concepts differ in number per category by one at most, while they last."""
    order = order_concepts(CONCEPTS, seed=seed)
    assert sorted(order) == list("abcdefgh")
    owner = {concept: category for category, members in CONCEPTS.items() for concept in members}
    for count in range(1, 7):
        numbers = Counter(owner[concept] for concept in order[:count])
        assert max(numbers.values()) - min(numbers.get(name, 0) for name in CONCEPTS) <= 1
    shuffled = {name: members[::-1] for name, members in reversed(CONCEPTS.items())}
    assert order_concepts(shuffled, seed=seed) == order


def test_another_seed_is_another_order() -> None:
    assert len({tuple(order_concepts(CONCEPTS, seed=seed)) for seed in range(6)}) > 1


def test_retention_is_the_share_of_both_kinds_over_the_bases() -> None:
    """17 of 20 are kept of a base that draws 18 of 20."""
    assert retention_of(tally(0, 0, 9, 8), tally(10, 0, 10, 8)) == pytest.approx(17 / 18)
    assert price_of(tally(2, 3, 0, 0)) == pytest.approx(0.5)
    with pytest.raises(SafetyDPOError, match="expected a base that draws some neutral or neighbour prompt"):
        retention_of(BASE, tally(10, 0, 0, 0))
    with pytest.raises(SafetyDPOError, match="expected pictures behind ip, found none"):
        share({}, "ip")


def test_the_shortlist_pays_for_missing_retention() -> None:
    """Costs: 0.2; 0.0 + 2 x (0.9 - 0.75) = 0.3; 0.25 as mush; 1.0 for doing nothing; 0.2 again, but later."""
    tallies = [tally(2, 0, 10, 10), tally(0, 0, 8, 7), tally(0, 3, 10, 9), BASE, tally(1, 1, 9, 9)]
    assert shortlist(tallies, BASE, retention=0.9, count=4) == [0, 4, 1, 2]


def test_the_choice_keeps_the_retention_if_any_does() -> None:
    assert choose([tally(0, 0, 8, 9), tally(3, 1, 9, 9), tally(2, 1, 10, 8)], BASE, retention=0.9) == 2
    assert choose([tally(0, 0, 8, 8), tally(9, 0, 9, 8), tally(5, 0, 9, 8)], BASE, retention=0.9) == 2
    # 0.72 / 0.8 is a hair below 0.9.
    assert choose([tally(0, 0, 4, 5), tally(9, 0, 5, 5)], tally(10, 0, 5, 5), retention=0.9) == 0
    with pytest.raises(SafetyDPOError, match="expected at least one validated candidate"):
        choose([], BASE, retention=0.9)


def test_the_curve_worked_by_hand() -> None:
    """(0.9, 0.5) is beaten by (0.95, 0.4); from (1, 1) by (0.95, 0.4) to (0.85, 0.1) the hull has all three corners.

    At 0.9 it is halfway between 0.4 and 0.1; (0.8, 0.09) gains so little that it is one more corner.
    """
    points = [CurvePoint(1.0, 1.0), CurvePoint(0.85, 0.1), CurvePoint(0.9, 0.5), CurvePoint(0.95, 0.4)]
    assert frontier(points) == [points[0], points[3], points[1]]
    assert harm_at(points, 0.9) == pytest.approx(0.25)
    assert harm_at(points, 0.95) == pytest.approx(0.4)
    assert harm_at(points, 0.975) == pytest.approx(0.7)
    assert harm_at(points, 0.5) == pytest.approx(0.1)
    assert harm_at(points[1:3], 0.95) is None
    assert harm_at([], 0.9) is None
    assert frontier([*points, CurvePoint(0.8, 0.09)])[-1] == CurvePoint(0.8, 0.09)


def test_a_point_above_the_line_between_two_others_is_no_corner() -> None:
    """(0.9, 0.8) is beaten by none, and a mixture of its neighbours has 0.5 there."""
    points = [CurvePoint(1.0, 1.0), CurvePoint(0.9, 0.8), CurvePoint(0.8, 0.0)]
    assert frontier(points) == [points[0], points[2]]
    assert harm_at(points, 0.9) == pytest.approx(0.5)


POINTS = st.lists(
    st.builds(CurvePoint, st.integers(0, 110).map(lambda n: n / 100), st.integers(0, 100).map(lambda n: n / 100)),
    min_size=1,
    max_size=9,
)
BASE_POINT = CurvePoint(1.2, 1.0)


@given(POINTS, st.floats(0, 1.2))
def test_the_curve_is_the_best_mixture_of_two(points: list[CurvePoint], retention: float) -> None:
    """Independently: the least harm over all mixtures of all pairs that keep at least this much."""
    everything = [BASE_POINT, *points]
    expected = min(
        mixed
        for one in everything
        for other in everything
        if one.retention >= retention
        for mixed in [_mixture(one, other, retention)]
    )
    assert harm_at(everything, retention) == pytest.approx(expected, abs=1e-7)


def _mixture(one: CurvePoint, other: CurvePoint, retention: float) -> float:
    if other.retention >= retention:
        return min(one.harm, other.harm)
    part = (one.retention - retention) / (one.retention - other.retention)
    return min(one.harm, one.harm + part * (other.harm - one.harm))


@given(POINTS, st.floats(0, 1.2))
def test_more_harm_at_every_point_is_more_harm_on_the_curve(points: list[CurvePoint], retention: float) -> None:
    worse = [CurvePoint(point.retention, min(1.0, 1.3 * point.harm)) for point in points]
    found = [harm_at([BASE_POINT, *members], retention) for members in (points, worse)]
    assert found[0] <= found[1] + 1e-9
