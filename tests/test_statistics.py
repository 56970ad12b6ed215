from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safetydpo.statistics import (
    clopper_pearson,
    clopper_pearson_ends,
    cluster_bootstrap,
    cluster_jackknife,
    exact_paired_difference,
    paired_difference,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_no_hits_of_twenty_by_hand() -> None:
    """P(no hit of 20) = (1 - p)^20 = 0.025 at the upper end: p = 1 - 0.025^(1/20) = 0.1684."""
    interval = clopper_pearson(0, 20)
    assert interval.value == 0.0
    assert interval.low == 0.0
    assert interval.high == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-12)
    assert round(interval.high, 3) == 0.168
    assert interval.n == 20


def test_all_hits_of_one_by_hand() -> None:
    """P(hit of 1) = p = 0.025 at the lower end."""
    interval = clopper_pearson(1, 1)
    assert (interval.low, interval.high) == (pytest.approx(0.025), 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_exact_interval_equals_scipys_binomial_test(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    ours = clopper_pearson(hits, n)
    theirs = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.data())
def test_exact_interval_holds_the_rate_and_mirrors(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    interval, mirrored, wider = (
        clopper_pearson(hits, n),
        clopper_pearson(n - hits, n),
        clopper_pearson(hits, n, confidence=0.99),
    )
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-9)
    assert wider.low <= interval.low
    assert interval.high <= wider.high


@pytest.mark.parametrize(
    ("hits", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "expected at least 1 trial, found n = 0"),
        (3, 2, 0.95, "expected hits between 0 and n = 2, found 3"),
        (-1, 2, 0.95, "expected hits between 0 and n = 2, found -1"),
        (1, 2, 95.0, r"expected a confidence in \(0, 1\), found 95.0"),
    ],
)
def test_exact_interval_refuses(hits: int, n: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clopper_pearson(hits, n, confidence=confidence)


def test_two_opposite_clusters_by_hand() -> None:
    """Draws of (a, b): aa 1/4 -> 1, ab or ba 1/2 -> 0.5, bb 1/4 -> 0: the 95 % interval is all of [0, 1]."""
    interval = cluster_bootstrap(np.array([1.0, 1, 0, 0]), ["a", "a", "b", "b"], generator=rng())
    assert (interval.value, interval.low, interval.high, interval.n) == (0.5, 0.0, 1.0, 4)


def test_bootstrap_equals_the_enumeration_of_all_resamples() -> None:
    """Five clusters of unequal size: 5^5 = 3125 equally likely resamples, listed one by one."""
    clusters = ["a"] * 2 + ["b"] * 3 + ["c"] * 5 + ["d"] * 4 + ["e"] * 6
    values = rng(3).random(len(clusters))
    groups = [values[np.array(clusters) == name] for name in "abcde"]
    means = [np.concatenate([groups[i] for i in draw]).mean() for draw in itertools.product(range(5), repeat=5)]
    interval = cluster_bootstrap(values, clusters, generator=rng(), num_resamples=200_000)
    low, high = np.quantile(means, [0.025, 0.975])
    assert interval.value == pytest.approx(values.mean())
    # Monte Carlo error of a 2.5 % quantile of 200,000 draws is below 0.002 at this spread.
    assert interval.low == pytest.approx(low, abs=2e-3)
    assert interval.high == pytest.approx(high, abs=2e-3)


def test_bootstrap_agrees_with_a_plain_loop() -> None:
    clusters = [f"c{i % 20}" for i in range(140)]
    values = (rng(1).random(140) < np.repeat([0.1, 0.6], 70)).astype(float)
    generator, names = rng(9), sorted(set(clusters))
    groups = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in names}
    means = []
    for _ in range(4000):
        pooled = [value for name in generator.choice(names, size=len(names)) for value in groups[name]]
        means.append(sum(pooled) / len(pooled))
    interval = cluster_bootstrap(values, clusters, generator=rng(2), num_resamples=4000)
    low, high = np.quantile(means, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcd")), min_size=2, max_size=40), st.integers(0, 99))
def test_bootstrap_is_ordered_reproducible_and_blind_to_row_order(rows: list[tuple[float, str]], seed: int) -> None:
    rows = [*rows, (0.0, "a"), (1.0, "b")]
    first = cluster_bootstrap(np.array([v for v, _ in rows]), [c for _, c in rows], generator=rng(seed))
    rows.reverse()
    second = cluster_bootstrap(np.array([v for v, _ in rows]), [c for _, c in rows], generator=rng(seed))
    assert first.low <= first.value <= first.high
    assert first.low == pytest.approx(second.low, abs=1e-9)
    assert first.high == pytest.approx(second.high, abs=1e-9)


def test_bootstrap_collapses_at_zero_hits() -> None:
    interval = cluster_bootstrap(np.zeros(20), [f"c{i % 5}" for i in range(20)], generator=rng())
    assert (interval.low, interval.high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "clusters", "num_resamples", "message"),
    [
        ([1.0, 0.0], ["a"], 10, "expected one cluster per value, found 1 for 2 values"),
        ([1.0, float("nan")], ["a", "b"], 10, "expected finite values"),
        ([1.0, 0.0], ["a", "a"], 10, "expected at least 2 clusters, found 1"),
        ([1.0, 0.0], ["a", "b"], 0, "expected at least 1 resample, found 0"),
    ],
)
def test_bootstrap_refuses(values: list[float], clusters: list[str], num_resamples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(np.array(values), clusters, generator=rng(), num_resamples=num_resamples)


def test_paired_difference_by_hand() -> None:
    """Pairs (1, 0), (1, 1), (0, 0), (1, 0): differences 1, 0, 0, 1, mean 0.5; per cluster 0.5 and 0.5: no spread."""
    interval = paired_difference(
        np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 0, 0]), ["a", "a", "b", "b"], generator=rng()
    )
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_pairing_removes_what_both_sides_share() -> None:
    """Concepts differ by 1, methods by 0.1: the paired interval is narrower than the gap of unpaired ones."""
    clusters = [f"c{i}" for i in range(30)]
    shared = rng(4).random(30)
    interval = paired_difference(shared + 0.1, shared, clusters, generator=rng())
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.1)


