"""Noise schedules as plain tensor functions: noising, training targets, conversions and loss weights.

Axis legend: `batch` pictures, `channel height width` latent axes, `step` training timesteps, `chosen` picked timesteps.

Symbols: z clean latents, n unit Gaussian noise, t timestep, a_t = alphas_cumprod[t] (share of signal variance),
z_t = sqrt(a_t) z + sqrt(1 - a_t) n the noisy latents. Flow models: s_t the share of noise,
z_t = (1 - s_t) z + s_t n. Coefficients are computed in the precision of
`alphas_cumprod`; results have the type of the first argument.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

Latents = Float[Tensor, "batch channel height width"]
Timesteps = Int[Tensor, " batch"]
Schedule = Float[Tensor, " step"]


def signal_and_noise_scale(
    timesteps: Timesteps, alphas_cumprod: Schedule
) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
    """Return sqrt(a_t) and sqrt(1 - a_t), shaped to multiply latents.

    Source: Ho et al. 2020 (arXiv 2006.11239), equation 4.
    """
    alpha = alphas_cumprod[timesteps.to(alphas_cumprod.device)].reshape(-1, 1, 1, 1)
    return alpha.sqrt(), (1.0 - alpha).sqrt()


def add_noise(latents: Latents, noise: Latents, *, timesteps: Timesteps, alphas_cumprod: Schedule) -> Latents:
    """Return the noisy latents z_t = sqrt(a_t) z + sqrt(1 - a_t) n.

    Source: Ho et al. 2020 (arXiv 2006.11239), equation 4.
    """
    signal, sigma = signal_and_noise_scale(timesteps, alphas_cumprod)
    return (signal * latents + sigma * noise).to(latents.dtype)


def epsilon_target(latents: Latents, noise: Latents) -> Latents:
    """Return what an epsilon network is trained to predict: the noise n.

    Source: Ho et al. 2020 (arXiv 2006.11239), equation 14.
    """
    return noise.to(latents.dtype)


def v_target(latents: Latents, noise: Latents, *, timesteps: Timesteps, alphas_cumprod: Schedule) -> Latents:
    """Return what a v-prediction network is trained to predict: v = sqrt(a_t) n - sqrt(1 - a_t) z.

    Source: Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
    """
    signal, sigma = signal_and_noise_scale(timesteps, alphas_cumprod)
    return (signal * noise - sigma * latents).to(latents.dtype)


def v_to_epsilon(prediction: Latents, noisy: Latents, *, timesteps: Timesteps, alphas_cumprod: Schedule) -> Latents:
    """Return the noise that a v-prediction implies: n = sqrt(a_t) v + sqrt(1 - a_t) z_t.

    Source: Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
    """
    signal, sigma = signal_and_noise_scale(timesteps, alphas_cumprod)
    return (signal * prediction + sigma * noisy).to(prediction.dtype)


def epsilon_to_clean(epsilon: Latents, noisy: Latents, *, timesteps: Timesteps, alphas_cumprod: Schedule) -> Latents:
    """Return the clean latents that a noise prediction implies: z = (z_t - sqrt(1 - a_t) n) / sqrt(a_t).

    Not finite where a_t = 0 (zero terminal SNR): there an epsilon network knows nothing of z.

    Source: Ho et al. 2020 (arXiv 2006.11239), equation 15.
    """
    signal, sigma = signal_and_noise_scale(timesteps, alphas_cumprod)
    return ((noisy - sigma * epsilon) / signal).to(epsilon.dtype)


def add_noise_flow(latents: Latents, noise: Latents, *, sigmas: Float[Tensor, " batch"]) -> Latents:
    """Return the point on the straight line from picture to noise: z_s = (1 - s) z + s n, with s in [0, 1].

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 13.
    """
    share = sigmas.reshape(-1, 1, 1, 1)
    return ((1.0 - share) * latents + share * noise).to(latents.dtype)


def flow_target(latents: Latents, noise: Latents) -> Latents:
    """Return what a flow-matching network is trained to predict: the velocity u = n - z.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 2 with the path of equation 13.
    """
    return (noise - latents).to(latents.dtype)


def flow_to_epsilon(prediction: Latents, noisy: Latents, *, sigmas: Float[Tensor, " batch"]) -> Latents:
    """Return the noise that a velocity prediction implies: n = z_s + (1 - s) u.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 13 solved for n.
    """
    share = sigmas.reshape(-1, 1, 1, 1)
    return (noisy + (1.0 - share) * prediction).to(prediction.dtype)


def flow_sigmas(num_train_timesteps: int, *, shift: float = 1.0) -> Schedule:
    """Return the noise share of every training timestep of a flow model, rising to 1.

    `b = (t + 1) / num_train_timesteps`, `s_t = shift b / (1 + (shift - 1) b)`; a shift above 1 moves timesteps
    towards noise, as larger pictures need.

    Raises:
        ValueError: if there is no timestep or the shift is not above 0.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.
    """
    if num_train_timesteps < 1 or shift <= 0:
        raise ValueError(
            f"expected at least 1 timestep and a shift above 0, found {num_train_timesteps} and {shift}: "
            "correct the scheduler's configuration"
        )
    share = torch.arange(1, num_train_timesteps + 1, dtype=torch.float32) / num_train_timesteps
    return shift * share / (1.0 + (shift - 1.0) * share)


def sigmas_at(timesteps: Real[Tensor, " chosen"], sigmas: Schedule) -> Float[Tensor, " chosen"]:
    """Return the noise share at timesteps, on the straight line between two whole ones."""
    times = timesteps.to(sigmas.device)
    if not times.is_floating_point():
        return sigmas[times]
    below = times.floor().long().clamp(0, len(sigmas) - 1)
    above = (below + 1).clamp(max=len(sigmas) - 1)
    return torch.lerp(sigmas[below], sigmas[above], (times - below).to(sigmas.dtype))


def timesteps_at(wanted: Float[Tensor, " chosen"], sigmas: Schedule) -> Float[Tensor, " chosen"]:
    """Return the timesteps at which the noise share is `wanted`: the inverse of `sigmas_at`.

    Shares below the first training timestep's give timestep 0. `sigmas` must rise.
    """
    shares = wanted.to(sigmas).clamp(sigmas[0], sigmas[-1])
    above = torch.searchsorted(sigmas, shares).clamp(1, len(sigmas) - 1)
    low, high = sigmas[above - 1], sigmas[above]
    return (above - 1) + (shares - low) / (high - low)


def shift_for_tokens(
    num_tokens: int, *, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float
) -> float:
    """Return the logarithm of the shift of a picture of `num_tokens` patches: a straight line through two points.

    The line is `base_shift` at `base_tokens` and `max_shift` at `max_tokens`; a scheduler with dynamic shifting then
    uses the shift `exp(result)`.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 5.3.2; the line is that of the FLUX.1 release.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (num_tokens - base_tokens)


