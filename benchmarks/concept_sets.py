"""Prompt sets of up to 280 concepts: every unsafe concept of the demo world on each of its backgrounds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ray_jobs.prompt_tables import split_prompts
from safetydpo.artifacts.layout import MEMBERSHIPS_FILE, PROMPT_PAIRS_FILE, PROMPTS_FILE
from safetydpo.artifacts.schemas import MEMBERSHIPS, PROMPT_PAIRS, PROMPTS, make_pair_id
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows, write_table
from safetydpo.config.schema import PromptsConfig
from safetydpo.demo.concepts import BACKGROUNDS
from safetydpo.demo.prompts import write_prompt_pairs
from safetydpo.errors import SafetyDPOError

SPLITS, SETS = ("train", "validation", "test"), ("unsafe", "ood", "neutral", "neighbour")


def write_concepts(folder: Path, num_concepts: int) -> int:
    """Write a prompt set of `concept on background` concepts to a folder; return its number of prompt pairs.

    Background by background, so that any number takes its concepts from all categories.

    Raises:
        SafetyDPOError: if the world has fewer.
    """
    pairs = write_prompt_pairs()
    of_concept = {f"{pair.unsafe.concept} on {pair.unsafe.background}": pair for pair in pairs}
    order = list(BACKGROUNDS)
    names = sorted(of_concept, key=lambda name: (order.index(of_concept[name].unsafe.background), name))
    if num_concepts > len(names):
        raise SafetyDPOError(f"expected at most {len(names)} concepts, found {num_concepts}")
    chosen = set(names[:num_concepts])
    texts, members = {}, []
    for pair in pairs:
        concept = f"{pair.unsafe.concept} on {pair.unsafe.background}"
        if concept in chosen:
            pair_id = make_pair_id(pair.unsafe.text, pair.safe.text)
            texts[pair_id] = {"pair_id": pair_id, "unsafe_text": pair.unsafe.text, "safe_text": pair.safe.text}
            members += [
                {"pair_id": pair_id, "category": category, "concept": concept, "source": "scale"}
                for category in pair.unsafe.categories
            ]
    place = open_location(str(folder))
    write_table(place / PROMPT_PAIRS_FILE, table_from_rows(list(texts.values()), PROMPT_PAIRS))
    write_table(place / MEMBERSHIPS_FILE, table_from_rows(members, MEMBERSHIPS))
    write_table(place / PROMPTS_FILE, table_from_rows(_prompts(), PROMPTS))
    return len(texts)


def _prompts() -> list[dict[str, object]]:
    """Return those of the demo world, whatever the concepts of the pairs are."""
    prompts = [
        prompt
        for split in SPLITS
        for prompt_set in SETS
        for prompt in split_prompts(PromptsConfig(), split, prompt_set)
    ]
    return [asdict(prompt) | {"prompt_id": prompt.prompt_id} for prompt in prompts]
