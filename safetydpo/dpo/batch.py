"""The preferences of one expert in memory, and the batch of one optimizer step.

Latents are made once per picture and text features once per distinct caption; a step only gathers rows.

Axis legend: `pair` preference rows, `benign` retention pictures, `caption` distinct captions, `batch` rows of
a step, `token width_text width_pooled` text axes, `channel height width` latent axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from safetydpo.artifacts.schemas import caption_sha256, sha256_of
from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Condition
from safetydpo.dpo.draws import RowDraw, RowUse, Side, caption_side, draw_row, pair_order, retention_order
from safetydpo.errors import SafetyDPOError, UsageError

EMPTY_CAPTION = caption_sha256("")


@dataclass(frozen=True)
class PreferenceRow:
    """One preference: the safe picture of a pair is preferred to the unsafe one."""

    pair_id: str
    safe_image_id: str
    unsafe_image_id: str
    safe_caption_sha256: str
    unsafe_caption_sha256: str


@dataclass(frozen=True)
class RetentionRow:
    """One benign picture whose prediction should not change."""

    image_id: str
    caption_sha256: str


@dataclass(frozen=True)
class PreferenceData:
    """All preferences of one expert, ordered by pair id; checked when made."""

    pair_ids: tuple[str, ...]
    latents_safe: Float[Tensor, "pair channel height width"]
    latents_unsafe: Float[Tensor, "pair channel height width"]
    captions_safe: Int[Tensor, " pair"]
    captions_unsafe: Int[Tensor, " pair"]
    retention_ids: tuple[str, ...]
    retention_latents: Float[Tensor, "benign channel height width"]
    retention_captions: Int[Tensor, " benign"]
    condition: Condition
    """Features of the distinct captions; the index tensors above point into its rows."""
    empty_caption: int
    """Row of the empty caption in `condition`."""
    fingerprint: str
    """sha256 over the sorted ids of pairs, pictures and captions."""

    def __post_init__(self) -> None:
        _check_latents(self.pair_ids, self.latents_safe, "safe latent of pair")
        _check_latents(self.pair_ids, self.latents_unsafe, "unsafe latent of pair")
        _check_latents(self.retention_ids, self.retention_latents, "latent of benign picture")
        for ids, what in ((self.pair_ids, "pair_id"), (self.retention_ids, "retention image_id")):
            if len(set(ids)) != len(ids):
                twice = next(one for one in ids if ids.count(one) > 1)
                raise SafetyDPOError(f"expected each {what} once, found {twice!r} again: select preferences anew")
        num_captions = self.condition.tokens.shape[0]
        for index in (self.captions_safe, self.captions_unsafe, self.retention_captions):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_captions:
                raise SafetyDPOError(
                    f"expected caption rows below {num_captions}, found {int(index.min())} .. {int(index.max())}: "
                    "encode the captions anew"
                )

    @property
    def num_pairs(self) -> int:
        """Number of preferences."""
        return len(self.pair_ids)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.latents_safe.shape[1:]
        return channels, height, width

    @classmethod
    def from_tables(
        cls,
        rows: Sequence[PreferenceRow],
        *,
        latents: Mapping[str, NDArray[np.floating]],
        embeddings: Mapping[str, NDArray[np.floating]],
        latent_shape: tuple[int, int, int],
        retention: Sequence[RetentionRow] = (),
        pooled: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> PreferenceData:
        """Gather the rows of one expert from latents by image id and text features by caption sha256.

        `latent_shape` is the backbone's for the picture size of the run. The order of `rows` does not matter.

        Raises:
            SafetyDPOError: if there is no row, or a latent or embedding is missing, of another shape or not finite.
        """
        if not rows:
            raise SafetyDPOError(
                "expected at least 1 preference, found 0: lower pairs.unsafe_score_min or render more pairs"
            )
        ordered = sorted(rows, key=lambda row: row.pair_id)
        benign = sorted(retention, key=lambda row: row.image_id)
        captions = sorted(
            {EMPTY_CAPTION}
            | {sha for row in ordered for sha in (row.safe_caption_sha256, row.unsafe_caption_sha256)}
            | {row.caption_sha256 for row in benign}
        )
        place = {sha: index for index, sha in enumerate(captions)}
        tokens = gather_arrays(captions, embeddings, "text features of caption")
        condition = Condition(
            tokens, None if pooled is None else gather_arrays(captions, pooled, "pooled features of caption")
        )

        def stack(ids: list[str]) -> Tensor:
            return gather_arrays(ids, latents, "latent of picture", shape=latent_shape)

        def index(shas: list[str]) -> Tensor:
            return torch.tensor([place[sha] for sha in shas], dtype=torch.long)

        return cls(
            pair_ids=tuple(row.pair_id for row in ordered),
            latents_safe=stack([row.safe_image_id for row in ordered]),
            latents_unsafe=stack([row.unsafe_image_id for row in ordered]),
            captions_safe=index([row.safe_caption_sha256 for row in ordered]),
            captions_unsafe=index([row.unsafe_caption_sha256 for row in ordered]),
            retention_ids=tuple(row.image_id for row in benign),
            retention_latents=stack([row.image_id for row in benign]),
            retention_captions=index([row.caption_sha256 for row in benign]),
            condition=condition,
            empty_caption=place[EMPTY_CAPTION],
            fingerprint=sha256_of([[vars(row) for row in ordered], [vars(row) for row in benign]]),
        )


@dataclass(frozen=True)
class StepBatch:
    """The rows of one step on one process: both pictures of a pair share noise, timestep and caption."""

    latents_safe: Float[Tensor, "batch channel height width"]
    latents_unsafe: Float[Tensor, "batch channel height width"]
    noise: Float[Tensor, "batch channel height width"]
    timesteps: Int[Tensor, " batch"]
    condition: Condition
    safe_condition: Condition
    """Safe captions of the same pairs."""
    is_unsafe_caption: Float[Tensor, " batch"]
    """1 where `condition` holds the pair's unsafe caption, 0 where it holds the safe or the empty one."""
    retention_latents: Float[Tensor, "benign channel height width"]
    retention_noise: Float[Tensor, "benign channel height width"]
    retention_timesteps: Int[Tensor, " benign"]
    retention_condition: Condition
    empty_condition: Condition
    """The empty caption, one row."""

    @property
    def num_pairs(self) -> int:
        """Pairs in this batch."""
        return self.latents_safe.shape[0]


