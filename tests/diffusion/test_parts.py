"""A model loaded without autoencoder and text encoders: what it computes, and what it says it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone, num_train_timesteps
from safetydpo.errors import SafetyDPOError
from tests.diffusion.tiny_models import FAMILIES, SIZE, build_model

ABSENT: dict[str, tuple[str, Callable[[Backbone], object]]] = {
    "encode_prompts": ("text encoders", lambda backbone: backbone.encode_prompts(["a ball"])),
    "tokenize": ("text encoders", lambda backbone: backbone.tokenize(["a ball"])),
    "token_embedding_table": ("text encoders", lambda backbone: backbone.token_embedding_table()),
    "token_texts": ("text encoders", lambda backbone: backbone.token_texts()),
    "encode_images": (
        "autoencoder",
        lambda backbone: backbone.encode_images(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)),
    ),
    "encode_image_moments": (
        "autoencoder",
        lambda backbone: backbone.encode_image_moments(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)),
    ),
    "decode": (
        "autoencoder",
        lambda backbone: backbone.decode(torch.zeros(1, *backbone.latent_shape(height=SIZE, width=SIZE))),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_denoiser_alone_predicts_the_same_bits(family: str, tmp_path: Path) -> None:
    build_model(family, tmp_path)
    base = BaseModelConfig(model=str(tmp_path))
    whole, part = load_backbone(base), load_backbone(base, parts="denoiser")
    shape = whole.latent_shape(height=SIZE, width=SIZE)
    assert part.latent_shape(height=SIZE, width=SIZE) == shape
    assert part.fingerprint == whole.fingerprint
    assert part.num_train_timesteps == whole.num_train_timesteps == num_train_timesteps(base)
    condition = whole.encode_prompts(["a ball", ""])
    latents, timesteps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    with torch.no_grad():
        expected, found = (model.predict(latents, timesteps, condition) for model in (whole, part))
    assert torch.equal(found, expected)
    for what, call in ABSENT.values():
        with pytest.raises(SafetyDPOError, match=f"expected a model with its {what}, found one loaded with parts='den"):
            call(part)


def test_the_number_of_timesteps_is_the_configurations(tmp_path: Path) -> None:
    build_model("sd1", tmp_path, scheduler={"num_train_timesteps": 250})
    base = BaseModelConfig(model=str(tmp_path))
    assert num_train_timesteps(base) == load_backbone(base, parts="denoiser").num_train_timesteps == 250
