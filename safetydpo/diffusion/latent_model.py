"""What all model families share: latents, text encoders, the sampling loop, the adapter slot, recorded layer inputs.

A family adds what its networks want to be told: how prompts become a `Condition`, and how the denoiser is called.

Axis legend: `batch` pictures, `token` prompt tokens, `width_embedding` input features of a text encoder,
`vocabulary` known tokens, `channel height width` latent axes, `image_height image_width` picture axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int, Real, UInt8
from torch import Tensor

from safetydpo.diffusion.adapted_network import AdaptedNetwork
from safetydpo.diffusion.backbone import (
    Condition,
    GuidanceCallback,
    GuidanceStep,
    LoadedParts,
    PredictionType,
    TargetKind,
)
from safetydpo.diffusion.folder import ModelFiles, check_weights, fingerprint_files, names_component, read_json
from safetydpo.diffusion.kernels import choose_kernels
from safetydpo.diffusion.loading import load_tokenizer, open_loader
from safetydpo.diffusion.parts import EncoderSlot, Parts
from safetydpo.diffusion.posterior import require_posterior
from safetydpo.diffusion.process import NoiseProcess
from safetydpo.diffusion.text import PromptTokens, TextTower, joint_ids, joint_table, split_embeddings
from safetydpo.errors import SafetyDPOError

Latents = Float[Tensor, "batch channel height width"]
Images = UInt8[Tensor, "batch image_height image_width 3"]
Timesteps = Real[Tensor, " batch"]


class LatentModel(AdaptedNetwork, ABC):
    """A frozen text-to-image model in the latent space of an autoencoder, with one adapter slot in its denoiser."""

    network_class: ClassVar[Any]
    text_encoders: ClassVar[Sequence[EncoderSlot]]
    patch: ClassVar[int] = 1
    """Latent rows and columns that the denoiser takes together; sides of latents must be multiples of it."""

    def __init__(self, parts: Parts, *, device: torch.device) -> None:
        """Take loaded parts; use `build.load_backbone` or the family's `from_folder` to get them."""
        super().__init__(parts.denoiser, device=device)
        self._parts = parts
        self._process = parts.process
        self._device = device
        self._dtype: torch.dtype = next(self._denoiser.parameters()).dtype

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Self:
        """Load a local folder in diffusers format: safetensors only, no remote code, frozen, in evaluation mode.

        Raises:
            SafetyDPOError: if a part is missing, incomplete, damaged, of an unknown class or stored as pickle.
        """
        return cls.from_files(ModelFiles(folder), dtype=dtype, device=device)

    @classmethod
    def from_files(
        cls,
        files: ModelFiles,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        parts: LoadedParts = "all",
        denoiser_device: str | None = None,
    ) -> Self:
        """Load a model from its files, wherever they stand, all of it or the `denoiser`; as `from_folder` otherwise.

        `denoiser_device` is where the denoiser's weights wait, if not on `device`.

        Raises:
            SafetyDPOError: as `from_folder`.
        """
        check_weights(files)
        choose_kernels()
        index = read_json(files.folder / "model_index.json")
        loader = open_loader(files, index, dtype=dtype)
        place = torch.device(device)

        def frozen(network: Any, on: torch.device = place) -> Any:
            return network.to(on).eval().requires_grad_(False)

        denoiser = frozen(loader.network(cls.denoiser, cls.network_class), torch.device(denoiser_device or device))
        vae, towers = None, None
        if parts == "all":
            vae = frozen(loader.autoencoder())
            towers = cls._open_towers(files, index, lambda slot: frozen(loader.network(*slot)), denoiser.config, place)
        of_vae = read_json(files.folder_of("vae") / "config.json") if vae is None else vae.config
        return cls(
            Parts(
                denoiser=denoiser,
                vae=vae,
                towers=towers,
                shrink=2 ** (len(of_vae["block_out_channels"]) - 1),
                process=cls._open_process(read_json(files.folder / "scheduler" / "scheduler_config.json"), place),
                fingerprint=fingerprint_files(files),
                index=index,
            ),
            device=place,
        )

    @classmethod
    def _open_towers(
        cls,
        files: ModelFiles,
        index: Mapping[str, Any],
        load: Callable[[tuple[str, Any]], Any],
        config: Mapping[str, Any],
        device: torch.device,
    ) -> tuple[TextTower, ...]:
        towers = []
        for slot in cls.text_encoders:
            if slot.is_optional and not names_component(index, slot.encoder):
                continue
            encoder = load((slot.encoder, slot.encoder_class))
            tokenizer = load_tokenizer(slot.tokenizer_class, files.folder / slot.tokenizer)
            towers.append(TextTower(encoder, tokenizer, device=device, max_tokens=cls._max_tokens(slot, config)))
        return tuple(towers)

    @classmethod
    def _max_tokens(cls, slot: EncoderSlot, config: Mapping[str, Any]) -> int | None:  # noqa: ARG003
        """Return how many tokens of a prompt the family gives an encoder at most; None = as many as it takes."""
        return None

    @classmethod
    @abstractmethod
    def _open_process(cls, scheduler_config: Mapping[str, Any], device: torch.device) -> NoiseProcess:
        """Return the family's noise process."""

    @abstractmethod
    def _condition(self, prompts: Sequence[PromptTokens]) -> Condition:
        """Return the condition of prompts, given as each text encoder sees them; differentiable."""

    @abstractmethod
    def _forward(self, latents: Latents, network_times: Timesteps, condition: Condition) -> Latents:
        """Call the denoiser with latents and times in its own dtype."""

    def _guidance(self, prompts: Condition, guidance_scale: float) -> tuple[Callable[[Condition], Condition], float]:  # noqa: ARG002
        """Return what completes the conditions of one sampling, and the scale of classifier-free guidance."""
        return lambda condition: condition, guidance_scale

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the model's files."""
        return self._parts.fingerprint

    @property
    def prediction_type(self) -> PredictionType:
        """Return what the denoiser predicts."""
        return self._process.prediction_type

    @property
    def num_train_timesteps(self) -> int:
        """Return the number of training timesteps."""
        return self._process.num_train_timesteps

    @property
    def guidance_is_embedded(self) -> bool:
        """Return whether the denoiser is told the guidance scale."""
        return False

    @property
    def device(self) -> torch.device:
        """Return where the networks stand."""
        return self._device

    @property
    def _vae(self) -> Any:
        return self._parts.loaded_vae

    @property
    def _towers(self) -> tuple[TextTower, ...]:
        return self._parts.loaded_towers

    @property
    def _shrink(self) -> int:
        return self._parts.shrink

    @property
    def _num_channels(self) -> int:
        return int(self._denoiser.config.in_channels)

    def latent_shape(self, *, height: int, width: int) -> tuple[int, int, int]:
        """Return (channel, height, width) of the latents of a picture of that size.

        Raises:
            SafetyDPOError: if a side is not a multiple of the autoencoder's shrink factor times the patch size.
        """
        factor = self._shrink * self.patch
        if height % factor or width % factor:
            raise SafetyDPOError(
                f"expected a picture height and width that are multiples of {factor}, found {height} x {width}: "
                "change sampler.height and sampler.width"
            )
        return self._num_channels, height // self._shrink, width // self._shrink

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch token"]:
        """Return the padded token ids of all text encoders; prompts that had to be cut are counted in the log."""
        return joint_ids(self._towers, texts)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Condition:
        """Encode prompts as the family's diffusers pipeline does, each padded to full length."""
        return self._condition([tower.tokenize(texts) for tower in self._towers])

    def token_embedding_table(self) -> Float[Tensor, "vocabulary width_embedding"]:
        """Return the input embedding of every token of all text encoders."""
        return joint_table(self._towers)

    def token_texts(self) -> list[str]:
        """Return what every row of the table of embeddings stands for."""
        return [text for tower in self._towers for text in tower.texts]

    def encode_prompt_embeddings(
        self,
        token_embeddings: Float[Tensor, "batch token width_embedding"],
        *,
        ids: Int[Tensor, "batch token"] | None = None,
    ) -> Condition:
        """Run all text encoders from given input embeddings (before positions are added), differentiably.

        Raises:
            SafetyDPOError: if the number of tokens is wrong, or `ids` are needed and missing.
        """
        return self._condition(split_embeddings(self._towers, token_embeddings, ids))

    @torch.no_grad()
    def encode_images(self, images: Images) -> Latents:
        """Return float32 latents: uint8 -> [-1, 1] -> mean of the posterior -> shifted and scaled."""
        encoded = self._encode_pixels(images)
        latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return self._scaled(latents)

    @torch.no_grad()
    def encode_image_moments(self, images: Images) -> tuple[Latents, Latents]:
        """Return mean (shifted and scaled) and standard deviation (scaled) of the posterior, float32.

        Raises:
            UsageError: if the autoencoder has no posterior.
        """
        require_posterior(type(self._vae).__name__)
        posterior = self._encode_pixels(images).latent_dist
        return self._scaled(posterior.mode()), posterior.std.float() * self._vae.config.scaling_factor

    def _encode_pixels(self, images: Images) -> Any:
        pixels = images.to(self._device).permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0
        return self._vae.encode(pixels.to(self._vae.dtype))

    def _scaled(self, latents: Latents) -> Latents:
        latents = latents.float()
        if self._latent_shift:
            latents = latents - self._latent_shift
        return latents * self._vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Latents) -> Images:
        """Return pictures: latents unscaled and unshifted -> autoencoder -> [0, 1] -> nearest of 256 levels."""
        scaled = latents.to(self._device, self._vae.dtype) / self._vae.config.scaling_factor
        if self._latent_shift:
            scaled = scaled + self._latent_shift
        decoded: Tensor = self._vae.decode(scaled, return_dict=False)[0]
        unit = (decoded * 0.5 + 0.5).clamp(0, 1)
        return (unit.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)

    @property
    def _latent_shift(self) -> float:
        return float(getattr(self._vae.config, "shift_factor", None) or 0.0)

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """Return the noisy latents of the training schedule."""
        return self._process.add_noise(latents.to(self._device), noise.to(self._device), timesteps)

    def predict(self, latents: Latents, timesteps: Timesteps, condition: Condition) -> Latents:
        """Return the denoiser's native prediction, in the dtype of the base."""
        return self._forward(latents, self._process.network_times(timesteps), condition)

    def target(self, latents: Latents, noise: Latents, timesteps: Timesteps, *, kind: TargetKind = "native") -> Latents:
        """Return what the denoiser is trained to predict, or the noise."""
        return self._process.target(latents.to(self._device), noise.to(self._device), timesteps, kind=kind)

    def velocity_weights(self, timesteps: Timesteps) -> Float[Tensor, " batch"]:
        """See `Backbone.velocity_weights`."""
        return self._process.velocity_weights(timesteps)

    def min_snr_weights(self, timesteps: Timesteps, *, gamma: float) -> Float[Tensor, " batch"]:
        """See `Backbone.min_snr_weights`."""
        return self._process.min_snr_weights(timesteps, gamma=gamma)

    def to_epsilon(self, prediction: Latents, noisy: Latents, timesteps: Timesteps) -> Latents:
        """Return the noise that a native prediction at `noisy` implies."""
        return self._process.to_epsilon(prediction, noisy.to(prediction.device), timesteps)

    def sampling_timesteps(self, steps: int, *, latent_shape: tuple[int, int, int] | None = None) -> Sequence[float]:
        """Return the training timestep of each sampling step, falling."""
        num_patches = None if latent_shape is None else self._num_patches(latent_shape)
        return self._process.timesteps_of(self._process.solver(steps, num_patches=num_patches).timesteps)

    def _num_patches(self, latent_shape: Sequence[int]) -> int:
        return (latent_shape[-2] // self.patch) * (latent_shape[-1] // self.patch)

    @torch.no_grad()
    def sample(
        self,
        initial_latents: Latents,
        prompts: Condition,
        *,
        empty: Condition,
        steps: int,
        guidance_scale: float,
        callback: GuidanceCallback | None = None,
        start_step: int = 0,
    ) -> Latents:
        """Denoise with the family's sampler; both branches of the guidance are one concatenated batch.

        At scale 1 without a callback only the prompt's branch is computed. Latents stay float32 between steps.

        Raises:
            SafetyDPOError: if `start_step` leaves no step to run.
        """
        solver = self._process.solver(steps, num_patches=self._num_patches(initial_latents.shape))
        times = solver.timesteps[start_step:]
        if not 0 <= start_step < len(solver.timesteps):
            raise SafetyDPOError(
                f"expected a start step from 0 to {len(solver.timesteps) - 1}, found {start_step}: "
                "start earlier or use more sampler.steps"
            )
        solver.set_begin_index(start_step)
        latents = initial_latents.to(self._device, torch.float32)
        complete, scale = self._guidance(prompts, guidance_scale)
        prompts = complete(prompts).expand(len(latents))
        both = complete(empty).expand(len(latents)).followed_by(prompts)
        for index, time in enumerate(times.tolist(), start=start_step):
            if scale == 1.0 and callback is None:
                combined = self._predict_at(latents, time, prompts)
            else:
                predicted = self._predict_at(torch.cat([latents, latents]), time, both)
                step = self._guidance_step(index, time, latents, predicted, complete, scale)
                combined = step.combined if callback is None else callback(step)
            latents = solver.step(combined, times[index - start_step], latents, return_dict=False)[0]
        return latents

    def _predict_at(self, latents: Latents, network_time: float, condition: Condition) -> Latents:
        return self._forward(latents, torch.full((len(latents),), network_time, device=self._device), condition).float()

    def _guidance_step(
        self,
        index: int,
        network_time: float,
        latents: Latents,
        predicted: Tensor,
        complete: Callable[[Condition], Condition],
        guidance_scale: float,
    ) -> GuidanceStep:
        predicted_empty, predicted_prompt = predicted.chunk(2)
        return GuidanceStep(
            index=index,
            timestep=self._process.timesteps_of(torch.tensor([network_time]))[0],
            latents=latents,
            predicted_empty=predicted_empty,
            predicted_prompt=predicted_prompt,
            guidance_scale=guidance_scale,
            predict=lambda condition: self._predict_at(latents, network_time, complete(condition).expand(len(latents))),
        )


def require_pooled(condition: Condition) -> Float[Tensor, "batch width_pooled"]:
    """Return the pooled features of a condition.

    Raises:
        SafetyDPOError: if it has none.
    """
    if condition.pooled is None:
        raise SafetyDPOError(
            "expected a condition with pooled features, which this model family needs, found none: "
            "encode the prompts with this base model"
        )
    return condition.pooled
