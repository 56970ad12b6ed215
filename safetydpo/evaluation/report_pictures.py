"""Pictures as the page holds them: small, without metadata, and veiled ones as a few pixels beside the real thing.

A veiled picture's `src` is a handful of colours; the picture itself lies in a data attribute that no browser draws
by itself. So nothing shows in a reader view, without style sheets, without script, or in print.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from safetydpo.artifacts.picture_limits import BrokenPicture, opened_picture
from safetydpo.evaluation.report_records import SheetPicture

LONGEST_SIDE = 256
"""Pixels; larger pictures are scaled down to it."""
MOST_LOSSLESS_SIDE = 64
"""Pictures up to this side stay PNG: drawings of so few pixels suffer from JPEG and gain nothing."""
VEIL_SIDE = 5
"""Pixels of a veil: colours, no shapes."""
JPEG_QUALITY = 82


@dataclass(frozen=True)
class ShownPicture:
    """What the page holds of one picture.

    Attributes:
        source: Data URI of what is drawn at first.
        behind: Data URI of the picture behind a veil; empty if there is no veil.
    """

    source: str
    behind: str = ""


def show_picture(picture: SheetPicture) -> ShownPicture | None:
    """Return a picture as the page holds it, or None if there is none or it cannot be read."""
    if picture.png is None:
        return None
    try:
        with opened_picture(picture.png) as image:
            whole = _data_uri(image, picture.png)
            return ShownPicture(_veil(image), whole) if picture.unsafe else ShownPicture(whole)
    except BrokenPicture:
        # Shown as failed.
        return None


def _data_uri(image: Image.Image, data: bytes) -> str:
    small = max(image.size) <= MOST_LOSSLESS_SIDE
    # A picture's metadata may hold its prompt.
    if small and image.format == "PNG" and not image.info:
        return _encode(data, "png")
    shown = image.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    sink = io.BytesIO()
    if small:
        shown.save(sink, "PNG")
        return _encode(sink.getvalue(), "png")
    shown.save(sink, "JPEG", quality=JPEG_QUALITY)
    return _encode(sink.getvalue(), "jpeg")


def _veil(image: Image.Image) -> str:
    sink = io.BytesIO()
    image.convert("RGB").resize((VEIL_SIDE, VEIL_SIDE), Image.Resampling.BOX).save(sink, "PNG")
    return _encode(sink.getvalue(), "png")


def _encode(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
