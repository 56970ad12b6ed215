"""Any prompt file as a table of named columns: CSV, TSV, JSON lines, Parquet or plain lines, told apart by content."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from safetydpo.artifacts.json_text import JsonError, JsonTooDeep, parse_json
from safetydpo.artifacts.parquet_files import BrokenParquet, open_parquet, read_checked, reading_parquet
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.prompts.formats import FORMATS

HEAD_BYTES = 8192
CHUNK_BYTES = 1 << 20
LINES = "line"
Kind = Literal["csv", "tsv", "jsonl", "parquet", "lines"]
Row = Mapping[str, object]

_PARQUET = b"PAR1"
_LFS_POINTER = b"version https://git-lfs"
_BINARY = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
}
_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HEADER_NAME = re.compile(r"[A-Za-z_][\w.:-]*( [\w.:-]+){0,2}")
_HEADER_CHECKED_ROWS = 50


@dataclass(frozen=True)
class RawTable:
    """What stands in a prompt file before anybody says what it means."""

    file: str
    sha256: str
    kind: Kind
    columns: tuple[str, ...]
    rows: Sequence[tuple[int, Row]]
    """(row number, column -> value); the first row below a header is 1; in plain lines the number is the line's."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was put right while reading, with how often."""


def read_prompt_file(location: Location, *, as_lines: bool = False) -> RawTable:
    """Read a prompt file; `as_lines` takes a text as plain lines whatever it looks like.

    Raises:
        UsageError: if no file stands there.
        SafetyDPOError: if it is empty, a git-LFS pointer, binary, not UTF-8, or broken as a table.
    """
    if not location.is_file():
        found = "a folder" if location.is_folder() else "nothing"
        raise UsageError(f"expected a prompt file at {location}, found {found}: name one file")
    with location.open_random_access() as stream:
        head, digest = bytes(stream.read(HEAD_BYTES)), hashlib.sha256()
        _refuse_no_prompts(head, location)
        stream.seek(0)
        if head.startswith(_PARQUET):
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
            return _read_parquet(location, digest.hexdigest())
        data = bytes(stream.read())
    text = _decode(data, location)
    sha256 = hashlib.sha256(data).hexdigest()
    if not text.strip("\ufeff \t\r\n,"):
        raise SafetyDPOError(f"expected prompts in {location}, found only empty lines: name another file")
    if not as_lines and text.lstrip()[0] in "{[":
        table = _read_json_lines(text, location, sha256)
        if table is not None:
            return table
    delimiter = None if as_lines else _find_delimiter(text)
    return _read_lines(text, location, sha256) if delimiter is None else _read_csv(text, delimiter, location, sha256)


def _refuse_no_prompts(head: bytes, location: Location) -> None:
    if not head:
        raise SafetyDPOError(f"expected prompts in {location}, found an empty file (0 bytes): fetch it again")
    if head.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        told = f" to a file of {int(size[1]):,} bytes" if size else ""
        raise SafetyDPOError(
            f"expected prompts in {location}, found a git-LFS pointer{told}: run `git lfs pull` in its repository"
        )
    for magic, name in _WIDE.items():
        if head.startswith(magic):
            raise SafetyDPOError(f"expected UTF-8 text in {location}, found {name}: {_convert(name)}")
    for magic, name in _BINARY.items():
        if head.startswith(magic):
            raise SafetyDPOError(f"expected prompts as text or Parquet in {location}, found {name}: unpack it first")
    if b"\0" in head and not head.startswith(_PARQUET):
        raise SafetyDPOError(f"expected prompts as text or Parquet in {location}, found a binary file")


def _convert(name: str) -> str:
    return f"convert it with `iconv -f {name} -t UTF-8`"


def _decode(data: bytes, location: Location) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions count from behind a byte order mark.
        before = error.object[: error.start]
        raise SafetyDPOError(
            f"expected UTF-8 text in {location}, found byte 0x{error.object[error.start]:02x} in line "
            f"{before.count(10) + 1}: if it is Latin-1 or Windows text, {_convert('WINDOWS-1252')}"
        ) from error
    place = text.find("\0")
    if place >= 0:
        line = text.count("\n", 0, place) + 1
        raise SafetyDPOError(
            f"expected prompts as text or Parquet in {location}, found a NUL byte in line {line}: a binary or "
            "broken file"
        )
    return text


def _find_delimiter(text: str) -> str | None:
    """Return the delimiter of a table with a header, or None for plain lines.

    It is a table if its first line holds the columns of a known format, or if that line looks like a header: at least
    two different short names, and as many fields in each of the rows below.
    """
    first = text.split("\n", 1)[0].split("\r", 1)[0]
    for delimiter in ("\t", ","):
        try:
            names = _header(next(csv.reader([first], delimiter=delimiter, strict=True), []))
        except csv.Error:
            continue
        # One known name alone may be a word of a prompt with commas.
        if any(form.fits(names) or (len(form.required) > 1 and not form.missing(names)) for form in FORMATS):
            return delimiter
        if len(names) > 1 and _looks_like_header(names) and _has_width(text, delimiter, len(names)):
            return delimiter
    return None


def _looks_like_header(names: Sequence[str]) -> bool:
    # A table of numbered rows has no name above the numbers.
    named = names[1:] if names[0] == "" else names
    return len(set(names)) == len(names) and all(_HEADER_NAME.fullmatch(name) for name in named)


