from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.picture_rates import ANY, PictureVerdict, by_category, picture_rates


def said(picture: str, judge: str, unsafe: bool = False, **more: str) -> PictureVerdict:
    return PictureVerdict(picture, judge, unsafe, **more)


def test_rates_by_hand():
    """Of 4 pictures, `p` calls one unsafe and fails on another, `q` calls a third; the fourth is corrupt for both.

    p: 1 + 1 failed + 1 corrupt = 3 of 4; q: 1 + 1 corrupt = 2 of 4; any: all 4.
    """
    verdicts = [
        said("1", "p", True),
        said("2", "p", judge_failure="no answer"),
        said("3", "p"),
        said("4", "p", picture_failure="corrupt: 0 bytes"),
        said("1", "q"),
        said("2", "q"),
        said("3", "q", True),
        said("4", "q", picture_failure="corrupt: 0 bytes"),
    ]
    rows = picture_rates(verdicts)
    assert [(row.judge, row.unsafe, row.rate.n, row.picture_failures, row.judge_failures) for row in rows] == [
        ("p", 3, 4, 1, 1),
        ("q", 2, 4, 1, 0),
        (ANY, 4, 4, 1, 1),
    ]
    assert [row.rate.value for row in rows] == [0.75, 0.5, 1.0]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from(["", "x"])), min_size=1, max_size=40))
def test_any_is_the_union_with_scipys_exact_interval(pictures: list[tuple[bool, bool, str]]):
    verdicts = [said(str(i), "p", first, judge_failure=failed) for i, (first, _, failed) in enumerate(pictures)]
    verdicts += [said(str(i), "q", second) for i, (_, second, _) in enumerate(pictures)]
    first, second, union = picture_rates(verdicts)
    hits = sum(one or two or bool(failed) for one, two, failed in pictures)
    assert union.unsafe == hits
    assert max(first.unsafe, second.unsafe) <= union.unsafe <= first.unsafe + second.unsafe
    exact = binomtest(hits, len(pictures)).proportion_ci(0.95, "exact")
    assert (union.rate.low, union.rate.high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_one_judge_has_no_union_and_categories_come_in_order():
    verdicts = [said("1", "p", category="b"), said("2", "p", True, category="a"), said("3", "p")]
    assert [row.judge for row in picture_rates(verdicts)] == ["p"]
    groups = by_category(verdicts)
    assert list(groups) == ["", "a", "b"]
    assert picture_rates(groups["a"])[0].rate.value == 1.0


def test_denominators_cannot_shrink_without_a_word():
    with pytest.raises(SafetyDPOError, match="expected verdicts on pictures, found none"):
        picture_rates([])
    with pytest.raises(SafetyDPOError, match="expected one verdict of judge 'p' on each picture, found two on '1'"):
        picture_rates([said("1", "p"), said("1", "p")])
    with pytest.raises(SafetyDPOError, match="expected the same pictures of judges 'p' and 'q', found 2 and 1"):
        picture_rates([said("1", "p"), said("2", "p"), said("1", "q")])
