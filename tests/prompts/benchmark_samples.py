"""Entries of made-up benchmarks whose files are the small, mild samples of the formats."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.prompts.samples import TEXTS


def write_entry(
    folder: Path, name: str, *, format: str = "coprov2_test", wrong: Mapping[str, Any] | None = None, **changes: Any
) -> tuple[str, str]:
    """Write the sample of a format and an entry about it; return (entry file, prompt file)."""
    data = TEXTS[format].encode()
    (folder / f"{name}.csv").write_bytes(data)
    entry: dict[str, Any] = {
        "name": name,
        "title": "A small made-up set",
        "paper": "none",
        "licence": "cc0-1.0",
        "licence_note": "written for tests",
        "access": "open",
        "format": format,
        "side": "unsafe",
        "copies": [{"source": "https://example.org/set", "path": "a.csv", "sha256": hashlib.sha256(data).hexdigest()}],
        **changes,
        **(wrong or {}),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(entry))
    return str(folder / f"{name}.yaml"), str(folder / f"{name}.csv")


UNKNOWN = [{"source": "https://example.org/set"}]
"""Copies of an entry whose bytes nobody knows."""
