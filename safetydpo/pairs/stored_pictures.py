"""The pictures of a pool, found by id and read a row group at a time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from safetydpo.artifacts.layout import RECORD_FILE
from safetydpo.artifacts.schemas import IMAGES
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

_GROUPS_HELD = 4
"""Row groups held at once: the two pictures of a pair, and neighbouring pairs, mostly lie in the same one."""


class PictureIndex:
    """Where the pictures of a pool lie, by id; reads them a row group at a time.

    Of one pool only: the same id stands for other bytes in the pool of another compute type.
    """

    def __init__(self, pool: Location) -> None:
        self._files: list[Location] = []
        self._held: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        tables = [self._look(file) for file in _picture_files(pool)]
        self._index = pa.concat_tables(tables) if tables else None
        self._pool = pool

    def _look(self, location: Location) -> pa.Table:
        self._files.append(location)
        parts = []
        with _opened(location) as file:
            for group in range(file.num_row_groups):
                part = file.read_row_group(group, columns=["image_id", "status"])
                ids = part.filter(pc.equal(part.column("status"), "ok")).column("image_id")
                place = pa.array([len(self._files) - 1] * len(ids), pa.int32())
                parts.append(pa.table({"id": ids, "file": place, "group": pa.array([group] * len(ids), pa.int32())}))
        empty = pa.schema([("id", pa.string()), ("file", pa.int32()), ("group", pa.int32())]).empty_table()
        return pa.concat_tables([empty, *parts])

    def places(self, ids: pa.ChunkedArray) -> pa.Table:
        """Return the columns `file` and `group` (a row group of it) of each picture.

        Raises:
            SafetyDPOError: if one is not in the store.
        """
        index = self._index
        found = pc.index_in(ids, value_set=index.column("id")) if index is not None else pa.nulls(len(ids), pa.int32())
        if found.null_count:
            raise SafetyDPOError(
                f"expected {len(ids)} pictures of kept pairs in {self._pool}, found "
                f"{found.null_count} missing: run `safetydpo pairs` again, or export with --no-pictures"
            )
        assert index is not None
        return index.select(["file", "group"]).take(found)

    def read(self, image_id: str, *, file: int, group: int) -> bytes:
        """Return the bytes of one picture, whose place `places` knows.

        Raises:
            SafetyDPOError: if they are not what was written there.
        """
        place = (file, group)
        if place not in self._held:
            with _opened(self._files[file]) as source:
                self._held[place] = source.read_row_group(group, columns=["image_id", "image", "sha256"])
            while len(self._held) > _GROUPS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(place)
        table = self._held[place]
        row = pc.index(table.column("image_id"), image_id).as_py()
        data: bytes = table.column("image")[row].as_py()
        if hashlib.sha256(data).hexdigest() != table.column("sha256")[row].as_py():
            raise SafetyDPOError(
                f"expected picture {image_id[:12]} in {self._files[file]} as it was written, found other bytes: "
                "delete that file's batch folder and run `safetydpo pairs` again"
            )
        return data


def _picture_files(pool: Location) -> Iterator[Location]:
    for batch in pool.list():
        if (batch / RECORD_FILE).is_file():
            yield from (file for file in (batch / "data").walk() if file.path.endswith(".parquet"))


@contextmanager
def _opened(location: Location) -> Iterator[pq.ParquetFile]:
    with location.open_random_access() as source:
        try:
            file = pq.ParquetFile(source)
            missing = [
                name for name in ("image_id", "image", "sha256", "status") if name not in file.schema_arrow.names
            ]
            if missing:
                raise pa.ArrowInvalid(f"no column {missing[0]!r} of {IMAGES.names}")
            yield file
        except (pa.ArrowException, OSError) as error:
            raise SafetyDPOError(
                f"expected a complete Parquet file of pictures at {location}, found: {' '.join(str(error).split())}: "
                "delete its batch folder and run `safetydpo pairs` again"
            ) from error
