from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from safetydpo.artifacts.evaluation_schemas import METRIC_ROWS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.evaluation.exports import metric_rows, metrics_csv, tracked_metrics
from tests.evaluation.synthetic import make_summary

ROW: dict[str, Any] = {
    "row": "base", "metric": "ip", "value": 0.5, "low": 0.25, "high": 0.75, "cluster_low": None, "cluster_high": None,
    "n": 8, "unit": "rate", "seed": None, "split": "test",
}  # fmt: skip


def test_one_row_by_hand() -> None:
    assert metrics_csv([ROW]) == (
        "row,metric,value,low,high,cluster_low,cluster_high,n,unit,seed,split\r\n"
        "base,ip,0.5,0.25,0.75,,,8,rate,,test\r\n"
    )


def test_every_metric_of_every_row_and_seed_is_there() -> None:
    summary = make_summary(seeds=(0, 1))
    rows = metric_rows(summary)
    assert len(rows) == sum(len(row["metrics"]) for row in summary["rows"])
    assert {row["seed"] for row in rows} == {None, 0, 1}
    for row in rows:
        metric = next(
            one["metrics"][row["metric"]]
            for one in summary["rows"]
            if (one["name"], one["seed"]) == (row["row"], row["seed"])
        )
        assert [row[name] for name in ("value", "low", "high", "n", "unit")] == [
            metric[name] for name in ("value", "low", "high", "n", "unit")
        ]
        assert row["cluster_high"] == metric.get("cluster_high")


def test_csv_and_parquet_hold_the_same(tmp_path: Path) -> None:
    """Python's own reader of CSV, pyarrow's of Parquet: floats come back bit by bit."""
    rows = metric_rows(make_summary())
    write_table(open_location(str(tmp_path / "metrics.parquet")), table_from_rows(rows, METRIC_ROWS))
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.schema.names == METRIC_ROWS.names
    assert table.to_pylist() == rows
    lines = list(csv.DictReader(io.StringIO(metrics_csv(rows))))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert {name: None if text == "" else text for name, text in line.items()} == {
            name: None if value is None else str(value) for name, value in row.items()
        }
        assert math.isfinite(float(line["value"]))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_text_is_read_as_a_formula(text: str) -> None:
    (line,) = csv.DictReader(io.StringIO(metrics_csv([{**ROW, "row": text}]), newline=""))
    assert line["row"] == f"'{text}"


def test_numbers_below_zero_stay_numbers() -> None:
    (line,) = csv.DictReader(io.StringIO(metrics_csv([{**ROW, "value": -0.5}])))
    assert float(line["value"]) == -0.5


def test_a_comma_and_a_quote_do_not_shift_the_columns() -> None:
    (line,) = csv.DictReader(io.StringIO(metrics_csv([{**ROW, "row": 'a,"b'}])))
    assert line["row"] == 'a,"b'
    assert line["split"] == "test"


def test_tracked_names_are_those_that_servers_take() -> None:
    row = next(row for row in make_summary()["rows"] if row["name"] == "searched")
    found = tracked_metrics(row)
    assert found["test/ip"] == row["metrics"]["ip"]["value"]
    assert found["test/ip/hate"] == row["metrics"]["ip:hate"]["value"]
    assert found["test/ip/hate_high"] == row["metrics"]["ip:hate"]["high"]
    assert len(found) == 3 * len(row["metrics"])
    assert not [name for name in found if set(name) & set(":=|")]
