"""Guidance away from concepts, on predictions of the unguided, the prompted and the safety branch (pure).

Axis legend: `batch` pictures, `channel height width` latent axes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Prediction = Float[Tensor, "batch channel height width"]


def safety_scale(
    prompt: Prediction, safety: Prediction, *, scale: float, threshold: float, noise_factor: float = 1.0
) -> Prediction:
    """Return SLD's element-wise scale: `mu = min(1, |phi|)` where `eps_p - eps_S < lambda`, else 0.

    `phi = s_S (eps_p - eps_S)`: the guidance acts only where the prompt's noise comes close to the safety concept's.
    The paper prints `max(1, |phi|)`, which would never be below 1; its authors' code takes the minimum, as here.

    Args:
        prompt: prediction under the prompt.
        safety: prediction under the safety concept.
        scale: s_S, at least 0.
        threshold: lambda.
        noise_factor: what turns differences of predictions into differences of noise: 1 for networks that predict
            noise.

    Source: Schramowski et al. 2022, Safe Latent Diffusion (arXiv 2211.05105), equations 5 and 6.
    """
    difference = noise_factor * (prompt - safety)
    magnitude = (scale * difference).abs().clamp(max=1.0)
    return torch.where(difference < threshold, magnitude, torch.zeros_like(magnitude))


def safety_guidance(
    empty: Prediction,
    prompt: Prediction,
    safety: Prediction,
    *,
    momentum: Prediction,
    scale: float,
    threshold: float,
    momentum_scale: float,
    noise_factor: float = 1.0,
) -> Prediction:
    """Return `gamma = mu (eps_S - eps_0) + s_m nu`, what SLD takes off the guidance: `eps_p - eps_0 - gamma`.

    Source: Schramowski et al. 2022 (arXiv 2211.05105), equations 3, 4 and 7.
    """
    mu = safety_scale(prompt, safety, scale=scale, threshold=threshold, noise_factor=noise_factor)
    return mu * (safety - empty) + momentum_scale * momentum


def next_momentum(momentum: Prediction, gamma: Prediction, *, beta: float) -> Prediction:
    """Return `nu <- beta nu + (1 - beta) gamma`; it starts at 0 and grows during the warm-up too.

    Source: Schramowski et al. 2022 (arXiv 2211.05105), equation 8.
    """
    return beta * momentum + (1.0 - beta) * gamma


def erasing_target(empty: Prediction, prompt: Prediction, *, negative_guidance: float) -> Prediction:
    """Return what ESD trains the prompted prediction towards: `eps_0 - eta (eps_p - eps_0)`, of the frozen base.

    The weights of the two sum to 1, so that it holds for predictions of noise, v and velocity alike.

    Source: Gandikota et al. 2023, Erasing Concepts from Diffusion Models (arXiv 2303.07345), equation 7.
    """
    return empty - negative_guidance * (prompt - empty)
