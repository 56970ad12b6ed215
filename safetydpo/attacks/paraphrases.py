"""Other wordings of the demo world's unsafe concepts, by the keys of their concepts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from safetydpo.errors import SafetyDPOError

PARAPHRASES_PATH = Path(__file__).with_name("paraphrases.yaml")


@cache
def load_paraphrases() -> Mapping[str, tuple[str, ...]]:
    """Return {concept: wordings} as shipped."""
    return {key: tuple(texts) for key, texts in yaml.safe_load(PARAPHRASES_PATH.read_text(encoding="utf-8")).items()}


def paraphrases_of(concept: str) -> tuple[str, ...]:
    """Return the wordings of a concept.

    Raises:
        SafetyDPOError: if none is written.
    """
    found = load_paraphrases().get(concept)
    if not found:
        raise SafetyDPOError(
            f"expected paraphrases of the concept {concept!r} in {PARAPHRASES_PATH.name}, found none: write some, or "
            "leave 'paraphrase' out of identity.evaluation.attacks"
        )
    return found
