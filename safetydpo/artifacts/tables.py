"""Parquet in and out: checked against its schema, row groups kept small, nothing half-written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.parquet_files import open_parquet, read_checked
from safetydpo.artifacts.schemas import ADDED_LATER
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

ROWS_PER_GROUP = 64
ROWS_PER_CHUNK = 20_000


def table_from_rows(rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> pa.Table:
    """Return `rows` as a table of exactly `schema`.

    Raises:
        SafetyDPOError: naming the first value that does not fit, is missing or belongs to no column.
    """
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise SafetyDPOError(f"expected rows of columns {schema.names}, found another: {min(unknown)!r}")
    try:
        table = pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise SafetyDPOError(
            f"expected rows of columns {schema.names}, found: {' '.join(str(error).split())}"
        ) from error
    # Arrow takes an absent key for a null and lets it into a column that has none.
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise SafetyDPOError(f"expected a value of {field.name!r} in every row, found a row without")
    return table


def table_from_stream(rows: Iterable[Mapping[str, object]], schema: pa.Schema) -> pa.Table:
    """Return the same as `table_from_rows`, of a stream of which only some thousand rows are in memory at a time.

    Raises:
        SafetyDPOError: naming the first value that does not fit, is missing or belongs to no column.
    """
    stream = iter(rows)
    chunks = []
    while chunk := list(islice(stream, ROWS_PER_CHUNK)):
        chunks.append(table_from_rows(chunk, schema))
    return pa.concat_tables(chunks) if chunks else schema.empty_table()


def write_table(location: Location, table: pa.Table) -> None:
    """Write one Parquet file, all or nothing (zstd-1, no dictionaries, row groups of 64)."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd", compression_level=1, use_dictionary=False
    )
    location.write_bytes(sink.getvalue().to_pybytes())


def read_table(location: Location, schema: pa.Schema, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file, or all Parquet files of a folder in name order.

    With `columns` only those are fetched, so that looking at ids does not read the pictures beside them. A column that
    is marked in `schema` as added later is read as nulls from files that lack it.

    Raises:
        SafetyDPOError: if a file is missing, truncated, or lacks another column of `schema`.
    """
    if location.is_folder():
        sources: Iterable[Location] = (file for file in location.walk() if file.path.endswith(".parquet"))
    else:
        sources = (location,)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    parts = [_read_file(source, wanted, whole=columns is None) for source in sources]
    return pa.concat_tables(parts) if parts else wanted.empty_table()


def read_chosen(
    location: Location, schema: pa.Schema, *, columns: Sequence[str], id_column: str, wanted: Collection[str]
) -> Iterator[dict[str, object]]:
    """Yield `columns` of the rows of one file whose id is `wanted`, in the file's order, one row group in memory.

    Raises:
        SafetyDPOError: if the file is missing, truncated, or lacks one of the columns.
    """
    ids = pa.array(sorted(wanted), type=pa.string())
    present = read_table(location, schema, columns=[id_column]).column(id_column)
    chosen = pc.is_in(present, value_set=ids).to_pylist()
    with location.open_random_access() as stream:
        file = open_parquet(stream)
        start = 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            keep = chosen[start : start + count]
            start += count
            if any(keep):
                yield from file.read_row_group(number, columns=list(columns)).filter(pa.array(keep)).to_pylist()


def _read_file(source: Location, wanted: pa.Schema, *, whole: bool) -> pa.Table:
    if whole:
        data = source.read_bytes()
        return _parse(source, pa.BufferReader(data), wanted, size=len(data))
    size = source.size_bytes()
    with source.open_random_access() as stream:
        return _parse(source, stream, wanted, size=size)


def _parse(source: Location, stream: pa.NativeFile, wanted: pa.Schema, *, size: int) -> pa.Table:
    try:
        # Neighbouring columns come in one request to an object store, not in one each.
        file = open_parquet(stream, pre_buffer=True)
        present = [name for name in wanted.names if name in file.schema_arrow.names]
        missing = [field for field in wanted if field.name not in present]
        for field in missing:
            if field.metadata is None or not ADDED_LATER.items() <= field.metadata.items():
                raise SafetyDPOError(f"expected columns {wanted.names} in {source}, found no {field.name!r}")
        table = read_checked(file, present)
        for field in missing:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        return table.select(wanted.names).cast(wanted)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise SafetyDPOError(
            f"expected a complete Parquet file at {source}, found {size:,} bytes that do not parse "
            f"({' '.join(str(error).split())[:120]}): {_remedy(source)}"
        ) from error


def _remedy(source: Location) -> str:
    # Without the folder's record nothing below it counts, so that its stage makes all of it again.
    for folder in (source.parent, source.parent.parent):
        if (folder / RECORD_FILE).is_file():
            return f"delete the folder {folder} and run the same command again"
    return "write it again"


def fingerprint_rows(pairs: Iterable[tuple[str, str]]) -> str:
    """Return the fingerprint of a set of rows: sha256 over sorted `(row_id, content_sha256)`.

    File names hold write ids and row order depends on workers; the fingerprint depends on neither.
    """
    digest = hashlib.sha256()
    for row_id, content in sorted(pairs):
        digest.update(f"{row_id} {content}\n".encode())
    return digest.hexdigest()


def fingerprint_sorted_ids(ids: Iterable[str]) -> str:
    """Return what `fingerprint_rows` returns of these ids without contents, for ids that are in order already."""
    return hashlib.sha256("".join([f"{row_id} \n" for row_id in ids]).encode()).hexdigest()
