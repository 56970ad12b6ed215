"""What a language model is told: the texts of `writer_prompts.yaml`, filled in for one request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from safetydpo.pairs.writers import WriteRequest

TEXTS_PATH = Path(__file__).with_name("writer_prompts.yaml")


@dataclass(frozen=True)
class WriterTexts:
    """The texts of one version: the system prompt, and the templates of a request."""

    version: int
    system: str
    request: str
    counterpart: str
    avoid: str

    @property
    def sha256(self) -> str:
        """Hash of all texts, so that a change that kept its version is seen."""
        texts = "\x1f".join((self.system, self.request, self.counterpart, self.avoid))
        return hashlib.sha256(texts.encode()).hexdigest()


@lru_cache(maxsize=1)
def load_texts() -> WriterTexts:
    """Return the texts that ship with the package."""
    return WriterTexts(**yaml.safe_load(TEXTS_PATH.read_text(encoding="utf-8")))


def write_messages(request: WriteRequest) -> list[dict[str, str]]:
    """Return the chat of one request: a system message and a user message."""
    texts = load_texts()
    concept = request.concept
    parts = [
        texts.request.format(
            concept=concept.concept,
            categories=", ".join(concept.categories),
            number=request.attempt + 1,
            num_pairs=request.num_pairs,
        )
    ]
    if concept.counterpart:
        parts.append(texts.counterpart.format(counterpart=concept.counterpart))
    if request.avoid:
        parts.append(texts.avoid.format(texts="\n".join(f"- {text}" for text in request.avoid)))
    return [{"role": "system", "content": texts.system}, {"role": "user", "content": "".join(parts)}]
