"""Errors that end a command with one clear line: what was expected, what was found, what to do."""

from __future__ import annotations

from typing import ClassVar


class SafetyDPOError(Exception):
    """A failure of the work itself: bad data, a missing part, a broken artifact (exit code 1)."""

    exit_code: ClassVar[int] = 1


class UsageError(SafetyDPOError):
    """A request that cannot be carried out as written: wrong argument or config (exit code 2)."""

    exit_code: ClassVar[int] = 2
