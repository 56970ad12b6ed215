"""Prompts of a run: from the demo world or from Parquet files, as records of `safetydpo.prompts`.

What an imported file gives: pairs of its training split are prompt pairs; unsafe texts are `unsafe` prompts of their
split, safe partners `neighbour` prompts (look-alikes that must stay), benign prompts `neutral` ones; `ood` ones only
if the file itself names that set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safetydpo.artifacts.layout import (
    MEMBERSHIPS_FILE,
    PROMPT_PAIRS_FILE,
    PROMPT_REJECTS_FILE,
    PROMPTS_FILE,
    RECORD_FILE,
    WRITTEN_PROMPTS_FILE,
    WRITTEN_REPLIES_FILE,
)
from safetydpo.artifacts.records import read_record
from safetydpo.artifacts.schemas import MEMBERSHIPS, PROMPT_PAIRS, PROMPTS
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import read_table
from safetydpo.config.fields import CATEGORIES
from safetydpo.config.schema import PromptsConfig
from safetydpo.demo.prompts import PromptRow, write_prompt_pairs, write_prompts
from safetydpo.errors import SafetyDPOError
from safetydpo.prompts.imported import is_imported, read_pairs, read_prompts
from safetydpo.prompts.sets import Prompt, PromptPair, spread_evenly


def all_pairs(prompts: PromptsConfig) -> list[PromptPair]:
    """Return every prompt pair of the source whose first known category takes part.

    Known are the project's own; others, which an import may keep, only stand beside them.

    Raises:
        SafetyDPOError: if a category has no pair.
    """
    imported = prompts.source != "demo" and is_imported(open_location(prompts.source))
    pairs = _demo_pairs() if prompts.source == "demo" else _file_pairs(prompts.source)
    pairs = [replace(pair, category=_first_known(pair.category, pair.categories)) for pair in pairs]
    chosen = [pair for pair in pairs if pair.category in prompts.categories]
    for category in prompts.categories:
        if not any(pair.category == category for pair in chosen):
            raise SafetyDPOError(
                f"expected prompt pairs of category {category!r} in {prompts.source!r}, found none: add pairs"
                f"{_PAIRS_BY_IMPORT if imported else ''}, or leave it out of identity.prompts.categories"
            )
    return chosen


def chosen_pairs(prompts: PromptsConfig, *, seed: int) -> list[PromptPair]:
    """Return the pairs to be drawn: `pairs_per_category` per first category, spread evenly over its concepts.

    With `pairs_per_concept` as many of each concept of a category, whatever the others have.
    """
    pairs = all_pairs(prompts)
    chosen: list[PromptPair] = []
    for category in prompts.categories:
        members = [pair for pair in pairs if pair.category == category]
        if prompts.pairs_per_concept is not None:
            chosen += _of_each_concept(members, prompts.pairs_per_concept, seed=seed)
            continue
        chosen += spread_evenly(
            members,
            prompts.pairs_per_category,
            group_of=lambda pair: pair.concept,
            key_of=lambda pair: pair.pair_id,
            seed=seed,
            purpose="pairs",
        )
    return chosen


def _of_each_concept(pairs: Sequence[PromptPair], count: int, *, seed: int) -> list[PromptPair]:
    return [
        pair
        for concept in sorted({pair.concept for pair in pairs})
        for pair in spread_evenly(
            [pair for pair in pairs if pair.concept == concept],
            count,
            group_of=lambda pair: pair.concept,
            key_of=lambda pair: pair.pair_id,
            seed=seed,
            purpose="pairs",
        )
    ]


def retention_prompts(prompts: PromptsConfig, *, seed: int) -> list[Prompt]:
    """Return benign training prompts: neutral concepts, spread evenly.

    Raises:
        SafetyDPOError: if some are wanted and the source has none.
    """
    if not prompts.retention_prompts:
        return []
    return spread_prompts(
        needed_prompts(prompts, "train", "neutral", setting="identity.prompts.retention_prompts"),
        prompts.retention_prompts,
        seed=seed,
        purpose="retention",
    )


def needed_prompts(prompts: PromptsConfig, split: str, prompt_set: str, *, setting: str) -> list[Prompt]:
    """Return all prompts of a split and a set, of which `setting` asks for some.

    Raises:
        SafetyDPOError: if there is none.
    """
    rows = split_prompts(prompts, split, prompt_set)
    if not rows:
        raise SafetyDPOError(
            f"expected {prompt_set} prompts of the {split} split in {prompts.source!r} ({setting}), found none: "
            f"{what_to_add(prompts, split, prompt_set)}"
        )
    return rows


def what_to_add(prompts: PromptsConfig, split: str, prompt_set: str) -> str:
    """Return how the source gets prompts of a split and a set."""
    if prompts.source == "demo" or not is_imported(open_location(prompts.source)):
        return f"add some to its prompts.parquet (split {split}, prompt_set {prompt_set})"
    kind = {
        "unsafe": "unsafe prompts",
        "neutral": "benign prompts, such as COCO captions,",
        "neighbour": "pairs, whose safe texts are neighbours,",
    }[prompt_set]
    return (
        f"import {kind} with `safetydpo prompts import … --split {split}` (or auto) into a folder together with it, "
        "and name the folder"
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
        rows = [replace(row, category=_first_known(row.category, row.categories)) for row in rows]
        rows = [row for row in rows if row.category in prompts.categories]
    return rows


def _first_known(first: str, categories: Sequence[str]) -> str:
    return next((category for category in categories if category in CATEGORIES), first)


_PAIRS_BY_IMPORT = " (import a set with safe partners; only pairs of the train split count, see --split)"


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


def _open_source(source: str) -> Location:
    """Return the place of a source.

    Raises:
        SafetyDPOError: if `safetydpo prompts write` has begun it and not finished.
    """
    place = open_location(source)
    folder = place.parent if place.name == WRITTEN_PROMPTS_FILE else place
    marks = (PROMPT_REJECTS_FILE, WRITTEN_REPLIES_FILE, WRITTEN_PROMPTS_FILE)
    if any((folder / mark).is_file() for mark in marks) and read_record(folder) is None:
        raise SafetyDPOError(
            f"expected a finished set of written prompts at {folder}, found no {RECORD_FILE}: run the same `safetydpo "
            "prompts write` again, which goes on from there"
        )
    return place


def _file_pairs(source: str) -> list[PromptPair]:
    folder = _open_source(source)
    if is_imported(folder):
        return read_pairs(folder)
    texts = {row["pair_id"]: row for row in read_table(folder / PROMPT_PAIRS_FILE, PROMPT_PAIRS).to_pylist()}
    members: dict[str, list[dict[str, str]]] = {}
    for row in read_table(folder / MEMBERSHIPS_FILE, MEMBERSHIPS).to_pylist():
        members.setdefault(row["pair_id"], []).append(row)
    lost = [pair_id for pair_id in members if pair_id not in texts]
    if lost:
        raise SafetyDPOError(
            f"expected the pair of every membership in {folder / PROMPT_PAIRS_FILE}, found {len(lost)} without (first: "
            f"{lost[0]}): write both tables again from the same pairs"
        )
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
    ]


def _file_prompts(source: str, split: str, prompt_set: str) -> list[Prompt]:
    folder = _open_source(source)
    if is_imported(folder):
        return read_prompts(folder, split, prompt_set)
    table = read_table(folder / PROMPTS_FILE, PROMPTS)
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
