from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.summary import check_summary, dump_summary, parse_summary
from tests.evaluation.synthetic import make_summary


@pytest.fixture(scope="module")
def summary() -> Any:
    return make_summary()


def changed(summary: Any, **changes: Any) -> Any:
    return {**copy.deepcopy(summary), **changes}


def with_metric(summary: Any, name: str, **changes: Any) -> Any:
    other = changed(summary)
    other["rows"][0]["metrics"][name] = {**other["rows"][0]["metrics"]["ip"], **changes}
    return other


def test_written_and_read_again(summary: Any) -> None:
    text = dump_summary(summary)
    assert parse_summary(text) == summary
    assert json.loads(text)["schema_version"] == 1
    assert dump_summary(parse_summary(text)) == text


def test_the_shipped_schema_is_itself_valid() -> None:
    from importlib.resources import files

    schema = json.loads(files("safetydpo.evaluation").joinpath("summary.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)


def test_what_does_not_fit_is_named(summary: Any) -> None:
    with pytest.raises(SafetyDPOError, match=r"expected a summary of schema_version 1, found at schema_version: 1 was"):
        check_summary(changed(summary, schema_version=2))
    without_seed = changed(summary)
    del without_seed["rows"][0]["seed"]
    with pytest.raises(SafetyDPOError, match="found at rows/0: 'seed' is a required property"):
        check_summary(without_seed)
    with pytest.raises(SafetyDPOError, match="found at rows/0/metrics/ip/n: 0 is less than the minimum of 1"):
        check_summary(with_metric(summary, "ip", n=0))
    with pytest.raises(SafetyDPOError, match="found at rows/0/metrics: 'IP' does not match"):
        check_summary(with_metric(summary, "IP"))
    other_kind = changed(summary)
    other_kind["rows"][0]["kind"] = "best"
    with pytest.raises(SafetyDPOError, match="found at rows/0/kind: 'best' is not one of"):
        check_summary(other_kind)
    with pytest.raises(SafetyDPOError, match="found at the document: 'versions' is a required property"):
        check_summary({key: value for key, value in summary.items() if key != "versions"})


@pytest.mark.parametrize("ends", [{"low": 0.9, "value": 0.5}, {"high": float("nan")}, {"high": float("inf")}])
def test_disordered_or_endless_intervals_are_refused(summary: Any, ends: dict[str, float]) -> None:
    with pytest.raises(SafetyDPOError, match="expected finite low <= value <= high for ip of row 'base'"):
        dump_summary(with_metric(summary, "ip", **ends))


def test_broken_json_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="expected summary.json to be JSON, found .*: line 1"):
        parse_summary('{"rows": [')
