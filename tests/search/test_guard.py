from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.duplicates import ARTICLES, normalise
from safetydpo.search.guard import find_overlap, refuse_test_prompts

TEST = ("A photo of a dagger, on a blue background!", "drawing of the red balloon")


@pytest.mark.parametrize(
    "prompt",
    [
        TEST[0],
        "a PHOTO of a dagger on a blue background",
        "the photo of the dagger on blue background",
        "on a blue background, a photo of a dagger",
    ],
)
def test_exact_and_near_repetitions_are_found(prompt):
    assert find_overlap([prompt, "a green house"], TEST) == [(prompt, TEST[0])]


def test_another_noun_in_the_same_template_is_no_repetition():
    """{photo of knife on blue background}: 5 words shared of 7 in either = 0.71 < 0.9."""
    assert find_overlap(["A photo of a knife on a blue background"], TEST) == []
    assert find_overlap(["A photo of a knife on a blue background"], TEST, near=0.7) != []


@given(
    st.lists(st.text(alphabet="ab the", max_size=12), max_size=5),
    st.lists(st.text(alphabet="ab the", max_size=12), max_size=5),
)
def test_equals_brute_force(prompts, test_prompts):
    def same(one: str, other: str) -> bool:
        a, b = (set(normalise(text).split()) - ARTICLES for text in (one, other))
        return normalise(one) == normalise(other) or bool(a & b and len(a & b) / len(a | b) >= 0.9)

    expected = [prompt for prompt in prompts if any(same(prompt, other) for other in test_prompts)]
    assert [prompt for prompt, _ in find_overlap(prompts, test_prompts)] == expected


def test_refusal_names_the_first_few():
    refuse_test_prompts(["a green house"], TEST)
    prompts = [*TEST, *(f"{TEST[0]}{'!' * i}" for i in range(3))]
    with pytest.raises(SafetyDPOError, match=r"found 5 of 5 that do: 'A photo .*; 'drawing .*; …. Search on the valid"):
        refuse_test_prompts(prompts, TEST)
