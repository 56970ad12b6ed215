from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from safetydpo.errors import SafetyDPOError
from safetydpo.judges.picture_files import read_picture
from tests.judges.pictures import coloured

PICTURE = coloured(20, 30, seed=0)


def file(image: Image.Image, format: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_give_their_pixels(format: str):
    more = {"lossless": True} if format == "WEBP" else {}
    torch.testing.assert_close(read_picture(file(Image.fromarray(PICTURE.numpy()), format, **more)), PICTURE)


def test_other_modes_become_red_green_blue():
    image = Image.fromarray(PICTURE.numpy())
    jpeg = file(image, "JPEG")
    assert (read_picture(jpeg).numpy() == np.asarray(Image.open(io.BytesIO(jpeg)))).all()
    grey = read_picture(file(image.convert("L"), "PNG"))
    assert tuple(grey.shape) == (20, 30, 3)
    assert (grey[..., 0] == grey[..., 2]).all()
    assert tuple(read_picture(file(image.convert("P"), "GIF")).shape) == (20, 30, 3)
    assert tuple(read_picture(file(image.convert("1"), "PNG")).shape) == (20, 30, 3)


def test_what_is_transparent_is_white():
    layer = np.zeros((4, 4, 4), np.uint8)
    layer[0, 0] = (255, 0, 0, 255)
    found = read_picture(file(Image.fromarray(layer), "PNG"))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[3, 3].tolist() == [255, 255, 255]


def test_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert tuple(read_picture(file(Image.fromarray(PICTURE.numpy()), "PNG", exif=exif)).shape) == (30, 20, 3)


def test_of_a_film_the_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    film = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_picture(film)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "data",
    [b"", b"not a picture", file(Image.fromarray(PICTURE.numpy()), "PNG")[:-60], b"\x89PNG\r\n\x1a\n" + b"\0" * 40],
)
def test_what_is_no_whole_picture_is_corrupt(data: bytes):
    with pytest.raises(SafetyDPOError, match=rf"^corrupt: {len(data):,} bytes"):
        read_picture(data)


def test_a_picture_that_claims_more_pixels_than_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(SafetyDPOError, match="^corrupt: .*decompression bomb"):
        read_picture(file(Image.fromarray(PICTURE.numpy()), "PNG"))
