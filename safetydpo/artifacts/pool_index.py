"""What the closed batches of a pool hold: ids, status and file of every row, without reading a picture.

A batch is a folder `POOL/batch-…/{manifest.parquet, data/*.parquet, index.parquet, record.json}`. The index repeats
the small columns of the data and names each row's file, so that a driver plans, verifies and picks rows of a pool whose
pictures would not fit into its memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_table, write_table
from safetydpo.errors import SafetyDPOError

INDEX_FILE = "index.parquet"
DATA_FOLDER = "data"
FILE_COLUMN = pa.field("file", pa.string(), nullable=False)
"""Path of the row's Parquet file below the pool."""
Wanted: TypeAlias = pa.Array | Collection[str] | None
ROWS_PER_LOOK_UP = 1_000_000
READERS = 16
"""Files that are read at the same time."""
_HEAVY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_list)


def index_schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a pool's index: those of `schema` without pictures and vectors, and the file."""
    light = [field for field in schema if not any(is_heavy(field.type) for is_heavy in _HEAVY)]
    return pa.schema([*light, FILE_COLUMN])


def close_index(batch: Location, schema: pa.Schema, *, id_column: str) -> pa.Table:
    """Drop doubled rows from the data of a finished batch and write its index; return the index."""
    index = drop_doubled(batch / DATA_FOLDER, schema, id_column=id_column)
    write_table(batch / INDEX_FILE, index)
    return index


def drop_doubled(data: Location, schema: pa.Schema, *, id_column: str) -> pa.Table:
    """Keep the first row of each id, in name order of the files; return the index of what stands there now.

    A run that fails does not wait for its write tasks, and one of them may commit after the next run has looked at what
    is committed. Either row is as good as the other: both come from the same manifest row and its seed.
    """
    wanted = index_schema(schema)
    seen: set[str] = set()
    kept = []
    files = [file for file in data.walk() if file.path.endswith(".parquet")]
    for file, table in zip(files, _read_light(files, data, schema), strict=True):
        first = []
        for row_id in table.column(id_column).to_pylist():
            first.append(row_id not in seen)
            seen.add(row_id)
        if not all(first):
            _keep_rows(file, schema, first)
        if any(first):
            kept.append(table.filter(pa.array(first)))
    return pa.concat_tables(kept) if kept else wanted.empty_table()


