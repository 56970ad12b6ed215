"""How far apart two pictures look: distances between what the layers of a network say at each place (LPIPS).

Axis legend: `n` pairs of pictures, `h w` picture axes, `c` channels of a layer.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from safetydpo.errors import SafetyDPOError
from safetydpo.judges.clip import ClipScorer
from safetydpo.judges.convolutions import (
    CHANNELS,
    HEADS_FILE,
    MODEL_FILE,
    SMALLEST_SIDE,
    StackName,
    load_convolutions,
)
from safetydpo.judges.features import read_weights
from safetydpo.judges.layered_distance import layered_distance

PerceptualName = Literal["clip_tower", "alexnet", "vgg16"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class PerceptualDistance(Protocol):
    """A distance between two pictures of one size; its version is raised when the same weights answer differently."""

    name: PerceptualName
    version: str
    weights_sha256: str

    def distance(self, images: UInt8[Tensor, "n h w 3"], others: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, " n"]:
        """Return one distance per pair: 0 for equal pictures, the same from either side."""
        ...


class ClipTowerDistance:
    """Layers of the picture tower of a CLIP model, each patch a position, all layers alike; not LPIPS's networks."""

    name: PerceptualName = "clip_tower"
    version = "1"

    def __init__(self, folder: Path) -> None:
        """Load from a folder in transformers format.

        Raises:
            SafetyDPOError: if there is none.
        """
        self._clip = ClipScorer(folder)
        self.weights_sha256 = hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()

    def distance(self, images: UInt8[Tensor, "n h w 3"], others: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, " n"]:
        """Return one distance per pair, in [0, 4]."""
        own, other = ([layer.mT for layer in self._clip.embed_patches(side)] for side in (images, others))
        return layered_distance(own, other)


class ConvolutionDistance:
    """LPIPS: rectified layers of AlexNet or VGG16, weighted by learned heads, or all alike where there are none."""

    version = "1"

    def __init__(
        self, name: StackName, folder: Path, *, device: str = "cpu", setting: str = "identity.evaluation.measures"
    ) -> None:
        """Load `model.safetensors` (torchvision's names) and, if it is there, `heads.safetensors` (those of lpips).

        Raises:
            SafetyDPOError: if there is no model, or a weight does not fit.
        """
        self.name: PerceptualName = name
        where = (
            f"save torchvision's state dict of {name} there as safetensors, and the heads of lpips beside it as "
            f"{HEADS_FILE}, or name another folder in {setting}.{name}"
        )
        tensors, digest = read_weights(folder / MODEL_FILE, what=name, where=where)
        self._stack = load_convolutions(name, tensors, source=str(folder / MODEL_FILE)).to(device)
        self._heads: list[Tensor] | None = None
        if (folder / HEADS_FILE).is_file():
            heads, of_heads = read_weights(folder / HEADS_FILE, what=f"the heads of {name}", where=where)
            self._heads = [head.to(device) for head in _take_heads(name, heads, source=str(folder / HEADS_FILE))]
            digest = hashlib.sha256(f"{digest} {of_heads}".encode()).hexdigest()
        self.weights_sha256 = digest
        self._smallest = SMALLEST_SIDE[name]
        self._mean, self._deviation = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION)
        )

    @torch.no_grad()
    def distance(self, images: UInt8[Tensor, "n h w 3"], others: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, " n"]:
        """Return one distance per pair.

        Raises:
            SafetyDPOError: if the pictures are too small for the network.
        """
        if min(images.shape[1:3]) < self._smallest:
            raise SafetyDPOError(
                f"expected pictures of {self._smallest} pixels a side or more for {self.name}, found "
                f"{images.shape[1]} x {images.shape[2]}: use clip_tower"
            )
        own, other = ([layer.flatten(2) for layer in self._stack(self._pixels(side))] for side in (images, others))
        return layered_distance(own, other, weights=self._heads).cpu()

    def _pixels(self, images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
        return (images.to(self._mean.device).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._deviation


def _take_heads(name: StackName, tensors: dict[str, Tensor], *, source: str) -> list[Float[Tensor, " c"]]:
    heads = []
    for index, channels in enumerate(CHANNELS[name]):
        key = f"lin{index}.model.1.weight"
        found = None if key not in tensors else tuple(tensors[key].shape)
        if found != (1, channels, 1, 1):
            raise SafetyDPOError(
                f"expected shape (1, {channels}, 1, 1) at {key} in {source}, found {found}: put the heads of lpips "
                f"(v0.1) for {name} there, saved as safetensors, or nothing"
            )
        heads.append(tensors[key].float().flatten())
    return heads


def load_perceptual(name: PerceptualName, folder: Path, *, device: str = "cpu") -> PerceptualDistance:
    """Return a distance whose weights lie in a folder.

    Raises:
        SafetyDPOError: if they do not.
    """
    return ClipTowerDistance(folder) if name == "clip_tower" else ConvolutionDistance(name, folder, device=device)
