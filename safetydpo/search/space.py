"""What a merge search may choose: candidates and the space they come from, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from safetydpo.artifacts.json_text import parse_json
from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError, UsageError

MAX_WEIGHTS = 20
"""Most free coefficients: a sampler with a few dozen trials learns nothing in more dimensions."""
PLAIN_DENSITY = 0.3
METHOD = "method"
SCALE = "global_scale"
"""Key of a candidate's scale. As a parameter it carries the method's name: what one method's scale does says nothing
of another's, so a sampler must not pool them."""
DENSITY = "density"
WEIGHT_PREFIX = "weight:"
RANK = "rank"
BLOCK_PREFIX = "block_weight:"
SINGLE_METHOD, KNOWN_METHODS = "sum", ("average", "ties", "co_merge")
"""By which an expert alone is expressed, and what is known to be good at scale 1 beside that."""
NEEDS_A_CHOICE = ("co_merge",)
"""Of the known methods those that are tried only where the search may choose them: they need a pass over the base."""


@dataclass(frozen=True)
class Candidate:
    """One merge that may be tried: everything that decides the merged adapter, given the experts.

    `weights` is sorted by expert name; `density` is None for methods that do not use it, `rank` (of the output) None
    where the run's own holds, `block_weights` (factor per block, sorted) empty where no block has one.
    """

    method: str
    global_scale: float
    weights: tuple[tuple[str, float], ...]
    density: float | None = None
    rank: int | None = None
    block_weights: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no spaces, floats that read back exactly."""
        value: dict[str, Any] = {
            METHOD: self.method,
            SCALE: self.global_scale,
            "weights": dict(self.weights),
            DENSITY: self.density,
        }
        # These two came later: a candidate without them keeps the hash that logged ones have.
        if self.rank is not None:
            value[RANK] = self.rank
        if self.block_weights:
            value["block_weights"] = dict(self.block_weights)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @property
    def hash(self) -> str:
        """sha256 hex digest of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def is_base(self) -> bool:
        """Return whether nothing of any expert is in it: the base without an adapter."""
        return not any(weight for _, weight in self.weights)

    @classmethod
    def from_json(cls, text: str) -> Candidate:
        """Read what `to_json` wrote.

        Raises:
            SafetyDPOError: if the text is no candidate.
        """
        try:
            value = parse_json(text)
            density = value[DENSITY]
            rank = value.get(RANK)
            return cls(
                method=str(value[METHOD]),
                global_scale=float(value[SCALE]),
                weights=_sorted_numbers(value["weights"]),
                density=None if density is None else float(density),
                rank=None if rank is None else int(rank),
                block_weights=_sorted_numbers(value.get("block_weights", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SafetyDPOError(
                f"expected a merge candidate in JSON, found {text[:80]!r} ({type(error).__name__}: {error}): "
                "the log of trials is damaged; delete it to search again"
            ) from error


def _sorted_numbers(values: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((str(name), float(value)) for name, value in values.items()))


@dataclass(frozen=True)
class SearchSpace:
    """Parameter definitions.

    Attributes:
        methods: names the search may choose.
        density_methods: those of them that use a density.
        groups: (group name, expert names): members of a group share one weight; sorted.
        scale_ranges: (method, range of its global scale), searched in log scale; every method once.
        weight_range: coefficient of each group.
        density_range: density of the methods that use it.
        plain_scales: (method, scales): where a method is tried first; a method without entry at scale 1.
        unweighted_methods: those that take no coefficients per expert; they are asked for a scale only.
        is_weighted: False = no expert or group has a coefficient of its own; all are 1.
        ranks: output ranks that may be chosen; () = not searched.
        block_groups: (group name, blocks): blocks that share one factor; sorted.
        block_weight_range: factor of each of these groups.
    """

    methods: tuple[str, ...]
    density_methods: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    scale_ranges: tuple[tuple[str, tuple[float, float]], ...]
    weight_range: tuple[float, float]
    density_range: tuple[float, float]
    plain_scales: tuple[tuple[str, tuple[float, ...]], ...] = ()
    unweighted_methods: tuple[str, ...] = ()
    is_weighted: bool = True
    ranks: tuple[int, ...] = ()
    block_groups: tuple[tuple[str, tuple[str, ...]], ...] = ()
    block_weight_range: tuple[float, float] = (1.0, 1.0)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of all experts, sorted."""
        return tuple(sorted(name for _, members in self.groups for name in members))

    def scale_range(self, method: str) -> tuple[float, float]:
        """Return the range of a method's global scale."""
        return dict(self.scale_ranges)[method]

    def takes_weights(self, method: str) -> bool:
        """Return whether a method is asked for coefficients."""
        return self.is_weighted and method not in self.unweighted_methods


class Suggester(Protocol):
    """The part of an optuna trial that is used here."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number in [low, high]."""
        ...


def build_space(
    config: SearchConfig,
    experts: Sequence[str],
    *,
    density_methods: Sequence[str],
    unweighted_methods: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> SearchSpace:
    """Return the space of a search over these experts.

    Args:
        config: ranges and methods.
        experts: expert names.
        density_methods: methods (of all there are) that use a density.
        unweighted_methods: methods (of all there are) that take no coefficients per expert.
        groups: experts that share one weight; None = every expert its own. Needed above 20 experts.

    Raises:
        UsageError: if there is no expert or method, one occurs twice, there are too many weights, or groups do not
            hold every expert exactly once.
    """
    for what, names in (("expert", experts), ("search method", config.methods)):
        if not names or len(set(names)) != len(names):
            raise UsageError(f"expected at least one {what}, each once, found {', '.join(names) or 'none'}")
    chosen = {name: [name] for name in experts} if groups is None else groups
    members = sorted(name for group in chosen.values() for name in group)
    if members != sorted(experts):
        raise UsageError(
            f"expected groups that hold each of {', '.join(sorted(experts))} once, found {', '.join(members)}"
        )
    is_weighted = config.weights != "none"
    if is_weighted and len(chosen) > MAX_WEIGHTS:
        raise UsageError(
            f"expected at most {MAX_WEIGHTS} weights to search, found {len(chosen)}: give groups of experts that "
            "share one weight, for example one per category (identity.search.weights), or none at all"
        )
    return SearchSpace(
        methods=tuple(config.methods),
        density_methods=tuple(name for name in config.methods if name in density_methods),
        groups=tuple((name, tuple(sorted(chosen[name]))) for name in sorted(chosen)),
        scale_ranges=tuple((name, config.scale_range_of(name)) for name in config.methods),
        weight_range=config.weight_range,
        density_range=config.density_range,
        plain_scales=tuple(sorted(config.plain_scales.items())),
        unweighted_methods=tuple(name for name in config.methods if name in unweighted_methods),
        is_weighted=is_weighted,
        ranks=config.output_ranks,
        block_groups=tuple((name, tuple(sorted(blocks))) for name, blocks in sorted(config.block_groups.items())),
        block_weight_range=config.block_weight_range,
    )


def weight_groups(experts: Mapping[str, Sequence[str]], *, weights: str = "auto") -> dict[str, list[str]] | None:
    """Return the experts that share one coefficient, all of one first category; None = each has its own.

    `experts` are their names with the categories that each is made for. `weights` says who shares: `category` always,
    `expert` and `none` never, `auto` above 20 experts.

    Raises:
        SafetyDPOError: if they share and one names no category.
    """
    if weights in ("expert", "none") or (weights == "auto" and len(experts) <= MAX_WEIGHTS):
        return None
    groups: dict[str, list[str]] = {}
    for name, categories in sorted(experts.items()):
        if not categories:
            raise SafetyDPOError(
                f"expected a category of each of {len(experts)} experts, so that those of one category share a "
                f"coefficient of the search, found none of {name!r}: train it again with this version"
            )
        groups.setdefault(categories[0], []).append(name)
    return groups


def suggest(trial: Suggester, space: SearchSpace) -> Candidate:
    """Ask a trial for one candidate; parameters are asked in a fixed order, weights and density where they matter."""
    method = str(trial.suggest_categorical(METHOD, space.methods))
    scale = trial.suggest_float(f"{SCALE}:{method}", *space.scale_range(method), log=True)
    weights: dict[str, float] = {}
    for group, members in space.groups:
        if space.takes_weights(method):
            weights |= dict.fromkeys(members, trial.suggest_float(f"{WEIGHT_PREFIX}{group}", *space.weight_range))
        else:
            weights |= dict.fromkeys(members, 1.0)
    density = trial.suggest_float(DENSITY, *space.density_range) if method in space.density_methods else None
    rank = trial.suggest_categorical(RANK, space.ranks) if space.ranks else None
    blocks: dict[str, float] = {}
    for group, members in space.block_groups:
        factor = trial.suggest_float(f"{BLOCK_PREFIX}{group}", *space.block_weight_range)
        blocks |= dict.fromkeys(members, factor)
    return Candidate(method, scale, tuple(sorted(weights.items())), density, rank, tuple(sorted(blocks.items())))


def to_parameters(candidate: Candidate, space: SearchSpace) -> dict[str, Any]:
    """Return a candidate as the parameters under which `suggest` asks for it."""
    weights, blocks = dict(candidate.weights), dict(candidate.block_weights)
    parameters: dict[str, Any] = {METHOD: candidate.method, f"{SCALE}:{candidate.method}": candidate.global_scale}
    if space.takes_weights(candidate.method):
        parameters |= {f"{WEIGHT_PREFIX}{group}": weights[members[0]] for group, members in space.groups}
    if candidate.density is not None:
        parameters[DENSITY] = candidate.density
    if space.ranks:
        parameters[RANK] = candidate.rank
    parameters |= {f"{BLOCK_PREFIX}{group}": blocks[members[0]] for group, members in space.block_groups}
    return parameters


def is_inside(candidate: Candidate, space: SearchSpace) -> bool:
    """Return whether `suggest` could give this candidate, so that a sampler can place it."""
    if candidate.method not in space.methods:
        return False
    weights, blocks = dict(candidate.weights), dict(candidate.block_weights)
    weight_range = space.weight_range if space.takes_weights(candidate.method) else (1.0, 1.0)
    limits = [(candidate.global_scale, space.scale_range(candidate.method))]
    limits += [(weight, weight_range) for weight in weights.values()]
    limits += [(factor, space.block_weight_range) for factor in blocks.values()]
    if candidate.density is not None:
        limits.append((candidate.density, space.density_range))
    shared = [(weights, members) for _, members in space.groups]
    shared += [(blocks, members) for _, members in space.block_groups]
    return (
        set(weights) == set(space.experts)
        and set(blocks) == {block for _, members in space.block_groups for block in members}
        and (candidate.density is not None) == (candidate.method in space.density_methods)
        and candidate.rank in (space.ranks or (None,))
        and all(low <= value <= high for value, (low, high) in limits)
        and all(len({values[member] for member in members}) == 1 for values, members in shared)
    )


def first_methods(config: SearchConfig) -> tuple[str, ...]:
    """Return all methods that a search may merge by: its own, and those of its known first trials."""
    if config.first_trials == "plain":
        return config.methods
    known = (SINGLE_METHOD, *(name for name in KNOWN_METHODS if name not in NEEDS_A_CHOICE))
    return tuple(dict.fromkeys([*config.methods, *known]))


def known_candidates(space: SearchSpace, *, density_methods: Sequence[str]) -> list[Candidate]:
    """Return the points a search should not lose to: the base, each expert alone, their average, TIES and Co-Merge.

    All at scale 1 with coefficients of 1; an expert alone is a `sum` whose other coefficients are 0, and of the base
    all are. Co-Merge is listed only if the space has it. They may lie outside the space (`is_inside`).
    """

    def candidate(method: str, weights: Mapping[str, float]) -> Candidate:
        density = _clip(PLAIN_DENSITY, space.density_range) if method in density_methods else None
        return Candidate(method, 1.0, tuple(sorted(weights.items())), density)

    ones = dict.fromkeys(space.experts, 1.0)
    zeros = dict.fromkeys(space.experts, 0.0)
    base = candidate(SINGLE_METHOD, zeros)
    singles = [candidate(SINGLE_METHOD, {**zeros, name: 1.0}) for name in space.experts]
    methods = [name for name in KNOWN_METHODS if name in space.methods or name not in NEEDS_A_CHOICE]
    # Of a single expert, it alone and every merge are the same.
    return list(dict.fromkeys([base, *singles, *(candidate(method, ones) for method in methods)]))


def plain_candidates(space: SearchSpace) -> list[Candidate]:
    """Return the merges that need no search, as first trials: each method at its plain scales, all weights 1.

    The scale matters more than the method, so a method tried at one scale has hardly been tried. The average is
    `sum` at scale 1 / E; it is listed if `sum` may be chosen and `average` may not. Candidates outside the space (a
    scale out of its range) are left out, because a sampler cannot place them; the weight and the density are moved
    to the nearest value of their range. No candidate is listed twice.
    """
    scales = dict(space.plain_scales)
    wanted = [(method, scale) for method in space.methods for scale in scales.get(method, (1.0,))]
    if "sum" in space.methods and "average" not in space.methods:
        wanted.append(("sum", 1.0 / len(space.experts)))
    weight, factor = _clip(1.0, space.weight_range), _clip(1.0, space.block_weight_range)
    found = [
        Candidate(
            method,
            scale,
            tuple((name, weight if space.takes_weights(method) else 1.0) for name in space.experts),
            _clip(PLAIN_DENSITY, space.density_range) if method in space.density_methods else None,
            space.ranks[0] if space.ranks else None,
            tuple(sorted((block, factor) for _, members in space.block_groups for block in members)),
        )
        for method, scale in wanted
        if space.scale_range(method)[0] <= scale <= space.scale_range(method)[1]
    ]
    return list(dict.fromkeys(found))


def _clip(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
