"""How a model's latents are noised and how its predictions are read: diffusion or flow matching, behind one interface.

Axis legend: `batch` pictures, `step` training timesteps, `channel height width` latent axes.

Two clocks: training timesteps 0 ... N - 1, and what the network is told (the same number for diffusion, 1000 times the
share of noise for flow models).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Real
from torch import Tensor

from safetydpo.diffusion import schedule
from safetydpo.diffusion.backbone import PredictionType, TargetKind
from safetydpo.errors import SafetyDPOError

PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "epsilon", "v_prediction": "v_prediction"}

Latents = Float[Tensor, "batch channel height width"]
Timesteps = Real[Tensor, " batch"]


class NoiseProcess(Protocol):
    """The mathematics of one schedule and one kind of prediction, with the sampler that goes with them."""

    @property
    def prediction_type(self) -> PredictionType:
        """Return what the network predicts."""
        ...

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of training timesteps."""
        ...

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """Return the noisy latents of these timesteps."""
        ...

    def target(self, latents: Latents, noise: Latents, timesteps: Timesteps, *, kind: TargetKind) -> Latents:
        """Return what the network is trained to predict, or the noise."""
        ...

    def velocity_weights(self, timesteps: Timesteps) -> Float[Tensor, " batch"]:
        """Return the factors that turn squared errors of the native target into those of the velocity."""
        ...

    def min_snr_weights(self, timesteps: Timesteps, *, gamma: float) -> Float[Tensor, " batch"]:
        """Return the Min-SNR weights of squared errors of the native target."""
        ...

    def to_epsilon(self, prediction: Latents, noisy: Latents, timesteps: Timesteps) -> Latents:
        """Return the noise that a native prediction implies."""
        ...

    def network_times(self, timesteps: Timesteps) -> Timesteps:
        """Return what the network is told at these timesteps."""
        ...

    def timesteps_of(self, network_times: Timesteps) -> list[float]:
        """Return the timesteps at which the network is told this: the inverse of `network_times`."""
        ...

    def solver(self, steps: int, *, num_patches: int | None) -> Any:
        """Return a diffusers scheduler set to `steps` steps for a picture of `num_patches` patches of the denoiser."""
        ...


