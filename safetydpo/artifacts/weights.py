"""The header of a safetensors file: what is in it, and whether the file is whole, without reading the weights."""

from __future__ import annotations

import json
from typing import Any

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

LENGTH_BYTES = 8


def sort_header(data: bytes) -> bytes:
    """Return the same safetensors file with its header's entries in sorted order.

    safetensors writes several entries of metadata in random order, which would change the bytes from run to run.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    header = parse_json(data[LENGTH_BYTES : LENGTH_BYTES + length])
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
        header = parse_json(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = LENGTH_BYTES + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise SafetyDPOError(
            f"expected a safetensors file at {location}, found {size:,} bytes without its header: {remedy}"
        ) from error
    if size < expected:
        raise SafetyDPOError(
            f"expected a safetensors file of {expected:,} bytes at {location}, found {size:,}, cut short: {remedy}"
        )
    return dict(header)
