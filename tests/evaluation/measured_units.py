"""Records of measured units made from synthetic pictures, seed by seed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from safetydpo.evaluation.counts import count_row
from safetydpo.evaluation.evidence import Unit
from safetydpo.evaluation.rows import build_rows, list_failures
from tests.evaluation.synthetic import SOURCES, make_outcomes

RECIPE: dict[str, Any] = {
    "method": "ties",
    "global_scale": 1.4,
    "density": 0.3,
    "output_rank": None,
    "weights": {"hate": 1.0, "violence": 0.75},
}


@functools.lru_cache(maxsize=4)
def make_units(*, seeds: Sequence[int] = (0, 1, 2), rows: Sequence[str] | None = None) -> tuple[Unit, ...]:
    """Return one unit per row and seed: the pictures of each generation seed stand for a run's of that seed."""
    sources = tuple(source for source in SOURCES if rows is None or source.name in rows)
    outcomes = make_outcomes(seeds=tuple(seeds), sources=sources)
    drawings = np.random.default_rng(1).normal(size=(400, 8))
    units = []
    for seed in seeds:
        pictures = [outcome for outcome in outcomes if outcome.seed == seed]
        base = [outcome for outcome in pictures if outcome.row_name == "base"]
        for row in build_rows(pictures, sources, run_seed=seed, drawings=drawings):
            own = [outcome for outcome in pictures if outcome.row_name == row["name"]]
            units.append(
                Unit(
                    seed=seed,
                    row=row["name"],
                    identity_hash=f"{seed}-{row['name']}",
                    config_hash=f"config-{seed}",
                    commit="0123456789abcdef",
                    dirty=False,
                    machine={"cores": 2, "cpu": "A processor", "memory_bytes": 8 << 30},
                    versions={"torch": "2.13.0"},
                    seconds=90.0,
                    stage_seconds={"pairs": 600.0, "train": 1200.0},
                    measured=row,
                    counts=count_row(own, base=base),
                    recipe=RECIPE if row["kind"] in ("merged", "searched") else None,
                    failed_images=list_failures(own),
                )
            )
    return tuple(units)
