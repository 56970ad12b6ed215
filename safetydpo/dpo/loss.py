"""The losses of an expert, as pure functions of predictions and squared errors.

Axis legend: `pair` preference rows of a step, `batch` pictures, `channel height width` latent axes.

All losses on preferences share one unit. A picture x has the reward `u(x) = -(beta / 2) * rise(x)`, where
`rise(x) = e_policy(x) - e_reference(x)` is how much the policy's squared error lies above the reference's, and a pair
the logit `z = u(safe) - u(unsafe)`. Both are 0 while policy and reference are equal (step 0).

| kind      | loss of a pair                                                    | at step 0            |
|-----------|-------------------------------------------------------------------|----------------------|
| `sigmoid` | -log sigmoid(z)                                                   | ln 2                 |
| `hinge`   | max(0, 1 - z)                                                     | 1                    |
| `ipo`     | (z - 1/2)^2                                                       | 1/4                  |
| `kto`     | mean over its two pictures of 1 - sigmoid(s (u - q)), s = +1 / -1 | 1/2                  |
| `mapo`    | -log sigmoid(m), m from the policy's errors alone                 | depends on the base  |

Implicit accuracy is the share of pairs with z > 0 (half at step 0), the margin the mean of z. Under `ipo` the margin
stops at 1/2 on purpose. Under `kto` no pair is compared: z > 0 only says that the safe picture has the larger reward.
Under `mapo` both are of m: the share of pairs whose safe picture the policy predicts better than the unsafe one, which
is the base's own share at step 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

ReferenceLoss = Literal["sigmoid", "hinge", "ipo", "kto"]
MAPO_SHARPNESS = 0.5
"""Factor s of errors in MaPO's odds, as released."""


@dataclass(frozen=True)
class PreferenceLoss:
    """Loss of a batch of preferences and what is worth watching; only `loss` carries a gradient."""

    loss: Float[Tensor, ""]
    """`preference + safe_rise_weight * safe_rise + safe_likelihood_weight * safe_likelihood`, to be minimised."""
    preference: Float[Tensor, ""]
    """Mean loss of a pair; its value while policy and reference are equal stands in the table of this file."""
    safe_rise: Float[Tensor, ""]
    """Mean of (beta / 2) * relu(rise of the error on the safe picture), before its weight."""
    safe_likelihood: Float[Tensor, ""]
    """Mean of (beta / 2) * (rise of the error on the safe picture), before its weight; falls below 0 in training.
    Without a reference: of (beta / 2) * (the error itself)."""
    logits: Float[Tensor, " pair"]
    """-(beta / 2) * (rise of the safe error - rise of the unsafe error); MaPO's m without a reference."""
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
    kind: ReferenceLoss = "sigmoid",
    reference_point: Float[Tensor, ""] | None = None,
) -> PreferenceLoss:
    """Return the loss of a batch, the safe picture preferred, plus two terms on the safe picture alone.

    `L = mean(loss of a pair) + (beta / 2) * mean(safe_rise_weight * relu(rise_safe)
    + safe_likelihood_weight * rise_safe)`; the loss of a pair is that of Diffusion-DPO (`sigmoid`) or another kind of
    this file's table. `reference_point` is the q of `kto` and unused otherwise; None = 0.

    `sigmoid` falls also when both errors rise, the unsafe one faster: then the policy forgets how to draw
    the safe picture. The penalty is in the unit of the logit, so a weight of 1 cancels that bargain: a rise of
    the safe error costs more than the preference gains by it. It is one-sided, so improving costs nothing.

    The preference also saturates as soon as the unsafe error has risen, long before the policy draws the safe
    picture; what it draws instead is often neither. The likelihood term goes on pulling towards the safe picture.
    Its gradient is that of the error itself (the reference is constant), and it is 0 while policy and reference
    are equal.

    The form is the same for epsilon, v-prediction and flow matching: only the target of the errors differs.

    Source: Diffusion-DPO, arXiv 2311.12908, eq. 14; `hinge`: SLiC-HF, arXiv 2305.10425, on log-ratios as in RSO,
    arXiv 2309.06657; `ipo`: arXiv 2310.12036, eq. 17 with tau = beta, times beta^2, so that it is in the unit
    of the logit; `kto`: see `utility_loss`. The likelihood term is that of RPO, arXiv 2404.19733, eq. 1
    (negative log-likelihood of the winner beside DPO), with the error for the likelihood; the penalty is ours.
    """
    rise_safe = error_policy_safe - error_reference_safe
    rise_unsafe = error_policy_unsafe - error_reference_unsafe
    logits = -(beta / 2) * (rise_safe - rise_unsafe)
    if kind == "kto":
        rewards = torch.cat([-(beta / 2) * rise_safe, -(beta / 2) * rise_unsafe])
        is_safe = torch.arange(len(rewards), device=rewards.device) < len(rise_safe)
        preference = utility_loss(rewards, is_safe, reference_point=reference_point).mean()
    else:
        preference = _pair_losses(logits, kind).mean()
    safe_rise = (beta / 2) * F.relu(rise_safe).mean()
    safe_likelihood = (beta / 2) * rise_safe.mean()
    return _with_terms(preference, logits, (safe_rise_weight, safe_rise), (safe_likelihood_weight, safe_likelihood))


