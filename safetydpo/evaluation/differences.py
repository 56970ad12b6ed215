"""Differences of two rates with intervals: of pairs, of unrelated pictures, and of numbers with intervals (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from scipy import stats

from safetydpo.statistics import Interval


@dataclass(frozen=True)
class PairCounts:
    """How many pairs of pictures are a hit on both sides, on the first only, on the second only, on neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    def __post_init__(self) -> None:
        if min(self.both, self.only_first, self.only_second, self.neither) < 0 or self.n < 1:
            raise ValueError(f"expected counts of at least 0 and at least 1 pair, found {self}")

    @property
    def n(self) -> int:
        """All pairs."""
        return self.both + self.only_first + self.only_second + self.neither


def mcnemar_p_value(counts: PairCounts) -> float:
    """Return the exact two-sided p-value that neither side has more hits than the other.

    Of the m discordant pairs, those with a hit on the first side only are binomial (m, 1/2) then:
    `p = min(1, 2 P(X <= min(only_first, only_second)))`; 1 without a discordant pair.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
    """
    discordant = counts.only_first + counts.only_second
    if discordant == 0:
        return 1.0
    fewer = min(counts.only_first, counts.only_second)
    return min(1.0, 2.0 * float(stats.binom.cdf(fewer, discordant, 0.5)))


def independent_difference(hits_a: int, n_a: int, hits_b: int, n_b: int, *, confidence: float = 0.95) -> Interval:
    """Return `a/n_a - b/n_b` of unrelated pictures with the hybrid score interval; n is the smaller of both.

    With the Wilson interval (l, u) of each side: `low = d - sqrt((p_a - l_a)^2 + (u_b - p_b)^2)` and
    `high = d + sqrt((u_a - p_a)^2 + (p_b - l_b)^2)`.

    Raises:
        ValueError: if hits are not in [0, n], an n is below 1, or `confidence` is not in (0, 1).

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    return combine(wilson(hits_a, n_a, confidence=confidence), wilson(hits_b, n_b, confidence=confidence))


def paired_rate_difference(counts: PairCounts, *, confidence: float = 0.95) -> Interval:
    """Return the difference of two rates over the same pairs with the hybrid score interval.

    As for unrelated pictures, less `2 phi` times the product of both distances under each root, phi the correlation of
    both sides with a correction for continuity. It treats pairs as independent.

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
        paired data", method 10.
    """
    n = counts.n
    first = wilson(counts.both + counts.only_first, n, confidence=confidence)
    second = wilson(counts.both + counts.only_second, n, confidence=confidence)
    return combine(first, second, correlation=_correlation(counts))


def _correlation(counts: PairCounts) -> float:
    a, b, c, d = counts.both, counts.only_first, counts.only_second, counts.neither
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    numerator = float(a * d - b * c)
    if numerator > 0:
        numerator = max(numerator - counts.n / 2, 0.0)
    return numerator / sqrt(margins)


def wilson(hits: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return a rate with its score interval.

    Raises:
        ValueError: if hits are not in [0, n], n is below 1, or `confidence` is not in (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1:
        raise ValueError(f"expected at least 1 picture, found n = {n}: leave the rate out")
    found = stats.binomtest(hits, n).proportion_ci(confidence_level=confidence, method="wilson")
    value = hits / n
    return Interval(value=value, low=min(float(found.low), value), high=max(float(found.high), value), n=n)


def combine(first: Interval, second: Interval, *, correlation: float = 0.0) -> Interval:
    """Return `first - second` with an interval from both intervals; n is the smaller of both.

    `low = d - sqrt(x^2 - 2 r x y + y^2)` with x the way of the first down, y of the second up; `high` alike.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures: a general approach"; with
        Wilson intervals it is Newcombe's method 10.
    """
    value = first.value - second.value

    def reach(x: float, y: float) -> float:
        # Rounding alone can put the square below 0.
        return sqrt(max(x * x - 2.0 * correlation * x * y + y * y, 0.0))

    low = value - reach(first.value - first.low, second.high - second.value)
    high = value + reach(first.high - first.value, second.value - second.low)
    return Interval(value=value, low=low, high=high, n=min(first.n, second.n))
