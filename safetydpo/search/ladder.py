"""Which candidates a cheap measurement lets go on, and how well it ranks them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from safetydpo.config.rungs import RungConfig

LEAST_PAIRS = 5
"""Candidates below which a rank correlation says nothing that a promotion should go by."""


@dataclass(frozen=True)
class RankCorrelation:
    """How alike two measurements put the same candidates in order.

    Attributes:
        spearman: Spearman's rho in [-1, 1]; None where it is not defined (fewer than 2 candidates, or all equal).
        kendall: Kendall's tau-b in [-1, 1]; None as above.
        n: candidates measured by both.
    """

    spearman: float | None
    kendall: float | None
    n: int


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> RankCorrelation:
    """Return the rank correlation of two measurements of the same candidates, in the same order.

    Source: Kendall 1945, "The treatment of ties in ranking problems" (tau-b); Spearman's rho with mean ranks of ties.

    Raises:
        ValueError: if there are not as many of one as of the other.
    """
    if len(one) != len(other):
        raise ValueError(f"expected one value of each measurement per candidate, found {len(one)} and {len(other)}")
    if len(one) < 2 or len(set(one)) == 1 or len(set(other)) == 1:
        return RankCorrelation(None, None, len(one))
    spearman, kendall = stats.spearmanr(one, other).statistic, stats.kendalltau(one, other).statistic
    return RankCorrelation(float(spearman), float(kendall), len(one))


def promote(values: Mapping[int, float], *, keep: float, always: Collection[int] = ()) -> list[int]:
    """Return the trials that go on: the `ceil(keep * n)` lowest of n values and those of `always`, in rising order.

    Of equal values the smaller trial number goes on. The small amount below keeps 0.1 * 30 at 3 in floating point.
    """
    if not values:
        return []
    count = max(1, math.ceil(keep * len(values) - 1e-9))
    ranked = sorted(values, key=lambda trial: (values[trial], trial))
    return sorted({*ranked[:count], *(trial for trial in values if trial in always)})


def count_promoted_at_once(trials: int, *, rungs: Sequence[RungConfig]) -> list[float]:
    """Return how many trials are expected at each rung and, last, in full, where a rung decides about each at once.

    Of candidates in random order the n-th goes on with the chance `ceil(keep * n) / n`, and the first `calibrate` do in
    any case. Rungs are taken to decide always.
    """
    counts = [float(trials)]
    for rung in rungs:
        arrivals = math.ceil(counts[-1])
        chances = [min(1.0, math.ceil(rung.keep * n - 1e-9) / n) for n in range(1, arrivals + 1)]
        chances[: rung.calibrate] = [1.0] * min(rung.calibrate, arrivals)
        # Of the last one there is a part only.
        chances[-1:] = [chance * (1.0 - (arrivals - counts[-1])) for chance in chances[-1:]]
        counts.append(math.fsum(chances))
    return counts


def count_promoted(trials: int, *, generation: int, rungs: Sequence[RungConfig]) -> list[int]:
    """Return how many trials are measured at each rung and, last, in full, where generations climb the rungs together.

    With `calibrate` at most so many: its trials may be among the favourites anyway. Rungs are taken to decide always.
    """
    counts = [0] * (len(rungs) + 1)
    for first in range(0, trials, generation):
        left = min(generation, trials - first)
        always = [max(0, min(first + left, rung.calibrate) - first) for rung in rungs]
        for level, rung in enumerate(rungs):
            counts[level] += left
            left = min(left, max(1, math.ceil(rung.keep * left - 1e-9)) + always[level])
        counts[-1] += left
    return counts


def is_trusted(correlation: RankCorrelation, *, least: float) -> bool:
    """Return whether a rung may stop candidates: nothing is asked of it, little is known yet, or it ranks well enough.

    A correlation that is not defined counts as 0.
    """
    if least <= -1.0 or correlation.n < LEAST_PAIRS:
        return True
    return (correlation.spearman or 0.0) >= least
