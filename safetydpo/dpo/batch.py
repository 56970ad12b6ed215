"""The preferences of one expert in memory, and the batch of one optimizer step.

Latents are made once per picture and text features once per distinct caption; a step only gathers rows.

Axis legend: `pair` preference rows, `benign` retention pictures, `caption` distinct captions, `batch` rows of
a step, `draw` draws of a pair, `side` safe and unsafe, `token width_text width_pooled` text axes,
`channel height width` latent axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from safetydpo.artifacts.schemas import caption_sha256, flipped_image_id, sha256_of
from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Condition
from safetydpo.dpo.arrays import check_latents, gather_arrays
from safetydpo.dpo.draws import RowDraw, RowUse, Side, draw_row, pair_order, retention_order
from safetydpo.dpo.pair_draws import draw_pairs, side_of
from safetydpo.dpo.variants import NO_VARIANTS, Variants, gather_latents
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
    variants_safe: Variants = NO_VARIANTS
    variants_unsafe: Variants = NO_VARIANTS
    reference_errors: Float[Tensor, "pair draw side"] | None = None
    """Stored errors of the reference, unweighted; NaN = of no draw of this training. None = computed in each step."""

    def __post_init__(self) -> None:
        check_latents(self.pair_ids, self.latents_safe, "safe latent of pair")
        check_latents(self.pair_ids, self.latents_unsafe, "unsafe latent of pair")
        check_latents(self.retention_ids, self.retention_latents, "latent of benign picture")
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
        deviations: Mapping[str, NDArray[np.floating]] | None = None,
        with_flipped: bool = False,
    ) -> PreferenceData:
        """Gather the rows of one expert from latents by image id and text features by caption sha256.

        `latent_shape` is the backbone's for the picture size of the run. The order of `rows` does not matter.
        `deviations` has the ids of `latents`; mirrored pictures stand in both under their own (`flipped_image_id`).

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
        condition = _gather_captions(captions, embeddings, pooled)

        def stack(ids: list[str]) -> Tensor:
            return gather_arrays(ids, latents, "latent of picture", shape=latent_shape)

        def variants(ids: list[str]) -> Variants:
            return _gather_variants(ids, latents, deviations, latent_shape, with_flipped)

        def index(shas: list[str]) -> Tensor:
            return torch.tensor([place[sha] for sha in shas], dtype=torch.long)

        safe_ids, unsafe_ids = [row.safe_image_id for row in ordered], [row.unsafe_image_id for row in ordered]
        return cls(
            pair_ids=tuple(row.pair_id for row in ordered),
            latents_safe=stack(safe_ids),
            latents_unsafe=stack(unsafe_ids),
            captions_safe=index([row.safe_caption_sha256 for row in ordered]),
            captions_unsafe=index([row.unsafe_caption_sha256 for row in ordered]),
            retention_ids=tuple(row.image_id for row in benign),
            retention_latents=stack([row.image_id for row in benign]),
            retention_captions=index([row.caption_sha256 for row in benign]),
            condition=condition,
            empty_caption=place[EMPTY_CAPTION],
            fingerprint=sha256_of([[vars(row) for row in ordered], [vars(row) for row in benign]]),
            variants_safe=variants(safe_ids),
            variants_unsafe=variants(unsafe_ids),
        )


def _gather_captions(
    captions: list[str],
    embeddings: Mapping[str, NDArray[np.floating]],
    pooled: Mapping[str, NDArray[np.floating]] | None,
) -> Condition:
    tokens = gather_arrays(captions, embeddings, "text features of caption")
    return Condition(tokens, None if pooled is None else gather_arrays(captions, pooled, "pooled features of caption"))


def _gather_variants(
    ids: list[str],
    latents: Mapping[str, NDArray[np.floating]],
    deviations: Mapping[str, NDArray[np.floating]] | None,
    shape: tuple[int, int, int],
    with_flipped: bool,
) -> Variants:
    def spread(of: list[str]) -> Tensor | None:
        what = "deviation of the latent of picture"
        return None if deviations is None else gather_arrays(of, deviations, what, shape=shape)

    if not with_flipped:
        return Variants(deviations=spread(ids))
    mirrored = [flipped_image_id(image_id) for image_id in ids]
    flipped = gather_arrays(mirrored, latents, "latent of mirrored picture", shape=shape)
    return Variants(flipped, spread(ids), spread(mirrored))


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
    reference_errors: Float[Tensor, "batch side"] | None = None
    """Stored errors of the reference, unweighted, first on the safe picture; None = to be computed."""

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
    draw_seed = config.draw_seed_of(run_seed)
    pairs = pair_order(draw_seed, expert, num_pairs=data.num_pairs, step=step, pairs_per_step=config.pairs_per_step)
    benign: tuple[RowUse, ...] = ()
    if num_benign:
        benign = retention_order(
            draw_seed, expert, num_pictures=len(data.retention_ids), step=step, pictures_per_step=num_benign
        )[rank::world_size]
    benign_draws = [
        draw_row(
            draw_seed,
            data.retention_ids[use.index],
            draw_index=use.draw_index,
            empty_caption_rate=config.retention_empty_caption_rate,
            num_timesteps=num_timesteps,
            latent_shape=data.latent_shape,
            timestep_range=config.timestep_range,
        )
        for use in benign
    ]
    return _gather_step(
        data,
        _draw_pairs(data, pairs[rank::world_size], config=config, draw_seed=draw_seed, num_timesteps=num_timesteps),
        list(zip(benign, benign_draws, strict=True)),
        config=config,
        device=device,
    )


