from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.pairs.writer_replies import Candidate, Reason, Reject, names_concept, parse_reply, withhold
from safetydpo.pairs.writers import Reply
from safetydpo.prompts.concepts import ConceptEntry

BOMB = ConceptEntry(("violence",), "bomb", "test", "MIT")
KISS = ConceptEntry(("sexual",), "kiss mark", "test", "MIT")
GOOD = '{"unsafe": "a bomb on a table", "safe": "a balloon on a table"}'


def line(unsafe: object, safe: object, **more: object) -> str:
    return json.dumps({"unsafe": unsafe, "safe": safe, **more})


def reasons(text: str, concept: ConceptEntry = BOMB, **more: object) -> list[Reason]:
    parsed = parse_reply(Reply(text, **more), concept, max_characters=60)
    return [reject.reason for reject in parsed.rejects]


def test_an_answer_by_hand():
    """Line 2 is a fence and line 4 blank: neither counts as a reject; lines are numbered as they came."""
    text = "\n".join((GOOD, "```json", line(" a  bomb\non sand ", "sand"), "", "Here you are:", "```"))
    parsed = parse_reply(Reply(text), BOMB, max_characters=60)
    assert parsed.candidates == (
        Candidate(1, "a bomb on a table", "a balloon on a table"),
        Candidate(3, "a bomb on sand", "sand"),
    )
    assert parsed.rejects == (Reject(5, Reason.NOT_JSON, "Here you are:"),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.EMPTY_REPLY),
        (" \n```\n```", Reason.EMPTY_REPLY),
        ("I'm sorry, but I cannot help with that.", Reason.REFUSAL),
        ("I can\u2019t write\nthat.", Reason.REFUSAL),
        ('{"refused": "not this one"}', Reason.REFUSAL),
        (line("I cannot write this", "a table"), Reason.REFUSAL),
        ('{"unsafe": "a bomb", "safe": "a', Reason.NOT_JSON),
        ("[" * 100_000, Reason.NOT_JSON),
        ('["a bomb", "a ball"]', Reason.NOT_AN_OBJECT),
        ('{"unsafe": "a bomb", "unsafe": "a dagger", "safe": "a ball"}', Reason.DOUBLED_FIELD),
        ('{"unsafe": "a bomb"}', Reason.MISSING_FIELD),
        ("{}", Reason.MISSING_FIELD),
        (line("a bomb", "a ball", note="x"), Reason.UNKNOWN_FIELD),
        (line("a bomb", 3), Reason.NOT_TEXT),
        (line("a bomb", None), Reason.NOT_TEXT),
        ('{"unsafe": "a bomb", "safe": "\\ud800"}', Reason.NOT_TEXT),
        (line("a bomb", "a \x1b[31mball"), Reason.NOT_TEXT),
        (line("a bomb", " "), Reason.EMPTY_TEXT),
        (line("…!", "a ball"), Reason.EMPTY_TEXT),
        (line("a bomb " * 10, "a ball"), Reason.TOO_LONG),
        (line("A ball.", "a ball"), Reason.IDENTICAL_TEXTS),
        (line("a bomb on sand", "two BOMBS on sand"), Reason.SAFE_NAMES_CONCEPT),
    ],
)
def test_the_reason_of_every_reject(text: str, reason: Reason):
    assert reasons(text) == [reason]


def test_the_documentation_explains_every_reason(root: Path):
    text = (root / "docs" / "prompt-writing.md").read_text(encoding="utf-8")
    assert [reason for reason in Reason if f"`{reason}`" not in text] == []


def test_a_refusal_that_the_server_marks():
    assert reasons("No.", refused=True) == [Reason.REFUSAL]
    assert reasons("", refused=True) == [Reason.REFUSAL]


def test_only_the_last_line_of_a_shortened_answer_is_cut():
    assert reasons('{"unsafe\n' + GOOD + '\n{"unsafe": "a bo', finish_reason="length") == [
        Reason.NOT_JSON,
        Reason.CUT_SHORT,
    ]


