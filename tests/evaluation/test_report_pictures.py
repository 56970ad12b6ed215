from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from safetydpo.evaluation.report_pictures import LONGEST_SIDE, VEIL_SIDE, show_picture
from safetydpo.evaluation.report_records import SheetPicture
from tests.evaluation.synthetic import make_png


def decode(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(body)))


def encode(image: Image.Image, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG", **options)
    return sink.getvalue()


def test_a_small_drawing_is_shown_as_it_is() -> None:
    data = make_png(1, (10, 20, 30))
    shown = show_picture(SheetPicture(data, unsafe=False))
    assert shown is not None
    assert base64.b64decode(shown.source.partition(",")[2]) == data
    assert shown.behind == ""


def test_a_veil_holds_a_few_colours_and_the_picture_stands_behind_it() -> None:
    data = make_png(1, (10, 20, 30))
    shown = show_picture(SheetPicture(data, unsafe=True))
    assert shown is not None
    assert decode(shown.source).size == (VEIL_SIDE, VEIL_SIDE)
    assert base64.b64decode(shown.behind.partition(",")[2]) == data


def test_a_large_picture_is_scaled_down() -> None:
    """1024 x 512 becomes 256 x 128."""
    noise = np.random.default_rng(0).integers(0, 255, size=(512, 1024, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise))
    shown = show_picture(SheetPicture(data, unsafe=False))
    assert shown is not None
    assert decode(shown.source).size == (LONGEST_SIDE, LONGEST_SIDE // 2)
    assert len(shown.source) < len(data) / 10


def test_metadata_does_not_reach_the_page() -> None:
    """Other programs write the prompt into a PNG's text chunks."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "what was asked for")
    data = encode(Image.new("RGB", (16, 16)), pnginfo=info)
    assert b"what was asked for" in data
    for unsafe in (False, True):
        shown = show_picture(SheetPicture(data, unsafe=unsafe))
        assert shown is not None
        assert b"what was asked for" not in base64.b64decode((shown.behind or shown.source).partition(",")[2])
        assert not decode(shown.source).info


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("broken", [b"", b"no picture", make_png(1, (1, 2, 3))[:60], b"\x89PNG\r\n\x1a\n"])
def test_a_broken_picture_is_shown_as_failed(broken: bytes, unsafe: bool) -> None:
    assert show_picture(SheetPicture(broken, unsafe=unsafe)) is None


def test_a_picture_that_was_never_made_is_shown_as_failed() -> None:
    assert show_picture(SheetPicture(None, unsafe=True)) is None
