"""Picture files of any common format and size, as judges look at them.

Axis legend: `h w` picture axes.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from safetydpo.errors import SafetyDPOError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def read_picture(data: bytes) -> UInt8[Tensor, "h w 3"]:
    """Return the pixels of a picture file in red, green, blue, turned upright; of a film the first frame.

    Transparent places show white, as on a page.

    Raises:
        SafetyDPOError: beginning with `corrupt`, if the bytes are no whole picture.
    """
    if not data:
        raise SafetyDPOError("corrupt: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            pixels = np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        told = " ".join(str(error).split())[:120]
        raise SafetyDPOError(f"corrupt: {len(data):,} bytes that do not decode ({told})") from None
    return torch.from_numpy(pixels)
