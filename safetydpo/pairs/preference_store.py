"""A folder of given preferences: what `safetydpo import-pairs` writes and `identity.pairs.source` names.

    prompt_pairs.parquet  memberships.parquet  images.parquet   the tables of a pairs artifact
    pictures/batch-given/    a pool of pictures, each once, in the bytes that were given
    record.json              counts and reasons; written last

Pictures go through in small groups; what is held of every row is its texts and ids.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pyarrow.parquet as pq

from safetydpo.artifacts.layout import MEMBERSHIPS_FILE, PROMPT_PAIRS_FILE, RECORD_FILE
from safetydpo.artifacts.pool_index import DATA_FOLDER, close_index
from safetydpo.artifacts.records import Record, read_record, write_record
from safetydpo.artifacts.schemas import (
    IMAGE_MANIFEST,
    IMAGES,
    MEMBERSHIPS,
    PROMPT_PAIRS,
    make_given_image_id,
    sha256_of,
)
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import ROWS_PER_GROUP, fingerprint_rows, table_from_rows, write_table
from safetydpo.diffusion.given_pictures import inspect_picture
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.pairs.preferences import REPEATED, GivenPreference, LeftOut, count_rows, read_preferences

STAGE = "preferences"
RECIPE_VERSION = 1
PICTURES_FOLDER = "pictures"
BATCH = "batch-given"
IMAGES_FILE = "images.parquet"
FILE_BYTES = 200_000_000
"""Size at which a file of pictures is closed and the next begun."""
EXAMPLES = 20
UNKNOWN_BASE = "unknown"
CategoriesOf = Callable[[GivenPreference], tuple[tuple[str, ...], str]]
"""From a row to its categories, by the project's names, and its concept; no category = the row is left out."""


