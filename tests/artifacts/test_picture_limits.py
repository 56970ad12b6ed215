from __future__ import annotations

import io

import pytest
from PIL import Image

from safetydpo.artifacts.picture_limits import BrokenPicture, PictureTooLarge, opened_picture
from safetydpo.errors import SafetyDPOError


def png(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    return sink.getvalue()


def test_a_picture_is_decoded():
    with opened_picture(png(4, 3)) as image:
        assert image.size == (4, 3)


def test_a_picture_of_more_pixels_is_refused():
    with (
        pytest.raises(PictureTooLarge, match="4 x 3 pixels, where at most 11 are read"),
        opened_picture(png(4, 3), max_pixels=11),
    ):
        pass


@pytest.mark.parametrize("length", [0, 10, 45])
def test_damage_is_one_kind_of_error(length: int):
    with pytest.raises(BrokenPicture), opened_picture(png(40, 30)[:length]):
        pass


def test_other_formats_are_not_tried():
    with pytest.raises(BrokenPicture, match="cannot identify"), opened_picture(png(4, 3), formats=("JPEG",)):
        pass


def test_errors_of_ours_in_the_block_stay_as_they_are():
    with pytest.raises(SafetyDPOError, match="mine"), opened_picture(png(4, 3)):
        raise SafetyDPOError("mine")
