"""Prompts and prompt pairs as plain records, spread evenly over concepts, with splits proved disjoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from safetydpo.artifacts.schemas import make_pair_id, make_prompt_id
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_seed

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with what is known of the picture it asks for."""

    text: str
    prompt_set: str
    """`unsafe`, `ood`, `neutral`, `neighbour` or `safe`."""
    split: str
    """`train`, `validation` or `test`."""
    concept: str
    category: str
    """First category; empty for prompts of none."""
    categories: tuple[str, ...]
    background: str

    @property
    def prompt_id(self) -> str:
        """Id of the text."""
        return make_prompt_id(self.text)


@dataclass(frozen=True, slots=True)
class PromptPair:
    """An unsafe prompt and its safe rewrite, with every category and concept it belongs to."""

    unsafe_text: str
    safe_text: str
    category: str
    categories: tuple[str, ...]
    concept: str
    source: str

    @property
    def pair_id(self) -> str:
        """Id of the two texts; a pair of two categories is one pair."""
        return make_pair_id(self.unsafe_text, self.safe_text)


def spread_evenly(
    rows: Sequence[Row],
    count: int,
    *,
    group_of: Callable[[Row], str],
    key_of: Callable[[Row], str],
    seed: int,
    purpose: str,
) -> list[Row]:
    """Choose `count` rows so that the groups' shares differ by at most one while they last.

    Within a group rows are taken in the order of a seeded hash of their key, so that the choice depends
    neither on the order of `rows` nor on other groups. Groups are visited in name order, round by round.
    Fewer than `count` rows are returned only if there are fewer.

    Raises:
        SafetyDPOError: if `count` is negative.
    """
    if count < 0:
        raise SafetyDPOError(f"expected a count of at least 0, found {count}")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[group_of(row)].append(row)
    for members in groups.values():
        members.sort(key=lambda row: (derive_seed(seed, f"spread:{purpose}", key_of(row)), key_of(row)))
    chosen: list[Row] = []
    level = 0
    while len(chosen) < count and any(level < len(members) for members in groups.values()):
        for name in sorted(groups):
            if level < len(groups[name]) and len(chosen) < count:
                chosen.append(groups[name][level])
        level += 1
    return chosen


def check_splits_disjoint(splits: Mapping[str, Iterable[str]]) -> None:
    """Check that no text stands in two splits.

    Raises:
        SafetyDPOError: naming the two splits and the first shared text.
    """
    seen: dict[str, str] = {}
    for split, texts in splits.items():
        for text in texts:
            before = seen.setdefault(text, split)
            if before != split:
                raise SafetyDPOError(
                    f"expected disjoint prompt splits, found {text!r} in {before!r} and in {split!r}: "
                    "remove it from one"
                )
