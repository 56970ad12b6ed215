"""Adapters on networks of the released models' own sizes, on the meta device: shapes without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from benchmarks.true_sizes import SDXL_UNET
from safetydpo.artifacts.adapters import LoraSignature
from safetydpo.config.training import LoraConfig
from safetydpo.diffusion.adapter import AdapterSlot

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
STABLE_DIFFUSION: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": DOWN,
    "up_block_types": UP,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
STABLE_DIFFUSION_2 = STABLE_DIFFUSION | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}


@pytest.mark.parametrize(
    ("network", "config", "parameters", "adapted"),
    [
        # Parameters of the released networks: 860 million, 866 million, 2.6 billion, 2.2 billion, 11.9 billion.
        (UNet2DConditionModel, STABLE_DIFFUSION, 859_520_964, 797_184),
        (UNet2DConditionModel, STABLE_DIFFUSION_2, 865_910_724, 829_952),
        (UNet2DConditionModel, SDXL_UNET, 2_567_463_684, 5_806_080),
        (SD3Transformer2DModel, SD35_MEDIUM, None, 1_818_624),
        (FluxTransformer2DModel, FLUX, 11_901_408_320, 4_669_440),
    ],
    ids=["sd15", "sd21", "sdxl", "sd35", "flux"],
)
def test_trainable_parameters_at_rank_4(
    network: Callable[..., torch.nn.Module], config: dict[str, Any], parameters: int | None, adapted: int
) -> None:
    """Of each adapted layer rank x (d_in + d_out); for FLUX 4 x 6,144 x (19 x 4 + 38 x 3) = 4,669,440."""
    with torch.device("meta"):
        model = network(**config)
    assert parameters is None or sum(tensor.numel() for tensor in model.parameters()) == parameters
    signature = LoraSignature(rank=4, alpha=4.0, targets=LoraConfig().targets)
    slot = AdapterSlot(model)
    assert sum(4 * (d_in + d_out) for _, (d_in, d_out) in slot.shapes(signature.targets)) == adapted
    model.requires_grad_(False)
    with torch.device("meta"):
        slot.install(signature)
    assert sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad) == adapted
