"""Which rows a step uses and what is drawn for each: pure functions of seeds and row keys.

Nothing here has a state: the rows and draws of any step follow from its number, so a resumed run needs no
generator, and the number of processes cannot matter (rank r of w takes the rows r, r + w, r + 2w, ...).

Axis legend: `channel height width` latent axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.seeding import derive_numpy, derive_torch

Side = Literal["unsafe", "safe"]
CaptionRule = Literal["unsafe", "safe", "both"]


@dataclass(frozen=True)
class RowUse:
    """The use of one row in a step."""

    index: int
    """Position of the row in the table."""
    draw_index: int
    """How often the row was used before (the epoch), so that each use has its own draw."""


@dataclass(frozen=True)
class RowDraw:
    """Everything random about one use of one row; both pictures of a pair share it."""

    timestep: int
    """Uniform over the training's timesteps: 0 .. num_timesteps - 1, or its range."""
    caption_coin: float
    """Uniform in [0, 1): decides whose caption is used, see `caption_side`."""
    is_empty: bool
    """Whether the caption is replaced by the empty one, to train the unconditional branch too."""
    noise: Float[Tensor, "channel height width"]
    """Standard normal, float32, on the CPU."""


def pair_order(run_seed: int, expert: str, *, num_pairs: int, step: int, pairs_per_step: int) -> tuple[RowUse, ...]:
    """Return the preference rows of optimizer step `step` (from 0) over all processes.

    Epochs are seeded shuffles laid end to end: row number `step * pairs_per_step + j` of that line, so every
    pair is used `n` times before any is used `n + 2` times.

    Raises:
        ValueError: if there is nothing to draw from or nothing is asked for.
    """
    return row_order(run_seed, "dpo_pair_order", expert, num_rows=num_pairs, step=step, rows_per_step=pairs_per_step)


def retention_order(
    run_seed: int, expert: str, *, num_pictures: int, step: int, pictures_per_step: int
) -> tuple[RowUse, ...]:
    """Return the benign pictures of optimizer step `step` over all processes, by the rule of `pair_order`.

    Raises:
        ValueError: if there is nothing to draw from or nothing is asked for.
    """
    return row_order(
        run_seed, "dpo_retention_order", expert, num_rows=num_pictures, step=step, rows_per_step=pictures_per_step
    )


def row_order(
    run_seed: int, stage: str, owner: str, *, num_rows: int, step: int, rows_per_step: int
) -> tuple[RowUse, ...]:
    """Return the rows of optimizer step `step` over all processes: the rule of `pair_order` for rows of any kind.

    Raises:
        ValueError: if there is nothing to draw from or nothing is asked for.
    """
    if num_rows < 1 or rows_per_step < 1 or step < 0:
        raise ValueError(
            f"expected at least 1 row, 1 row per step and step >= 0, found {num_rows}, {rows_per_step} and {step}"
        )
    first = step * rows_per_step
    last = first + rows_per_step - 1
    shuffles = {
        epoch: derive_numpy(run_seed, stage, f"{owner}\x1f{epoch}").permutation(num_rows)
        for epoch in range(first // num_rows, last // num_rows + 1)
    }
    places = (divmod(position, num_rows) for position in range(first, last + 1))
    return tuple(RowUse(int(shuffles[epoch][offset]), epoch) for epoch, offset in places)


def draw_row(
    draw_seed: int,
    row_key: str,
    *,
    draw_index: int,
    empty_caption_rate: float,
    num_timesteps: int,
    latent_shape: tuple[int, int, int],
    timestep_range: tuple[int, int] | None = None,
) -> RowDraw:
    """Return what is drawn for one use of one row, from `(draw_seed, row_key, draw_index)` alone.

    Timesteps lie in `timestep_range`, both ends inclusive; None = 0 .. num_timesteps - 1.

    The expert is not part of the key: a pair that belongs to two experts gets the same draws in both, which
    makes experts comparable. The noise is drawn last, so that the other draws do not depend on the latent size.
    """
    generator = derive_torch(draw_seed, "dpo_draw", f"{row_key}\x1f{draw_index}")
    low, high = (0, num_timesteps - 1) if timestep_range is None else timestep_range
    timestep = int(torch.randint(low, high + 1, (), generator=generator))
    caption_coin, empty_coin = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    noise = torch.randn(latent_shape, generator=generator, dtype=torch.float32)
    return RowDraw(timestep, caption_coin, empty_coin < empty_caption_rate, noise)


def caption_side(rule: CaptionRule, coin: float) -> Side:
    """Return whose caption a preference row uses: `rule` itself, or either side with equal chance for `both`."""
    if rule == "both":
        return "unsafe" if coin < 0.5 else "safe"
    return rule
