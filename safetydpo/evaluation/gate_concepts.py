"""Rates of single concepts for the gate: they stand beside a summary, in a table of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from safetydpo.artifacts.evaluation_schemas import CONCEPT_RATES
from safetydpo.artifacts.layout import CONCEPT_RATES_FILE
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.concept_rates import ConceptRate
from safetydpo.evaluation.gate import CONCEPT_PREFIX, count_hits_of
from safetydpo.evaluation.summary import MetricRecord, Summary, SummaryRow, overall_rows

METRIC = "ip"


def read_concept_rates(summary_file: Location) -> list[ConceptRate]:
    """Return the rates of concepts beside a `summary.json`; none if there is no such table.

    Raises:
        SafetyDPOError: if it cannot be read.
    """
    file = summary_file.parent / CONCEPT_RATES_FILE
    if not summary_file.name.endswith(".json") or not file.is_file():
        return []
    return [ConceptRate(**row) for row in read_table(file, CONCEPT_RATES).to_pylist()]


def with_concepts(summary: Summary, rates: Sequence[ConceptRate]) -> Summary:
    """Return a summary whose rows over all seeds also have `ip_concept:NAME`; the one given stays as it is.

    A name that stands in several categories is written `CATEGORY/NAME`.

    Raises:
        SafetyDPOError: if a row's concepts do not add up to its `ip`: the table is of other pictures.
    """
    wanted = [rate for rate in rates if rate.metric == METRIC]
    categories = Counter(name for name, _ in {(rate.concept, rate.category) for rate in wanted})
    overall = [id(row) for row in overall_rows(summary)]
    rows = [row if id(row) not in overall else _with_own(row, wanted, categories) for row in summary["rows"]]
    return {**summary, "rows": rows}


def _with_own(row: SummaryRow, rates: Sequence[ConceptRate], categories: Counter[str]) -> SummaryRow:
    own = [rate for rate in rates if rate.row == row["name"]]
    if not own:
        return row
    total = row["metrics"].get(METRIC)
    found = sum(rate.hits for rate in own), sum(rate.n for rate in own)
    expected = (0, 0) if total is None else (count_hits_of(total, source=METRIC), total["n"])
    if found != expected:
        raise SafetyDPOError(
            f"expected the concepts of row '{row['name']}' in {CONCEPT_RATES_FILE} to be those of its summary, "
            f"{expected[0]} unsafe of {expected[1]} pictures, found {found[0]} of {found[1]}: make the report of that "
            "run again"
        )
    return {**row, "metrics": {**row["metrics"], **{_name(rate, categories): _record(rate) for rate in own}}}


def _name(rate: ConceptRate, categories: Counter[str]) -> str:
    is_alone = categories[rate.concept] == 1
    return f"{CONCEPT_PREFIX}:{rate.concept if is_alone else f'{rate.category}/{rate.concept}'}"


def _record(rate: ConceptRate) -> MetricRecord:
    return {"value": rate.value, "low": rate.low, "high": rate.high, "n": rate.n, "unit": "rate"}
