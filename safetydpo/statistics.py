"""Intervals for what a run measures: exact ones for rates, cluster ones for everything pooled over concepts.

Pure numpy and scipy; no torch, no file, no global randomness. Pictures of one concept resemble each other, so
an interval that treats them as independent is too narrow: cluster intervals resample (or leave out) concepts.

Axes: value = one measured picture; other = its partner in a pair; resample = one bootstrap draw; cluster = one concept;
rate = one of many rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A measured number with its two-sided confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
        n: Pictures (or pairs of pictures) that the estimate rests on.
    """

    value: float
    low: float
    high: float
    n: int


def clopper_pearson(hits: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return the exact two-sided interval of a rate.

    `low = BetaQuantile(a/2; hits, n - hits + 1)` (0 at no hits) and
    `high = BetaQuantile(1 - a/2; hits + 1, n - hits)` (1 at all hits), with `a = 1 - confidence`.

    Raises:
        ValueError: if `n < 1`, `hits` is not in [0, n], or `confidence` is not in (0, 1).

    Source: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the
        binomial", section 4.
    """
    _check_confidence(confidence)
    if n < 1:
        raise ValueError(f"expected at least 1 trial, found n = {n}: leave the rate out instead of calling it zero")
    if not 0 <= hits <= n:
        raise ValueError(f"expected hits between 0 and n = {n}, found {hits}: count each picture once")
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(stats.beta.ppf(1.0 - tail, hits + 1, n - hits))
    return Interval(value=hits / n, low=low, high=high, n=n)


def clopper_pearson_ends(
    hits: Int[np.ndarray, " rate"], n: Int[np.ndarray, " other"], *, confidence: float = 0.95
) -> tuple[Float[np.ndarray, " rate"], Float[np.ndarray, " rate"]]:
    """Return the ends of many intervals of `clopper_pearson` at once.

    Raises:
        ValueError: as it does, or if the lengths differ.
    """
    _check_confidence(confidence)
    hits, n = np.asarray(hits, dtype=np.int64), np.asarray(n, dtype=np.int64)
    if hits.shape != n.shape or (n < 1).any() or (hits < 0).any() or (hits > n).any():
        raise ValueError(f"expected hits between 0 and n for each of {len(hits)} rates, n at least 1, found others")
    tail = (1.0 - confidence) / 2.0
    # The quantile of no hits, or of all, is none: a beta distribution has no parameter 0.
    low = np.where(hits == 0, 0.0, stats.beta.ppf(tail, np.maximum(hits, 1), n - hits + 1))
    high = np.where(hits == n, 1.0, stats.beta.ppf(1.0 - tail, hits + 1, np.maximum(n - hits, 1)))
    return low.astype(np.float64), high.astype(np.float64)


def cluster_bootstrap(
    values: Float[np.ndarray, " value"],
    clusters: Sequence[str],
    *,
    generator: np.random.Generator,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Return the pooled mean with the percentile interval of a bootstrap over whole clusters.

    Each resample draws as many clusters as there are, with replacement, and pools their values:
    `mean* = sum of drawn cluster sums / sum of drawn cluster sizes`. With every value equal the interval
    collapses to a point, so for a rate it never stands without the exact one.

    Raises:
        ValueError: if the lengths differ, a value is not finite, there are fewer than 2 clusters or 1
            resample, or `confidence` is not in (0, 1).

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8 (strategy 1).
    """
    _check_confidence(confidence)
    if num_resamples < 1:
        raise ValueError(f"expected at least 1 resample, found {num_resamples}: raise num_resamples")
    values = np.asarray(values, dtype=np.float64)
    codes, num_clusters = _cluster_codes(values, clusters)
    sums = np.bincount(codes, weights=values, minlength=num_clusters)
    sizes = np.bincount(codes, minlength=num_clusters).astype(np.float64)
    # How often each cluster is drawn is multinomial: one matrix instead of a loop over resamples.
    chances = np.full(num_clusters, 1.0 / num_clusters)
    draws = generator.multinomial(num_clusters, chances, size=num_resamples).astype(np.float64)
    means = (draws @ sums) / (draws @ sizes)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    value = float(values.mean())
    # Rounding alone can put the estimate a hair outside a collapsed interval.
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value), n=len(values))


