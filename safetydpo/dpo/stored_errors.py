"""Stored errors of the reference as tensors, and how they are compared with the policy's.

Axis legend: `pair` preference rows, `draw` draws of a pair, `side` safe and unsafe, `error` errors of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-5
"""Relative difference of two float32 errors of one network on one draw, at most: other kernels sum in another order."""


def errors_by_draw(errors: Sequence[Float[np.ndarray, "_ side"]]) -> Float[Tensor, "pair draw side"]:
    """Return each pair's errors as one tensor, filled up with NaN where a pair has fewer draws than another."""
    longest = max((len(rows) for rows in errors), default=0)
    together = np.full((len(errors), longest, 2), np.nan, dtype=np.float32)
    for pair, rows in enumerate(errors):
        together[pair, : len(rows)] = rows
    return torch.from_numpy(together)


def without_rounding(stored: Float[Tensor, " error"], policy: Float[Tensor, " error"]) -> Float[Tensor, " error"]:
    """Return the stored errors, each replaced by the policy's (without gradient) where they differ by rounding alone.

    `r_i = p_i where |r_i - p_i| <= 1e-5 r_i, else r_i`. While the adapter changes nothing, a reference that is computed
    in each step has the policy's very bits: the loss is ln 2 and the penalty on a rise of the safe error has no
    gradient. A stored error that is off by the last bit would put every second row beyond that penalty's kink.
    """
    policy = policy.detach()
    return torch.where((stored - policy).abs() <= ROUNDING * stored, policy, stored)
