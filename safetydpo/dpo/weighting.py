"""Weights of squared errors by timestep, as the settings of a training name them."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.config.training import TrainingConfig
from safetydpo.diffusion.backbone import Backbone


def error_weights(
    backbone: Backbone, timesteps: Int[Tensor, " batch"], *, config: TrainingConfig
) -> Float[Tensor, " batch"] | None:
    """Return the factor of each picture's squared error; None = all 1."""
    if config.error_weighting == "velocity":
        return backbone.velocity_weights(timesteps)
    if config.error_weighting == "min_snr":
        return backbone.min_snr_weights(timesteps, gamma=config.min_snr_gamma)
    return None
