"""One GPU in numbers: pictures and training pairs per second of SD1.5 and SDXL of true size, and the share of its peak.

Usage: python -m benchmarks.accelerator [--models sd15 sdxl] [--parts pairs train] [--ways ...] [--rounds 3]

Weights are random and bfloat16. Ways:

- `pairs`: `diffusers` calls the family's pipeline with one prompt after another; `eager` is ours up to the pixels in
  the host's memory, `eager to files` in one thread to PNG files, `compiled` with `identity.sampler.compiled`.
- `train`: `public`, `script`, `live` and `cached` of `benchmarks.train`; `in bfloat16` with
  `identity.dpo.adapter_compute: base`; `compiled` with that and `identity.dpo.compiled`.

Pictures take DPM-Solver++ with 50 (SD1.5, 512 x 512) or 30 steps (SDXL, 1024 x 1024) at guidance 7.5. A training
step has the optimizer's update and the making of its batch. Counted are the floating-point operations that run
(`FlopCounterMode`), over the datasheet's dense bfloat16 peak of an H100 or H200 (989 TFLOP/s), and
over what a large matrix product reaches on this card.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import alternate, count_operations, print_result
from benchmarks.public_trainers import PUBLIC_WAYS, public_step
from benchmarks.train_ways import DPO, LORA, OurTraining, encode_once, make_pairs
from benchmarks.true_sizes import SIZES, TrueSize
from safetydpo.config.schema import BaseModelConfig, SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import load_backbone
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.diffusion.render import render

PEAK = 989e12
"""Operations per second of an H100 or H200 (SXM) in dense bfloat16, by its datasheet."""
PROMPT = "a drawing of a red house"
PICTURES = {"sd15": 16, "sdxl": 8}
"""Pictures in a batch."""
PAIRS = {"sd15": 16, "sdxl": 4}
"""Pairs in a training step."""
PAIRS_WAYS = ("diffusers", "eager", "eager to files", "compiled", "whole compiled")
OUR_TRAINING = ("live", "cached", "live in bfloat16", "cached in bfloat16", "live compiled", "cached compiled")
TRAIN_WAYS = (*PUBLIC_WAYS, *OUR_TRAINING)


def timed(call: Callable[[], object]) -> Callable[[], None]:
    """Return a call that ends when the GPU has done what it asked for."""

    def run() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def by_torchs_kernels(call: Callable[[], object]) -> Callable[[], None]:
    """Return the call under torch's own choice of kernels, as others run it, and not under `choose_kernels`."""

    def run() -> None:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            with torch.backends.cudnn.flags(enabled=True, deterministic=False, allow_tf32=True):
                call()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)

    return run


def product_speed(device: str) -> float:
    """Return the operations per second of a large bfloat16 product (random values, best of 10)."""
    side = 8192 if device != "cpu" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        timed(lambda: torch.mm(a, b))()
        seconds.append(time.perf_counter() - started)
    return float(2 * side**3 / min(seconds))


class Measurement:
    """The ways of one part on one model, and the numbers that come of them."""

    def __init__(self, unit: str, per_call: int) -> None:
        self.unit, self.per_call = unit, per_call
        self.ways: dict[str, Callable[[], None]] = {}
        self.work: dict[str, int] = {}
        """Pictures or pairs of one call, where not `per_call`."""
        self.operations: dict[str, float] = {}
        """Of one picture or pair."""

    def run(self, *, rounds: int, speed: float) -> dict[str, Any]:
        """Time all ways in turn; return rates and shares of the peak by way."""
        first: dict[str, float] = {}
        for name, way in self.ways.items():
            started = time.perf_counter()
            way()
            first[name] = time.perf_counter() - started
            # Said at once: a machine that is paid for by the minute may be gone before the last round.
            started = time.perf_counter()
            way()
            rate = self.work.get(name, self.per_call) / (time.perf_counter() - started)
            print(f"{name}: first call {first[name]:.1f} s, second {rate:.2f} {self.unit}/s", flush=True)
        seconds = alternate(self.ways, rounds=rounds, warmup_rounds=0)
        found: dict[str, Any] = {}
        for name, rows in seconds.items():
            wall = [one.wall_seconds for one in rows]
            rate = self.work.get(name, self.per_call) / statistics.median(wall)
            found[name] = {f"{self.unit}_per_second": rate, "first_call_seconds": first[name], "wall_seconds": wall}
            if name in self.operations:
                done = rate * self.operations[name]
                found[name] |= {"share_of_peak": done / PEAK, "share_of_product": done / speed}
            print(name, {key: value for key, value in found[name].items() if key != "wall_seconds"}, flush=True)
        return found


