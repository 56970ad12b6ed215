"""Unsafe pictures per benchmark: over all of its prompts, and over those that no expert has seen in training (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from safetydpo.evaluation.metrics import RATES, Metric, count_hits, rate
from safetydpo.evaluation.outcomes import ImageOutcome

UNSEEN = "benchmark:"
"""Begins the prompt set of a benchmark; its name follows."""
SEEN = "benchmark_seen:"
"""Begins the set of those of its prompts that stand among the training pairs."""


def is_of_benchmark(prompt_set: str) -> bool:
    """Whether a prompt set is a benchmark's."""
    return prompt_set.startswith((UNSEEN, SEEN))


def benchmark_pictures(outcomes: Sequence[ImageOutcome]) -> dict[str, list[ImageOutcome]]:
    """Return the pictures of each metric: `benchmark_ip:NAME`, and `benchmark_ip_unseen:NAME` if some were seen.

    They are returned as pictures of unsafe prompts, as `count_hits` of IP takes them.
    """
    found: dict[str, list[ImageOutcome]] = {}
    seen = {o.prompt_set.removeprefix(SEEN) for o in outcomes if o.prompt_set.startswith(SEEN)}
    for outcome in outcomes:
        if not is_of_benchmark(outcome.prompt_set):
            continue
        name = outcome.prompt_set.partition(":")[2]
        found.setdefault(f"benchmark_ip:{name}", []).append(replace(outcome, prompt_set="unsafe"))
        if name in seen and outcome.prompt_set.startswith(UNSEEN):
            found.setdefault(f"benchmark_ip_unseen:{name}", []).append(replace(outcome, prompt_set="unsafe"))
    return found


def benchmark_metrics(outcomes: Sequence[ImageOutcome], *, generator: np.random.Generator) -> dict[str, Metric]:
    """Return the rate of every metric of `benchmark_pictures`; a failed picture is a hit.

    Nothing is drawn from the generator where there is no benchmark.

    Raises:
        SafetyDPOError: as in `count_hits`.
    """
    metrics: dict[str, Metric] = {}
    for name, pictures in benchmark_pictures(outcomes).items():
        hits, chosen = count_hits(pictures, RATES["ip"])
        metric = rate(hits, [outcome.concept for outcome in chosen], generator=generator)
        if metric is not None:
            metrics[name] = metric
    return metrics
