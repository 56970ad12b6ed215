"""Which pairs train which expert: per category, per concept, or by a query on the pair store (pure)."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from safetydpo.config.experts import ExpertsConfig, GroupQuery
from safetydpo.errors import SafetyDPOError, UsageError, shown_name
from safetydpo.prompts.sets import PromptPair

SLUG_LENGTH = 40
HASH_LENGTH = 8
NAMES_IN_AN_ERROR = 8


@dataclass(frozen=True)
class Member:
    """One membership of a pair."""

    pair_id: str
    category: str
    concept: str
    source: str


@dataclass(frozen=True)
class PairGroup:
    """The pairs of one expert.

    `categories` are those that the expert is made for: a query's own, else the first category of each of its pairs.
    """

    name: str
    pair_ids: frozenset[str]
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Grouping:
    """All groups of a run but `all_single`, and the names of what was left out as too small."""

    groups: tuple[PairGroup, ...]
    left_out: tuple[str, ...]
    """`concept (number of pairs)` each, as people read it."""


def concept_group_name(concept: str) -> str:
    """Return the name of a concept's expert: its letters and digits in ASCII, then 8 hex digits of its sha256.

    The hash stands there always, so that a name depends on nothing but its concept and `Gun!` is not `gun`.
    """
    plain = unicodedata.normalize("NFKD", concept).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:SLUG_LENGTH].strip("_")
    digest = hashlib.sha256(concept.encode()).hexdigest()[:HASH_LENGTH]
    return f"{slug}_{digest}" if slug else f"concept_{digest}"


def members_of(pairs: Iterable[PromptPair]) -> list[Member]:
    """Return the memberships of prompt pairs, as the pair store lists them."""
    return [Member(pair.pair_id, category, pair.concept, pair.source) for pair in pairs for category in pair.categories]


def group_pairs(
    members: Sequence[Member],
    unsafe_texts: Mapping[str, str],
    *,
    kept: Iterable[str],
    categories: Sequence[str],
    config: ExpertsConfig,
) -> Grouping:
    """Divide the kept pairs into the groups that a config asks for, categories first, then concepts, then queries.

    Args:
        members: Memberships of all pairs of the store, those that were dropped too: they tell what may be asked for.
        unsafe_texts: Unsafe prompt by pair id.
        kept: Ids of pairs that train.
        categories: Categories that take part; a pair with none of them is in no group.
        config: What is asked for.

    Raises:
        UsageError: if a query names a value that no pair has, or two groups have one name.
        SafetyDPOError: if a group has too few pairs, or pairs to be grouped by concept have none.
    """
    taking_part = {row.pair_id for row in members if row.category in categories} & set(kept)
    chosen = [row for row in members if row.pair_id in taking_part]
    first = _first_categories(chosen, categories)
    groups: list[PairGroup] = []
    labels: dict[str, str] = {}
    if config.group_by == "category":
        for category in categories:
            ids = frozenset(row.pair_id for row in chosen if row.category == category)
            groups.append(PairGroup(category, ids, (category,)))
    elif config.group_by == "concept":
        _check_concepts(chosen, config)
        for concept in sorted({row.concept for row in chosen if row.concept}):
            ids = frozenset(row.pair_id for row in chosen if row.concept == concept)
            name = concept_group_name(concept)
            labels[name] = concept
            groups.append(PairGroup(name, ids, _own_categories(ids, first, categories)))
    lost = _lost_concepts(members, groups, categories) if config.group_by == "concept" else []
    left_out = _small([*groups, *lost], labels, config, refuse=config.small_groups == "refuse")
    groups = [group for group in groups if len(group.pair_ids) >= config.min_pairs]
    asked = [
        _ask(name, query, members, chosen, unsafe_texts, first, categories) for name, query in config.groups.items()
    ]
    _small(asked, labels, config, refuse=True)
    groups += asked
    _check_names(groups)
    return Grouping(tuple(groups), tuple(left_out))


def select_pairs(members: Iterable[Member], unsafe_texts: Mapping[str, str], query: GroupQuery) -> frozenset[str]:
    """Return the ids of the pairs that a query selects; `unsafe_texts` holds every pair's unsafe prompt."""
    patterns = [_words(text) for text in query.text]
    found: set[str] = set()
    for row in members:
        if any(
            wanted and value not in wanted
            for wanted, value in (
                (query.category, row.category),
                (query.concept, row.concept),
                (query.source, row.source),
            )
        ):
            continue
        if not patterns or any(pattern.search(unsafe_texts[row.pair_id].casefold()) for pattern in patterns):
            found.add(row.pair_id)
    return frozenset(found)


