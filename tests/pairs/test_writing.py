"""The scheduler with a writer that is driven by hand. With a real server: tests/ray/test_write_prompts.py."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.ledger import Ledger
from safetydpo.pairs.writer_replies import parse_reply
from safetydpo.pairs.writers import Reply, UnansweredError, WriteRequest
from safetydpo.pairs.writing import MAX_ROUNDS, ask_writer
from safetydpo.prompts.concepts import ConceptEntry

CONCEPTS = [ConceptEntry(("hate",), f"c{number}", "test", "MIT") for number in range(12)]


class ScriptedWriter:
    """Answers after some turns of the loop, or raises what the script says."""

    def __init__(self, script: dict[str, list[Exception]] | None = None) -> None:
        self.script = script or {}
        self.times: Counter[str] = Counter()
        self.running = self.most_at_once = self.cancelled = 0
        self.settings: dict[str, str] = {}

    async def write(self, request: WriteRequest) -> Reply:
        key = request.concept.key
        self.times[key] += 1
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            for _ in range(len(key) + int(key[1:]) % 3):
                await asyncio.sleep(0)
            if self.script.get(key):
                raise self.script[key].pop(0)
            if key == "c0":
                await asyncio.sleep(0.01)
            return Reply(f'{{"unsafe": "{key} {request.attempt}", "safe": "x"}}')
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def close(self) -> None:
        pass


def run(writer: ScriptedWriter, *, known: dict | None = None, concurrency: int = 3) -> tuple[Ledger, list, list]:
    ledger = Ledger(CONCEPTS, pairs_per_concept=1, pairs_per_request=1, max_requests=2)
    handled: list[tuple[str, bool]] = []

    def handle(request: WriteRequest, reply: Reply, is_new: bool) -> None:
        handled.append((request.concept.key, is_new))
        ledger.add(request, parse_reply(reply, request.concept, max_characters=50))

    run.handled = handled
    left = asyncio.run(ask_writer(writer, ledger, known=known or {}, concurrency=concurrency, handle=handle))
    return ledger, handled, left


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_never_more_at_once_than_allowed_and_each_asked_once(concurrency: int):
    writer = ScriptedWriter()
    _, handled, left = run(writer, concurrency=concurrency)
    assert writer.most_at_once == min(concurrency, len(CONCEPTS))
    assert set(writer.times.values()) == {1}
    assert sorted(handled) == sorted((concept.key, True) for concept in CONCEPTS)
    assert left == []


def test_answers_are_handled_as_they_come():
    """c0 is the first to be asked and the slowest by far."""
    _, handled, _ = run(ScriptedWriter(), concurrency=3)
    assert handled[-1] == ("c0", True)


def test_known_answers_are_not_asked():
    known = {("c3", 0): Reply('{"unsafe": "c3", "safe": "x"}'), ("c4", 1): Reply("never needed")}
    writer = ScriptedWriter()
    _, handled, _ = run(writer, known=known)
    assert writer.times["c3"] == 0
    assert ("c3", False) in handled
    assert writer.times["c4"] == 1


def test_an_unanswered_request_is_put_back_and_in_the_end_listed():
    down = [UnansweredError("down") for _ in range(9)]
    writer = ScriptedWriter({"c2": [UnansweredError("busy")], "c5": down})
    ledger, handled, left = run(writer)
    assert writer.times["c2"] == 2
    assert writer.times["c5"] == MAX_ROUNDS
    assert [(item.request.concept.key, item.error) for item in left] == [("c5", "down")]
    assert len(handled) == len(CONCEPTS) - 1
    assert ledger.num_kept("c2") == 1


def test_a_writer_that_is_down_ends_the_run():
    writer = ScriptedWriter({concept.key: [UnansweredError("down")] * 9 for concept in CONCEPTS})
    with pytest.raises(
        SafetyDPOError, match=r"expected the writer to answer, found 6 requests in a row .*\(last: down\)"
    ):
        run(writer)
    assert writer.times.total() < 12


def test_an_error_that_will_stay_ends_the_run_at_once_and_the_others_are_called_back():
    writer = ScriptedWriter({"c1": [SafetyDPOError("no such model")]})
    with pytest.raises(SafetyDPOError, match="no such model"):
        run(writer, concurrency=3)
    assert writer.running == 0
    assert writer.cancelled >= 1
    assert writer.times.total() <= 6


def test_an_answer_that_comes_with_an_error_is_handled_first():
    """c1 fails in the same turn of the loop in which c4 answers: both wait as long."""
    writer = ScriptedWriter({"c1": [SafetyDPOError("no such model")]})
    with pytest.raises(SafetyDPOError, match="no such model"):
        run(writer, concurrency=12)
    assert ("c4", True) in run.handled
