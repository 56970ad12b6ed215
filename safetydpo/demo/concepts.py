"""The demo world's concepts: harmless stand-ins for unsafe things, their safe counterparts, neighbours and neutrals.

The data stand in `concepts.yaml` beside this file; this module reads them once and refuses a broken world.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import yaml

from safetydpo.errors import SafetyDPOError

Role = Literal["unsafe", "safe", "neutral", "neighbour"]
CATEGORIES = ("hate", "sexual", "violence", "shocking", "illegal_activity", "harassment", "self_harm")
NAME_KINDS = ("canonical", "synonym", "periphrase", "typo")
NUM_NAMES = 4
CONCEPTS_PATH = Path(__file__).with_name("concepts.yaml")


@dataclass(frozen=True)
class Concept:
    """One thing that the demo world can draw.

    Attributes:
        key: Unique identifier.
        glyph: Unicode code point of the emoji.
        overlay: Code point drawn on top (flames), None for a bare glyph.
        names: What prompts call it: [0] and [1] in training, [2] in validation, [3] in the final test.
        kinds: What each name is: canonical, synonym, periphrase or typo.
        role: unsafe; safe (the counterpart of an unsafe one); neutral; neighbour (of an unsafe one).
        categories: Of an unsafe concept, its first category first; of a neighbour, the category it stands beside.
        safe_counterpart: Key of the concept to be drawn instead, of unsafe concepts only.
        ood: True for an unsafe concept that no expert ever sees.
        neighbour_of: Key of the unsafe concept whose head noun and silhouette a neighbour shares.
        head_noun: That noun.
    """

    key: str
    glyph: int
    overlay: int | None
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    role: Role
    categories: tuple[str, ...] = ()
    safe_counterpart: str | None = None
    ood: bool = False
    neighbour_of: str | None = None
    head_noun: str | None = None


@dataclass(frozen=True)
class Conflict:
    """A safe counterpart of one category that resembles an unsafe concept of another.

    Attributes:
        concept: Key of the unsafe concept whose safe counterpart is meant.
        resembles: Key of the unsafe concept of another category that the counterpart looks like.
    """

    concept: str
    resembles: str


@dataclass(frozen=True)
class World:
    """All concepts by key in file order, background colours by name, and the designed conflicts."""

    concepts: Mapping[str, Concept]
    backgrounds: Mapping[str, tuple[int, int, int]]
    conflicts: tuple[Conflict, ...]


def parse_world(document: Mapping[str, Any]) -> World:
    """Turn the YAML document into a checked world.

    Raises:
        SafetyDPOError: A key or name is used twice, a reference leads nowhere, or an unsafe concept lacks a category
            or a safe counterpart.
    """
    concepts = [_parse_concept(row) for row in document["concepts"]]
    world = World(
        concepts=MappingProxyType({concept.key: concept for concept in concepts}),
        backgrounds=MappingProxyType({name: _parse_colour(rgb) for name, rgb in document["backgrounds"].items()}),
        conflicts=tuple(Conflict(**row) for row in document["conflicts"]),
    )
    if len(world.concepts) != len(concepts):
        raise SafetyDPOError("expected every concept key once, found one twice. Rename it in concepts.yaml.")
    _check_names(concepts)
    for concept in concepts:
        _check_references(concept, world.concepts)
    return world


def _parse_concept(row: Mapping[str, Any]) -> Concept:
    role = row["role"]
    if role not in get_args(Role):
        raise SafetyDPOError(
            f"concept '{row['key']}': expected a role among {', '.join(get_args(Role))}, found '{role}'. "
            "Correct concepts.yaml."
        )
    overlay = row.get("overlay")
    return Concept(
        key=row["key"],
        glyph=int(row["glyph"], 16),
        overlay=None if overlay is None else int(overlay, 16),
        names=tuple(row["names"]),
        kinds=tuple(row["kinds"]),
        role=role,
        categories=tuple(row.get("categories", ())),
        safe_counterpart=row.get("safe_counterpart"),
        ood=bool(row.get("ood", False)),
        neighbour_of=row.get("neighbour_of"),
        head_noun=row.get("head_noun"),
    )


def _parse_colour(rgb: list[int]) -> tuple[int, int, int]:
    red, green, blue = rgb
    return red, green, blue


def _check_names(concepts: list[Concept]) -> None:
    owner: dict[str, str] = {}
    for concept in concepts:
        if len(concept.names) != NUM_NAMES or sorted(concept.kinds) != sorted(NAME_KINDS):
            raise SafetyDPOError(
                f"concept '{concept.key}': expected {NUM_NAMES} names, one of each kind ({', '.join(NAME_KINDS)}), "
                f"found {len(concept.names)} of kinds {', '.join(concept.kinds)}. Correct concepts.yaml."
            )
        for name in concept.names:
            if name in owner:
                raise SafetyDPOError(
                    f"expected every name once, found '{name}' at '{owner[name]}' and '{concept.key}'. Rename one."
                )
            owner[name] = concept.key


def _check_references(concept: Concept, concepts: Mapping[str, Concept]) -> None:
    unknown = [category for category in concept.categories if category not in CATEGORIES]
    if unknown:
        raise SafetyDPOError(
            f"concept '{concept.key}': expected categories among {', '.join(CATEGORIES)}, found '{unknown[0]}'. "
            "Correct concepts.yaml."
        )
    if concept.role == "unsafe":
        counterpart = concepts.get(concept.safe_counterpart or "")
        if not concept.categories or counterpart is None or counterpart.role == "unsafe":
            raise SafetyDPOError(
                f"unsafe concept '{concept.key}': expected a category and a safe counterpart that exists, found "
                f"categories {list(concept.categories)} and counterpart '{concept.safe_counterpart}'. "
                "Correct concepts.yaml."
            )
    if concept.role == "neighbour" and concept.neighbour_of not in concepts:
        raise SafetyDPOError(
            f"neighbour '{concept.key}': expected neighbour_of to name a concept, found '{concept.neighbour_of}'. "
            "Correct concepts.yaml."
        )


def load_world(path: Path = CONCEPTS_PATH) -> World:
    """Read and check the world that ships with the project."""
    return parse_world(yaml.safe_load(path.read_text(encoding="utf-8")))


WORLD = load_world()
CONCEPTS: tuple[Concept, ...] = tuple(WORLD.concepts.values())
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = WORLD.backgrounds


def get_concept(key: str) -> Concept:
    """Look a concept up.

    Raises:
        SafetyDPOError: There is none of this key.
    """
    if key not in WORLD.concepts:
        raise SafetyDPOError(f"expected a concept of the demo world, found '{key}'. See safetydpo/demo/concepts.yaml.")
    return WORLD.concepts[key]


def select_concepts(role: Role, *, ood: bool = False) -> tuple[Concept, ...]:
    """List the concepts of a role in file order; `ood` picks the unsafe ones that no expert sees instead."""
    return tuple(concept for concept in CONCEPTS if concept.role == role and concept.ood == ood)
