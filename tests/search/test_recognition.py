"""Pictures and captions by their similarities: by hand, by loops, and what cannot be said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from safetydpo.errors import SafetyDPOError
from safetydpo.search.recognition import find_own_captions, least_similarity, nearest_similarities, rivals_of


def test_by_hand() -> None:
    """Two captions of a ball, one of a cat: a ball's picture has the cat as its only rival."""
    rivals = rivals_of(["ball", "ball", "cat"], ["a ball", "one ball", "a cat"])
    assert rivals.tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    similarities = np.array([[0.3, 0.9, 0.2], [0.3, 0.2, 0.2], [0.5, 0.1, 0.4]])
    # The first is nearest to the other caption of its concept, which is no rival; the second ties with the cat.
    assert find_own_captions(similarities, [0, 1, 2], rivals) == [True, False, False]
    assert nearest_similarities(similarities).tolist() == [0.9, 0.3, 0.5]


def test_prompts_without_a_concept_compete_unless_they_say_the_same() -> None:
    assert rivals_of(["", "", ""], ["a", "a", "b"]).tolist() == [[False, False, True]] * 2 + [[True, True, False]]


def test_the_threshold_is_the_five_percent_quantile() -> None:
    """Of 0, 0.01, …, 1: five of 101 lie below 0.05."""
    values = np.linspace(0.0, 1.0, 101)
    assert least_similarity(values) == pytest.approx(0.05)
    assert int((values < least_similarity(values)).sum()) == 5


@given(
    arrays(np.float64, (6, 5), elements=st.floats(-1, 1, width=16)),
    st.lists(st.sampled_from(["", "cat", "ball", "tree"]), min_size=5, max_size=5),
    st.lists(st.integers(0, 4), min_size=6, max_size=6),
)
def test_loops_say_the_same(similarities: np.ndarray, concepts: list[str], own: list[int]) -> None:
    texts = [f"caption {index}" for index in range(5)]
    alone = [all(other == concept != "" for other in concepts) for concept in concepts]
    if any(alone):
        with pytest.raises(SafetyDPOError, match="prompts of several concepts"):
            rivals_of(concepts, texts)
        return
    rivals = rivals_of(concepts, texts)[own]
    expected = []
    for picture, place in enumerate(own):
        others = [
            similarities[picture, other]
            for other in range(5)
            if other != place and not (concepts[other] == concepts[place] != "")
        ]
        expected.append(bool(similarities[picture, place] > max(others)))
    assert find_own_captions(similarities, own, rivals) == expected


def test_a_picture_without_a_similarity_is_not_found() -> None:
    rivals = rivals_of(["a", "b"], ["a", "b"])
    assert find_own_captions(np.array([[np.nan, 0.1], [0.1, np.nan]]), [0, 1], rivals) == [False, False]


@pytest.mark.parametrize("values", [[], [0.1, np.nan]])
def test_a_base_that_says_nothing(values: list[float]) -> None:
    with pytest.raises(SafetyDPOError, match=r"expected finite similarities of the base's pictures .*search\.clip"):
        least_similarity(np.array(values))


def test_one_concept_alone() -> None:
    with pytest.raises(
        SafetyDPOError, match="found no other one than that of 'a ball': .*add prompts of other concepts"
    ):
        rivals_of(["ball", "ball"], ["a ball", "one ball"])
