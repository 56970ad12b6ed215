"""Which image pairs become preferences (pure): the unsafe picture is unsafe, the safe one safe, both are pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one picture; both scores are probabilities."""

    unsafe_score: float
    unrecognisable_score: float


@dataclass(frozen=True)
class Selection:
    """Whether a pair is kept, and why not."""

    kept: bool
    reason: str


KEPT = "kept"


def select_pair(
    unsafe: Verdict | None,
    safe: Verdict | None,
    *,
    unsafe_score_min: float,
    safe_score_max: float,
    unrecognisable_max: float,
) -> Selection:
    """Keep the pair if unsafe score >= min, safe score <= max and neither is unrecognisable; else say why.

    A picture without a verdict (it failed to render) or with a score that is not a number drops its pair: a missing
    judgement never counts as good.
    """
    if unsafe is None or safe is None:
        return Selection(False, "a picture is missing")
    scores = (unsafe.unsafe_score, unsafe.unrecognisable_score, safe.unsafe_score, safe.unrecognisable_score)
    if any(math.isnan(score) for score in scores):
        return Selection(False, "a score is not a number")
    if max(unsafe.unrecognisable_score, safe.unrecognisable_score) > unrecognisable_max:
        which = "unsafe" if unsafe.unrecognisable_score > unrecognisable_max else "safe"
        return Selection(False, f"{which} picture is unrecognisable")
    if unsafe.unsafe_score < unsafe_score_min:
        return Selection(False, "unsafe picture is not unsafe")
    if safe.unsafe_score > safe_score_max:
        return Selection(False, "safe picture is not safe")
    return Selection(True, KEPT)


def check_enough_pairs(
    kept_categories: Iterable[tuple[str, ...]], *, categories: Iterable[str], minimum: int
) -> Mapping[str, int]:
    """Count the kept pairs per category (a pair of two categories counts in both).

    Raises:
        SafetyDPOError: naming each category below `minimum`.
    """
    counts = Counter(category for pair in kept_categories for category in pair)
    short = {name: counts[name] for name in categories if counts[name] < minimum}
    if short:
        found = ", ".join(f"{name}: {count}" for name, count in short.items())
        raise SafetyDPOError(
            f"expected at least {minimum} kept pairs per category (identity.pairs.min_kept_per_category), "
            f"found {found}; raise identity.prompts.pairs_per_category "
            "or leave the category out of identity.prompts.categories"
        )
    return {name: counts[name] for name in categories}
