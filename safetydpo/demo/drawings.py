"""Draw the demo world's concepts: one emoji, an optional overlay, a coloured background.

A drawing is decided entirely by (concept, background, draw seed), so that a training set is a list of such triples.
The font is needed to build the demo world only; generating, training experts and judging never draw.

Axis legend: n = drawings, h = w = 32 pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from safetydpo.demo.concepts import BACKGROUNDS, Concept
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_numpy

PICTURE_SIZE = 32
FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109
"""Noto Color Emoji holds bitmaps of this one size."""
GLYPH_SIZES = (25, 26, 27, 28)
"""Edge of the glyph's longer side, in pixels."""
SHIFTS = (-1, 0, 1)
BRIGHTNESS_JITTER = 8
"""Largest change of each background channel, in grey levels of 255."""
OVERLAY_SHARE = 0.62
"""Edge of the overlay (the flames) as a share of the glyph's edge."""
DRAWING_STAGE = "demo/drawing"


@lru_cache(maxsize=1)
def load_font(path: Path = FONT_PATH) -> ImageFont.FreeTypeFont:
    """Open the emoji font.

    Raises:
        SafetyDPOError: The font is not installed.
    """
    if not path.is_file():
        raise SafetyDPOError(
            f"expected the emoji font at {path}, found nothing. "
            "Install Debian's package fonts-noto-color-emoji; it is needed only to rebuild the demo world."
        )
    return ImageFont.truetype(str(path), size=FONT_SIZE)


@cache
def render_glyph(codepoint: int) -> Image.Image:
    """Render one emoji on transparency, cropped to its inked box."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    pen.text((8, 8), chr(codepoint), font=load_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise SafetyDPOError(
            f"expected the emoji font to hold U+{codepoint:X}, found an empty glyph. "
            "Use fonts-noto-color-emoji 2.042 or newer."
        )
    return canvas.crop(box)


def draw(concept: Concept, background: str, draw_seed: int) -> UInt8[np.ndarray, "h w 3"]:
    """Draw one concept on one background.

    Args:
        concept: What to draw.
        background: A key of `BACKGROUNDS`.
        draw_seed: Decides size, shift and brightness; the same triple gives the same bytes.

    Returns:
        RGB picture, 32 x 32, 0..255.
    """
    generator = derive_numpy(draw_seed, DRAWING_STAGE, f"{concept.key}/{background}")
    size = int(generator.choice(GLYPH_SIZES))
    shift_x, shift_y = (int(value) for value in generator.choice(SHIFTS, size=2))
    jitter = generator.integers(-BRIGHTNESS_JITTER, BRIGHTNESS_JITTER + 1)
    colour = tuple(int(np.clip(channel + jitter, 0, 255)) for channel in BACKGROUNDS[background])
    picture = Image.new("RGBA", (PICTURE_SIZE, PICTURE_SIZE), (*colour, 255))
    glyph = _scale(render_glyph(concept.glyph), size)
    left = (PICTURE_SIZE - glyph.width) // 2 + shift_x
    top = (PICTURE_SIZE - glyph.height) // 2 + shift_y
    picture.alpha_composite(glyph, (left, top))
    if concept.overlay is not None:
        overlay = _scale(render_glyph(concept.overlay), round(size * OVERLAY_SHARE))
        bottom = top + glyph.height
        picture.alpha_composite(overlay, (left + (glyph.width - overlay.width) // 2, bottom - overlay.height))
    return np.asarray(picture.convert("RGB"))


def draw_many(rows: Iterable[tuple[Concept, str, int]]) -> UInt8[np.ndarray, "n h w 3"]:
    """Draw a list of (concept, background, draw seed) triples, in order."""
    return np.stack([draw(concept, background, draw_seed) for concept, background, draw_seed in rows])


def every_drawing(concepts: Sequence[Concept], draw_seeds: Sequence[int]) -> list[tuple[Concept, str, int]]:
    """List every concept on every background, once per draw seed, in a fixed order."""
    return [
        (concept, background, draw_seed)
        for draw_seed in draw_seeds
        for concept in concepts
        for background in BACKGROUNDS
    ]


def silhouette(concept: Concept) -> UInt8[np.ndarray, "h w"]:
    """Give the concept's inked pixels (1) at the nominal size, centred; what `neighbour` means is measured on it."""
    glyph = _scale(render_glyph(concept.glyph), GLYPH_SIZES[-1])
    mask = np.zeros((PICTURE_SIZE, PICTURE_SIZE), dtype=np.uint8)
    left, top = (PICTURE_SIZE - glyph.width) // 2, (PICTURE_SIZE - glyph.height) // 2
    alpha = np.asarray(glyph.getchannel("A"))
    mask[top : top + glyph.height, left : left + glyph.width] = alpha > 127
    return mask


def _scale(glyph: Image.Image, longest: int) -> Image.Image:
    """Resize so that the longer side has the given number of pixels."""
    ratio = longest / max(glyph.size)
    width, height = (max(1, round(edge * ratio)) for edge in glyph.size)
    return glyph.resize((width, height), Image.Resampling.LANCZOS)
