"""What a search has spent and whether another measurement fits into its budgets. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Span:
    """One measurement: when it started (Unix time) and how many seconds it took."""

    started_at: float
    seconds: float


@dataclass(frozen=True)
class Budget:
    """Limits of a search over all of its commands; None = no limit.

    Attributes:
        seconds: during which measurements may run.
        cost: of all measurements, in the unit of the price.
        price_per_second: of one running measurement.
    """

    seconds: float | None = None
    cost: float | None = None
    price_per_second: float = 0.0


@dataclass(frozen=True)
class Spend:
    """What measurements took.

    Attributes:
        busy_seconds: during which at least one ran.
        worker_seconds: of all of them together.
        cost: worker seconds times their price.
    """

    busy_seconds: float
    worker_seconds: float
    cost: float


def price_per_second(*, cpus: float, gpus: float, per_cpu_hour: float, per_gpu_hour: float) -> float:
    """Return what one worker costs in a second."""
    return (cpus * per_cpu_hour + gpus * per_gpu_hour) / SECONDS_PER_HOUR


def spend_of(spans: Sequence[Span], *, price_per_second: float) -> Spend:
    """Return what these measurements took; those that ran side by side count once in `busy_seconds`."""
    busy, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda one: one.started_at):
        stop = span.started_at + span.seconds
        busy += max(0.0, stop - max(end, span.started_at))
        end = max(end, stop)
    workers = sum(span.seconds for span in spans)
    return Spend(busy, workers, workers * price_per_second)


def why_not_start(
    finished: Sequence[Span], *, running_since: Sequence[float], now: float, budget: Budget, typical_seconds: float
) -> str | None:
    """Return which budget another measurement would break, in words; None = it fits.

    One of `typical_seconds` more must fit beside what is finished and what runs: those that run are taken to need as
    long, or as long as they have needed already. What is not started cannot break a budget, so that a search ends by
    itself, with all of its measurements whole.
    """
    ends = [max(now - start, typical_seconds) for start in running_since]
    running = [Span(start, seconds) for start, seconds in zip(running_since, ends, strict=True)]
    spent = spend_of([*finished, *running, Span(now, typical_seconds)], price_per_second=budget.price_per_second)
    # A first measurement takes no known time; it may start while anything is left.
    if budget.seconds is not None and _is_used_up(spent.busy_seconds, budget.seconds, typical_seconds):
        return f"time budget of {budget.seconds:g} s"
    if budget.cost is not None and _is_used_up(spent.cost, budget.cost, typical_seconds):
        return f"cost budget of {budget.cost:g}"
    return None


def _is_used_up(spent: float, limit: float, typical_seconds: float) -> bool:
    return spent > limit or (typical_seconds == 0.0 and spent >= limit)


def typical_seconds(seconds: Sequence[float]) -> float:
    """Return the median of measurements, in seconds; 0 of none."""
    return statistics.median(seconds) if seconds else 0.0
