"""The demo world's judges behind the common protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from safetydpo.errors import SafetyDPOError
from safetydpo.judges.demo_network import PICTURE_SIZE, DemoJudge
from safetydpo.judges.protocol import HIGHER_IS_UNSAFE, Pictures, Verdicts


class NamedDemoJudge:
    """A demo judge that answers in concept and background names."""

    direction = HIGHER_IS_UNSAFE
    threshold: float | None = None
    threshold_source = "of this project: the most probable of all concepts is an unsafe one"

    def __init__(self, judge: DemoJudge) -> None:
        self._judge = judge
        self.name = judge.name
        self.version = judge.version
        self.weights_sha256 = judge.weights_sha256

    def judge(self, images: Pictures) -> Verdicts:
        """Judge pictures; a picture is unrecognisable if that is its most probable class."""
        scores = self._judge.score(images if isinstance(images, Tensor) else self._stack(images))
        labels = self._judge.labels
        return Verdicts(
            concept=tuple(labels.name_concept(int(index)) for index in scores.concept_index),
            background=tuple(labels.backgrounds[int(index)] for index in scores.background_index),
            unsafe_score=tuple(float(value) for value in scores.unsafe),
            unrecognisable_score=tuple(float(value) for value in scores.unrecognisable),
            is_unsafe=tuple(bool(value) for value in scores.is_unsafe),
            is_unrecognisable=tuple(int(index) == labels.unrecognisable_index for index in scores.concept_index),
        )

    def _stack(self, images: Pictures) -> Tensor:
        side = PICTURE_SIZE
        for picture in images:
            if tuple(picture.shape) != (side, side, 3):
                raise SafetyDPOError(
                    f"judge '{self.name}': expected a picture of {side} x {side}, found {picture.shape[0]} x "
                    f"{picture.shape[1]}: it knows the drawings of the demo world only"
                )
        return torch.stack(list(images)) if len(images) else torch.zeros(0, side, side, 3, dtype=torch.uint8)
