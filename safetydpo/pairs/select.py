"""Which image pairs become preferences (pure).

The unsafe picture is unsafe, the safe one safe, both are pictures, their layouts are close enough, and no concept takes
more than its share.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from safetydpo.errors import SafetyDPOError


# With slots: there may be a million of each.
@dataclass(frozen=True, slots=True)
class Verdict:
    """What judges say of one picture; both scores are probabilities, None = no judge knows."""

    unsafe_score: float
    unrecognisable_score: float | None


@dataclass(frozen=True)
class Distance:
    """How far apart the layouts of a pair's pictures are by one measure, and how far apart they may be."""

    measure: str
    value: float
    limit: float


@dataclass(frozen=True, slots=True)
class Selection:
    """Whether a pair is kept, and why not."""

    kept: bool
    reason: str


KEPT = "kept"
MISSING = "a picture is missing"
NO_VERDICT = "a judge has no verdict on a picture"
CAPPED = "its concept has enough better pairs"


def combine_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the strictest reading of several judges of one picture: the greatest of each score.

    Judges that do not know whether a picture is recognisable have no part in that score; it is None if none of them
    does. A score that is not a number makes the result one too, wherever it stands.

    Raises:
        ValueError: if there is no verdict.
    """
    if not verdicts:
        raise ValueError("expected at least one verdict on a picture, found none")
    known = [verdict.unrecognisable_score for verdict in verdicts if verdict.unrecognisable_score is not None]
    return Verdict(_greatest([verdict.unsafe_score for verdict in verdicts]), _greatest(known) if known else None)


def _greatest(scores: Sequence[float]) -> float:
    # max() passes over NaN or returns it, depending on its place.
    return math.nan if any(math.isnan(score) for score in scores) else max(scores)


def select_pair(
    unsafe: Verdict | None,
    safe: Verdict | None,
    *,
    unsafe_score_min: float,
    safe_score_max: float,
    unrecognisable_max: float,
    distances: Sequence[Distance] = (),
) -> Selection:
    """Keep the pair if unsafe score >= min, safe score <= max, neither is unrecognisable and no distance is above its
    limit; else say which rule failed first.

    A picture without a verdict (it failed to render) or with a score that is not a number drops its pair: a missing
    judgement never counts as good. A judge that does not know whether a picture is recognisable drops nothing.
    """
    if unsafe is None or safe is None:
        return Selection(False, MISSING)
    blurs = {"unsafe": unsafe.unrecognisable_score, "safe": safe.unrecognisable_score}
    known = {side: score for side, score in blurs.items() if score is not None}
    numbers = (unsafe.unsafe_score, safe.unsafe_score, *known.values(), *(distance.value for distance in distances))
    if any(math.isnan(number) for number in numbers):
        return Selection(False, "a score is not a number")
    for side, score in known.items():
        if score > unrecognisable_max:
            return Selection(False, f"{side} picture is unrecognisable")
    if unsafe.unsafe_score < unsafe_score_min:
        return Selection(False, "unsafe picture is not unsafe")
    if safe.unsafe_score > safe_score_max:
        return Selection(False, "safe picture is not safe")
    for distance in distances:
        if distance.value > distance.limit:
            return Selection(False, f"layouts are too far apart ({distance.measure})")
    return Selection(True, KEPT)


@dataclass(frozen=True)
class Candidate:
    """A good pair that competes for a place of its concept."""

    pair_id: str
    concept: str
    margin: float
    """Unsafe score of the unsafe picture minus that of the safe one."""


def pairs_over_cap(candidates: Iterable[Candidate], *, maximum: int) -> set[str]:
    """Return the ids of the pairs that lose their place: all but the best `maximum` of each concept.

    Best first means the greater margin, then the smaller id. So what a concept keeps depends neither on the order of
    the candidates nor on other concepts. Candidates without a concept ("") share none and keep their places.

    Raises:
        ValueError: if `maximum` is below 1, or a candidate stands there twice.
    """
    if maximum < 1:
        raise ValueError(f"expected to keep at least 1 pair per concept, found a maximum of {maximum}")
    concepts: dict[str, list[Candidate]] = defaultdict(list)
    seen: set[str] = set()
    for candidate in candidates:
        if candidate.pair_id in seen:
            raise ValueError(f"expected each candidate once, found {candidate.pair_id!r} twice")
        seen.add(candidate.pair_id)
        if candidate.concept:
            concepts[candidate.concept].append(candidate)
    losers: set[str] = set()
    for members in concepts.values():
        ranked = sorted(members, key=lambda candidate: (-candidate.margin, candidate.pair_id))
        losers |= {candidate.pair_id for candidate in ranked[maximum:]}
    return losers


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
