from __future__ import annotations

import pytest
import yaml

from safetydpo.config import safe_yaml
from safetydpo.config.safe_yaml import YamlError, compose_yaml, parse_documents, parse_yaml

TEXT = "a: &x [1, two, 3.5, null, true]\nb: *x\nc: {d: 2001-01-01, e: 'no'}\n"


def test_it_reads_what_the_safe_loader_reads():
    assert parse_yaml(TEXT) == yaml.safe_load(TEXT)
    assert parse_yaml("") is None
    assert parse_documents("a: 1\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]
    assert compose_yaml("") is None


def test_a_group_may_take_in_others_and_say_otherwise():
    text = "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(text)["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: {<<: {x: 1, x: 2}}", "the key 'x' twice in one group"),
        ("a: 1\na: 2\n", "the key 'a' twice in one group"),
        ("{[a]: 1}", "unhashable key"),
        ("a: 1\n---\nb: 2\n", "2 documents, not one"),
        ("a: !!python/name:os.system ''", "could not determine a constructor"),
        ("a: &a [*a]", "an alias of a group inside that group"),
        ("[" * 5000, "nested too deeply"),
        ("a: 2001-99-99", "month must be in"),
        ("a: [", "while parsing"),
    ],
)
def test_the_rest_is_refused_in_one_line(text: str, found: str):
    with pytest.raises(YamlError, match=found) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_aliases_count_as_what_they_stand_for(monkeypatch: pytest.MonkeyPatch):
    """Ten texts, ten times: 1 + 2 keys + (1 + 10) + (1 + 10 x 11) = 125 values."""
    text = f"a: &a [{', '.join('x' * 10)}]\nb: [{', '.join(['*a'] * 10)}]\n"
    monkeypatch.setattr(safe_yaml, "MAX_NODES", 125)
    assert len(parse_yaml(text)["b"]) == 10
    monkeypatch.setattr(safe_yaml, "MAX_NODES", 124)
    for read in (parse_yaml, compose_yaml):
        with pytest.raises(YamlError, match="aliases that stand for more than 124 values"):
            read(text)


def test_a_text_that_is_too_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safe_yaml, "MAX_CHARACTERS", 3)
    with pytest.raises(YamlError, match="4 characters, where at most 3 are read"):
        parse_yaml("a: 1")