def _has_width(text: str, delimiter: str, width: int) -> bool:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        checked = [len(row) for row, _ in zip(rows, range(_HEADER_CHECKED_ROWS), strict=False) if row]
    except csv.Error:
        return False
    return len(checked) > 1 and set(checked) == {width}


def _header(fields: Sequence[str]) -> list[str]:
    """Return the names of a header without the empty ones that trailing commas leave."""
    names = [name.strip() for name in fields]
    while names and not names[-1]:
        names.pop()
    return names


def _read_csv(text: str, delimiter: str, location: Location, sha256: str) -> RawTable:
    # Some sets hold whole pictures in a field that nobody asks for.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = _header(next(records))
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SafetyDPOError(f"expected each column once in {location}, found {twice!r} twice: rename one")
        rows: list[tuple[int, Row]] = []
        for record in records:
            if not any(record):
                continue
            number = len(rows) + 1
            if len(record) < len(names) or any(record[len(names) :]):
                raise SafetyDPOError(
                    f"expected {len(names)} fields in row {number} of {location} (line {records.line_num}), found "
                    f"{len(record)}: put quotes around fields that hold a {'tab' if delimiter == chr(9) else 'comma'}"
                )
            rows.append((number, dict(zip(names, record, strict=False))))
    except csv.Error as error:
        raise SafetyDPOError(
            f"expected a well-formed table in {location}, found: {error} (line {records.line_num}): correct the quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return RawTable(str(location), sha256, "tsv" if delimiter == "\t" else "csv", tuple(names), rows)


def _read_json_lines(text: str, location: Location, sha256: str) -> RawTable | None:
    """Return the table, or None if the first line is no JSON: a prompt may begin with a bracket."""
    rows: list[tuple[int, Row]] = []
    columns: dict[str, None] = {}
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            value = parse_json(content, constant=_refuse_constant)
        except JsonTooDeep as error:
            raise SafetyDPOError(
                f"expected one JSON object per line in {location}, found one nested too deeply to read in line {line}: "
                "take that line out"
            ) from error
        except JsonError as error:
            # Only the first line says what kind of file it is; an array over several lines opens on one of its own.
            if not rows and content.strip() != "[" and not content.lstrip().startswith("{"):
                return None
            raise SafetyDPOError(
                f"expected one JSON object per line in {location}, found in line {line}: {error}"
            ) from error
        if not isinstance(value, dict):
            raise SafetyDPOError(
                f"expected one JSON object per line in {location}, found {_json_name(value)} in line {line}"
            )
        columns.update(dict.fromkeys(value))
        rows.append((len(rows) + 1, value))
    return RawTable(str(location), sha256, "jsonl", tuple(columns), rows)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON number")


def _json_name(value: object) -> str:
    return "an array" if isinstance(value, list) else f"{value!r}"


def _read_lines(text: str, location: Location, sha256: str) -> RawTable:
    rows: list[tuple[int, Row]] = []
    notes = {"empty lines": 0, "lines with trailing commas": 0, "lines with a stray CR": 0}
    # A CR alone ends a line as well; several before a line feed are one ending.
    for number, (line, end) in enumerate(_split_lines(text), start=1):
        notes["lines with a stray CR"] += "\r" in end.removesuffix("\r\n")
        content = line.strip()
        cut = content.rstrip(", \t")
        notes["lines with trailing commas"] += cut != content
        if cut.startswith('"') and cut.endswith('"') and len(cut) > 1:
            cut = cut[1:-1].replace('""', '"').strip()
        if cut:
            rows.append((number, {LINES: cut}))
        else:
            notes["empty lines"] += 1
    return RawTable(
        str(location), sha256, "lines", (LINES,), rows, {name: count for name, count in notes.items() if count}
    )


def _split_lines(text: str) -> Iterator[tuple[str, str]]:
    start = 0
    for end in re.finditer(r"\r*\n|\r+", text):
        yield text[start : end.start()], end[0]
        start = end.end()
    if start < len(text):
        yield text[start:], ""


def _read_parquet(location: Location, sha256: str) -> RawTable:
    """Read the columns that formats know, of pictures their path only: no bytes of a picture are decoded or kept."""
    with location.open_random_access() as stream:
        try:
            file = open_parquet(stream)
            schema = file.schema_arrow
            wanted = [path for name in schema.names for path in _readable(schema.field(name))]
            with reading_parquet():
                rows = read_checked(file, wanted).to_pylist()
        except BrokenParquet as error:
            raise SafetyDPOError(
                f"expected a complete Parquet file at {location}, found {location.size_bytes():,} bytes that do not "
                f"parse ({error}): fetch it again"
            ) from error
    return RawTable(
        str(location), sha256, "parquet", tuple(schema.names), [(i, _flat(row)) for i, row in enumerate(rows, start=1)]
    )


def _readable(field_: pa.Field) -> list[str]:
    """Return the parts of a column that are read: all but bytes; of a picture (`bytes`, `path`) its path."""
    kind = field_.type
    if pa.types.is_struct(kind):
        return [f"{field_.name}.path"] if kind.get_field_index("path") >= 0 else []
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return [] if is_bytes else [field_.name]


def _flat(row: dict[str, object]) -> Row:
    return {name: value.get("path") if isinstance(value, dict) else value for name, value in row.items()}
