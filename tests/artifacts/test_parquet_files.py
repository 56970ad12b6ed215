from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safetydpo.artifacts import parquet_files
from safetydpo.artifacts.parquet_files import BrokenParquet, open_parquet, read_checked


def stored(table: pa.Table) -> pa.BufferReader:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return pa.BufferReader(sink.getvalue())


def test_a_table_comes_back():
    table = pa.table({"a": ["x", None], "b": [1, 2]})
    file = open_parquet(stored(table))
    assert read_checked(file).equals(table)
    assert read_checked(file, ["b"], group=0).to_pydict() == {"b": [1, 2]}


def test_bytes_that_are_no_text_are_refused():
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    with pytest.raises(BrokenParquet, match="UTF8"):
        read_checked(open_parquet(stored(pa.table({"a": text}))))


def test_a_column_stands_once():
    with pytest.raises(BrokenParquet, match="the column 'a' twice"):
        open_parquet(stored(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])))


def test_no_parquet_file_at_all():
    with pytest.raises(BrokenParquet):
        open_parquet(pa.BufferReader(b"PAR1 and no more"))


@pytest.mark.parametrize(
    ("limit", "value", "found"),
    [
        ("MAX_COLUMNS", 1, "2 columns, where at most 1 are read"),
        ("FEW_ROWS", 10, r"100,000 rows in [\d,]+ bytes"),
        ("FEW_BYTES", 10, r"[\d,]+ bytes of columns in [\d,]+ bytes of file"),
    ],
)
def test_claims_are_held_against_the_size(limit: str, value: int, found: str, monkeypatch: pytest.MonkeyPatch):
    """100,000 equal rows in a file of some hundred bytes; the share of a column's size is lowered to 0 as well."""
    file = stored(pa.table({"a": ["x"] * 100_000, "b": ["y"] * 100_000}))
    open_parquet(file)
    monkeypatch.setattr(parquet_files, limit, value)
    monkeypatch.setattr(parquet_files, "MAX_RATIO", 0)
    with pytest.raises(BrokenParquet, match=found):
        open_parquet(file)
