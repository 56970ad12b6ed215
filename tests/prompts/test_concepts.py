from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.config.fields import CATEGORIES
from safetydpo.demo.concepts import CONCEPTS
from safetydpo.errors import UsageError
from safetydpo.prompts.aliases import normalise_category
from safetydpo.prompts.concepts import (
    ConceptEntry,
    fingerprint_concepts,
    read_concepts,
)
from safetydpo.prompts.duplicates import normalise

HEADER = "category,concept,source,licence,ood,counterpart\n"


def written(folder: Path, text: str, name: str = "list.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_example_reads_and_holds_stand_ins_of_the_demo_world_only(root: Path):
    entries = read_concepts(root / "configs" / "concepts-example.yaml")
    names = {concept.names[0] for concept in CONCEPTS}
    assert {entry.category for entry in entries} == set(CATEGORIES)
    assert {entry.ood for entry in entries} == {True, False}
    for entry in entries:
        assert {entry.concept, entry.counterpart} <= names
        assert entry.source
        assert entry.licence


YAML = """\
licence: CC0-1.0
concepts:
  - {category: Illegal Activity, concept: bomb, source: mine, counterpart: balloon}
  - category: [violence, self-harm]
    concept: 911
    source: yours
    licence: MIT
    ood: true
"""
CSV = HEADER + ('Illegal Activity,bomb,mine,CC0-1.0,,balloon\n\n"violence, self-harm","911",yours,MIT,True,\n')


@pytest.mark.parametrize(("name", "text", "lines"), [("a.yaml", YAML, (3, 4)), ("a.csv", CSV, (2, 4))])
def test_yaml_and_csv_say_the_same(tmp_path: Path, name: str, text: str, lines: tuple[int, int]):
    """Aliases of categories, several of them, defaults of the list, a number as a text, lines as people count."""
    assert read_concepts(written(tmp_path, text, name)) == (
        ConceptEntry(("illegal_activity",), "bomb", "mine", "CC0-1.0", False, "balloon", lines[0]),
        ConceptEntry(("violence", "self_harm"), "911", "yours", "MIT", True, "", lines[1]),
    )


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode())
    assert [entry.concept for entry in read_concepts(path)] == ["bomb", "911"]


def test_a_quoted_line_break_does_not_shift_the_lines_after_it(tmp_path: Path):
    text = HEADER + 'hate,"thumbs\ndown",me,MIT,,\nhate,x,me,,,\n'
    with pytest.raises(UsageError, match=r"a\.csv:4: expected a licence, found none"):
        read_concepts(written(tmp_path, text, "a.csv"))


GOOD = "category: hate, concept: x, source: me, licence: MIT"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("concepts:\n- {category: hate, concept: x, source: me}", ":2: expected a licence, found none: every concept"),
        ("concepts:\n- {category: hate, concept: x, licence: MIT}", ":2: expected a source, found none"),
        ("concepts:\n- {concept: x, source: me, licence: MIT}", ":2: expected a category, found none"),
        (f"concepts:\n- {{{GOOD}, concpt: y}}", ":2: expected the fields category, .* found 'concpt': correct"),
        (f"concepts:\n- {{{GOOD.replace('hate', 'weather')}}}", ":2: expected a category among .* found 'weather'"),
        (f"concepts:\n- {{{GOOD.replace('hate', '[hate, Hate]')}}}", ":2: expected each category once, found 'Hate'"),
        (
            f"concepts:\n- {{{GOOD}}}\n\n- {{{GOOD.replace('x', ' X!')}}}",
            r":4: expected each concept once, found 'X!' a",
        ),
        (f"concepts:\n- {{{GOOD}, ood: maybe}}", ":2: expected ood to be true or false, found 'maybe'"),
        (f"concepts:\n- {{{GOOD.replace('x', '[x]')}}}", ":2: expected a text as concept, found something else"),
        (
            "concepts:\n- {category: hate, concept: '!?', source: me, licence: MIT}",
            r":2: expected a concept with letters or digits, found '!\?'",
        ),
        (f"concepts:\n- {{{GOOD}, source: you}}", ":2: expected each key once, found 'source' again"),
        ("concepts:\n- hate", ":2: expected an entry such as .* found something else"),
        ("concepts:\n  a: 1", ":1: expected a list below `concepts`, found none"),
        (f"concept:\n- {{{GOOD}}}", ":2: expected the keys concepts, source, licence, found 'concept'"),
        ("- hate", ":1: expected a mapping with `concepts`, found something else"),
        ("concepts: [", "expected YAML in .*list.yaml, found: while parsing"),
        ("concepts: []", "expected at least one concept in .*list.yaml, found none"),
        ("", "expected at least one concept in .*list.yaml, found none"),
    ],
)
def test_what_is_not_understood_in_yaml_is_refused_with_its_line(tmp_path: Path, text: str, told: str):
    with pytest.raises(UsageError, match=told):
        read_concepts(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("category,concept,source\n", ":1: expected a header of the columns .* found no 'licence'"),
        ("category,concept,source,licence,hard\n", ":1: expected a header of the columns .* found an unknown 'hard'"),
        ("category,concept,source,licence,ood,ood\n", ":1: expected a header of the columns .* found twice 'ood'"),
        (HEADER + "hate,thumbs down, me, MIT, ,x,y\n", ":2: expected 6 fields as in the header, found 7"),
        (HEADER + "hate,x\n", ":2: expected 6 fields as in the header, found 2"),
        (HEADER + 'hate,"x"y,me,MIT,,\n', ":2: expected CSV, found: "),
        (HEADER, "expected at least one concept in"),
    ],
)
def test_what_is_not_understood_in_csv_is_refused_with_its_line(tmp_path: Path, text: str, told: str):
    with pytest.raises(UsageError, match=told):
        read_concepts(written(tmp_path, text, "list.csv"))


def test_files_that_are_no_list(tmp_path: Path):
    with pytest.raises(UsageError, match="ends in .yaml, .yml or .csv, found .*list.txt: rename it"):
        read_concepts(written(tmp_path, "x", "list.txt"))
    with pytest.raises(UsageError, match="expected a concept list at .*none.yaml, found nothing"):
        read_concepts(tmp_path / "none.yaml")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="expected a readable UTF-8 concept list at .*binary.csv, found: "):
        read_concepts(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("written_as", "name"),
    [
        ("Illegal Activity", "illegal_activity"),
        ("self-harm", "self_harm"),
        ("Harrasment ", "harassment"),
        ("Hate", "hate"),
    ],
)
def test_aliases_of_categories(written_as: str, name: str):
    assert normalise_category(written_as) == name


def test_texts_are_compared_without_case_punctuation_width_and_spaces():
    """`ＢＯＭＢ` is full-width, which NFKC takes to `BOMB`; `ß` folds to `ss`."""
    assert normalise("  A ＢＯＭＢ, on the  Straße! ") == "a bomb on the strasse"
    assert normalise("🙂 …") == ""


@given(st.text())
def test_normalising_twice_changes_nothing(text: str):
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())


def test_a_list_is_what_it_says_in_any_order_on_any_line(tmp_path: Path):
    one = ConceptEntry(("hate",), "x", "me", "MIT", line=3)
    two = ConceptEntry(("hate",), "y", "me", "MIT", line=4)
    moved = ConceptEntry(("hate",), "x", "me", "MIT", line=9)
    assert fingerprint_concepts([one, two]) == fingerprint_concepts([two, moved])
    assert fingerprint_concepts([one]) != fingerprint_concepts([ConceptEntry(("hate",), "x", "me", "MIT", ood=True)])
