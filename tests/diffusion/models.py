"""The models that the tests of this room run on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safetydpo.diffusion.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Model:
    folder: Path
    backbone: StableDiffusion
    size: int

    def noise(self, num_rows: int, *, seed: int = 0) -> Tensor:
        shape = self.backbone.latent_shape(height=self.size, width=self.size)
        return torch.randn(num_rows, *shape, generator=torch.Generator().manual_seed(seed))


def load_model(folder: Path, *, shrink: int | None = None) -> Model:
    backbone = StableDiffusion.from_folder(folder)
    if shrink is None:
        blocks = json.loads((folder / "vae" / "config.json").read_text())["decoder_block_out_channels"]
        shrink = 2 ** (len(blocks) - 1)
    return Model(folder, backbone, json.loads((folder / "unet" / "config.json").read_text())["sample_size"] * shrink)
