"""peft's LoRA layer, whose products can be computed in the type of a low-precision base.

Axis legend: `rank` LoRA rank, `d_in d_out` axes of a linear layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

SLOT = "default"
"""What peft calls the one adapter."""
Compute = Literal["float32", "base"]


class SlotLinear(PeftLinear):  # type: ignore[misc]
    """A linear layer with one adapter; its weights are float32 whatever it computes in."""

    compute: Compute = "float32"
    """`float32`: inputs and outputs of the adapter are cast, as peft does. `base`: the weights are cast instead, once
    per pass, and the sum is written once: the layer then moves about a quarter of the bytes."""

    gate: Tensor | None = None
    """1 or 0, as a number that the code reads: base(x) + gate * scaling * B A x. With it, the adapter is switched off
    without other code being run, so that policy and reference, both compiled, agree to the last bit while B A x = 0.
    None = peft's switch."""

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Return base(x) + scaling * B A x in the type of the base."""
        if self.gate is not None:
            return self._gated(x, self.gate)
        if self.compute == "float32" or x.dtype == torch.float32 or self.disable_adapters or self.merged:
            whole: Tensor = super().forward(x, *arguments, **keywords)
            return whole
        base: Tensor = self.base_layer(x, *arguments, **keywords)
        down, up = (part[SLOT].weight.to(base.dtype) for part in (self.lora_A, self.lora_B))
        inner = F.linear(x, down).flatten(0, -2)
        added = torch.addmm(base.flatten(0, -2), inner, up.t(), alpha=self.scaling[SLOT])
        return added.view(base.shape)

    def _gated(self, x: Tensor, gate: Tensor) -> Tensor:
        base: Tensor = self.base_layer(x)
        kind = base.dtype if self.compute == "base" else torch.float32
        down, up = (part[SLOT].weight.to(kind) for part in (self.lora_A, self.lora_B))
        added = F.linear(F.linear(x.to(kind), down), up) * (gate * self.scaling[SLOT]).to(kind)
        return (base + added).to(base.dtype)
