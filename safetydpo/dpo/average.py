"""The running mean of the adapter's parameters over steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def average_decay(num_updates: int, *, decay: float) -> float:
    """Return how much of the mean is kept in update number `num_updates`, counted from 0.

    `d_n = min(decay, (1 + n) / (10 + n))`, and `d_0 = 0`: the mean starts as the parameters after the first step, and
    a short training is not held back by its start.

    Source: the `num_updates` rule of TensorFlow's `ExponentialMovingAverage`, in the form of diffusers' `EMAModel`.
    """
    if num_updates == 0:
        return 0.0
    return min(decay, (1 + num_updates) / (10 + num_updates))


@torch.no_grad()
def update_average(
    average: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, num_updates: int, decay: float
) -> None:
    """Move the mean towards the parameters in place: `mean <- d_n mean + (1 - d_n) parameter`."""
    share = 1.0 - average_decay(num_updates, decay=decay)
    for name, mean in average.items():
        mean.lerp_(parameters[name], share)