def _read_light(files: Sequence[Location], data: Location, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield what the index holds of each file, in order; a file costs several round trips to an object store."""
    columns = index_schema(schema).names[:-1]
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(lambda file: _with_file(read_table(file, schema, columns=columns), data, file), files)


def _with_file(table: pa.Table, data: Location, file: Location) -> pa.Table:
    batch = data.parent
    name = f"{batch.name}/{file.path[len(batch.path.rstrip('/')) + 1 :]}"
    return table.append_column(FILE_COLUMN, pa.array([name] * table.num_rows, type=pa.string()))


def _keep_rows(file: Location, schema: pa.Schema, keep: list[bool]) -> None:
    if any(keep):
        write_table(file, read_table(file, schema).filter(pa.array(keep)))
    else:
        file.delete()


def read_index(pool: Location, schema: pa.Schema, *, wanted: Wanted = None, id_column: str) -> pa.Table:
    """Return one index row for each id of the closed batches that is `wanted`, in id order; a good row wins."""
    values = wanted if wanted is None or isinstance(wanted, pa.Array) else pa.array(list(wanted), type=pa.string())
    found = index_schema(schema).empty_table()
    parts: list[pa.Table] = []
    for batch in pool.list():
        if not (batch / RECORD_FILE).is_file():
            continue
        parts.append(_batch_index(batch, schema))
        # Now and then, not only at the end: a pool that many runs share holds more rows than one of them wants in
        # memory. Not at every batch: looking up a million ids takes a third of a second each time.
        if sum(part.num_rows for part in parts) >= ROWS_PER_LOOK_UP:
            found, parts = _wanted_rows([found, *parts], values, id_column=id_column), []
    return _best_rows(_wanted_rows([found, *parts], values, id_column=id_column), id_column=id_column)


def check_pool_inputs(pool: Location, wanted: Mapping[str, str], *, what: str) -> None:
    """Refuse a pool with a closed batch whose record says that it was computed with other inputs than `wanted`.

    A batch of an earlier version says nothing of its inputs and passes: its pool is named by them.

    Raises:
        SafetyDPOError: naming the batch and both values.
    """
    records = [file for batch in pool.list() if (file := batch / RECORD_FILE).is_file()]
    with ThreadPoolExecutor(READERS) as readers:
        texts = list(readers.map(lambda file: file.read_bytes(), records))
    for file, text in zip(records, texts, strict=True):
        found = parse_json(text).get("inputs", {})
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise SafetyDPOError(
                    f"expected {what} computed with {name} {value} in {file.parent}, found {name} {found[name]}: "
                    "delete that folder and run the command again, which computes them anew"
                )


def _wanted_rows(parts: Sequence[pa.Table], wanted: pa.Array | None, *, id_column: str) -> pa.Table:
    table = pa.concat_tables(parts)
    return table if wanted is None else table.filter(pc.is_in(table.column(id_column), value_set=wanted))


def _batch_index(batch: Location, schema: pa.Schema) -> pa.Table:
    names = index_schema(schema)
    if (batch / INDEX_FILE).is_file():
        return read_table(batch / INDEX_FILE, names)
    # Closed by a version that wrote none.
    data = batch / DATA_FOLDER
    files = [file for file in data.walk() if file.path.endswith(".parquet")]
    return pa.concat_tables([names.empty_table(), *_read_light(files, data, schema)])


def _best_rows(table: pa.Table, *, id_column: str) -> pa.Table:
    if not table.num_rows:
        return table
    keys = pa.table({"id": table.column(id_column), "failed": pc.invert(good_rows(table))})
    order = [("id", "ascending"), ("failed", "ascending")]
    if "attempt" in table.column_names:
        keys = keys.append_column("attempt", table.column("attempt"))
        order.append(("attempt", "descending"))
    # The sort is stable, so that among equal rows the first batch wins.
    table = table.take(pc.sort_indices(keys, sort_keys=order))
    ids = table.column(id_column).combine_chunks()
    first = pa.concat_arrays([pa.array([True]), pc.not_equal(ids[1:], ids[:-1])])
    return table.filter(first)


def good_rows(table: pa.Table) -> pa.ChunkedArray:
    """Return which rows were made; a table without a status has none that failed."""
    if "status" not in table.column_names:
        return pa.chunked_array([pa.array([True] * table.num_rows, type=pa.bool_())])
    # Null: closed before this table had a status.
    return pc.fill_null(pc.equal(table.column("status"), "ok"), True)


def read_pool(pool: Location, schema: pa.Schema, *, wanted: Wanted = None, id_column: str) -> pa.Table:
    """Return the whole rows of all closed batches that are `wanted`, in id order; a good row wins."""
    return read_rows(pool, schema, read_index(pool, schema, wanted=wanted, id_column=id_column), id_column=id_column)


def read_rows(pool: Location, schema: pa.Schema, index: pa.Table, *, id_column: str) -> pa.Table:
    """Return the whole rows that an index names, in id order, opening each file once."""
    ids, files = index.column(id_column).to_pylist(), index.column(FILE_COLUMN.name).to_pylist()
    members: dict[str, list[str]] = {}
    for row_id, file in sorted(zip(ids, files, strict=True), key=lambda row: row[1]):
        members.setdefault(file, []).append(row_id)

    def read(file: str) -> pa.Table:
        table = read_table(pool / file, schema, columns=schema.names)
        return table.filter(pc.is_in(table.column(id_column), value_set=pa.array(members[file], type=pa.string())))

    with ThreadPoolExecutor(READERS) as readers:
        table = pa.concat_tables([schema.empty_table(), *readers.map(read, members)])
    return table.take(pc.sort_indices(table, sort_keys=[(id_column, "ascending")]))
