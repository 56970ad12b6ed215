"""The header of a safetensors file: what is in it, and whether the file is whole, without reading the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetydpo.artifacts.json_text import parse_object
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

LENGTH_BYTES = 8
MAX_SIZE = 1 << 48
"""Of a tensor's sides and places: larger ones are damage, and no 64 bits hold their product."""


def sort_header(data: bytes) -> bytes:
    """Return the same safetensors file with its header's entries in sorted order.

    safetensors writes several entries of metadata in random order, which would change the bytes from run to run.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    header = parse_object(data[LENGTH_BYTES : LENGTH_BYTES + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors start at a multiple of eight bytes.
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data[LENGTH_BYTES + length :]


def read_header(location: Location, *, remedy: str) -> dict[str, Any]:
    """Return the header of a safetensors file: an 8-byte little-endian length, then JSON, then the tensors.

    Args:
        location: the file.
        remedy: what to do about a damaged file; ends the error.

    Raises:
        SafetyDPOError: if the file is missing, or shorter than its header says, or has no header.
    """
    size = location.size_bytes()
    with location.open_random_access() as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        text = file.read(min(length, size))
    try:
        header = parse_object(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = LENGTH_BYTES + length + max(map(_end_of, entries.values()), default=0)
        _check_texts(header.get("__metadata__"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SafetyDPOError(
            f"expected a safetensors file at {location}, found {size:,} bytes without its header: {remedy}"
        ) from error
    if size < expected:
        raise SafetyDPOError(
            f"expected a safetensors file of {expected:,} bytes at {location}, found {size:,}, cut short: {remedy}"
        )
    return dict(header)


def _end_of(entry: Mapping[str, Any]) -> int:
    """Return where a tensor ends behind the header; refuse an entry that is none."""
    begin, end = entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or not all(map(_is_size, (begin, end, *entry["shape"]))) or begin > end:
        raise ValueError("an entry that is no tensor")
    return int(end)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _check_texts(metadata: Mapping[str, Any] | None) -> None:
    if not all(isinstance(value, str) for value in (metadata or {}).values()):
        raise ValueError("metadata that is no text")
