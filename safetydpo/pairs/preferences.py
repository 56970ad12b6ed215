"""Files of given preferences: two pictures, a caption, and which picture is the better one; read row by row.

The released form (`jpg_0, jpg_1, label_0, caption`): a row has ONE caption and is a preference by itself, so a prompt
pair gives two rows. A column `safe_prompt`, as our own export has it, gives the row both captions of a pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo.artifacts.parquet_files import BrokenParquet, open_parquet, reading_parquet
from safetydpo.artifacts.schemas import make_preference_id
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError, UsageError

PICTURES = ("jpg_0", "jpg_1")
REQUIRED = (*PICTURES, "label_0", "caption")
OPTIONAL = ("safe_prompt", "categories", "category", "concept", "source")
ROWS_AT_ONCE = 8
"""Rows in memory; each holds two pictures."""
READ_BYTES = 1 << 20
_PARQUET = b"PAR1"
_LFS_POINTER = b"version https://git-lfs"

TIE = "tie (label_0 is 0.5)"
REPEATED = "the same captions and pictures stand in a row before"


@dataclass(frozen=True)
class GivenPreference:
    """One row: the safe picture is preferred to the unsafe one under either caption; bytes as the file has them."""

    unsafe_text: str
    safe_text: str
    """Equal to `unsafe_text` where the row has one caption."""
    safe: bytes
    unsafe: bytes
    categories: tuple[str, ...] = ()
    """As the file spells them; empty if it does not say."""
    concept: str = ""
    source: str = ""

    @property
    def picture_hashes(self) -> tuple[str, str]:
        """sha256 of the safe and the unsafe picture's bytes."""
        return hashlib.sha256(self.safe).hexdigest(), hashlib.sha256(self.unsafe).hexdigest()

    @property
    def preference_id(self) -> str:
        """Id of captions and pictures."""
        safe, unsafe = self.picture_hashes
        return make_preference_id(self.unsafe_text, self.safe_text, safe_sha256=safe, unsafe_sha256=unsafe)


@dataclass(frozen=True)
class LeftOut:
    """A row that is no preference, and why; a tie is one by its own word, all else is a fault."""

    row: int
    reason: str

    @property
    def is_fault(self) -> bool:
        """Whether something is wrong with the row."""
        return self.reason not in (TIE, REPEATED)


def count_rows(location: Location) -> int:
    """Return the number of rows of a file of preferences, checking its columns.

    Raises:
        UsageError: if no file stands there.
        SafetyDPOError: if it is no Parquet file, is cut short, or lacks a column.
    """
    with _opened(location) as file:
        return int(file.metadata.num_rows)


def has_categories(location: Location) -> bool:
    """Return whether a file of preferences says its rows' categories itself.

    Raises:
        UsageError, SafetyDPOError: as `count_rows`.
    """
    with _opened(location) as file:
        return bool({"categories", "category"} & set(file.schema_arrow.names))


def read_preferences(location: Location) -> Iterator[GivenPreference | LeftOut]:
    """Yield every row of a file, in order, a few at a time: memory holds pages of the file, at most one row group.

    Raises:
        UsageError, SafetyDPOError: as `count_rows`.
    """
    with _opened(location) as file:
        columns = [name for name in (*REQUIRED, *OPTIONAL) if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield read_row(row, number)


def read_row(row: Mapping[str, Any], number: int) -> GivenPreference | LeftOut:
    """Return what a row says; pictures are not decoded here."""
    label, caption = row["label_0"], row["caption"]
    if isinstance(label, bool) or not isinstance(label, int | float) or label not in (0, 0.5, 1):
        return LeftOut(number, "label_0 is none of 1, 0 and 0.5")
    if label == 0.5:
        return LeftOut(number, TIE)
    if not isinstance(caption, str) or not caption.strip():
        return LeftOut(number, "no caption")
    pictures = [_bytes_of(row[name]) for name in PICTURES]
    if not all(pictures):
        return LeftOut(number, "a picture is missing")
    if pictures[0] == pictures[1]:
        return LeftOut(number, "both pictures are the same")
    safe, unsafe = pictures if label == 1 else reversed(pictures)
    partner = row.get("safe_prompt")
    return GivenPreference(
        unsafe_text=caption.strip(),
        safe_text=partner.strip() if isinstance(partner, str) and partner.strip() else caption.strip(),
        safe=safe,
        unsafe=unsafe,
        categories=_categories_of(row),
        concept=str(row.get("concept") or "").strip(),
        source=str(row.get("source") or "").strip(),
    )


def _bytes_of(value: object) -> bytes:
    """A picture is bytes, or what the `datasets` library writes: a struct of bytes and path."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return data if isinstance(data, bytes) else b""


def _categories_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("categories") or row.get("category") or ()
    listed = value if isinstance(value, list | tuple) else [value]
    names = value.split(",") if isinstance(value, str) else [str(name) for name in listed]
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


@contextmanager
def _opened(location: Location) -> Iterator[pq.ParquetFile]:
    if not location.is_file():
        found = "a folder" if location.is_folder() else "nothing"
        raise UsageError(f"expected a Parquet file of preferences at {location}, found {found}: name its files")
    with location.open_random_access() as stream:
        head = bytes(stream.read(len(_LFS_POINTER)))
        if not head.startswith(_PARQUET):
            pointer = head.startswith(_LFS_POINTER)
            found = "a git-LFS pointer" if pointer else "a file of another kind"
            remedy = "run `git lfs pull` in its repository" if pointer else "name the .parquet files of the data set"
            raise SafetyDPOError(f"expected a Parquet file of preferences at {location}, found {found}: {remedy}")
        stream.seek(0)
        try:
            # Not read ahead: a row group of pictures may be larger than the memory.
            file = open_parquet(stream, pre_buffer=False, buffer_size=READ_BYTES)
            _check_columns(file.schema_arrow, location)
            with reading_parquet():
                yield file
        except BrokenParquet as error:
            raise SafetyDPOError(
                f"expected a complete Parquet file at {location}, found {location.size_bytes():,} bytes that do not "
                f"parse ({error}): fetch it again"
            ) from error


def _check_columns(schema: pa.Schema, location: Location) -> None:
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        raise SafetyDPOError(
            f"expected the columns {', '.join(REQUIRED)} in {location}, found {', '.join(schema.names)}, without "
            f"{', '.join(missing)}: rename its columns, or name a file of preferences"
        )
