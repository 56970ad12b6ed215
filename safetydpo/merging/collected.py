"""Tensors that were collected on a base model, as safetensors bytes that name the base they belong to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.lazy_tensors import DTYPES, LazyTensors
from safetydpo.artifacts.schemas import canonical_json
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tensor_files import parse_tensor_header, parse_tensors
from safetydpo.artifacts.weights import LENGTH_BYTES
from safetydpo.errors import SafetyDPOError

Number = Literal["F16", "F32"]
"""Type of the tensors of a file, as safetensors calls it."""


def collected_to_bytes(tensors: Mapping[str, Tensor], *, kind: str, base_fingerprint: str) -> bytes:
    """Return tensors as a safetensors file; equal tensors in any order give equal bytes.

    `kind` is the metadata key, so that a file of one kind is not read as another.
    """
    ordered = {name: tensors[name].to("cpu").contiguous() for name in sorted(tensors)}
    return save(ordered, metadata=_metadata(kind, base_fingerprint))


def write_collected(
    location: Location,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    *,
    number: Number,
    kind: str,
    base_fingerprint: str,
) -> str:
    """Write the file of `collected_to_bytes` with one tensor in memory at a time; return its SHA-256.

    Until the end a part may be seen: write into a folder that does not count yet.

    Args:
        location: the file.
        shapes: of the tensors.
        read: returns the tensor of a name; asked once for each, in the order of the file.
        number: the type that tensors are written as.
        kind: the metadata key.
        base_fingerprint: of the base model.

    Raises:
        SafetyDPOError: if a tensor has another shape than was said, or the place is not writable.
    """
    dtype = DTYPES[number]
    header: dict[str, object] = {"__metadata__": _metadata(kind, base_fingerprint)}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": number, "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors start at a multiple of eight bytes.
    text += b" " * (-len(text) % LENGTH_BYTES)
    digest = hashlib.sha256()
    location.parent.make_folder()
    with location.stream_out() as stream:
        for piece in (len(text).to_bytes(LENGTH_BYTES, "little"), text):
            stream.write(piece)
            digest.update(piece)
        for name in sorted(shapes):
            tensor = read(name).to("cpu", dtype).contiguous()
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise SafetyDPOError(
                    f"expected a tensor of shape {list(shapes[name])} for {name!r} in {location}, found "
                    f"{list(tensor.shape)}: collect them again"
                )
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            stream.write(data)
            digest.update(data)
    return digest.hexdigest()


def collected_from_bytes(data: bytes, *, kind: str, what: str, source: str, base_fingerprint: str) -> dict[str, Tensor]:
    """Return the tensors of a file written by `collected_to_bytes`; `what` names them in messages.

    Raises:
        SafetyDPOError: if the file is truncated, is of another kind, or was collected on another base model.
    """
    try:
        tensors = parse_tensors(data)
        found = parse_json(parse_tensor_header(data)["__metadata__"][kind])["base_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise SafetyDPOError(
            f"expected {what} at {source}, found {len(data):,} bytes that are none ({error}): collect them again"
        ) from error
    _check_base(found, what=what, source=source, base_fingerprint=base_fingerprint)
    return tensors


def open_collected(location: Location, *, kind: str, what: str, base_fingerprint: str) -> LazyTensors:
    """Return the tensors of such a file, each read when it is asked for.

    Raises:
        SafetyDPOError: as `collected_from_bytes`.
    """
    tensors = LazyTensors(location)
    try:
        found = parse_json(tensors.header_metadata[kind])["base_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise SafetyDPOError(
            f"expected {what} at {location}, found other tensors ({error}): collect them again"
        ) from error
    _check_base(found, what=what, source=str(location), base_fingerprint=base_fingerprint)
    return tensors


def _metadata(kind: str, base_fingerprint: str) -> dict[str, str]:
    return {kind: canonical_json({"base_fingerprint": base_fingerprint}).decode()}


def _check_base(found: str, *, what: str, source: str, base_fingerprint: str) -> None:
    if found != base_fingerprint:
        raise SafetyDPOError(
            f"expected {what} of base {base_fingerprint[:12]!r} at {source}, found base {found[:12]!r}: "
            "collect them on the base model of these experts"
        )
