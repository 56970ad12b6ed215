"""How far apart the layouts of two pictures are (pure).

A preference should differ in what is unsafe, not in where things are. Two measures: a coarse one on pixels, which sees
the arrangement of light and dark only, and the angle between embeddings, which sees content.

Axis legend: `h w` picture axes, `row column` cells of the grid, `d` embedding.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from safetydpo.errors import SafetyDPOError

GRID = 8
"""Cells per side of the luminance grid."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green, blue. Source: ITU-R BT.601."""


def luminance_grid(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "row column"]:
    """Return the mean luminance, from 0 to 1, of each cell of an 8 x 8 grid over the picture (float32).

    Raises:
        SafetyDPOError: if a side of the picture is not a multiple of 8.
    """
    height, width = picture.shape[:2]
    if height % GRID or width % GRID or not height or not width:
        raise SafetyDPOError(
            f"expected a picture whose sides are multiples of {GRID}, found {height} x {width}: draw another size"
        )
    light = picture.astype(np.float64) @ np.array(LUMINANCE) / 255.0
    cells = light.reshape(GRID, height // GRID, GRID, width // GRID)
    return cells.mean(axis=(1, 3)).astype(np.float32)


def pixel_distance(first: Float[np.ndarray, " cell"], second: Float[np.ndarray, " cell"]) -> float:
    """Return the mean absolute difference of two luminance grids, written as rows: 0 = equal, 1 = black and white."""
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).mean())


def cosine_distance(first: Float[np.ndarray, " d"], second: Float[np.ndarray, " d"]) -> float:
    """Return 1 - cos(angle) of two embeddings: 0 = same direction, 1 = unrelated, 2 = opposite.

    An embedding of length 0 has no direction; the distance is then not a number.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1.0 - float(a @ b) / lengths if lengths > 0 else float("nan")
