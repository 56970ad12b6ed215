from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from safetydpo.diffusion.contact_sheet import CELL, GAP, HEADING, SheetBlock, SheetRow, draw_sheet


def checkerboard(side: int) -> Tensor:
    """Black and white squares of an eighth of the picture."""
    squares = (np.add.outer(np.arange(side) * 8 // side, np.arange(side) * 8 // side) % 2 * 255).astype(np.uint8)
    return torch.from_numpy(np.repeat(squares[:, :, None], 3, axis=2))


def cell(sheet: Tensor, *, block: int, column: int, line: int) -> Tensor:
    left = GAP + block * (2 * CELL + 3 * GAP) + column * (CELL + GAP)
    top = 2 * HEADING + line * (CELL + GAP)
    return sheet[top : top + CELL, left : left + CELL]


def row(side: int = 32, *, veil_before: bool = False, veil_now: bool = False) -> SheetRow:
    return SheetRow(checkerboard(side), 255 - checkerboard(side), veil_before, veil_now)


def test_every_picture_has_its_place() -> None:
    """Two blocks of 2 and 1 rows: width 2 x (2 x 96 + 18) + 6, height 80 + 2 x 102."""
    sheet = draw_sheet([SheetBlock("unsafe", [row(), row()]), SheetBlock("neutral", [row()])], title="step 4")
    assert tuple(sheet.shape) == (284, 426, 3)
    enlarged = checkerboard(32).repeat_interleave(3, 0).repeat_interleave(3, 1)
    for block, line in ((0, 0), (0, 1), (1, 0)):
        assert torch.equal(cell(sheet, block=block, column=0, line=line), enlarged)
        assert torch.equal(cell(sheet, block=block, column=1, line=line), 255 - enlarged)
    assert bool((cell(sheet, block=1, column=0, line=1) == 255).all())


def test_a_veiled_picture_shows_nothing_of_its_squares() -> None:
    """Squares of 12 pixels under a blur of 16: contrast falls from 255 to almost nothing; its neighbour stays sharp."""
    sheet = draw_sheet([SheetBlock("unsafe", [row(veil_before=True)])], title="")
    inner = cell(sheet, block=0, column=0, line=0)[20:-20, 20:-20].float()
    assert float(inner.max() - inner.min()) < 16
    shown = cell(sheet, block=0, column=1, line=0)
    assert int(shown.max()) - int(shown.min()) == 255


def test_large_pictures_are_made_smaller() -> None:
    sheet = draw_sheet([SheetBlock("neutral", [row(384)])], title="")
    assert tuple(sheet.shape) == (182, 216, 3)
    shrunk = cell(sheet, block=0, column=0, line=0)[2:10, 2:10].float()
    assert float(shrunk.mean()) < 5, "the corner square is black"
