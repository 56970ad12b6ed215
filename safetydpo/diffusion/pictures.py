"""Pictures as files: lossless, equal in and equal out.

Axis legend: `height width` picture axes.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from safetydpo.artifacts.picture_limits import BrokenPicture, opened_picture
from safetydpo.errors import SafetyDPOError

PictureFormat = Literal["png", "webp"]
PNG_COMPRESS_LEVEL = 6
WEBP_METHOD = 4
"""Effort of libwebp from 0 to 6; higher is slower and hardly smaller."""


def encode_picture(image: UInt8[Tensor, "height width 3"], *, format: PictureFormat = "png") -> bytes:
    """Return the file of a picture without metadata: PNG at a fixed compression level, or lossless WebP."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image.cpu().numpy())
    if format == "png":
        picture.save(buffer, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    else:
        picture.save(buffer, format="WEBP", lossless=True, method=WEBP_METHOD)
    return buffer.getvalue()


def decode_picture(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of a PNG or WebP file.

    Raises:
        SafetyDPOError: if the bytes are no complete one in red, green, blue.
    """
    try:
        with opened_picture(data, formats=("PNG", "WEBP")) as image:
            mode = image.mode
            pixels = np.array(image)
    except BrokenPicture as error:
        raise SafetyDPOError(
            f"expected a complete PNG or WebP, found {len(data)} bytes that do not decode ({error}): render the "
            "picture again"
        ) from None
    if mode != "RGB":
        raise SafetyDPOError(f"expected a picture in mode RGB, found mode {mode}: convert it to red, green, blue first")
    return pixels
