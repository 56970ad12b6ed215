"""A tiny random but real text-to-image model in the true diffusers folder format.

Pictures of 32 x 32, latents of 4 x 8 x 8, epsilon prediction, about 0.4 M parameters: real networks for fast
tests, so that nothing has to be mocked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PICTURE_SIZE = 32
MAX_TOKENS = 16
WIDTH_TEXT = 32
WORDS = (
    "a",
    "of",
    "on",
    "red",
    "blue",
    "green",
    "ball",
    "bomb",
    "house",
    "flower",
    "drawing",
    "dagger",
    "photo",
)


def build_tokenizer() -> CLIPTokenizer:
    """Return CLIP's byte-level BPE tokenizer with single bytes, their word-final forms and a dozen whole words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        left = parts[0]
        for right in parts[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens = list(dict.fromkeys(tokens))
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_tiny_model(
    folder: Path,
    *,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    autoencoder: Literal["tiny", "kl"] = "tiny",
    seed: int = 0,
) -> None:
    """Write the model into `folder` as `StableDiffusionPipeline.save_pretrained` does; equal seeds, equal bytes."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH_TEXT,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                projection_dim=WIDTH_TEXT,
            )
        )
        vae = _build_autoencoder(autoencoder)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=WIDTH_TEXT,
            norm_num_groups=8,
        )
        _make_sensitive(text_encoder, unet)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def _build_autoencoder(kind: Literal["tiny", "kl"]) -> AutoencoderTiny | AutoencoderKL:
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(16, 16, 16),
            decoder_block_out_channels=(16, 16, 16),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
        )
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        sample_size=PICTURE_SIZE,
    )


def _make_sensitive(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    # Freshly initialised, prompts barely change the prediction; a trained network's do. Larger embeddings and
    # cross-attention outputs give the same structure a visible effect.
    with torch.no_grad():
        text_encoder.embeddings.token_embedding.weight.normal_(std=1.0)
        for name, module in unet.named_modules():
            if name.endswith((".attn2.to_v", ".attn2.to_out.0")):
                module.weight.mul_(3.0)
