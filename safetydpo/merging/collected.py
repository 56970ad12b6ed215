"""Tensors that were collected on a base model, as safetensors bytes that name the base they belong to."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.lazy_tensors import LazyTensors
from safetydpo.artifacts.schemas import canonical_json
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tensor_files import parse_tensor_header, parse_tensors
from safetydpo.errors import SafetyDPOError


def collected_to_bytes(tensors: Mapping[str, Tensor], *, kind: str, base_fingerprint: str) -> bytes:
    """Return tensors as a safetensors file; equal tensors in any order give equal bytes.

    `kind` is the metadata key, so that a file of one kind is not read as another.
    """
    ordered = {name: tensors[name].to("cpu").contiguous() for name in sorted(tensors)}
    return save(ordered, metadata={kind: canonical_json({"base_fingerprint": base_fingerprint}).decode()})


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


def _check_base(found: str, *, what: str, source: str, base_fingerprint: str) -> None:
    if found != base_fingerprint:
        raise SafetyDPOError(
            f"expected {what} of base {base_fingerprint[:12]!r} at {source}, found base {found[:12]!r}: "
            "collect them on the base model of these experts"
        )
