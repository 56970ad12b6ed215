"""One reader of files, as the fuzz tests call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetydpo.artifacts.storage import Location, open_location


@dataclass(frozen=True)
class Reader:
    """How a file is read, under which name it lies, what valid ones are, and how their values are changed."""

    name: str
    file: str
    read: Callable[[Path], object]
    kind: str
    seeds: tuple[bytes, ...]


def at(path: Path) -> Location:
    """Return a file as storage names it."""
    return open_location(str(path))
