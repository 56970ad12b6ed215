"""Each acceleration of a training step alone, and those that helped together against the public trainer's way."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import alternate, ratio_of_medians
from benchmarks.sd15_models import SMALL_PICTURE
from benchmarks.train_ways import DPO, OurTraining, encode_once, make_pairs, public_way, repeat, stacked_experts
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.batch import PreferenceData

STACKED = 4
HELPED = 1.0
"""An acceleration whose ratio to `live` is above this is part of the best way."""
CHANNELS_LAST, COMPILED, FUSED = "channels-last", "compiled", "fused optimizer"
LOW, EXPERTS = "bfloat16", f"{STACKED} experts in one batch"
ACCELERATIONS = (CHANNELS_LAST, COMPILED, FUSED, LOW, EXPERTS)
WARM_UP = 2
"""Rounds that do not count: code is compiled in them."""
Way = tuple[Callable[[], None], int]
"""A step and how many times `DPO.pairs_per_step` pairs it takes."""


def our_way(folder: Path, data: PreferenceData, chosen: Sequence[str]) -> Way:
    """Return our live step with some of the accelerations."""
    backbone = load_backbone(BaseModelConfig(model=str(folder), dtype=dtype_of(chosen)))  # type: ignore[arg-type]
    options = {"channels_last": CHANNELS_LAST in chosen, "compiled": COMPILED in chosen, "fused": FUSED in chosen}
    if EXPERTS in chosen:
        return stacked_experts(backbone, data, experts=STACKED, **options), STACKED
    return OurTraining(backbone, data, **options).step, 1


def dtype_of(chosen: Sequence[str]) -> str:
    """Return the compute type of a way."""
    return "bfloat16" if LOW in chosen else "float32"


def measure_best(
    folder: Path, *, rounds: int, steps: int, picture: int = SMALL_PICTURE, accelerations: Sequence[str] = ACCELERATIONS
) -> tuple[dict[str, float], dict[str, Any]]:
    """Try each acceleration alone against `live` in float32, then those that helped together against `public`.

    Ratios are of pairs per second; `public` computes in the type of the way beside it.
    """
    pairs = make_pairs(picture)
    data = encode_once(load_backbone(BaseModelConfig(model=str(folder))), pairs)
    alone = {"live": our_way(folder, data, ()), **{name: our_way(folder, data, (name,)) for name in accelerations}}
    wall = _seconds_of_a_unit(alone, rounds=rounds, steps=steps)
    ratios = {name: ratio_of_medians(wall["live"], wall[name]) for name in accelerations}
    helped = [name for name in accelerations if ratios[name] > HELPED]
    public = public_way(folder, "public", pairs, dtype=dtype_of(helped))
    both = _seconds_of_a_unit(
        {"public": (public, 1), "best": our_way(folder, data, helped)}, rounds=rounds, steps=steps
    )
    found = {f"{name} vs live": ratio for name, ratio in ratios.items()}
    found["pairs_per_second_vs_public_best"] = ratio_of_medians(both["public"], both["best"])
    per_second = {name: round(DPO.pairs_per_step / statistics.median(rows), 3) for name, rows in both.items()}
    return found, {
        "best_is": helped or ["live"],
        "best_dtype": dtype_of(helped),
        "pairs_per_second": per_second,
        "wall_seconds_of_a_step": {**wall, **both},
    }


def _seconds_of_a_unit(ways: Mapping[str, Way], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the wall seconds that each way takes for `DPO.pairs_per_step` pairs, in every round."""
    times = alternate(
        {name: repeat(step, steps) for name, (step, _) in ways.items()}, rounds=rounds, warmup_rounds=WARM_UP
    )
    return {name: [one.wall_seconds / (steps * ways[name][1]) for one in rows] for name, rows in times.items()}
