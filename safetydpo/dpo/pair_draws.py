"""What the settings of a training make of the draws of pairs: the one place where a setting becomes a draw.

A training step, and what is computed for it beforehand, both draw here, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetydpo.config.training import DpoConfig
from safetydpo.dpo.draws import RowChoices, RowDraw, RowUse, Side, caption_side, draw_choices, draw_row


def draw_pairs(
    pair_ids: Sequence[str],
    uses: Sequence[RowUse],
    *,
    config: DpoConfig,
    draw_seed: int,
    num_timesteps: int,
    latent_shape: tuple[int, int, int],
) -> list[tuple[RowUse, RowDraw]]:
    """Return the draw of each use of a pair, beside the use itself with the index of the draw that it gets."""
    found = []
    for use in uses:
        draw_index = use.draw_index if config.draws_per_pair is None else use.draw_index % config.draws_per_pair
        draw = draw_row(
            draw_seed,
            pair_ids[use.index],
            draw_index=draw_index,
            num_timesteps=num_timesteps,
            latent_shape=latent_shape,
            is_sampled=config.latent_sampling == "sample",
            **_choice_settings(config),
        )
        found.append((RowUse(use.index, draw_index), draw))
    return found


def pair_choices(
    config: DpoConfig, pair_id: str, draw_index: int, *, draw_seed: int, num_timesteps: int
) -> tuple[RowChoices, Side | None]:
    """Return what is decided for one draw of a pair, without its noise, and whose caption it has (see `side_of`)."""
    choices = draw_choices(
        draw_seed, pair_id, draw_index=draw_index, num_timesteps=num_timesteps, **_choice_settings(config)
    )
    return choices, side_of(config, choices)


def side_of(config: DpoConfig, choices: RowChoices) -> Side | None:
    """Return whose caption a row uses; None = the empty one."""
    return None if choices.is_empty else caption_side(config.captions, choices.caption_coin)


def _choice_settings(config: DpoConfig) -> dict[str, Any]:
    return {
        "empty_caption_rate": config.empty_caption_rate,
        "flip_rate": config.flip_rate,
        "timestep_range": config.timestep_range,
    }