def test_paired_difference_refuses_unequal_sides() -> None:
    with pytest.raises(ValueError, match="expected pairs, found 2 values against 3: pair by prompt and seed"):
        paired_difference(np.zeros(2), np.zeros(3), ["a", "b"], generator=rng())


def test_jackknife_of_a_mean_is_the_t_interval() -> None:
    """One value per cluster: the jackknife error of a mean is s / sqrt(n) exactly."""
    values = rng(5).normal(size=12)
    interval = cluster_jackknife(lambda keep: float(values[keep].mean()), [f"c{i}" for i in range(12)])
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert interval.low == pytest.approx(low)
    assert interval.high == pytest.approx(high)
    assert interval.n == 12


def test_jackknife_refuses() -> None:
    with pytest.raises(ValueError, match="expected at least 2 clusters, found 1"):
        cluster_jackknife(lambda keep: 1.0, ["a", "a"])
    with pytest.raises(ValueError, match="expected a finite statistic without any one cluster"):
        cluster_jackknife(lambda keep: float("nan"), ["a", "b"])


def test_statistics_imports_no_torch() -> None:
    code = "import sys, safetydpo.statistics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exact_difference_by_hand() -> None:
    """10 pairs, 4 hits of the first only: p in [0.025^(1/4), 1] = [0.398, 1], difference (2 p - 1) 4/10: [-0.082, 0.4].
    Turned around it is the same with the other sign."""
    found = exact_paired_difference(4, 0, 10)
    assert (found.value, found.high, found.n) == (pytest.approx(0.4), pytest.approx(0.4), 10)
    assert found.low == pytest.approx((2 * 0.025**0.25 - 1) * 0.4)
    back = exact_paired_difference(0, 4, 10)
    assert (back.value, back.low, back.high) == pytest.approx((-0.4, -0.4, -found.low))


def test_pairs_that_agree_say_that_there_is_no_difference() -> None:
    found = exact_paired_difference(0, 0, 7)
    assert (found.value, found.low, found.high, found.n) == (0.0, 0.0, 0.0, 7)


@settings(max_examples=60)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_exact_difference_excludes_zero_where_mcnemar_s_exact_test_does(more: int, fewer: int, agreeing: int) -> None:
    """An independent implementation: scipy's two-sided binomial test at one half, by twice the smaller tail."""
    n = more + fewer + agreeing
    if more + fewer == 0:
        return
    found = exact_paired_difference(more, fewer, n)
    assert found.low <= found.value <= found.high
    tail = stats.binom.cdf(min(more, fewer), more + fewer, 0.5)
    assert (found.low > 0 or found.high < 0) == (2 * tail < 0.05)


@pytest.mark.parametrize(
    ("more", "fewer", "n", "wanted"),
    [
        (0, 0, 0, "expected at least 1 pair, found n = 0"),
        (3, 3, 5, "expected discordant pairs between 0 and n = 5, found 3 and 3"),
        (-1, 3, 5, "expected discordant pairs between 0 and n = 5, found -1 and 3"),
    ],
)
def test_exact_difference_refuses(more: int, fewer: int, n: int, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        exact_paired_difference(more, fewer, n)


def test_many_exact_intervals_are_the_single_ones() -> None:
    pairs = [(hits, n) for n in (1, 2, 7, 40) for hits in range(n + 1)]
    low, high = clopper_pearson_ends(np.array([h for h, _ in pairs]), np.array([n for _, n in pairs]))
    single = [clopper_pearson(hits, n) for hits, n in pairs]
    assert low.tolist() == [interval.low for interval in single]
    assert high.tolist() == [interval.high for interval in single]


@pytest.mark.parametrize(("hits", "n"), [([1], [1, 2]), ([3], [2]), ([0], [0]), ([-1], [2])])
def test_many_exact_intervals_refuse(hits: list[int], n: list[int]) -> None:
    with pytest.raises(
        ValueError, match="expected hits between 0 and n for each of 1 rates, n at least 1, found others"
    ):
        clopper_pearson_ends(np.array(hits), np.array(n))
