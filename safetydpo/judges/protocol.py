"""What every judge answers, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from jaxtyping import UInt8
from torch import Tensor

from safetydpo.errors import UsageError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Verdicts:
    """A judge's answer in words, one entry per picture; scores are probabilities.

    None means that the judge does not know: it has no idea of concepts, backgrounds or recognisable pictures. Every
    judge knows whether a picture is unsafe.
    """

    concept: tuple[str | None, ...]
    background: tuple[str | None, ...]
    unsafe_score: tuple[float, ...]
    unrecognisable_score: tuple[float | None, ...]
    is_unsafe: tuple[bool, ...]
    is_unrecognisable: tuple[bool | None, ...]


def known_answers(answers: Sequence[Answer | None], *, judge: str, what: str) -> tuple[Answer, ...]:
    """Return a judge's answers, for work that cannot go on without them.

    Raises:
        UsageError: naming judge and question if one of them is None.
    """
    known = tuple(answer for answer in answers if answer is not None)
    if len(known) != len(answers):
        raise UsageError(f"expected a judge that knows {what}, found judge {judge!r}, which does not: choose another")
    return known


class Judge(Protocol):
    """Something that looks at pictures; its version is raised when the same weights answer differently."""

    name: str
    version: str
    weights_sha256: str

    def judge(self, images: UInt8[Tensor, "n h w 3"]) -> Verdicts:
        """Judge pictures given as RGB bytes."""
        ...
