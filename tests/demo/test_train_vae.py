"""The autoencoder's arithmetic and the latents of the one that ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from safetydpo.demo.train_vae import decode_all, encode_all, fold_affine, load_vae, to_bytes, to_unit_range
from safetydpo.errors import SafetyDPOError


def test_bytes_and_unit_range_are_inverse() -> None:
    """0 -> -1, 255 -> 1, and every byte comes back."""
    pictures = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    floats = to_unit_range(pictures)
    assert (floats.min().item(), floats.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_bytes(floats), pictures)


def test_folded_affine_standardises() -> None:
    """An output 4 with mean 2 and deviation 0.5 becomes (4 - 2) / 0.5 = 4; here weight 1 x input 3 + bias 1 = 4."""
    layer = nn.Conv2d(1, 1, 1)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)  # type: ignore[arg-type]
    fold_affine(layer, torch.tensor([2.0]), torch.tensor([0.5]))
    assert layer(torch.full((1, 1, 1, 1), 3.0)).item() == 4.0


def test_a_layer_without_bias_is_refused() -> None:
    with pytest.raises(SafetyDPOError, match="expected the encoder's last layer to have a bias"):
        fold_affine(nn.Conv2d(1, 1, 1, bias=False), torch.zeros(1), torch.ones(1))


def test_shipped_latents_have_unit_variance_and_pictures_come_back() -> None:
    sheet = np.asarray(Image.open(Path(__file__).with_name("drawings.png")).convert("RGB"))
    tiles = sheet.reshape(-1, 32, 16, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    pictures = torch.from_numpy(tiles[:128].copy())
    vae = load_vae()
    latents = encode_all(vae, pictures)
    assert latents.shape == (128, 16, 8, 8)
    deviation = latents.std(dim=(0, 2, 3))
    assert 0.85 < deviation.min().item() < deviation.max().item() < 1.15
    restored = decode_all(vae, latents)
    assert functional.mse_loss(to_unit_range(restored), to_unit_range(pictures)).item() < 0.015
