"""The pictures of a pool, found by id and read a row group at a time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from safetydpo.artifacts.parquet_files import BrokenParquet, open_parquet, reading_parquet
from safetydpo.artifacts.pool_index import FILE_COLUMN, good_rows, read_index
from safetydpo.artifacts.schemas import IMAGES
from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError

_GROUPS_HELD = 4
"""Row groups held at once: the two pictures of a pair, and neighbouring pairs, mostly lie in the same one."""
_COLUMNS = ["image_id", "image", "sha256"]


class PictureIndex:
    """Where the pictures of a pool lie, by id; reads them a row group at a time.

    Of one pool only: the same id stands for other bytes in the pool of another compute type.
    """

    def __init__(self, pool: Location) -> None:
        self._pool = pool
        self._held: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._groups: OrderedDict[str, dict[str, int]] = OrderedDict()

    def places(self, ids: pa.ChunkedArray) -> pa.Table:
        """Return the column `file` (its path below the pool) of each picture, told by the pool's index alone.

        Raises:
            SafetyDPOError: if one is not in the store.
        """
        index = read_index(self._pool, IMAGES, wanted=ids.combine_chunks(), id_column="image_id")
        index = index.filter(good_rows(index))
        found = pc.index_in(ids, value_set=index.column("image_id"))
        if found.null_count:
            raise SafetyDPOError(
                f"expected {len(ids)} pictures of kept pairs in {self._pool}, found "
                f"{found.null_count} missing: run `safetydpo pairs` again, or export with --no-pictures"
            )
        return index.select([FILE_COLUMN.name]).take(found)

    def read(self, image_id: str, *, file: str) -> bytes:
        """Return the bytes of one picture, whose place `places` knows.

        Raises:
            SafetyDPOError: if they are not there, or not what was written there.
        """
        table = self._group_of(image_id, file)
        row = pc.index(table.column("image_id"), image_id).as_py()
        data: bytes = table.column("image")[row].as_py()
        if hashlib.sha256(data).hexdigest() != table.column("sha256")[row].as_py():
            raise SafetyDPOError(
                f"expected picture {image_id[:12]} in {self._pool / file} as it was written, found other bytes: "
                "delete that file's batch folder and run `safetydpo pairs` again"
            )
        return data

    def _group_of(self, image_id: str, file: str) -> pa.Table:
        group = self._groups_of(file).get(image_id)
        if group is None:
            raise SafetyDPOError(
                f"expected picture {image_id[:12]} in {self._pool / file}, where the pool's index says it is, found "
                "it gone: delete that file's batch folder and run `safetydpo pairs` again"
            )
        place = (file, group)
        if place not in self._held:
            with _opened(self._pool / file) as source:
                self._held[place] = source.read_row_group(group, columns=_COLUMNS)
            while len(self._held) > _GROUPS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(place)
        return self._held[place]

    def _groups_of(self, file: str) -> dict[str, int]:
        """Return which row group of a file holds each of its pictures."""
        if file not in self._groups:
            with _opened(self._pool / file) as source:
                self._groups[file] = {
                    image_id: group
                    for group in range(source.num_row_groups)
                    for image_id in source.read_row_group(group, columns=["image_id"]).column(0).to_pylist()
                }
            while len(self._groups) > _GROUPS_HELD:
                self._groups.popitem(last=False)
        self._groups.move_to_end(file)
        return self._groups[file]


@contextmanager
def _opened(location: Location) -> Iterator[pq.ParquetFile]:
    with location.open_random_access() as source:
        try:
            file = open_parquet(source)
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise BrokenParquet(f"no column {missing[0]!r} of {IMAGES.names}")
            with reading_parquet():
                yield file
        except BrokenParquet as error:
            raise SafetyDPOError(
                f"expected a complete Parquet file of pictures at {location}, found: {error}: "
                "delete its batch folder and run `safetydpo pairs` again"
            ) from error
