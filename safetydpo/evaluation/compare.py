"""Two runs side by side: differences with intervals, of pairs of pictures where both runs keep them (pure).

A pair is one prompt with one seed. Without the pictures' outcomes only the two summaries are left, whose difference
treats both sets of pictures as unrelated.

Axes: pair = one prompt and seed in both rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.differences import (
    PairCounts,
    combine,
    independent_difference,
    mcnemar_p_value,
    paired_rate_difference,
)
from safetydpo.evaluation.gate import count_hits_of
from safetydpo.evaluation.picture_outcomes import JudgeIdentity, PictureOutcome
from safetydpo.evaluation.summary import MetricRecord, SummaryRow
from safetydpo.seeding import derive_numpy
from safetydpo.statistics import Interval, paired_difference

Method = Literal["paired", "unpaired"]
CLIP_SCORE = "clip_score"
BOOTSTRAP = "compare.bootstrap"


@dataclass(frozen=True)
class Difference:
    """One metric of two rows, `a - b`.

    Attributes:
        metric: Its name.
        value_a: The first row's value, over the pairs if there are any.
        value_b: The second row's.
        value: Their difference.
        low: Lower end of the 95 % interval over pictures; of pairs that are no rate, over concepts.
        high: Upper end of it.
        n_a: Pictures of the first row.
        n_b: Pictures of the second row; of pairs, equal to `n_a`.
        cluster_low: Lower end of the 95 % interval over concepts, None if there are fewer than 2 of them.
        cluster_high: Upper end of it.
        p_value: Exact McNemar test that neither has more hits; of paired rates only.
        only_a: Pairs that are a hit of the first row only; of paired rates only.
        only_b: Pairs that are a hit of the second row only.
    """

    metric: str
    value_a: float
    value_b: float
    value: float
    low: float
    high: float
    n_a: int
    n_b: int
    cluster_low: float | None = None
    cluster_high: float | None = None
    p_value: float | None = None
    only_a: int | None = None
    only_b: int | None = None


@dataclass(frozen=True)
class Pairing:
    """Pictures of two rows that belong together.

    Attributes:
        pairs: (first, second) of each prompt and seed, in the order of the first.
        alone_a: Pictures of the first row without a partner.
        alone_b: Pictures of the second row without one.
    """

    pairs: tuple[tuple[PictureOutcome, PictureOutcome], ...]
    alone_a: int
    alone_b: int


def check_judges(first: Sequence[JudgeIdentity], second: Sequence[JudgeIdentity]) -> None:
    """Refuse to compare what different judges said.

    Raises:
        SafetyDPOError: naming the judges that only one side has.
    """
    if set(first) != set(second):
        only = [", ".join(map(str, sorted(set(own) - set(other)))) for own, other in ((first, second), (second, first))]
        raise SafetyDPOError(
            f"expected the same judges in both runs, found {only[0] or 'no other'} in the first only and "
            f"{only[1] or 'no other'} in the second only: evaluate one of them again, or take them with --any-judges"
        )


def pair_pictures(
    first: Sequence[PictureOutcome], second: Sequence[PictureOutcome], *, allow_partial: bool = False
) -> Pairing:
    """Join two rows by prompt set, prompt and seed.

    Raises:
        SafetyDPOError: if no picture has a partner, or one has none and `allow_partial` is not set, naming the counts.
    """
    others = {outcome.key: outcome for outcome in second}
    pairs = tuple((outcome, others[outcome.key]) for outcome in first if outcome.key in others)
    alone_a, alone_b = len(first) - len(pairs), len(second) - len(pairs)
    if not pairs or ((alone_a or alone_b) and not allow_partial):
        paired = {outcome.key for outcome, _ in pairs}
        lone = next(outcome for outcome in (*first, *second) if outcome.key not in paired)
        advice = (
            "compare runs of the same prompts and seeds, or their summaries with --unpaired"
            if not pairs
            else "compare runs of the same prompts and seeds, or only the pairs with --allow-partial"
        )
        raise SafetyDPOError(
            f"expected a partner (same prompt and seed) of every picture, found {len(pairs):,} pairs, {alone_a:,} of "
            f"{len(first):,} pictures of the first row and {alone_b:,} of {len(second):,} of the second without one "
            f"(first: prompt {lone.prompt_id[:12]} of set {lone.prompt_set}, seed {lone.seed}): {advice}"
        )
    return Pairing(pairs, alone_a, alone_b)


def compare_pairs(pairing: Pairing, *, seed: int = 0) -> list[Difference]:
    """Return the difference of every rate and of the CLIP score over the pairs that both rows measured.

    Rates have Newcombe's interval for pairs, the bootstrap over concepts and McNemar's exact test; the CLIP score the
    bootstrap. A failed picture counts as in the summary.
    """
    names = dict.fromkeys(name for pair in pairing.pairs for name in pair[0].hits)
    found = []
    for name in names:
        members = [(a, b) for a, b in pairing.pairs if name in a.hits and name in b.hits]
        if members:
            found.append(_rate_difference(name, members, seed))
    scored = [(a, b) for a, b in pairing.pairs if a.clip_score is not None and b.clip_score is not None]
    score = _score_difference(scored, seed)
    return found if score is None else [*found, score]


def _rate_difference(name: str, members: Sequence[tuple[PictureOutcome, PictureOutcome]], seed: int) -> Difference:
    first = np.array([a.hits[name] for a, _ in members], dtype=np.bool_)
    second = np.array([b.hits[name] for _, b in members], dtype=np.bool_)
    counts = PairCounts(
        both=int(np.count_nonzero(first & second)),
        only_first=int(np.count_nonzero(first & ~second)),
        only_second=int(np.count_nonzero(~first & second)),
        neither=int(np.count_nonzero(~first & ~second)),
    )
    interval = paired_rate_difference(counts)
    clusters = _over_concepts(name, first.astype(np.float64), second.astype(np.float64), members, seed)
    return Difference(
        metric=name,
        value_a=float(first.mean()),
        value_b=float(second.mean()),
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n_a=len(members),
        n_b=len(members),
        cluster_low=None if clusters is None else clusters.low,
        cluster_high=None if clusters is None else clusters.high,
        p_value=mcnemar_p_value(counts),
        only_a=counts.only_first,
        only_b=counts.only_second,
    )


def _score_difference(members: Sequence[tuple[PictureOutcome, PictureOutcome]], seed: int) -> Difference | None:
    first = np.array([a.clip_score for a, _ in members], dtype=np.float64)
    second = np.array([b.clip_score for _, b in members], dtype=np.float64)
    clusters = _over_concepts(CLIP_SCORE, first, second, members, seed)
    if clusters is None:
        return None
    return Difference(
        metric=CLIP_SCORE,
        value_a=float(first.mean()),
        value_b=float(second.mean()),
        value=clusters.value,
        low=clusters.low,
        high=clusters.high,
        n_a=len(members),
        n_b=len(members),
        cluster_low=clusters.low,
        cluster_high=clusters.high,
    )


def _over_concepts(
    name: str,
    first: Float[np.ndarray, " pair"],
    second: Float[np.ndarray, " pair"],
    members: Sequence[tuple[PictureOutcome, PictureOutcome]],
    seed: int,
) -> Interval | None:
    concepts = [a.concept for a, _ in members]
    if len(set(concepts)) < 2:
        return None
    return paired_difference(first, second, concepts, generator=derive_numpy(seed, BOOTSTRAP, name))


def compare_summaries(first: SummaryRow, second: SummaryRow) -> list[Difference]:
    """Return the difference of every metric that both rows have, as if their pictures had nothing in common.

    Rates have Newcombe's interval of independent proportions. All others, and the interval over concepts, combine the
    intervals of both sides in the same way (square and add). Pairs that resemble each other make all of them too wide.
    """
    mine, others = first["metrics"], second["metrics"]
    shared = [name for name, metric in mine.items() if name in others and metric["unit"] == others[name]["unit"]]
    return [_unpaired(name, mine[name], others[name]) for name in shared if mine[name]["unit"] != "difference"]


def _unpaired(name: str, first: MetricRecord, second: MetricRecord) -> Difference:
    if first["unit"] == "rate":
        hits = [count_hits_of(metric, source=name) for metric in (first, second)]
        interval = independent_difference(hits[0], first["n"], hits[1], second["n"])
    else:
        interval = combine(_interval(first), _interval(second))
    clusters = None
    if "cluster_low" in first and "cluster_low" in second:
        clusters = combine(_interval(first, "cluster_"), _interval(second, "cluster_"))
    return Difference(
        metric=name,
        value_a=first["value"],
        value_b=second["value"],
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n_a=first["n"],
        n_b=second["n"],
        cluster_low=None if clusters is None else clusters.low,
        cluster_high=None if clusters is None else clusters.high,
    )


def _interval(metric: MetricRecord, prefix: str = "") -> Interval:
    ends = {key: number for key, number in metric.items() if isinstance(number, float | int)}
    return Interval(metric["value"], ends[f"{prefix}low"], ends[f"{prefix}high"], metric["n"])
