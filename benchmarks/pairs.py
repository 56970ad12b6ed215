"""Stage 1 in numbers: pictures per second against a plain diffusers loop, what Ray costs, memory, a million rows.

Usage: python -m benchmarks.pairs [--images 2000] [--steps 4] [--rounds 3] [--parts speed memory manifest actors]

- `images_per_second_vs_diffusers_loop`: our job (two actors, one thread each) against `StableDiffusionPipeline` called
  with one prompt after another (two threads), same model, steps, guidance and bfloat16. Beside it stands the bound: the
  pictures per second if the U-Net's and decoder's operations ran at the speed of a large matrix product on both cores.
- `ray_vs_hand_batched`: one actor against a loop over full batches in a script of its own, one thread each. Both start
  a process, import, load the model, draw, and end with PNG files in Parquet; `warm_seconds` has the loop alone.
- `two_actors_vs_one`: the same job with two actors; `--parts actors --images 20000` measures that by itself.
  Beside it `two_processes_vs_one`: what two plain processes draw at the same time, over one alone, starts left out.
- `memory_10k_vs_1k_rows`: the most memory that the driver and its workers hold together (proportional set size).
- the manifest of a million pictures: planned, written, read back, and anti-joined with a pool that holds half of them.

Times of our job run from the call to the closed batch, start of actors included; Ray itself is up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import count_operations, print_result
from benchmarks.process_watch import watched
from ray_jobs.cluster import connect, disconnect
from ray_jobs.cost_meter import CostMeter
from ray_jobs.failures import run_guarded
from ray_jobs.generate_pairs import render_stage
from ray_jobs.pools import fill_pool, plan_missing
from ray_jobs.run import Run
from safetydpo.artifacts.pool_index import close_index
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import read_table, table_from_rows, table_from_stream, write_table
from safetydpo.config.schema import Config
from safetydpo.demo.prompts import write_prompts
from safetydpo.diffusion.build import load_backbone, resolve_folder
from safetydpo.diffusion.pictures import encode_picture
from safetydpo.diffusion.render import render
from safetydpo.pairs.manifest import image_row, pair_image_rows
from safetydpo.prompts.sets import PromptPair

MILLION = 1_000_000


def config_of(*, steps: int, dtype: str, workers: int, batch_size: int) -> Config:
    """Return a run with that many actors of one thread."""
    return Config.model_validate(
        {
            "name": "bench-pairs",
            "identity": {"base": {"dtype": dtype}, "sampler": {"steps": steps, "batch_size": batch_size}},
            "execution": {"num_workers": workers, "cpus_per_worker": 1},
        }
    )


def manifest_of(run: Run, count: int) -> pa.Table:
    """Return a manifest of `count` pictures of the demo's training prompts, each with its own seed."""
    prompts = [row.text for role in ("unsafe", "safe", "neutral") for row in write_prompts("train", role)]  # type: ignore[arg-type]
    common: dict[str, Any] = {
        "base_fingerprint": run.base_fingerprint,
        "sampler": run.config.identity.sampler.model_dump(mode="json"),
    }
    rows = (
        image_row(f"bench-{index}", "benign", prompts[index % len(prompts)], seed=index, **common)
        for index in range(count)
    )
    return table_from_stream(rows, IMAGE_MANIFEST)


def run_job(run: Run, manifest: pa.Table) -> float:
    """Fill an empty pool with the manifest's pictures; return seconds."""
    folder = tempfile.mkdtemp(prefix="safetydpo-bench-")
    try:
        started = time.perf_counter()
        rows = fill_pool(
            open_location(folder) / "pool", manifest, render_stage(run, "pictures"), execution=run.config.execution
        )
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
    assert rows.column("status").to_pylist() == ["ok"] * manifest.num_rows
    return seconds


