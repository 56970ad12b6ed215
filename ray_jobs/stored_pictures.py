"""The pictures of an evaluation, read from the store only when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import read_chosen

PictureKey: TypeAlias = tuple[str, str, int]
"""Row name, prompt id, seed."""


class StoredPictures(Mapping[PictureKey, bytes | None]):
    """Pictures by (row name, prompt id, seed); None for one that failed.

    Ten thousand pictures of a real model are several gigabytes, of which a report shows some hundred.
    """

    def __init__(self, file: Location, image_ids: Mapping[PictureKey, str]) -> None:
        """Read nothing yet.

        Args:
            file: The table of outcomes.
            image_ids: The id of each picture in it.
        """
        self._file = file
        self._image_ids = dict(image_ids)

    def read(self, keys: Iterable[PictureKey]) -> dict[PictureKey, bytes | None]:
        """Return the pictures of these keys, with one pass through the file."""
        wanted = {key: self._image_ids[key] for key in keys}
        rows = read_chosen(
            self._file, OUTCOMES, columns=["image_id", "image"], id_column="image_id", wanted=set(wanted.values())
        )
        found = {row["image_id"]: row["image"] for row in rows}
        pictures: dict[PictureKey, bytes | None] = {}
        for key, image_id in wanted.items():
            image = found[image_id]
            assert image is None or isinstance(image, bytes)
            pictures[key] = image
        return pictures

    def __getitem__(self, key: PictureKey) -> bytes | None:
        """Return one picture; for more than one, `read` is quicker."""
        return self.read([key])[key]

    def __iter__(self) -> Iterator[PictureKey]:
        """Iterate over the keys."""
        return iter(self._image_ids)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._image_ids)
