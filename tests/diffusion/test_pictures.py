from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safetydpo.diffusion.pictures import PictureFormat, decode_picture, encode_picture
from safetydpo.errors import SafetyDPOError

FORMATS: tuple[PictureFormat, ...] = ("png", "webp")


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("format", FORMATS)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_pixels_come_back_and_the_same_bytes_again(format: PictureFormat, height: int, width: int, seed: int):
    image = noise(height, width, seed)
    data = encode_picture(image, format=format)
    assert data == encode_picture(image.clone(), format=format)
    assert np.array_equal(decode_picture(data), image.numpy())
    with Image.open(io.BytesIO(data)) as other:
        assert other.format == format.upper()
        assert np.array_equal(np.asarray(other.convert("RGB")), image.numpy())


@pytest.mark.parametrize("format", FORMATS)
def test_broken_files_are_refused(format: PictureFormat):
    data = encode_picture(noise(32, 32), format=format)
    for broken in (b"", b"not a picture", data[:40], data[: len(data) // 2]):
        with pytest.raises(SafetyDPOError, match=f"expected a complete PNG or WebP, found {len(broken)} bytes"):
            decode_picture(broken)


def test_other_modes_and_formats_are_refused():
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, format="PNG")
    with pytest.raises(SafetyDPOError, match="expected a picture in mode RGB, found mode L"):
        decode_picture(buffer.getvalue())
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="GIF")
    with pytest.raises(SafetyDPOError, match="expected a complete PNG or WebP"):
        decode_picture(buffer.getvalue())