class Diffusion:
    """Gaussian diffusion with an epsilon or v-prediction network, sampled by DPM-Solver++ multistep."""

    def __init__(self, scheduler_config: Mapping[str, Any], *, device: torch.device) -> None:
        """Read the schedule of a model's scheduler, whatever its class.

        Raises:
            SafetyDPOError: if the network predicts neither noise nor v, or noise under zero terminal SNR, or the
                schedule is not one of betas.
        """
        stated = scheduler_config.get("prediction_type", "epsilon")
        if stated not in PREDICTION_TYPES:
            raise SafetyDPOError(
                f"expected a scheduler with prediction_type epsilon or v_prediction, found {stated!r}: "
                "this model is no Stable Diffusion 1.x, 2.x or XL; use one of those"
            )
        if "beta_start" not in scheduler_config:
            raise SafetyDPOError(
                f"expected a scheduler of a diffusion model with a beta_start, found "
                f"{scheduler_config.get('_class_name')!r} without: use a model of a supported family"
            )
        if stated == "epsilon" and scheduler_config.get("rescale_betas_zero_snr"):
            raise SafetyDPOError(
                "expected prediction_type v_prediction with rescale_betas_zero_snr, found 'epsilon': from pure noise "
                "the noise says nothing about the picture; correct scheduler_config.json"
            )
        self._scheduler_config = scheduler_config
        self._device = device
        self._prediction_type = PREDICTION_TYPES[stated]
        # Training and sampling read the same schedule, whatever scheduler class the folder names.
        alphas: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
        self._alphas_cumprod = alphas.to(device)

    @property
    def prediction_type(self) -> PredictionType:
        """Return `epsilon` or `v_prediction`."""
        return self._prediction_type

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of training timesteps."""
        return int(self._alphas_cumprod.shape[0])

    @property
    def alphas_cumprod(self) -> Float[Tensor, " step"]:
        """Return the share of signal variance at every training timestep."""
        return self._alphas_cumprod

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """See `NoiseProcess.add_noise`."""
        return schedule.add_noise(latents, noise, timesteps=timesteps, alphas_cumprod=self._alphas_cumprod)

    def target(self, latents: Latents, noise: Latents, timesteps: Timesteps, *, kind: TargetKind) -> Latents:
        """Return the noise, or v if the model predicts v and `kind` is `native`."""
        if kind == "epsilon" or self._prediction_type == "epsilon":
            return schedule.epsilon_target(latents, noise)
        return schedule.v_target(latents, noise, timesteps=timesteps, alphas_cumprod=self._alphas_cumprod)

    def velocity_weights(self, timesteps: Timesteps) -> Float[Tensor, " batch"]:
        """See `NoiseProcess.velocity_weights`."""
        if self._prediction_type == "epsilon":
            return schedule.velocity_weights_epsilon(timesteps, self._alphas_cumprod)
        return torch.ones(timesteps.shape, device=self._device)

    def min_snr_weights(self, timesteps: Timesteps, *, gamma: float) -> Float[Tensor, " batch"]:
        """See `NoiseProcess.min_snr_weights`."""
        is_epsilon = self._prediction_type == "epsilon"
        weights = schedule.min_snr_weights_epsilon if is_epsilon else schedule.min_snr_weights_v
        return weights(timesteps, self._alphas_cumprod, gamma=gamma)

    def to_epsilon(self, prediction: Latents, noisy: Latents, timesteps: Timesteps) -> Latents:
        """See `NoiseProcess.to_epsilon`."""
        if self._prediction_type == "epsilon":
            return prediction
        return schedule.v_to_epsilon(prediction, noisy, timesteps=timesteps, alphas_cumprod=self._alphas_cumprod)

    def network_times(self, timesteps: Timesteps) -> Timesteps:
        """Return the timesteps themselves."""
        return timesteps

    def timesteps_of(self, network_times: Timesteps) -> list[float]:
        """Return the whole numbers that they are."""
        return [int(time) for time in network_times]

    def solver(self, steps: int, *, num_patches: int | None) -> Any:  # noqa: ARG002 - one schedule for all sizes
        """Return DPM-Solver++ multistep set to `steps` steps."""
        # The stochastic variants of a folder's own DPM-Solver config would draw from the global generator.
        solver = DPMSolverMultistepScheduler.from_config(dict(self._scheduler_config), algorithm_type="dpmsolver++")
        solver.set_timesteps(steps, device=self._device)
        return solver


class FlowMatching:
    """The straight path from picture to noise with a velocity network, sampled by Euler steps.

    Training timesteps are those of diffusers' training scripts: the scheduler's own grid with its fixed shift; a
    dynamic shift is one of sampling only.
    """

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        *,
        device: torch.device,
        first_sigmas: Literal["scheduler", "linear"],
    ) -> None:
        """Read the schedule of a `FlowMatchEulerDiscreteScheduler`.

        Args:
            scheduler_config: its configuration.
            device: where results stand.
            first_sigmas: noise shares of sampling steps before any shift: the scheduler's own, or
                1, 1 - 1 / steps, ..., 1 / steps (FLUX.1).

        Raises:
            SafetyDPOError: if it is another scheduler, or runs from noise share 0 to 1.
        """
        found = scheduler_config.get("_class_name")
        if found != "FlowMatchEulerDiscreteScheduler" or scheduler_config.get("invert_sigmas"):
            raise SafetyDPOError(
                f"expected a FlowMatchEulerDiscreteScheduler with invert_sigmas false, found {found!r}"
                f"{' with invert_sigmas' if scheduler_config.get('invert_sigmas') else ''}: "
                "this model is no Stable Diffusion 3.x or FLUX.1; use one of those"
            )
        self._scheduler_config = scheduler_config
        self._first_sigmas = first_sigmas
        self._device = device
        config = self._scheduler().config
        shift = 1.0 if config.use_dynamic_shifting else config.shift
        self._sigmas = schedule.flow_sigmas(config.num_train_timesteps, shift=shift).to(device)

    @property
    def prediction_type(self) -> PredictionType:
        """Return `flow`."""
        return "flow"

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of training timesteps."""
        return int(self._sigmas.shape[0])

    @property
    def sigmas(self) -> Float[Tensor, " step"]:
        """Return the share of noise at every training timestep."""
        return self._sigmas

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """See `NoiseProcess.add_noise`."""
        return schedule.add_noise_flow(latents, noise, sigmas=schedule.sigmas_at(timesteps, self._sigmas))

    def target(self, latents: Latents, noise: Latents, timesteps: Timesteps, *, kind: TargetKind) -> Latents:  # noqa: ARG002
        """Return the velocity noise - picture, the same at all timesteps, or the noise."""
        if kind == "epsilon":
            return schedule.epsilon_target(latents, noise)
        return schedule.flow_target(latents, noise)

    def velocity_weights(self, timesteps: Timesteps) -> Float[Tensor, " batch"]:
        """Return ones: the native target is the velocity."""
        return torch.ones(timesteps.shape, device=self._device)

    def min_snr_weights(self, timesteps: Timesteps, *, gamma: float) -> Float[Tensor, " batch"]:
        """Return the weights of the clean picture's error, in terms of the velocity's."""
        return schedule.min_snr_weights_flow(timesteps, self._sigmas, gamma=gamma)

    def to_epsilon(self, prediction: Latents, noisy: Latents, timesteps: Timesteps) -> Latents:
        """See `NoiseProcess.to_epsilon`."""
        return schedule.flow_to_epsilon(prediction, noisy, sigmas=schedule.sigmas_at(timesteps, self._sigmas))

    def network_times(self, timesteps: Timesteps) -> Timesteps:
        """Return the shares of noise times the number of training timesteps."""
        return schedule.sigmas_at(timesteps, self._sigmas) * self.num_train_timesteps

    def timesteps_of(self, network_times: Timesteps) -> list[float]:
        """Return the timesteps of these shares of noise, mostly between two whole ones."""
        found: list[float] = schedule.timesteps_at(network_times / self.num_train_timesteps, self._sigmas).tolist()
        return found

    def solver(self, steps: int, *, num_patches: int | None) -> Any:
        """Return Euler's method set to `steps` steps.

        Raises:
            SafetyDPOError: if the steps depend on the size of the picture and that is not given.
        """
        solver = self._scheduler()
        config = solver.config
        settings: dict[str, Any] = {}
        if config.use_dynamic_shifting:
            if num_patches is None:
                raise SafetyDPOError(
                    "expected the size of the picture, because this model's sampling steps depend on it, found none: "
                    "call sampling_timesteps(steps, latent_shape=latent_shape(height=..., width=...))"
                )
            settings["mu"] = schedule.shift_for_tokens(
                num_patches,
                base_tokens=config.base_image_seq_len,
                max_tokens=config.max_image_seq_len,
                base_shift=config.base_shift,
                max_shift=config.max_shift,
            )
        if self._first_sigmas == "linear":
            settings["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        solver.set_timesteps(steps, device=self._device, **settings)
        return solver

    def _scheduler(self) -> Any:
        # Stochastic sampling would draw from the global generator.
        return FlowMatchEulerDiscreteScheduler.from_config(dict(self._scheduler_config), stochastic_sampling=False)
