"""Errors that end a command with one clear line: what was expected, what was found, what to do."""

from __future__ import annotations

from typing import Any, ClassVar

MAX_SHOWN = 200
"""Characters of a value that an error repeats."""


_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c")
_JOINERS = frozenset("\u200c\u200d")
"""Without these, emoji and the words of some scripts fall apart."""
_SPACES = frozenset("\u00a0\u2002\u2003\u2007\u2009\u202f\u3000")


class SafetyDPOError(Exception):
    """A failure of the work itself: bad data, a missing part, a broken artifact (exit code 1)."""

    exit_code: ClassVar[int] = 1


class UsageError(SafetyDPOError):
    """A request that cannot be carried out as written: wrong argument or config (exit code 2)."""

    exit_code: ClassVar[int] = 2


def shown(value: Any, *, most: int = MAX_SHOWN) -> str:
    """Return a value as an error repeats it: quoted if it is a text, in one line, its end left out if it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} …"


def shown_name(name: str) -> str:
    """Return a name as a list of names in an error repeats it: as it is if it is short and plain, else as `shown`."""
    return name if name.isprintable() and len(name) <= MAX_SHOWN else shown(name)


def visible(text: str) -> str:
    """Return a text with control characters, halves of surrogate pairs and marks of direction written out.

    So that a terminal that prints it, or a person who reads it, is told what is there and not what somebody wrote it
    for: an escape sequence would move the cursor or rename the window. Line ends and tabs stay.
    """
    return "".join(letter if _is_plain(letter) else letter.encode("unicode_escape").decode("ascii") for letter in text)


def _is_plain(letter: str) -> bool:
    if letter in _DIRECTIONS:
        return False
    return letter.isprintable() or letter in "\n\t" or letter in _JOINERS or letter in _SPACES
