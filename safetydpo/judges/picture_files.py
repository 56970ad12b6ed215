"""Picture files of any common format and size, as judges look at them.

Axis legend: `h w` picture axes.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from safetydpo.artifacts.picture_limits import BrokenPicture, opened_picture
from safetydpo.errors import SafetyDPOError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_picture(data: bytes) -> UInt8[Tensor, "h w 3"]:
    """Return the pixels of a picture file in red, green, blue, turned upright; of a film the first frame.

    Transparent places show white, as on a page.

    Raises:
        SafetyDPOError: beginning with `corrupt`, if the bytes are no whole picture.
    """
    if not data:
        raise SafetyDPOError("corrupt: 0 bytes")
    try:
        with opened_picture(data) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            pixels = np.array(upright.convert("RGB"))
    except BrokenPicture as error:
        raise SafetyDPOError(f"corrupt: {len(data):,} bytes that do not decode ({error})") from None
    return torch.from_numpy(pixels)