def diffusers_loop(run: Run, manifest: pa.Table) -> Callable[[], None]:
    """Return the loop that a user would write: one pipeline call per prompt, one generator per picture."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        resolve_folder(run.config.identity.base), torch_dtype=torch.bfloat16, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    sampler = run.config.identity.sampler
    prompts, seeds = manifest.column("prompt").to_pylist(), manifest.column("seed").to_pylist()

    def loop() -> None:
        for prompt, seed in zip(prompts, seeds, strict=True):
            pipeline(
                prompt,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
                height=sampler.height,
                width=sampler.width,
                generator=torch.Generator().manual_seed(seed),
            )

    return loop


def hand_batched(config: dict[str, Any], manifest: pa.Table, file: str, warm: SimpleQueue[float]) -> None:
    """Draw full batches in this process and write their PNG files to one Parquet file, as a script would."""
    torch.set_num_threads(1)
    identity = Config.model_validate(config).identity
    backbone = load_backbone(identity.base)
    sampler = identity.sampler
    rows = manifest.to_pylist()
    started = time.perf_counter()
    with pq.ParquetWriter(file, pa.schema([("image_id", pa.string()), ("image", pa.binary())])) as writer:
        for start in range(0, len(rows), sampler.batch_size):
            batch = rows[start : start + sampler.batch_size]
            pictures = render(
                backbone,
                prompts=[row["prompt"] for row in batch],
                seeds=[row["seed"] for row in batch],
                sampler=sampler,
            )
            files = [encode_picture(picture) for picture in pictures]
            ids = [row["image_id"] for row in batch]
            writer.write_batch(pa.record_batch({"image_id": ids, "image": pa.array(files, pa.binary())}))
    warm.put(time.perf_counter() - started)


def run_by_hand(run: Run, manifest: pa.Table, *, processes: int = 1) -> tuple[float, float]:
    """Run `hand_batched` in so many fresh processes at once, each with the whole manifest.

    Returns the seconds of all with their starts, and the mean seconds of their loops alone.
    """
    spawn = multiprocessing.get_context("spawn")
    warm: SimpleQueue[float] = spawn.SimpleQueue()
    config = run.config.model_dump(mode="json")
    with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as folder:
        began = time.perf_counter()
        started = [
            spawn.Process(target=hand_batched, args=(config, manifest, f"{folder}/{index}.parquet", warm))
            for index in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        seconds = time.perf_counter() - began
    assert all(process.exitcode == 0 for process in started)
    return seconds, statistics.fmean(warm.get() for _ in started)


def bound_images_per_second(run: Run) -> dict[str, float]:
    """Return operations of one picture, the machine's speed in a large bfloat16 product, and their quotient."""
    backbone = load_backbone(run.config.identity.base)
    whole = count_operations(lambda: render(backbone, prompts=["a"], seeds=[0], sampler=run.config.identity.sampler))
    operations = whole / run.config.identity.sampler.batch_size
    torch.set_num_threads(2)
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    speeds = []
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(a, b)
        speeds.append(2 * 2048**3 / (time.perf_counter() - started))
    best = max(speeds)
    return {
        "gigaflop_per_picture": operations / 1e9,
        "gigaflop_per_second": best / 1e9,
        "bound_images_per_second": best / operations,
    }


