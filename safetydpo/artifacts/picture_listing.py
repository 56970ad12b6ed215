"""Pictures that are stored already, wherever they lie: files of a folder, rows of Parquet files, or a pool of ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo.artifacts.parquet_files import BrokenParquet, open_parquet, read_checked, reading_parquet
from safetydpo.artifacts.pool_index import DATA_FOLDER, FILE_COLUMN, READERS, read_index
from safetydpo.artifacts.schemas import IMAGES, OUTCOMES, STORED_PICTURES, sha256_of
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.errors import SafetyDPOError, UsageError

IMAGE_COLUMNS = ("image", "picture")
ID_COLUMNS = ("image_id", "id", "name")
BATCH = "batch-"
FILES_AT_ONCE = 64


@dataclass(frozen=True)
class StoredPicture:
    """One picture: what it is called, where it lies, and the hash of its bytes; `failure` says why there are none."""

    name: str
    file: str
    row_group: int = -1
    row: int = 0
    sha256: str = ""
    prompt: str | None = None
    category: str = ""
    failure: str = ""

    @cached_property
    def picture_id(self) -> str:
        """Id of its name and bytes: another picture of the same name is judged anew."""
        return sha256_of({"name": self.name, "sha256": self.sha256})


@dataclass(frozen=True)
class Listing:
    """All pictures below `root`, and how many files there are no pictures."""

    root: Location
    pictures: Sequence[StoredPicture]
    other_files: Sequence[str] = field(default=())


def list_pictures(source: Location, suffixes: Sequence[str]) -> Listing:
    """Return the pictures of a folder of files with these endings, of a Parquet file, or of a folder of them.

    Raises:
        UsageError: if there is nothing, or a Parquet file has no column of pictures.
        SafetyDPOError: if there is no picture, or a file cannot be read.
    """
    if source.is_file():
        if not source.name.lower().endswith(".parquet"):
            raise UsageError(
                f"expected a folder of pictures or a Parquet file, found the file {source}: name its folder"
            )
        listing = Listing(source.parent, list(_rows_of(source.parent, source.name)))
    elif not source.is_folder():
        raise UsageError(
            f"expected a folder of pictures or a Parquet file at {source}, found nothing: correct the path"
        )
    elif any(child.name.startswith(BATCH) and (child / DATA_FOLDER).is_folder() for child in source.list()):
        listing = Listing(source, list(_rows_of_pool(source)))
    else:
        listing = _list_folder(source, suffixes)
    if not listing.pictures:
        raise SafetyDPOError(
            f"expected pictures in {source}, found none among {len(listing.other_files)} files: their names must end "
            f"in {', '.join(suffixes)} or .parquet"
        )
    names = [picture.name for picture in listing.pictures]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SafetyDPOError(f"expected each picture once in {source}, found {twice!r} twice: give it another name")
    return listing


def _list_folder(source: Location, suffixes: Sequence[str]) -> Listing:
    prefix = len(source.path.rstrip("/")) + 1
    files = [file.path[prefix:] for file in source.walk()]
    tables = [name for name in files if name.lower().endswith(".parquet")]
    pictures = [name for name in files if name.lower().endswith(tuple(suffixes))]
    if tables and not pictures:
        found = [picture for name in tables for picture in _rows_of(source, name)]
        return Listing(source, found, [name for name in files if name not in set(tables)])

    def look(name: str) -> StoredPicture:
        return StoredPicture(name, name, sha256=hashlib.sha256((source / name).read_bytes()).hexdigest())

    # Many at once, or threads spend more time on waiting for each other than on small files; few where each is waited for.
    size = max(1, min(FILES_AT_ONCE, len(pictures) // (4 * READERS)))
    parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    with ThreadPoolExecutor(READERS) as readers:
        listed = [picture for part in readers.map(lambda names: [look(name) for name in names], parts) for picture in part]
    known = set(pictures)
    return Listing(source, listed, [name for name in files if name not in known])


def _rows_of_pool(pool: Location) -> Iterator[StoredPicture]:
    """Yield one picture for each id of a pool: the row that its readers take."""
    schema = _schema_of(pool)
    index = read_index(pool, schema, id_column="image_id")
    places = dict(zip(index.column("image_id").to_pylist(), index.column(FILE_COLUMN.name).to_pylist(), strict=True))
    for file in sorted(set(places.values())):
        yield from (picture for picture in _rows_of(pool, file) if places.get(picture.name) == file)


def _schema_of(pool: Location) -> pa.Schema:
    for file in pool.walk():
        if file.path.endswith(".parquet") and f"/{DATA_FOLDER}/" in file.path:
            names = _open(file).schema_arrow.names
            return OUTCOMES if "audit_unsafe" in names else IMAGES
    raise SafetyDPOError(f"expected pictures in the pool {pool}, found none: run the stage that fills it")


def _rows_of(root: Location, name: str) -> Iterator[StoredPicture]:
    """Yield the pictures of a Parquet file, one row group in memory at a time."""
    file = _open(root / name)
    names = file.schema_arrow.names
    image = _first(names, IMAGE_COLUMNS)
    if image is None or not pa.types.is_binary(file.schema_arrow.field(image).type):
        raise UsageError(
            f"expected a column {' or '.join(IMAGE_COLUMNS)} with the bytes of pictures in {root / name}, found "
            f"{', '.join(names)}"
        )
    row_id = _first(names, ID_COLUMNS)
    more = [column for column in ("prompt", "category", "status", "error") if column in names]
    columns = [image, *more] if row_id is None else [image, row_id, *more]
    for group in range(file.num_row_groups):
        for place, row in enumerate(_rows_of_group(root / name, file, group, columns)):
            yield StoredPicture(
                name=str(row[row_id]) if row_id is not None else f"{name}:{group}:{place}",
                file=name,
                row_group=group,
                row=place,
                sha256=hashlib.sha256(row[image] or b"").hexdigest(),
                prompt=row.get("prompt"),
                category=str(row.get("category") or ""),
                failure=_failure(row, image),
            )


def _failure(row: dict[str, Any], image: str) -> str:
    if row.get("status", "ok") != "ok":
        return f"not drawn: {row.get('error') or 'no reason given'}"
    return "missing: no picture in its row" if row[image] is None else ""


def _first(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _open(file: Location) -> pq.ParquetFile:
    try:
        return open_parquet(file.open_random_access())
    except BrokenParquet as error:
        raise SafetyDPOError(f"expected a complete Parquet file at {file}, found another ({error})") from error


def _rows_of_group(file: Location, opened: pq.ParquetFile, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        with reading_parquet():
            rows: list[dict[str, Any]] = read_checked(opened, columns, group=group).to_pylist()
    except BrokenParquet as error:
        raise SafetyDPOError(f"expected a complete Parquet file at {file}, found another ({error})") from error
    return rows


def manifest_of(pictures: Sequence[StoredPicture]) -> pa.Table:
    """Return the work of judging these pictures, in the order in which they lie."""
    ordered = sorted(pictures, key=lambda picture: (picture.file, picture.row_group, picture.row))
    rows = [
        {
            "picture_id": picture.picture_id,
            "name": picture.name,
            "file": picture.file,
            "row_group": picture.row_group,
            "row": picture.row,
            "attempt": 1,
        }
        for picture in ordered
    ]
    return table_from_rows(rows, STORED_PICTURES)


class PictureReader:
    """Fetches the bytes of listed pictures; of a Parquet file the last row group stays in memory."""

    def __init__(self, root: Location) -> None:
        self._root = root
        self._place: tuple[str, int] | None = None
        self._images: list[bytes | None] = []

    def read(self, *, file: str, row_group: int, row: int) -> bytes:
        """Return the bytes of one picture.

        Raises:
            SafetyDPOError: if it is gone.
        """
        if row_group < 0:
            return (self._root / file).read_bytes()
        if self._place != (file, row_group):
            table = _open(self._root / file)
            image = _first(table.schema_arrow.names, IMAGE_COLUMNS)
            rows = _rows_of_group(self._root / file, table, row_group, [str(image)])
            self._images = [row[str(image)] for row in rows]
            self._place = (file, row_group)
        return self._images[row] or b""
