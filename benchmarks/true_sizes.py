"""SD1.5 and SDXL of their true sizes with random weights, in diffusers format: speed does not depend on values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.sd15_models import TOKENS, sd15_unet, sd15_vae
from tests.tiny import build_tokenizer

_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

CLIP_LARGE = {"width": 768, "layers": 12}
CLIP_GIANT = {"width": 1280, "layers": 32}


@dataclass(frozen=True)
class TrueSize:
    """A model family at the size of its release, and what is asked of it on an H100."""

    picture: int
    """Height and width in pixels."""
    steps: int
    """Sampling steps of a picture."""
    build: Callable[[Path, torch.dtype, str], None]


def _tokenizer() -> CLIPTokenizer:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    return tokenizer


def _clip(tokenizer: CLIPTokenizer, *, width: int, layers: int) -> CLIPTextConfig:
    # The vocabulary is small: rows of the table are looked up, not multiplied.
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )


def build_sd15(folder: Path, dtype: torch.dtype, device: str) -> None:
    """Write an SD1.5, drawn on `device`, for pictures of 512 x 512."""
    tokenizer = _tokenizer()
    with torch.device(device):
        unet, vae, text = sd15_unet(), sd15_vae(), CLIPTextModel(_clip(tokenizer, **CLIP_LARGE))
    StableDiffusionPipeline(
        vae=vae.to(dtype),
        text_encoder=text.to(dtype),
        tokenizer=tokenizer,
        unet=unet.to(dtype),
        scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build_sdxl(folder: Path, dtype: torch.dtype, device: str) -> None:
    """Write an SDXL, drawn on `device`, for pictures of 1024 x 1024."""
    tokenizer = _tokenizer()
    with torch.device(device):
        unet = UNet2DConditionModel(**SDXL_UNET)
        vae: AutoencoderKL = sd15_vae()
        vae.register_to_config(scaling_factor=0.13025, sample_size=1024)
        one = CLIPTextModel(_clip(tokenizer, **CLIP_LARGE))
        two = CLIPTextModelWithProjection(_clip(tokenizer, **CLIP_GIANT))
    StableDiffusionXLPipeline(
        vae=vae.to(dtype),
        text_encoder=one.to(dtype),
        text_encoder_2=two.to(dtype),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.to(dtype),
        scheduler=EulerDiscreteScheduler(**_BETAS),
        add_watermarker=False,
    ).save_pretrained(folder)


SIZES = {"sd15": TrueSize(512, 50, build_sd15), "sdxl": TrueSize(1024, 30, build_sdxl)}
