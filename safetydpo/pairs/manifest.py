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
    pairs: Sequence[PromptPair],
    *,
    run_seed: int,
    base_fingerprint: str,
    sampler: Mapping[str, Any],
    sdedit: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, object]]:
    """Yield one manifest row per picture, sorted by concept; a pair that occurs twice is drawn once.

    With the settings `sdedit` the safe pictures are made from the unsafe ones, and their ids say so; None = both
    pictures are drawn from the same noise.
    """
    seen: set[str] = set()
    for _concept, pair_id, pair in sorted(
        ((pair.concept, pair.pair_id, pair) for pair in pairs), key=lambda row: (row[0], row[1])
    ):
        if pair_id in seen:
            continue
        seen.add(pair_id)
        seed = pair_seed(run_seed, pair_id)
        common: dict[str, Any] = {"seed": seed, "base_fingerprint": base_fingerprint, "sampler": sampler}
        unsafe = image_row(pair_id, "unsafe", pair.unsafe_text, **common)
        edit = None if sdedit is None else sdedit_of(str(unsafe["image_id"]), sdedit)
        yield unsafe
        yield image_row(pair_id, "safe", pair.safe_text, **common, edit=edit)


def sdedit_of(image_id: str, settings: Mapping[str, Any]) -> dict[str, object]:
    """Return what the id of a picture covers that is made from another by SDEdit with these settings."""
    return {**settings, "mode": "sdedit", "source": image_id}


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
    owner_id: str,
    side: str,
    text: str,
    *,
    seed: int,
    base_fingerprint: str,
    sampler: Mapping[str, Any],
    edit: Mapping[str, Any] | None = None,
) -> dict[str, object]:
    """Return the manifest row of one picture drawn by the base model, from noise alone or as an `edit` of another."""
    return {
        "image_id": make_image_id(
            owner_id, side, seed=seed, base_fingerprint=base_fingerprint, sampler=sampler, edit=edit
        ),
        "owner_id": owner_id,
        "side": side,
        "prompt": text,
        "seed": seed,
        "adapter": "",
        "attempt": 1,
    }
