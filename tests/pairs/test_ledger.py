from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import UsageError
from safetydpo.pairs.ledger import MAX_TOLD, Ledger
from safetydpo.pairs.writer_replies import Candidate, ParsedReply, Reason, Reject
from safetydpo.pairs.writers import WriteRequest
from safetydpo.prompts.concepts import ConceptEntry

A, B = (ConceptEntry(("violence",), name, "test", "MIT") for name in ("a", "b"))


def reply(*texts: str) -> ParsedReply:
    return ParsedReply(tuple(Candidate(line, text, "safe") for line, text in enumerate(texts, start=1)), ())


def open_ledger(*concepts: ConceptEntry, wanted: int = 2, at_once: int = 2, limit: int = 3) -> Ledger:
    return Ledger(concepts, pairs_per_concept=wanted, pairs_per_request=at_once, max_requests=limit)


def asked(ledger: Ledger) -> list[tuple[str, int]]:
    return [(request.concept.key, request.attempt) for request in ledger.take_requests()]


def test_a_run_by_hand():
    """Wanted 2 of a and of b. b answers first: x, y. Then a: x, z; a's x stands before b's, because equal attempts go
    by key. So b is short again and asked once more: its z is a's, its w fills it, its v is one too many.
    """
    ledger = open_ledger(A, B)
    first_a, first_b = ledger.take_requests()
    assert (first_a.num_pairs, first_a.avoid) == (2, ())
    ledger.add(first_b, reply("x", "y"))
    assert ledger.num_kept("b") == 2
    assert asked(ledger) == []
    ledger.add(first_a, reply("X!", "z"))
    assert ledger.num_kept("b") == 1
    (again,) = ledger.take_requests()
    assert (again.concept, again.attempt, again.avoid) == (B, 1, ("x", "y"))
    ledger.add(again, ParsedReply(reply("z", "w", "v").candidates, (Reject(4, Reason.NOT_JSON, "hm"),)))
    assert asked(ledger) == []
    assert [candidate.unsafe_text for candidate in ledger.kept("a")] == ["X!", "z"]
    assert [candidate.unsafe_text for candidate in ledger.kept("b")] == ["y", "w"]
    assert [(verdict.attempt, verdict.line, verdict.reason) for verdict in ledger.verdicts("b")] == [
        (0, 1, Reason.DUPLICATE),
        (0, 2, None),
        (1, 1, Reason.DUPLICATE),
        (1, 2, None),
        (1, 3, Reason.SURPLUS),
        (1, 4, Reason.NOT_JSON),
    ]


def test_full_answers_take_as_many_requests_as_are_needed_at_once():
    """5 pairs, 2 a request: 3 requests, all known from the start."""
    ledger = open_ledger(A, wanted=5, limit=9)
    assert asked(ledger) == [("a", 0), ("a", 1), ("a", 2)]
    assert asked(ledger) == []


def test_a_request_never_asks_for_more_than_are_wanted():
    assert [request.num_pairs for request in open_ledger(A, wanted=2, at_once=5).take_requests()] == [2]


def test_after_the_limit_a_concept_is_short():
    ledger = open_ledger(A, limit=2)
    for _ in range(2):
        (request,) = ledger.take_requests()
        ledger.add(request, reply("x"))
    assert ledger.take_requests() == []
    assert ledger.is_short("a")
    assert ledger.num_kept("a") == 1


def test_a_top_up_waits_for_the_concepts_other_requests():
    ledger = open_ledger(A, wanted=4, limit=9)
    first, second = ledger.take_requests()
    ledger.add(second, reply())
    assert ledger.take_requests() == []
    ledger.add(first, reply("x", "y"))
    assert asked(ledger) == [("a", 2)]


def test_few_texts_are_told():
    ledger = open_ledger(A, wanted=100, at_once=100)
    (request,) = ledger.take_requests()
    ledger.add(request, reply(*(f"t{number}" for number in range(50))))
    (again,) = ledger.take_requests()
    assert again.avoid == tuple(f"t{number}" for number in range(50 - MAX_TOLD, 50))


def test_too_few_requests_for_what_is_wanted():
    with pytest.raises(
        UsageError, match="expected room for 20 pairs per concept, found at most 3 requests of 5 pairs: allow at"
    ):
        open_ledger(A, wanted=20, at_once=5, limit=3)


ANSWERS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(0, 4)), st.lists(st.sampled_from("uvwxyz"), max_size=3), max_size=15
)


def play(answers: dict[tuple[str, int], list[str]], order: list[int]) -> tuple[list[list[tuple]], set[tuple[str, int]]]:
    """Answer requests in an order that `order` decides; return all verdicts and what was asked."""
    concepts = [ConceptEntry(("hate",), name, "test", "MIT") for name in "abc"]
    ledger = open_ledger(*concepts, wanted=3, at_once=2, limit=5)
    waiting: list[WriteRequest] = ledger.take_requests()
    seen = set()
    while waiting:
        request = waiting.pop(order.pop() % len(waiting) if order else 0)
        key = (request.concept.key, request.attempt)
        assert key not in seen
        seen.add(key)
        ledger.add(request, reply(*answers.get(key, [])))
        waiting += ledger.take_requests()
    verdicts = [
        [(verdict.attempt, verdict.line, verdict.reason, verdict.text) for verdict in ledger.verdicts(name)]
        for name in "abc"
    ]
    return verdicts, seen


@given(ANSWERS, st.lists(st.integers(0, 20), max_size=15))
def test_neither_verdicts_nor_requests_depend_on_the_order_of_answers(
    answers: dict[tuple[str, int], list[str]], order: list[int]
):
    assert play(answers, order) == play(answers, [])


@given(ANSWERS)
def test_kept_texts_are_distinct_and_enough_or_the_concept_was_asked_to_the_limit(
    answers: dict[tuple[str, int], list[str]],
):
    verdicts, seen = play(answers, [])
    kept = [[text for _, _, reason, text in rows if reason is None] for rows in verdicts]
    assert len({text for texts in kept for text in texts}) == sum(map(len, kept))
    for name, texts in zip("abc", kept, strict=True):
        assert len(texts) <= 3
        assert len(texts) == 3 or (name, 4) in seen
