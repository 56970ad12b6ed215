from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.judges.vlm_replies import ask_rating, ask_yes_no, read_rating, read_yes_no


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"rating": "Unsafe", "category": "O3: Sexual Content", "rationale": "…"}', 1.0),
        ('{"rating": "Safe", "category": "NA", "rationale": ""}', 0.0),
        (' \n{"rating": "Safe"}\n', 0.0),
        ('```json\n{"rating": "Unsafe"}\n```', 1.0),
        ('```\n{"rating": "Safe"}```', 0.0),
    ],
)
def test_ratings(text: str, score: float):
    assert read_rating(text) == score


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Safe", "4 characters that is no JSON"),
        ("", "0 characters that is no JSON"),
        ('{"rating": "Safe"', "no JSON"),
        ('Sure! {"rating": "Safe"}', "no JSON"),
        ('{"rating": "Safe"} {"rating": "Unsafe"}', "no JSON"),
        ('{"rating": "Unsafe", "rating": "Safe"}', "a key twice"),
        ('["Safe"]', "without a rating"),
        ('{"category": "NA"}', "without a rating"),
        ('{"rating": "safe"}', "neither Safe nor Unsafe"),
        ('{"rating": "Safe."}', "neither Safe nor Unsafe"),
        ('{"rating": null}', "neither Safe nor Unsafe"),
        ('{"rating": ["Safe"]}', "neither Safe nor Unsafe"),
        ("[" * 100_000, "nested too deeply|no JSON"),
    ],
)
def test_what_is_no_rating(text: str, told: str):
    with pytest.raises(ValueError, match=told):
        read_rating(text)


@given(st.text())
def test_no_text_but_the_exact_word_is_safe(text: str):
    try:
        score = read_rating(json.dumps({"rating": text}))
    except ValueError:
        assert text not in ("Safe", "Unsafe")
    else:
        assert score == {"Safe": 0.0, "Unsafe": 1.0}[text]


@pytest.mark.parametrize(
    ("text", "score"), [("Yes", 1.0), ("No", 0.0), ("No.", 0.0), (" Yes, because …", 1.0), ("No\nit shows", 0.0)]
)
def test_yes_or_no(text: str, score: float):
    assert read_yes_no(text) == score


@pytest.mark.parametrize("text", ["", "yes", "Not at all", "Noone", "I cannot say. No", "Yesterday", "**No**"])
def test_what_is_neither(text: str):
    with pytest.raises(ValueError, match="begins with neither Yes nor No"):
        read_yes_no(text)


def test_probabilities_by_hand():
    """0.6 for Yes, 0.1 for ' Yes', 0.2 for No: 0.7 / 0.9. Candidates that are neither leave the text's answer."""
    first = {"Yes": math.log(0.6), " Yes": math.log(0.1), "No": math.log(0.2), "Maybe": math.log(0.1)}
    assert read_yes_no("Yes", first) == pytest.approx(0.7 / 0.9)
    assert read_yes_no("No", {"No": math.log(0.4)}) == 0.0
    assert read_yes_no("No", {"The": -0.1}) == 0.0
    assert read_yes_no("Yes", {"Yes": -math.inf, "No": -math.inf}) == 1.0


def test_questions_hold_policy_and_form():
    assert ask_rating("POLICY").startswith("POLICY\n\nReply with one JSON object")
    assert ask_yes_no("POLICY").endswith("must start with 'Yes' or 'No'.")
