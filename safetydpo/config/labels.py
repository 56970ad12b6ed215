"""Labels of nodes and the selectors that ask for them: what Ray's `label_selector` means. Pure.

A selector is {label: value}; a value is `x`, `!x`, `in(x,y)` or `!in(x,y)`. A node without the label satisfies the two
that begin with `!`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_SELECTED = re.compile(rf"(!?)(?:in\(({_VALUE}(?:,{_VALUE})*)\)|({_VALUE}))")
_LABEL = re.compile(rf"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?/)?{_VALUE}")


def check_selector(selector: Mapping[str, str]) -> None:
    """See that Ray would take a selector.

    Raises:
        ValueError: naming the first part that it would not.
    """
    for label, value in selector.items():
        if not _LABEL.fullmatch(label):
            raise ValueError(f"expected a node's label such as market-type or ray.io/node-group, found {label!r}")
        if not _SELECTED.fullmatch(value):
            raise ValueError(f"expected x, !x, in(x,y) or !in(x,y) for the label {label}, found {value!r}")


def satisfies(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Return whether a node with these labels is one that the selector asks for."""
    return all(_is_selected(labels.get(label), value) for label, value in selector.items())


def _is_selected(found: str | None, value: str) -> bool:
    parts = _SELECTED.fullmatch(value)
    if parts is None:
        return False
    wanted = (parts[2] or parts[3]).split(",")
    return (found not in wanted) if parts[1] else found in wanted
