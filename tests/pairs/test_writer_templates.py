from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.writer_replies import Candidate, Reason, parse_reply
from safetydpo.pairs.writer_templates import DEFAULT_TEMPLATES, TemplatePair, TemplateWriter, read_templates
from safetydpo.pairs.writers import Reply, WriteRequest
from safetydpo.prompts.concepts import ConceptEntry

BOMB = ConceptEntry(("violence",), "bomb", "test", "MIT", counterpart="balloon", line=7)
TWO = (TemplatePair("a {concept} on sand", "a {counterpart} on sand"), TemplatePair("{concept}!", "{counterpart}."))


def write(writer: TemplateWriter, attempt: int, num_pairs: int, concept: ConceptEntry = BOMB) -> Reply:
    return asyncio.run(writer.write(WriteRequest(concept, attempt, num_pairs)))


def test_templates_are_filled_in_order_until_there_are_none():
    writer = TemplateWriter(TWO)
    parsed = [parse_reply(write(writer, attempt, 1), BOMB, max_characters=99) for attempt in range(3)]
    assert [reply.candidates for reply in parsed] == [
        (Candidate(1, "a bomb on sand", "a balloon on sand"),),
        (Candidate(1, "bomb!", "balloon."),),
        (),
    ]
    assert parsed[2].rejects[0].reason is Reason.EMPTY_REPLY


def test_the_built_in_ones_are_all_well_formed_and_different():
    parsed = parse_reply(write(TemplateWriter(), 0, 99), BOMB, max_characters=99)
    assert parsed.rejects == ()
    assert len({candidate.key for candidate in parsed.candidates}) == len(DEFAULT_TEMPLATES)


def test_it_counts_no_tokens_and_is_named_by_its_templates():
    reply = write(TemplateWriter(), 0, 1)
    assert (reply.prompt_tokens, reply.completion_tokens) == (0, 0)
    assert TemplateWriter().settings == TemplateWriter(DEFAULT_TEMPLATES).settings
    assert TemplateWriter().settings != TemplateWriter(TWO).settings


def test_a_concept_without_counterpart():
    with pytest.raises(
        SafetyDPOError, match=r"expected a counterpart of 'axe' \(line 3 of the concept list\) .* found none"
    ):
        write(TemplateWriter(), 0, 1, ConceptEntry(("violence",), "axe", "test", "MIT", line=3))


def test_templates_of_a_file(tmp_path: Path):
    path = tmp_path / "t.yaml"
    path.write_text(
        "- unsafe: 'a {concept} on sand'\n  safe: 'a {counterpart} on sand'\n"
        "- {unsafe: '{concept}!', safe: '{counterpart}.'}\n"
    )
    assert read_templates(path) == TWO


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- {unsafe: 'a {concept}'}", "t.yaml, entry 1: expected the two keys unsafe and safe, found {'unsafe'"),
        ("- {unsafe: 'a bomb', safe: '{counterpart}'}", "entry 1: expected {concept} once in unsafe, found 'a bomb'"),
        (
            "- {unsafe: '{concept}', safe: '{concept}'}",
            "entry 1: expected {counterpart} once in safe, found '{concept}'",
        ),
        (
            "- {unsafe: '{concept.x}', safe: '{counterpart}'}",
            "entry 1: expected {concept} once in unsafe, found '{concept.x}'",
        ),
        ("- {unsafe: '{', safe: '{counterpart}'}", "entry 1: expected a template as unsafe, found: .*; double braces"),
        ("a: 1", "expected a list of templates in .*t.yaml, found dict"),
        ("[]", "expected a list of templates in .*t.yaml, found list"),
        ("[", "expected templates as YAML in .*t.yaml, found: while parsing"),
    ],
)
def test_templates_that_are_none(tmp_path: Path, text: str, told: str):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        read_templates(tmp_path / "t.yaml")


def test_no_file_of_templates(tmp_path: Path):
    with pytest.raises(UsageError, match="expected templates at .*none.yaml, found nothing"):
        read_templates(tmp_path / "none.yaml")
