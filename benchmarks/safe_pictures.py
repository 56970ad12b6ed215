"""How the safe picture of a pair is best made from the unsafe one: same noise, other noise, SDEdit; on the demo model.

Usage: python -m benchmarks.safe_pictures [--pairs-per-concept 10] [--steps 8] [--strength 0.5]

Every way draws the safe prompts of the same pairs; the unsafe pictures are drawn once for each guidance scale. Of each
way: the mean distance of the two luminance grids (what `layout_pixel_max` limits), and by the `select` judge the rates
of safe pictures that still are unsafe and that nobody recognises, with exact 95 % intervals. `ratios` are distances
relative to that of the same noise at the same guidance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.harness import print_result
from ray_jobs.failures import run_guarded
from ray_jobs.prompt_tables import chosen_pairs
from safetydpo.config.schema import Config, SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.render import redraw, render
from safetydpo.judges.build import load_judge
from safetydpo.judges.protocol import Judge
from safetydpo.pairs.layout import luminance_grid, pixel_distance
from safetydpo.pairs.manifest import pair_seed
from safetydpo.prompts.sets import PromptPair
from safetydpo.seeding import derive_seed
from safetydpo.statistics import clopper_pearson

SAME_NOISE = "same noise"


@dataclass(frozen=True)
class Way:
    """How the safe picture is made; `negative` is what the unguided branch of SDEdit sees."""

    name: str
    guidance_scale: float
    negative: str | None = None


WAYS = tuple(
    Way(name, guidance, negative)
    for guidance in (4.0, 2.0)
    for name, negative in (
        (SAME_NOISE, None),
        ("other noise", None),
        ("SDEdit", "unsafe_prompt"),
        ("SDEdit", "empty"),
    )
)


def draw_safe(
    backbone: Backbone,
    pairs: Sequence[PromptPair],
    unsafe: Tensor,
    way: Way,
    *,
    sampler: SamplerConfig,
    strength: float,
) -> Tensor:
    """Return the safe picture of each pair, drawn this way."""
    prompts = [pair.safe_text for pair in pairs]
    seeds = [pair_seed(0, pair.pair_id) for pair in pairs]
    if way.negative is not None:
        negatives = [pair.unsafe_text if way.negative == "unsafe_prompt" else "" for pair in pairs]
        return redraw(
            backbone,
            pictures=unsafe,
            prompts=prompts,
            negative_prompts=negatives,
            seeds=seeds,
            sampler=sampler,
            strength=strength,
        )
    if way.name != SAME_NOISE:
        seeds = [derive_seed(0, "other_noise", pair.pair_id) for pair in pairs]
    return render(backbone, prompts=prompts, seeds=seeds, sampler=sampler)


def measure(judge: Judge, unsafe: Tensor, safe: Tensor) -> dict[str, Any]:
    """Return what the pictures of one way say."""
    sides = [[luminance_grid(picture.numpy()).ravel() for picture in pictures] for pictures in (unsafe, safe)]
    distances = [pixel_distance(first, second) for first, second in zip(*sides, strict=True)]
    verdicts = judge.judge(safe)
    rates = {"unsafe": verdicts.is_unsafe, "unrecognisable": verdicts.is_unrecognisable}
    return {
        "distance": float(np.mean(distances)),
        "unsafe_score": float(np.mean(verdicts.unsafe_score)),
        **{name: asdict(clopper_pearson(sum(map(bool, found)), len(found))) for name, found in rates.items()},
    }


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs-per-concept", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strength", type=float, default=0.5)
    arguments = parser.parse_args()
    prompts = {"pairs_per_concept": arguments.pairs_per_concept}
    sampler = {"steps": arguments.steps}
    identity = Config.model_validate({"name": "bench", "identity": {"prompts": prompts, "sampler": sampler}}).identity
    pairs = chosen_pairs(identity.prompts, seed=identity.seed)
    backbone, judge = load_backbone(identity.base), load_judge("demo_select")
    unsafe: dict[float, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        guided = identity.sampler.model_copy(update={"guidance_scale": way.guidance_scale})
        if way.guidance_scale not in unsafe:
            seeds = [pair_seed(0, pair.pair_id) for pair in pairs]
            texts = [pair.unsafe_text for pair in pairs]
            unsafe[way.guidance_scale] = render(backbone, prompts=texts, seeds=seeds, sampler=guided)
        before = unsafe[way.guidance_scale]
        safe = draw_safe(backbone, pairs, before, way, sampler=guided, strength=arguments.strength)
        rows.append({**asdict(way), **measure(judge, before, safe)})
        print(rows[-1], flush=True)
    same = {row["guidance_scale"]: row["distance"] for row in rows if row["name"] == SAME_NOISE}
    ratios = {
        f"distance of {' '.join(filter(None, (row['name'], row['negative'])))} at {row['guidance_scale']:g}": (
            row["distance"] / same[row["guidance_scale"]]
        )
        for row in rows
        if row["name"] != SAME_NOISE
    }
    raw = {"pairs": len(pairs), "steps": arguments.steps, "strength": arguments.strength, "ways": rows}
    print_result("safe_pictures", ratios=ratios, raw=raw)


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
