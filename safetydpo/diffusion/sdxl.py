"""Stable Diffusion XL: U-Net, two CLIP text encoders, conditioned on sizes; noise or v-prediction.

Axis legend: `batch` pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.latent_model import LatentModel, Latents, Timesteps, require_pooled
from safetydpo.diffusion.parts import EncoderSlot
from safetydpo.diffusion.process import Diffusion
from safetydpo.diffusion.text import PromptTokens


class StableDiffusionXL(LatentModel):
    """A frozen Stable Diffusion XL model with one adapter slot in its U-Net."""

    denoiser = "unet"
    network_class = UNet2DConditionModel
    text_encoders = (
        EncoderSlot("text_encoder", CLIPTextModel, "tokenizer", CLIPTokenizer),
        EncoderSlot("text_encoder_2", CLIPTextModelWithProjection, "tokenizer_2", CLIPTokenizer),
    )

    @classmethod
    def _open_process(cls, scheduler_config: Mapping[str, Any], device: torch.device) -> Diffusion:
        return Diffusion(scheduler_config, device=device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Condition:
        """Encode prompts: penultimate states of both encoders side by side, pooled features of the second.

        An empty text gives zeros if the model's `force_zeros_for_empty_prompt` says so: the unguided branch that it
        was trained with.
        """
        condition = super().encode_prompts(texts)
        if not self._parts.index.get("force_zeros_for_empty_prompt", True):
            return condition
        is_empty = torch.tensor([not text for text in texts], device=self._device)
        return condition.map(lambda value: value.masked_fill(is_empty.reshape(-1, *(1,) * (value.ndim - 1)), 0.0))

    def _condition(self, prompts: Sequence[PromptTokens]) -> Condition:
        outputs = [
            tower.run(tokens, output_hidden_states=True) for tower, tokens in zip(self._towers, prompts, strict=True)
        ]
        return Condition(
            tokens=torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), pooled=outputs[1].text_embeds
        )

    def _forward(self, latents: Latents, network_times: Timesteps, condition: Condition) -> Latents:
        pooled = require_pooled(condition)
        sizes = self._sizes(latents) if condition.sizes is None else condition.sizes
        output: Tensor = self._denoiser(
            latents.to(self._device, self._dtype),
            network_times.to(self._device),
            encoder_hidden_states=condition.tokens.to(self._device, self._dtype),
            added_cond_kwargs={
                "text_embeds": pooled.to(self._device, self._dtype),
                "time_ids": sizes.to(self._device, self._dtype),
            },
            return_dict=False,
        )[0]
        return output

    def _sizes(self, latents: Latents) -> Float[Tensor, "batch 6"]:
        height, width = (self._shrink * side for side in latents.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]]).float().expand(len(latents), -1)