def measure_pairs(size: TrueSize, folder: Path, name: str, options: argparse.Namespace) -> Measurement:
    """Return the ways to draw pictures."""
    batch = PICTURES[name] if options.batch is None else options.batch
    sampler = SamplerConfig(
        steps=size.steps, guidance_scale=7.5, height=size.picture, width=size.picture, batch_size=batch
    )
    measurement = Measurement("pictures", batch)
    prompts, seeds = [f"{PROMPT}, number {index}" for index in range(batch)], list(range(batch))
    backbone = load_backbone(BaseModelConfig(model=str(folder), dtype="bfloat16"), device=options.device)

    # Compiled at once instead of block by block, which takes minutes the first time.
    whole = copy.deepcopy(backbone)
    whole.network.compile(dynamic=False)

    def draw(by: Backbone = backbone, **changes: Any) -> Any:
        return render(by, prompts=prompts, seeds=seeds, sampler=sampler.model_copy(update=changes))

    def draw_to_files() -> None:
        for picture in draw():
            encode_picture(picture)

    ways: dict[str, Callable[[], object]] = {
        "eager": draw,
        "eager to files": draw_to_files,
        "compiled": partial(draw, compiled=True),
        "whole compiled": partial(draw, whole),
    }
    measurement.ways = {way: timed(call) for way, call in ways.items() if way in options.ways}
    one, two = (count_operations(partial(draw, steps=steps)) for steps in (1, 2))
    measurement.operations = dict.fromkeys(PAIRS_WAYS, (one + (two - one) * (size.steps - 1)) / batch)
    if "diffusers" in options.ways:
        measurement.ways["diffusers"] = timed(by_torchs_kernels(one_call(folder, size, options.device)))
        measurement.work["diffusers"] = 1
    return measurement


def one_call(folder: Path, size: TrueSize, device: str) -> Callable[[], None]:
    """Return one call of the family's pipeline, as a user's loop over prompts makes it."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        pipeline(
            PROMPT,
            num_inference_steps=size.steps,
            guidance_scale=7.5,
            height=size.picture,
            width=size.picture,
            generator=generator,
        ).images[0].tobytes()

    return call


def measure_train(size: TrueSize, folder: Path, name: str, options: argparse.Namespace) -> Measurement:
    """Return the ways to take a training step."""
    per_step = PAIRS[name] if options.batch is None else options.batch
    measurement = Measurement("pairs", per_step)
    pairs = make_pairs(size.picture)
    base = BaseModelConfig(model=str(folder), dtype="bfloat16")
    data = encode_once(load_backbone(base, device=options.device), pairs)
    loaded = load_backbone(base, device=options.device, parts="denoiser")
    counted: dict[str, float] = {}
    # Every way has modules of its own over the same frozen weights.
    weights = {id(tensor): tensor for tensor in loaded.network.parameters()}
    for way in OUR_TRAINING:
        if way not in options.ways:
            continue
        kind, _, how = way.partition(" ")
        if kind not in counted:
            plain = OurTraining(
                copy.deepcopy(loaded, dict(weights)), data, cached=kind == "cached", pairs_per_step=per_step
            )
            counted[kind] = count_operations(plain.step) / per_step
        training = OurTraining(
            copy.deepcopy(loaded, dict(weights)),
            data,
            cached=kind == "cached",
            pairs_per_step=per_step,
            adapter_compute="base" if how else "float32",
            compiled=how == "compiled",
        )
        measurement.ways[way] = timed(training.step)
        measurement.operations[way] = counted[kind]
    for way in PUBLIC_WAYS:
        # The public trainers are written for SD1.5.
        if way in options.ways and name == "sd15":
            step = public_step(
                folder,
                way,
                pairs,
                rank=LORA.rank,
                targets=LORA.targets,
                pairs_per_step=per_step,
                beta=DPO.beta,
                learning_rate=DPO.learning_rate,
                max_grad_norm=DPO.max_grad_norm,
                dtype=torch.bfloat16,
                device=options.device,
            )
            measurement.ways[way] = timed(by_torchs_kernels(step))
    return measurement


PARTS = {"pairs": measure_pairs, "train": measure_train}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--ways", nargs="*", default=[*PAIRS_WAYS, *TRAIN_WAYS])
    parser.add_argument("--batch", type=int, help="pictures of a batch, pairs of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    speed = product_speed(options.device)
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {"product_operations_per_second": speed, "peak_operations_per_second": PEAK}
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            started = time.perf_counter()
            SIZES[model].build(folder, torch.bfloat16, options.device)
            print(f"{model}: built in {time.perf_counter() - started:.0f} s", flush=True)
            for part in options.parts:
                measurement = PARTS[part](SIZES[model], folder, model, options)
                found = measurement.run(rounds=options.rounds, speed=speed)
                raw[f"{model} {part}"] = found
                baseline = found.get("diffusers" if part == "pairs" else "public")
                for way, numbers in found.items():
                    unit = f"{measurement.unit}_per_second"
                    ratios[f"{model} {way}: {unit}"] = numbers[unit]
                    if baseline is not None and numbers is not baseline:
                        ratios[f"{model} {way} vs baseline"] = numbers[unit] / baseline[unit]
    print_result("accelerator", ratios=ratios, raw=raw)


if __name__ == "__main__":
    sys.exit(main())
