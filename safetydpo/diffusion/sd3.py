"""Stable Diffusion 3 and 3.5: transformer, two CLIP text encoders and an optional T5, flow matching.

Axis legend: `batch` pictures, `token` prompt tokens, `width_text` text features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.latent_model import LatentModel, Latents, Timesteps, require_pooled
from safetydpo.diffusion.parts import EncoderSlot
from safetydpo.diffusion.process import FlowMatching
from safetydpo.diffusion.text import PromptTokens

T5_TOKENS = 256
"""Tokens of the T5 part, as in the diffusers pipeline; without a T5 encoder they are zeros."""


class StableDiffusion3(LatentModel):
    """A frozen Stable Diffusion 3 or 3.5 model with one adapter slot in its transformer."""

    denoiser = "transformer"
    patch = 2
    network_class = SD3Transformer2DModel
    text_encoders = (
        EncoderSlot("text_encoder", CLIPTextModelWithProjection, "tokenizer", CLIPTokenizer),
        EncoderSlot("text_encoder_2", CLIPTextModelWithProjection, "tokenizer_2", CLIPTokenizer),
        EncoderSlot("text_encoder_3", T5EncoderModel, "tokenizer_3", T5TokenizerFast, is_optional=True),
    )

    @classmethod
    def _open_process(cls, scheduler_config: Mapping[str, Any], device: torch.device) -> FlowMatching:
        return FlowMatching(scheduler_config, device=device, first_sigmas="scheduler")

    @classmethod
    def _max_tokens(cls, slot: EncoderSlot, config: Mapping[str, Any]) -> int | None:  # noqa: ARG003
        return T5_TOKENS if slot.encoder == "text_encoder_3" else None

    def _condition(self, prompts: Sequence[PromptTokens]) -> Condition:
        outputs = [
            tower.run(tokens, output_hidden_states=True)
            for tower, tokens in zip(self._towers[:2], prompts[:2], strict=True)
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        width = int(self._denoiser.config.joint_attention_dim)
        t5 = (
            self._towers[2].run(prompts[2])[0]
            if len(self._towers) > 2
            else torch.zeros(clip.shape[0], T5_TOKENS, width, device=clip.device, dtype=clip.dtype)
        )
        return Condition(
            tokens=torch.cat([nn.functional.pad(clip, (0, width - clip.shape[-1])), t5], dim=-2),
            pooled=torch.cat([output.text_embeds for output in outputs], dim=-1),
        )

    def _forward(self, latents: Latents, network_times: Timesteps, condition: Condition) -> Latents:
        output: Tensor = self._denoiser(
            hidden_states=latents.to(self._device, self._dtype),
            timestep=network_times.to(self._device),
            encoder_hidden_states=condition.tokens.to(self._device, self._dtype),
            pooled_projections=require_pooled(condition).to(self._device, self._dtype),
            return_dict=False,
        )[0]
        return output
