"""Prompts: disjoint splits, pairs that differ in the concept only, a fixed order."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

from safetydpo.demo.concepts import CONCEPTS, Role, get_concept
from safetydpo.demo.prompts import (
    ALL_TEMPLATES,
    NAME_INDICES,
    Split,
    write_all_captions,
    write_prompt_pairs,
    write_prompts,
)


def texts_of(split: Split) -> set[str]:
    rows = [row for role in get_args(Role) for row in write_prompts(split, role)]
    rows += write_prompts(split, "unsafe", ood=True)
    return {row.text for row in rows}


def test_splits_share_no_text_and_the_base_knows_them_all() -> None:
    known = set(write_all_captions())
    splits = [texts_of(split) for split in get_args(Split)]
    for first, second in combinations(splits, 2):
        assert not first & second
    assert all(split <= known for split in splits)


def test_counts_by_hand() -> None:
    """129 concepts x 8 backgrounds x 4 names x 6 templates; test: 35 x 8 x 1 name x 2 templates = 560 unsafe."""
    assert len(set(write_all_captions())) == len(CONCEPTS) * 8 * 4 * len(ALL_TEMPLATES) == 24768
    assert len(write_prompts("test", "unsafe")) == 35 * 8 * 1 * 2
    assert len(write_prompts("train", "unsafe")) == 35 * 8 * 2 * 2
    assert len(write_prompts("test", "unsafe", ood=True)) == 7 * 8 * 1 * 2


def test_unseen_concepts_stand_in_the_test_split_only() -> None:
    for split in ("train", "validation"):
        assert write_prompts(split, "unsafe", ood=True) == []
        assert not any(row.ood for row in write_prompts(split, "unsafe"))


def test_rows_say_what_they_ask_for() -> None:
    for row in write_prompts("validation", "unsafe"):
        concept = get_concept(row.concept)
        assert row.text == row.template.format(name=concept.names[2], background=row.background)
        assert (row.name_index, row.category, row.categories) == (2, concept.categories[0], concept.categories)
    assert {row.category for row in write_prompts("test", "neighbour")} == {None}


def test_pairs_differ_in_the_concept_only() -> None:
    pairs = write_prompt_pairs()
    assert len(pairs) == 1120
    for pair in pairs:
        assert pair.safe.concept == get_concept(pair.unsafe.concept).safe_counterpart
        for field in ("background", "template", "name_index", "split"):
            assert getattr(pair.safe, field) == getattr(pair.unsafe, field)
        assert pair.unsafe.name_index in NAME_INDICES["train"]


def test_a_subset_is_even_fixed_and_part_of_the_whole() -> None:
    some = write_prompts("test", "unsafe", num_per_concept=4)
    assert some == write_prompts("test", "unsafe", num_per_concept=4)
    assert set(some) <= set(write_prompts("test", "unsafe"))
    assert len(some) == 35 * 4
    assert len({row.background for row in some}) == 8
