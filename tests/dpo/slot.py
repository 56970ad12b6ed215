"""An adapter slot with a start or with random changes in it."""

from __future__ import annotations

import torch

from safetydpo.artifacts.adapters import LoraLayer
from safetydpo.config.training import LoraConfig
from safetydpo.diffusion.adapter import initial_adapter
from safetydpo.diffusion.backbone import Backbone
from safetydpo.dpo.engine import lora_signature


def start_layers(backbone: Backbone, lora: LoraConfig) -> dict[str, LoraLayer]:
    """Return what training starts from: A drawn, B = 0."""
    signature = lora_signature(lora)
    return initial_adapter(
        backbone.named_linear_layers(signature.targets),
        signature,
        base_fingerprint=backbone.fingerprint,
        run_seed=0,
        init="shared",
        expert_name="hate",
    )


def fill_slot(backbone: Backbone, lora: LoraConfig, *, moved: bool = False) -> None:
    """Install the adapter that training starts from; `moved` draws a random B in place of zeros."""
    backbone.install_adapter(lora_signature(lora))
    backbone.load_adapter(start_layers(backbone, lora))
    if moved:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in backbone.adapter_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
