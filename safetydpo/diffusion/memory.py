"""Draw with the batch size asked for, or with the largest half of it that fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.render import render

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")
"""What torch's errors say; on a CPU they are plain `RuntimeError`s, and the last is all that oneDNN says of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def render_within_memory(
    backbone: Backbone, *, prompts: Sequence[str], seeds: Sequence[int], sampler: SamplerConfig, **options: Any
) -> tuple[UInt8[Tensor, "row height width 3"], int]:
    """Return pictures and the batch size that they were drawn with: `sampler.batch_size`, halved while it does not fit.

    A smaller batch changes the last bits of a picture, so each caller keeps the number with its rows and starts the
    next rows with the full size again.

    Raises:
        RuntimeError: if not even one picture fits.
    """
    size = sampler.batch_size
    while True:
        fitting = sampler.model_copy(update={"batch_size": size})
        try:
            return render(backbone, prompts=prompts, seeds=seeds, sampler=fitting, **options), size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Here, not in the handler: there the traceback still holds the tensors of the failed pass.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
