from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.prompts.duplicates import NearPair, find_near, group_texts, normalise, normalised_key, word_set

words = st.text(alphabet="abcdefg ", max_size=16)
texts = st.lists(words.map(lambda text: " ".join(text)), max_size=8)


def test_normalise_by_hand():
    assert normalise("  A  Photo\u2014of\ta DAGGER, (blue)! ") == "a photo of a dagger blue"
    assert normalise("ﬁre") == "fire"
    assert normalise("Straße\u00a0№5") == "strasse no5"


@given(st.text())
def test_normalise_equals_the_plain_definition(text: str):
    """The fast path against: compatibility forms, case folded, a space for each P, S, Z and C, spaces joined."""
    import unicodedata

    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(" " if unicodedata.category(letter)[0] in "PSZC" else letter for letter in folded)
    assert normalise(text) == " ".join(plain.split())


def test_near_by_hand():
    """{green, bomb, on, table} and {green, ball, on, table}: 3 shared of 5 = 0.6."""
    left, right = ["A green bomb on the table"], ["the green ball, on a table", "a dog"]
    assert word_set(left[0]) == {"green", "bomb", "on", "table"}
    assert list(find_near(left, right, near=0.6)) == [NearPair(0, 0, 0.6)]
    assert list(find_near(left, right, near=0.61)) == []


@given(texts, texts, st.sampled_from([0.1, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0]))
def test_near_equals_brute_force(left: list[str], right: list[str], near: float):
    expected = [
        (i, j)
        for i, one in enumerate(map(word_set, left))
        for j, other in enumerate(map(word_set, right))
        if one and other and len(one & other) >= near * len(one | other)
    ]
    assert [(pair.left, pair.right) for pair in find_near(left, right, near=near)] == expected


@pytest.mark.parametrize("near", [0.0, -0.1, 1.01])
def test_a_threshold_that_is_none_is_refused(near: float):
    with pytest.raises(ValueError, match="expected a Jaccard index in"):
        list(find_near(["a"], ["a"], near=near))


def test_groups_by_hand():
    """0 and 2 are equal but for case, 3 is linked to 1, 4 is near 3 (4 of 5 words), 5 is alone."""
    rows = ["a bomb", "big dog", "A Bomb!", "one two three four", "one two three four five", "else"]
    assert group_texts(rows, [(1, 3)], near=0.8) == [0, 1, 0, 1, 1, 5]


@given(texts)
def test_groups_are_closed_under_nearness(rows: list[str]):
    groups = group_texts(rows, [], near=0.75)
    assert all(group <= place and groups[group] == group for place, group in enumerate(groups))
    assert all(groups[pair.left] == groups[pair.right] for pair in find_near(rows, rows, near=0.75))


def test_signs_are_equal_only_as_themselves():
    assert group_texts(["💣", "🎈", "💣", "❤️", "⚔️", "the", "a bomb!"], [], near=0.8) == [0, 1, 0, 3, 4, 5, 6]
    assert (normalise("❤️"), normalised_key("❤️"), normalised_key("A bomb!")) == ("\ufe0f", "", "a bomb")
