"""Pictures for the judges: drawings as the autoencoder shows them, and what counts as unrecognisable.

Without the class `unrecognisable` a judge would have to name a concept in mush, most often a safe one, and a broken
model would look safe.

Axis legend: n = pictures, c = latent channels, h = w = 32 pixels, u = v = 8 latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS
from safetydpo.demo.drawings import draw_many, every_drawing
from safetydpo.demo.train_vae import decode_all, encode_all
from safetydpo.seeding import derive_numpy, derive_torch

NO_BACKGROUND = -100
"""Background label of pictures that have none; cross-entropy ignores it."""
RECOGNISABLE_NOISE = (0.0, 0.15, 0.3)
"""Standard deviations of the noise on a drawing's latents that leave it recognisable."""


@dataclass(frozen=True)
class JudgePictures:
    """Pictures with the concept class (the last is `unrecognisable`) and the background class of each."""

    pictures: UInt8[Tensor, "n h w 3"]
    concepts: Int[Tensor, " n"]
    backgrounds: Int[Tensor, " n"]


def join(parts: Sequence[JudgePictures]) -> JudgePictures:
    """Put sets of pictures one after another."""
    return JudgePictures(
        pictures=torch.cat([part.pictures for part in parts]),
        concepts=torch.cat([part.concepts for part in parts]),
        backgrounds=torch.cat([part.backgrounds for part in parts]),
    )


def make_drawings(draw_seeds: Sequence[int]) -> JudgePictures:
    """Draw every concept on every background once per draw seed."""
    rows = every_drawing(CONCEPTS, draw_seeds)
    places = {concept.key: index for index, concept in enumerate(CONCEPTS)}
    names = list(BACKGROUNDS)
    return JudgePictures(
        pictures=torch.from_numpy(draw_many(rows)),
        concepts=torch.tensor([places[concept.key] for concept, _, _ in rows]),
        backgrounds=torch.tensor([names.index(background) for _, background, _ in rows]),
    )


def pass_through_vae(
    drawings: JudgePictures, vae: AutoencoderTiny, *, noise: float, generator: torch.Generator
) -> JudgePictures:
    """Show drawings as the autoencoder gives them back from slightly noisy latents."""
    latents = encode_all(vae, drawings.pictures)
    noisy = latents + noise * torch.randn(latents.shape, generator=generator)
    return JudgePictures(decode_all(vae, noisy), drawings.concepts, drawings.backgrounds)


def make_recognisable(draw_seeds: Sequence[int], vae: AutoencoderTiny, *, run_seed: int) -> JudgePictures:
    """Give drawings raw, and through the autoencoder at each of `RECOGNISABLE_NOISE`."""
    drawings = make_drawings(draw_seeds)
    shown = [
        pass_through_vae(
            drawings, vae, noise=noise, generator=derive_torch(run_seed, "demo/judge/recognisable", str(noise))
        )
        for noise in RECOGNISABLE_NOISE
    ]
    return join([drawings, *shown])


def make_unrecognisable(
    drawings: JudgePictures, vae: AutoencoderTiny, *, num_each: int, run_seed: int
) -> JudgePictures:
    """Make `num_each` pictures of each kind of mush out of noise and drawings."""
    numbers = derive_numpy(run_seed, "demo/judge/unrecognisable", "numbers")
    generator = derive_torch(run_seed, "demo/judge/unrecognisable", "latents")
    first, second = _draw_unlike(drawings, num_each, numbers)
    kinds = [
        torch.from_numpy(_make_noise(num_each, numbers)),
        decode_all(vae, _random_latents(num_each, generator)),
        _blend_pictures(drawings.pictures[first], drawings.pictures[second], numbers),
        _blend_latents(vae, drawings.pictures[first], drawings.pictures[second], generator),
        torch.from_numpy(_shuffle_tiles(drawings.pictures[first].numpy(), numbers)),
        torch.from_numpy(_blur(drawings.pictures[second].numpy(), numbers)),
        _halves(drawings.pictures[first], drawings.pictures[second], numbers),
        torch.from_numpy(_make_plain(num_each, numbers)),
    ]
    return label_unrecognisable(torch.cat(kinds))


def label_unrecognisable(pictures: UInt8[Tensor, "n h w 3"]) -> JudgePictures:
    """Label pictures as `unrecognisable` and without background."""
    return JudgePictures(
        pictures=pictures,
        concepts=torch.full((len(pictures),), len(CONCEPTS)),
        backgrounds=torch.full((len(pictures),), NO_BACKGROUND),
    )


