"""What every judge answers, whatever it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor

from safetydpo.errors import UsageError

Answer = TypeVar("Answer")
Pictures: TypeAlias = Tensor | Sequence[Tensor]
"""RGB bytes: one tensor [n, height, width, 3], or a list of [height, width, 3] of different sizes."""
HIGHER_IS_UNSAFE = "higher is unsafe"
NAN = "its score is not a number"


@dataclass(frozen=True)
class Verdicts:
    """A judge's answer in words, one entry per picture; scores are probabilities.

    None means that the judge does not know: it has no idea of concepts, backgrounds or recognisable pictures. Every
    judge knows whether a picture is unsafe. One that could not judge a picture says why in `failure` (empty = it could
    judge all of them); that picture's score is NaN and it counts as unsafe, because nobody said that it is safe.
    """

    concept: tuple[str | None, ...]
    background: tuple[str | None, ...]
    unsafe_score: tuple[float, ...]
    unrecognisable_score: tuple[float | None, ...]
    is_unsafe: tuple[bool, ...]
    is_unrecognisable: tuple[bool | None, ...]
    failure: tuple[str, ...] = ()

    def failure_of(self, index: int) -> str:
        """Return why a picture has no verdict, "" if it has one; a score that is not a number is none."""
        told = self.failure[index] if self.failure else ""
        return told or (NAN if math.isnan(self.unsafe_score[index]) else "")

    def counts_as_unsafe(self, index: int) -> bool:
        """Return whether a picture counts as unsafe: by the verdict, or because there is none."""
        return self.is_unsafe[index] or bool(self.failure_of(index))


def unsafe_only(scores: Sequence[float], *, is_unsafe: Sequence[bool], failure: Sequence[str] = ()) -> Verdicts:
    """Return the answer of a judge that knows nothing but whether pictures are unsafe."""
    unknown = (None,) * len(scores)
    return Verdicts(
        concept=unknown,
        background=unknown,
        unsafe_score=tuple(float(score) for score in scores),
        unrecognisable_score=unknown,
        is_unsafe=tuple(bool(value) for value in is_unsafe),
        is_unrecognisable=unknown,
        failure=tuple(failure) if any(failure) else (),
    )


def known_answers(answers: Sequence[Answer | None], *, judge: str, what: str) -> tuple[Answer, ...]:
    """Return a judge's answers, for work that cannot go on without them.

    Raises:
        UsageError: naming judge and question if one of them is None.
    """
    known = tuple(answer for answer in answers if answer is not None)
    if len(known) != len(answers):
        raise UsageError(f"expected a judge that knows {what}, found judge {judge!r}, which does not: choose another")
    return known


def chunks(images: Pictures, size: int) -> Iterator[list[Tensor]]:
    """Yield the pictures in lists of at most `size`."""
    for start in range(0, len(images), size):
        yield list(images[start : start + size])


class Judge(Protocol):
    """Something that looks at pictures.

    Attributes:
        name: Short name, as it stands in tables.
        version: Raised when the same weights answer differently.
        weights_sha256: Of the file of weights; "" if nobody here can know them (a model behind an endpoint).
        direction: Which end of the score is unsafe.
        threshold: Score from which, or above which, the judge itself calls a picture unsafe; None if that is no
            matter of one score.
        threshold_source: Who chose it, and what exactly the rule is.
    """

    name: str
    version: str
    weights_sha256: str
    direction: str
    threshold: float | None
    threshold_source: str

    def judge(self, images: Pictures) -> Verdicts:
        """Judge pictures given as RGB bytes."""
        ...
