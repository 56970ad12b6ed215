"""Two rows side by side: pairs, who has no partner, who judged, and summaries alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.compare import check_judges, compare_pairs, compare_summaries, pair_pictures
from safetydpo.evaluation.differences import PairCounts, independent_difference, paired_rate_difference
from safetydpo.evaluation.picture_outcomes import JudgeIdentity, PictureOutcome
from tests.evaluation.summaries import rate, ratio, row

JUDGE = JudgeIdentity("audit", "demo-audit", "1", "ab" * 32)


def picture(number: int, hit: bool, *, score: float | None = None, **changes: Any) -> PictureOutcome:
    plain = PictureOutcome(f"p{number}", 0, "unsafe", f"c{number % 3}", False, {"ip": hit}, score)
    return replace(plain, **changes)


def test_by_hand():
    """Ten pairs: 3 both, 4 first only, 1 second only, 2 neither: 0.7 - 0.4 = 0.3; p = 2 (1 + 5) / 32."""
    first = [picture(n, hit) for n, hit in enumerate([1, 1, 1, 1, 1, 1, 1, 0, 0, 0])]
    second = [picture(n, hit) for n, hit in enumerate([1, 1, 1, 0, 0, 0, 0, 1, 0, 0])]
    (found,) = compare_pairs(pair_pictures(first, second[::-1]))
    assert (found.metric, found.value_a, found.value_b, found.n_a, found.n_b) == ("ip", 0.7, 0.4, 10, 10)
    assert found.value == pytest.approx(0.3)
    assert (found.only_a, found.only_b, found.p_value) == (4, 1, pytest.approx(12 / 32))
    expected = paired_rate_difference(PairCounts(3, 4, 1, 2))
    assert (found.low, found.high) == (expected.low, expected.high)
    assert found.cluster_low is not None
    assert found.cluster_low <= 0.3 <= float(found.cluster_high or 0)


def test_every_rate_and_the_score_are_compared_over_the_pairs_that_have_them():
    first = [picture(n, True, score=30.0 + n, hits={"ip": True, "neutral_rate": True}) for n in range(6)]
    second = [picture(n, True, score=29.0 + n, hits={"ip": n > 3}) for n in range(6)]
    found = {item.metric: item for item in compare_pairs(pair_pictures(first, second))}
    assert set(found) == {"ip", "clip_score"}
    score = found["clip_score"]
    assert (score.value, score.low, score.high, score.p_value) == (pytest.approx(1.0), 1.0, 1.0, None)


def test_one_concept_has_no_interval_over_concepts():
    first = [picture(n, True, concept="one", score=1.0) for n in range(4)]
    (found,) = compare_pairs(pair_pictures(first, first))
    assert (found.metric, found.value, found.cluster_low) == ("ip", 0.0, None)
    assert found.low < 0 < found.high


def test_pictures_without_a_partner_are_refused_unless_told():
    first, second = [picture(n, True) for n in range(5)], [picture(n, True) for n in range(1, 4)]
    with pytest.raises(
        SafetyDPOError,
        match=r"found 3 pairs, 2 of 5 pictures of the first row and 0 of 3 of the second without one \(first: prompt "
        r"p0 of set unsafe, seed 0\): compare runs of the same prompts and seeds, or only .* --allow-partial",
    ):
        pair_pictures(first, second)
    pairing = pair_pictures(first, second, allow_partial=True)
    assert (len(pairing.pairs), pairing.alone_a, pairing.alone_b) == (3, 2, 0)
    with pytest.raises(SafetyDPOError, match="found 0 pairs, .* or their summaries with --unpaired"):
        pair_pictures(first, [replace(one, seed=1) for one in first], allow_partial=True)


def test_other_judges_are_refused_by_name():
    check_judges([JUDGE], [JUDGE])
    with pytest.raises(
        SafetyDPOError,
        match=r"expected the same judges in both runs, found audit demo-audit 1 \(abababababab\) in the first only and "
        r"audit demo-audit 2 \(abababababab\) in the second only: evaluate one of them again, or take .* --any-judges",
    ):
        check_judges([JUDGE], [replace(JUDGE, version="2")])
    with pytest.raises(SafetyDPOError, match="and no other in the second only"):
        check_judges([JUDGE, replace(JUDGE, role="select")], [JUDGE])


def test_summaries_alone_are_compared_as_unrelated_pictures():
    first = row("searched", {"ip": rate(56, 70, cluster=(0.7, 0.9)), "clip_retention": ratio(0.9, 0.87, 0.94)})
    second = row(
        "searched",
        {
            "ip": rate(48, 80, cluster=(0.5, 0.7)),
            "clip_retention": ratio(0.8, 0.77, 0.84),
            "ip_minus_base": {**ratio(0.1, 0.0, 0.2), "unit": "difference"},
        },
    )
    found = {item.metric: item for item in compare_summaries(first, second)}  # type: ignore[arg-type]
    assert set(found) == {"ip", "clip_retention"}
    expected = independent_difference(56, 70, 48, 80)
    assert (found["ip"].low, found["ip"].high) == (expected.low, expected.high)
    assert (found["ip"].n_a, found["ip"].n_b, found["ip"].p_value) == (70, 80, None)
    assert found["ip"].cluster_low == pytest.approx(0.2 - (0.1**2 + 0.1**2) ** 0.5)
    # 0.03 down and 0.04 up are 0.05.
    assert found["clip_retention"].low == pytest.approx(0.1 - 0.05)
