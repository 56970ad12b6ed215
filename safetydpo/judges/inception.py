"""Inception-v3 up to its pooled features in plain torch, with the names that torchvision gives its weights.

Two sets of weights are in use. Those of 2015-12-05, ported from TensorFlow, define FID: they have 1008 classes and pool
by averages without the padding, in the last block by maxima. torchvision's own have 1000 classes and pool by averages
with it; distances in their space are of their own. Which ones a file holds is read from its classes.

Axis legend: `n` pictures, `h w` picture axes, `c u v` channels and positions of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from safetydpo.errors import SafetyDPOError
from safetydpo.judges.convolutions import fill_weights

NUM_FEATURES = 2048
SIDE = 299
Weights = Literal["fid", "torchvision"]
NUM_CLASSES: dict[int, Weights] = {1008: "fid", 1000: "torchvision"}
Pooling = Literal["average", "average_without_padding", "maximum"]
AUXILIARY = "AuxLogits."
"""A second classifier that training uses."""


class InceptionV3(nn.Module):
    """Inception-v3 without its classifiers."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        pooling: Pooling = "average_without_padding" if weights == "fid" else "average"
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b = _BlockA(192, pooled=32, pooling=pooling)
        self.Mixed_5c = _BlockA(256, pooled=64, pooling=pooling)
        self.Mixed_5d = _BlockA(288, pooled=64, pooling=pooling)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, width=128, pooling=pooling)
        self.Mixed_6c = _BlockC(768, width=160, pooling=pooling)
        self.Mixed_6d = _BlockC(768, width=160, pooling=pooling)
        self.Mixed_6e = _BlockC(768, width=192, pooling=pooling)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, pooling=pooling)
        self.Mixed_7c = _BlockE(2048, pooling="maximum" if weights == "fid" else pooling)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        """Return pooled features of pixels in [-1, 1], of 75 x 75 at least."""
        states = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        states = functional.max_pool2d(states, 3, stride=2)
        states = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(states)), 3, stride=2)
        states = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(states)))
        states = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(states)))))
        states = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(states)))
        return states.mean(dim=(2, 3))


def load_inception(tensors: Mapping[str, Tensor], *, source: str) -> tuple[InceptionV3, Weights]:
    """Return the network with the weights of a file, and which ones they are; its classifiers are not needed.

    Raises:
        SafetyDPOError: if the file does not say how many classes there are, or a weight does not fit.
    """
    classes = tensors["fc.weight"].shape[0] if "fc.weight" in tensors else None
    if classes not in NUM_CLASSES:
        raise SafetyDPOError(
            f"expected fc.weight with 1008 classes (the weights of FID) or 1000 (torchvision's) in {source}, found "
            f"{classes}: put a state dict of Inception-v3 with torchvision's names there, saved as safetensors"
        )
    weights = NUM_CLASSES[classes]
    network = InceptionV3(weights)
    needed = {key: value for key, value in tensors.items() if not key.startswith((AUXILIARY, "fc."))}
    fill_weights(network, needed, source=source)
    return network.eval().requires_grad_(False), weights


def prepare_pixels(images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 299 299"]:
    """Return pictures in [-1, 1], resized bilinearly without antialiasing, as pytorch-fid prepares them."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-2:] != (SIDE, SIDE):
        pixels = functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * pixels - 1


class _Convolution(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, states: Float[Tensor, "n c u v"]) -> Float[Tensor, "n d p q"]:
        return functional.relu(self.bn(self.conv(states)))


def _pool(states: Float[Tensor, "n c u v"], pooling: Pooling) -> Float[Tensor, "n c u v"]:
    if pooling == "maximum":
        return functional.max_pool2d(states, 3, stride=1, padding=1)
    return functional.avg_pool2d(states, 3, stride=1, padding=1, count_include_pad=pooling == "average")


class _BlockA(nn.Module):
    def __init__(self, inputs: int, *, pooled: int, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.branch1x1 = _Convolution(inputs, 64, 1)
        self.branch5x5_1 = _Convolution(inputs, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(inputs, pooled, 1)

    def forward(self, states: Float[Tensor, "n c u v"]) -> Float[Tensor, "n d u v"]:
        branches = [
            self.branch1x1(states),
            self.branch5x5_2(self.branch5x5_1(states)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(states))),
            self.branch_pool(_pool(states, self.pooling)),
        ]
        return torch.cat(branches, dim=1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, states: Float[Tensor, "n c u v"]) -> Float[Tensor, "n d p q"]:
        branches = [
            self.branch3x3(states),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(states))),
            functional.max_pool2d(states, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, *, width: int, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.branch1x1 = _Convolution(inputs, 192, 1)
        self.branch7x7_1 = _Convolution(inputs, width, 1)
        self.branch7x7_2 = _Convolution(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = _Convolution(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = _Convolution(inputs, width, 1)
        self.branch7x7dbl_2 = _Convolution(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = _Convolution(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = _Convolution(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = _Convolution(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, states: Float[Tensor, "n c u v"]) -> Float[Tensor, "n d u v"]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(states)))
        branches = [
            self.branch1x1(states),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(states))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_pool(states, self.pooling)),
        ]
        return torch.cat(branches, dim=1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(inputs, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, states: Float[Tensor, "n c u v"]) -> Float[Tensor, "n d p q"]:
        branches = [
            self.branch3x3_2(self.branch3x3_1(states)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(states)))),
            functional.max_pool2d(states, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        self.branch1x1 = _Convolution(inputs, 320, 1)
        self.branch3x3_1 = _Convolution(inputs, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, states: Float[Tensor, "n c u v"]) -> Float[Tensor, "n d u v"]:
        single = self.branch3x3_1(states)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(states))
        branches = [
            self.branch1x1(states),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(_pool(states, self.pooling)),
        ]
        return torch.cat(branches, dim=1)
