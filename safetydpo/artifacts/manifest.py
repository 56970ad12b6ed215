"""The list of work of a stage, and the comparison of what was asked with what stands there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def verify_rows(wanted: Iterable[str], found: Sequence[str], failed: Iterable[str] = ()) -> Verification:
    """Compare the wanted row ids with the ids found.

    Raises:
        SafetyDPOError: if `wanted` itself names a row twice.
    """
    wanted_list = list(wanted)
    wanted_set = set(wanted_list)
    if len(wanted_set) != len(wanted_list):
        twice = sorted(row for row, times in Counter(wanted_list).items() if times > 1)
        raise SafetyDPOError(
            f"expected each row once in the manifest, found {twice[0]!r} {wanted_list.count(twice[0])} times"
        )
    counts = Counter(found)
    return Verification(
        missing=tuple(sorted(wanted_set - counts.keys())),
        duplicated=tuple(sorted(row for row, times in counts.items() if times > 1)),
        unexpected=tuple(sorted(counts.keys() - wanted_set)),
        failed=tuple(sorted(set(failed))),
    )
