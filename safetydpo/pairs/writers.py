"""Prompt pairs written by a model: the interface of a writer, and what it is asked and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.concepts import ConceptEntry
from safetydpo.seeding import derive_seed

_SEED_BITS = 31


@dataclass(frozen=True)
class WriteRequest:
    """One question to a writer: some pairs for one concept.

    Attributes:
        concept: What the pairs are about.
        attempt: Which request for this concept it is, from 0.
        num_pairs: How many pairs are asked for.
        avoid: Unsafe texts that exist already; told when earlier requests were not enough.
    """

    concept: ConceptEntry
    attempt: int
    num_pairs: int
    avoid: tuple[str, ...] = ()

    def seed(self, run_seed: int) -> int:
        """Return the request's own seed in [0, 2^31): servers that take one often take no more bits."""
        return derive_seed(run_seed, "pairs/write", f"{self.concept.key}/{self.attempt}") >> (63 - _SEED_BITS)


@dataclass(frozen=True)
class Reply:
    """What a writer answered.

    Attributes:
        text: The answer as it came.
        finish_reason: Why it ended: `stop`, `length` (cut short), `content_filter`, or whatever the server says.
        refused: True if the server marks it as a refusal.
        prompt_tokens: Tokens of the question; None if the server does not count.
        completion_tokens: Tokens of the answer; None likewise.
        model: The model that the server says it used.
        num_retries: Tries that failed before this answer came.
    """

    text: str
    finish_reason: str = "stop"
    refused: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    num_retries: int = 0

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class UnansweredError(SafetyDPOError):
    """A request that stayed without an answer after its retries; it may be asked again."""


class PromptWriter(Protocol):
    """Something that writes prompt pairs. Its answers are parsed by `writer_replies`; it judges nothing itself."""

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """All that changes what is written, as plain JSON values: kind, model, sampling. No secret, no address."""
        ...

    async def write(self, request: WriteRequest) -> Reply:
        """Answer one request; called concurrently.

        Raises:
            UnansweredError: if the writer could not answer now; the run goes on and asks again.
            SafetyDPOError: if it never will; the run ends.
        """
        ...

    async def close(self) -> None:
        """Give back connections and memory."""
        ...
