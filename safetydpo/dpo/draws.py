"""Which rows a step uses and what is drawn for each: pure functions of seeds and row keys.

Nothing here has a state: the rows and draws of any step follow from its number, so a resumed run needs no
generator, and the number of processes cannot matter (rank r of w takes the rows r, r + w, r + 2w, ...).

Axis legend: `pair` preference rows, `row` rows of any kind, `side` safe and unsafe, `channel height width` latent axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.seeding import derive_numpy, derive_torch

PAIR_STAGE = "dpo_pair_order"
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
class RowChoices:
    """What is decided for one use of one row, without the noise; both pictures of a pair share it."""

    timestep: int
    """Uniform over the training's timesteps: 0 .. num_timesteps - 1, or its range."""
    caption_coin: float
    """Uniform in [0, 1): decides whose caption is used, see `caption_side`."""
    is_empty: bool
    """Whether the caption is replaced by the empty one, to train the unconditional branch too."""
    is_flipped: bool
    """Whether the pictures are seen mirrored, left and right exchanged."""


@dataclass(frozen=True)
class RowDraw(RowChoices):
    """Everything random about one use of one row."""

    noise: Float[Tensor, "channel height width"]
    """Standard normal, float32, on the CPU; the same for both pictures of a pair."""
    posterior_noise: Float[Tensor, "side channel height width"] | None
    """Standard normal, float32: where in its posterior each latent is, first the safe one; None = at the mean."""


def pair_order(run_seed: int, expert: str, *, num_pairs: int, step: int, pairs_per_step: int) -> tuple[RowUse, ...]:
    """Return the preference rows of optimizer step `step` (from 0) over all processes.

    Epochs are seeded shuffles laid end to end: row number `step * pairs_per_step + j` of that line, so every
    pair is used `n` times before any is used `n + 2` times.

    Raises:
        ValueError: if there is nothing to draw from or nothing is asked for.
    """
    return row_order(run_seed, PAIR_STAGE, expert, num_rows=num_pairs, step=step, rows_per_step=pairs_per_step)


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
        epoch: _shuffle(run_seed, stage, owner, epoch, num_rows)
        for epoch in range(first // num_rows, last // num_rows + 1)
    }
    places = (divmod(position, num_rows) for position in range(first, last + 1))
    return tuple(RowUse(int(shuffles[epoch][offset]), epoch) for epoch, offset in places)


def _shuffle(run_seed: int, stage: str, owner: str, epoch: int, num_rows: int) -> Int[np.ndarray, " row"]:
    return derive_numpy(run_seed, stage, f"{owner}\x1f{epoch}").permutation(num_rows)


def num_uses(
    run_seed: int, expert: str, *, num_pairs: int, steps: int, pairs_per_step: int
) -> Int[np.ndarray, " pair"]:
    """Return how often each preference row is used in `steps` optimizer steps by the rule of `pair_order`.

    With T = steps * pairs_per_step rows in all, each of n pairs is used floor(T / n) times, and those among the first
    T mod n of the next shuffle once more. The uses of a pair have the draw indices 0, 1, 2, ...
    """
    whole, rest = divmod(steps * pairs_per_step, num_pairs)
    uses = np.full(num_pairs, whole, dtype=np.int64)
    if rest:
        uses[_shuffle(run_seed, PAIR_STAGE, expert, whole, num_pairs)[:rest]] += 1
    return uses


def draw_choices(
    draw_seed: int,
    row_key: str,
    *,
    draw_index: int,
    empty_caption_rate: float,
    num_timesteps: int,
    flip_rate: float,
    timestep_range: tuple[int, int] | None = None,
) -> RowChoices:
    """Return the part of `draw_row` that costs next to nothing: what is decided, without the noise."""
    generator = _row_generator(draw_seed, row_key, draw_index)
    is_flipped = _is_flipped(draw_seed, row_key, draw_index, flip_rate)
    return RowChoices(*_choose(generator, empty_caption_rate, num_timesteps, timestep_range), is_flipped)


def draw_row(
    draw_seed: int,
    row_key: str,
    *,
    draw_index: int,
    empty_caption_rate: float,
    num_timesteps: int,
    latent_shape: tuple[int, int, int],
    timestep_range: tuple[int, int] | None = None,
    flip_rate: float = 0.0,
    is_sampled: bool = False,
) -> RowDraw:
    """Return what is drawn for one use of one row, from `(draw_seed, row_key, draw_index)` alone.

    Timesteps lie in `timestep_range`, both ends inclusive; None = 0 .. num_timesteps - 1.

    The expert is not part of the key: a pair that belongs to two experts gets the same draws in both, which
    makes experts comparable. The noise is drawn after all choices, so that they do not depend on the latent size; that
    of the posterior (if `is_sampled`) comes last and the flip has a generator of its own, so that neither option
    changes another draw.
    """
    generator = _row_generator(draw_seed, row_key, draw_index)
    choices = _choose(generator, empty_caption_rate, num_timesteps, timestep_range)
    noise = torch.randn(latent_shape, generator=generator, dtype=torch.float32)
    posterior = torch.randn((2, *latent_shape), generator=generator, dtype=torch.float32) if is_sampled else None
    return RowDraw(*choices, _is_flipped(draw_seed, row_key, draw_index, flip_rate), noise, posterior)


def _row_generator(draw_seed: int, row_key: str, draw_index: int) -> torch.Generator:
    return derive_torch(draw_seed, "dpo_draw", f"{row_key}\x1f{draw_index}")


def _choose(
    generator: torch.Generator, empty_caption_rate: float, num_timesteps: int, timestep_range: tuple[int, int] | None
) -> tuple[int, float, bool]:
    low, high = (0, num_timesteps - 1) if timestep_range is None else timestep_range
    timestep = int(torch.randint(low, high + 1, (), generator=generator))
    caption_coin, empty_coin = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return timestep, caption_coin, empty_coin < empty_caption_rate


def _is_flipped(draw_seed: int, row_key: str, draw_index: int, flip_rate: float) -> bool:
    if flip_rate == 0.0:
        return False
    return bool(derive_numpy(draw_seed, "dpo_flip", f"{row_key}\x1f{draw_index}").random() < flip_rate)


def caption_side(rule: CaptionRule, coin: float) -> Side:
    """Return whose caption a preference row uses: `rule` itself, or either side with equal chance for `both`."""
    if rule == "both":
        return "unsafe" if coin < 0.5 else "safe"
    return rule
