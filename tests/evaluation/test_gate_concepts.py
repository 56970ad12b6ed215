"""Concepts for the gate: their rates come from the table beside the summary, and have to be of the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from safetydpo.artifacts.evaluation_schemas import CONCEPT_RATES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.gate import GatePolicy
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.concept_rates import ConceptRate, concept_rates
from safetydpo.evaluation.gate import judge_row
from safetydpo.evaluation.gate_concepts import read_concept_rates, with_concepts
from safetydpo.evaluation.summary import Summary, overall_rows
from safetydpo.statistics import clopper_pearson
from tests.evaluation.summaries import rate, row, summary_of
from tests.evaluation.synthetic import SOURCES, make_outcomes, make_summary


def of_concept(concept: str, hits: int, n: int, *, category: str = "hate", name: str = "searched") -> ConceptRate:
    exact = clopper_pearson(hits, n)
    return ConceptRate(name, "ip", category, concept, hits, n, exact.value, exact.low, exact.high)


def summary_with(rates: Sequence[ConceptRate]) -> Summary:
    totals: dict[str, list[int]] = {}
    for one in rates:
        found = totals.setdefault(one.row, [0, 0])
        totals[one.row] = [found[0] + one.hits, found[1] + one.n]
    return summary_of([row(name, {"ip": rate(*total)}) for name, total in totals.items()])


def states(rates: Sequence[ConceptRate], **policy: Any) -> dict[str, str]:
    result = judge_row(with_concepts(summary_with(rates), rates), GatePolicy(**policy))
    return {check.threshold.metric: check.state for check in result.checks}


def test_each_concept_is_judged_by_its_own_bound_and_number() -> None:
    """0 of 40 has the upper bound 0.088, 10 of 40 has 0.412; 0 of 19 are too few, 19 of 19 a failure anyway."""
    rates = [of_concept("axe", 0, 40), of_concept("bomb", 10, 40), of_concept("dagger", 0, 19)]
    assert states(rates, max_concept_ip=0.1) == {
        "ip_concept:axe": "passed",
        "ip_concept:bomb": "failed",
        "ip_concept:dagger": "not enough evidence",
    }
    assert set(states(rates, max_concept_ip=0.45, min_concept_n=19).values()) == {"passed"}
    assert states([of_concept("axe", 19, 19)], max_concept_ip=0.1) == {"ip_concept:axe": "failed"}


def test_one_name_in_two_categories_is_two_concepts() -> None:
    rates = [of_concept("mask", 0, 40), of_concept("mask", 40, 40, category="violence"), of_concept("axe", 0, 40)]
    assert states(rates, max_concept_ip=0.1) == {
        "ip_concept:hate/mask": "passed",
        "ip_concept:violence/mask": "failed",
        "ip_concept:axe": "passed",
    }


def test_a_concept_that_only_another_row_has_is_missing() -> None:
    rates = [of_concept("axe", 40, 40, name="base"), of_concept("bomb", 0, 40)]
    found = states(rates, max_concept_ip=0.1)
    assert found == {"ip_concept:axe": "not measured", "ip_concept:bomb": "passed"}


def test_without_the_table_nothing_is_measured_and_where_it_stands_is_told(store: Location) -> None:
    summary = summary_with([of_concept("axe", 0, 40)])
    assert read_concept_rates(store / "summary.json") == []
    (check,) = judge_row(with_concepts(summary, []), GatePolicy(max_concept_ip=0.1)).checks
    assert check.state == "not measured"
    assert check.why == (
        "row 'searched' has no ip_concept:<concept>: name a run folder with report/concept_rates.parquet, "
        "or leave this threshold out"
    )


def test_it_is_read_from_beside_the_summary_only(store: Location) -> None:
    rates = [of_concept("axe", 0, 40)]
    write_table(store / "concept_rates.parquet", table_from_rows([asdict(one) for one in rates], CONCEPT_RATES))
    assert read_concept_rates(store / "summary.json") == rates
    # A folder of measured units is named itself.
    assert read_concept_rates(store / "results") == []
    (store / "concept_rates.parquet").write_bytes(b"PAR1")
    with pytest.raises(SafetyDPOError, match="expected a complete Parquet file at .*concept_rates.parquet"):
        read_concept_rates(store / "summary.json")


@pytest.mark.parametrize("rates", [[of_concept("axe", 1, 40)], [of_concept("axe", 0, 41)]], ids=["hits", "pictures"])
def test_a_table_of_other_pictures_is_refused(rates: list[ConceptRate]) -> None:
    summary = summary_with([of_concept("axe", 0, 40)])
    with pytest.raises(SafetyDPOError, match=r"concepts of row 'searched' .* 0 unsafe of 40 pictures, found \d of 4"):
        with_concepts(summary, rates)


def test_those_of_a_run_fit_its_summary_and_nothing_else_changes() -> None:
    """Of all rows over all seeds; three seeds of 140 pictures of 35 concepts are 12 of each."""
    sources = (*SOURCES[:2], SOURCES[-1])
    outcomes = make_outcomes(seeds=(0, 1, 2), sources=sources)
    summary = make_summary(seeds=(0, 1, 2), sources=sources)
    wider = with_concepts(summary, concept_rates(outcomes))
    for before, after in zip(summary["rows"], wider["rows"], strict=True):
        added = {name: metric for name, metric in after["metrics"].items() if name not in before["metrics"]}
        assert {**after, "metrics": {**before["metrics"], **added}} == after
        assert all(name.startswith("ip_concept:") for name in added)
        assert bool(added) == (before in overall_rows(summary))
        assert not added or sum(metric["n"] for metric in added.values()) == before["metrics"]["ip"]["n"]
    assert len(overall_rows(wider)) == len(sources)
