from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from safetydpo.pairs.concepts import concepts_below, count_reasons, fewest_kept_first
from safetydpo.pairs.select import KEPT

REASONS = {"p": KEPT, "q": "safe picture is not safe", "r": KEPT, "s": "a picture is missing"}


def test_by_hand():
    """`p` is in two concepts and counts in both; its membership in `axe` stands there twice and counts once."""
    members = [("r", "bomb"), ("p", "axe"), ("p", "axe"), ("p", "bomb"), ("q", "axe"), ("s", "flag")]
    counts = count_reasons(members, REASONS)
    assert list(counts) == ["axe", "bomb", "flag"]
    assert counts == {
        "axe": Counter({KEPT: 1, "safe picture is not safe": 1}),
        "bomb": Counter({KEPT: 2}),
        "flag": Counter({"a picture is missing": 1}),
    }
    assert concepts_below(counts, minimum=2) == {"flag": 0, "axe": 1}
    assert list(concepts_below(counts, minimum=2)) == ["flag", "axe"]
    assert concepts_below(counts, minimum=0) == {}
    assert fewest_kept_first(counts) == ["flag", "axe", "bomb"]


def test_pairs_without_a_concept_are_counted_but_never_too_few():
    """As the cap leaves them alone: they have nothing in common that could be short."""
    counts = count_reasons([("p", ""), ("q", ""), ("s", "axe")], REASONS)
    assert counts[""] == Counter({KEPT: 1, "safe picture is not safe": 1})
    assert concepts_below(counts, minimum=5) == {"axe": 0}
    assert fewest_kept_first(counts) == ["axe", ""]


@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from(["axe", "bomb", "flag"]))), st.randoms())
def test_the_order_of_memberships_does_not_matter(members: list[tuple[str, str]], random):  # type: ignore[no-untyped-def]
    counts = count_reasons(members, REASONS)
    assert sum(found.total() for found in counts.values()) == len(set(members))
    random.shuffle(members)
    assert count_reasons(members, REASONS) == counts
