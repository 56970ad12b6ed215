"""Which prompt each picture of a folder was drawn from: a table beside the pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from safetydpo.artifacts.json_text import parse_json
from safetydpo.artifacts.parquet_files import open_parquet, read_checked, reading_parquet
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError

PICTURE_COLUMNS = ("picture", "file_name", "file", "image")
PROMPT_COLUMNS = ("prompt", "text", "caption")
CATEGORY_COLUMN = "category"


@dataclass(frozen=True)
class PicturePrompt:
    """The prompt of a picture, and its category; "" = none is named."""

    prompt: str
    category: str = ""


def read_picture_prompts(file: Location) -> dict[str, PicturePrompt]:
    """Return prompts by picture name of a CSV, JSON Lines or Parquet file with a column of each.

    Raises:
        UsageError: if the file is of another kind or lacks a column.
        SafetyDPOError: if it cannot be read, a row is faulty or names a picture that another row names.
    """
    rows = list(_rows(file))
    if not rows:
        raise SafetyDPOError(f"expected rows with pictures and prompts in {file}, found none: correct --prompts")
    picture, prompt = _column(file, rows[0], PICTURE_COLUMNS), _column(file, rows[0], PROMPT_COLUMNS)
    found: dict[str, PicturePrompt] = {}
    for number, row in enumerate(rows, start=1):
        name, text = row.get(picture), row.get(prompt)
        if not isinstance(name, str) or not name or not isinstance(text, str) or not text.strip():
            raise SafetyDPOError(
                f"expected the name of a picture and its prompt in row {number} of {file}, found one missing: mend it"
            )
        if name in found:
            raise SafetyDPOError(f"expected each picture once in {file}, found {name!r} again in row {number}: mend it")
        found[name] = PicturePrompt(text, str(row.get(CATEGORY_COLUMN) or ""))
    return found


def _column(file: Location, row: Mapping[str, object], names: Sequence[str]) -> str:
    for name in names:
        if name in row:
            return name
    raise UsageError(f"expected a column {' or '.join(names)} in {file} (--prompts), found {', '.join(map(str, row))}")


def _rows(file: Location) -> Iterator[Mapping[str, object]]:
    data = file.read_bytes()
    ending = file.name.rpartition(".")[2].lower()
    try:
        if ending == "csv":
            yield from csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        elif ending == "jsonl":
            for line in data.decode("utf-8").splitlines():
                if line.strip():
                    row = parse_json(line)
                    if not isinstance(row, dict):
                        raise ValueError("a line that is no object")
                    yield row
        elif ending == "parquet":
            with reading_parquet():
                yield from read_checked(open_parquet(pa.BufferReader(data))).to_pylist()
        else:
            raise UsageError(f"expected a .csv, .jsonl or .parquet file for --prompts, found {file.name!r}")
    except (ValueError, csv.Error) as error:
        told = " ".join(str(error).split())[:150]
        raise SafetyDPOError(f"expected a readable table in {file} (--prompts), found: {told}") from error
