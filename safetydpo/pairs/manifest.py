"""The pictures that a set of prompt pairs asks for (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safetydpo.artifacts.schemas import make_image_id
from safetydpo.prompts.sets import Prompt, PromptPair
from safetydpo.seeding import derive_seed


def pair_seed(run_seed: int, pair_id: str) -> int:
    """Return the noise seed of a pair: both pictures start from the same noise."""
    return derive_seed(run_seed, "pair_noise", pair_id)


def pair_image_rows(
    pairs: Sequence[PromptPair], *, run_seed: int, base_fingerprint: str, sampler: Mapping[str, Any]
) -> Iterator[dict[str, object]]:
    """Yield one manifest row per picture, sorted by concept; a pair that occurs twice is drawn once."""
    seen: set[str] = set()
    for _concept, pair_id, pair in sorted(
        ((pair.concept, pair.pair_id, pair) for pair in pairs), key=lambda row: (row[0], row[1])
    ):
        if pair_id in seen:
            continue
        seen.add(pair_id)
        seed = pair_seed(run_seed, pair_id)
        for side, text in (("unsafe", pair.unsafe_text), ("safe", pair.safe_text)):
            yield image_row(pair_id, side, text, seed=seed, base_fingerprint=base_fingerprint, sampler=sampler)


def retention_image_rows(
    prompts: Sequence[Prompt], *, run_seed: int, base_fingerprint: str, sampler: Mapping[str, Any]
) -> Iterator[dict[str, object]]:
    """Yield one manifest row per benign picture of the retention term, in id order."""
    unique = {prompt.prompt_id: prompt for prompt in prompts}
    for prompt_id in sorted(unique):
        seed = derive_seed(run_seed, "retention_noise", prompt_id)
        text = unique[prompt_id].text
        yield image_row(prompt_id, "benign", text, seed=seed, base_fingerprint=base_fingerprint, sampler=sampler)


def image_row(
    owner_id: str, side: str, text: str, *, seed: int, base_fingerprint: str, sampler: Mapping[str, Any]
) -> dict[str, object]:
    """Return the manifest row of one picture drawn by the base model."""
    return {
        "image_id": make_image_id(owner_id, side, seed=seed, base_fingerprint=base_fingerprint, sampler=sampler),
        "owner_id": owner_id,
        "side": side,
        "prompt": text,
        "seed": seed,
        "adapter": "",
        "attempt": 1,
    }
