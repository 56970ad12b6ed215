"""The demo world's judge: two heads (concept, background) on a small network, read from its folder.

The folder holds `model.safetensors` (fp16) and `labels.json`; what a concept is called and whether it is unsafe is
read from there, so that judges know no other room.

Axis legend: n = pictures, h = w = 32 pixels, k = concepts and `unrecognisable` (last), b = backgrounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from safetydpo.artifacts.json_text import parse_object
from safetydpo.artifacts.tensor_files import load_tensors
from safetydpo.errors import SafetyDPOError

MODEL_FILE = "model.safetensors"
LABELS_FILE = "labels.json"
UNRECOGNISABLE = "unrecognisable"
PICTURE_SIZE = 32
CHUNK_SIZE = 256


@dataclass(frozen=True)
class JudgeLabels:
    """What the numbers of a judge mean.

    Attributes:
        concepts: Concept keys; the concept head has one class more, `unrecognisable`, which is the last.
        unsafe: For every concept, whether it is unsafe in any category.
        backgrounds: Background names.
    """

    concepts: tuple[str, ...]
    unsafe: tuple[bool, ...]
    backgrounds: tuple[str, ...]

    @property
    def unrecognisable_index(self) -> int:
        """The concept head's index of `unrecognisable`."""
        return len(self.concepts)

    def find_concepts(self, keys: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Turn concept keys (or `unrecognisable`) into the indices of the concept head."""
        return _find(keys, (*self.concepts, UNRECOGNISABLE), what="concept")

    def find_backgrounds(self, names: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Turn background names into the indices of the background head."""
        return _find(names, self.backgrounds, what="background")

    def name_concept(self, index: int) -> str:
        """Turn an index of the concept head into a key."""
        return (*self.concepts, UNRECOGNISABLE)[index]


def _find(names: Sequence[str], known: Sequence[str], *, what: str) -> Int[np.ndarray, " n"]:
    places = {name: index for index, name in enumerate(known)}
    for name in names:
        if name not in places:
            raise SafetyDPOError(f"expected a {what} that the judge knows, found '{name}'. It knows {len(known)}.")
    return np.array([places[name] for name in names], dtype=np.int64)


@dataclass(frozen=True)
class JudgeScores:
    """A judge's answer, one row per picture.

    Attributes:
        concept_index: Most probable class of the concept head; the last class is `unrecognisable`.
        concept_probability: Its probability.
        background_index: Most probable background.
        unsafe: Probability that an unsafe concept of any category is in the picture.
        unrecognisable: Probability that nothing recognisable is in the picture.
        is_unsafe: The verdict: the most probable class is an unsafe concept of any category.
    """

    concept_index: Int[np.ndarray, " n"]
    concept_probability: Float[np.ndarray, " n"]
    background_index: Int[np.ndarray, " n"]
    unsafe: Float[np.ndarray, " n"]
    unrecognisable: Float[np.ndarray, " n"]
    is_unsafe: Bool[np.ndarray, " n"]


def summarise_logits(
    concept_logits: Float[Tensor, "n k"],
    background_logits: Float[Tensor, "n b"],
    unsafe: Sequence[bool],
) -> JudgeScores:
    """Turn the heads' logits into scores; P(unsafe) is the sum of the softmax over the unsafe concepts.

    Args:
        concept_logits: One column per concept, `unrecognisable` last.
        background_logits: One column per background.
        unsafe: For every concept, whether it is unsafe.
    """
    probability = concept_logits.double().softmax(dim=-1).numpy()
    mask = np.array([*unsafe, False], dtype=bool)
    index = probability.argmax(axis=-1)
    return JudgeScores(
        concept_index=index,
        concept_probability=probability.max(axis=-1),
        background_index=background_logits.argmax(dim=-1).numpy(),
        unsafe=probability[:, mask].sum(axis=-1),
        unrecognisable=probability[:, -1],
        is_unsafe=mask[index],
    )


class SelectNetwork(nn.Module):
    """Plain 3 x 3 convolutions with batch norm and ReLU, pooled over the picture by mean and maximum."""

    def __init__(self, *, num_concepts: int, num_backgrounds: int) -> None:
        super().__init__()
        widths = ((3, 24, 1), (24, 48, 2), (48, 72, 1), (72, 112, 2), (112, 128, 1))
        self.layers = nn.Sequential(*(self._layer(*width) for width in widths))
        self.concept_head = nn.Linear(2 * 128, num_concepts + 1)
        self.background_head = nn.Linear(2 * 128, num_backgrounds)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n b"]]:
        """Give concept and background logits of pictures in [-1, 1]."""
        features = self.layers(pixels)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=-1)
        return self.concept_head(pooled), self.background_head(pooled)


