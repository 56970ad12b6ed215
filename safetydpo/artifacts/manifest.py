"""The list of work of a stage, and the comparison of what was asked with what stands there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class Verification:
    """Outcome of an anti-join of a manifest with the rows found."""

    missing: tuple[str, ...]
    duplicated: tuple[str, ...]
    unexpected: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every wanted row stands there exactly once and no other does (failed rows included)."""
        return not (self.missing or self.duplicated or self.unexpected)


def verify_rows(
    wanted: pa.Array | Iterable[str], found: pa.Array | Iterable[str], failed: Iterable[str] = ()
) -> Verification:
    """Compare the wanted row ids with the ids found.

    Arrow arrays of a million ids are compared in seconds, without a Python object for each.

    Raises:
        SafetyDPOError: if `wanted` itself names a row twice.
    """
    asked, there = _as_array(wanted), _as_array(found)
    if twice := _repeated(asked):
        times = pc.sum(pc.equal(asked, twice[0])).as_py()
        raise SafetyDPOError(f"expected each row once in the manifest, found {twice[0]!r} {times} times")
    return Verification(
        missing=_absent(asked, there),
        duplicated=tuple(_repeated(there)),
        unexpected=_absent(there, asked),
        failed=tuple(sorted(set(failed))),
    )


def _as_array(ids: pa.Array | Iterable[str]) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        return ids.combine_chunks()
    return ids if isinstance(ids, pa.Array) else pa.array(list(ids), type=pa.string())


def _repeated(ids: pa.Array) -> list[str]:
    counts = pc.value_counts(ids)
    return sorted(counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist())


def _absent(ids: pa.Array, among: pa.Array) -> tuple[str, ...]:
    return tuple(sorted(set(ids.filter(pc.invert(pc.is_in(ids, value_set=among))).to_pylist())))