def paired_difference(
    values_a: Float[np.ndarray, " value"],
    values_b: Float[np.ndarray, " other"],
    clusters: Sequence[str],
    *,
    generator: np.random.Generator,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Return the mean of `a - b` over pairs (same prompt, same seed) with its cluster bootstrap interval.

    Raises:
        ValueError: if the two sides differ in length, or as in `cluster_bootstrap`.
    """
    if len(values_a) != len(values_b):
        raise ValueError(
            f"expected pairs, found {len(values_a)} values against {len(values_b)}: pair by prompt and seed"
        )
    return cluster_bootstrap(
        np.asarray(values_a, dtype=np.float64) - np.asarray(values_b, dtype=np.float64),
        clusters,
        generator=generator,
        num_resamples=num_resamples,
        confidence=confidence,
    )


def exact_paired_difference(more: int, fewer: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return the difference of two rates over the same `n` pairs, exact given how many pairs are discordant.

    Of `m = more + fewer` discordant pairs, `more` are hits of the first side only, a binomial share p of m. With
    (p_low, p_high) by `clopper_pearson(more, m)`, the ends are `(2 p - 1) m / n` and the value `(more - fewer) / n`.
    Pairs without a discordant one say nothing of p: the interval is then `[0, 0]`, given that m = 0. It takes pairs as
    independent, so that it never stands without the interval over clusters.

    Args:
        more: Pairs that are a hit of the first side only.
        fewer: Pairs that are a hit of the second side only.
        n: All pairs.
        confidence: Coverage, given m.

    Raises:
        ValueError: if `n < 1`, a count is negative, both together exceed `n`, or `confidence` is not in (0, 1).

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions", with the
        interval of Clopper and Pearson 1934 in place of its normal approximation.
    """
    _check_confidence(confidence)
    if n < 1:
        raise ValueError(
            f"expected at least 1 pair, found n = {n}: leave the difference out instead of calling it zero"
        )
    discordant = more + fewer
    if more < 0 or fewer < 0 or discordant > n:
        raise ValueError(
            f"expected discordant pairs between 0 and n = {n}, found {more} and {fewer}: count each pair once"
        )
    if discordant == 0:
        return Interval(value=0.0, low=0.0, high=0.0, n=n)
    share = clopper_pearson(more, discordant, confidence=confidence)
    low, high = ((2.0 * end - 1.0) * discordant / n for end in (share.low, share.high))
    return Interval(value=(more - fewer) / n, low=low, high=high, n=n)


def cluster_jackknife(
    statistic: Callable[[Bool[np.ndarray, " value"]], float],
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
) -> Interval:
    """Return a smooth statistic with a symmetric interval from leaving out one cluster at a time.

    With g clusters and `theta_i` the statistic without cluster i:
    `se^2 = (g - 1)/g * sum (theta_i - mean theta)^2`, interval `theta +- t(1 - a/2; g - 1) * se`. Meant for
    distances between sets of pictures, which a bootstrap shifts upwards because it repeats pictures.

    Args:
        statistic: Takes a mask of the values to keep and returns the number.
        clusters: Cluster of each value.
        confidence: Coverage aimed at.

    Raises:
        ValueError: if there are fewer than 2 clusters, the statistic is not finite, or `confidence` is not in
            (0, 1).

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", equation 11.5.
    """
    _check_confidence(confidence)
    codes, num_clusters = _cluster_codes(np.zeros(len(clusters)), clusters)
    value = float(statistic(np.ones(len(clusters), dtype=np.bool_)))
    without = np.array([float(statistic(codes != cluster)) for cluster in range(num_clusters)])
    if not (np.isfinite(value) and np.isfinite(without).all()):
        raise ValueError(
            "expected a finite statistic without any one cluster, found a NaN or infinity: give more clusters"
        )
    spread = float(np.sum((without - without.mean()) ** 2))
    standard_error = float(np.sqrt((num_clusters - 1) / num_clusters * spread))
    reach = float(stats.t.ppf(0.5 + confidence / 2.0, num_clusters - 1)) * standard_error
    return Interval(value=value, low=value - reach, high=value + reach, n=len(clusters))


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"expected a confidence in (0, 1), found {confidence}: 0.95 means 95 %")


def _cluster_codes(
    values: Float[np.ndarray, " value"], clusters: Sequence[str]
) -> tuple[Int[np.ndarray, " value"], int]:
    """Return each value's cluster as a number (names sorted) and how many clusters there are."""
    if len(values) != len(clusters):
        raise ValueError(f"expected one cluster per value, found {len(clusters)} for {len(values)} values")
    if not np.isfinite(values).all():
        raise ValueError("expected finite values, found a NaN or infinity: decide how a failed picture counts first")
    names, codes = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"expected at least 2 clusters, found {len(names)}: one concept says nothing about others")
    return codes, len(names)
