"""Drawings, with a synthetic glyph in the font's place: the font is needed to rebuild the world only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safetydpo.demo import drawings
from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS, get_concept
from safetydpo.demo.drawings import draw, draw_many, every_drawing, load_font, silhouette
from safetydpo.errors import SafetyDPOError


@pytest.fixture
def square_glyph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every emoji is a square: yellow, the flames pure red."""

    def render(codepoint: int) -> Image.Image:
        colour = (255, 0, 0, 255) if codepoint == 0x1F525 else (255, 255, 0, 255)
        return Image.new("RGBA", (100, 100), colour)

    monkeypatch.setattr(drawings, "render_glyph", render)


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour)).all(axis=-1).sum())


@pytest.mark.usefixtures("square_glyph")
def test_size_shift_and_brightness_stay_in_their_ranges() -> None:
    """The square's edge is 25..28 pixels, its place the centre +-1, and each background channel moves by <= 8."""
    edges, corners = set(), set()
    for draw_seed in range(40):
        picture = draw(get_concept("bomb"), "blue", draw_seed)
        rows, columns = np.nonzero((picture == np.array([255, 255, 0])).all(axis=-1))
        edge = int(rows.max() - rows.min() + 1)
        assert len(rows) == edge**2
        edges.add(edge)
        corners.add((int(rows.min()) - (32 - edge) // 2, int(columns.min()) - (32 - edge) // 2))
        change = picture[0, 0].astype(int) - np.array(BACKGROUNDS["blue"])
        assert np.abs(change).max() <= 8
        assert len(set(change.tolist())) == 1
    assert edges == {25, 26, 27, 28}
    assert {shift for corner in corners for shift in corner} == {-1, 0, 1}


@pytest.mark.usefixtures("square_glyph")
def test_flames_cover_their_share_of_the_burning_house() -> None:
    """The overlay's edge is round(0.62 x 25..28) = 16 or 17 pixels, so 256 or 289 are red; the house has none."""
    assert count(draw(get_concept("burning_house"), "white", 3), (255, 0, 0)) in (256, 289)
    assert count(draw(get_concept("house"), "white", 3), (255, 0, 0)) == 0


@pytest.mark.usefixtures("square_glyph")
def test_a_drawing_depends_on_its_triple_only() -> None:
    rows = [(CONCEPTS[0], "pink", 5), (CONCEPTS[1], "cyan", 5)]
    forward, backward = draw_many(rows), draw_many(rows[::-1])
    np.testing.assert_array_equal(forward, backward[::-1])
    assert (draw(CONCEPTS[0], "pink", 5) != draw(CONCEPTS[0], "pink", 6)).any()


@pytest.mark.usefixtures("square_glyph")
def test_silhouette_is_the_inked_box() -> None:
    """A full square at 28 pixels: 28 x 28 = 784 inked."""
    assert silhouette(get_concept("bomb")).sum() == 784


def test_every_drawing_lists_each_triple_once() -> None:
    rows = every_drawing(CONCEPTS, (0, 1))
    assert len({(concept.key, background, seed) for concept, background, seed in rows}) == 2 * 8 * len(CONCEPTS)


def test_missing_font_is_named(tmp_path: Path) -> None:
    with pytest.raises(SafetyDPOError, match="Install Debian's package fonts-noto-color-emoji"):
        load_font(tmp_path / "none.ttf")
