"""What `safetydpo merge` says of each merge when it ends: its rank, what the rank cost, how many experts are in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetydpo.artifacts.records import Record


def merge_lines(merged: Mapping[str, Record]) -> list[str]:
    """Return one line per method; how many experts supply a layer only where the method selects and says it."""
    width = max((len(name) for name in merged), default=0)
    return [f"{name.ljust(width)}  {_describe(record)}" for name, record in merged.items()]


def _describe(record: Record) -> str:
    parts = [f"rank {record.counts['rank']}", f"truncation error {record.details['truncation_error']:.1%}"]
    suppliers: Mapping[str, Any] | None = record.details.get("suppliers")
    if suppliers:
        parts.append(
            f"{suppliers['fewest']} to {suppliers['most']} (mean {suppliers['mean']:.1f}) of {suppliers['experts']} "
            "experts supply a layer"
        )
    return ", ".join(parts)
