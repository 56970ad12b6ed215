from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from safetydpo.artifacts.layout import demo_weights
from safetydpo.diffusion.posterior import check_posterior, require_posterior
from safetydpo.diffusion.stable_diffusion import StableDiffusion
from safetydpo.errors import UsageError
from tests.tiny import PICTURE_SIZE, build_tiny_model

REFUSED = (
    r"^expected an autoencoder with a posterior for identity\.pairs\.latents mean_and_deviation, found "
    r"AutoencoderTiny, which gives latents only: set identity\.pairs\.latents=mean or use another model$"
)


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    build_tiny_model(folder, autoencoder="kl")
    return folder


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, PICTURE_SIZE, PICTURE_SIZE, 3), generator=generator, dtype=torch.uint8)


def test_moments_are_those_of_diffusers(kl_folder: Path, pictures: Tensor):
    """mean and exp(log variance / 2) from the autoencoder's own two halves of channels, times 0.5."""
    means, deviations = StableDiffusion.from_folder(kl_folder).encode_image_moments(pictures)
    autoencoder = AutoencoderKL.from_pretrained(kl_folder / "vae")
    with torch.no_grad():
        pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        halves = autoencoder.quant_conv(autoencoder.encoder(pixels)).chunk(2, dim=1)
    torch.testing.assert_close(means, 0.5 * halves[0])
    torch.testing.assert_close(deviations, 0.5 * (halves[1].clamp(-30, 20) / 2).exp())
    assert means.shape == deviations.shape == (3, 4, 8, 8)
    assert means.dtype == deviations.dtype == torch.float32
    assert (deviations > 0).all()


def test_the_mean_is_what_encoding_gives(kl_folder: Path, pictures: Tensor):
    backbone = StableDiffusion.from_folder(kl_folder)
    assert torch.equal(backbone.encode_image_moments(pictures)[0], backbone.encode_images(pictures))


def test_an_autoencoder_without_a_posterior_is_refused(tiny_folder: Path, pictures: Tensor):
    with pytest.raises(UsageError, match=REFUSED):
        StableDiffusion.from_folder(tiny_folder).encode_image_moments(pictures)


def test_the_same_is_known_from_the_folder_alone(tiny_folder: Path, kl_folder: Path, tmp_path: Path):
    for folder in (tiny_folder, demo_weights() / "base"):
        with pytest.raises(UsageError, match=REFUSED):
            check_posterior(folder / "vae")
    check_posterior(kl_folder / "vae")
    check_posterior(tmp_path)  # nothing to look at: the loaded model will say
    require_posterior("AutoencoderKL")
