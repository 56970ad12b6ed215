"""The console that people read: what stands in files is printed as text, never obeyed.

A prompt may hold an escape sequence that moves the cursor, or a `[/bold]` that rich would take for its own. Control
characters are written out, and of rich's tags only those that this project uses itself are tags.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.errors import MarkupError
from rich.text import Text

from safetydpo.errors import visible

WIDTH_OF_A_LOG = 120
"""Columns where nobody says how many there are: rich would take 80, which fold most tables."""
_TAG = re.compile(r"(\\*)\[(?!/?(?:bold|dim|green|red|yellow)\])(?=[a-z#/@])")


class TextConsole(Console):
    """Rich's console for texts of unknown origin."""

    def render_str(self, text: str, *, markup: bool | None = None, **options: Any) -> Text:
        """Return a text as it is printed, also as a cell of a table."""
        is_marked = self._markup if markup is None else markup
        shown = visible(text)
        if is_marked:
            with suppress(MarkupError):
                return super().render_str(_only_our_tags(shown), markup=True, **options)
        # No markup, or a tag of ours that somebody else wrote, closed before it is opened.
        return super().render_str(shown, markup=False, **options)


def output_console(*, width_of_a_log: int = WIDTH_OF_A_LOG, **options: Any) -> TextConsole:
    """Return the console of a command's results; a file or a pipe has no width of its own and gets `width_of_a_log`."""
    return TextConsole(**options) if sys.stdout.isatty() else TextConsole(width=width_of_a_log, **options)


def _only_our_tags(text: str) -> str:
    # An even number of backslashes is itself escaped and leaves the bracket bare.
    return _TAG.sub(lambda found: found[0] if len(found[1]) % 2 else f"{found[1]}\\[", text)
