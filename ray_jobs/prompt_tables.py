"""Prompts of a run: from the demo world or from Parquet files, as records of `safetydpo.prompts`."""

from __future__ import annotations

from collections.abc import Sequence

from safetydpo.artifacts.schemas import MEMBERSHIPS, PROMPT_PAIRS, PROMPTS
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.schema import PromptsConfig
from safetydpo.demo.prompts import PromptRow, write_prompt_pairs, write_prompts
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.sets import Prompt, PromptPair, spread_evenly


def all_pairs(prompts: PromptsConfig) -> list[PromptPair]:
    """Return every prompt pair of the source whose first category takes part.

    Raises:
        SafetyDPOError: if a category has no pair.
    """
    pairs = _demo_pairs() if prompts.source == "demo" else _file_pairs(prompts.source)
    chosen = [pair for pair in pairs if pair.category in prompts.categories]
    for category in prompts.categories:
        if not any(pair.category == category for pair in chosen):
            raise SafetyDPOError(
                f"expected prompt pairs of category {category!r} in {prompts.source!r}, found none: "
                "add pairs, or leave it out of identity.prompts.categories"
            )
    return chosen


def chosen_pairs(prompts: PromptsConfig, *, seed: int) -> list[PromptPair]:
    """Return the pairs to be drawn: `pairs_per_category` per first category, spread evenly over its concepts."""
    pairs = all_pairs(prompts)
    chosen: list[PromptPair] = []
    for category in prompts.categories:
        chosen += spread_evenly(
            [pair for pair in pairs if pair.category == category],
            prompts.pairs_per_category,
            group_of=lambda pair: pair.concept,
            key_of=lambda pair: pair.pair_id,
            seed=seed,
            purpose="pairs",
        )
    return chosen


def retention_prompts(prompts: PromptsConfig, *, seed: int) -> list[Prompt]:
    """Return benign training prompts: neutral concepts, spread evenly."""
    return spread_prompts(
        split_prompts(prompts, "train", "neutral"), prompts.retention_prompts, seed=seed, purpose="retention"
    )


def spread_prompts(rows: Sequence[Prompt], count: int, *, seed: int, purpose: str) -> list[Prompt]:
    """Choose `count` prompts spread evenly over their concepts."""
    return spread_evenly(
        rows,
        count,
        group_of=lambda prompt: prompt.concept,
        key_of=lambda prompt: prompt.prompt_id,
        seed=seed,
        purpose=purpose,
    )


def split_prompts(prompts: PromptsConfig, split: str, prompt_set: str) -> list[Prompt]:
    """Return all prompts of a split and a set (`unsafe`, `ood`, `neutral`, `neighbour`)."""
    rows = (
        _demo_prompts(split, prompt_set)
        if prompts.source == "demo"
        else _file_prompts(prompts.source, split, prompt_set)
    )
    if prompt_set in ("unsafe", "ood"):
        rows = [row for row in rows if row.category in prompts.categories]
    return rows


def _demo_pairs() -> list[PromptPair]:
    return [
        PromptPair(
            unsafe_text=pair.unsafe.text,
            safe_text=pair.safe.text,
            category=pair.unsafe.categories[0],
            categories=pair.unsafe.categories,
            concept=pair.unsafe.concept,
            source="demo",
        )
        for pair in write_prompt_pairs()
    ]


def _demo_prompts(split: str, prompt_set: str) -> list[Prompt]:
    role = "unsafe" if prompt_set == "ood" else prompt_set
    rows: list[PromptRow] = write_prompts(split, role, ood=prompt_set == "ood")  # type: ignore[arg-type]
    return [
        Prompt(
            text=row.text,
            prompt_set=prompt_set,
            split=split,
            concept=row.concept,
            category=row.category or "",
            categories=row.categories,
            background=row.background,
        )
        for row in rows
    ]


def _file_pairs(source: str) -> list[PromptPair]:
    folder = open_location(source)
    texts = {row["pair_id"]: row for row in read_table(folder / "prompt_pairs.parquet", PROMPT_PAIRS).to_pylist()}
    members: dict[str, list[dict[str, str]]] = {}
    for row in read_table(folder / "memberships.parquet", MEMBERSHIPS).to_pylist():
        members.setdefault(row["pair_id"], []).append(row)
    return [
        PromptPair(
            unsafe_text=texts[pair_id]["unsafe_text"],
            safe_text=texts[pair_id]["safe_text"],
            category=rows[0]["category"],
            categories=tuple(dict.fromkeys(row["category"] for row in rows)),
            concept=rows[0]["concept"],
            source=rows[0]["source"],
        )
        for pair_id, rows in members.items()
        if pair_id in texts
    ]


def _file_prompts(source: str, split: str, prompt_set: str) -> list[Prompt]:
    table = read_table(open_location(source) / "prompts.parquet", PROMPTS)
    return [
        Prompt(
            text=row["text"],
            prompt_set=row["prompt_set"],
            split=row["split"],
            concept=row["concept"],
            category=row["category"],
            categories=tuple(row["categories"]),
            background=row["background"],
        )
        for row in table.to_pylist()
        if row["split"] == split and row["prompt_set"] == prompt_set
    ]