def _pair_losses(logits: Float[Tensor, " pair"], kind: ReferenceLoss) -> Float[Tensor, " pair"]:
    if kind == "hinge":
        return F.relu(1.0 - logits)
    if kind == "ipo":
        return (logits - 0.5).square()
    return -F.logsigmoid(logits)


def _with_terms(
    preference: Tensor, logits: Tensor, rise: tuple[float, Tensor], likelihood: tuple[float, Tensor]
) -> PreferenceLoss:
    detached = logits.detach()
    return PreferenceLoss(
        loss=preference + rise[0] * rise[1] + likelihood[0] * likelihood[1],
        preference=preference.detach(),
        safe_rise=rise[1].detach(),
        safe_likelihood=likelihood[1].detach(),
        logits=detached,
        implicit_accuracy=(0.5 + 0.5 * detached.sign()).mean(),
        margin=detached.mean(),
    )


def utility_loss(
    rewards: Float[Tensor, " batch"],
    is_safe: Bool[Tensor, " batch"],
    *,
    reference_point: Float[Tensor, ""] | None = None,
) -> Float[Tensor, " batch"]:
    """Return 1 minus the utility of each picture for itself, so that pictures need no partner.

    `L_i = 1 - sigmoid(s_i (u_i - q))` with s = +1 for a safe and -1 for an unsafe picture, u the reward
    -(beta / 2) * rise and q the reference point (None = 0); 1/2 where u = q.

    Source: Diffusion-KTO, arXiv 2404.04465, eq. 8 with the Kahneman-Tversky utility (beta / 2 in place of its beta,
    both kinds of picture weighted alike, as released).
    """
    above = rewards if reference_point is None else rewards - reference_point
    return torch.sigmoid(torch.where(is_safe, -above, above))


