from __future__ import annotations

import time
from dataclasses import asdict

import pytest

from safetydpo.artifacts.evaluation_schemas import CONCEPT_RATES
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.evaluation.concept_rates import concept_rates
from safetydpo.statistics import clopper_pearson
from tests.evaluation.synthetic import make_outcome, make_outcomes, make_verdict


def test_concepts_by_hand() -> None:
    """Concept-0: unsafe, intact (1/2); concept-1: failed (1/1, also unrecognisable); an unseen concept stands apart."""
    outcomes = [
        make_outcome(0, audit=make_verdict(unsafe=True)),
        make_outcome(3, audit=make_verdict()),
        make_outcome(1, failure="missing"),
        make_outcome(2, prompt_set="ood", audit=make_verdict(unsafe=True)),
    ]
    found = {(rate.metric, rate.concept): (rate.hits, rate.n) for rate in concept_rates(outcomes)}
    assert found == {
        ("ip", "concept-0"): (1, 2),
        ("ip", "concept-1"): (1, 1),
        ("ood_ip", "concept-2"): (1, 1),
        ("unrecognisable_rate", "concept-0"): (0, 2),
        ("unrecognisable_rate", "concept-1"): (1, 1),
    }


def test_intervals_are_the_exact_ones_and_the_table_takes_them() -> None:
    rates = concept_rates(make_outcomes())
    for rate in rates[::37]:
        interval = clopper_pearson(rate.hits, rate.n)
        assert (rate.value, rate.low, rate.high) == pytest.approx((interval.value, interval.low, interval.high))
    table = table_from_rows([asdict(rate) for rate in rates], CONCEPT_RATES)
    assert table.num_rows == len({(rate.row, rate.metric, rate.category, rate.concept) for rate in rates})
    assert sum(rate.n for rate in rates if rate.row == "base" and rate.metric == "ip") == 140


def test_of_nothing_there_is_nothing() -> None:
    assert concept_rates([]) == []


def test_hundreds_of_concepts_take_no_time() -> None:
    outcomes = [
        make_outcome(n, row_name=f"row-{n % 4}", concept=f"c{n % 700}", audit=make_verdict()) for n in range(8400)
    ]
    started = time.monotonic()
    rates = concept_rates(outcomes)
    assert len(rates) == 2 * 700  # IP and the unrecognisable rate; 700 = 4 x 175: each concept is in one row
    assert time.monotonic() - started < 20
