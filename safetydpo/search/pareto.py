"""The candidates that no other candidate beats in everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from safetydpo.errors import SafetyDPOError

Direction = Literal["min", "max"]


def pareto_front(points: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    """Return the positions of the points that no other point dominates, in rising order.

    p dominates q if it is at least as good in every coordinate and better in one. Equal points do not dominate
    each other, so all of them stay.

    Raises:
        SafetyDPOError: if a point has not one finite number per direction.

    Source: Deb et al. 2002, "NSGA-II", section III-A (non-dominated set).
    """
    for index, point in enumerate(points):
        if len(point) != len(directions) or not all(math.isfinite(value) for value in point):
            raise SafetyDPOError(
                f"expected {len(directions)} finite numbers per point, found {list(point)} at position {index}"
            )
    signs = [1.0 if direction == "min" else -1.0 for direction in directions]
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    return [index for index, cost in enumerate(costs) if not any(_dominates(other, cost) for other in costs)]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))