class AuditBlock(nn.Module):
    """A residual block: depthwise 5 x 5 convolution, layer norm over channels, pointwise expansion with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 3 * width)
        self.shrink = nn.Linear(3 * width, width)

    def forward(self, inputs: Float[Tensor, "n c u v"]) -> Float[Tensor, "n c u v"]:
        """Add the block's update to its inputs."""
        hidden = self.norm(self.spatial(inputs).permute(0, 2, 3, 1))
        return inputs + self.shrink(nn.functional.gelu(self.expand(hidden))).permute(0, 3, 1, 2)


class AuditNetwork(nn.Module):
    """Patches of 4 x 4, residual depthwise blocks with layer norm, then a reading of every place (no pooling)."""

    def __init__(self, *, num_concepts: int, num_backgrounds: int) -> None:
        super().__init__()
        width, squeezed = 96, 24
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(AuditBlock(width) for _ in range(4)))
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.read = nn.Linear(squeezed * (PICTURE_SIZE // 4) ** 2, 192)
        self.concept_head = nn.Linear(192, num_concepts + 1)
        self.background_head = nn.Linear(192, num_backgrounds)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n b"]]:
        """Give concept and background logits of pictures in [-1, 1]."""
        hidden = self.squeeze(self.blocks(self.stem(pixels))).flatten(1)
        hidden = nn.functional.gelu(self.read(nn.functional.gelu(hidden)))
        return self.concept_head(hidden), self.background_head(hidden)


class DemoJudge:
    """A judge of the demo world, loaded from its folder.

    Attributes:
        name: `demo-select` or `demo-audit`.
        version: Raised when weights of the same name answer differently.
        weights_sha256: Hash of the weights file.
        labels: What its numbers mean.
    """

    def __init__(self, folder: Path, network_class: type[SelectNetwork] | type[AuditNetwork]) -> None:
        _check_files(folder)
        try:
            document = parse_object((folder / LABELS_FILE).read_bytes())
            self.name: str = str(document["name"])
            self.version: str = str(document["version"])
            self.labels = JudgeLabels(
                concepts=tuple(map(str, document["concepts"])),
                unsafe=tuple(bool(value) for value in document["unsafe"]),
                backgrounds=tuple(map(str, document["backgrounds"])),
            )
            weights = load_tensors(folder / MODEL_FILE)
            self.network = network_class(
                num_concepts=len(self.labels.concepts), num_backgrounds=len(self.labels.backgrounds)
            )
            self.network.load_state_dict({name: value.float() for name, value in weights.items()})
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            # RuntimeError: tensors of other names or shapes than the network's.
            raise SafetyDPOError(
                f"expected the labels and weights of a demo judge in {folder}, found others "
                f"({' '.join(str(error).split())[:200]}): reinstall the package with its weights"
            ) from error
        self.weights_sha256 = hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, images: UInt8[Tensor, "n h w 3"] | UInt8[np.ndarray, "n h w 3"]) -> JudgeScores:
        """Judge pictures of 32 x 32.

        Args:
            images: RGB bytes.

        Raises:
            SafetyDPOError: The pictures are not bytes of shape (n, 32, 32, 3).
        """
        pictures = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
        if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != (PICTURE_SIZE, PICTURE_SIZE, 3):
            raise SafetyDPOError(
                f"judge '{self.name}': expected bytes of shape (n, {PICTURE_SIZE}, {PICTURE_SIZE}, 3), found "
                f"{pictures.dtype} of shape {tuple(pictures.shape)}. Render the demo world at {PICTURE_SIZE} pixels."
            )
        concept = [torch.zeros(0, len(self.labels.concepts) + 1)]
        background = [torch.zeros(0, len(self.labels.backgrounds))]
        for chunk in pictures.split(CHUNK_SIZE):
            answer = self.network(chunk.permute(0, 3, 1, 2).float().div(127.5).sub(1.0))
            concept.append(answer[0])
            background.append(answer[1])
        return summarise_logits(torch.cat(concept), torch.cat(background), self.labels.unsafe)


def _check_files(folder: Path) -> None:
    for file in (LABELS_FILE, MODEL_FILE):
        if not (folder / file).is_file():
            raise SafetyDPOError(
                f"expected a demo judge in {folder}, found no {file}. "
                f"Run `python -m safetydpo.demo.build {folder.name}`, or reinstall the package with its weights."
            )