@dataclass
class _Taken:
    """What has been taken in so far."""

    texts: list[dict[str, object]] = field(default_factory=list)
    members: list[dict[str, object]] = field(default_factory=list)
    manifest: list[dict[str, object]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Where the first ones stand."""
    num_faults: int = 0

    def leave_out(self, file: str, left: LeftOut) -> None:
        self.left_out[left.reason] += 1
        if left.is_fault:
            self.num_faults += 1
            if len(self.faults) < EXAMPLES:
                self.faults.append(f"{file}, row {left.row}: {left.reason}")


def write_preferences(
    out: Location,
    files: Sequence[Location],
    *,
    categories_of: CategoriesOf,
    source: str,
    max_bad_rate: float,
    report: Callable[[int], None] = lambda _rows: None,
) -> Record:
    """Take the rows of all files into the folder `out` and close it; return its record.

    Args:
        out: Must not exist, or be an empty folder.
        files: Parquet files of preferences.
        categories_of: Says the categories and the concept of a row.
        source: Name of the data set, kept with every membership that names none itself.
        max_bad_rate: Largest share of rows with a fault; ties and repeated rows are none.
        report: Called with the number of rows after each one.

    Raises:
        UsageError: if something stands at `out`, or a file is not there.
        SafetyDPOError: if a file cannot be read, too many rows have a fault, or none is a preference; nothing is left.
    """
    _refuse_existing(out)
    # Looked at before gigabytes are read.
    num_rows = sum(count_rows(file) for file in files)
    started = datetime.now(tz=UTC)
    try:
        record = _write(out, files, num_rows, categories_of, source=source, max_bad_rate=max_bad_rate, report=report)
        seconds = (datetime.now(tz=UTC) - started).total_seconds()
        record = replace(record, started_at=started.isoformat(timespec="seconds"), seconds=seconds)
        write_record(out, record)
    except BaseException:
        out.delete()
        raise
    return record


def open_preferences(folder: Location) -> Record:
    """Return the record of a finished folder of given preferences.

    Raises:
        UsageError: if it is none.
        SafetyDPOError: if it was never finished.
    """
    if not folder.is_folder():
        found = "a file" if folder.is_file() else "nothing"
        raise UsageError(
            f"expected `generate` or a folder that `safetydpo import-pairs` wrote in identity.pairs.source, found "
            f"{found} at {folder}: import the files first, or correct the path"
        )
    record = read_record(folder)
    if record is None and (folder / PICTURES_FOLDER).exists():
        raise SafetyDPOError(
            f"expected finished preferences at {folder}, found no {RECORD_FILE}: an import that was killed; delete the "
            "folder and run `safetydpo import-pairs` again"
        )
    if record is None or record.stage != STAGE:
        raise UsageError(
            f"expected a folder that `safetydpo import-pairs` wrote in identity.pairs.source, found another at "
            f"{folder}: correct the path"
        )
    return record


def picture_pool(folder: Location) -> Location:
    """Return the pool of the pictures of a folder of given preferences."""
    return folder / PICTURES_FOLDER


def _refuse_existing(out: Location) -> None:
    if out.is_file():
        raise UsageError(f"expected nothing or an empty folder at {out}, found a file: choose another folder")
    # Hidden files too: an import that fails removes the whole folder.
    found = out.count_files()
    if found:
        killed = "" if (out / RECORD_FILE).is_file() else f" and no {RECORD_FILE}: an import that was killed"
        raise UsageError(
            f"expected nothing or an empty folder at {out}, found {found} files{killed}; choose another folder, or "
            "delete that one first"
        )


def _write(
    out: Location,
    files: Sequence[Location],
    num_rows: int,
    categories_of: CategoriesOf,
    *,
    source: str,
    max_bad_rate: float,
    report: Callable[[int], None],
) -> Record:
    taken = _Taken()
    data = (out / PICTURES_FOLDER / BATCH / DATA_FOLDER).make_folder()
    with _PictureWriter(data) as pictures:
        for file in files:
            for number, found in enumerate(read_preferences(file), start=1):
                left = (
                    found
                    if isinstance(found, LeftOut)
                    else _take(found, number, taken, pictures, categories_of, source)
                )
                if left is not None:
                    taken.leave_out(str(file), left)
                report(1)
    _check_enough(taken, num_rows, max_bad_rate)
    index = close_index(data.parent, IMAGES, id_column="image_id")
    (data.parent / RECORD_FILE).write_bytes(json.dumps({"stage": STAGE, "rows": index.num_rows}).encode())
    write_table(out / PROMPT_PAIRS_FILE, table_from_rows(taken.texts, PROMPT_PAIRS))
    write_table(out / MEMBERSHIPS_FILE, table_from_rows(taken.members, MEMBERSHIPS))
    write_table(out / IMAGES_FILE, table_from_rows(taken.manifest, IMAGE_MANIFEST))
    fingerprint = fingerprint_rows(
        (f"{row['pair_id']}", f"{row['category']}/{row['concept']}/{row['source']}") for row in taken.members
    )
    return Record(
        stage=STAGE,
        name=source,
        hash=sha256_of([STAGE, fingerprint, RECIPE_VERSION]),
        recipe_version=RECIPE_VERSION,
        identity={"source": source},
        inputs={},
        fingerprint=fingerprint,
        counts={
            "rows": num_rows,
            "preferences": len(taken.texts),
            "pictures": index.num_rows,
            "left_out": sum(taken.left_out.values()),
            "faults": taken.num_faults,
            "one_caption": sum(row["unsafe_text"] == row["safe_text"] for row in taken.texts),
        },
        details={
            "files": {str(file): file.size_bytes() for file in files},
            "left_out": dict(taken.left_out.most_common()),
            "faults": taken.faults,
            "sizes": dict(pictures.sizes.most_common(EXAMPLES)),
            # The files do not say which model drew their pictures.
            "base": UNKNOWN_BASE,
        },
    )


def _take(
    row: GivenPreference,
    number: int,
    taken: _Taken,
    pictures: _PictureWriter,
    categories_of: CategoriesOf,
    source: str,
) -> LeftOut | None:
    categories, concept = categories_of(row)
    if not categories:
        return LeftOut(number, "no known category")
    preference_id = row.preference_id
    if preference_id in taken.ids:
        return LeftOut(number, REPEATED)
    sides = {"unsafe": (row.unsafe, row.unsafe_text), "safe": (row.safe, row.safe_text)}
    try:
        # Both are looked at before either is written.
        facts = {side: pictures.look(data) for side, (data, _) in sides.items()}
    except SafetyDPOError:
        return LeftOut(number, "a picture does not decode")
    for side, (data, text) in sides.items():
        image_id = pictures.add(data, facts[side])
        taken.manifest.append(
            {"image_id": image_id, "owner_id": preference_id, "side": side, "prompt": text}
            | {"seed": 0, "adapter": "", "attempt": 1}
        )
    taken.ids.add(preference_id)
    taken.texts.append({"pair_id": preference_id, "unsafe_text": row.unsafe_text, "safe_text": row.safe_text})
    taken.members += [
        {"pair_id": preference_id, "category": category, "concept": concept, "source": row.source or source}
        for category in categories
    ]
    return None


def _check_enough(taken: _Taken, num_rows: int, max_bad_rate: float) -> None:
    listed = ", ".join(f"{reason}: {count}" for reason, count in taken.left_out.most_common())
    if taken.num_faults > max_bad_rate * num_rows:
        raise SafetyDPOError(
            f"expected at most {max_bad_rate:.1%} bad rows (--max-bad-rate), found {taken.num_faults} of {num_rows} "
            f"({listed}), the first in {taken.faults[0]}: mend the files or allow more"
        )
    if not taken.texts:
        raise SafetyDPOError(
            f"expected at least one preference in {num_rows} rows, found none ({listed or 'no rows'}): name other files"
        )


class _PictureWriter:
    """Writes each picture once, by content, in row groups of 64, beginning a new file every 200 MB."""

    def __init__(self, data: Location) -> None:
        self._data = data
        self._rows: list[dict[str, object]] = []
        self._known: dict[str, tuple[str, int, int]] = {}
        self._files, self._bytes = 0, 0
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self.sizes: Counter[str] = Counter()

    def __enter__(self) -> _PictureWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._close()

    def look(self, data: bytes) -> tuple[str, str, int, int]:
        """Return (sha256, format, height, width) of a picture, decoding it the first time.

        Raises:
            SafetyDPOError: if it does not decode.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._known:
            facts = inspect_picture(data)
            return digest, facts.format, facts.height, facts.width
        return digest, *self._known[digest]

    def add(self, data: bytes, facts: tuple[str, str, int, int]) -> str:
        """Write a picture unless it stands there; return its id."""
        digest, kind, height, width = facts
        image_id = make_given_image_id(digest)
        if digest in self._known:
            return image_id
        self._known[digest] = (kind, height, width)
        self.sizes[f"{width} x {height}"] += 1
        self._rows.append(
            {"image_id": image_id, "image": data, "sha256": digest, "status": "ok", "error": "", "attempt": 1}
            | {"width": width, "height": height, "format": kind, "micro_batch": None}
        )
        self._bytes += len(data)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()
        return image_id

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            stream = self._open.enter_context((self._data / f"part-{self._files:05d}.parquet").stream_out())
            # Pictures are packed already; only ids and states gain.
            self._writer = self._open.enter_context(
                pq.ParquetWriter(stream, IMAGES, compression="zstd", compression_level=1, use_dictionary=False)
            )
            self._files += 1
        self._writer.write_table(table_from_rows(self._rows, IMAGES), row_group_size=ROWS_PER_GROUP)
        self._rows = []
        if self._bytes > FILE_BYTES:
            self._close()

    def _close(self) -> None:
        self._open.close()
        self._writer, self._bytes = None, 0
