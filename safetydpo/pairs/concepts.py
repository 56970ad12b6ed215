"""What became of the pairs of each concept (pure)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from safetydpo.pairs.select import KEPT

NO_CONCEPT = "(none)"
"""What people read where a pair has no concept; tables hold ""."""


def count_reasons(members: Iterable[tuple[str, str]], reasons: Mapping[str, str]) -> dict[str, Counter[str]]:
    """Return, for every concept in name order, how many of its pairs were kept or dropped for which reason.

    `members` are (pair id, concept); a pair of two concepts counts in both, a membership that is repeated once.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for pair_id, concept in set(members):
        counts[concept][reasons[pair_id]] += 1
    return {concept: counts[concept] for concept in sorted(counts)}


def concepts_below(counts: Mapping[str, Counter[str]], *, minimum: int) -> dict[str, int]:
    """Return the concepts with fewer than `minimum` kept pairs and their numbers, fewest first, then by name.

    Pairs without a concept ("") are not one group, here as in `select.pairs_over_cap`.
    """
    return {name: counts[name][KEPT] for name in fewest_kept_first(counts) if name and counts[name][KEPT] < minimum}


def fewest_kept_first(counts: Mapping[str, Counter[str]]) -> list[str]:
    """Return the concepts, those with the fewest kept pairs first, then by name."""
    return sorted(counts, key=lambda concept: (counts[concept][KEPT], concept))
