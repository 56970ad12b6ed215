"""What a merge search may choose: candidates and the space they come from, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Candidate:
    """One merge that may be tried: everything that decides the merged adapter, given the experts.

    `weights` is sorted by expert name; `density` is None for methods that do not use it.
    """

    method: str
    global_scale: float
    weights: tuple[tuple[str, float], ...]
    density: float | None = None

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no spaces, floats that read back exactly."""
        value = {
            METHOD: self.method,
            SCALE: self.global_scale,
            "weights": dict(self.weights),
            DENSITY: self.density,
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @property
    def hash(self) -> str:
        """sha256 hex digest of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Candidate:
        """Read what `to_json` wrote.

        Raises:
            SafetyDPOError: if the text is no candidate.
        """
        try:
            value = json.loads(text)
            density = value[DENSITY]
            weights = tuple(sorted((str(name), float(weight)) for name, weight in value["weights"].items()))
            return cls(
                method=str(value[METHOD]),
                global_scale=float(value[SCALE]),
                weights=weights,
                density=None if density is None else float(density),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SafetyDPOError(
                f"expected a merge candidate in JSON, found {text[:80]!r} ({type(error).__name__}: {error}): "
                "the log of trials is damaged; delete it to search again"
            ) from error


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
    """

    methods: tuple[str, ...]
    density_methods: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    scale_ranges: tuple[tuple[str, tuple[float, float]], ...]
    weight_range: tuple[float, float]
    density_range: tuple[float, float]
    plain_scales: tuple[tuple[str, tuple[float, ...]], ...] = ()
    unweighted_methods: tuple[str, ...] = ()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of all experts, sorted."""
        return tuple(sorted(name for _, members in self.groups for name in members))

    def scale_range(self, method: str) -> tuple[float, float]:
        """Return the range of a method's global scale."""
        return dict(self.scale_ranges)[method]


class Suggester(Protocol):
    """The part of an optuna trial that is used here."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
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
    if len(chosen) > MAX_WEIGHTS:
        raise UsageError(
            f"expected at most {MAX_WEIGHTS} weights to search, found {len(chosen)}: give groups of experts that "
            "share one weight, for example one per category"
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
    )


def weight_groups(experts: Mapping[str, Sequence[str]]) -> dict[str, list[str]] | None:
    """Return the experts that share one coefficient: None up to 20 of them, else all of one first category.

    `experts` are their names with the categories that each is made for.

    Raises:
        SafetyDPOError: if there are more and one names no category.
    """
    if len(experts) <= MAX_WEIGHTS:
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
        if method in space.unweighted_methods:
            weights |= dict.fromkeys(members, 1.0)
        else:
            weights |= dict.fromkeys(members, trial.suggest_float(f"{WEIGHT_PREFIX}{group}", *space.weight_range))
    density = trial.suggest_float(DENSITY, *space.density_range) if method in space.density_methods else None
    return Candidate(method, scale, tuple(sorted(weights.items())), density)


def to_parameters(candidate: Candidate, space: SearchSpace) -> dict[str, Any]:
    """Return a candidate as the parameters under which `suggest` asks for it."""
    weights = dict(candidate.weights)
    parameters: dict[str, Any] = {METHOD: candidate.method, f"{SCALE}:{candidate.method}": candidate.global_scale}
    if candidate.method not in space.unweighted_methods:
        parameters |= {f"{WEIGHT_PREFIX}{group}": weights[members[0]] for group, members in space.groups}
    if candidate.density is not None:
        parameters[DENSITY] = candidate.density
    return parameters


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
    weight = _clip(1.0, space.weight_range)
    found = [
        Candidate(
            method,
            scale,
            tuple((name, 1.0 if method in space.unweighted_methods else weight) for name in space.experts),
            _clip(PLAIN_DENSITY, space.density_range) if method in space.density_methods else None,
        )
        for method, scale in wanted
        if space.scale_range(method)[0] <= scale <= space.scale_range(method)[1]
    ]
    return list(dict.fromkeys(found))


def _clip(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
