"""FLUX.1: transformer on packed latents, T5 tokens and CLIP's pooled features, flow matching.

`dev` is guidance-distilled: it is told the guidance scale. `schnell` is not, and draws without guidance.

Axis legend: `batch` pictures, `channel height width` latent axes, `patch` 2 x 2 latent pixels, row by row,
`packed` channels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.latent_model import LatentModel, Latents, Timesteps, require_pooled
from safetydpo.diffusion.parts import EncoderSlot
from safetydpo.diffusion.process import FlowMatching
from safetydpo.diffusion.text import PromptTokens

DEV_TOKENS = 512
SCHNELL_TOKENS = 256
DEFAULT_GUIDANCE = 3.5
"""What `dev` is told where nothing else is said, as in training: the default of its diffusers pipeline."""


class Flux(LatentModel):
    """A frozen FLUX.1 model with one adapter slot in its transformer."""

    denoiser = "transformer"
    patch = 2
    network_class = FluxTransformer2DModel
    text_encoders = (
        EncoderSlot("text_encoder", CLIPTextModel, "tokenizer", CLIPTokenizer),
        EncoderSlot("text_encoder_2", T5EncoderModel, "tokenizer_2", T5TokenizerFast),
    )

    @classmethod
    def _open_process(cls, scheduler_config: Mapping[str, Any], device: torch.device) -> FlowMatching:
        return FlowMatching(scheduler_config, device=device, first_sigmas="linear")

    @classmethod
    def _max_tokens(cls, slot: EncoderSlot, config: Mapping[str, Any]) -> int | None:
        if slot.encoder == "text_encoder":
            return None
        return DEV_TOKENS if config["guidance_embeds"] else SCHNELL_TOKENS

    @property
    def guidance_is_embedded(self) -> bool:
        """Return whether this is a guidance-distilled model (dev)."""
        return bool(self._denoiser.config.guidance_embeds)

    @property
    def _num_channels(self) -> int:
        return int(self._denoiser.config.in_channels) // self.patch**2

    def _condition(self, prompts: Sequence[PromptTokens]) -> Condition:
        clip, t5 = self._towers
        return Condition(tokens=t5.run(prompts[1])[0], pooled=clip.run(prompts[0]).pooler_output)

    def _guidance(self, prompts: Condition, guidance_scale: float) -> tuple[Callable[[Condition], Condition], float]:
        if not self.guidance_is_embedded:
            return super()._guidance(prompts, guidance_scale)
        told = prompts.guidance
        if told is None:
            told, guidance_scale = torch.full((len(prompts.tokens),), guidance_scale), 1.0

        def complete(condition: Condition) -> Condition:
            if condition.guidance is not None:
                return condition
            if len(told) == 1:
                return replace(condition, guidance=told.expand(len(condition.tokens)))
            return replace(condition.expand(len(told)), guidance=told)

        return complete, guidance_scale

    def _forward(self, latents: Latents, network_times: Timesteps, condition: Condition) -> Latents:
        height, width = latents.shape[-2:]
        rows, columns = height // self.patch, width // self.patch
        guidance = condition.guidance
        if self.guidance_is_embedded:
            guidance = torch.full((len(latents),), DEFAULT_GUIDANCE) if guidance is None else guidance
            guidance = guidance.to(self._device, torch.float32)
        tokens = condition.tokens.to(self._device, self._dtype)
        output: Tensor = self._denoiser(
            hidden_states=pack_latents(latents.to(self._device, self._dtype)),
            # The network multiplies by 1000 itself.
            timestep=network_times.to(self._device, self._dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=tokens,
            pooled_projections=require_pooled(condition).to(self._device, self._dtype),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=self._device, dtype=self._dtype),
            img_ids=picture_ids(rows, columns).to(self._device, self._dtype),
            return_dict=False,
        )[0]
        return unpack_latents(output, height=height, width=width)


def pack_latents(latents: Latents) -> Float[Tensor, "batch patch packed"]:
    """Return 2 x 2 latent pixels as one patch, channel by channel, patches row by row."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(packed: Float[Tensor, "batch patch packed"], *, height: int, width: int) -> Latents:
    """Return the latents of `height` x `width` that were packed: the inverse of `pack_latents`."""
    batch, _, channels = packed.shape
    patches = packed.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def picture_ids(rows: int, columns: int) -> Float[Tensor, "patch 3"]:
    """Return (0, row, column) of every patch, row by row."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.nn.functional.pad(places, (1, 0)).float()
