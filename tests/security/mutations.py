"""Damaged and hostile variants of valid files, drawn by hypothesis: bytes, JSON values, table cells, file headers."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

WEIRD_TEXTS = (
    "",
    " ",
    "\0",
    "../../etc/passwd",
    "/etc/passwd",
    "a\nb\r\nc",
    "\x1b]0;owned\x07\x1b[2J",
    "x" * 10_000,
    "'; touch /tmp/x; $(id) `id`",
    "<script>alert(1)</script>",
    "=HYPERLINK(1)",
    "\u202eevil",
    "💣",
    "\ufeff",
    "nan",
    "1e999",
    "9" * 400,
)
WEIRD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, "a", None], *WEIRD_TEXTS,
)  # fmt: skip
WEIRD_BYTES = (
    b"", b"\0", b"\xff\xfe", b"PAR1", b"\x89PNG\r\n\x1a\n", b"\n", b'"', b"\\ud800", b"[" * 5000, b'{"a":' * 3000,
    b"&a [*a]", b"!!python/object/apply:os.system [id]", b"1e999", b"NaN", b"9" * 5000, b"\x80\x04c", b"\xed\xa0\x80",
    b"\x1b[2J", b"{}", b"null", b",", b": ", b"- ", b"? ", b"|\n", b"%YAML 9.9\n---\n", b"2001-99-99",
    b"0x" + b"f" * 300,
)  # fmt: skip
WEIRD_COLUMNS: tuple[Callable[[int], pa.Array], ...] = (
    lambda n: pa.nulls(n),
    lambda n: pa.array(list(range(n)), pa.int64()),
    lambda n: pa.array([-(2**63)] * n, pa.int64()),
    lambda n: pa.array([float("nan")] * n),
    lambda n: pa.array([True] * n),
    lambda n: pa.array(["\0\x1b[2J../x" * 3] * n),
    lambda n: pa.array([None] * n, pa.string()),
    lambda n: pa.array(["x" * 10_000] * n),
    lambda n: pa.array([b"\xff\xfe\xfd"] * n, pa.binary()),
    # Bytes that say they are text.
    lambda n: pa.array([b"\xff\xfe\xfd"] * n, pa.binary()).view(pa.string()),
    lambda n: pa.array([["a", None]] * n),
    lambda n: pa.array([[["\ud7ff"]]] * n),
    lambda n: pa.array([{"bytes": b"x", "path": None}] * n),
    lambda n: pa.array([{"path": 3}] * n),
    lambda n: pa.array([datetime.date(1, 1, 1)] * n),
    lambda n: pa.array([2**62] * n, pa.timestamp("us", tz="UTC")),
    lambda n: pa.array([2**62] * n, pa.duration("s")),
    lambda n: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    lambda n: pa.array(["a"] * n).dictionary_encode(),
    lambda n: pa.array([0] * n, pa.timestamp("us", tz="Nowhere/City")),
    lambda n: pa.array([1] * n, pa.uint64()),
)


def mutate_bytes(draw: Draw, data: bytes) -> bytes:
    """Truncate, flip, splice, repeat, insert, or replace everything."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "splice", "drop", "number", "random")))
        if kind == "cut":
            data = data[:place]
        elif kind == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif kind == "insert":
            data = data[:place] + draw(st.sampled_from(WEIRD_BYTES)) + data[place:]
        elif kind == "splice":
            data = data[:place] + data[draw(st.integers(0, len(data))) :]
        elif kind == "drop":
            data = data[:place] + data[place + draw(st.integers(1, 64)) :]
        elif kind == "number":
            huge = draw(st.sampled_from((b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\0" * 8)))
            data = data[:place] + huge + data[place + len(huge) :]
        elif kind == "random":
            data = draw(st.binary(max_size=64))
    return data


def mutate_value(draw: Draw, value: Any) -> Any:
    """Put something else in one place of a JSON document."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.integers(0, 8))
        if how == 0:
            return {name: item for name, item in value.items() if name != key}
        if how == 1:
            return {**value, draw(st.sampled_from(WEIRD_TEXTS)): value[key]}
        return {**value, key: mutate_value(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutate_value(draw, value[place]), *value[place + draw(st.integers(0, 1)) :]]
    return draw(st.sampled_from(WEIRD_VALUES))


def mutate_json(draw: Draw, data: bytes) -> bytes:
    """Change one value of a JSON file, or of a line of one."""
    text = data.decode()
    lines = text.splitlines()
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = json.dumps(mutate_value(draw, json.loads(lines[place])))
        return "".join(f"{line}\n" for line in lines).encode()
    return json.dumps(mutate_value(draw, json.loads(text))).encode() + b"\n"


def mutate_yaml(draw: Draw, data: bytes) -> bytes:
    """Change one value of a YAML file; what is written is JSON, which is YAML."""
    import yaml

    return json.dumps(mutate_value(draw, yaml.safe_load(data))).encode()


def mutate_cells(draw: Draw, data: bytes) -> bytes:
    """Change a field of a table of text."""
    lines = data.decode().split("\n")
    place = draw(st.integers(0, len(lines) - 1))
    fields = lines[place].split(",")
    column = draw(st.integers(0, len(fields) - 1))
    weird = str(draw(st.sampled_from(WEIRD_VALUES)))
    fields[column] = f'"{weird}"' if draw(st.booleans()) else weird
    if draw(st.integers(0, 4)) == 0:
        fields.append("more")
    lines[place] = ",".join(fields)
    return "\n".join(lines).encode(errors="replace")


def mutate_parquet(draw: Draw, data: bytes) -> bytes:
    """Change, drop, double or swap columns of a Parquet file."""
    table = pq.read_table(io.BytesIO(data))
    names = list(table.column_names)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, table.num_columns - 1))
        how = draw(st.sampled_from(("cells", "cells", "cells", "drop", "double", "swap", "empty")))
        if how == "cells":
            column = draw(st.sampled_from(WEIRD_COLUMNS))(table.num_rows)
            table = table.set_column(place, names[place], column)
        elif how == "drop" and table.num_columns > 1:
            table = table.remove_column(place)
            names = list(table.column_names)
        elif how == "double":
            table = table.append_column(names[place], table.column(place))
            names = list(table.column_names)
        elif how == "swap":
            other = draw(st.integers(0, table.num_columns - 1))
            table = table.set_column(place, names[place], table.column(other))
        elif how == "empty":
            table = table.slice(0, 0)
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink)
    except (pa.ArrowException, ValueError):
        # What nobody can write, nobody has to read.
        return data[: len(data) // 2]
    return sink.getvalue()


def mutate_header(draw: Draw, data: bytes) -> bytes:
    """Change the header of a safetensors file, its length in keeping."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_value(draw, json.loads(data[8 : 8 + length]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutate_picture(draw: Draw, data: bytes) -> bytes:
    """Write other sizes into the first header of a PNG, with the checksum that they need."""
    import zlib

    sizes = st.sampled_from((0, 1, 7, 2**15, 2**20, 2**31 - 1, 2**32 - 1))
    header = b"IHDR" + draw(sizes).to_bytes(4, "big") + draw(sizes).to_bytes(4, "big") + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


MUTATORS: dict[str, Callable[[Draw, bytes], bytes]] = {
    "json": mutate_json,
    "yaml": mutate_yaml,
    "cells": mutate_cells,
    "parquet": mutate_parquet,
    "header": mutate_header,
    "picture": mutate_picture,
}


@st.composite
def damaged(draw: Draw, data: bytes, kind: str) -> bytes:
    """Return a variant of a valid file: its values changed, its bytes changed, or both."""
    how = draw(st.integers(0, 3)) if kind in MUTATORS else 0
    if how:
        data = MUTATORS[kind](draw, data)
    return mutate_bytes(draw, data) if how in (0, 3) else data
