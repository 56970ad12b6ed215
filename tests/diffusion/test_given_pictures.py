from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safetydpo.diffusion import given_pictures
from safetydpo.diffusion.given_pictures import PictureFacts, fit_picture, inspect_picture
from safetydpo.errors import SafetyDPOError


def saved(pixels: np.ndarray[Any, Any], kind: str = "PNG", mode: str | None = None) -> bytes:
    picture = Image.fromarray(pixels)
    stream = io.BytesIO()
    (picture if mode is None else picture.convert(mode)).save(stream, kind)
    return stream.getvalue()


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_format_and_size_are_those_of_the_file(kind: str):
    assert inspect_picture(saved(pixels(6, 9), kind)) == PictureFacts(kind.lower(), 6, 9)


def test_a_picture_of_the_size_stays_as_it_is():
    given_pixels = pixels(8, 12)
    assert np.array_equal(fit_picture(saved(given_pixels), height=8, width=12), given_pixels)


def test_the_middle_is_kept():
    """Twice as wide as high, at its own height: the outer quarters go."""
    given_pixels = pixels(8, 16)
    assert np.array_equal(fit_picture(saved(given_pixels), height=8, width=8), given_pixels[:, 4:12])


def test_shrunk_to_half_by_hand():
    """Grounds of one colour stay it; the seam of black and white, in the middle, is grey on either side or sharp."""
    given_pixels = np.zeros((8, 8, 3), np.uint8)
    given_pixels[:, 4:] = 200
    found = fit_picture(saved(given_pixels), height=4, width=4)
    assert found[:, 0].max() == 0
    assert found[:, 3].min() == 200
    assert found[:, 1].max() < 100 < found[:, 2].min()


@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 32]))
def test_every_size_comes_out_as_the_runs(height: int, width: int, wanted_height: int, wanted_width: int):
    found = fit_picture(saved(pixels(height, width)), height=wanted_height, width=wanted_width)
    assert found.shape == (wanted_height, wanted_width, 3)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_modes_become_red_green_blue(mode: str):
    assert fit_picture(saved(pixels(8, 8), mode=mode), height=8, width=8).shape == (8, 8, 3)


def test_what_is_no_picture_is_refused(monkeypatch: pytest.MonkeyPatch):
    whole = saved(pixels(32, 32), "JPEG")
    for broken in (b"", b"no picture", whole[:30], whole[: len(whole) // 2], saved(pixels(4, 4), "GIF")):
        for look in (inspect_picture, lambda data: fit_picture(data, height=8, width=8)):
            with pytest.raises(SafetyDPOError, match=f"complete JPEG, PNG or WebP, found {len(broken)} bytes that do"):
                look(broken)
    monkeypatch.setattr(given_pictures, "MAX_PIXELS", 100)
    with pytest.raises(SafetyDPOError, match="expected a picture of at most 100 pixels, found 32 x 32: take its row"):
        inspect_picture(whole)
