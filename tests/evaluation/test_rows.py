from __future__ import annotations

from dataclasses import replace

import pytest

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.rows import RowSource, build_rows, list_failures
from safetydpo.evaluation.summary import find_base, overall_rows
from tests.evaluation.synthetic import SOURCES, make_outcome, make_outcomes, make_summary, make_verdict

BASE, SUM = RowSource("base", "base"), RowSource("sum", "merged", "h", 8, 1.0)
UNSAFE, SAFE = make_verdict(unsafe=True), make_verdict()


def two_rows(count: int = 4, seeds: tuple[int, ...] = (0,)) -> list:
    return [
        make_outcome(n, row_name=name, seed=seed, audit=verdict, select=verdict)
        for name, verdict in (("base", UNSAFE), ("sum", SAFE))
        for seed in seeds
        for n in range(count)
    ]


def test_a_small_evaluation_by_hand() -> None:
    """Four unsafe base pictures, four safe merged ones: IP 4/4 and 0/4, upper end 1 - 0.025^(1/4) = 0.602."""
    base, merged = build_rows(two_rows(), [BASE, SUM], run_seed=0)
    assert base["metrics"]["ip"]["value"] == 1.0
    assert merged["metrics"]["ip"] == {
        "value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025**0.25), "n": 4, "unit": "rate",
        "cluster_low": 0.0, "cluster_high": 0.0,
    }  # fmt: skip
    assert merged["metrics"]["ip_minus_base"]["value"] == -1.0
    assert "ip_minus_base" not in base["metrics"]
    assert (merged["prompt_set"], merged["split"], merged["seed"]) == ("unsafe", "test", 0)
    assert (merged["adapter_hash"], merged["rank"], merged["scale"]) == ("h", 8, 1.0)


def test_several_seeds_are_pooled_first_then_listed_singly() -> None:
    rows = build_rows(two_rows(seeds=(5, 2)), [BASE, SUM], run_seed=0)
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("base", "sum") for seed in (None, 2, 5)
    ]
    assert [row["metrics"]["ip"]["n"] for row in rows[:3]] == [8, 4, 4]


def test_rows_do_not_depend_on_the_order_of_pictures_or_other_rows() -> None:
    outcomes = two_rows()
    both = build_rows(outcomes, [BASE, SUM], run_seed=0)
    assert build_rows(outcomes[::-1], [BASE, SUM], run_seed=0) == both
    assert build_rows(outcomes[:4], [BASE], run_seed=0) == both[:1]
    assert build_rows(outcomes, [BASE, SUM], run_seed=1) != both or both[0]["metrics"]["ip"]["cluster_low"] == 1.0


def test_a_whole_evaluation_has_the_rows_and_metrics_promised() -> None:
    summary = make_summary()
    assert [row["name"] for row in summary["rows"]] == [source.name for source in SOURCES]
    searched = summary["rows"][-1]
    assert searched["prompt_set"] == "unsafe+ood+neutral+neighbour"
    assert set(searched["metrics"]) >= {
        "ip", "ip:hate", "ip_select", "ood_ip", "safe_and_intact_rate", "unrecognisable_rate", "neutral_rate",
        "neighbour_retention", "clip_score", "clip_retention", "frechet", "kid",
    }  # fmt: skip
    assert searched["metrics"]["ip"]["n"] == 140
    base = find_base(summary)
    assert base is not None
    assert base["metrics"]["clip_retention"]["value"] == 1.0
    assert len(overall_rows(summary)) == len(SOURCES)


def test_failures_are_named_and_stay_in_the_denominator() -> None:
    outcomes = make_outcomes()
    assert list_failures(outcomes) == [
        {"row": "ties", "prompt_id": "unsafe-3", "seed": 0, "reason": "corrupt: not a PNG"}
    ]
    rows = {row["name"]: row for row in make_summary()["rows"]}
    assert rows["ties"]["metrics"]["ip"]["n"] == rows["base"]["metrics"]["ip"]["n"] == 140


