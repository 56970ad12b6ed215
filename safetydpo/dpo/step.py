"""One training step's loss: a policy pass with the adapter on, a reference pass with the adapter off.

The reference is the same network in the same compute type on the same batch, so at step 0 (B = 0) both
passes give equal bits, and no second network is held in memory.

A loss without a reference (`mapo`) leaves the reference pass out, or runs it for the rows of those terms alone that
compare with it (retention, output preservation, redirection). Those rows are then a smaller batch than the policy's, so
these terms start at rounding error, not at exactly 0.

Axis legend: `row` pictures of one pass: safe, unsafe and benign ones, then pure noise; `pair` preference rows; `metric`
numbers of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safetydpo.config.training import DpoConfig
from safetydpo.diffusion.backbone import Backbone, Condition
from safetydpo.dpo.batch import StepBatch
from safetydpo.dpo.loss import (
    PreferenceLoss,
    preference_loss,
    redirection_loss,
    reference_free_loss,
    retention_loss,
    scale_gradient,
    squared_error,
    unsafe_gradient_scale,
    utility_reference_point,
)
from safetydpo.dpo.stored_errors import without_rounding
from safetydpo.dpo.weighting import error_weights

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
"""Names of the numbers that `policy_loss` returns, in order; all are means over rows.

Under the loss `mapo` the reference's errors are unknown and stand as 0. What implicit accuracy and margin mean under
each loss stands in `safetydpo.dpo.loss`.
"""


def policy_loss(
    backbone: Backbone,
    batch: StepBatch,
    *,
    config: DpoConfig,
    mean_over_processes: Callable[[Tensor], Tensor] = lambda values: values,
) -> tuple[Float[Tensor, ""], Float[Tensor, " metric"]]:
    """Return the loss of one batch and the numbers named by `METRICS`.

    `loss = preference + safe_rise_weight * safe_rise + safe_likelihood_weight * safe_likelihood
    + redirection_weight * redirection + retention_weight * retention
    + output_preservation_weight * output_preservation`. Safe, unsafe and benign pictures, and the pure noise of output
    preservation, go through the network in one batch. `mean_over_processes` is asked once under the loss `kto`, whose
    reference point is one number for all rows of the step.
    """
    asked = _questions(backbone, batch, with_noise=config.output_preservation_weight > 0)
    # Pairs come first; without need of predictions for them, the reference answers the rows behind them alone.
    needs_pairs = config.loss != "mapo" and batch.reference_errors is None
    first = 0 if needs_pairs else 2 * batch.num_pairs
    reference, answer = _reference_predictions(backbone, batch, asked, first=first, config=config)
    policy = backbone.predict(asked.noisy, asked.timesteps, asked.condition)
    # The weight of a pair's timestep is the same for all four of its errors, so equal errors still cancel exactly.
    weights = error_weights(backbone, asked.timesteps, config=config)
    errors = _Errors.of(policy, reference if needs_pairs else None, asked, weights, stored=batch.reference_errors)
    preference = _preference(policy, errors, asked, config, mean_over_processes)
    loss = preference.loss
    retention, redirection = torch.zeros_like(preference.preference), torch.zeros_like(preference.preference)
    if batch.retention_latents.shape[0]:
        benign = asked.benign
        retention = retention_loss(
            policy[benign], reference[_later(benign, first)], weights=None if weights is None else weights[benign]
        )
        loss = loss + config.retention_weight * retention
    if answer is not None:
        unsafe = asked.unsafe
        of_unsafe = batch.is_unsafe_caption if weights is None else batch.is_unsafe_caption * weights[unsafe]
        redirection = redirection_loss(policy[unsafe], answer, beta=config.beta, weights=of_unsafe)
        loss = loss + config.redirection_weight * redirection
    if config.output_preservation_weight > 0:
        preservation = retention_loss(policy[asked.noise], reference[_later(asked.noise, first)])
        loss = loss + config.output_preservation_weight * preservation
    metrics = (
        loss,
        preference.preference,
        preference.safe_rise,
        retention,
        preference.implicit_accuracy,
        preference.margin,
        errors.policy_safe.mean(),
        errors.policy_unsafe.mean(),
        errors.reference_safe.mean(),
        errors.reference_unsafe.mean(),
        redirection,
    )
    return loss, torch.stack([metric.detach() for metric in metrics])


@dataclass(frozen=True)
class _Questions:
    """What the network is asked in one pass, the targets of its first rows, and where each kind of row stands."""

    noisy: Float[Tensor, "row channel height width"]
    timesteps: Int[Tensor, " row"]
    condition: Condition
    target: Tensor
    """Of the safe and the unsafe pictures."""
    pairs: slice
    unsafe: slice
    benign: slice
    noise: slice


def _questions(backbone: Backbone, batch: StepBatch, *, with_noise: bool) -> _Questions:
    latents = torch.cat([batch.latents_safe, batch.latents_unsafe])
    noise = torch.cat([batch.noise, batch.noise])
    timesteps = torch.cat([batch.timesteps, batch.timesteps])
    everything = torch.cat([timesteps, batch.retention_timesteps])
    noisy = backbone.add_noise(
        torch.cat([latents, batch.retention_latents]), torch.cat([noise, batch.retention_noise]), everything
    )
    condition = batch.condition.followed_by(batch.condition).followed_by(batch.retention_condition)
    two, known = 2 * batch.num_pairs, len(everything)
    if with_noise:
        # Pure noise, as sampling starts; noisy latents of the last timestep still hold a little of their picture.
        last = torch.full_like(batch.timesteps, backbone.num_train_timesteps - 1)
        everything = torch.cat([everything, last])
        noisy = torch.cat([noisy, batch.noise.to(noisy)])
        condition = condition.followed_by(batch.empty_condition.expand(batch.num_pairs))
    return _Questions(
        noisy=noisy,
        timesteps=everything,
        condition=condition,
        target=backbone.target(latents, noise, timesteps),
        pairs=slice(0, two),
        unsafe=slice(batch.num_pairs, two),
        benign=slice(two, known),
        noise=slice(known, len(everything)),
    )


def _reference_predictions(
    backbone: Backbone, batch: StepBatch, asked: _Questions, *, first: int, config: DpoConfig
) -> tuple[Tensor, Tensor | None]:
    """Return the reference's predictions of all rows from `first` on, and its answers of the redirection term."""
    with backbone.as_reference():
        rows = slice(first, len(asked.noisy))
        reference = asked.noisy[rows]
        if len(reference):
            condition = asked.condition if first == 0 else asked.condition.map(lambda values: values[rows])
            reference = backbone.predict(asked.noisy[rows], asked.timesteps[rows], condition).detach()
        if config.redirection_weight == 0:
            return reference, None
        # In a pass of its own: in a larger batch the reference would lose its equal bits with the policy.
        unsafe = asked.unsafe
        answer = backbone.predict(asked.noisy[unsafe], asked.timesteps[unsafe], batch.safe_condition)
        return reference, answer.detach()


