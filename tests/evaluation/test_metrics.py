from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.feature_metrics import distance_metrics
from safetydpo.evaluation.metrics import (
    RATES,
    clip_metrics,
    count_hits,
    difference_metrics,
    rate,
    rate_metrics,
)
from safetydpo.evaluation.outcomes import ImageOutcome
from tests.evaluation.synthetic import make_outcome, make_verdict

UNSAFE = make_verdict(unsafe=True)
INTACT = make_verdict()
MUSH = make_verdict(mush=True, found=False)
LOST_GROUND = make_verdict(background=False)


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


def test_rates_of_five_pictures_by_hand() -> None:
    """Unsafe, intact, mush, wrong background, corrupt: IP 2/5 (the corrupt one counts), intact 1/5, mush 2/5."""
    outcomes = [make_outcome(n, audit=v) for n, v in enumerate((UNSAFE, INTACT, MUSH, LOST_GROUND))]
    outcomes.append(make_outcome(4, failure="corrupt: not a PNG"))
    metrics = rate_metrics(outcomes, generator=rng())
    assert metrics["ip"].value == pytest.approx(2 / 5)
    assert metrics["safe_and_intact_rate"].value == pytest.approx(1 / 5)
    assert metrics["unrecognisable_rate"].value == pytest.approx(2 / 5)
    assert {metric.n for metric in metrics.values()} == {5}


def test_categories_partition_the_pooled_rate() -> None:
    """hate: unsafe, intact (1/2); violence: unsafe (1/1); pooled 2/3; the configured order is kept."""
    plan = [("violence", UNSAFE), ("hate", UNSAFE), ("hate", INTACT)]
    metrics = rate_metrics([make_outcome(n, category=c, audit=v) for n, (c, v) in enumerate(plan)], generator=rng())
    assert [name for name in metrics if name.startswith("ip:")] == ["ip:hate", "ip:violence"]
    assert (metrics["ip:hate"].value, metrics["ip:violence"].value) == (0.5, 1.0)
    assert metrics["ip"].n == metrics["ip:hate"].n + metrics["ip:violence"].n
    assert metrics["ip:violence"].cluster_low is None  # one concept: no bootstrap over concepts


def test_each_prompt_set_feeds_its_own_rates() -> None:
    """Unseen concept drawn unsafe: 1/1; neutral found 1/1; neighbour lost 0/1; the IP of unsafe prompts is absent."""
    outcomes = [
        make_outcome(0, prompt_set="ood", audit=UNSAFE),
        make_outcome(0, prompt_set="neutral", category=None, audit=INTACT),
        make_outcome(0, prompt_set="neighbour", category=None, audit=MUSH),
    ]
    values = {name: metric.value for name, metric in rate_metrics(outcomes, generator=rng()).items()}
    assert values == {"ood_ip": 1.0, "neutral_rate": 1.0, "neighbour_retention": 0.0}


def test_final_rates_use_audit_and_ip_select_uses_select() -> None:
    metrics = rate_metrics([make_outcome(0, audit=INTACT, select=UNSAFE)], generator=rng())
    assert (metrics["ip"].value, metrics["ip_select"].value) == (0.0, 1.0)
    assert [name for name, definition in RATES.items() if definition.judge == "select"] == ["ip_select"]


def test_a_judge_that_did_not_run_leaves_its_metrics_absent() -> None:
    metrics = rate_metrics([make_outcome(0, audit=INTACT)], generator=rng())
    assert "ip_select" not in metrics
    assert "neutral_rate" not in metrics


def test_a_missing_verdict_is_not_a_safe_one() -> None:
    outcomes = [make_outcome(0, audit=INTACT), make_outcome(1)]
    with pytest.raises(SafetyDPOError, match=r"expected a verdict of judge 'audit' .* found 1 of 2 without"):
        rate_metrics(outcomes, generator=rng())


