from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.experts import ExpertsConfig, GroupQuery
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.groups import Grouping, Member, concept_group_name, group_pairs, members_of, select_pairs
from safetydpo.prompts.sets import PromptPair

CATEGORIES = ("violence", "shocking")
MEMBERS = [
    Member("p1", "violence", "axe", "set-a"),
    Member("p2", "violence", "axe", "set-b"),
    Member("p2", "shocking", "axe", "set-b"),
    Member("p3", "shocking", "skull", "set-a"),
    Member("p4", "shocking", "Skull!", "set-a"),
    Member("p5", "violence", "bomb", "set-a"),
    Member("p6", "hate", "sign", "set-a"),
]
TEXTS = {
    "p1": "an axe on red",
    "p2": "An AXE, on  blue",
    "p3": "a skull on red",
    "p4": "a skull of axes",
    "p5": "a bomb on red",
    "p6": "a sign",
}


def group(*, kept: str = "p1 p2 p3 p4 p6", **settings: object) -> Grouping:
    """p5, the only bomb, is not kept unless asked for."""
    config = ExpertsConfig.model_validate(settings)
    return group_pairs(MEMBERS, TEXTS, kept=kept.split(), categories=CATEGORIES, config=config)


def found(grouping: Grouping) -> dict[str, str]:
    return {one.name: " ".join(sorted(one.pair_ids)) for one in grouping.groups}


def test_a_pair_of_two_categories_is_in_both_groups():
    grouping = group()
    assert found(grouping) == {"violence": "p1 p2", "shocking": "p2 p3 p4"}
    assert [one.categories for one in grouping.groups] == [("violence",), ("shocking",)]


def test_concepts_by_hand():
    """`skull` and `Skull!` are two concepts; an axe's expert is made for its pairs' first category, violence."""
    grouping = group(group_by="concept", kept="p1 p2 p3 p4 p5 p6")
    names = [concept_group_name(concept) for concept in ("Skull!", "axe", "bomb", "skull")]
    assert found(grouping) == dict(zip(names, ("p4", "p1 p2", "p5", "p3"), strict=True))
    assert {one.name: one.categories for one in grouping.groups}[concept_group_name("axe")] == ("violence",)
    assert {one.name: one.categories for one in grouping.groups}[concept_group_name("skull")] == ("shocking",)


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ({"category": ("violence",)}, "p1 p2 p5"),
        ({"category": ("violence", "shocking")}, "p1 p2 p3 p4 p5"),
        ({"concept": ("axe", "skull")}, "p1 p2 p3"),
        ({"concept": ("axe",), "source": ("set-b",)}, "p2"),
        # In one membership: p2 is of set-b, and no pair of set-a is an axe and shocking.
        ({"category": ("shocking",), "concept": ("axe",), "source": ("set-a",)}, ""),
        ({"text": ("axe",)}, "p1 p2"),
        ({"text": ("axe on blue",)}, "p2"),
        ({"text": ("on red",), "category": ("violence",)}, "p1 p5"),
        ({"text": ("a.*",)}, "p3 p4 p5 p6"),
        ({}, "p1 p2 p3 p4 p5 p6"),
    ],
)
def test_queries_by_hand(query: dict[str, tuple[str, ...]], ids: str):
    """Words are whole ones: `axes` is no axe; `a.*` is the word `a`, no pattern."""
    assert " ".join(sorted(select_pairs(MEMBERS, TEXTS, GroupQuery(**query)))) == ids


WORDS = st.sampled_from(["violence", "shocking", "hate"])


@given(category=st.sets(WORDS), concept=st.sets(st.sampled_from(["axe", "skull", "bomb"])))
def test_a_query_selects_what_a_plain_loop_does(category: set[str], concept: set[str]):
    plain = {
        row.pair_id
        for row in MEMBERS
        if (not category or row.category in category) and (not concept or row.concept in concept)
    }
    assert select_pairs(MEMBERS, TEXTS, GroupQuery(category=tuple(category), concept=tuple(concept))) == plain


def test_groups_come_beside_those_of_group_by_and_may_overlap():
    grouping = group(groups={"axes": {"concept": ["axe"]}, "blades": {"text": ["axe", "skull"]}})
    assert found(grouping) == {
        "violence": "p1 p2",
        "shocking": "p2 p3 p4",
        "axes": "p1 p2",
        "blades": "p1 p2 p3 p4",
    }
    assert grouping.groups[2].categories == ("violence",)
    assert grouping.groups[3].categories == ("violence", "shocking")
    only = group(group_by="none", groups={"axes": {"category": ["shocking"], "concept": ["axe"]}})
    assert found(only) == {"axes": "p2"}
    # What a query names is what its expert is made for.
    assert only.groups[0].categories == ("shocking",)


def test_pairs_of_categories_that_take_no_part_are_in_no_group():
    with pytest.raises(SafetyDPOError, match=r"found fewer in 1 groups: signs \(0\); widen their queries"):
        group(group_by="none", groups={"signs": {"concept": ["sign"]}})


@given(st.text(min_size=1, max_size=60))
def test_names_of_concepts_are_safe_and_depend_on_nothing_else(concept: str):
    name = concept_group_name(concept)
    assert re.fullmatch(r"[a-z0-9][a-z0-9_]{0,63}", name)
    assert name == concept_group_name(concept)


