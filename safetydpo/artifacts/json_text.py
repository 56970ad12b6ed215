"""JSON of files: what Python's parser lets through and later code cannot hold is refused while it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 100
"""Groups within groups; ours have at most a dozen, and functions that walk a document call themselves."""

Pairs = Callable[[list[tuple[str, Any]]], Any]


class JsonError(ValueError):
    """A text that is no JSON, or none that can be worked with."""


class JsonTooDeep(JsonError):  # noqa: N818 (says what was found)
    """JSON of groups within groups within groups."""


def parse_json(
    text: str | bytes | bytearray, *, pairs: Pairs | None = None, constant: Callable[[str], Any] | None = None
) -> Any:
    """Return the value of a JSON text; `pairs` makes an object of its keys and values, a dict by default.

    `constant` is asked about NaN and Infinity, which JSON does not know and Python takes.

    Raises:
        JsonError: if it does not parse, is nested too deeply, holds a number of thousands of digits, half of a pair
            of surrogates (which no encoding can write), or bytes that are not UTF-8.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise JsonTooDeep("JSON that is nested too deeply") from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from error
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    # Most texts need no walk: too few groups to be deep, no letter that is spelled out.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or b"\\u" in raw or b"\xed" in raw:
        _check(value)
    return value


def parse_object(text: str | bytes | bytearray) -> dict[str, Any]:
    """Return the value of a JSON text that is one object.

    Raises:
        JsonError: as `parse_json`, or if it is a list, a text, a number or nothing.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise JsonError(f"JSON that is no object but a {type(value).__name__}")
    return value


def _check(value: Any) -> None:
    """Walk a document level by level, without calls within calls."""
    level, depth = [value], 0
    while level:
        for item in level:
            if isinstance(item, str):
                _check_text(item)
        groups = [item for item in level if isinstance(item, dict | list)]
        if groups and depth == MAX_DEPTH:
            raise JsonTooDeep("JSON that is nested too deeply")
        level, depth = [inner for group in groups for inner in _inside(group)], depth + 1


def _inside(group: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return (*group.keys(), *group.values()) if isinstance(group, dict) else group


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JsonError("JSON with half of a surrogate pair, which no encoding can write") from error