def measure_speed(*, images: int, steps: int, rounds: int, batch_size: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the four ways in turn, `rounds` times; return ratios of median rates and what they were made of."""
    two, one = (
        Run(config_of(steps=steps, dtype="bfloat16", workers=workers, batch_size=batch_size)) for workers in (2, 1)
    )
    manifest = manifest_of(two, images)
    few = manifest.slice(0, max(50, images // 20))
    loop = diffusers_loop(two, few)
    bound = bound_images_per_second(two)
    rates: dict[str, list[float]] = {"diffusers loop": [], "by hand": [], "one actor": [], "two actors": []}
    warm_seconds = []
    torch.set_num_threads(2)
    for _ in range(rounds):
        rates["diffusers loop"].append(few.num_rows / _seconds(loop))
        seconds, warm = run_by_hand(one, manifest)
        rates["by hand"].append(images / seconds)
        warm_seconds.append(warm)
        rates["one actor"].append(images / run_job(one, manifest))
        rates["two actors"].append(images / run_job(two, manifest))
        print({name: round(values[-1], 2) for name, values in rates.items()}, flush=True)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        "images_per_second_vs_diffusers_loop": middle["two actors"] / middle["diffusers loop"],
        "bound_vs_diffusers_loop": bound["bound_images_per_second"] / middle["diffusers loop"],
        "ray_vs_hand_batched": middle["one actor"] / middle["by hand"],
        "two_actors_vs_one": middle["two actors"] / middle["one actor"],
    }
    return ratios, {"images": images, "steps": steps, "images_per_second": rates, "warm_seconds": warm_seconds, **bound}


def measure_actors(*, images: int, steps: int, rounds: int, batch_size: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the job with one actor and with two in turn; return the ratio of the median rates, and the machine's bound.

    The bound: how much more two plain processes draw at the same time than one of them alone, starts left out.
    """
    runs = {
        workers: Run(config_of(steps=steps, dtype="bfloat16", workers=workers, batch_size=batch_size))
        for workers in (1, 2)
    }
    manifest = manifest_of(runs[1], images)
    rates: dict[int, list[float]] = {1: [], 2: []}
    cpu_seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, run in runs.items():
            with CostMeter(run.config.execution) as meter:
                rates[workers].append(images / run_job(run, manifest))
            cpu_seconds[workers].append(meter.cost()["cpu_seconds"] or 0.0)
            print(
                f"{workers} actors: {rates[workers][-1]:.2f} pictures/s, CPU {cpu_seconds[workers][-1]:.0f} s",
                flush=True,
            )
    few = manifest.slice(0, max(100, images // 20))
    loops: dict[int, list[float]] = {1: [], 2: []}
    for workers in [*loops] * 3:
        loops[workers].append(run_by_hand(runs[1], few, processes=workers)[1])
    one, two = (statistics.median(rates[workers]) for workers in rates)
    alone, beside = (statistics.median(loops[workers]) for workers in loops)
    raw = {"images": images, "steps": steps, "images_per_second": rates, "cpu_seconds": cpu_seconds, "loops": loops}
    return {"two_actors_vs_one": two / one, "two_processes_vs_one": 2 * alone / beside}, raw


def _seconds(way: Callable[[], None]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def _own_processes() -> list[psutil.Process]:
    """Return this process and Ray's, which it has started."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def measure_memory(*, batch_size: int, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Draw 1,000 and 10,000 pictures of two steps in turn; return the ratio of the median peaks.

    With one step the smaller job would not be worth a second actor (`workers_for`), and the ratio would count actors.
    In turn, because Ray keeps idle processes of earlier jobs, which are neither job's.
    """
    run = Run(config_of(steps=2, dtype="bfloat16", workers=2, batch_size=batch_size))
    peaks: dict[int, list[float]] = {1_000: [], 10_000: []}
    kinds: dict[int, list[dict[str, float]]] = {1_000: [], 10_000: []}
    run_job(run, manifest_of(run, 1_000))
    for count in list(peaks) * rounds:
        manifest = manifest_of(run, count)
        with watched(_own_processes, every_seconds=0.25) as taken:
            run_job(run, manifest)
        peaks[count].append(taken.memory_bytes / 1e9)
        kinds[count].append(
            {f"{taken.number_of[kind]} {kind}": round(held / 1e9, 3) for kind, held in taken.bytes_of.items()}
        )
        print(f"{count} rows: {peaks[count][-1]:.3f} GB at most: {kinds[count][-1]}", flush=True)
    few, many = (statistics.median(peaks[count]) for count in peaks)
    return {"memory_10k_vs_1k_rows": many / few}, {"peak_gigabytes": peaks, "by_kind": kinds}


def measure_manifest() -> tuple[dict[str, float], dict[str, Any]]:
    """Plan, write, read and anti-join a million rows in this process; return seconds and its peak memory."""
    run = Run(config_of(steps=50, dtype="float32", workers=1, batch_size=8))
    stage = render_stage(run, "pictures")
    common: dict[str, Any] = {
        "base_fingerprint": run.base_fingerprint,
        "sampler": run.config.identity.sampler.model_dump(mode="json"),
    }
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as name:
        folder = open_location(name)
        started = time.perf_counter()
        pairs = (
            PromptPair(
                f"unsafe text {i} of an ordinary length, as a person writes it",
                f"safe text {i} of an ordinary length, as a person writes it",
                "hate",
                ("hate",),
                f"concept-{i % 700:03d}",
                "bench",
            )
            for i in range(MILLION // 2)
        )
        manifest = table_from_stream(pair_image_rows(list(pairs), run_seed=0, **common), IMAGE_MANIFEST)
        seconds["plan"] = time.perf_counter() - started
        started = time.perf_counter()
        write_table(folder / "manifest.parquet", manifest)
        manifest = read_table(folder / "manifest.parquet", IMAGE_MANIFEST)
        seconds["write and read"] = time.perf_counter() - started
        _close_half(folder / "pool", manifest)
        started = time.perf_counter()
        missing = plan_missing(folder / "pool", manifest, stage)
        seconds["anti-join"] = time.perf_counter() - started
        assert missing.num_rows == MILLION // 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    raw = {"rows": MILLION, "seconds": seconds, "peak_gigabytes": peak}
    print(raw, flush=True)
    return {"manifest_seconds_vs_120": sum(seconds.values()) / 120, "manifest_gigabytes_vs_2": peak / 2}, raw


def _close_half(pool: Location, manifest: pa.Table) -> None:
    empty = {"image": None, "sha256": "x", "status": "ok", "error": "", "attempt": 1, "width": 32, "height": 32}
    half = manifest.slice(0, manifest.num_rows // 2).column("image_id").to_pylist()
    for start in range(0, len(half), 50_000):
        rows = ({"image_id": i, **empty, "format": "png", "micro_batch": 8} for i in half[start : start + 50_000])
        write_table(pool / "batch" / "data" / f"{start:07d}.parquet", table_from_rows(list(rows), IMAGES))
    close_index(pool / "batch", IMAGES, id_column="image_id")
    (pool / "batch" / "record.json").write_bytes(b"{}")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--parts", nargs="*", default=["manifest", "speed", "memory"])
    arguments = parser.parse_args()
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    # First, before anything else has made this process large.
    if "manifest" in arguments.parts:
        found, raw["manifest"] = measure_manifest()
        ratios |= found
    if {"speed", "actors", "memory"} & set(arguments.parts):
        connect(config_of(steps=1, dtype="bfloat16", workers=2, batch_size=16))
        try:
            for name, measure in (("speed", measure_speed), ("actors", measure_actors)):
                if name in arguments.parts:
                    found, raw[name] = measure(
                        images=arguments.images,
                        steps=arguments.steps,
                        rounds=arguments.rounds,
                        batch_size=arguments.batch_size,
                    )
                    ratios |= found
            if "memory" in arguments.parts:
                found, raw["memory"] = measure_memory(batch_size=arguments.batch_size, rounds=2)
                ratios |= found
        finally:
            disconnect()
    print_result("pairs", ratios=ratios, raw=raw)


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
