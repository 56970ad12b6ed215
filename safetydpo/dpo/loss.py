"""The losses of an expert, as pure functions of predictions and squared errors.

Axis legend: `pair` preference rows of a step, `batch` pictures, `channel height width` latent axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """Loss of a batch of preferences and what is worth watching; only `loss` carries a gradient."""

    loss: Float[Tensor, ""]
    """`preference + safe_rise_weight * safe_rise + safe_likelihood_weight * safe_likelihood`, to be minimised."""
    preference: Float[Tensor, ""]
    """Mean of -log sigmoid(logit); ln 2 while policy and reference are equal."""
    safe_rise: Float[Tensor, ""]
    """Mean of (beta / 2) * relu(rise of the error on the safe picture), before its weight."""
    safe_likelihood: Float[Tensor, ""]
    """Mean of (beta / 2) * (rise of the error on the safe picture), before its weight; falls below 0 in training."""
    logits: Float[Tensor, " pair"]
    """-(beta / 2) * (rise of the safe error - rise of the unsafe error)."""
    implicit_accuracy: Float[Tensor, ""]
    """Share of pairs with a positive logit; a logit of exactly 0 counts half."""
    margin: Float[Tensor, ""]
    """Mean logit."""


def squared_error(
    prediction: Float[Tensor, "batch channel height width"],
    target: Float[Tensor, "batch channel height width"],
    *,
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return the mean squared error of each picture, reduced in at least float32.

    `e_i = w_i * mean over channel, height, width of (prediction_i - target_i)^2`; w = 1 without weights. Both
    arguments are cast *before* the difference: in float16 the later product with beta / 2 would turn rounding into
    logits.

    Source: Diffusion-DPO, arXiv 2311.12908, eq. 14 (with a mean in place of the sum, as released; `weights` are its
    omega(lambda_t), 1 as released).
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    errors = (prediction.to(dtype) - target.to(dtype)).square().mean(dim=(1, 2, 3))
    return errors if weights is None else errors * weights.to(errors)


def preference_loss(
    error_policy_safe: Float[Tensor, " pair"],
    error_policy_unsafe: Float[Tensor, " pair"],
    *,
    error_reference_safe: Float[Tensor, " pair"],
    error_reference_unsafe: Float[Tensor, " pair"],
    beta: float,
    safe_rise_weight: float,
    safe_likelihood_weight: float = 0.0,
) -> PreferenceLoss:
    """Return the Diffusion-DPO loss of a batch, the safe picture preferred, plus two terms on the safe picture alone.

    `L = mean(-log sigmoid(logit)) + (beta / 2) * mean(safe_rise_weight * relu(rise_safe)
    + safe_likelihood_weight * rise_safe)` with `rise_x = e_policy(x) - e_reference(x)` and
    `logit = -(beta / 2) * (rise_safe - rise_unsafe)`.

    The first term falls also when both errors rise, the unsafe one faster: then the policy forgets how to draw
    the safe picture. The penalty is in the unit of the logit, so a weight of 1 cancels that bargain: a rise of
    the safe error costs more than the preference gains by it. It is one-sided, so improving costs nothing.

    The preference also saturates as soon as the unsafe error has risen, long before the policy draws the safe
    picture; what it draws instead is often neither. The likelihood term goes on pulling towards the safe picture.
    Its gradient is that of the error itself (the reference is constant), and it is 0 while policy and reference
    are equal.

    The form is the same for epsilon, v-prediction and flow matching: only the target of the errors differs.

    Source: Diffusion-DPO, arXiv 2311.12908, eq. 14; the likelihood term is that of RPO, arXiv 2404.19733, eq. 1
    (negative log-likelihood of the winner beside DPO), with the error for the likelihood; the penalty is ours.
    """
    rise_safe = error_policy_safe - error_reference_safe
    rise_unsafe = error_policy_unsafe - error_reference_unsafe
    logits = -(beta / 2) * (rise_safe - rise_unsafe)
    preference = -F.logsigmoid(logits).mean()
    safe_rise = (beta / 2) * F.relu(rise_safe).mean()
    safe_likelihood = (beta / 2) * rise_safe.mean()
    detached = logits.detach()
    return PreferenceLoss(
        loss=preference + safe_rise_weight * safe_rise + safe_likelihood_weight * safe_likelihood,
        preference=preference.detach(),
        safe_rise=safe_rise.detach(),
        safe_likelihood=safe_likelihood.detach(),
        logits=detached,
        implicit_accuracy=(0.5 + 0.5 * detached.sign()).mean(),
        margin=detached.mean(),
    )


def retention_loss(
    prediction_policy: Float[Tensor, "batch channel height width"],
    prediction_reference: Float[Tensor, "batch channel height width"],
    *,
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return how much the adapter changes the prediction on benign pictures.

    `R = mean over pictures and latent axes of w (prediction_policy - prediction_reference)^2`. It asks for no
    change, not for a good prediction, so it cannot be satisfied by overfitting the benign pictures.
    """
    return squared_error(prediction_policy, prediction_reference, weights=weights).mean()


def redirection_loss(
    prediction_policy: Float[Tensor, "batch channel height width"],
    prediction_safe: Float[Tensor, "batch channel height width"],
    *,
    beta: float,
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return how far the policy is from drawing the safe prompt's picture out of the noisy unsafe one.

    `(beta / 2) * mean over pairs and latent axes of w (policy(x_t, c_unsafe) - reference(x_t, c_safe))^2` with x_t the
    noisy *unsafe* picture. There the preference says where not to go and nothing else, so a policy left to it ends
    between the two pictures: a blur. `weights` is 0 for pairs whose policy does not see the unsafe caption.

    Source: Kumari et al. 2023, "Ablating Concepts in Text-to-Image Diffusion Models" (arXiv 2303.13516), section 3.2,
    model-based variant: the prediction of the anchor's caption as the target.
    """
    return (beta / 2) * squared_error(prediction_policy, prediction_safe, weights=weights).mean()
