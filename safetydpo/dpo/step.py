"""One training step's loss: a policy pass with the adapter on, a reference pass with the adapter off.

The reference is the same network in the same compute type on the same batch, so at step 0 (B = 0) both
passes give equal bits, and no second network is held in memory.

Axis legend: `pair` preference rows, `benign` retention pictures, `two_pairs` their safe and their unsafe pictures.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Backbone, Condition
from safetydpo.dpo.batch import StepBatch
from safetydpo.dpo.loss import preference_loss, redirection_loss, retention_loss, squared_error
from safetydpo.dpo.stored_errors import without_rounding

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
    noisy, timesteps, condition, target = _questions(backbone, batch)
    unsafe = slice(pairs, 2 * pairs)
    with torch.no_grad(), backbone.adapter_off():
        reference = backbone.predict(noisy, timesteps, condition) if batch.reference_errors is None else None
        # In a pass of its own: in a larger batch the reference would lose its equal bits with the policy.
        redirects = config.redirection_weight > 0
        answer = backbone.predict(noisy[unsafe], timesteps[unsafe], batch.safe_condition) if redirects else None
    policy = backbone.predict(noisy, timesteps, condition)
    # The weight of a pair's timestep is the same for all four of its errors, so equal errors still cancel exactly.
    weights = backbone.velocity_weights(timesteps) if config.error_weighting == "velocity" else None
    pair_weights = None if weights is None else weights[: 2 * pairs]
    policy_errors = squared_error(policy[: 2 * pairs], target, weights=pair_weights)
    policy_safe, policy_unsafe = policy_errors.split(pairs)
    errors = _reference_errors(reference, target, batch, policy_errors, pair_weights)
    reference_safe, reference_unsafe = errors.split(pairs)
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
        assert reference is not None  # the settings refuse stored errors beside this term
        benign_weights = None if weights is None else weights[2 * pairs :]
        retention = retention_loss(policy[2 * pairs :], reference[2 * pairs :], weights=benign_weights)
        loss = loss + config.retention_weight * retention
    redirection = torch.zeros_like(preference.preference)
    if answer is not None:
        of_unsafe = batch.is_unsafe_caption if weights is None else batch.is_unsafe_caption * weights[unsafe]
        redirection = redirection_loss(policy[unsafe], answer, beta=config.beta, weights=of_unsafe)
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


def _reference_errors(
    reference: Float[Tensor, "batch channel height width"] | None,
    target: Float[Tensor, "two_pairs channel height width"],
    batch: StepBatch,
    policy_errors: Float[Tensor, " two_pairs"],
    weights: Float[Tensor, " two_pairs"] | None,
) -> Float[Tensor, " two_pairs"]:
    """Return the reference's errors of pairs: those of its prediction, or the stored ones if there is none."""
    if reference is not None:
        return squared_error(reference[: len(target)], target, weights=weights)
    assert batch.reference_errors is not None
    stored = batch.reference_errors.T.flatten()
    return without_rounding(stored if weights is None else stored * weights, policy_errors)


def _questions(
    backbone: Backbone, batch: StepBatch
) -> tuple[
    Float[Tensor, "batch channel height width"],
    Int[Tensor, " batch"],
    Condition,
    Float[Tensor, "two_pairs channel height width"],
]:
    """Return noisy latents, timesteps and condition of safe, unsafe and benign pictures, and the pairs' targets."""
    latents = torch.cat([batch.latents_safe, batch.latents_unsafe])
    noise = torch.cat([batch.noise, batch.noise])
    timesteps = torch.cat([batch.timesteps, batch.timesteps])
    everything = torch.cat([timesteps, batch.retention_timesteps])
    noisy = backbone.add_noise(
        torch.cat([latents, batch.retention_latents]), torch.cat([noise, batch.retention_noise]), everything
    )
    condition = batch.condition.followed_by(batch.condition).followed_by(batch.retention_condition)
    return noisy, everything, condition, backbone.target(latents, noise, timesteps)


def errors_to_store(backbone: Backbone, batch: StepBatch) -> Float[Tensor, "batch side"]:
    """Return the base's unweighted errors on the safe and the unsafe picture of each pair: what may be stored."""
    noisy, timesteps, condition, target = _questions(backbone, batch)
    with torch.no_grad(), backbone.adapter_off():
        prediction = backbone.predict(noisy, timesteps, condition)
    return torch.stack(squared_error(prediction, target).split(batch.num_pairs), dim=1)
