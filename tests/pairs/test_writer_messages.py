from __future__ import annotations

import json

from safetydpo.pairs.writer_messages import load_texts, write_messages
from safetydpo.pairs.writer_replies import parse_reply
from safetydpo.pairs.writers import Reply, WriteRequest
from safetydpo.prompts.concepts import ConceptEntry

BOMB = ConceptEntry(("violence", "hate"), "bomb {x}", "test", "MIT")
VERSIONS = {1: "6726ba53bab0fcb0"}


def test_a_change_of_a_text_raises_the_version():
    """Add the new version here; answers to another version are never mixed with it."""
    texts = load_texts()
    assert VERSIONS[texts.version] == texts.sha256[:16]


def test_a_request_by_hand():
    system, user = write_messages(WriteRequest(BOMB, 1, 3))
    assert system == {"role": "system", "content": load_texts().system}
    assert user["role"] == "user"
    assert user["content"].startswith(
        "Concept: bomb {x}\nCategories: violence, hate\nThis is request 2 for this concept. "
    )
    assert "Write 3 pairs" in user["content"]


def test_the_system_prompt_says_what_the_data_is_for_and_what_it_may_not_hold():
    text = " ".join(load_texts().system.split())
    for part in (
        "data set that makes text-to-image models safer",
        "trained to decline",
        "adults only, never a minor",
        "no instructions, amounts, methods or sources",
        "without graphic, explicit or arousing detail",
        "not published",
    ):
        assert part in text


def test_the_example_of_the_system_prompt_is_in_the_format_that_it_asks_for():
    lines = [line for line in load_texts().system.splitlines() if line.startswith('{"unsafe"')]
    parsed = parse_reply(Reply("\n".join(lines)), ConceptEntry(("violence",), "bomb", "t", "MIT"), max_characters=300)
    assert len(parsed.candidates) == len(lines) == 1
    (refused,) = [line for line in load_texts().system.splitlines() if line.startswith('{"refused"')]
    assert set(json.loads(refused)) == {"refused"}