def step_batch(
    data: PreferenceData,
    step: int,
    *,
    config: DpoConfig,
    run_seed: int,
    expert: str,
    num_timesteps: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> StepBatch:
    """Return the batch of optimizer step `step` (from 0) for process `rank` of `world_size`.

    Raises:
        UsageError: if the rows of a step cannot be split evenly, because then the mean over processes
            would no longer be the mean over rows; or if the timestep range leaves the schedule.
        SafetyDPOError: if the retention term is on and there is no benign picture.
    """
    num_benign = _check_counts(data, config, world_size)
    _check_timesteps(config, num_timesteps)
    pairs = pair_order(run_seed, expert, num_pairs=data.num_pairs, step=step, pairs_per_step=config.pairs_per_step)[
        rank::world_size
    ]
    benign: tuple[RowUse, ...] = ()
    if num_benign:
        benign = retention_order(
            run_seed, expert, num_pictures=len(data.retention_ids), step=step, pictures_per_step=num_benign
        )[rank::world_size]

    def draw(ids: tuple[str, ...], uses: Sequence[RowUse], empty_caption_rate: float) -> list[RowDraw]:
        return [
            draw_row(
                run_seed,
                ids[use.index],
                draw_index=use.draw_index,
                empty_caption_rate=empty_caption_rate,
                num_timesteps=num_timesteps,
                latent_shape=data.latent_shape,
                timestep_range=config.timestep_range,
            )
            for use in uses
        ]

    return _gather_step(
        data,
        list(zip(pairs, draw(data.pair_ids, pairs, config.empty_caption_rate), strict=True)),
        list(zip(benign, draw(data.retention_ids, benign, config.retention_empty_caption_rate), strict=True)),
        config=config,
        device=device,
    )


def _check_counts(data: PreferenceData, config: DpoConfig, world_size: int) -> int:
    num_benign = config.retention_per_step if config.retention_weight > 0 else 0
    for field, count in (("pairs_per_step", config.pairs_per_step), ("retention_per_step", num_benign)):
        if count % world_size:
            raise UsageError(
                f"expected dpo.{field} to be a multiple of the {world_size} processes of an expert, found {count}"
            )
    if num_benign and not data.retention_ids:
        raise SafetyDPOError(
            f"expected benign pictures because dpo.retention_weight is {config.retention_weight}, found 0: "
            "set prompts.retention_prompts above 0 or dpo.retention_weight to 0"
        )
    return num_benign


def _check_timesteps(config: DpoConfig, num_timesteps: int) -> None:
    if config.timestep_range is not None and config.timestep_range[1] >= num_timesteps:
        raise UsageError(
            f"expected dpo.timestep_range within the base's timesteps 0 to {num_timesteps - 1}, found "
            f"{list(config.timestep_range)}: lower its last timestep"
        )


def _gather_step(
    data: PreferenceData,
    pairs: Sequence[tuple[RowUse, RowDraw]],
    benign: Sequence[tuple[RowUse, RowDraw]],
    *,
    config: DpoConfig,
    device: torch.device | str,
) -> StepBatch:
    pair_rows = torch.tensor([use.index for use, _ in pairs], dtype=torch.long)
    benign_rows = torch.tensor([use.index for use, _ in benign], dtype=torch.long)
    sides = [caption_side(config.captions, draw.caption_coin) for _, draw in pairs]
    pair_captions = [_pair_caption(data, use, draw, side) for (use, draw), side in zip(pairs, sides, strict=True)]
    is_unsafe = [side == "unsafe" and not draw.is_empty for (_, draw), side in zip(pairs, sides, strict=True)]
    benign_captions = [
        data.empty_caption if draw.is_empty else int(data.retention_captions[use.index]) for use, draw in benign
    ]
    return StepBatch(
        latents_safe=data.latents_safe[pair_rows].float().to(device),
        latents_unsafe=data.latents_unsafe[pair_rows].float().to(device),
        noise=_noise(data, pairs).to(device),
        timesteps=_timesteps(pairs).to(device),
        condition=_select(data.condition, pair_captions, device),
        safe_condition=_select(data.condition, [int(data.captions_safe[use.index]) for use, _ in pairs], device),
        is_unsafe_caption=torch.tensor(is_unsafe, dtype=torch.float32).to(device),
        retention_latents=data.retention_latents[benign_rows].float().to(device),
        retention_noise=_noise(data, benign).to(device),
        retention_timesteps=_timesteps(benign).to(device),
        retention_condition=_select(data.condition, benign_captions, device),
        empty_condition=_select(data.condition, [data.empty_caption], device),
    )


def _pair_caption(data: PreferenceData, use: RowUse, draw: RowDraw, side: Side) -> int:
    if draw.is_empty:
        return data.empty_caption
    return int((data.captions_unsafe if side == "unsafe" else data.captions_safe)[use.index])


def _noise(data: PreferenceData, rows: Sequence[tuple[RowUse, RowDraw]]) -> Tensor:
    return torch.stack([draw.noise for _, draw in rows]) if rows else torch.empty((0, *data.latent_shape))


def _timesteps(rows: Sequence[tuple[RowUse, RowDraw]]) -> Tensor:
    return torch.tensor([draw.timestep for _, draw in rows], dtype=torch.long)


def _select(condition: Condition, rows: Sequence[int], device: torch.device | str) -> Condition:
    chosen = condition.select(torch.tensor(rows, dtype=torch.long))
    return chosen.map(lambda features: features.float().to(device))


def _check_latents(ids: Sequence[str], latents: Tensor, what: str) -> None:
    if latents.shape[0] != len(ids):
        raise SafetyDPOError(f"expected one {what} each, found {latents.shape[0]} for {len(ids)}: encode them anew")
    finite = latents.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = ids[int((~finite).nonzero()[0])]
        raise SafetyDPOError(
            f"expected finite numbers, found NaN or infinity in the {what} {bad!r}: encode that picture anew "
            "(float16 encoders overflow on some pictures; use base.dtype float32 or bfloat16)"
        )


def gather_arrays(
    keys: Sequence[str],
    table: Mapping[str, NDArray[np.floating]],
    what: str,
    *,
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Return the arrays of `keys` stacked in that order; all must have the shape of the first, or `shape`.

    Raises:
        SafetyDPOError: if one is missing, of another shape or not finite; `what` names it.
    """
    if not keys:
        return torch.empty((0, *(shape or ())))
    arrays = []
    for key in keys:
        if key not in table:
            raise SafetyDPOError(f"expected the {what} {key!r}, found none: run the encoding step again")
        array = table[key]
        shape = array.shape if shape is None else shape
        if tuple(array.shape) != tuple(shape):
            raise SafetyDPOError(
                f"expected shape {tuple(shape)} for the {what} {key!r}, found {tuple(array.shape)}: "
                "encode it with this run's base model and picture size"
            )
        if not np.isfinite(array).all():
            raise SafetyDPOError(
                f"expected finite numbers, found NaN or infinity in the {what} {key!r}: encode it anew"
            )
        arrays.append(array)
    return torch.from_numpy(np.stack(arrays))