def test_names_of_concepts_by_hand():
    """sha256 of `Crème brûlée!` begins with the eight digits; a text without letters is called concept."""
    assert concept_group_name("Crème brûlée!").startswith("creme_brulee_")
    assert concept_group_name("爆弾").startswith("concept_")
    assert len({concept_group_name(name) for name in ("gun", "Gun", "gun!", " gun", "g-un")}) == 5
    assert len(concept_group_name("x" * 500)) == 49


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": {"a": {"category": ["violense"]}}}, "a category of the pair store in identity.experts.groups.a, "),
        ({"groups": {"a": {"category": ["violense"]}}}, "found 'violense'; did you mean 'violence'?"),
        ({"groups": {"a": {"category": ["Violence"]}}}, "found 'Violence'; did you mean 'violence'?"),
        ({"groups": {"a": {"concept": ["tree"]}}}, "found 'tree'; known here: Skull!, axe, bomb, sign, skull"),
        ({"groups": {"a": {"source": ["x"]}}}, "expected a source of the pair store"),
    ],
)
def test_what_no_pair_has_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(UsageError) as caught:
        group(group_by="none", **settings)
    assert message in str(caught.value)


def test_a_hostile_concept_stays_in_the_one_line_of_its_error():
    rows = [replace(row, concept="axe\nerror: forged" if row.concept == "axe" else row.concept) for row in MEMBERS]
    config = ExpertsConfig.model_validate({"group_by": "concept", "min_pairs": 9})
    with pytest.raises(SafetyDPOError) as caught:
        group_pairs(rows, TEXTS, kept=["p1", "p2"], categories=CATEGORIES, config=config)
    assert "\n" not in str(caught.value)
    assert "'axe\\nerror: forged' (2)" in str(caught.value)


def test_small_groups_are_refused_or_left_out():
    message = (
        r"at least 1 kept pairs per expert \(identity.experts.min_pairs\), found fewer in 1 groups: bomb \(0\); make"
    )
    with pytest.raises(SafetyDPOError, match=message):
        group(group_by="concept")
    with pytest.raises(SafetyDPOError, match=r"at least 2 kept .* in 3 groups: Skull! \(1\), skull \(1\), bomb \(0\)"):
        group(group_by="concept", min_pairs=2)
    grouping = group(group_by="concept", min_pairs=2, small_groups="leave_out")
    assert found(grouping) == {concept_group_name("axe"): "p1 p2"}
    assert grouping.left_out == ("Skull! (1)", "skull (1)", "bomb (0)")
    with pytest.raises(SafetyDPOError, match=r"found fewer in 1 groups: one \(1\); widen their queries"):
        group(min_pairs=2, small_groups="leave_out", groups={"one": {"concept": ["skull"]}})
    with pytest.raises(SafetyDPOError, match=r"found fewer in 2 groups: violence \(0\), shocking \(0\); make more"):
        group(kept="p6")


def test_pairs_without_a_concept_have_no_expert_of_one():
    members = [*MEMBERS, Member("p7", "violence", "", "set-a")]
    config = ExpertsConfig(group_by="concept", min_pairs=1, small_groups="refuse")
    with pytest.raises(SafetyDPOError, match="expected a concept of every kept pair .*, found 1 of 2 without"):
        group_pairs(members, TEXTS, kept=["p1", "p7"], categories=CATEGORIES, config=config)
    lenient = config.model_copy(update={"small_groups": "leave_out"})
    assert len(group_pairs(members, TEXTS, kept=["p1", "p7"], categories=CATEGORIES, config=lenient).groups) == 1
    with pytest.raises(SafetyDPOError, match="found 1 of 1 without"):
        group_pairs(members, TEXTS, kept=["p7"], categories=CATEGORIES, config=lenient)


def test_two_groups_of_one_name_are_refused():
    name = concept_group_name("axe")
    with pytest.raises(UsageError, match=f"group of pairs under a name of its own, found '{name}' 2 times: rename"):
        group(group_by="concept", kept="p1 p2 p3 p4 p5", groups={name: {"concept": ["axe"]}})


def test_memberships_of_prompt_pairs_are_those_of_the_pair_store():
    pair = PromptPair("a bomb", "a ball", "violence", ("violence", "shocking"), "bomb", "demo")
    assert members_of([pair]) == [
        Member(pair.pair_id, "violence", "bomb", "demo"),
        Member(pair.pair_id, "shocking", "bomb", "demo"),
    ]


def test_adding_a_concept_leaves_the_others_as_they_are():
    more = [*MEMBERS, Member("p8", "violence", "saw", "set-a")]
    texts = {**TEXTS, "p8": "a saw"}
    config = ExpertsConfig(group_by="concept")
    ids = ["p1", "p2", "p3", "p4", "p5"]
    before = group_pairs(MEMBERS, TEXTS, kept=ids, categories=CATEGORIES, config=config).groups
    after = group_pairs(more, texts, kept=[*ids, "p8"], categories=CATEGORIES, config=config).groups
    assert [one for one in after if one.name != concept_group_name("saw")] == list(before)
    assert len(after) == len(before) + 1
