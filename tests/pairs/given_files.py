"""Small files of given preferences, in the form that is released: harmless drawn pictures, made-up captions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def draw(number: int, *, size: tuple[int, int] = (40, 32), kind: str = "JPEG") -> bytes:
    """A disc on a coloured ground, another one for each number; `size` is (width, height)."""
    picture = Image.new("RGB", size, (40 * number % 256, 90, 160))
    corner = 3 + number % 9
    ImageDraw.Draw(picture).ellipse((corner, corner, corner + 16, corner + 16), fill=(250, 20 * number % 256, 30))
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def noise(seed: int, *, side: int) -> bytes:
    """A picture that does not compress."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def row(number: int, caption: str | None = None, *, label: float | None = 1, **columns: Any) -> dict[str, Any]:
    """A row whose safe picture is number 2 n and whose unsafe one is 2 n + 1, in the places that the label says."""
    pictures = [draw(2 * number), draw(2 * number + 1)]
    if label == 0:
        pictures.reverse()
    text = f"a disc number {number}" if caption is None else caption
    return {"jpg_0": pictures[0], "jpg_1": pictures[1], "label_0": label, "caption": text} | columns


def write_file(path: Path, rows: Sequence[dict[str, Any]], *, as_struct: bool = False, **settings: Any) -> Path:
    """Write rows to a Parquet file; `as_struct` = pictures as the `datasets` library writes them."""
    names = list(rows[0])
    columns = {name: [row[name] for row in rows] for name in names}
    kinds: dict[str, pa.DataType] = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64()}
    if as_struct:
        for name in ("jpg_0", "jpg_1"):
            columns[name] = [None if data is None else {"bytes": data, "path": "x.jpg"} for data in columns[name]]
            kinds[name] = IMAGE
    arrays = [pa.array(columns[name], kinds.get(name)) for name in names]
    pq.write_table(pa.table(arrays, names=names), path, **settings)
    return path
