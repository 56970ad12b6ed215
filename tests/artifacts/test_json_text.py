from __future__ import annotations

import json

import pytest

from safetydpo.artifacts.json_text import MAX_DEPTH, JsonError, JsonTooDeep, parse_json, parse_object


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("value", [None, 1, 0.5, "ä💣", [1, {"a": [None]}], {"a": "\\ud800 as text"}])
def test_what_python_writes_is_read(value: object):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert parse_json(text) == value


def test_groups_lie_in_one_another_up_to_a_limit():
    assert parse_json(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))
    assert len(parse_json("[" + ",".join(["[]"] * 500) + "]")) == 500
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(JsonTooDeep, match="nested too deeply"):
            parse_json(nested(depth))


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udc00": 1}', '[["a \\ud83d"]]'])
def test_half_a_surrogate_pair_is_refused(text: str):
    with pytest.raises(JsonError, match="half of a surrogate pair"):
        parse_json(text)
    assert parse_json('"\\ud83d\\udca3"') == "💣"


@pytest.mark.parametrize("text", ["", "{", b"\xff", "9" * 5000, "nul"])
def test_all_else_is_one_kind_of_error(text: str | bytes):
    with pytest.raises(JsonError):
        parse_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ('"a"', "str"), ("1", "int")])
def test_an_object_is_asked_for(text: str, kind: str):
    assert parse_object("{}") == {}
    with pytest.raises(JsonError, match=f"JSON that is no object but a {kind}"):
        parse_object(text)