def test_a_longest_text_is_kept():
    assert reasons(line("a bomb".ljust(59) + "x", "a ball")) == []


def test_thinking_aloud_is_no_part_of_the_answer():
    parsed = parse_reply(Reply(f"<think>\n{GOOD}\nhm\n</think>\n{GOOD}"), BOMB, max_characters=60)
    assert [candidate.line for candidate in parsed.candidates] == [2]
    assert parsed.rejects == ()


@pytest.mark.parametrize(
    ("text", "concept", "named"),
    [
        ("a bomb", "bomb", True),
        ("two bombs", "bomb", True),
        ("a bomb", "bombs", True),
        ("the Kiss-Mark", "kiss mark", True),
        ("kiss of a mark", "kiss mark", False),
        ("bombastic", "bomb", False),
        ("boxes", "box", True),
        ("two babies", "baby", True),
        ("a balloon", "bomb", False),
        ("bomb", "bomb squad", False),
        ("", "bomb", False),
    ],
)
def test_a_text_names_a_concept_by_whole_words_in_either_number(text: str, concept: str, named: bool):
    assert names_concept(text, concept) is named


words = st.text("abcdef", min_size=1, max_size=4)


@given(st.lists(words, max_size=3), st.lists(words, min_size=1, max_size=2), st.lists(words, max_size=3))
def test_a_concept_is_found_wherever_it_stands(before: list[str], concept: list[str], after: list[str]):
    assert names_concept(" ".join((*before, *concept, *after)), " ".join(concept))


MINOR = line("a kiss mark on a girl", "a rose on a wall")


@pytest.mark.parametrize(
    "text",
    [
        MINOR,
        MINOR[:36],
        line("a kiss mark", "a Teen\u2019s rose"),
        MINOR.replace("girl", "g\\u0069rl"),
        line("a kiss mark on a girl " * 9, "a rose"),
    ],
)
def test_a_sexual_caption_that_names_a_minor_is_kept_nowhere(text: str):
    """Not among the rejects, not in what is stored of the answer; read back, the verdict is the same."""
    good = line("a kiss mark on a wall", "a rose on a wall")
    reply = Reply(f"<think>a girl</think>{good}\n{text}")
    parsed = parse_reply(reply, KISS, max_characters=60)
    assert parsed.rejects == (Reject(2, Reason.NAMES_A_MINOR, ""),)
    stored = withhold(reply, parsed)
    assert stored.text == f'{good}\n{{"withheld": "names_a_minor"}}'
    assert parse_reply(stored, KISS, max_characters=60) == parsed


def test_the_word_is_harmless_elsewhere_and_in_a_refusal():
    assert reasons(line("a bomb behind a boy", "a balloon behind a boy")) == []
    assert reasons('{"refused": "no minors"}', KISS) == [Reason.REFUSAL]


def test_nothing_is_withheld_without_a_cause():
    reply = Reply(f"{GOOD}\nhm")
    assert withhold(reply, parse_reply(reply, BOMB, max_characters=60)) is reply


@given(st.text(), st.sampled_from(["stop", "length"]))
def test_every_line_is_a_pair_or_a_reject_and_nothing_raises(text: str, finish_reason: str):
    parsed = parse_reply(Reply(text, finish_reason=finish_reason), BOMB, max_characters=60)
    items = (*parsed.candidates, *parsed.rejects)
    assert items
    assert len({item.line for item in items}) == len(items)


json_values = st.text(max_size=70) | st.none() | st.integers() | st.lists(st.booleans(), max_size=2)


@given(st.dictionaries(st.sampled_from(["unsafe", "safe", "x"]), json_values))
def test_what_is_kept_is_two_different_texts_of_letters(value: dict[str, object]):
    parsed = parse_reply(Reply(json.dumps(value)), BOMB, max_characters=60)
    for candidate in parsed.candidates:
        assert set(value) == {"unsafe", "safe"}
        assert 0 < len(candidate.unsafe_text) <= 60
        assert 0 < len(candidate.safe_text) <= 60
        assert candidate.unsafe_text != candidate.safe_text