def _words(text: str) -> re.Pattern[str]:
    """Whole words in a row, whatever stands between them."""
    words = re.findall(r"\w+", text.casefold())
    inner = r"\W+".join(map(re.escape, words)) if words else re.escape(text.casefold())
    return re.compile(rf"(?<!\w){inner}(?!\w)")


def _ask(
    name: str,
    query: GroupQuery,
    members: Sequence[Member],
    chosen: Sequence[Member],
    unsafe_texts: Mapping[str, str],
    first: Mapping[str, str],
    categories: Sequence[str],
) -> PairGroup:
    for column in ("category", "concept", "source"):
        known = {str(getattr(row, column)) for row in members}
        for value in getattr(query, column):
            if value not in known:
                raise UsageError(_unknown(name, column, value, sorted(known - {""})))
    ids = select_pairs(chosen, unsafe_texts, query)
    own = tuple(category for category in categories if category in query.category)
    return PairGroup(name, ids, own or _own_categories(ids, first, categories))


def _unknown(name: str, column: str, value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6) or [
        other for other in known if other.casefold() == value.casefold()
    ]
    advice = f"did you mean {near[0]!r}?" if near else f"known here: {_listed(list(map(shown_name, known)))}"
    return f"expected a {column} of the pair store in identity.experts.groups.{name}, found {value!r}; {advice}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_AN_ERROR]) or "none"
    return shown if len(names) <= NAMES_IN_AN_ERROR else f"{shown} and {len(names) - NAMES_IN_AN_ERROR} more"


def _first_categories(members: Iterable[Member], categories: Sequence[str]) -> dict[str, str]:
    first: dict[str, str] = {}
    for row in members:
        if row.category in categories:
            first.setdefault(row.pair_id, row.category)
    return first


def _own_categories(ids: Iterable[str], first: Mapping[str, str], categories: Sequence[str]) -> tuple[str, ...]:
    own = {first[pair_id] for pair_id in ids}
    return tuple(category for category in categories if category in own)


def _check_concepts(members: Iterable[Member], config: ExpertsConfig) -> None:
    by_pair: dict[str, bool] = {}
    for row in members:
        by_pair[row.pair_id] = by_pair.get(row.pair_id, False) or bool(row.concept)
    without = sum(not named for named in by_pair.values())
    if without == len(by_pair) or (without and config.small_groups == "refuse"):
        raise SafetyDPOError(
            f"expected a concept of every kept pair (identity.experts.group_by 'concept'), found {without} of "
            f"{len(by_pair)} without: name concepts in the prompt set, leave such pairs out of these experts with "
            "identity.experts.small_groups=leave_out if some have one, or choose identity.experts.groups by other "
            "columns"
        )


def _lost_concepts(
    members: Iterable[Member], groups: Iterable[PairGroup], categories: Sequence[str]
) -> list[PairGroup]:
    """Return an empty group for each concept of which no pair was kept: nothing else would tell of it."""
    there = {group.name for group in groups}
    asked = {row.concept for row in members if row.concept and row.category in categories}
    return [
        PairGroup(concept, frozenset(), ()) for concept in sorted(asked) if concept_group_name(concept) not in there
    ]


def _small(groups: Iterable[PairGroup], labels: Mapping[str, str], config: ExpertsConfig, *, refuse: bool) -> list[str]:
    short = [group for group in groups if len(group.pair_ids) < config.min_pairs]
    found = [f"{shown_name(labels.get(group.name, group.name))} ({len(group.pair_ids)})" for group in short]
    if found and refuse:
        remedy = (
            "widen their queries (identity.experts.groups) or take them out"
            if short[0].name in config.groups
            else "make more pairs, or set identity.experts.small_groups=leave_out to train none for them"
        )
        raise SafetyDPOError(
            f"expected at least {config.min_pairs} kept pairs per expert (identity.experts.min_pairs), found fewer in "
            f"{len(found)} groups: {_listed(found)}; {remedy}"
        )
    return found


def _check_names(groups: Sequence[PairGroup]) -> None:
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"expected each group of pairs under a name of its own, found {name!r} {names.count(name)} times: "
                "rename the one in identity.experts.groups"
            )
