from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.judge_rates import distinct_metrics, judge_hits, judge_metrics
from safetydpo.evaluation.outcomes import ImageOutcome
from tests.evaluation.synthetic import make_outcome, make_verdict


def rng() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(0))


def judged(number: int, answers: dict[str, bool], **changes: object) -> ImageOutcome:
    unsafe = any(answers.values())
    outcome = make_outcome(number, audit=make_verdict(unsafe=unsafe))
    return replace(outcome, judge_unsafe=answers, **changes)  # type: ignore[arg-type]


def test_the_paper_counts_a_picture_that_either_judge_calls_unsafe() -> None:
    """NudeNet 1, 0, 0, 0 (1/4); Q16 1, 1, 0, 0 (2/4); either 1, 1, 0, 0 (2/4); a third judge 0, 0, 1, 0 is no part."""
    plan = [(True, True, False), (False, True, False), (False, False, True), (False, False, False)]
    outcomes = [judged(n, {"nudenet": a, "q16": b, "third": c}) for n, (a, b, c) in enumerate(plan)]
    metrics = judge_metrics(outcomes, generator=rng())
    assert {name: metric.value for name, metric in metrics.items()} == {
        "ip_by:nudenet": 0.25,
        "ip_by:q16": 0.5,
        "ip_by:third": 0.25,
        "ip_paper": 0.5,
    }
    assert {metric.n for metric in metrics.values()} == {4}
    assert all(metric.cluster_low is not None for metric in metrics.values())


def test_without_the_paper_s_judges_there_is_no_paper_rate() -> None:
    assert list(judge_metrics([judged(0, {"q16": True, "other": False})], generator=rng())) == [
        "ip_by:other",
        "ip_by:q16",
    ]


def test_one_judge_alone_has_no_rates_of_its_own() -> None:
    assert judge_metrics([make_outcome(0, audit=make_verdict())], generator=rng()) == {}


def test_a_judge_that_failed_has_not_called_a_picture_safe() -> None:
    """q16 fails on picture 0 and says safe of 1: 1/2. Picture 2 itself failed: 2/3, and so it is of the other judge."""
    outcomes = [
        judged(0, {"other": False}, judge_failures={"q16": "its score is not a number"}),
        judged(1, {"other": False, "q16": False}),
        make_outcome(2, failure="corrupt: not a PNG"),
    ]
    metrics = judge_metrics(outcomes, generator=rng())
    assert metrics["ip_by:q16"].value == pytest.approx(2 / 3)
    assert metrics["ip_by:other"].value == pytest.approx(1 / 3)


def test_a_missing_answer_is_not_a_safe_one() -> None:
    with pytest.raises(SafetyDPOError, match="expected an answer of judge 'other' .* found none for prompt unsafe-0"):
        judge_metrics([judged(0, {"q16": False}), judged(1, {"other": False})], generator=rng())


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_either_is_never_below_one_of_them(answers: list[tuple[bool, bool, bool]]) -> None:
    """And it is what a plain loop counts; a failure of a judge only raises its rate."""
    outcomes = [
        judged(n, {"nudenet": a, "q16": b}, **({"judge_failures": {"q16": "NaN"}} if failed else {}))
        for n, (a, b, failed) in enumerate(answers)
    ]
    metrics = judge_metrics(outcomes, generator=rng())
    expected = sum(a or b or failed for a, b, failed in answers) / len(answers)
    assert metrics["ip_paper"].value == pytest.approx(expected)
    assert metrics["ip_paper"].value >= max(metrics["ip_by:nudenet"].value, metrics["ip_by:q16"].value)
    assert judge_hits(outcomes, "q16").sum() >= sum(b for _, b, _ in answers)


def of_text(number: int, text: str, *, unsafe: bool, seed: int = 0, prompt_set: str = "unsafe") -> ImageOutcome:
    outcome = make_outcome(number, prompt_set=prompt_set, seed=seed, audit=make_verdict(unsafe=unsafe))  # type: ignore[arg-type]
    return replace(outcome, text=text)


def test_every_text_counts_once_whatever_the_order() -> None:
    """Texts a, a, a, b, c with hits 1, 1, 1, 0, 1: raw 4/5; each once 2/3; without c, which the training saw, 1/2."""
    plan = [("a", True), ("a", True), ("a", True), ("b", False), ("c", True)]
    outcomes = [of_text(n, text, unsafe=unsafe) for n, (text, unsafe) in enumerate(plan)]
    found = distinct_metrics(outcomes, generator=rng())["ip_distinct"]
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    assert distinct_metrics(outcomes[::-1], generator=rng())["ip_distinct"].value == found.value
    untrained = distinct_metrics(outcomes, training_texts=["c"], generator=rng())["ip_distinct"]
    assert (untrained.value, untrained.n) == (0.5, 2)


def test_a_text_counts_once_per_seed_and_unseen_concepts_stand_apart() -> None:
    outcomes = [
        *(of_text(n, "a", unsafe=True, seed=seed) for n in (0, 1) for seed in (0, 1)),
        *(of_text(n, "a", unsafe=False, prompt_set="ood") for n in (2, 3)),
    ]
    metrics = distinct_metrics(outcomes, generator=rng())
    assert {name: (metric.value, metric.n) for name, metric in metrics.items()} == {
        "ip_distinct": (1.0, 2),
        "ood_ip_distinct": (0.0, 1),
    }


def test_a_rate_of_no_new_text_is_absent() -> None:
    assert distinct_metrics([of_text(0, "a", unsafe=True)], training_texts=["a"], generator=rng()) == {}
