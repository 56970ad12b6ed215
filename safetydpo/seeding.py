"""One way to draw randomness: a generator derived from (run seed, stage, row key).

Every random number of a run depends on what it is for, never on the order in which rows, workers or
trials happen to come: the same row gets the same noise on any number of machines.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive_seed(run_seed: int, stage: str, row_key: str) -> int:
    """Return a 63-bit seed that depends on all three arguments and on nothing else.

    `seed = first 8 bytes of sha256(run_seed "\\x1f" stage "\\x1f" row_key), top bit cleared`.

    Raises:
        ValueError: if `stage` is empty, because two stages would then share their draws.
    """
    if not stage:
        raise ValueError("expected a stage name, found an empty string: name the stage that draws")
    digest = hashlib.sha256(f"{run_seed}\x1f{stage}\x1f{row_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derive_numpy(run_seed: int, stage: str, row_key: str) -> np.random.Generator:
    """Return a numpy generator (PCG64) seeded by `derive_seed`."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive_seed(run_seed, stage, row_key)))


def derive_torch(run_seed: int, stage: str, row_key: str) -> torch.Generator:
    """Return a CPU torch generator seeded by `derive_seed`; draws are equal on every device."""
    import torch

    return torch.Generator(device="cpu").manual_seed(derive_seed(run_seed, stage, row_key))
