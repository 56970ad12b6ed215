"""Experts of random numbers with the shapes of real ones: rank 4 on every attention of a U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, LoraSignature
from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.merging.merge import Expert

RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
METADATA = AdapterMetadata("0" * 64, LoraSignature(RANK, float(RANK), TARGETS), categories=("hate",))
SD15: Mapping[str, Any] = {"cross_attention_dim": 768}
SDXL: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def layer_shapes(unet: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return {layer: (d_in, d_out)} of the LoRA targets of a U-Net, without its weights."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**unet)
    return dict(AdapterSlot(network).shapes(TARGETS))


def make_layers(shapes: Mapping[str, tuple[int, int]], seed: int) -> dict[str, LoraLayer]:
    """Return random layers of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator))
        for name, (d_in, d_out) in shapes.items()
    }


def make_experts(shapes: Mapping[str, tuple[int, int]], num: int) -> list[Expert]:
    """Return random experts; their hashes are made up."""
    return [Expert(f"expert{seed}", f"{seed:064d}", make_layers(shapes, seed), METADATA) for seed in range(num)]
