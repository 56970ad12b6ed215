"""The scores of a summary in other shapes: long-form rows for CSV and Parquet, named numbers for tracking servers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safetydpo.artifacts.csv_cells import text_cell
from safetydpo.artifacts.evaluation_schemas import METRIC_ROWS
from safetydpo.evaluation.summary import Summary, SummaryRow

_TRACKED_NAME = re.compile(r"[^\w./ -]")


def metric_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return one row per metric of each summary row, in their order, with the columns of `METRIC_ROWS`.

    The ends of an interval that was not computed are None; so is the seed of pooled seeds.
    """
    return [
        {
            "row": row["name"],
            "metric": name,
            "value": float(metric["value"]),
            "low": float(metric["low"]),
            "high": float(metric["high"]),
            "cluster_low": metric.get("cluster_low"),
            "cluster_high": metric.get("cluster_high"),
            "n": metric["n"],
            "unit": metric["unit"],
            "seed": row["seed"],
            "split": row["split"],
        }
        for row in summary["rows"]
        for name, metric in row["metrics"].items()
    ]


def metrics_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return such rows as CSV (RFC 4180, header first); what is None is empty, and no text is read as a formula."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\r\n")
    writer.writerow(METRIC_ROWS.names)
    for row in rows:
        writer.writerow([text_cell(row[name]) for name in METRIC_ROWS.names])
    return sink.getvalue()


def tracked_metrics(row: SummaryRow) -> dict[str, float]:
    """Return the metrics of a row under names that tracking servers take: `test/ip`, `test/ip/hate`, `test/ip_low`."""
    named = {}
    for name, metric in row["metrics"].items():
        key = f"{row['split']}/{_TRACKED_NAME.sub('_', name.replace(':', '/'))}"
        named[key] = float(metric["value"])
        named[f"{key}_low"], named[f"{key}_high"] = float(metric["low"]), float(metric["high"])
    return named
