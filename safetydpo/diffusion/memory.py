"""Draw with the batch size asked for, or with the largest half of it that fits into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

from safetydpo.config.schema import SamplerConfig

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")
"""What torch's errors say; on a CPU they are plain `RuntimeError`s, and the last is all that oneDNN says of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def draw_within_memory(
    draw: Callable[[SamplerConfig], UInt8[Tensor, "row height width 3"]], *, sampler: SamplerConfig
) -> tuple[UInt8[Tensor, "row height width 3"], int]:
    """Return what `draw` makes with a sampler, and that sampler's batch size: as given, halved while it does not fit.

    A smaller batch changes the last bits of a picture, so each caller keeps the number with its rows and starts the
    next rows with the full size again.

    Raises:
        RuntimeError: if not even one picture fits.
    """
    size = sampler.batch_size
    while True:
        try:
            return draw(sampler.model_copy(update={"batch_size": size})), size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Here, not in the handler: there the traceback still holds the tensors of the failed pass.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