def signal_to_noise_ratio(timesteps: Int[Tensor, " chosen"], alphas_cumprod: Schedule) -> Float[Tensor, " chosen"]:
    """Return SNR(t) = a_t / (1 - a_t).

    Source: Kingma et al. 2021 (arXiv 2107.00630), equation 1.
    """
    alpha = alphas_cumprod[timesteps.to(alphas_cumprod.device)]
    return alpha / (1.0 - alpha)


def min_snr_weights_epsilon(
    timesteps: Int[Tensor, " chosen"], alphas_cumprod: Schedule, *, gamma: float = 5.0
) -> Float[Tensor, " chosen"]:
    """Return the loss weight min(SNR, gamma) / SNR of an epsilon network; 1 where SNR = 0 (its limit).

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """
    snr = signal_to_noise_ratio(timesteps, alphas_cumprod)
    return (gamma / snr).clamp(max=1.0)


def min_snr_weights_v(
    timesteps: Int[Tensor, " chosen"], alphas_cumprod: Schedule, *, gamma: float = 5.0
) -> Float[Tensor, " chosen"]:
    """Return the loss weight min(SNR, gamma) / (SNR + 1) of a v-prediction network.

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """
    snr = signal_to_noise_ratio(timesteps, alphas_cumprod)
    return snr.clamp(max=gamma) / (snr + 1.0)


def min_snr_weights_flow(
    timesteps: Int[Tensor, " chosen"], sigmas: Schedule, *, gamma: float = 5.0
) -> Float[Tensor, " chosen"]:
    """Return the loss weight s^2 min(SNR, gamma) = min((1 - s)^2, gamma s^2) of a flow model's velocity network.

    SNR = (1 - s)^2 / s^2. Min-SNR weights the error of the clean picture by min(SNR, gamma). From one noisy latent, an
    error d of the velocity is one of -s d of the clean picture (z = z_s - s u), as one of v is -sqrt(1 - a) d, which
    gives the weight of `min_snr_weights_v`. It is 0 on pure noise and largest at s = 1 / (1 + sqrt(gamma)).

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4, carried over to the straight path of Esser et al. 2024
    (arXiv 2403.03206), equation 13, by us.
    """
    share = sigmas[timesteps.to(sigmas.device)]
    return torch.minimum((1.0 - share).square(), gamma * share.square())


def velocity_weights_epsilon(
    timesteps: Int[Tensor, " chosen"], alphas_cumprod: Schedule, *, maximum: float = 20.0
) -> Float[Tensor, " chosen"]:
    """Return the weight 1 / a_t, at most `maximum`, that turns squared errors of epsilon into those of v.

    From one noisy latent, an error d of epsilon is an error of size d / sqrt(a_t) of v. Epsilon is nearly known at high
    noise, where a picture's layout is decided, so its errors there hardly count without the weight.

    Source: Salimans and Ho 2022, "Progressive Distillation" (arXiv 2202.00512), section 4 (SNR + 1 weighting of the
    clean picture's error).
    """
    return (1.0 / alphas_cumprod[timesteps.to(alphas_cumprod.device)]).clamp(max=maximum)


def draw_timesteps(
    count: int, generator: torch.Generator, *, num_train_timesteps: int, low: int = 0
) -> Int[Tensor, " {count}"]:
    """Draw `count` timesteps uniformly from {low, ..., num_train_timesteps - 1}, on the CPU.

    Raises:
        ValueError: if the range is empty.
    """
    if not 0 <= low < num_train_timesteps:
        raise ValueError(
            f"expected 0 <= low < num_train_timesteps, found low {low} and {num_train_timesteps} timesteps: "
            "choose a lower bound inside the schedule"
        )
    return torch.randint(low, num_train_timesteps, (count,), generator=generator)


def start_step_for_strength(strength: float, *, steps: int) -> int:
    """Return the first sampling step to run so that the last `strength` share of `steps` steps is run (SDEdit).

    `start = steps - floor(steps * strength)`: strength 1 runs all steps, 0 none.

    Raises:
        ValueError: if `strength` is outside [0, 1].

    Source: Meng et al. 2021 (arXiv 2108.01073), algorithm 1.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"expected a strength in [0, 1], found {strength}: give the share of steps to run")
    return steps - min(int(steps * strength), steps)
