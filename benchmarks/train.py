"""Training in numbers: DPO pairs per second and memory, against two public ways to write the same step.

Usage: python -m benchmarks.train [--parts speed best memory bounds] [--dtype float32 bfloat16] [--rounds 5]

Speed is measured on a U-Net and an autoencoder with random weights that share the work as SD1.5's do (encoder : U-Net
forward = 1.12 : 0.80 operations). All ways train a rank-4 LoRA on the same pictures and captions, equal batches, same
dtype, AdamW and clipping, alternating:

- `public`: the released trainer's way: a second U-Net, autoencoder and text encoder in every step.
- `script`: the way of diffusers' example: the adapter is switched off for the reference.
- `live`: ours; latents and text features were made once, the reference is the same U-Net with the adapter off.
- `cached`: ours with reference errors that were made once too; `cached_used_once` adds a draw's reference pass to it,
  which is what it costs unless sweeps or `draws_per_pair` use the draw again.
- `floor`: a bare forward and backward pass of the same batch (and a forward pass without gradients for `live`).

The bounds count operations only: with one encoder pass 1.12 and one forward or backward pass 0.80, `public` costs
2 x (1.12 + 3 x 0.80) a pair, `live` 2 x 3 x 0.80, `cached` 2 x 2 x 0.80.

`best` adds one thing at a time to `live`: channels-last, `identity.dpo.compiled`, the fused optimizer, bfloat16, four
experts in one batch over the shared base; then those that helped together, as `pairs_per_second_vs_public_best`.
`memory` runs one step of one pair at 512 x 512 on an SD1.5 of full size, each way in a process of its own, ours with a
model that the product loads from files; counted is the peak above what the process held after its imports. `bounds`
times the passes of SD1.5's networks at three sizes: the most that any way could gain on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import alternate, print_result, ratio_of_medians
from benchmarks.public_trainers import PUBLIC_WAYS
from benchmarks.sd15_models import SD15_PROPORTION, SMALL_PICTURE, TOKENS, build_small_sd15, operations
from benchmarks.train_best import measure_best
from benchmarks.train_bounds import measure_bounds
from benchmarks.train_memory import measure_memory
from benchmarks.train_ways import (
    DPO,
    OurTraining,
    bare_passes,
    encode_once,
    make_pairs,
    public_way,
    reference_pass,
    repeat,
)
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.build import load_backbone
from tests.tiny import build_tokenizer

PARTS = ("speed", "best", "memory", "bounds")


def operation_bounds(backbone: Any, vae: Any) -> dict[str, float]:
    """Return the proportion of work of the small model, and the bounds that follow from SD1.5's."""
    latents = torch.randn(1, 4, SMALL_PICTURE // 8, SMALL_PICTURE // 8)
    unet = operations(backbone.network, latents, torch.zeros(1), torch.randn(1, TOKENS, 64))
    encoder = operations(vae.encoder, torch.randn(1, 3, SMALL_PICTURE, SMALL_PICTURE))
    public = SD15_PROPORTION + 3
    return {
        "encoder_vs_unet_operations": encoder / unet,
        "encoder_vs_unet_operations_of_sd15": SD15_PROPORTION,
        "bound_live": public / 3,
        "bound_cached": public / 2,
    }


def measure_speed(folder: Path, *, dtype: str, rounds: int, steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run all ways alternately in one dtype; return ratios of median seconds and what they were made of."""
    torch.manual_seed(0)
    base = BaseModelConfig(model=str(folder), dtype=dtype)  # type: ignore[arg-type]
    pairs = make_pairs(SMALL_PICTURE)
    encoder, started = load_backbone(base), time.perf_counter()
    data = encode_once(encoder, pairs)
    encode_seconds = (time.perf_counter() - started) / len(pairs[2])
    bounds = operation_bounds(load_backbone(BaseModelConfig(model=str(folder))), _vae(folder))
    live, cached = OurTraining(load_backbone(base), data), OurTraining(load_backbone(base), data, cached=True)
    public, script = (public_way(folder, kind, pairs, dtype=dtype) for kind in PUBLIC_WAYS)
    ways = {
        "public": public,
        "script": script,
        "live": live.step,
        "cached": cached.step,
        "floor of live": bare_passes(live, with_reference=True),
        "floor of cached": bare_passes(cached, with_reference=False),
        "reference pass": reference_pass(live),
    }
    times = alternate({name: repeat(step, steps) for name, step in ways.items()}, rounds=rounds)
    wall = {name: [one.wall_seconds for one in rows] for name, rows in times.items()}
    # A draw that is used once costs its reference pass beforehand instead.
    once = [seconds + pass_ for seconds, pass_ in zip(wall["cached"], wall["reference pass"], strict=True)]
    ratios = {
        "pairs_per_second_vs_public_cached_used_once": ratio_of_medians(wall["public"], once),
        "pairs_per_second_vs_public_live": ratio_of_medians(wall["public"], wall["live"]),
        "pairs_per_second_vs_public_cached": ratio_of_medians(wall["public"], wall["cached"]),
        "pairs_per_second_vs_script_live": ratio_of_medians(wall["script"], wall["live"]),
        "pairs_per_second_vs_script_cached": ratio_of_medians(wall["script"], wall["cached"]),
        "share_of_floor": ratio_of_medians(wall["floor of live"], wall["live"]),
        "share_of_floor_cached": ratio_of_medians(wall["floor of cached"], wall["cached"]),
    }
    per_second = {name: round(DPO.pairs_per_step * steps / statistics.median(rows), 3) for name, rows in wall.items()}
    saved = (statistics.median(wall["public"]) - statistics.median(wall["live"])) / (DPO.pairs_per_step * steps)
    raw: dict[str, Any] = {
        "encode_once_seconds_per_pair": encode_seconds,
        "uses_of_a_pair_until_encoding_is_paid": encode_seconds / saved if saved > 0 else None,
    }
    raw |= {"pairs_per_second": per_second, "wall_seconds_per_round": wall, "pairs_per_step": DPO.pairs_per_step}
    return ratios, raw | bounds


def _vae(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, subfolder="vae")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--small", action="store_true", help="memory: of a small model, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps-per-round", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_tokenizer()
        tokenizer.model_max_length = TOKENS
        build_small_sd15(folder, tokenizer)
        if "speed" in arguments.parts:
            for dtype in arguments.dtype:
                found, raw[dtype] = measure_speed(
                    folder, dtype=dtype, rounds=arguments.rounds, steps=arguments.steps_per_round
                )
                print(dtype, {key: round(value, 3) for key, value in found.items()}, flush=True)
                ratios |= {key if dtype == "float32" else f"{key}_{dtype}": value for key, value in found.items()}
        if "best" in arguments.parts:
            found, raw["best"] = measure_best(folder, rounds=arguments.rounds, steps=arguments.steps_per_round)
            print({key: round(value, 3) for key, value in found.items()}, flush=True)
            ratios |= found
    if "memory" in arguments.parts:
        found, raw["memory"] = measure_memory(small=arguments.small)
        ratios |= found
    if "bounds" in arguments.parts:
        found, raw["bounds"] = measure_bounds(rounds=arguments.rounds)
        ratios |= found
    print_result("train", ratios=ratios, raw=raw)


if __name__ == "__main__":
    sys.exit(main())
