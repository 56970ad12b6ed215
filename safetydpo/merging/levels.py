"""Merging in levels: concepts within their category first, then the categories, with any method at each level.

A level merges groups of experts; each merge is an expert of the next level and says how many it stands for. Selections
such as `co_merge`, which let few experts into a layer, can so keep something of hundreds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from safetydpo.artifacts.adapters import adapter_hash
from safetydpo.errors import UsageError
from safetydpo.merging.merge import Expert, MergeResult, MergeSettings, PreparedExperts, merge_with, prepare_experts
from safetydpo.merging.moments import Moments
from safetydpo.merging.registry import find_method


@dataclass(frozen=True)
class Level:
    """Merges of one level: `groups` are {name of the merge: names of the experts}; each expert is in one group."""

    groups: Mapping[str, Sequence[str]]
    settings: MergeSettings


@dataclass(frozen=True)
class LeveledMerge:
    """The merge of the last level, the experts it was made of, and the merges below it by (level, name)."""

    result: MergeResult
    prepared: PreparedExperts
    parts: Mapping[tuple[int, str], MergeResult]


def merge_in_levels(
    experts: Sequence[Expert],
    levels: Sequence[Level],
    last: MergeSettings,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    moments: Moments | None = None,
) -> LeveledMerge:
    """Merge the groups of each level in turn, then what is left by `last`.

    Inputs and moments are those of the base model, the same at every level. An output rank grows with the number of
    experts that a merge stands for. Weights of a level name its experts: those given, or the groups of the level below.
    A group whose experts all have weight 0 is left out.

    Raises:
        UsageError: if the groups of a level do not hold each of its experts once, a method is a fit to the given
            experts (`distill`), or as `merge_with`.
        SafetyDPOError: as `prepare_experts` and `merge_with`.
    """
    for settings in (*(level.settings for level in levels), last):
        if find_method(settings.method).needs_distilled:
            raise UsageError(
                f"expected merge methods that work on any experts in levels, found {settings.method!r}, which is "
                "fitted to the given ones: choose another, or merge without levels"
            )
    current = list(experts)
    parts: dict[tuple[int, str], MergeResult] = {}
    gone: set[str] = set()
    for index, level in enumerate(levels):
        level = replace(level, groups=_without(level.groups, gone))
        _check_groups(level, current)
        by_name = {expert.name: expert for expert in current}
        current = []
        for name, members in sorted(level.groups.items()):
            if level.settings.weights is not None and not any(level.settings.weights[one] for one in members):
                gone.add(name)
                continue
            prepared = _prepare([by_name[member] for member in members], level.settings, inputs, moments)
            result = merge_with(prepared, _restrict(level.settings, members))
            parts[index, name] = result
            current.append(_as_expert(name, result, prepared))
    if not current:
        raise UsageError("expected at least one expert with a weight other than 0, found none: nothing would be merged")
    last = replace(last, weights=last.weights and {n: w for n, w in last.weights.items() if n not in gone})
    prepared = _prepare(current, last, inputs, moments)
    return LeveledMerge(merge_with(prepared, last), prepared, parts)


def category_groups(experts: Sequence[Expert]) -> dict[str, list[str]]:
    """Return {category: names of its experts}; an expert of several categories belongs to its first one.

    Raises:
        UsageError: if an expert names no category.
    """
    groups: dict[str, list[str]] = {}
    for expert in sorted(experts, key=lambda expert: expert.name):
        if not expert.metadata.categories:
            raise UsageError(
                f"expected a category of each expert, to merge those of one category first, found none of "
                f"{expert.name!r}: train it again with this version, or merge without levels"
            )
        groups.setdefault(expert.metadata.categories[0], []).append(expert.name)
    return groups


def _prepare(
    experts: Sequence[Expert], settings: MergeSettings, inputs: Mapping[str, Tensor] | None, moments: Moments | None
) -> PreparedExperts:
    method = find_method(settings.method)
    return prepare_experts(
        experts, inputs=inputs if method.needs_inputs else None, moments=moments if method.needs_moments else None
    )


def _without(groups: Mapping[str, Sequence[str]], gone: Collection[str]) -> dict[str, list[str]]:
    """Return the groups of a level without those of the level below that nothing was left of."""
    left = {name: [member for member in members if member not in gone] for name, members in groups.items()}
    return {name: members for name, members in left.items() if members or not groups[name]}


def _restrict(settings: MergeSettings, members: Sequence[str]) -> MergeSettings:
    """Return the settings with the weights of one group's members only."""
    weights = settings.weights and {name: weight for name, weight in settings.weights.items() if name in members}
    factors = {name: factor for name, factor in settings.expert_block_weights.items() if name in members}
    return replace(settings, weights=weights, expert_block_weights=factors)


def _as_expert(name: str, result: MergeResult, prepared: PreparedExperts) -> Expert:
    count = sum(expert.num_merged for expert in prepared.experts)
    return Expert(name, adapter_hash(result.layers), result.layers, result.metadata(prepared), num_merged=count)


def _check_groups(level: Level, experts: Sequence[Expert]) -> None:
    names = sorted(expert.name for expert in experts)
    members = sorted(name for group in level.groups.values() for name in group)
    if members != names or not all(level.groups.values()):
        raise UsageError(
            f"expected groups that hold each of {', '.join(names)} once, found {', '.join(members) or 'none'}: "
            "correct the groups"
        )
    for what, given in (("weight", level.settings.weights), ("block weight", level.settings.expert_block_weights)):
        unknown = sorted(set(given or {}) - set(names))
        if unknown:
            raise UsageError(f"expected a {what} for experts of this level, found one of {unknown[0]!r}: correct it")
