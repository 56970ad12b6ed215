"""Cells of CSV files that people open in a spreadsheet."""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes for the beginning of a formula, at the beginning of a text."""


def text_cell(value: object) -> object:
    """Return a cell that no spreadsheet reads as a formula: with a quote mark before a text that looks like one.

    It is how spreadsheets themselves write such a text.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
