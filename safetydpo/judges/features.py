"""Networks that turn a picture into the numbers that distances between sets of pictures compare.

Axis legend: `n` pictures, `h w` picture axes, `d` features.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from safetydpo.artifacts.tensor_files import BrokenTensors, parse_tensors
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.clip import ClipScorer
from safetydpo.judges.inception import NUM_FEATURES, load_inception, prepare_pixels


class FeatureNetwork(Protocol):
    """A frozen network; its version is raised when the same weights answer differently."""

    name: str
    version: str
    weights_sha256: str
    num_features: int

    def embed(self, images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
        """Return one row of features per picture, given as RGB bytes."""
        ...


class InceptionFeatures:
    """The 2048 pooled features of Inception-v3, which FID and KID are defined by."""

    version = "1"
    num_features = NUM_FEATURES

    def __init__(
        self, file: Path, *, device: str = "cpu", setting: str = "identity.evaluation.measures.inception"
    ) -> None:
        """Load from a safetensors file.

        Raises:
            SafetyDPOError: if there is none, or it does not hold this network.
        """
        tensors, self.weights_sha256 = read_weights(
            file,
            what="Inception-v3",
            where=f"save the state dict of pytorch-fid (pt_inception-2015-12-05) or torchvision there, as safetensors, "
            f"or name its place in {setting}",
        )
        network, weights = load_inception(tensors, source=str(file))
        self._network, self._device = network.to(device), device
        self.name = "inception" if weights == "fid" else "inception_torchvision"

    @torch.no_grad()
    def embed(self, images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
        """Return the features of pictures of any size, on the CPU."""
        features: Float[Tensor, "n d"] = self._network(prepare_pixels(images.to(self._device)))
        return features.cpu()


class ClipFeatures:
    """The projected picture embedding of a CLIP model, which CMMD and CLIPScore are defined by."""

    version = "1"

    def __init__(self, folder: Path) -> None:
        """Load from a folder in transformers format.

        Raises:
            SafetyDPOError: if there is none.
        """
        self._clip = ClipScorer(folder)
        self.name = "clip"
        self.weights_sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        self.num_features = self.embed(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape[1]

    def embed(self, images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
        """Return embeddings, not normalised."""
        return self._clip.embed_images(images)


class TorchmetricsFeatures(nn.Module):
    """A feature network as torchmetrics' FID and KID take it, in place of the one that needs torch-fidelity.

    Pictures come as torchmetrics has them: bytes of shape [n, 3, h, w].
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self._network = network
        self.num_features = network.num_features

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return one row of features per picture."""
        return self._network.embed(images.permute(0, 2, 3, 1))


def read_weights(file: Path, *, what: str, where: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a safetensors file and the sha256 of its bytes; `where` says what to do if there is none.

    Raises:
        SafetyDPOError: if there is no such file, or it is none of safetensors.
    """
    if not file.is_file():
        raise SafetyDPOError(f"expected the weights of {what} at {file}, found none: {where}")
    data = file.read_bytes()
    try:
        tensors = parse_tensors(data)
    except BrokenTensors as error:
        raise SafetyDPOError(
            f"expected the weights of {what} as safetensors at {file}, found {error}: convert them once, where "
            "they come from, with safetensors.torch.save_file"
        ) from error
    return tensors, hashlib.sha256(data).hexdigest()
