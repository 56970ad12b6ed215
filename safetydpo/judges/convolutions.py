"""The convolutions of AlexNet and VGG16 in plain torch, with the names that torchvision gives their weights.

Axis legend: `n` pictures, `h w` picture axes, `c u v` channels and positions of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safetydpo.errors import SafetyDPOError

StackName = Literal["alexnet", "vgg16"]
MODEL_FILE = "model.safetensors"
HEADS_FILE = "heads.safetensors"
"""What lies in the folder of a network that LPIPS reads."""
TAPS: dict[StackName, tuple[int, ...]] = {"alexnet": (1, 4, 7, 9, 11), "vgg16": (3, 8, 15, 22, 29)}
"""Places, among `features`, of the rectifiers that LPIPS reads: of AlexNet each, of VGG16 the last of each block."""
CHANNELS: dict[StackName, tuple[int, ...]] = {
    "alexnet": (64, 192, 384, 256, 256),
    "vgg16": (64, 128, 256, 512, 512),
}
"""Channels at those places."""
SMALLEST_SIDE: dict[StackName, int] = {"alexnet": 31, "vgg16": 16}
"""Pictures below it vanish in a pooling layer."""


class ConvolutionStack(nn.Module):
    """The part `features` of a network, up to the last place that is read."""

    def __init__(self, name: StackName) -> None:
        super().__init__()
        self.name = name
        self.features = nn.Sequential(*(_alexnet_layers() if name == "alexnet" else _vgg16_layers()))

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c u v"]]:
        """Return what the network says at each of `TAPS`, of pixels normalised as ImageNet's."""
        found = []
        states = pixels
        for place, layer in enumerate(self.features):
            states = layer(states)
            if place in TAPS[self.name]:
                found.append(states)
        return found


def _alexnet_layers() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]


def _vgg16_layers() -> list[nn.Module]:
    layers: list[nn.Module] = []
    width = 3
    for block, (channels, number) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if block:
            layers.append(nn.MaxPool2d(2))
        for _ in range(number):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
    return layers


def load_convolutions(name: StackName, tensors: Mapping[str, Tensor], *, source: str) -> ConvolutionStack:
    """Return the stack with the weights of a torchvision state dict, whose classifier is not needed.

    Raises:
        SafetyDPOError: naming the first weight that is missing or has another shape.
    """
    stack = ConvolutionStack(name)
    fill_weights(stack, {key: value for key, value in tensors.items() if key.startswith("features.")}, source=source)
    return stack.eval().requires_grad_(False)


def fill_weights(network: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy the weights of a file into a network, as float32.

    Raises:
        SafetyDPOError: naming the first weight that is missing, not finite, unknown, or has another shape.
    """
    # Counters of batch norms, which only training reads, are missing in some files.
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    for name in sorted(wanted.keys() | given.keys()):
        expected = "nothing" if name not in wanted else f"shape {tuple(wanted[name].shape)}"
        found = "nothing" if name not in given else f"shape {tuple(given[name].shape)}"
        if expected != found:
            raise SafetyDPOError(
                f"expected {expected} at {name} in {source}, found {found}: put a state dict with torchvision's names "
                "there, saved as safetensors"
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise SafetyDPOError(
                f"expected finite weights in {source}, found a NaN or infinity in {name}: fetch it again"
            )
    network.load_state_dict({name: value.float() for name, value in given.items()}, strict=False)