def _draw_unlike(drawings: JudgePictures, num_rows: int, numbers: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw row numbers of pairs of drawings that show different concepts."""
    first = torch.from_numpy(numbers.integers(len(drawings.concepts), size=num_rows))
    second = torch.from_numpy(numbers.integers(len(drawings.concepts), size=num_rows))
    same = drawings.concepts[first] == drawings.concepts[second]
    second = torch.where(same, (second + len(BACKGROUNDS)) % len(drawings.concepts), second)
    return first, second


def _make_noise(num_rows: int, numbers: np.random.Generator) -> UInt8[np.ndarray, "n h w 3"]:
    """Make noise pictures: white noise enlarged from 4 to 32 pixels a side, around a random colour."""
    pictures = np.empty((num_rows, 32, 32, 3), dtype=np.uint8)
    for row in range(num_rows):
        edge = int(numbers.choice([4, 8, 16, 32]))
        colour = numbers.uniform(30, 225, size=3)
        field = numbers.normal(colour, numbers.uniform(20, 90), size=(edge, edge, 3)).clip(0, 255)
        image = Image.fromarray(field.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        pictures[row] = np.asarray(image)
    return pictures


def _random_latents(num_rows: int, generator: torch.Generator) -> Float[Tensor, "n c u v"]:
    """Draw latents of unit variance, half of them smoothed over space, of random strength."""
    latents = torch.randn((num_rows, 16, 8, 8), generator=generator)
    smooth = torch.nn.functional.avg_pool2d(latents, 3, stride=1, padding=1) * 3.0
    half = num_rows // 2
    strength = 0.6 + 0.9 * torch.rand((num_rows, 1, 1, 1), generator=generator)
    return torch.cat([latents[:half], smooth[half:]]) * strength


def _blend_pictures(
    first: UInt8[Tensor, "n h w 3"], second: UInt8[Tensor, "n h w 3"], numbers: np.random.Generator
) -> UInt8[Tensor, "n h w 3"]:
    share = torch.from_numpy(numbers.uniform(0.42, 0.58, size=(len(first), 1, 1, 1)))
    return (share * first + (1 - share) * second).round().to(torch.uint8)


def _blend_latents(
    vae: AutoencoderTiny,
    first: UInt8[Tensor, "n h w 3"],
    second: UInt8[Tensor, "n h w 3"],
    generator: torch.Generator,
) -> UInt8[Tensor, "n h w 3"]:
    """Decode blends of two drawings' latents, or a drawing's latents drowned in noise, half and half."""
    latents, others = encode_all(vae, first), encode_all(vae, second)
    others[::2] = torch.randn(others[::2].shape, generator=generator)
    share = 0.42 + 0.16 * torch.rand((len(first), 1, 1, 1), generator=generator)
    share[::2] -= 0.12
    return decode_all(vae, share * latents + (1 - share) * others)


def _shuffle_tiles(pictures: UInt8[np.ndarray, "n h w 3"], numbers: np.random.Generator) -> np.ndarray:
    """Cut every picture into 16 or 64 tiles and shuffle them."""
    shuffled = np.empty_like(pictures)
    for row, picture in enumerate(pictures):
        edge = int(numbers.choice([4, 8]))
        count = 32 // edge
        tiles = picture.reshape(count, edge, count, edge, 3).swapaxes(1, 2).reshape(-1, edge, edge, 3)
        tiles = tiles[numbers.permutation(len(tiles))].reshape(count, count, edge, edge, 3)
        shuffled[row] = tiles.swapaxes(1, 2).reshape(32, 32, 3)
    return shuffled


def _blur(pictures: UInt8[np.ndarray, "n h w 3"], numbers: np.random.Generator) -> np.ndarray:
    """Blur every picture until a person cannot name it (standard deviation 5 to 9 pixels)."""
    radii = numbers.uniform(5, 9, size=len(pictures))
    return np.stack(
        [
            np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(float(radius))))
            for picture, radius in zip(pictures, radii, strict=True)
        ]
    )


def _halves(
    first: UInt8[Tensor, "n h w 3"], second: UInt8[Tensor, "n h w 3"], numbers: np.random.Generator
) -> UInt8[Tensor, "n h w 3"]:
    """Put halves of two drawings together, side by side or one above the other."""
    joined = first.clone()
    below = torch.from_numpy(numbers.random(len(first)) < 0.5)
    joined[below, 16:] = second[below, 16:]
    joined[~below, :, 16:] = second[~below, :, 16:]
    return joined


def _make_plain(num_rows: int, numbers: np.random.Generator) -> UInt8[np.ndarray, "n h w 3"]:
    """Make empty pictures: one colour, half of them a background's, with faint noise."""
    colours = np.array(list(BACKGROUNDS.values()), dtype=np.float64)[numbers.integers(8, size=num_rows)]
    colours[::2] = numbers.uniform(0, 255, size=(len(colours[::2]), 3))
    noise = numbers.normal(0, 4, size=(num_rows, 32, 32, 3))
    return (colours[:, None, None, :] + noise).clip(0, 255).astype(np.uint8)
