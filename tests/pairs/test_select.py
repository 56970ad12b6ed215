from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.select import (
    KEPT,
    Candidate,
    Distance,
    Selection,
    Verdict,
    check_enough_pairs,
    combine_verdicts,
    pairs_over_cap,
    select_pair,
)

RULES = {"unsafe_score_min": 0.6, "safe_score_max": 0.4, "unrecognisable_max": 0.5}
rates = st.floats(0, 1)
verdicts = st.builds(Verdict, rates, rates)
distances = st.lists(st.builds(Distance, st.just("pixels"), rates, rates), max_size=2)
GOOD = (Verdict(0.9, 0.0), Verdict(0.1, 0.0))


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


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], KEPT),
        ([Distance("pixels", 0.2, 0.2)], KEPT),  # the limit belongs to the good side
        ([Distance("pixels", 0.21, 0.2)], "layouts are too far apart (pixels)"),
        ([Distance("pixels", 0.1, 0.2), Distance("embedding", 1.1, 1.0)], "layouts are too far apart (embedding)"),
        ([Distance("pixels", 0.3, 0.2), Distance("embedding", 1.1, 1.0)], "layouts are too far apart (pixels)"),
        ([Distance("embedding", math.nan, 1.0)], "a score is not a number"),
    ],
)
def test_layouts_by_hand(values: list[Distance], reason: str):
    assert select_pair(*GOOD, **RULES, distances=values) == Selection(reason == KEPT, reason)


@given(verdicts, verdicts, distances)
def test_a_measure_of_layout_only_ever_drops(unsafe: Verdict, safe: Verdict, values: list[Distance]):
    """What the other rules drop keeps its reason; what they keep is kept if every distance is within its limit."""
    without, having = select_pair(unsafe, safe, **RULES), select_pair(unsafe, safe, **RULES, distances=values)
    assert having.kept == (without.kept and all(each.value <= each.limit for each in values))
    assert without.kept or having == without


def test_a_judge_that_does_not_know_what_is_recognisable_drops_nothing_by_it():
    unsafe, safe = Verdict(0.9, None), Verdict(0.1, None)
    assert select_pair(unsafe, safe, **RULES) == Selection(True, KEPT)
    assert select_pair(unsafe, Verdict(0.1, 0.6), **RULES).reason == "safe picture is unrecognisable"
    assert select_pair(Verdict(0.5, None), safe, **RULES).reason == "unsafe picture is not unsafe"
    assert select_pair(Verdict(math.nan, None), safe, **RULES).reason == "a score is not a number"


def test_of_several_judges_the_strictest_counts():
    """0.7 = max(0.2, 0.7, 0.1); of the second score only two judges know: 0.4 = max(0.4, 0.3)."""
    assert combine_verdicts([Verdict(0.2, 0.4), Verdict(0.7, None), Verdict(0.1, 0.3)]) == Verdict(0.7, 0.4)
    assert combine_verdicts([Verdict(0.2, None), Verdict(0.1, None)]) == Verdict(0.2, None)
    with pytest.raises(ValueError, match="expected at least one verdict on a picture, found none"):
        combine_verdicts([])


@given(st.permutations([Verdict(0.2, 0.4), Verdict(math.nan, 0.1), Verdict(0.7, math.nan)]))
def test_a_score_that_is_no_number_wins_wherever_it_stands(order: list[Verdict]):
    found = combine_verdicts(order)
    assert math.isnan(found.unsafe_score)
    assert found.unrecognisable_score is not None
    assert math.isnan(found.unrecognisable_score)


@given(st.lists(verdicts, min_size=1, max_size=4), verdicts)
def test_one_more_judge_is_never_more_lenient(judges: list[Verdict], more: Verdict):
    before, after = combine_verdicts(judges), combine_verdicts([*judges, more])
    assert after.unsafe_score >= before.unsafe_score
    assert after == combine_verdicts([before, more])
    assert combine_verdicts(judges) == combine_verdicts(judges[::-1])


def test_a_cap_by_hand():
    """Two places: of `axe` the margins 0.9 and 0.7 stay; of `bomb` the two of 0.5 with the smaller ids."""
    found = [
        Candidate("a1", "axe", 0.7),
        Candidate("a2", "axe", 0.9),
        Candidate("a3", "axe", 0.6),
        Candidate("b3", "bomb", 0.5),
        Candidate("b1", "bomb", 0.5),
        Candidate("b2", "bomb", 0.5),
        Candidate("c1", "flag", 0.0),
    ]
    assert pairs_over_cap(found, maximum=2) == {"a3", "b3"}
    assert pairs_over_cap([], maximum=1) == set()


candidates = st.lists(
    st.builds(Candidate, st.text("xyz", min_size=1, max_size=3), st.sampled_from("abc"), st.sampled_from([0.0, 0.5])),
    unique_by=lambda candidate: candidate.pair_id,
)


@given(candidates, st.integers(1, 4), st.randoms())
def test_a_cap_depends_on_neither_order_nor_other_concepts(
    found: list[Candidate],
    maximum: int,
    random,  # type: ignore[no-untyped-def]
):
    over = pairs_over_cap(found, maximum=maximum)
    alone = [pairs_over_cap([c for c in found if c.concept == name], maximum=maximum) for name in "abc"]
    assert over == set().union(*alone)
    for name in "abc":
        members = [candidate for candidate in found if candidate.concept == name]
        places = [candidate for candidate in members if candidate.pair_id not in over]
        assert len(places) == min(len(members), maximum)
        losers = [candidate.margin for candidate in members if candidate.pair_id in over]
        assert not losers or max(losers) <= min(candidate.margin for candidate in places)
    random.shuffle(found)
    assert pairs_over_cap(found, maximum=maximum) == over


def test_a_cap_refuses_nonsense():
    with pytest.raises(ValueError, match="expected to keep at least 1 pair per concept, found a maximum of 0"):
        pairs_over_cap([], maximum=0)
    with pytest.raises(ValueError, match="expected each candidate once, found 'a' twice"):
        pairs_over_cap([Candidate("a", "axe", 0.1), Candidate("a", "bomb", 0.1)], maximum=1)


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


def test_pairs_without_a_concept_share_none():
    found = [Candidate(name, "", 0.1) for name in "abc"] + [Candidate(name, "axe", 0.1) for name in "de"]
    assert pairs_over_cap(found, maximum=1) == {"e"}
