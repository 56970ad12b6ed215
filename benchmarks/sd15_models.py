"""Models with random weights for measurements of training: SD1.5 itself, and a small one of its proportions of work.

Speed and memory do not depend on the values of weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.harness import count_operations

TOKENS = 77
SMALL_PICTURE = 128
SD15_PROPORTION = 1.12 / 0.80
"""Operations of the encoder on one picture of SD1.5 (512 x 512) over those of a forward pass of its U-Net."""
_UNET_BLOCKS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 8,
}
_VAE_BLOCKS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def sd15_unet() -> UNet2DConditionModel:
    """Return a U-Net of SD1.5's configuration (860 million parameters)."""
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, **_UNET_BLOCKS
    )


def sd15_vae() -> AutoencoderKL:
    """Return an autoencoder of SD1.5's configuration (84 million parameters)."""
    return AutoencoderKL(sample_size=512, block_out_channels=(128, 256, 512, 512), **_VAE_BLOCKS)


def sd15_unet_of(divisor: int, picture: int) -> UNet2DConditionModel:
    """Return a U-Net of SD1.5's shape with a part of its channels, for pictures of that many pixels a side."""
    return UNet2DConditionModel(
        sample_size=picture // 8,
        block_out_channels=tuple(channels // divisor for channels in (320, 640, 1280, 1280)),
        cross_attention_dim=768 // divisor,
        norm_num_groups=16,
        **_UNET_BLOCKS,
    )


def sd15_vae_of(divisor: int, picture: int) -> AutoencoderKL:
    """Return an autoencoder of SD1.5's shape with a part of its channels."""
    return AutoencoderKL(
        sample_size=picture,
        block_out_channels=tuple(channels // divisor for channels in (128, 256, 512, 512)),
        norm_num_groups=8,
        **_VAE_BLOCKS,
    )


def sd15_text_encoder() -> CLIPTextModel:
    """Return a text encoder of SD1.5's configuration (123 million parameters)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=TOKENS,
            projection_dim=768,
        )
    )


def small_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the text encoder of the small model."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=64,
        )
    )


def small_unet() -> UNet2DConditionModel:
    """Return the U-Net of the small model: SD1.5's with a quarter of its channels."""
    return UNet2DConditionModel(
        sample_size=SMALL_PICTURE // 8,
        block_out_channels=(80, 160, 320, 320),
        cross_attention_dim=64,
        norm_num_groups=16,
        **_UNET_BLOCKS,
    )


def small_vae() -> AutoencoderKL:
    """Return the autoencoder of the small model."""
    # 116 channels where a quarter would be 128, so that the encoder's share of the work is SD1.5's.
    return AutoencoderKL(
        sample_size=SMALL_PICTURE, block_out_channels=(32, 64, 116, 116), norm_num_groups=4, **_VAE_BLOCKS
    )


def build_small_sd15(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Write an SD1.5 with a quarter of its channels, for pictures of 128 x 128, in diffusers format."""
    torch.manual_seed(0)
    text_encoder, unet, vae = small_text_encoder(tokenizer), small_unet(), small_vae()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def operations(network: nn.Module, *inputs: Any) -> int:
    """Return the floating-point operations of one forward pass (a multiply-add counts two)."""
    with torch.no_grad():
        return count_operations(lambda: network(*inputs))
