"""What an attacker would hand in: pickles that leave a mark when they are read."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self._marker), "w"))


def malicious_pickle(marker: Path) -> bytes:
    """Return a pickle that creates `marker` when anybody loads it."""
    return pickle.dumps({"state_dict": _Touch(marker)})


def malicious_zip(marker: Path) -> bytes:
    """Return the same in the archive that `torch.save` writes today."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("archive/data.pkl", malicious_pickle(marker))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return sink.getvalue()


TEXTS = (
    "../../../../etc/passwd",
    "/etc/passwd",
    "C:\\..\\windows",
    "two\nlines\r\nand a third",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "\x9b31mred and \x08\x08\x08gone",
    "x" * 10_000,
    "$(touch it_ran) `touch it_ran`; touch it_ran | rm -rf / && echo",
    "%(name)s {0} {{ 7 * 7 }} ${HOME} $HOME ~root *?[a-z]",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\"' onfocus=alert(1) autofocus='\"",
    '=HYPERLINK("http://evil.example"; 1)',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "[/bold][link=http://evil.example]press[/link] \\\\[/red]",
    "\u202egnp.exe \u2066\u05e9\u05dc\u05d5\u05dd",
    "\U0001f4a3\U0001f469\u200d\U0001f4bb \ufeffx",
    "]]> --> */ #",
)
"""Each means something in a path, a shell, a page, a table, a format string or on a terminal; here it is a text."""
