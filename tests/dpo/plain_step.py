"""The training step as it was before it had options, word for word: what its defaults must still compute, bit for bit.

Kept here so that the comparison needs no stored numbers, which would differ between processors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Backbone, Condition
from safetydpo.dpo.batch import StepBatch


def plain_squared_error(prediction: Tensor, target: Tensor, *, weights: Tensor | None = None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    errors = (prediction.to(dtype) - target.to(dtype)).square().mean(dim=(1, 2, 3))
    return errors if weights is None else errors * weights.to(errors)


def plain_policy_loss(backbone: Backbone, batch: StepBatch, *, config: DpoConfig) -> tuple[Tensor, Tensor]:
    pairs = batch.num_pairs
    noisy, timesteps, condition, target = _questions(backbone, batch)
    unsafe = slice(pairs, 2 * pairs)
    with torch.no_grad(), backbone.adapter_off():
        reference = backbone.predict(noisy, timesteps, condition)
        redirects = config.redirection_weight > 0
        answer = backbone.predict(noisy[unsafe], timesteps[unsafe], batch.safe_condition) if redirects else None
    policy = backbone.predict(noisy, timesteps, condition)
    weights = backbone.velocity_weights(timesteps) if config.error_weighting == "velocity" else None
    pair_weights = None if weights is None else weights[: 2 * pairs]
    policy_safe, policy_unsafe = plain_squared_error(policy[: 2 * pairs], target, weights=pair_weights).split(pairs)
    reference_safe, reference_unsafe = plain_squared_error(reference[: 2 * pairs], target, weights=pair_weights).split(
        pairs
    )
    rise_safe = policy_safe - reference_safe
    rise_unsafe = policy_unsafe - reference_unsafe
    logits = -(config.beta / 2) * (rise_safe - rise_unsafe)
    preference = -F.logsigmoid(logits).mean()
    safe_rise = (config.beta / 2) * F.relu(rise_safe).mean()
    safe_likelihood = (config.beta / 2) * rise_safe.mean()
    loss = preference + config.safe_rise_weight * safe_rise + config.safe_likelihood_weight * safe_likelihood
    detached = logits.detach()
    retention = torch.zeros_like(preference)
    if batch.retention_latents.shape[0]:
        benign_weights = None if weights is None else weights[2 * pairs :]
        retention = plain_squared_error(policy[2 * pairs :], reference[2 * pairs :], weights=benign_weights).mean()
        loss = loss + config.retention_weight * retention
    redirection = torch.zeros_like(preference)
    if answer is not None:
        of_unsafe = batch.is_unsafe_caption if weights is None else batch.is_unsafe_caption * weights[unsafe]
        redirection = (config.beta / 2) * plain_squared_error(policy[unsafe], answer, weights=of_unsafe).mean()
        loss = loss + config.redirection_weight * redirection
    metrics = (
        loss,
        preference,
        safe_rise,
        retention,
        (0.5 + 0.5 * detached.sign()).mean(),
        detached.mean(),
        policy_safe.mean(),
        policy_unsafe.mean(),
        reference_safe.mean(),
        reference_unsafe.mean(),
        redirection,
    )
    return loss, torch.stack([metric.detach() for metric in metrics])


def _questions(backbone: Backbone, batch: StepBatch) -> tuple[Tensor, Tensor, Condition, Tensor]:
    latents = torch.cat([batch.latents_safe, batch.latents_unsafe])
    noise = torch.cat([batch.noise, batch.noise])
    timesteps = torch.cat([batch.timesteps, batch.timesteps])
    everything = torch.cat([timesteps, batch.retention_timesteps])
    noisy = backbone.add_noise(
        torch.cat([latents, batch.retention_latents]), torch.cat([noise, batch.retention_noise]), everything
    )
    condition = batch.condition.followed_by(batch.condition).followed_by(batch.retention_condition)
    return noisy, everything, condition, backbone.target(latents, noise, timesteps)