def _later(rows: slice, first: int) -> slice:
    return slice(rows.start - first, rows.stop - first)


@dataclass(frozen=True)
class _Errors:
    """Squared errors of the pairs' pictures; those of the reference are 0 where it was not asked."""

    policy_safe: Float[Tensor, " pair"]
    policy_unsafe: Float[Tensor, " pair"]
    reference_safe: Float[Tensor, " pair"]
    reference_unsafe: Float[Tensor, " pair"]

    @classmethod
    def of(
        cls,
        policy: Tensor,
        reference: Tensor | None,
        asked: _Questions,
        weights: Tensor | None,
        *,
        stored: Tensor | None,
    ) -> _Errors:
        rows = asked.pairs
        of_pairs = None if weights is None else weights[rows]
        pairs = rows.stop // 2
        policy_safe, policy_unsafe = squared_error(policy[rows], asked.target, weights=of_pairs).split(pairs)
        if stored is not None:
            kept = stored.T.flatten().to(policy_safe.device)
            kept = kept if of_pairs is None else kept * of_pairs
            kept = without_rounding(kept, torch.cat([policy_safe, policy_unsafe]))
            return cls(policy_safe, policy_unsafe, *kept.split(pairs))
        if reference is None:
            return cls(policy_safe, policy_unsafe, torch.zeros_like(policy_safe), torch.zeros_like(policy_unsafe))
        reference_safe, reference_unsafe = squared_error(reference[rows], asked.target, weights=of_pairs).split(pairs)
        return cls(policy_safe, policy_unsafe, reference_safe, reference_unsafe)


def _preference(
    policy: Tensor,
    errors: _Errors,
    asked: _Questions,
    config: DpoConfig,
    mean_over_processes: Callable[[Tensor], Tensor],
) -> PreferenceLoss:
    if config.loss == "mapo":
        return reference_free_loss(
            errors.policy_safe,
            errors.policy_unsafe,
            beta=config.beta,
            safe_likelihood_weight=config.safe_likelihood_weight,
        )
    policy_unsafe, point = errors.policy_unsafe, None
    if config.winner_preservation is not None:
        safe, unsafe = (policy[asked.pairs] - asked.target).split(asked.pairs.stop // 2)
        scale = unsafe_gradient_scale(safe, unsafe, winner_preservation=config.winner_preservation)
        policy_unsafe = scale_gradient(policy_unsafe, scale)
    if config.loss == "kto":
        rises = errors.policy_safe - errors.reference_safe, errors.policy_unsafe - errors.reference_unsafe
        mean_reward = -(config.beta / 2) * torch.cat(rises).mean().detach()
        point = utility_reference_point(mean_over_processes(mean_reward))
    return preference_loss(
        errors.policy_safe,
        policy_unsafe,
        error_reference_safe=errors.reference_safe,
        error_reference_unsafe=errors.reference_unsafe,
        beta=config.beta,
        safe_rise_weight=config.safe_rise_weight,
        safe_likelihood_weight=config.safe_likelihood_weight,
        kind=config.loss,
        reference_point=point,
    )


def errors_to_store(backbone: Backbone, batch: StepBatch) -> Float[Tensor, "batch side"]:
    """Return the base's unweighted errors on the safe and the unsafe picture of each pair: what may be stored."""
    asked = _questions(backbone, batch, with_noise=False)
    with backbone.as_reference():
        prediction = backbone.predict(asked.noisy, asked.timesteps, asked.condition).detach()
    return torch.stack(squared_error(prediction, asked.target).split(batch.num_pairs), dim=1)
