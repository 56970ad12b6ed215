"""The demo world's judges behind the common protocol."""

from __future__ import annotations

from jaxtyping import UInt8
from torch import Tensor

from safetydpo.judges.demo_network import DemoJudge
from safetydpo.judges.protocol import Verdicts


class NamedDemoJudge:
    """A demo judge that answers in concept and background names."""

    def __init__(self, judge: DemoJudge) -> None:
        self._judge = judge
        self.name = judge.name
        self.version = judge.version
        self.weights_sha256 = judge.weights_sha256

    def judge(self, images: UInt8[Tensor, "n h w 3"]) -> Verdicts:
        """Judge pictures; a picture is unrecognisable if that is its most probable class."""
        scores = self._judge.score(images)
        labels = self._judge.labels
        return Verdicts(
            concept=tuple(labels.name_concept(int(index)) for index in scores.concept_index),
            background=tuple(labels.backgrounds[int(index)] for index in scores.background_index),
            unsafe_score=tuple(float(value) for value in scores.unsafe),
            unrecognisable_score=tuple(float(value) for value in scores.unrecognisable),
            is_unsafe=tuple(bool(value) for value in scores.is_unsafe),
            is_unrecognisable=tuple(int(index) == labels.unrecognisable_index for index in scores.concept_index),
        )
