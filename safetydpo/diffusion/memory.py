"""Draw and encode with the batch size asked for, or with the largest half of it that fits into memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from safetydpo.config.schema import SamplerConfig

logger = logging.getLogger(__name__)
PATIENCE = 3
Made = TypeVar("Made")
Item = TypeVar("Item")
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")
"""What torch's errors say; on a CPU they are plain `RuntimeError`s, and the last is all that oneDNN says of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


class PassSize:
    """The batch size that a process's next rows start with: as asked for, until it has failed `PATIENCE` times running.

    Memory that another process took comes back; that of a card too small does not, and a picture's last step, the
    autoencoder's, needs most: each trial would cost all steps of a batch before it fails.
    """

    def __init__(self, batch_size: int) -> None:
        """Take the size that is asked for."""
        self.size = batch_size
        self._failed = 0

    def note(self, fitted: int) -> None:
        """Take into account which size a batch has fitted at."""
        self._failed = self._failed + 1 if fitted < self.size else 0
        if self._failed == PATIENCE:
            logger.warning("%d pictures do not fit into memory at once, %d do: staying there", self.size, fitted)
            self.size, self._failed = fitted, 0


def draw_within_memory(
    draw: Callable[[SamplerConfig], UInt8[Tensor, "row height width 3"]], *, sampler: SamplerConfig
) -> tuple[UInt8[Tensor, "row height width 3"], int]:
    """Return what `draw` makes with a sampler, and that sampler's batch size: as given, halved while it does not fit.

    A smaller batch changes the last bits of a picture, so each caller keeps the number with its rows and starts the
    next rows with the full size again, unless a `PassSize` has seen it fail too often.

    Raises:
        RuntimeError: if not even one picture fits.
    """
    return make_within_memory(
        lambda size: draw(sampler.model_copy(update={"batch_size": size})), batch_size=sampler.batch_size
    )


def encode_within_memory(
    items: Sequence[Item], encode: Callable[[list[Item]], Sequence[Made]], *, batch_size: int
) -> tuple[list[Made], int]:
    """Return what `encode` makes of each item, in passes of equal size, and that size: as given, halved as above.

    The last pass is padded with its last item, so that an item's bytes do not depend on the number of its neighbours.

    Raises:
        RuntimeError: if not even one item fits.
    """

    def in_passes(size: int) -> list[Made]:
        made: list[Made] = []
        for start in range(0, len(items), size):
            part = items[start : start + size]
            made += encode([*part, *[part[-1]] * (size - len(part))])[: len(part)]
        return made

    return make_within_memory(in_passes, batch_size=batch_size)


def make_within_memory(make: Callable[[int], Made], *, batch_size: int) -> tuple[Made, int]:
    """Return what `make` makes with a batch size, and that size: as given, halved while it does not fit.

    Raises:
        RuntimeError: if not even a batch of one fits.
    """
    size = batch_size
    while True:
        try:
            return make(size), size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Here, not in the handler: there the traceback still holds the tensors of the failed pass.
        # Frames of the failed pass may hold each other in a circle, and tensors with them.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
