"""`summary.json`: the scores of a run, checked against the shipped JSON schema before anybody writes or reads them.

Layout: `summary.schema.json` beside this file, `schema_version` 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal, NotRequired, TypedDict, cast

import jsonschema

from safetydpo.artifacts.json_text import JsonError, parse_json
from safetydpo.errors import SafetyDPOError

SCHEMA_VERSION = 1
RowKind = Literal["base", "expert", "all_single", "merged", "searched", "comparator"]


class MetricRecord(TypedDict):
    """One metric of a row; ends of the two-sided 95 % interval, `n` pictures in the denominator."""

    value: float
    low: float
    high: float
    n: int
    unit: str
    cluster_low: NotRequired[float]
    cluster_high: NotRequired[float]
    n_reference: NotRequired[int]
    exact_low: NotRequired[float]
    exact_high: NotRequired[float]
    n_missing: NotRequired[int]


class SummaryRow(TypedDict):
    """One model on one set of prompts; `seed` None means all seeds pooled."""

    name: str
    kind: RowKind
    adapter_hash: str | None
    rank: int | None
    scale: float | None
    prompt_set: str
    split: str
    seed: int | None
    metrics: dict[str, MetricRecord]
    categories: NotRequired[list[str]]
    """Of a single expert that is not its name's: the categories it is made for."""


class FailedImage(TypedDict):
    """A picture that could not be made or read; it counts against its row."""

    row: str
    prompt_id: str
    seed: int
    reason: str


class Summary(TypedDict):
    """Everything in `summary.json`."""

    schema_version: int
    rows: list[SummaryRow]
    failed_images: list[FailedImage]
    timing_seconds: dict[str, float]
    config_hash: str
    versions: dict[str, str]


def build_summary(
    rows: Sequence[SummaryRow],
    failed_images: Sequence[FailedImage],
    *,
    timing_seconds: Mapping[str, float],
    config_hash: str,
    versions: Mapping[str, str],
) -> Summary:
    """Return the checked summary of a run.

    Raises:
        SafetyDPOError: if it does not fit the schema.
    """
    return check_summary(
        {
            "schema_version": SCHEMA_VERSION,
            "rows": list(rows),
            "failed_images": list(failed_images),
            "timing_seconds": dict(timing_seconds),
            "config_hash": config_hash,
            "versions": dict(versions),
        }
    )


def check_summary(document: Any) -> Summary:
    """Return `document` if it is a summary of this schema version with ordered, finite intervals.

    Raises:
        SafetyDPOError: naming the first field that does not fit.
    """
    schema = parse_json(files("safetydpo.evaluation").joinpath("summary.schema.json").read_text("utf-8"))
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    first = min(errors, key=lambda error: [str(part) for part in error.absolute_path], default=None)
    if first is not None:
        place = "/".join(str(part) for part in first.absolute_path) or "the document"
        raise SafetyDPOError(
            f"expected a summary of schema_version {SCHEMA_VERSION}, found at {place}: {first.message[:200]}; "
            "evaluate again with this version"
        )
    summary = cast("Summary", document)
    for row in summary["rows"]:
        for name, metric in row["metrics"].items():
            # A NaN passes a JSON schema's "number", and fails every comparison.
            if not -float("inf") < metric["low"] <= metric["value"] <= metric["high"] < float("inf"):
                raise SafetyDPOError(
                    f"expected finite low <= value <= high for {name} of row '{row['name']}', found "
                    f"{metric['low']}, {metric['value']}, {metric['high']}: leave out what cannot be computed"
                )
    return summary


def dump_summary(summary: Summary) -> str:
    """Return the text of `summary.json`, checked.

    Raises:
        SafetyDPOError: if it does not fit the schema.
    """
    return json.dumps(check_summary(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_summary(text: str) -> Summary:
    """Return the checked summary in the text of a `summary.json`.

    Raises:
        SafetyDPOError: if it is no JSON or does not fit the schema.
    """
    try:
        document = parse_json(text)
    except JsonError as error:
        raise SafetyDPOError(f"expected summary.json to be JSON, found {error}: evaluate the run again") from error
    return check_summary(document)


def overall_rows(summary: Summary) -> list[SummaryRow]:
    """Return one row per name, in order: all seeds pooled where there are several, else the only seed."""
    chosen: dict[str, SummaryRow] = {}
    for row in summary["rows"]:
        if row["name"] not in chosen or row["seed"] is None:
            chosen[row["name"]] = row
    return list(chosen.values())


def own_categories(row: SummaryRow) -> tuple[str, ...]:
    """Return the categories that the expert of a row is made for."""
    return tuple(row.get("categories", [row["name"].removeprefix("expert:")]))


def find_base(summary: Summary) -> SummaryRow | None:
    """Return the overall row of the base model, None if it was not evaluated."""
    return next((row for row in overall_rows(summary) if row["kind"] == "base"), None)
