from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.select import KEPT, Selection, Verdict, check_enough_pairs, select_pair

RULES = {"unsafe_score_min": 0.6, "safe_score_max": 0.4, "unrecognisable_max": 0.5}
rates = st.floats(0, 1)
verdicts = st.builds(Verdict, rates, rates)


@pytest.mark.parametrize(
    ("unsafe", "safe", "reason"),
    [
        (Verdict(0.9, 0.0), Verdict(0.1, 0.0), KEPT),
        (Verdict(0.6, 0.5), Verdict(0.4, 0.5), KEPT),  # limits belong to the good side
        (Verdict(0.59, 0.0), Verdict(0.1, 0.0), "unsafe picture is not unsafe"),
        (Verdict(0.9, 0.0), Verdict(0.41, 0.0), "safe picture is not safe"),
        (Verdict(0.9, 0.51), Verdict(0.1, 0.0), "unsafe picture is unrecognisable"),
        (Verdict(0.9, 0.0), Verdict(0.1, 0.51), "safe picture is unrecognisable"),
        (Verdict(0.9, 0.9), Verdict(0.1, 0.9), "unsafe picture is unrecognisable"),
        (Verdict(0.0, 0.9), Verdict(0.9, 0.0), "unsafe picture is unrecognisable"),
        (Verdict(0.0, 0.0), Verdict(0.9, 0.0), "unsafe picture is not unsafe"),
        (None, Verdict(0.1, 0.0), "a picture is missing"),
        (Verdict(0.9, 0.0), None, "a picture is missing"),
        (None, None, "a picture is missing"),
    ],
)
def test_by_hand(unsafe: Verdict | None, safe: Verdict | None, reason: str):
    assert select_pair(unsafe, safe, **RULES) == Selection(reason == KEPT, reason)


@pytest.mark.parametrize("place", range(4))
def test_a_score_that_is_no_number_never_counts_as_good(place: int):
    """NaN is neither above nor below any limit, so a plain comparison would let it pass."""
    scores = [0.9, 0.0, 0.1, 0.0]
    scores[place] = math.nan
    assert select_pair(Verdict(*scores[:2]), Verdict(*scores[2:]), **RULES) == Selection(
        False, "a score is not a number"
    )


@given(verdicts, verdicts)
def test_kept_means_every_rule_holds(unsafe: Verdict, safe: Verdict):
    kept = select_pair(unsafe, safe, **RULES).kept
    assert kept == (
        unsafe.unsafe_score >= 0.6
        and safe.unsafe_score <= 0.4
        and unsafe.unrecognisable_score <= 0.5
        and safe.unrecognisable_score <= 0.5
    )


@given(verdicts, verdicts, rates, rates)
def test_stricter_rules_keep_no_more(unsafe: Verdict, safe: Verdict, low: float, high: float):
    low, high = sorted((low, high))
    strict = {"unsafe_score_min": high, "safe_score_max": low, "unrecognisable_max": low}
    loose = {"unsafe_score_min": low, "safe_score_max": high, "unrecognisable_max": high}
    assert select_pair(unsafe, safe, **loose).kept >= select_pair(unsafe, safe, **strict).kept


def test_a_pair_of_two_categories_counts_in_both():
    """hate: 1 + 1 = 2, violence: 1 + 1 + 1 = 3; shocking was not asked for."""
    kept = [("hate", "violence"), ("violence",), ("hate",), ("violence", "shocking")]
    assert check_enough_pairs(kept, categories=["violence", "hate"], minimum=2) == {"violence": 3, "hate": 2}


def test_each_category_with_too_few_pairs_is_named():
    with pytest.raises(
        SafetyDPOError,
        match=r"expected at least 2 kept pairs per category \(identity\.pairs\.min_kept_per_category\), "
        r"found hate: 1, sexual: 0; raise identity\.prompts\.pairs_per_category "
        r"or leave the category out of identity\.prompts\.categories$",
    ):
        check_enough_pairs(
            [("hate",), ("violence",)] * 1 + [("violence",)], categories=["hate", "violence", "sexual"], minimum=2
        )
