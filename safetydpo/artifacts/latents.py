"""From rows of `latents` to arrays: the posterior's mean, and its standard deviation where it was stored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from safetydpo.errors import SafetyDPOError

SHAPE = ("channels", "height", "width")


def latent_means(table: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """Return the float16 mean of each picture's posterior, channel x height x width, by image id.

    Raises:
        SafetyDPOError: if a row's bytes do not fit its shape.
    """
    return {row["image_id"]: _array(row, "latent") for row in table.to_pylist()}


def latent_deviations(table: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """Return the float16 standard deviation of each picture's posterior, channel x height x width, by image id.

    Raises:
        SafetyDPOError: if it was not stored for a picture, or a row's bytes do not fit its shape.
    """
    found = {}
    for row in table.to_pylist():
        if row["deviation"] is None:
            raise SafetyDPOError(
                f"expected a deviation with the latents of picture {row['image_id']}, found the mean only: set "
                "identity.pairs.latents=mean_and_deviation and make the pairs again"
            )
        found[row["image_id"]] = _array(row, "deviation")
    return found


def _array(row: dict[str, Any], column: str) -> np.ndarray[Any, Any]:
    shape = [row[axis] for axis in SHAPE]
    size = len(row[column])
    # In Python's whole numbers: numpy's product of damaged sizes would wrap around.
    if min(shape) < 1 or size != 2 * math.prod(shape):
        raise SafetyDPOError(
            f"expected {column} of shape {shape} for picture {row['image_id']}, found {size / 2:g} numbers: "
            "delete that batch of the pool and make the pairs again"
        )
    return np.frombuffer(row[column], dtype=np.float16).reshape(shape)
