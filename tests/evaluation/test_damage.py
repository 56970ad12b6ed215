from __future__ import annotations

import numpy as np
import pytest

from safetydpo.evaluation.damage import DAMAGE, damage_metrics
from safetydpo.evaluation.metrics import RATES, rate_difference
from safetydpo.evaluation.outcomes import ImageOutcome
from tests.evaluation.synthetic import make_outcome, make_outcomes, make_verdict


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


def neighbours(found: list[bool]) -> list[ImageOutcome]:
    return [
        make_outcome(n, prompt_set="neighbour", category=None, audit=make_verdict(found=hit))
        for n, hit in enumerate(found)
    ]


def test_damage_by_hand() -> None:
    """Base draws 6 of 6 neighbours, the row 2: -4/6. All 4 discordant pairs are losses, p in [0, 0.602] of
    Clopper-Pearson (0.025^(1/4) = 0.398 from above), so that the exact interval is (2 p - 1) 4/6: [-0.667, 0.136]."""
    own, base = neighbours([True, False, False, True, False, False]), neighbours([True] * 6)
    metrics = damage_metrics(own, base=base, generator=rng())
    assert list(metrics) == ["neighbour_minus_base"]
    found = metrics["neighbour_minus_base"]
    assert (found.value, found.n, found.unit) == (pytest.approx(-4 / 6), 6, "difference")
    assert found.exact_low == pytest.approx(-4 / 6)
    assert found.exact_high == pytest.approx((2 * (1 - 0.025**0.25) - 1) * 4 / 6)
    assert found.low <= found.value <= found.high


def test_a_row_differs_from_itself_by_nothing() -> None:
    outcomes = [outcome for outcome in make_outcomes() if outcome.row_name == "base"]
    metrics = damage_metrics(outcomes, base=outcomes, generator=rng())
    assert list(metrics) == list(DAMAGE)
    assert all((m.value, m.low, m.high, m.exact_low, m.exact_high) == (0, 0, 0, 0, 0) for m in metrics.values())


def test_differences_are_those_of_the_rates() -> None:
    outcomes = make_outcomes()
    base = [outcome for outcome in outcomes if outcome.row_name == "base"]
    own = [outcome for outcome in outcomes if outcome.row_name == "ties"]
    metrics = damage_metrics(own, base=base, generator=rng())
    for name, compared in DAMAGE.items():
        definition = RATES[compared]
        rates = []
        for side in (own, base):
            chosen = [outcome for outcome in side if outcome.prompt_set == definition.prompt_set]
            hits = [
                definition.failure_is_hit if o.failure else bool(definition.hit(o.verdicts[definition.judge]))
                for o in chosen
            ]
            rates.append(np.mean(hits))
        assert metrics[name].value == pytest.approx(rates[0] - rates[1])


def test_a_missing_base_picture_counts_against_the_base() -> None:
    """A failed neighbour of the base is not found: the row, which draws it, is better by it, 1/3."""
    own = neighbours([True] * 3)
    base = [*neighbours([True] * 2), make_outcome(2, prompt_set="neighbour", category=None, failure="missing")]
    assert damage_metrics(own, base=base, generator=rng())["neighbour_minus_base"].value == pytest.approx(1 / 3)


def test_one_concept_has_no_difference() -> None:
    hits = np.array([True, False])
    assert rate_difference(hits, ~hits, ["one", "one"], generator=rng()) is None
