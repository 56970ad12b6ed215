from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy.spatial.distance import cosine

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.layout import cosine_distance, luminance_grid, pixel_distance

grids = arrays.arrays(np.float32, 64, elements=st.floats(0, 1, width=32))
embeddings = arrays.arrays(np.float32, 5, elements=st.floats(-3, 3, width=32))
pictures = arrays.arrays(np.uint8, (16, 24, 3))


def half_white(axis: int) -> np.ndarray:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255
    return picture if axis == 0 else picture.transpose(1, 0, 2).copy()


def test_grid_by_hand():
    """A green of 255 in one of the four pixels of the first cell: 0.587 x 255 / 255 / 4 = 0.14675."""
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[1, 0, 1] = 255
    grid = luminance_grid(picture)
    assert grid.shape == (8, 8)
    assert grid.dtype == np.float32
    assert grid[0, 0] == pytest.approx(0.14675)
    assert grid.sum() == grid[0, 0]


def test_distance_by_hand():
    """Black and white differ by 1 everywhere; the upper half and the left half differ in two quarters: 0.5."""
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert pixel_distance(luminance_grid(black).ravel(), luminance_grid(white).ravel()) == pytest.approx(1.0)
    upper, left = luminance_grid(half_white(0)).ravel(), luminance_grid(half_white(1)).ravel()
    assert pixel_distance(upper, left) == pytest.approx(0.5)


@given(pictures)
def test_the_grid_is_a_box_filter_of_the_luminance(picture: np.ndarray):
    """Pillow's luminance is rounded to whole levels, so that it may be half a level off."""
    light = np.asarray(Image.fromarray(picture).convert("L"), np.float32)
    boxes = torch.nn.functional.avg_pool2d(torch.from_numpy(light)[None, None] / 255, (2, 3))[0, 0].numpy()
    assert np.abs(luminance_grid(picture) - boxes).max() <= 0.51 / 255


@given(grids, grids, grids)
def test_the_pixel_distance_is_a_distance(first: np.ndarray, second: np.ndarray, third: np.ndarray):
    there = pixel_distance(first, second)
    assert 0 <= there <= 1
    assert there == pixel_distance(second, first)
    assert pixel_distance(first, first) == 0
    assert there <= pixel_distance(first, third) + pixel_distance(third, second) + 1e-12


@given(embeddings, embeddings)
def test_the_cosine_distance_is_that_of_scipy(first: np.ndarray, second: np.ndarray):
    if min(np.linalg.norm(first.astype(float)), np.linalg.norm(second.astype(float))) < 1e-6:
        return
    expected = cosine(first.astype(float), second.astype(float))
    assert cosine_distance(first, second) == pytest.approx(expected, abs=1e-9)


def test_cosine_distance_by_hand():
    """At 60 degrees the cosine is 1/2; lengths do not matter; an embedding of length 0 has no direction."""
    one = np.array([1, 0], np.float32)
    assert cosine_distance(one, np.array([2, 2 * math.sqrt(3)], np.float32)) == pytest.approx(0.5)
    assert cosine_distance(one, -3 * one) == pytest.approx(2.0)
    assert math.isnan(cosine_distance(one, 0 * one))


def test_a_side_that_does_not_divide_is_refused():
    with pytest.raises(SafetyDPOError, match="expected a picture whose sides are multiples of 8, found 16 x 20: draw"):
        luminance_grid(np.zeros((16, 20, 3), np.uint8))
