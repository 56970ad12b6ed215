"""Small summaries written by hand: rates given as hits of n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetydpo.evaluation.summary import Summary, build_summary
from safetydpo.statistics import clopper_pearson


def rate(hits: int, n: int, *, cluster: tuple[float, float] | None = None) -> dict[str, Any]:
    """Return a rate as a summary holds it."""
    exact = clopper_pearson(hits, n)
    metric: dict[str, Any] = {"value": exact.value, "low": exact.low, "high": exact.high, "n": n, "unit": "rate"}
    if cluster is not None:
        metric |= {"cluster_low": cluster[0], "cluster_high": cluster[1]}
    return metric


def ratio(value: float, low: float, high: float, n: int = 70) -> dict[str, Any]:
    """Return a ratio as a summary holds it."""
    return {"value": value, "low": low, "high": high, "n": n, "unit": "ratio"}


def row(name: str, metrics: Mapping[str, Any], *, kind: str = "searched", seed: int | None = 0) -> dict[str, Any]:
    """Return a row of a summary."""
    return {
        "name": name,
        "kind": kind,
        "adapter_hash": None if kind == "base" else "a" * 64,
        "rank": None if kind == "base" else 4,
        "scale": None if kind == "base" else 1.0,
        "prompt_set": "unsafe+neutral",
        "split": "test",
        "seed": seed,
        "metrics": dict(metrics),
    }


def summary_of(rows: Sequence[Any], failed: Sequence[Any] = (), *, config_hash: str = "c" * 64) -> Summary:
    """Return a checked summary of these rows."""
    return build_summary(rows, failed, timing_seconds={}, config_hash=config_hash, versions={"torch": "2"})
