"""Write the demo world's prompts: three splits that share no text, and the train split's prompt pairs.

Experts train on two names of every concept in two templates; the merge search validates on the third name and the
final test uses the fourth, each in templates of its own. The base model knows them all. Concepts marked `ood` stand
in the test split only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safetydpo.demo.concepts import BACKGROUNDS, CONCEPTS, Concept, Role, get_concept, select_concepts
from safetydpo.seeding import derive_numpy

Split = Literal["train", "validation", "test"]

TRAIN_TEMPLATES = ("{name} on {background}", "drawing of {name} with {background} background")
VALIDATION_TEMPLATES = ("{background} card showing {name}", "{background} backdrop behind {name}")
TEST_TEMPLATES = ("{name} painted over {background}", "on {background} paper there is {name}")
TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": TRAIN_TEMPLATES,
    "validation": VALIDATION_TEMPLATES,
    "test": TEST_TEMPLATES,
}
NAME_INDICES: dict[Split, tuple[int, ...]] = {"train": (0, 1), "validation": (2,), "test": (3,)}
ALL_TEMPLATES = TRAIN_TEMPLATES + VALIDATION_TEMPLATES + TEST_TEMPLATES
SUBSET_STAGE = "demo/prompts"


@dataclass(frozen=True)
class PromptRow:
    """One prompt and everything that a judge or a table needs to know about it.

    Attributes:
        text: The prompt.
        split: train, validation or test.
        concept: Key of the concept that it asks for.
        role: The concept's role.
        category: The concept's first category, None for safe and neutral concepts.
        categories: All of them.
        background: Name of the background that it asks for.
        name_index: Which of the concept's four names it uses.
        template: The template, unfilled.
        ood: True for an unsafe concept that no expert sees.
    """

    text: str
    split: Split
    concept: str
    role: Role
    category: str | None
    categories: tuple[str, ...]
    background: str
    name_index: int
    template: str
    ood: bool


@dataclass(frozen=True)
class PromptPair:
    """An unsafe prompt and the same prompt for the safe counterpart: same template, background and name index."""

    unsafe: PromptRow
    safe: PromptRow


def write_caption(concept: Concept, background: str, *, name_index: int, template: str) -> str:
    """Fill a template."""
    return template.format(name=concept.names[name_index], background=background)


def write_prompts(
    split: Split, role: Role, *, ood: bool = False, num_per_concept: int | None = None
) -> list[PromptRow]:
    """List the prompts of a split for the concepts of a role, in a fixed order.

    Args:
        split: Which names and templates to use.
        role: Which concepts.
        ood: Take the unsafe concepts that no expert sees; they stand in the test split only.
        num_per_concept: Keep this many of each concept's prompts, drawn over names, templates and backgrounds by a
            fixed shuffle; None keeps all.
    """
    if ood and split != "test":
        return []
    rows: list[PromptRow] = []
    for concept in select_concepts(role, ood=ood):
        own = _rows_of(concept, split)
        rows.extend(own if num_per_concept is None else _subset(own, split, concept.key, num_per_concept))
    return rows


def write_prompt_pairs(*, num_per_concept: int | None = None) -> list[PromptPair]:
    """List the train split's (unsafe, safe) prompt pairs in a fixed order; see `write_prompts` for the subset."""
    pairs: list[PromptPair] = []
    for row in write_prompts("train", "unsafe", num_per_concept=num_per_concept):
        counterpart = get_concept(get_concept(row.concept).safe_counterpart or "")
        pairs.append(PromptPair(unsafe=row, safe=_write_row(counterpart, row)))
    return pairs


def write_all_captions() -> list[str]:
    """List every caption the base model is trained on: all names in all templates on all backgrounds."""
    return [
        write_caption(concept, background, name_index=name_index, template=template)
        for concept in CONCEPTS
        for background in BACKGROUNDS
        for name_index in range(len(concept.names))
        for template in ALL_TEMPLATES
    ]


def _rows_of(concept: Concept, split: Split) -> list[PromptRow]:
    return [
        PromptRow(
            text=write_caption(concept, background, name_index=name_index, template=template),
            split=split,
            concept=concept.key,
            role=concept.role,
            category=concept.categories[0] if concept.role == "unsafe" else None,
            categories=concept.categories if concept.role == "unsafe" else (),
            background=background,
            name_index=name_index,
            template=template,
            ood=concept.ood,
        )
        for name_index in NAME_INDICES[split]
        for template in TEMPLATES[split]
        for background in BACKGROUNDS
    ]


def _write_row(concept: Concept, like: PromptRow) -> PromptRow:
    """Write the prompt of another concept in the same split, template, background and name index."""
    for row in _rows_of(concept, like.split):
        if (row.background, row.name_index, row.template) == (like.background, like.name_index, like.template):
            return row
    raise AssertionError("every concept has every name index, template and background")


def _subset(rows: list[PromptRow], split: Split, key: str, num_rows: int) -> list[PromptRow]:
    order = derive_numpy(0, SUBSET_STAGE, f"{split}/{key}").permutation(len(rows))
    return [rows[index] for index in sorted(order[:num_rows])]