def utility_reference_point(mean_reward: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the q of `utility_loss`: how far the policy has moved from the reference, never below 0, no gradient.

    `q = max(0, mean reward of all pictures of the step)`, an estimate of beta times the divergence of policy and
    reference. The mean must be that of all processes, or two of them would train another loss than one.

    Source: Diffusion-KTO, arXiv 2404.04465, eq. 8, estimated as released.
    """
    return mean_reward.detach().clamp(min=0.0)


def reference_free_loss(
    error_policy_safe: Float[Tensor, " pair"],
    error_policy_unsafe: Float[Tensor, " pair"],
    *,
    beta: float,
    safe_likelihood_weight: float,
) -> PreferenceLoss:
    """Return the MaPO loss of a batch: no reference takes part.

    `L = mean(-log sigmoid(m)) + (beta / 2) * safe_likelihood_weight * mean(e_safe)` with
    `m = (beta / s) * (f(s e_safe) - f(s e_unsafe))`, `f(x) = x / (exp(x) - 1)`, s = 1/2. f falls from 1 with slope
    -1/2, so for small errors m = -(beta / 2) * (e_safe - e_unsafe): the logit without its reference.

    The released loss, `mean(e_safe) - 0.1 * mean(log sigmoid(T (f(s e_safe) - f(s e_unsafe))))` with T = 1000, is 0.1
    times this one at beta = s T = 500 and safe_likelihood_weight = 0.04. Without the second term nothing keeps the
    safe error from rising. Errors below 2e-6 count as that.

    Source: MaPO, "Margin-aware Preference Optimization", arXiv 2406.06424, as released.
    """
    odds_safe, odds_unsafe = (_odds(MAPO_SHARPNESS * error) for error in (error_policy_safe, error_policy_unsafe))
    logits = (beta / MAPO_SHARPNESS) * (odds_safe - odds_unsafe)
    likelihood = (beta / 2) * error_policy_safe.mean()
    preference = -F.logsigmoid(logits).mean()
    return _with_terms(preference, logits, (0.0, torch.zeros_like(preference)), (safe_likelihood_weight, likelihood))


def _odds(values: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    # x / (e^x - 1) without an overflow for large x; at 0 it would be 0 / 0.
    bounded = values.clamp(min=1e-6)
    return bounded * torch.exp(-bounded) / -torch.expm1(-bounded)


def unsafe_gradient_scale(
    residual_safe: Float[Tensor, "pair channel height width"],
    residual_unsafe: Float[Tensor, "pair channel height width"],
    *,
    winner_preservation: float,
) -> Float[Tensor, " pair"]:
    """Return the factor of each pair's unsafe gradient that keeps the step from spoiling the safe picture.

    `k = min(1, (1 - mu) |gA|^2 / <gA, gB>)` where `<gA, gB> > 0`, else 1; gA and gB are the gradients of the safe and
    the unsafe error by the network's output, up to a common factor `prediction - target`, mu is
    `winner_preservation` in [0, 1]. A step down `e_safe - k e_unsafe` changes the output on the safe picture by
    -(gA - k gB) where both pictures move it alike, and so its error to first order by
    `-(|gA|^2 - k <gA, gB>) <= -mu |gA|^2`: it never rises, and falls by at least the share mu of what it would fall
    without the unsafe picture. 0 = just never rises; 1 = unsafe gradients against the safe one only.

    Reduced in at least float32; carries no gradient.

    Source: Diffusion-SDPO, arXiv 2511.03317, the closed form of its safety bound.
    """
    dtype = torch.promote_types(torch.promote_types(residual_safe.dtype, residual_unsafe.dtype), torch.float32)
    safe, unsafe = (residual.detach().to(dtype).flatten(1) for residual in (residual_safe, residual_unsafe))
    inner = (safe * unsafe).sum(dim=1)
    allowed = (1.0 - winner_preservation) * safe.square().sum(dim=1)
    scale = (allowed / inner.clamp(min=torch.finfo(dtype).tiny)).clamp(max=1.0)
    return torch.where(inner > 0, scale, torch.ones_like(scale))


def scale_gradient(values: Float[Tensor, " pair"], factors: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Return the values, to the bit, with every gradient that flows into them multiplied by its factor."""
    constant = values.detach()
    return constant + factors * (values - constant)


def retention_loss(
    prediction_policy: Float[Tensor, "batch channel height width"],
    prediction_reference: Float[Tensor, "batch channel height width"],
    *,
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return how much the adapter changes the prediction on benign pictures, or on pure noise.

    `R = mean over pictures and latent axes of w (prediction_policy - prediction_reference)^2`. It asks for no
    change, not for a good prediction, so it cannot be satisfied by overfitting the benign pictures.

    Source: on pure noise at the last timestep under the empty caption it is the output preservation of DUO, Park et
    al. 2024, "Direct Unlearning Optimization for Robust and Safe Text-to-Image Models" (arXiv 2407.21035).
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
