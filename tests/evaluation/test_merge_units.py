"""Records of measured merges: what is written reads back, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.merge_curve import CurvePoint
from safetydpo.evaluation.merge_units import dump_merge_unit, parse_merge_unit
from tests.evaluation.measured_merges import make_merge


def test_a_record_reads_back_and_has_a_line_per_count() -> None:
    unit = make_merge()
    text = dump_merge_unit(unit)
    again = parse_merge_unit(text, source="it")
    assert again.candidates == tuple(unit.candidates)
    assert (again.base, again.tested, again.counts.to_json()) == (
        unit.base,
        unit.tested,
        parse_merge_unit(dump_merge_unit(again), source="it").counts.to_json(),
    )
    assert '"ip": [1, 10]' in text
    assert dump_merge_unit(again) == text


def test_the_points_of_a_curve_begin_with_the_base() -> None:
    """IP 0.1 and 0.5 at retention 0.95 and 1; with mush 0.2 and 0.5; the third was not validated in full."""
    unit = make_merge()
    assert unit.points("full") == [CurvePoint(1.0, 1.0), CurvePoint(0.95, 0.1), CurvePoint(1.0, 0.5)]
    assert unit.points("full", with_mush=True)[1] == CurvePoint(0.95, 0.2)
    assert len(unit.points("small")) == 4
    assert unit.points("test") == [CurvePoint(1.0, 1.0), CurvePoint(0.95, 0.1)]


def test_suppliers_stand_in_new_records_and_are_not_asked_of_older_ones() -> None:
    blend, chosen = dump_merge_unit(make_merge()), dump_merge_unit(make_merge("co_merge", suppliers=3.25))
    assert "suppliers" not in blend
    assert parse_merge_unit(blend, source="it").suppliers is None
    again = parse_merge_unit(chosen, source="it")
    assert again.suppliers == 3.25
    assert dump_merge_unit(again) == chosen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: one["candidates"][1].update(suppliers=10.5),
            "expected 0 to 10 suppliers per layer of 10 experts in it, found 10.5: delete that file",
        ),
        (lambda one: one["candidates"][1].update(suppliers="many"), "found ValueError"),
        (lambda one: one.update(schema_version=2), "expected a measured merge of schema_version 1 in it, found 2"),
        (lambda one: one.pop("tested"), r"expected the record of a measured merge in it, found KeyError\('tested'\)"),
        (lambda one: one["tested"].update(ip=[11, 10]), "expected hits between 0 and n in it, found 11 of 10 at ip"),
        (lambda one: one["tested"].update(ip=[True, 10]), "found True of 10 at ip"),
        (
            lambda one: one.update(chosen=2),
            "expected a fully validated candidate to be the chosen one in it, found number 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    document = json.loads(dump_merge_unit(make_merge()))
    change(document)
    with pytest.raises(SafetyDPOError, match=message):
        parse_merge_unit(json.dumps(document), source="it")


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="expected the record of a measured merge in it"):
        parse_merge_unit("{", source="it")
