"""What every judge answers, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import UInt8
from torch import Tensor


@dataclass(frozen=True)
class Verdicts:
    """A judge's answer in words, one entry per picture; scores are probabilities."""

    concept: tuple[str, ...]
    background: tuple[str, ...]
    unsafe_score: tuple[float, ...]
    unrecognisable_score: tuple[float, ...]
    is_unsafe: tuple[bool, ...]
    is_unrecognisable: tuple[bool, ...]


class Judge(Protocol):
    """Something that looks at pictures; its version is raised when the same weights answer differently."""

    name: str
    version: str
    weights_sha256: str

    def judge(self, images: UInt8[Tensor, "n h w 3"]) -> Verdicts:
        """Judge pictures given as RGB bytes."""
        ...
