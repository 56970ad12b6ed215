from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.counts import (
    RowCounts,
    compare_rates,
    count_row,
    parse_counts,
    pool_counts,
    pooled_metrics,
)
from safetydpo.evaluation.metrics import clip_metrics, rate_metrics
from safetydpo.statistics import cluster_bootstrap, paired_difference
from tests.evaluation.synthetic import SOURCES, make_outcome, make_outcomes, make_verdict

UNSAFE = make_verdict(unsafe=True)
INTACT = make_verdict()


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[Any]]:
    """Pictures of base, `ties` (one failed) and `searched` under three generation seeds."""
    chosen = tuple(source for source in SOURCES if source.name in ("base", "ties", "searched"))
    outcomes = make_outcomes(seeds=(0, 1, 2), sources=chosen)
    return {source.name: [o for o in outcomes if o.row_name == source.name] for source in chosen}


def test_counts_by_hand() -> None:
    """Bomb: 2 of 2 unsafe; dagger: 1 of 2, one of them failed, which counts as unsafe and as not intact.

    The apple scores 30 - 18 = 12 and 0 (failed) against 32 - 18 = 14 twice of base: margins (12, 2) and (28, 2).
    """
    own = [
        make_outcome(0, concept="bomb", audit=UNSAFE, select=INTACT),
        make_outcome(1, concept="bomb", audit=UNSAFE, select=UNSAFE),
        make_outcome(2, concept="dagger", audit=INTACT, select=INTACT),
        make_outcome(3, concept="dagger", failure="missing"),
        make_outcome(4, concept="apple", prompt_set="neutral", category=None, audit=INTACT, clip=(30.0, 18.0)),
        make_outcome(5, concept="apple", prompt_set="neutral", category=None, failure="missing"),
    ]
    base = [replace(o, row_name="base", failure=None, clip_score=32.0, clip_score_mismatched=18.0) for o in own[4:]]
    counts = count_row(own, base=base)
    assert counts.rates["ip"] == {"bomb": (2, 2), "dagger": (1, 2)}
    assert counts.rates["ip:hate"] == counts.rates["ip"]
    assert counts.rates["ip_select"] == {"bomb": (1, 2), "dagger": (1, 2)}
    assert counts.rates["safe_and_intact_rate"] == {"bomb": (0, 2), "dagger": (1, 2)}
    assert counts.rates["neutral_rate"] == {"apple": (1, 2)}
    assert "ood_ip" not in counts.rates
    assert counts.sums == {
        "clip_score": {"apple": (30.0, 2)},
        "clip_margin": {"apple": (12.0, 2)},
        "clip_margin:base": {"apple": (28.0, 2)},
    }


def test_pooled_rate_by_hand_and_by_scipy() -> None:
    """3 of 20 and 5 of 20 are 8 of 40: 0.20, exactly [0.0905, 0.3565]."""
    parts = [
        RowCounts({"ip": {"bomb": (1, 10), "dagger": (2, 10)}}, {}),
        RowCounts({"ip": {"bomb": (5, 10), "axe": (0, 10)}}, {}),
    ]
    pooled = pool_counts(parts)
    assert pooled.rates["ip"] == {"axe": (0, 10), "bomb": (6, 20), "dagger": (2, 10)}
    metric = pooled_metrics(pooled, generator=rng())["ip"]
    assert (metric.value, metric.n) == (0.2, 40)
    assert (metric.low, metric.high) == pytest.approx((0.0905, 0.3565), abs=1e-4)
    exact = stats.binomtest(8, 40).proportion_ci(0.95, method="exact")
    assert (metric.low, metric.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert metric.cluster_low is not None
    assert metric.cluster_low < 0.2


def test_one_part_gives_the_metrics_of_its_pictures(pictures: dict[str, list[Any]]) -> None:
    """Totals lose nothing: values, exact intervals and retention are those computed from the pictures."""
    own, base = pictures["ties"], pictures["base"]
    pooled = pooled_metrics(count_row(own, base=base), generator=rng())
    from_pictures = {**rate_metrics(own, generator=rng()), **clip_metrics(own, base=base, generator=rng())}
    assert set(from_pictures) <= {*pooled, "ip_select_minus_ip"}
    for name, metric in from_pictures.items():
        found = pooled[name]
        assert (found.value, found.n, found.unit) == (pytest.approx(metric.value, abs=1e-12), metric.n, metric.unit)
        if name != "clip_score":
            assert (found.low, found.high) == pytest.approx((metric.low, metric.high), abs=1e-12)


def test_bootstraps_equal_those_on_pictures(pictures: dict[str, list[Any]]) -> None:
    """Clusters enter by sum and size only, so that equal draws give equal intervals."""
    searched, ties = (pictures[name] for name in ("searched", "ties"))
    unsafe = [
        (o.concept, o.failure is not None or o.verdicts["audit"].unsafe) for o in ties if o.prompt_set == "unsafe"
    ]
    concepts = [concept for concept, _ in unsafe]
    hits = np.array([hit for _, hit in unsafe], dtype=np.float64)
    others = np.array([o.verdicts["audit"].unsafe for o in searched if o.prompt_set == "unsafe"], dtype=np.float64)
    counts = [count_row(rows, base=pictures["base"]) for rows in (ties, searched)]
    direct = cluster_bootstrap(hits, concepts, generator=rng())
    # `ip` is the first metric to draw from the generator.
    pooled = pooled_metrics(RowCounts({"ip": counts[0].rates["ip"]}, {}), generator=rng())["ip"]
    assert (pooled.cluster_low, pooled.cluster_high) == pytest.approx((direct.low, direct.high), abs=1e-12)
    gap = compare_rates(counts[0].rates["ip"], counts[1].rates["ip"], generator=rng())
    expected = paired_difference(hits, others, concepts, generator=rng())
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == pytest.approx((expected.value, expected.low, expected.high), abs=1e-12)
    assert gap.n == len(concepts)


def test_a_difference_by_hand() -> None:
    """(3 + 1) of 20 against (9 + 7) of 20: 0.2 - 0.8 = -0.6 in both concepts, so that the interval is a point."""
    first, second = {"a": (3, 10), "b": (1, 10)}, {"b": (7, 10), "a": (9, 10)}
    gap = compare_rates(first, second, generator=rng())
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.6, -0.6, -0.6))
    assert (gap.n, gap.unit) == (20, "difference")
    assert compare_rates({"a": (1, 2)}, {"a": (2, 2)}, generator=rng()) is None


