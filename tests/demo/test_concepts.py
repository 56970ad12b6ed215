"""The world holds what it promises: counts, categories, interference, references."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from safetydpo.demo.concepts import (
    BACKGROUNDS,
    CATEGORIES,
    CONCEPTS,
    CONCEPTS_PATH,
    NAME_KINDS,
    WORLD,
    get_concept,
    parse_world,
    select_concepts,
)
from safetydpo.errors import SafetyDPOError


def load_document() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(CONCEPTS_PATH.read_text(encoding="utf-8"))
    return document


def test_every_category_has_five_trained_concepts_and_one_that_no_expert_sees() -> None:
    trained, unseen = select_concepts("unsafe"), select_concepts("unsafe", ood=True)
    for category in CATEGORIES:
        assert sum(concept.categories[0] == category for concept in trained) == 5
        assert sum(concept.categories[0] == category for concept in unseen) == 1
    assert (len(trained), len(unseen)) == (35, 7)


def test_there_are_enough_neutrals_backgrounds_and_concepts_of_two_categories() -> None:
    assert len(select_concepts("neutral")) >= 25
    assert len(BACKGROUNDS) == 8
    assert sum(len(concept.categories) == 2 for concept in select_concepts("unsafe")) >= 5


def test_at_least_three_concepts_are_unsafe_by_an_attribute_only() -> None:
    burning = [concept for concept in select_concepts("unsafe") if concept.overlay is not None]
    assert len(burning) >= 3
    for concept in burning:
        safe = get_concept(concept.safe_counterpart or "")
        assert (safe.glyph, safe.overlay) == (concept.glyph, None)


def test_every_unsafe_concept_has_its_own_safe_counterpart() -> None:
    unsafe = (*select_concepts("unsafe"), *select_concepts("unsafe", ood=True))
    counterparts = [concept.safe_counterpart for concept in unsafe]
    assert len(set(counterparts)) == len(counterparts)
    assert {get_concept(key or "").role for key in counterparts} == {"safe"}


def test_every_category_has_two_neighbours_that_share_a_head_noun() -> None:
    neighbours = select_concepts("neighbour")
    for category in CATEGORIES:
        assert sum(neighbour.categories == (category,) for neighbour in neighbours) >= 2
    for neighbour in neighbours:
        unsafe = get_concept(neighbour.neighbour_of or "")
        assert unsafe.role == "unsafe"
        assert neighbour.categories[0] in unsafe.categories
        for concept in (neighbour, unsafe):
            assert any(neighbour.head_noun in name.split() for name in concept.names), concept.key


def test_at_least_three_conflicts_cross_categories() -> None:
    assert len(WORLD.conflicts) >= 3
    for conflict in WORLD.conflicts:
        concept, resembled = get_concept(conflict.concept), get_concept(conflict.resembles)
        assert concept.role == resembled.role == "unsafe"
        assert concept.categories[0] != resembled.categories[0]


def test_names_are_four_distinct_kinds_and_unique_in_the_world() -> None:
    names = [name for concept in CONCEPTS for name in concept.names]
    assert len(names) == len(set(names)) == 4 * len(CONCEPTS)
    for concept in CONCEPTS:
        assert sorted(concept.kinds) == sorted(NAME_KINDS)
        assert concept.kinds[:2] == ("canonical", "synonym")


def test_no_two_concepts_draw_the_same() -> None:
    drawn = [(concept.glyph, concept.overlay) for concept in CONCEPTS]
    assert len(set(drawn)) == len(drawn)


def test_unknown_key_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="expected a concept of the demo world, found 'unicorn'"):
        get_concept("unicorn")


def test_a_name_used_twice_is_refused() -> None:
    document = load_document()
    document["concepts"][1]["names"][0] = document["concepts"][0]["names"][0]
    with pytest.raises(SafetyDPOError, match="expected every name once, found 'cursing face'"):
        parse_world(document)


def test_a_key_used_twice_is_refused() -> None:
    document = load_document()
    document["concepts"][1]["key"] = document["concepts"][0]["key"]
    with pytest.raises(SafetyDPOError, match="expected every concept key once"):
        parse_world(document)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("role", "evil", "expected a role among"),
        ("categories", ["rudeness"], "expected categories among"),
        ("safe_counterpart", "nothing", "expected a category and a safe counterpart that exists"),
        ("names", ["one"], "expected 4 names"),
    ],
)
def test_a_broken_concept_is_refused(field: str, value: object, message: str) -> None:
    document = load_document()
    document["concepts"][0][field] = value
    with pytest.raises(SafetyDPOError, match=message):
        parse_world(document)


def test_a_neighbour_of_nothing_is_refused() -> None:
    document = load_document()
    row = next(row for row in document["concepts"] if row["role"] == "neighbour")
    row["neighbour_of"] = "nothing"
    with pytest.raises(SafetyDPOError, match="expected neighbour_of to name a concept, found 'nothing'"):
        parse_world(document)
