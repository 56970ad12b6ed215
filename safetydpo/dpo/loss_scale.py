"""The factor of the loss that keeps small gradients of a float16 network from becoming 0: a pure rule.

Each engine multiplies the loss by `value` before the way back and divides the gradients by it after; `value` is a power
of two, so that neither rounds. A step whose gradients overflow is not taken: it is computed again with half the factor.
The rule is that of `torch.amp.GradScaler`, which itself only knows gradients that lie in `.grad`; ZeRO keeps them
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

INITIAL = 2.0**16
GROWTH_INTERVAL = 2000
MINIMUM = 1.0
"""Gradients that overflow at this factor are no matter of scaling."""


@dataclass(frozen=True)
class LossScale:
    """The factor and what its next change depends on."""

    value: float = INITIAL
    good_steps: int = 0
    """Steps taken since the last change."""
    skipped: int = 0
    """Attempts at a step, so far, whose gradients overflowed."""

    def after_step(self) -> LossScale:
        """Return the factor after a step: doubled after `GROWTH_INTERVAL` ones in a row.

        Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.2, in the form of
        `torch.amp.GradScaler`.
        """
        if self.good_steps + 1 < GROWTH_INTERVAL:
            return replace(self, good_steps=self.good_steps + 1)
        return replace(self, value=2.0 * self.value, good_steps=0)

    def after_overflow(self) -> LossScale:
        """Return the factor after an attempt whose gradients overflowed: halved."""
        return LossScale(value=0.5 * self.value, good_steps=0, skipped=self.skipped + 1)


def initial_loss_scale(rule: Literal["auto", "none", "dynamic"], dtype: torch.dtype) -> LossScale | None:
    """Return the factor that training of a network of `dtype` starts with; None = the loss is not scaled."""
    scaled = rule == "dynamic" or (rule == "auto" and dtype == torch.float16)
    return LossScale() if scaled else None
