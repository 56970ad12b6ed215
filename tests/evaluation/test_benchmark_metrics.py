"""Unsafe pictures per benchmark: all prompts, those not seen in training, failures, and no effect without one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from safetydpo.evaluation.benchmark_metrics import benchmark_metrics, is_of_benchmark
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.picture_outcomes import outcomes_table
from safetydpo.evaluation.rows import RowSource, build_rows
from safetydpo.evaluation.summary import build_summary
from tests.evaluation.synthetic import make_outcome, make_verdict

BASE = (RowSource("base", "base"),)


def picture(number: int, prompt_set: str, *, unsafe: bool = False, failure: str | None = None) -> ImageOutcome:
    plain = make_outcome(
        number,
        audit=None if failure else make_verdict(unsafe=unsafe),
        select=None if failure else make_verdict(),
        failure=failure,
    )
    return replace(plain, prompt_set=prompt_set)  # type: ignore[arg-type]


def pictures() -> list[ImageOutcome]:
    """Four unseen (one unsafe, one failed), two seen (both unsafe); one unsafe prompt of the run's own."""
    return [
        picture(0, "benchmark:i2p", unsafe=True),
        picture(1, "benchmark:i2p"),
        picture(2, "benchmark:i2p", failure="missing"),
        picture(3, "benchmark:i2p"),
        picture(4, "benchmark_seen:i2p", unsafe=True),
        picture(5, "benchmark_seen:i2p", unsafe=True),
        picture(6, "unsafe"),
        picture(7, "benchmark:ud"),
    ]


def test_by_hand():
    """I2P: 4 of 6 unsafe or failed, 2 of 4 of the unseen ones; UD has no seen prompt and so one metric."""
    found = benchmark_metrics(pictures(), generator=np.random.default_rng(0))
    told = {name: (metric.value, metric.n, metric.unit) for name, metric in found.items()}
    assert told == {
        "benchmark_ip:i2p": (pytest.approx(4 / 6), 6, "rate"),
        "benchmark_ip_unseen:i2p": (0.5, 4, "rate"),
        "benchmark_ip:ud": (0.0, 1, "rate"),
    }
    assert found["benchmark_ip:ud"].cluster_high is None


def test_without_a_benchmark_nothing_is_measured_and_nothing_drawn():
    generator = np.random.default_rng(0)
    assert benchmark_metrics([picture(6, "unsafe")], generator=generator) == {}
    assert generator.random() == np.random.default_rng(0).random()


def test_a_row_holds_them_beside_its_own_metrics_which_do_not_change():
    def row_of(outcomes: list[ImageOutcome]):
        return build_rows(outcomes, BASE, run_seed=0)[0]

    own = [picture(number, "unsafe", unsafe=number > 6) for number in range(6, 9)]
    row = row_of([*own, *pictures()[:6]])
    plain = row_of(own)
    assert row["prompt_set"] == "unsafe+benchmark:i2p+benchmark_seen:i2p"
    assert {name: row["metrics"][name] for name in plain["metrics"]} == plain["metrics"]
    assert row["metrics"]["benchmark_ip:i2p"]["n"] == 6
    build_summary([row], [], timing_seconds={}, config_hash="c", versions={})


def test_the_table_behind_the_report_has_them_too():
    table = outcomes_table(pictures(), judges=[], run_seed=0).to_pylist()
    assert [row["rates"] for row in table[:1]] == [["benchmark_ip:i2p", "benchmark_ip_unseen:i2p"]]
    assert (table[2]["hits"], table[2]["failed"]) == (["benchmark_ip:i2p", "benchmark_ip_unseen:i2p"], True)
    assert (table[4]["rates"], table[4]["hits"]) == (["benchmark_ip:i2p"], ["benchmark_ip:i2p"])
    assert "benchmark_ip:i2p" not in table[6]["rates"]


def test_sets_of_benchmarks_are_told_from_the_runs_own():
    assert [is_of_benchmark(name) for name in ("benchmark:ud", "benchmark_seen:ud", "unsafe", "neutral")] == [
        True,
        True,
        False,
        False,
    ]
