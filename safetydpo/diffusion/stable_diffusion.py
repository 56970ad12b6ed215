"""Stable Diffusion 1.x and 2.x shaped models: U-Net, one CLIP text encoder, noise or v-prediction.

Axis legend: `batch` pictures, `step` training timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.latent_model import LatentModel, Latents, Timesteps
from safetydpo.diffusion.parts import EncoderSlot
from safetydpo.diffusion.process import Diffusion
from safetydpo.diffusion.text import PromptTokens


class StableDiffusion(LatentModel):
    """A frozen Stable Diffusion 1.x or 2.x model with one adapter slot in its U-Net."""

    denoiser = "unet"
    network_class = UNet2DConditionModel
    text_encoders = (EncoderSlot("text_encoder", CLIPTextModel, "tokenizer", CLIPTokenizer),)

    @classmethod
    def _open_process(cls, scheduler_config: Mapping[str, Any], device: torch.device) -> Diffusion:
        return Diffusion(scheduler_config, device=device)

    @property
    def alphas_cumprod(self) -> Float[Tensor, " step"]:
        """Return the share of signal variance at every training timestep."""
        process = self._process
        assert isinstance(process, Diffusion)
        return process.alphas_cumprod

    def _condition(self, prompts: Sequence[PromptTokens]) -> Condition:
        (tokens,) = prompts
        return Condition(tokens=self._towers[0].run(tokens)[0])

    def _forward(self, latents: Latents, network_times: Timesteps, condition: Condition) -> Latents:
        output: Tensor = self._denoiser(
            latents.to(self._device, self._dtype),
            network_times.to(self._device),
            encoder_hidden_states=condition.tokens.to(self._device, self._dtype),
            return_dict=False,
        )[0]
        return output
