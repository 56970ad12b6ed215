"""What the latents of a picture are when it is seen mirrored, or drawn from the autoencoder's posterior.

Axis legend: `pair` preference rows, `batch` rows of a step, `channel height width` latent axes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxtyping import Bool, Float, Int
from torch import Tensor

from safetydpo.errors import SafetyDPOError


@dataclass(frozen=True)
class Variants:
    """What is stored beside the latents of one side of all pairs; None = was not asked for."""

    flipped: Float[Tensor, "pair channel height width"] | None = None
    """Latents of the mirrored pictures."""
    deviations: Float[Tensor, "pair channel height width"] | None = None
    """Standard deviation of the posterior."""
    flipped_deviations: Float[Tensor, "pair channel height width"] | None = None
    """That of the mirrored pictures."""

    def rows(self, index: list[int]) -> Variants:
        """Return what is stored of these pairs."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Variants(**{name: None if value is None else value[index] for name, value in values})


NO_VARIANTS = Variants()


def gather_latents(
    means: Float[Tensor, "pair channel height width"],
    variants: Variants,
    rows: Int[Tensor, " batch"],
    *,
    is_flipped: Bool[Tensor, " batch"],
    noise: Float[Tensor, "batch channel height width"] | None = None,
) -> Float[Tensor, "batch channel height width"]:
    """Return the float32 latents of `rows` as they are seen: mirrored or not, `mean + deviation * noise` or the mean.

    Raises:
        SafetyDPOError: if what is needed for it was not stored.
    """
    latents = _choose(means, variants.flipped, rows, is_flipped)
    if noise is None:
        return latents
    if variants.deviations is None:
        raise SafetyDPOError(
            "expected deviations of latents because dpo.latent_sampling is 'sample', found means only: set "
            "pairs.latents to mean_and_deviation and make the pairs again"
        )
    return latents + noise * _choose(variants.deviations, variants.flipped_deviations, rows, is_flipped)


def _choose(
    plain: Float[Tensor, "pair channel height width"],
    flipped: Float[Tensor, "pair channel height width"] | None,
    rows: Int[Tensor, " batch"],
    is_flipped: Bool[Tensor, " batch"],
) -> Float[Tensor, "batch channel height width"]:
    chosen = plain[rows].float()
    if not bool(is_flipped.any()):
        return chosen
    if flipped is None:
        raise SafetyDPOError(
            "expected latents of mirrored pictures because dpo.flip_rate is above 0, found none: set "
            "pairs.flipped_latents to true and make the pairs again"
        )
    chosen[is_flipped] = flipped[rows[is_flipped]].float()
    return chosen
