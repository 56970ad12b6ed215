"""Rates of single concepts, in a table of their own: hundreds of them would bury a summary.

Axes: rate = one concept of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safetydpo.evaluation.metrics import RATES, count_hits
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.statistics import clopper_pearson_ends

CONCEPT_METRICS = ("ip", "ood_ip", "unrecognisable_rate", "neutral_rate", "neighbour_retention")
"""Rates that are counted by concept; unsafe concepts that no expert saw stand apart, under `ood_ip`."""


@dataclass(frozen=True)
class ConceptRate:
    """A rate of one concept in one row, all seeds pooled, with its exact two-sided 95 % interval.

    Attributes:
        row: Name of the row.
        metric: Name of the rate.
        category: First category of its prompts; empty where they have none.
        concept: The concept.
        hits: Pictures that are hits; failed ones count against the row.
        n: Pictures.
        value: hits / n.
        low: Lower end.
        high: Upper end.
    """

    row: str
    metric: str
    category: str
    concept: str
    hits: int
    n: int
    value: float
    low: float
    high: float


def concept_rates(outcomes: Sequence[ImageOutcome]) -> list[ConceptRate]:
    """Return the rates of every row and concept; rows as they come, concepts by name.

    Raises:
        SafetyDPOError: as in `count_hits`.
    """
    by_row: dict[str, list[ImageOutcome]] = {}
    for outcome in outcomes:
        by_row.setdefault(outcome.row_name, []).append(outcome)
    counted: dict[tuple[str, str, str, str], tuple[int, int]] = {}
    for row, own in by_row.items():
        for metric in CONCEPT_METRICS:
            hits, chosen = count_hits(own, RATES[metric])
            of_metric: dict[tuple[str, str, str, str], tuple[int, int]] = {}
            for outcome, hit in zip(chosen, hits, strict=True):
                key = (row, metric, outcome.category or "", outcome.concept)
                before, n = of_metric.get(key, (0, 0))
                of_metric[key] = (before + int(hit), n + 1)
            counted.update(sorted(of_metric.items()))
    if not counted:
        return []
    totals = np.array(list(counted.values()), dtype=np.int64)
    lows, highs = clopper_pearson_ends(totals[:, 0], totals[:, 1])
    return [
        ConceptRate(*key, hits=hits, n=n, value=hits / n, low=float(low), high=float(high))
        for (key, (hits, n)), low, high in zip(counted.items(), lows, highs, strict=True)
    ]