totals = st.dictionaries(
    st.sampled_from("abcdef"),
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(totals, min_size=1, max_size=5))
def test_a_pool_counts_every_picture_once_in_any_order(parts: list[dict[str, tuple[int, int]]]) -> None:
    pooled = pool_counts([RowCounts({"ip": part}, {}) for part in parts])
    assert pooled == pool_counts([RowCounts({"ip": part}, {}) for part in reversed(parts)])
    for index in (0, 1):
        whole = sum(total[index] for part in parts for total in part.values())
        assert sum(total[index] for total in pooled.rates["ip"].values()) == whole


def test_pooling_seeds_equals_counting_them_together(pictures: dict[str, list[Any]]) -> None:
    def counts(seeds: tuple[int, ...]) -> RowCounts:
        own, base = ([o for o in pictures[name] if o.seed in seeds] for name in ("ties", "base"))
        return count_row(own, base=base)

    together, pooled = counts((0, 1, 2)), pool_counts([counts((0,)), counts((1,)), counts((2,))])
    assert pooled.rates == together.rates
    for name, totals_ in together.sums.items():
        for concept, (total, n) in totals_.items():
            assert pooled.sums[name][concept] == (pytest.approx(total, abs=1e-9), n)


def test_a_metric_that_one_part_lacks_is_left_out() -> None:
    parts = [RowCounts({"ip": {"a": (1, 2)}, "ood_ip": {"b": (1, 2)}}, {}), RowCounts({"ip": {"a": (1, 2)}}, {})]
    assert set(pool_counts(parts).rates) == {"ip"}


def test_retention_is_absent_without_a_yardstick() -> None:
    sums = {"clip_margin": {"a": (1.0, 2), "b": (1.0, 2)}, "clip_margin:base": {"a": (-1.0, 2), "b": (2.0, 2)}}
    assert "clip_retention" not in pooled_metrics(RowCounts({}, sums), generator=rng())
    assert "clip_retention" not in pooled_metrics(RowCounts({}, {"clip_margin": sums["clip_margin"]}), generator=rng())


def test_counts_survive_json(pictures: dict[str, list[Any]]) -> None:
    counts = count_row(pictures["searched"], base=pictures["base"])
    assert parse_counts(json.loads(json.dumps(counts.to_json())), source="here") == counts


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"rates": {}}, "expected counts per concept in unit.json, found KeyError"),
        ([], "expected counts per concept in unit.json, found TypeError"),
        ({"rates": {"ip": {"a": [1]}}, "sums": {}}, "expected counts per concept in unit.json, found ValueError"),
        ({"rates": {"ip": {"a": [3, 2]}}, "sums": {}}, "found 3 of 2 at ip / a: delete that file"),
        ({"rates": {"ip": {"a": [True, 2]}}, "sums": {}}, "found True of 2 at ip / a"),
        ({"rates": {"ip": {"a": [0, 0]}}, "sums": {}}, "found 0 of 0 at ip / a"),
        ({"rates": {}, "sums": {"clip_score": {"a": [float("nan"), 2]}}}, "found nan of 2 at clip_score / a"),
    ],
)
def test_totals_that_cannot_be_are_refused(document: Any, message: str) -> None:
    with pytest.raises(SafetyDPOError) as caught:
        parse_counts(document, source="unit.json")
    assert message in str(caught.value)


def test_rows_of_other_prompts_are_not_compared() -> None:
    with pytest.raises(SafetyDPOError, match="expected pairs of pictures, found 10 against 0 of concept 'b'"):
        compare_rates({"a": (1, 10), "b": (1, 10)}, {"a": (1, 10)}, generator=rng())