def test_refusals() -> None:
    outcomes = two_rows()
    with pytest.raises(SafetyDPOError, match="expected pictures of the rows base, found one of 'sum'"):
        build_rows(outcomes, [BASE], run_seed=0)
    with pytest.raises(SafetyDPOError, match="expected exactly one row of kind base, found 0"):
        build_rows(outcomes[4:], [SUM], run_seed=0)
    with pytest.raises(SafetyDPOError, match="expected pictures of row 'sum', found none"):
        build_rows(outcomes[:4], [BASE, SUM], run_seed=0)
    with pytest.raises(SafetyDPOError, match=r"found 1 that differ: it lacks prompt unsafe-3 \(unsafe\) with seed 0"):
        build_rows(outcomes[:-1], [BASE, SUM], run_seed=0)
    with pytest.raises(SafetyDPOError, match="it has, and base lacks, prompt unsafe-9"):
        build_rows([*outcomes, make_outcome(9, row_name="sum", audit=SAFE, select=SAFE)], [BASE, SUM], run_seed=0)
    with pytest.raises(SafetyDPOError, match="found prompt unsafe-3 with seed 0 twice"):
        build_rows([*outcomes, outcomes[-1]], [BASE, SUM], run_seed=0)
    with pytest.raises(SafetyDPOError, match="expected one split in row 'sum', found test, validation"):
        build_rows([*outcomes[:-1], replace(outcomes[-1], split="validation")], [BASE, SUM], run_seed=0)


def test_an_expert_may_draw_fewer_unsafe_prompts_but_no_fewer_neutral_ones() -> None:
    """The first 70 of 140 unsafe prompts, ten of each category, are fewer by plan; a neutral one is lost."""
    sources = SOURCES[:2]
    outcomes = make_outcomes(sources=sources, expert_retention=True)
    left_out = {f"unsafe-{number}" for number in range(70, 140)}
    planned = [o for o in outcomes if o.row_name == "base" or o.prompt_id not in left_out]
    rows = build_rows(planned, sources, run_seed=0)
    assert rows[1]["prompt_set"] == "unsafe+neutral+neighbour"
    assert rows[1]["metrics"]["neutral_rate"]["n"] == 70
    lost = [o for o in planned if o.row_name == "base" or o.prompt_id != "neutral-3"]
    with pytest.raises(SafetyDPOError, match=r"found 1 that differ: it lacks prompt neutral-3 \(neutral\) with seed 0"):
        build_rows(lost, sources, run_seed=0)


def test_an_empty_category_is_refused_by_name() -> None:
    wanted = "expected unsafe test prompts of every category, found none of sexual, self_harm: add some"
    with pytest.raises(SafetyDPOError, match=wanted):
        build_rows(two_rows(), [BASE, SUM], run_seed=0, categories=("hate", "sexual", "self_harm"))
    assert build_rows(two_rows(), [BASE, SUM], run_seed=0, categories=("hate",))


def test_pictures_that_a_judge_failed_on_are_named() -> None:
    outcomes = two_rows()
    outcomes[5] = replace(outcomes[5], judge_failures={"q16": "its score is not a number"})
    expected = {"row": "sum", "prompt_id": "unsafe-1", "seed": 0, "reason": "judge q16: its score is not a number"}
    assert list_failures(outcomes) == [expected]


def test_added_metrics_leave_the_intervals_of_the_others_as_they_were() -> None:
    """Several judges, training texts and so on draw from a generator of their own: equal to the last digit."""
    outcomes = two_rows(count=9)
    plain = build_rows(outcomes, [BASE, SUM], run_seed=0)
    answers = {"nudenet": True, "q16": False}
    judged = [replace(outcome, judge_unsafe=answers) for outcome in outcomes]
    more = build_rows(judged, [BASE, SUM], run_seed=0, training_texts=[outcomes[0].text])
    for before, after in zip(plain, more, strict=True):
        added = {"ip_by:nudenet", "ip_by:q16", "ip_paper", "ip_distinct"}
        kept = {name: metric for name, metric in before["metrics"].items() if name not in added}
        assert {name: metric for name, metric in after["metrics"].items() if name not in added} == kept
        assert after["metrics"]["ip_distinct"]["n"] == 8
        assert added <= set(after["metrics"])


def test_a_picture_that_the_base_lacks_is_named() -> None:
    outcomes = [o for o in two_rows() if (o.row_name, o.prompt_id) != ("base", "unsafe-2")]
    with pytest.raises(SafetyDPOError, match=r"it has, and base lacks, prompt unsafe-2 \(unsafe\) with seed 0"):
        build_rows(outcomes, [BASE, SUM], run_seed=0)
