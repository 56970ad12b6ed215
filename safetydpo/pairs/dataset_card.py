"""The card of an exported data set: what is in it, how it was made, what it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml

from safetydpo.artifacts.records import SHORT_HASH, Record
from safetydpo.config.pairs import PairsConfig
from safetydpo.errors import UsageError
from safetydpo.pairs.concepts import NO_CONCEPT

UNKNOWN_LICENCE = "unknown"
# The hub's own classes, by the number of rows below which each ends.
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Group:
    """Pairs of one category or concept."""

    name: str
    kept: int
    dropped: int


@dataclass(frozen=True)
class PairCounts:
    """How many pairs were kept and dropped, and why."""

    kept: int
    dropped: int
    by_category: tuple[Group, ...]
    by_concept: tuple[Group, ...]
    reasons: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class SafeEdit:
    """How SDEdit made the safe pictures from the unsafe ones."""

    strength: float
    is_away: bool
    """Whether the unguided branch saw the unsafe prompt."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the counts."""

    name: str
    licence: str
    with_pictures: bool
    command: str
    artifact: str
    artifact_hash: str
    fingerprint: str
    made_at: str
    model: str
    revision: str | None
    base_fingerprint: str
    seed: int
    sampler: str
    rules: str
    judge: str
    judge_fingerprint: str
    versions: str
    failed_pictures: int
    edit: SafeEdit | None
    """None = both pictures of a pair were drawn from the same noise."""


def check_licence(licence: str) -> None:
    """Refuse what cannot be a licence's identifier, such as its whole text.

    Raises:
        UsageError: saying what it should look like.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", licence):
        raise UsageError(
            f"expected --licence as the hub writes it, such as cc-by-4.0, openrail or other, found {licence!r}"
        )


def card_facts(record: Record, *, name: str, licence: str, with_pictures: bool, command: str) -> CardFacts:
    """Gather from the record of a pairs artifact what its card says."""
    identity = record.identity
    base: Mapping[str, Any] = identity["base"]
    return CardFacts(
        name=name,
        licence=licence,
        with_pictures=with_pictures,
        command=command,
        artifact=f"{record.stage}/{record.name}-{record.hash[:SHORT_HASH]}",
        artifact_hash=record.hash,
        fingerprint=record.fingerprint,
        made_at=record.started_at,
        model=str(base["model"]),
        revision=base.get("revision"),
        base_fingerprint=record.inputs["base"],
        seed=int(identity["seed"]),
        sampler=_as_yaml(identity["sampler"]),
        rules=_as_yaml(identity["pairs"]),
        judge=identity["judge"] if isinstance(identity["judge"], str) else json.dumps(identity["judge"]),
        judge_fingerprint=record.inputs["judge"],
        versions=", ".join(f"{package} {version}" for package, version in sorted(record.versions.items())),
        failed_pictures=len(record.failed_units),
        edit=_safe_edit(identity["pairs"]),
    )


def _safe_edit(pairs: Mapping[str, Any]) -> SafeEdit | None:
    # Records leave out settings at their default, and those of the first version know none of these.
    names = ("safe_picture", "sdedit_strength", "sdedit_negative")
    rules = PairsConfig(**{name: pairs[name] for name in names if name in pairs})
    if rules.safe_picture == "same_seed":
        return None
    return SafeEdit(rules.sdedit_strength, is_away=rules.sdedit_negative == "unsafe_prompt")


def render_card(facts: CardFacts, counts: PairCounts, columns: Sequence[tuple[str, str]]) -> str:
    """Return README.md: the front matter that the hub reads, then text and tables for people."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("safetydpo.pairs", "templates"),
        # Markdown for people, never shown as HTML by us; a name must not break its table all the same.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.globals["no_concept"] = NO_CONCEPT
    return environment.get_template("dataset_card.md.j2").render(
        facts=facts, counts=counts, columns=columns, front_matter=_as_yaml(_front_matter(facts, counts))
    )


def _front_matter(facts: CardFacts, counts: PairCounts) -> dict[str, Any]:
    return {
        "pretty_name": facts.name,
        "license": facts.licence,
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(counts.kept)],
        "tags": ["safety", "preference", "dpo", "safetydpo", "not-for-all-audiences"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }


def size_category(num_rows: int) -> str:
    """Return the hub's class of a data set's size."""
    return next((name for limit, name in _SIZES if num_rows < limit), "1M<n<10M")


def _as_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
