"""Pictures that somebody else made, of any size: checked when they are taken in, fitted to a run when they are encoded.

Axis legend: `height width` picture axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from safetydpo.artifacts.picture_limits import BrokenPicture, PictureTooLarge, opened_picture
from safetydpo.errors import SafetyDPOError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
"""A file of a few kilobytes may claim to be a picture that fills the memory."""


@dataclass(frozen=True)
class PictureFacts:
    """What a file says of its picture."""

    format: str
    """`jpeg`, `png` or `webp`."""
    height: int
    width: int


def inspect_picture(data: bytes) -> PictureFacts:
    """Decode a picture to its end and return its format and size.

    Raises:
        SafetyDPOError: if the bytes are no complete JPEG, PNG or WebP, or it has more than 50 million pixels.
    """
    with _opened(data) as image:
        return PictureFacts(str(image.format).lower(), image.height, image.width)


def fit_picture(data: bytes, *, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of a picture in red, green, blue, scaled to cover height x width and cropped to its middle.

    As the public trainers do it: bilinear with antialiasing, the crop centred. A picture of that size stays as it is.

    Raises:
        SafetyDPOError: as `inspect_picture`.
    """
    with _opened(data) as image:
        picture = image.convert("RGB")
    scale = max(height / picture.height, width / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if size != picture.size:
        picture = picture.resize(size, resample=Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.array(picture.crop((left, top, left + width, top + height)))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with opened_picture(data, formats=FORMATS, max_pixels=MAX_PIXELS) as image:
            yield image
    except PictureTooLarge as error:
        raise SafetyDPOError(
            f"expected a picture of at most {MAX_PIXELS:,} pixels, found {error.size}: take its row out"
        ) from None
    except BrokenPicture as error:
        raise SafetyDPOError(
            f"expected a complete JPEG, PNG or WebP, found {len(data)} bytes that do not decode ({error}): take its "
            "row out, or fetch the file again"
        ) from None