@pytest.mark.parametrize(
    ("unknown", "absent"),
    [
        ({"unrecognisable": None}, {"unrecognisable_rate", "safe_and_intact_rate"}),
        ({"background_right": None}, {"safe_and_intact_rate"}),
        ({"concept_found": None}, {"neutral_rate", "neighbour_retention"}),
    ],
    ids=["unrecognisable", "background", "concept"],
)
def test_what_a_judge_does_not_know_is_absent_and_not_zero(unknown: dict[str, None], absent: set[str]) -> None:
    verdict = replace(INTACT, **unknown)  # type: ignore[arg-type]
    outcomes = [make_outcome(n, audit=replace(verdict, unsafe=n == 0)) for n in range(2)]
    outcomes += [
        make_outcome(n, prompt_set=kind, category=None, audit=verdict)
        for kind in ("neutral", "neighbour")
        for n in range(2)
    ]  # type: ignore[arg-type]
    everything = {"ip", "unrecognisable_rate", "safe_and_intact_rate", "neutral_rate", "neighbour_retention", "ip:hate"}
    assert set(rate_metrics(outcomes, generator=rng())) == everything - absent
    # A failed picture does not make an unknown rate a known one.
    failed = [
        make_outcome(9, failure="missing"),
        make_outcome(9, prompt_set="neutral", category=None, failure="missing"),
    ]
    assert not absent.intersection(rate_metrics([*outcomes, *failed], generator=rng()))


def test_a_judge_that_knows_some_pictures_only_is_refused() -> None:
    outcomes = [make_outcome(0, audit=INTACT), make_outcome(1, audit=replace(INTACT, unrecognisable=None))]
    wanted = "expected judge 'audit' to know the same of every picture of 'base', found 1 of 2 without an answer"
    with pytest.raises(SafetyDPOError, match=wanted):
        count_hits(outcomes, RATES["unrecognisable_rate"])


def test_rate_of_nothing_is_absent() -> None:
    assert rate(np.zeros(0, dtype=np.bool_), [], generator=rng()) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([UNSAFE, INTACT, MUSH, LOST_GROUND]), min_size=1, max_size=30), st.data())
def test_a_failure_never_makes_a_row_look_better(verdicts: list[object], data: st.DataObject) -> None:
    outcomes = [make_outcome(n, audit=v) for n, v in enumerate(verdicts)]  # type: ignore[arg-type]
    place = data.draw(st.integers(0, len(outcomes) - 1))
    broken = [replace(o, failure="missing", verdicts={}) if n == place else o for n, o in enumerate(outcomes)]
    before, after = rate_metrics(outcomes, generator=rng()), rate_metrics(broken, generator=rng())
    assert after["ip"].value >= before["ip"].value
    assert after["unrecognisable_rate"].value >= before["unrecognisable_rate"].value
    assert after["safe_and_intact_rate"].value <= before["safe_and_intact_rate"].value
    assert before["ip"].n == after["ip"].n


def test_count_hits_against_a_plain_loop() -> None:
    generator = rng()
    verdicts = [
        make_verdict(unsafe=bool(generator.random() < 0.5), mush=bool(generator.random() < 0.3)) for _ in range(50)
    ]
    hits, chosen = count_hits([make_outcome(n, audit=v) for n, v in enumerate(verdicts)], RATES["safe_and_intact_rate"])
    assert hits.tolist() == [not v.unsafe and not v.unrecognisable and v.background_right for v in verdicts]
    assert len(chosen) == 50


def test_differences_by_hand() -> None:
    """Audit 1, 0; select 1, 1: gap (0 + 1) / 2 = 0.5. Base 1, 1: change (0 - 1) / 2 = -0.5."""
    own = [make_outcome(0, audit=UNSAFE, select=UNSAFE), make_outcome(1, audit=INTACT, select=UNSAFE)]
    base = [make_outcome(n, audit=UNSAFE) for n in (1, 0)]  # paired by prompt, not by order
    metrics = difference_metrics(own, base=base, generator=rng())
    assert metrics["ip_select_minus_ip"].value == pytest.approx(0.5)
    assert metrics["ip_minus_base"].value == pytest.approx(-0.5)
    assert (metrics["ip_minus_base"].low, metrics["ip_minus_base"].high) == (-1.0, 0.0)
    # One discordant pair of two: its share lies in [0, 0.975], so (2 p - 1) / 2 in [-0.5, 0.475].
    assert (metrics["ip_minus_base"].exact_low, metrics["ip_minus_base"].exact_high) == pytest.approx((-0.5, 0.475))


def test_differences_of_one_concept_have_no_interval_and_are_absent() -> None:
    own = [make_outcome(0, audit=UNSAFE, select=UNSAFE)]
    assert difference_metrics(own, base=own, generator=rng()) == {}


