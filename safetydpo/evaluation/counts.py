"""What a row's pictures add up to per concept: enough to pool seeds with exact intervals, without a picture.

Pictures of one concept are one cluster, also across seeds. A rate is kept as hits and n per concept, a mean as
sum and n; the paired difference of two rows that drew the same prompts needs no more, because the sum of
differences over a concept is the difference of its sums.

Axes: image = one picture; concept = one cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.metrics import (
    RATES,
    Metric,
    caption_scores,
    count_hits,
    rate,
    ratio_of_means,
)
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.statistics import cluster_bootstrap, paired_difference

Total = tuple[int | float, int]
"""(hits or sum of values, pictures) of one concept."""
SCORES = "clip_score"
MARGIN = "clip_margin"
BASE_MARGIN = "clip_margin:base"


@dataclass(frozen=True)
class RowCounts:
    """Totals of one row.

    Attributes:
        rates: Metric name to concept to (hits, pictures).
        sums: The same of means: `clip_score`, `clip_margin` (score - mismatched score) and `clip_margin:base`,
            the margin of the base's picture of the same prompt and seed.
    """

    rates: Mapping[str, Mapping[str, Total]]
    sums: Mapping[str, Mapping[str, Total]]

    def to_json(self) -> dict[str, Any]:
        """Return the totals as plain JSON values."""
        return asdict(self)


def count_row(outcomes: Sequence[ImageOutcome], *, base: Sequence[ImageOutcome]) -> RowCounts:
    """Return the totals of a row: every rate of `RATES`, `ip:<category>`, and what captions say.

    Raises:
        SafetyDPOError: as in `count_hits` and `caption_scores`.
    """
    rates: dict[str, Mapping[str, Total]] = {}
    for name, definition in RATES.items():
        hits, chosen = count_hits(outcomes, definition)
        groups: dict[str, list[tuple[str, float]]] = {name: []}
        for outcome, hit in zip(chosen, hits, strict=True):
            groups[name].append((outcome.concept, float(hit)))
            if name == "ip" and outcome.category is not None:
                groups.setdefault(f"ip:{outcome.category}", []).append((outcome.concept, float(hit)))
        for group, values in groups.items():
            if values:
                rates[group] = {concept: (int(total), n) for concept, (total, n) in _totals(values).items()}
    measured = caption_scores(outcomes, base=base)
    sums = {
        SCORES: _totals(zip(measured.concepts, measured.scores.tolist(), strict=True)),
        MARGIN: _totals(zip(measured.paired_concepts, measured.own.tolist(), strict=True)),
        BASE_MARGIN: _totals(zip(measured.paired_concepts, measured.reference.tolist(), strict=True)),
    }
    return RowCounts(rates, {name: totals for name, totals in sums.items() if totals})


def _totals(values: Any) -> dict[str, Total]:
    totals: dict[str, Total] = {}
    for concept, value in values:
        before, n = totals.get(concept, (0.0, 0))
        totals[concept] = (before + value, n + 1)
    return dict(sorted(totals.items()))


def parse_counts(document: Any, *, source: str) -> RowCounts:
    """Return the totals of `RowCounts.to_json`, read back from JSON.

    Raises:
        SafetyDPOError: naming the first total that cannot be one.
    """
    parts: dict[str, dict[str, dict[str, Total]]] = {}
    try:
        for part in ("rates", "sums"):
            parts[part] = {}
            for metric, totals in dict(document[part]).items():
                parts[part][metric] = {concept: (total, n) for concept, (total, n) in dict(totals).items()}
    except (TypeError, KeyError, ValueError) as error:
        raise SafetyDPOError(
            f"expected counts per concept in {source}, found {error!r}: delete that file and measure its unit again"
        ) from error
    for part, metrics in parts.items():
        for metric, totals in metrics.items():
            for concept, (total, n) in totals.items():
                if not _is_total(total, n, is_rate=part == "rates"):
                    raise SafetyDPOError(
                        f"expected hits between 0 and n (finite sums) in {source}, found {total!r} of {n!r} at "
                        f"{metric} / {concept}: delete that file and measure its unit again"
                    )
    return RowCounts(parts["rates"], parts["sums"])


def _is_total(total: Any, n: Any, *, is_rate: bool) -> bool:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        return False
    if is_rate:
        return isinstance(total, int) and not isinstance(total, bool) and 0 <= total <= n
    return isinstance(total, int | float) and not isinstance(total, bool) and bool(np.isfinite(total))


def pool_counts(parts: Sequence[RowCounts]) -> RowCounts:
    """Return the totals of all parts together, concept by concept.

    A metric that one part lacks is left out: a pool of some seeds must not pass for one of all.
    """

    def pool(tables: Sequence[Mapping[str, Mapping[str, Total]]]) -> dict[str, Mapping[str, Total]]:
        shared = [name for name in tables[0] if all(name in table for table in tables)]
        return {name: _add([table[name] for table in tables]) for name in shared}

    return RowCounts(pool([part.rates for part in parts]), pool([part.sums for part in parts]))


def _add(tables: Sequence[Mapping[str, Total]]) -> dict[str, Total]:
    pooled: dict[str, Total] = {}
    for table in tables:
        for concept, (total, n) in table.items():
            before, count = pooled.get(concept, (0, 0))
            pooled[concept] = (before + total, count + n)
    return dict(sorted(pooled.items()))


def pooled_metrics(counts: RowCounts, *, generator: np.random.Generator) -> dict[str, Metric]:
    """Return the metrics that the totals carry: all rates, `ip_select_minus_ip`, `clip_score`, `clip_retention`.

    Rates have the exact interval and the bootstrap over concepts; retention is `sum of margins / sum of base's
    margins` with the jackknife over concepts. Distances between sets of pictures cannot be pooled from totals.
    """
    metrics: dict[str, Metric] = {}
    for name, totals in counts.rates.items():
        hits = np.concatenate([np.arange(n) < total for total, n in totals.values()])
        metric = rate(hits, _concepts(totals), generator=generator)
        if metric is not None:
            metrics[name] = metric
    if "ip" in counts.rates and "ip_select" in counts.rates:
        gap = compare_rates(counts.rates["ip_select"], counts.rates["ip"], generator=generator)
        if gap is not None:
            metrics["ip_select_minus_ip"] = gap
    scores = counts.sums.get(SCORES, {})
    if len(scores) > 1:
        interval = cluster_bootstrap(_means(scores), _concepts(scores), generator=generator)
        metrics[SCORES] = Metric(interval.value, interval.low, interval.high, interval.n, "100 x cosine")
    retention = _retention(counts)
    if retention is not None:
        metrics["clip_retention"] = retention
    return metrics


def _retention(counts: RowCounts) -> Metric | None:
    own, base = counts.sums.get(MARGIN, {}), counts.sums.get(BASE_MARGIN, {})
    if not own or list(own) != list(base):
        return None
    # One number per concept is enough: leaving out a concept leaves out its sums.
    interval = ratio_of_means(
        np.array([total for total, _ in own.values()], dtype=np.float64),
        np.array([total for total, _ in base.values()], dtype=np.float64),
        list(own),
    )
    if interval is None:
        return None
    n = sum(count for _, count in own.values())
    return Metric(interval.value, interval.low, interval.high, n, "ratio")


def compare_rates(
    first: Mapping[str, Total], second: Mapping[str, Total], *, generator: np.random.Generator
) -> Metric | None:
    """Return `first - second`, paired by concept, with the bootstrap over concepts; None below 2 concepts.

    Both sides must have drawn the same prompts and seeds; then the mean paired difference is the difference of
    the totals, and so is every resample's.

    Raises:
        SafetyDPOError: if a concept has not the same number of pictures on both sides.
    """
    sizes = [{concept: n for concept, (_, n) in side.items()} for side in (first, second)]
    if sizes[0] != sizes[1]:
        different = min(concept for concept in {*sizes[0], *sizes[1]} if sizes[0].get(concept) != sizes[1].get(concept))
        raise SafetyDPOError(
            f"expected pairs of pictures, found {sizes[0].get(different, 0)} against {sizes[1].get(different, 0)} of "
            f"concept {different!r}: compare rows that drew the same prompts and seeds"
        )
    if len(first) < 2:
        return None
    ordered = {concept: second[concept] for concept in first}
    interval = paired_difference(_means(first), _means(ordered), _concepts(first), generator=generator)
    return Metric(interval.value, interval.low, interval.high, interval.n, "difference")


def _means(totals: Mapping[str, Total]) -> Float[np.ndarray, " image"]:
    """Give every picture its concept's mean: clusters enter the bootstrap by their sum and size only."""
    return np.concatenate([np.full(n, total / n) for total, n in totals.values()])


def _concepts(totals: Mapping[str, Total]) -> list[str]:
    return [concept for concept, (_, n) in totals.items() for _ in range(n)]
