"""Parquet files of unknown origin: checked counts before memory is taken, checked texts before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo.errors import shown

MAX_COLUMNS = 10_000
FEW_ROWS = 1_000_000
"""Up to so many are read whatever the size of the file; more must have a byte each, as rows with ids have."""
FEW_BYTES = 1 << 30
MAX_RATIO = 1000
"""A column of more than `FEW_BYTES` may take so many times its size in the file."""


class BrokenParquet(ValueError):  # noqa: N818 (says what was found)
    """Bytes that are no whole Parquet file, or hold what cannot be read; the message is one line."""


def open_parquet(stream: Any, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file after a look at what it claims to hold; `options` are those of `pq.ParquetFile`.

    Raises:
        BrokenParquet: if it is none, or claims so much that reading it would take all memory.
    """
    with reading_parquet():
        file = pq.ParquetFile(stream, **options)
        _check_claims(file.metadata, size=stream.size())
        _check_names(file.schema_arrow.names)
    return file


def read_checked(file: pq.ParquetFile, columns: Sequence[str] | None = None, *, group: int | None = None) -> pa.Table:
    """Return columns of a file, or of one of its row groups, whose values are what their types say.

    Raises:
        BrokenParquet: if pages are damaged, or a text is not UTF-8.
    """
    with reading_parquet():
        wanted = None if columns is None else list(columns)
        table = file.read(columns=wanted) if group is None else file.read_row_group(group, columns=wanted)
        # Arrow reads bytes that are no UTF-8 as text without a word.
        table.validate(full=True)
    return table


@contextmanager
def reading_parquet() -> Iterator[None]:
    """Turn what a damaged file ends in, in this block, into one kind of error."""
    try:
        yield
    except BrokenParquet:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        # Arrow's own errors and those of the storage; ValueError for text that is not UTF-8 and dates beyond Python's,
        # OverflowError for durations, KeyError for time zones that nobody knows, TypeError for unknown extensions.
        raise BrokenParquet(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _check_claims(metadata: pq.FileMetaData, *, size: int) -> None:
    if metadata.num_columns > MAX_COLUMNS:
        raise BrokenParquet(f"{metadata.num_columns:,} columns, where at most {MAX_COLUMNS:,} are read")
    if metadata.num_rows < 0 or metadata.num_rows > max(FEW_ROWS, size):
        raise BrokenParquet(f"{metadata.num_rows:,} rows in {size:,} bytes")
    total = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if total > max(FEW_BYTES, MAX_RATIO * size):
        raise BrokenParquet(f"{total:,} bytes of columns in {size:,} bytes of file")


def _check_names(names: Sequence[str]) -> None:
    known: set[str] = set()
    for name in names:
        if name in known:
            raise BrokenParquet(f"the column {shown(name)} twice")
        known.add(name)
