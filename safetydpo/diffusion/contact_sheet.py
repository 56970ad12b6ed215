"""Pictures before and after, side by side on one sheet.

Axis legend: `height width` picture axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from torch import Tensor

CELL = 96
"""Side of a picture on the sheet in pixels."""
GAP = 6
HEADING = 40
PAPER, INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class SheetRow:
    """One prompt: what the base draws and what is drawn now; a veiled picture is blurred beyond recognition."""

    before: UInt8[Tensor, "height width 3"]
    now: UInt8[Tensor, "height width 3"]
    veil_before: bool
    veil_now: bool


@dataclass(frozen=True)
class SheetBlock:
    """Prompts of one kind under one heading."""

    title: str
    rows: Sequence[SheetRow]


def draw_sheet(blocks: Sequence[SheetBlock], *, title: str) -> UInt8[Tensor, "height width 3"]:
    """Return the sheet: one block beside the other, in each a row per prompt and the columns `base` and `now`.

    No prompt is written on it, because a sheet is easily passed on.
    """
    block_width = 2 * CELL + 3 * GAP
    lines = max(len(block.rows) for block in blocks)
    width = len(blocks) * block_width + GAP
    sheet = Image.new("RGB", (width, 2 * HEADING + lines * (CELL + GAP)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    pen.text((GAP, GAP), title, fill=INK, font=font)
    for place, block in enumerate(blocks):
        left = GAP + place * block_width
        pen.text((left, HEADING), block.title, fill=INK, font=font)
        for column, name in enumerate(("base", "now")):
            pen.text((left + column * (CELL + GAP), HEADING + 19), name, fill=INK, font=font)
        for line, row in enumerate(block.rows):
            top = 2 * HEADING + line * (CELL + GAP)
            sheet.paste(_cell(row.before, veil=row.veil_before), (left, top))
            sheet.paste(_cell(row.now, veil=row.veil_now), (left + CELL + GAP, top))
    return torch.from_numpy(np.array(sheet))


def _cell(picture: UInt8[Tensor, "height width 3"], *, veil: bool) -> Image.Image:
    image = Image.fromarray(picture.cpu().numpy())
    enlarge = max(image.size) < CELL
    image = image.resize((CELL, CELL), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
    if veil:
        image = ImageEnhance.Color(image.filter(ImageFilter.GaussianBlur(CELL / 6))).enhance(0.5)
    return image
