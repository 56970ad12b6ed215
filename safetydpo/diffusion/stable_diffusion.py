"""Stable Diffusion 1.x and 2.x shaped models (U-Net, one CLIP text tower, autoencoder) behind the Backbone protocol.

Axis legend: `batch` pictures, `token` prompt tokens, `width_text` text features, `vocabulary` known tokens,
`channel height width` latent axes, `image_height image_width` picture axes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import CLIPTextModel

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.diffusion import schedule
from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.diffusion.backbone import Condition, GuidanceCallback, GuidanceStep, PredictionType, TargetKind
from safetydpo.diffusion.folder import check_weights, fingerprint_folder, read_json
from safetydpo.diffusion.loading import load_clip_tokenizer, load_network
from safetydpo.diffusion.posterior import require_posterior
from safetydpo.errors import SafetyDPOError

AUTOENCODERS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "epsilon", "v_prediction": "v_prediction"}

log = logging.getLogger(__name__)

Latents = Float[Tensor, "batch channel height width"]
Images = UInt8[Tensor, "batch image_height image_width 3"]
Timesteps = Int[Tensor, " batch"]


@dataclass(frozen=True)
class Components:
    """The loaded parts of a model folder."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    fingerprint: str


class StableDiffusion:
    """A frozen Stable Diffusion model with one adapter slot in its U-Net."""

    def __init__(self, components: Components, *, device: torch.device) -> None:
        """Take loaded components; use `from_folder` to get them.

        Raises:
            SafetyDPOError: if the scheduler's prediction type is neither epsilon nor v_prediction.
        """
        self._parts = components
        self._unet, self._vae, self._text_encoder = components.unet, components.vae, components.text_encoder
        self._device = device
        self._dtype: torch.dtype = next(self._unet.parameters()).dtype
        stated = components.scheduler_config.get("prediction_type", "epsilon")
        if stated not in PREDICTION_TYPES:
            raise SafetyDPOError(
                f"expected a scheduler with prediction_type epsilon or v_prediction, found {stated!r}: "
                "this model is no Stable Diffusion 1.x or 2.x; use one of those"
            )
        self._prediction_type = PREDICTION_TYPES[stated]
        # Training and sampling read the same schedule, whatever scheduler class the folder names.
        self._alphas_cumprod: Tensor = DDPMScheduler.from_config(dict(components.scheduler_config)).alphas_cumprod
        self._alphas_cumprod = self._alphas_cumprod.to(device)
        self._slot = AdapterSlot(self._unet)

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Self:
        """Load a local folder in diffusers format: safetensors only, no remote code, frozen, in evaluation mode.

        Raises:
            SafetyDPOError: if a component is missing, incomplete, damaged, of an unknown class or stored as pickle.
        """
        check_weights(folder)
        index = read_json(folder / "model_index.json")
        vae_class = (index.get("vae") or [None, None])[1]
        if vae_class not in AUTOENCODERS:
            raise SafetyDPOError(
                f"expected an autoencoder of class {' or '.join(AUTOENCODERS)} in {folder / 'model_index.json'}, "
                f"found {vae_class!r}: use a Stable Diffusion 1.x or 2.x model"
            )
        components = Components(
            unet=load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
            vae=load_network(AUTOENCODERS[vae_class], folder / "vae", torch_dtype=dtype),
            text_encoder=load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
            tokenizer=load_clip_tokenizer(folder / "tokenizer"),
            scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
            fingerprint=fingerprint_folder(folder),
        )
        for network in (components.unet, components.vae, components.text_encoder):
            network.to(device).eval().requires_grad_(False)
        return cls(components, device=torch.device(device))

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the model's files."""
        return self._parts.fingerprint

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

    @property
    def device(self) -> torch.device:
        """Return where the networks stand."""
        return self._device

    @property
    def network(self) -> nn.Module:
        """Return the U-Net."""
        unet: nn.Module = self._unet
        return unet

    def latent_shape(self, *, height: int, width: int) -> tuple[int, int, int]:
        """Return (channel, height, width) of the latents of a picture of that size.

        Raises:
            SafetyDPOError: if a side is not a multiple of the autoencoder's shrink factor.
        """
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise SafetyDPOError(
                f"expected a picture height and width that are multiples of {factor}, found {height} x {width}: "
                "change sampler.height and sampler.width"
            )
        return int(self._unet.config.in_channels), height // factor, width // factor

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "batch token"]:
        """Return the padded token ids; prompts that had to be cut are counted in the log."""
        ids: Tensor = self._tokenized(texts).input_ids
        return ids

    def _tokenized(self, texts: Sequence[str]) -> Any:
        limit = min(self._parts.tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings)
        lengths = [len(ids) for ids in self._parts.tokenizer(list(texts), verbose=False).input_ids]
        num_cut = sum(length > limit for length in lengths)
        if num_cut:
            log.warning("%d of %d prompts were cut to the model's %d tokens", num_cut, len(lengths), limit)
        return self._parts.tokenizer(
            list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self._device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Condition:
        """Encode prompts as the diffusers pipeline does: padded to full length, last hidden state of the tower."""
        tokens = self._tokenized(texts)
        mask = tokens.attention_mask if getattr(self._text_encoder.config, "use_attention_mask", False) else None
        return Condition(tokens=self._text_encoder(tokens.input_ids, attention_mask=mask)[0])

    def token_embedding_table(self) -> Float[Tensor, "vocabulary width_text"]:
        """Return the input embedding of every token."""
        table: Tensor = self._text_encoder.get_input_embeddings().weight
        return table

    def encode_prompt_embeddings(self, token_embeddings: Float[Tensor, "batch token width_text"]) -> Condition:
        """Run the text tower from given input embeddings (before positions are added), differentiably."""
        given = token_embeddings.to(self._device, self._dtype)
        # CLIP's text tower takes no input embeddings, so its lookup is replaced for this one call; the rest
        # (positions, causal mask, layers, final norm) is then the very code that `encode_prompts` runs.
        handle = self._text_encoder.get_input_embeddings().register_forward_hook(lambda *_: given)
        try:
            unused_ids = torch.zeros(given.shape[:2], dtype=torch.long, device=self._device)
            return Condition(tokens=self._text_encoder(unused_ids)[0])
        finally:
            handle.remove()

    @torch.no_grad()
    def encode_images(self, images: Images) -> Latents:
        """Return float32 latents: uint8 -> [-1, 1] -> mean of the posterior -> times the scaling factor."""
        encoded = self._encode_pixels(images)
        latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return latents.float() * self._vae.config.scaling_factor

    @torch.no_grad()
    def encode_image_moments(self, images: Images) -> tuple[Latents, Latents]:
        """Return mean and standard deviation of the posterior, both times the scaling factor, float32.

        Raises:
            UsageError: if the autoencoder has no posterior.
        """
        require_posterior(type(self._vae).__name__)
        posterior, factor = self._encode_pixels(images).latent_dist, self._vae.config.scaling_factor
        return posterior.mode().float() * factor, posterior.std.float() * factor

    def _encode_pixels(self, images: Images) -> Any:
        pixels = images.to(self._device).permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0
        return self._vae.encode(pixels.to(self._dtype))

    @torch.no_grad()
    def decode(self, latents: Latents) -> Images:
        """Return pictures: latents / scaling factor -> autoencoder -> [0, 1] -> nearest of 256 levels."""
        scaled = latents.to(self._device, self._dtype) / self._vae.config.scaling_factor
        decoded: Tensor = self._vae.decode(scaled, return_dict=False)[0]
        unit = (decoded * 0.5 + 0.5).clamp(0, 1)
        return (unit.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
        """Return the noisy latents of the training schedule."""
        return schedule.add_noise(
            latents.to(self._device),
            noise.to(self._device),
            timesteps=timesteps,
            alphas_cumprod=self._alphas_cumprod,
        )

    def predict(self, latents: Latents, timesteps: Timesteps, condition: Condition) -> Latents:
        """Return the U-Net's native prediction, in the dtype of the base."""
        output: Tensor = self._unet(
            latents.to(self._device, self._dtype),
            timesteps.to(self._device),
            encoder_hidden_states=condition.tokens.to(self._device, self._dtype),
            return_dict=False,
        )[0]
        return output

    def target(self, latents: Latents, noise: Latents, timesteps: Timesteps, *, kind: TargetKind = "native") -> Latents:
        """Return the noise, or v if the model predicts v and `kind` is `native`."""
        latents, noise = latents.to(self._device), noise.to(self._device)
        if kind == "epsilon" or self._prediction_type == "epsilon":
            return schedule.epsilon_target(latents, noise)
        return schedule.v_target(latents, noise, timesteps=timesteps, alphas_cumprod=self._alphas_cumprod)

    def velocity_weights(self, timesteps: Timesteps) -> Float[Tensor, " batch"]:
        """See `Backbone.velocity_weights`."""
        if self.prediction_type == "epsilon":
            return schedule.velocity_weights_epsilon(timesteps, self._alphas_cumprod)
        return torch.ones(timesteps.shape, device=self._device)

    def to_epsilon(self, prediction: Latents, noisy: Latents, timesteps: Timesteps) -> Latents:
        """Return the noise that a native prediction at `noisy` implies."""
        if self._prediction_type == "epsilon":
            return prediction
        return schedule.v_to_epsilon(
            prediction, noisy.to(self._device), timesteps=timesteps, alphas_cumprod=self._alphas_cumprod
        )

    def sampling_timesteps(self, steps: int) -> list[int]:
        """Return the training timestep of each sampling step, falling."""
        return [int(t) for t in self._solver(steps).timesteps]

    def _solver(self, steps: int) -> Any:
        # The stochastic variants of a folder's own DPM-Solver config would draw from the global generator.
        solver = DPMSolverMultistepScheduler.from_config(
            dict(self._parts.scheduler_config), algorithm_type="dpmsolver++"
        )
        solver.set_timesteps(steps, device=self._device)
        return solver

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
        """Denoise with DPM-Solver++ multistep; both branches of the guidance are one concatenated batch.

        At scale 1 without a callback only the prompt's branch is computed. Latents stay float32 between steps.

        Raises:
            SafetyDPOError: if `start_step` leaves no step to run.
        """
        solver = self._solver(steps)
        timesteps = solver.timesteps[start_step:]
        if not 0 <= start_step < len(solver.timesteps):
            raise SafetyDPOError(
                f"expected a start step from 0 to {len(solver.timesteps) - 1}, found {start_step}: "
                "start earlier or use more sampler.steps"
            )
        solver.set_begin_index(start_step)
        latents = initial_latents.to(self._device, torch.float32)
        both = empty.expand(len(latents)).followed_by(prompts)
        for index, timestep in enumerate(timesteps.tolist(), start=start_step):
            if guidance_scale == 1.0 and callback is None:
                combined = self._predict_at(latents, timestep, prompts)
            else:
                predicted = self._predict_at(torch.cat([latents, latents]), timestep, both)
                step = self._guidance_step(index, timestep, latents, predicted, guidance_scale)
                combined = step.combined if callback is None else callback(step)
            latents = solver.step(combined, timesteps[index - start_step], latents, return_dict=False)[0]
        return latents

    def _predict_at(self, latents: Latents, timestep: int, condition: Condition) -> Latents:
        timesteps = torch.full((len(latents),), timestep, device=self._device)
        return self.predict(latents, timesteps, condition).float()

    def _guidance_step(
        self, index: int, timestep: int, latents: Latents, predicted: Tensor, guidance_scale: float
    ) -> GuidanceStep:
        predicted_empty, predicted_prompt = predicted.chunk(2)
        return GuidanceStep(
            index=index,
            timestep=timestep,
            latents=latents,
            predicted_empty=predicted_empty,
            predicted_prompt=predicted_prompt,
            guidance_scale=guidance_scale,
            predict=lambda condition: self._predict_at(latents, timestep, condition.expand(len(latents))),
        )

    def install_adapter(self, signature: LoraSignature) -> None:
        """Put the adapter slot in, with all tensors zero."""
        self._slot.install(signature)

    def load_adapter(self, layers: Mapping[str, LoraLayer], *, scale: float = 1.0) -> None:
        """Overwrite the slot; see `AdapterSlot.load`."""
        self._slot.load(layers, scale=scale)

    def swap_adapter(self, signature: LoraSignature, layers: Mapping[str, LoraLayer]) -> None:
        """Draw with `layers` from now on; see `AdapterSlot.swap`."""
        self._slot.swap(signature, layers)

    def export_adapter(self) -> dict[str, LoraLayer]:
        """Return copies of the slot's layers with every scale folded into `up`."""
        return self._slot.export()

    def adapter_parameters(self) -> list[tuple[str, Tensor]]:
        """Return the slot's trainable tensors with names, in a fixed order."""
        return self._slot.parameters()

    def adapter_off(self) -> AbstractContextManager[None]:
        """Compute with the base alone inside this context."""
        return self._slot.off()

    def remove_adapter(self) -> None:
        """Take the slot out."""
        self._slot.remove()

    def layer_weight(self, module: str) -> Tensor:
        """Return the live base weight of a linear layer."""
        return self._slot.weight(module)

    def named_linear_layers(self, suffixes: Sequence[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (module name, (d_in, d_out)) of the U-Net's linear layers whose name ends in a suffix."""
        return self._slot.shapes(suffixes)

    @contextmanager
    def layer_inputs(self, modules: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
        """Record the first input of the named modules at every call inside this context (detached, on device).

        Raises:
            SafetyDPOError: if the U-Net has no module of that name.
        """
        known = dict(self._unet.named_modules())
        for name in modules:
            if name not in known:
                raise SafetyDPOError(
                    f"expected the name of a module of the U-Net, found {name!r}: "
                    "list the names with named_linear_layers"
                )
        captured: dict[str, list[Tensor]] = {name: [] for name in modules}
        handles = [known[name].register_forward_pre_hook(_recorder(captured[name])) for name in captured]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def _recorder(into: list[Tensor]) -> Any:
    def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        into.append(inputs[0].detach())

    return record
