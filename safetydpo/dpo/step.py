"""One training step's loss: a policy pass with the adapter on, a reference pass with the adapter off.

The reference is the same network in the same compute type on the same batch, so at step 0 (B = 0) both
passes give equal bits, and no second network is held in memory.

Axis legend: `pair` preference rows, `benign` retention pictures.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.config.schema import DpoConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.batch import StepBatch
from safetydpo.dpo.loss import preference_loss, redirection_loss, retention_loss, squared_error

METRICS = (
    "loss",
    "preference_loss",
    "safe_rise",
    "retention",
    "implicit_accuracy",
    "margin",
    "error_policy_safe",
    "error_policy_unsafe",
    "error_reference_safe",
    "error_reference_unsafe",
    "redirection",
)
"""Names of the numbers that `policy_loss` returns, in order; all are means over rows."""


def policy_loss(
    backbone: Backbone, batch: StepBatch, *, config: DpoConfig
) -> tuple[Float[Tensor, ""], Float[Tensor, " metric"]]:
    """Return the loss of one batch and the numbers named by `METRICS`.

    `loss = preference + safe_rise_weight * safe_rise + safe_likelihood_weight * safe_likelihood
    + redirection_weight * redirection + retention_weight * retention`. Safe, unsafe and benign
    pictures go through the network in one batch.
    """
    pairs = batch.num_pairs
    latents = torch.cat([batch.latents_safe, batch.latents_unsafe, batch.retention_latents])
    noise = torch.cat([batch.noise, batch.noise, batch.retention_noise])
    timesteps = torch.cat([batch.timesteps, batch.timesteps, batch.retention_timesteps])
    condition = batch.condition.followed_by(batch.condition).followed_by(batch.retention_condition)
    noisy = backbone.add_noise(latents, noise, timesteps)
    with torch.no_grad(), backbone.adapter_off():
        reference = backbone.predict(noisy, timesteps, condition)
    policy = backbone.predict(noisy, timesteps, condition)
    target = backbone.target(latents[: 2 * pairs], noise[: 2 * pairs], timesteps[: 2 * pairs])
    # The weight of a pair's timestep is the same for all four of its errors, so equal errors still cancel exactly.
    weights = backbone.velocity_weights(timesteps) if config.error_weighting == "velocity" else None
    pair_weights = None if weights is None else weights[: 2 * pairs]
    policy_safe, policy_unsafe = squared_error(policy[: 2 * pairs], target, weights=pair_weights).split(pairs)
    reference_safe, reference_unsafe = squared_error(reference[: 2 * pairs], target, weights=pair_weights).split(pairs)
    preference = preference_loss(
        policy_safe,
        policy_unsafe,
        error_reference_safe=reference_safe,
        error_reference_unsafe=reference_unsafe,
        beta=config.beta,
        safe_rise_weight=config.safe_rise_weight,
        safe_likelihood_weight=config.safe_likelihood_weight,
    )
    loss = preference.loss
    retention = torch.zeros_like(preference.preference)
    if batch.retention_latents.shape[0]:
        benign_weights = None if weights is None else weights[2 * pairs :]
        retention = retention_loss(policy[2 * pairs :], reference[2 * pairs :], weights=benign_weights)
        loss = loss + config.retention_weight * retention
    redirection = torch.zeros_like(preference.preference)
    if config.redirection_weight > 0:
        redirection = _redirection(backbone, batch, noisy, policy, beta=config.beta, weights=weights)
        loss = loss + config.redirection_weight * redirection
    metrics = (
        loss,
        preference.preference,
        preference.safe_rise,
        retention,
        preference.implicit_accuracy,
        preference.margin,
        policy_safe.mean(),
        policy_unsafe.mean(),
        reference_safe.mean(),
        reference_unsafe.mean(),
        redirection,
    )
    return loss, torch.stack([metric.detach() for metric in metrics])


def _redirection(
    backbone: Backbone,
    batch: StepBatch,
    noisy: Float[Tensor, "batch channel height width"],
    policy: Float[Tensor, "batch channel height width"],
    *,
    beta: float,
    weights: Float[Tensor, " batch"] | None,
) -> Float[Tensor, ""]:
    """Return the redirection loss; `noisy`, `policy` and `weights` hold safe, unsafe and benign pictures in turn."""
    unsafe = slice(batch.num_pairs, 2 * batch.num_pairs)
    with torch.no_grad(), backbone.adapter_off():
        wanted = backbone.predict(noisy[unsafe], batch.timesteps, batch.safe_condition)
    return redirection_loss(policy[unsafe], wanted, beta=beta, weights=None if weights is None else weights[unsafe])