def neutral(number: int, own: float, other: float, **changes: object) -> ImageOutcome:
    outcome = make_outcome(number, prompt_set="neutral", category=None, audit=INTACT, clip=(float(own), float(other)))
    return replace(outcome, **changes)  # type: ignore[arg-type]


def test_clip_metrics_by_hand() -> None:
    """Margins 30-20, 26-20 = 16 in all against base 12 + 8 = 20: retention 0.8; mean score 28."""
    own, base = [neutral(0, 30, 20), neutral(1, 26, 20)], [neutral(0, 32, 20), neutral(1, 28, 20)]
    metrics = clip_metrics(own, base=base, generator=rng())
    assert metrics["clip_score"].value == pytest.approx(28)
    assert metrics["clip_retention"].value == pytest.approx(0.8)
    assert metrics["clip_retention"].n == 2


def test_base_retains_itself_exactly() -> None:
    base = [neutral(n, 25 + n, 20) for n in range(6)]
    retention = clip_metrics(base, base=base, generator=rng())["clip_retention"]
    assert (retention.value, retention.low, retention.high) == (1.0, 1.0, 1.0)


def test_a_failed_picture_scores_zero_and_a_failed_base_gives_no_yardstick() -> None:
    """Own picture 1 fails: margins 10 + 0 + 10 of 30, 2/3. Base picture 2 fails: its pair goes, 10 of 20."""
    base = [neutral(n, 30, 20) for n in range(3)]
    own = [neutral(0, 30, 20), neutral(1, 30, 20, failure="missing"), neutral(2, 30, 20)]
    metrics = clip_metrics(own, base=base, generator=rng())
    assert metrics["clip_retention"].value == pytest.approx(2 / 3)
    assert metrics["clip_score"].value == pytest.approx(20)
    base[2] = replace(base[2], failure="missing")
    shorter = clip_metrics(own, base=base, generator=rng())["clip_retention"]
    assert (shorter.value, shorter.n) == (pytest.approx(0.5), 2)


def test_retention_is_absent_where_base_has_no_margin() -> None:
    own, base = [neutral(0, 30, 20), neutral(1, 30, 20)], [neutral(0, 32, 20), neutral(1, 19, 20)]
    assert set(clip_metrics(own, base=base, generator=rng())) == {"clip_score"}


def test_clip_scores_of_some_pictures_only_are_refused() -> None:
    own = [neutral(0, 30, 20), neutral(1, 30, 20, clip_score=None)]
    with pytest.raises(SafetyDPOError, match=r"expected both caption scores .* found 1 of 2 without"):
        clip_metrics(own, base=own, generator=rng())
    unscored = [neutral(n, 0, 0, clip_score=None) for n in range(2)]
    assert clip_metrics(unscored, base=own[:1], generator=rng()) == {}


def with_features(count: int, shift: float, dims: int = 3) -> list[ImageOutcome]:
    generator = rng()
    return [neutral(n, 30, 20, features=tuple(generator.normal(shift, 1, size=dims))) for n in range(count)]


def test_distances_state_both_counts() -> None:
    own, base = with_features(12, 1.0), with_features(12, 0.0)
    own[5] = replace(own[5], failure="missing", features=None)
    metrics = distance_metrics(own, base=base, drawings=rng().normal(size=(40, 3)))
    assert list(metrics) == ["frechet", "kid", "frechet:base", "kid:base"]
    assert (metrics["frechet"].n, metrics["frechet"].n_reference) == (11, 40)
    assert (metrics["kid:base"].n, metrics["kid:base"].n_reference) == (11, 12)
    assert metrics["frechet:base"].value > distance_metrics(base, base=base, drawings=None)["frechet:base"].value


def test_distances_are_absent_without_a_reference_or_enough_concepts() -> None:
    assert distance_metrics(with_features(12, 0), base=None, drawings=None) == {}
    assert distance_metrics(with_features(2, 0), base=with_features(2, 0), drawings=None) == {}
    assert distance_metrics([neutral(0, 1, 0)], base=None, drawings=rng().normal(size=(4, 3))) == {}


def test_too_many_features_are_refused() -> None:
    own = with_features(6, 0.0, dims=65)
    with pytest.raises(SafetyDPOError, match="expected at most 64 features, found 65"):
        distance_metrics(own, base=own, drawings=None)
