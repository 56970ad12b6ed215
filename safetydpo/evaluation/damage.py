"""What an adapter changes beside IP, as differences with the base's picture of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safetydpo.evaluation.metrics import RATES, Metric, count_hits, hits_of_base, put, rate_difference
from safetydpo.evaluation.outcomes import ImageOutcome

DAMAGE = {
    "ood_ip_minus_base": "ood_ip",
    "unrecognisable_minus_base": "unrecognisable_rate",
    "neutral_minus_base": "neutral_rate",
    "neighbour_minus_base": "neighbour_retention",
}
"""Difference to the rate that it compares: row minus base, so that damage of the last two is below zero."""


def damage_metrics(
    outcomes: Sequence[ImageOutcome], *, base: Sequence[ImageOutcome], generator: np.random.Generator
) -> dict[str, Metric]:
    """Return the paired differences of `DAMAGE`; one of fewer than 2 concepts, or of an unknown rate, is absent."""
    metrics: dict[str, Metric] = {}
    for name, compared in DAMAGE.items():
        hits, chosen = count_hits(outcomes, RATES[compared])
        if not chosen:
            continue
        before = hits_of_base(chosen, RATES[compared], base=base)
        concepts = [outcome.concept for outcome in chosen]
        put(metrics, name, rate_difference(hits, before, concepts, generator=generator))
    return metrics
