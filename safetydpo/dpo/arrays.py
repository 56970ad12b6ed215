"""Stored arrays as tensors: every one there, of one shape, finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safetydpo.errors import SafetyDPOError


def check_latents(ids: Sequence[str], latents: Tensor, what: str) -> None:
    """Check that there is one latent for each id, of finite numbers.

    Raises:
        SafetyDPOError: naming the first id whose latent is not.
    """
    if latents.shape[0] != len(ids):
        raise SafetyDPOError(f"expected one {what} each, found {latents.shape[0]} for {len(ids)}: encode them anew")
    finite = latents.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = ids[int((~finite).nonzero()[0])]
        raise SafetyDPOError(
            f"expected finite numbers, found NaN or infinity in the {what} {bad!r}: encode that picture anew "
            "(float16 encoders overflow on some pictures; use base.dtype float32 or bfloat16)"
        )


def gather_arrays(
    keys: Sequence[str],
    table: Mapping[str, NDArray[np.floating]],
    what: str,
    *,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the arrays of `keys` stacked in that order; all must have the shape of the first, or `shape`.

    Raises:
        SafetyDPOError: if one is missing, of another shape or not finite; `what` names it.
    """
    if not keys:
        return torch.empty((0, *(shape or ())))
    arrays = []
    for key in keys:
        if key not in table:
            raise SafetyDPOError(f"expected the {what} {key!r}, found none: run the encoding step again")
        array = table[key]
        shape = array.shape if shape is None else shape
        if tuple(array.shape) != tuple(shape):
            raise SafetyDPOError(
                f"expected shape {tuple(shape)} for the {what} {key!r}, found {tuple(array.shape)}: "
                "encode it with this run's base model and picture size"
            )
        if not np.isfinite(array).all():
            raise SafetyDPOError(
                f"expected finite numbers, found NaN or infinity in the {what} {key!r}: encode it anew"
            )
        arrays.append(array)
    return torch.from_numpy(np.stack(arrays))