def pair_batch(
    data: PreferenceData,
    uses: Sequence[RowUse],
    *,
    config: DpoConfig,
    draw_seed: int,
    num_timesteps: int,
    device: torch.device | str = "cpu",
) -> StepBatch:
    """Return the batch of these uses of pairs, whatever step they belong to, without benign pictures.

    Raises:
        SafetyDPOError: if latents or errors that the settings ask for were not stored.
    """
    pairs = _draw_pairs(data, uses, config=config, draw_seed=draw_seed, num_timesteps=num_timesteps)
    return _gather_step(data, pairs, [], config=config, device=device)


def _draw_pairs(data: PreferenceData, uses: Sequence[RowUse], **how: Any) -> list[tuple[RowUse, RowDraw]]:
    return draw_pairs(data.pair_ids, uses, latent_shape=data.latent_shape, **how)


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
    is_cached = config.reference == "cached"
    pair_rows = torch.tensor([use.index for use, _ in pairs], dtype=torch.long)
    benign_rows = torch.tensor([use.index for use, _ in benign], dtype=torch.long)
    sides = [side_of(config, draw) for _, draw in pairs]
    pair_captions = [_pair_caption(data, use, side) for (use, _), side in zip(pairs, sides, strict=True)]
    is_unsafe = [side == "unsafe" for side in sides]
    benign_captions = [
        data.empty_caption if draw.is_empty else int(data.retention_captions[use.index]) for use, draw in benign
    ]
    safe, unsafe = _pair_latents(data, pair_rows, [draw for _, draw in pairs])
    return StepBatch(
        latents_safe=safe.to(device),
        latents_unsafe=unsafe.to(device),
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
        reference_errors=_stored_errors(data, [use for use, _ in pairs], device) if is_cached else None,
    )


def _pair_latents(data: PreferenceData, rows: Tensor, draws: Sequence[RowDraw]) -> list[Tensor]:
    is_flipped = torch.tensor([draw.is_flipped for draw in draws], dtype=torch.bool)
    noises = [draw.posterior_noise for draw in draws if draw.posterior_noise is not None]
    noise = torch.stack(noises, dim=1) if noises else (None, None)
    return [
        gather_latents(means, variants, rows, is_flipped=is_flipped, noise=noise[side])
        for side, (means, variants) in enumerate(
            ((data.latents_safe, data.variants_safe), (data.latents_unsafe, data.variants_unsafe))
        )
    ]


def _stored_errors(data: PreferenceData, uses: Sequence[RowUse], device: torch.device | str) -> Tensor:
    stored = torch.empty((data.num_pairs, 0, 2)) if data.reference_errors is None else data.reference_errors
    missing = [use for use in uses if use.draw_index >= stored.shape[1]]
    if not missing:
        errors = stored[[use.index for use in uses], [use.draw_index for use in uses]]
        missing = [
            use for use, is_there in zip(uses, errors.isfinite().all(dim=1).tolist(), strict=True) if not is_there
        ]
    if missing:
        raise SafetyDPOError(
            f"expected stored reference errors of pair {data.pair_ids[missing[0].index]!r}, draw "
            f"{missing[0].draw_index}, because dpo.reference is 'cached', found none: run the training command, which "
            "computes them first"
        )
    return errors.to(device)


def _pair_caption(data: PreferenceData, use: RowUse, side: Side | None) -> int:
    if side is None:
        return data.empty_caption
    return int((data.captions_unsafe if side == "unsafe" else data.captions_safe)[use.index])


def _noise(data: PreferenceData, rows: Sequence[tuple[RowUse, RowDraw]]) -> Tensor:
    return torch.stack([draw.noise for _, draw in rows]) if rows else torch.empty((0, *data.latent_shape))


def _timesteps(rows: Sequence[tuple[RowUse, RowDraw]]) -> Tensor:
    return torch.tensor([draw.timestep for _, draw in rows], dtype=torch.long)


def _select(condition: Condition, rows: Sequence[int], device: torch.device | str) -> Condition:
    chosen = condition.select(torch.tensor(rows, dtype=torch.long))
    return chosen.map(lambda features: features.float().to(device))
