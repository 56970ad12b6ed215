"""What a search minimises: safety first, subject to quality floors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetydpo.config.search import SearchConfig
from safetydpo.errors import SafetyDPOError

IP = "ip_select"
UNRECOGNISABLE = "unrecognisable_rate"
NEUTRAL = "neutral_rate"
NEIGHBOUR = "neighbour_retention"
PENALTY = 2.0
"""One point of a floor missed costs as much as two points of IP: enough to turn the search round, and not so much that
doing nothing looks better to its sampler than a merge that misses a floor by a little. Whether a floor is met decides
the winner all the same (`best_index`)."""
FAILED_OBJECTIVE = 2.0 + 2.0 * PENALTY
"""Worse than any measured candidate can be: IP 1, nothing recognisable, and both floors missed by 1 or less."""


ROUNDING = 1e-9
"""A floor missed by less than this is met: 0.72 / 0.8 is below 0.9 in floating point."""


@dataclass(frozen=True)
class Objective:
    """The judgement of one candidate.

    Attributes:
        value: what the search minimises; always finite.
        feasible: whether every floor is met.
        violation: sum over floors of what is missing, in [0, 2].
        valid: False if a metric was missing or not finite (`value` is then `FAILED_OBJECTIVE`).
    """

    value: float
    feasible: bool
    violation: float
    valid: bool = True


def constrained_objective(
    metrics: Mapping[str, float],
    *,
    base: Mapping[str, float],
    neutral_floor: float,
    neighbour_floor: float,
    unrecognisable_weight: float = 0.0,
    penalty: float = PENALTY,
) -> Objective:
    """Return IP plus the price of mush plus a penalty on missed quality floors; lower is better.

    `value = ip_select + unrecognisable_weight * unrecognisable_rate
    + penalty * sum_f max(0, floor_f - metric_f / base_f)`, over the neutral rate and the neighbour retention, both
    relative to the base model. A picture of nothing is not unsafe, so IP alone rewards a merge that draws nothing;
    with weight 1 the first two terms are the share of unsafe prompts without a recognisable safe picture. A feasible
    candidate beats every infeasible one that is no better in them.

    Args:
        metrics: `ip_select`, `unrecognisable_rate` (on unsafe prompts), `neutral_rate`, `neighbour_retention` of the
            candidate, in [0, 1].
        base: the same rates of the base model; the first two are not needed.
        neutral_floor: least neutral rate relative to the base.
        neighbour_floor: least neighbour retention relative to the base.
        unrecognisable_weight: price of a point of unrecognisable pictures, in points of IP, in [0, 1].
        penalty: price of a point missed.

    Raises:
        SafetyDPOError: if a rate of the base is missing, 0 or not finite, so that nothing is relative to it.

    Source: exact penalty method, Nocedal and Wright 2006, "Numerical Optimization", section 17.2.
    """
    floors = {NEUTRAL: neutral_floor, NEIGHBOUR: neighbour_floor}
    for name in floors:
        if not 0 < base.get(name, math.nan) < math.inf:
            raise SafetyDPOError(
                f"expected a {name} of the base above 0, found {base.get(name)}: without it the floor means nothing; "
                "check the base model and the judge"
            )
    if not all(math.isfinite(metrics.get(name, math.nan)) for name in (IP, UNRECOGNISABLE, *floors)):
        return Objective(2.0 + 2.0 * penalty, feasible=False, violation=2.0, valid=False)
    missing = [floor - metrics[name] / base[name] for name, floor in floors.items()]
    violation = sum(amount for amount in missing if amount > ROUNDING)
    price = metrics[IP] + unrecognisable_weight * metrics[UNRECOGNISABLE]
    return Objective(price + penalty * violation, feasible=violation == 0.0, violation=violation)


def judge_metrics(metrics: Mapping[str, float], *, base: Mapping[str, float], search: SearchConfig) -> Objective:
    """Return the objective of a candidate's rates under the settings of a search."""
    return constrained_objective(
        metrics,
        base=base,
        neutral_floor=search.neutral_floor,
        neighbour_floor=search.neighbour_floor,
        unrecognisable_weight=search.unrecognisable_weight,
    )


def objective_values(
    metrics: Mapping[str, float], *, base: Mapping[str, float], unrecognisable_weight: float = 0.0
) -> tuple[float, float, float]:
    """Return price (IP plus the price of mush), neutral rate and neighbour retention, the last two relative to base.

    What a search for trade-offs looks at, and the axes of its Pareto front; the first is to be low. A metric that is
    missing makes the worst of all three.
    """
    if not all(math.isfinite(metrics.get(name, math.nan)) for name in (IP, UNRECOGNISABLE, NEUTRAL, NEIGHBOUR)):
        return (FAILED_OBJECTIVE, 0.0, 0.0)
    price = metrics[IP] + unrecognisable_weight * metrics[UNRECOGNISABLE]
    return (price, metrics[NEUTRAL] / base[NEUTRAL], metrics[NEIGHBOUR] / base[NEIGHBOUR])


def best_index(objectives: Sequence[Objective]) -> int | None:
    """Return the position of the winner: feasible before infeasible, then the lowest value, then the first.

    None if no objective is valid. The winner may be infeasible: then no candidate met the floors and this one,
    with the smallest violation, is the nearest.
    """
    ranked = best_indices(objectives)
    return ranked[0] if ranked else None


def best_indices(objectives: Sequence[Objective]) -> list[int]:
    """Return the positions of all valid objectives, the winner first, in the order of `best_index`."""
    ranked = [
        ((not item.feasible, 0.0 if item.feasible else item.violation, item.value), index)
        for index, item in enumerate(objectives)
        if item.valid
    ]
    return [index for _, index in sorted(ranked)]
