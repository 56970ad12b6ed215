from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.artifacts.schemas import make_pair_id, make_prompt_id
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.sets import Prompt, PromptPair, check_splits_disjoint, spread_evenly

Row = tuple[str, str]
rows_of_groups = st.lists(st.tuples(st.sampled_from("abcd"), st.text("xyz", min_size=1, max_size=4)), unique=True)


def spread(rows: list[Row], count: int, *, seed: int = 0, purpose: str = "pairs") -> list[Row]:
    return spread_evenly(
        rows, count, group_of=lambda row: row[0], key_of=lambda row: "/".join(row), seed=seed, purpose=purpose
    )


def test_ids_are_those_of_the_texts():
    prompt = Prompt("a dog", "neutral", "test", concept="dog", category="", categories=(), background="blue")
    assert prompt.prompt_id == make_prompt_id("a dog")
    pair = PromptPair("a bomb", "a ball", category="violence", categories=("violence",), concept="bomb", source="demo")
    assert pair.pair_id == make_pair_id("a bomb", "a ball")


def test_shares_by_hand():
    """Groups of 5, 1 and 3 rows, 7 wanted.

    Round 1 takes one of each (3), round 2 one of a and c (5), round 3 again (7): a 3, b 1, c 3.
    """
    rows = [("a", str(i)) for i in range(5)] + [("b", "0")] + [("c", str(i)) for i in range(3)]
    assert Counter(group for group, _ in spread(rows, 7)) == {"a": 3, "b": 1, "c": 3}
    assert [group for group, _ in spread(rows, 7)] == ["a", "b", "c", "a", "c", "a", "c"]


def test_what_is_left_over_goes_to_the_first_names():
    assert Counter(group for group, _ in spread([(g, str(i)) for g in "cab" for i in range(4)], 5)) == {
        "a": 2,
        "b": 2,
        "c": 1,
    }


@given(rows_of_groups, st.integers(0, 20), st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[Row], count: int, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert spread(shuffled, count) == spread(rows, count)


@given(rows_of_groups, st.integers(0, 20))
def test_shares_differ_by_one_while_rows_last(rows: list[Row], count: int):
    chosen = spread(rows, count)
    assert len(chosen) == min(count, len(rows)) == len(set(chosen))
    have, took = Counter(group for group, _ in rows), Counter(group for group, _ in chosen)
    unfinished = [took[group] for group in have if took[group] < have[group]]
    assert all(taken <= min(unfinished) + 1 for taken in took.values() if unfinished)


@given(rows_of_groups, st.integers(0, 10))
def test_fewer_rows_are_a_part_of_more(rows: list[Row], count: int):
    """So a run with more pairs reuses every picture of the smaller one."""
    assert spread(rows, count) == spread(rows, count + 3)[:count]


@given(rows_of_groups)
def test_other_groups_do_not_change_a_groups_order(rows: list[Row]):
    own = [row for row in rows if row[0] == "a"]
    assert [row for row in spread(rows, len(rows)) if row[0] == "a"] == spread(own, len(own))


def test_seed_and_purpose_choose_other_rows():
    rows = [("a", str(index)) for index in range(30)]
    assert len({tuple(spread(rows, 10, seed=seed, purpose=purpose)) for seed in (0, 1) for purpose in ("x", "y")}) == 4


def test_a_negative_count_is_refused():
    with pytest.raises(SafetyDPOError, match="expected a count of at least 0, found -1"):
        spread([], -1)


def test_disjoint_splits_pass():
    check_splits_disjoint({"train": ["a", "a"], "validation": [], "test": ["b"]})


def test_a_text_in_two_splits_is_named():
    with pytest.raises(
        SafetyDPOError,
        match="expected disjoint prompt splits, found 'b' in 'train' and in 'test': remove it from one",
    ):
        check_splits_disjoint({"train": ["a", "b"], "validation": ["c"], "test": iter(["d", "b"])})


@given(st.dictionaries(st.sampled_from(["train", "validation", "test"]), st.sets(st.sampled_from("abcdefgh"))))
def test_refused_exactly_if_two_splits_share_a_text(splits: dict[str, set[str]]):
    shared = sum(len(texts) for texts in splits.values()) != len(set().union(*splits.values()))
    if shared:
        with pytest.raises(SafetyDPOError, match="expected disjoint prompt splits"):
            check_splits_disjoint(splits)
    else:
        check_splits_disjoint(splits)
