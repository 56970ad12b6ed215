"""The final measurement in numbers: judging stored pictures against a loop by hand, and what a second adapter draws.

Usage: python -m benchmarks.evaluate [--parts judges base overlap] [--judges open_nsfw demo_audit] [--rounds 3]

- `judges_vs_hand_batched:JUDGE`: `safetydpo judge`'s job (one actor, one thread) against a loop over full batches in a
  script of its own, one thread, in turn. Both start a process, import, load the judge, read and decode the PNG files of
  a folder, judge, and end with one Parquet file of scores; ours also hashes the files, keeps its pool, and can resume.
  `pictures` says of how many: the start of a process is part of both, and shrinks with their number.
- `base_once`: pictures that evaluating ten adapters, one command after another, would draw if each drew the base's too,
  over those that the pool holds afterwards. `base_pictures_per_prompt` is 1 if the base's were drawn once.
- `overlap`: (seconds of drawing + seconds of judging) / seconds of both together, of one worker that is called as the
  pool calls it, with the judge `vlm` behind a server on this machine that takes its time: what is waited for is another
  machine's work, as a GPU's is. 1 = one after the other, 2 = one wholly behind the other. Drawing is the same work with
  a server that answers at once, judging the time that the server takes. `overlap_in_pool` is the same of the whole job,
  start of the actor included. Rows are compared byte for byte.

Times of our job run from the call to the written file, start of the actor included; Ray itself is up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.harness import print_result
from ray_jobs.cluster import connect, disconnect
from ray_jobs.evaluate import (
    EvaluatedRow,
    build_manifest,
    evaluate_rows,
    evaluation_prompts,
    outcome_id,
    outcomes_pool,
    row_prompts,
)
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.failures import run_guarded
from ray_jobs.judge_pictures import BATCH_SIZE, judge_pictures
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash, write_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE
from safetydpo.artifacts.pool_index import read_index
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, OUTCOMES
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import Config
from safetydpo.diffusion.build import load_backbone
from safetydpo.dpo.engine import lora_signature
from safetydpo.evaluation.rows import RowSource
from safetydpo.judges.final import load_final_judge
from safetydpo.judges.picture_files import read_picture
from tests.judges.vision_server import Answer, serve

SIDES = {"demo_audit": 32, "demo_select": 32}
PICTURES = {"demo_audit": 20_000, "demo_select": 20_000}
"""Of small pictures, whose judging takes a fraction of a millisecond, more are needed to measure more than a start."""
NUM_ADAPTERS = 10
SETS = ("unsafe", "neutral")
OVERLAP_BATCHES, OVERLAP_STEPS = 8, 4


def write_pictures(folder: Path, *, count: int, side: int) -> None:
    """Write PNG files of soft random colours."""
    generator = np.random.default_rng(0)
    for index in range(count):
        blots = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(blots).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:06d}.png", compress_level=1)


def judge_by_hand(judge: str, folder: str, out: str) -> None:
    """Judge full batches in this process, as a script would."""
    torch.set_num_threads(1)
    loaded = load_final_judge(judge)
    files = sorted(Path(folder).glob("*.png"))
    scores: list[float] = []
    for start in range(0, len(files), BATCH_SIZE):
        scores += loaded.judge(
            [read_picture(file.read_bytes()) for file in files[start : start + BATCH_SIZE]]
        ).unsafe_score
    pq.write_table(pa.table({"picture": [file.name for file in files], "score": scores}), out)


def seconds_by_hand(judge: str, folder: Path) -> float:
    """Run `judge_by_hand` in a fresh process; return seconds with its start."""
    with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as place:
        process = multiprocessing.get_context("spawn").Process(
            target=judge_by_hand, args=(judge, str(folder), f"{place}/scores.parquet")
        )
        started = time.perf_counter()
        process.start()
        process.join()
        seconds = time.perf_counter() - started
    assert process.exitcode == 0
    return seconds


def seconds_of_job(judge: str, folder: Path, *, config: Config, count: int) -> float:
    """Run our job into an empty place; return seconds."""
    with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as place:
        started = time.perf_counter()
        judged = judge_pictures(
            open_location(str(folder)),
            [judge],
            out=open_location(f"{place}/verdicts.parquet"),
            prompts=None,
            config=config,
        )
        seconds = time.perf_counter() - started
    assert judged.table.num_rows == count
    assert not any(
        judged.table.column("picture_failure").to_pylist() + judged.table.column("judge_failure").to_pylist()
    )
    return seconds


def measure_judges(
    judges: Sequence[str], *, pictures: int, rounds: int, config: Config
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run both ways in turn for each judge; return ratios of median times and what they were made of."""
    ratios: dict[str, float] = {}
    raw: dict[str, Any] = {}
    for judge in judges:
        count = PICTURES.get(judge, pictures)
        with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as name:
            folder = Path(name)
            write_pictures(folder, count=count, side=SIDES.get(judge, 256))
            times: dict[str, list[float]] = {"by hand": [], "job": []}
            for turn in range(rounds):
                for way in list(times)[:: 1 if turn % 2 == 0 else -1]:
                    if way == "job":
                        times[way].append(seconds_of_job(judge, folder, config=config, count=count))
                    else:
                        times[way].append(seconds_by_hand(judge, folder))
                print(judge, {way: round(values[-1], 2) for way, values in times.items()}, flush=True)
        ratios[f"judges_vs_hand_batched:{judge}"] = statistics.median(times["by hand"]) / statistics.median(
            times["job"]
        )
        raw[judge] = {"pictures": count, "seconds": times}
    return ratios, raw


def write_adapters(run: Run, count: int) -> list[EvaluatedRow]:
    """Write random adapters into the run's store and return their rows."""
    lora, backbone = run.config.identity.lora, load_backbone(run.config.identity.base)
    rows = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            name: LoraLayer(
                0.05 * torch.randn(lora.rank, d_in, generator=generator),
                0.05 * torch.randn(d_out, lora.rank, generator=generator),
            )
            for name, (d_in, d_out) in backbone.named_linear_layers(lora.layer_targets)
        }
        folder, own = run.store / "bench" / f"adapter-{seed}", adapter_hash(layers)
        metadata = AdapterMetadata(
            base_fingerprint=backbone.fingerprint,
            denoiser=backbone.denoiser,
            signature=lora_signature(lora),
            training_hash=own,
        )
        write_adapter(folder / ADAPTER_FILE, layers, metadata=metadata)
        source = RowSource(f"adapter-{seed}", "merged", adapter_hash=own, rank=lora.rank, scale=1.0)
        rows.append(EvaluatedRow(source, folder.path, SETS))
    return rows


def measure_base_once(config: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluate the base beside each of ten adapters, one after another, and count what the pool holds."""
    with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as place:
        execution = config.execution.model_copy(update={"store": f"{place}/store", "run_dir": f"{place}/run"})
        run = Run(with_absolute_paths(config.model_copy(update={"execution": execution})))
        base, seconds = EvaluatedRow(RowSource("base", "base"), "", SETS), []
        for row in write_adapters(run, NUM_ADAPTERS):
            started = time.perf_counter()
            evaluate_rows(run, [base, row])
            seconds.append(time.perf_counter() - started)
            print(row.source.name, round(seconds[-1], 2), flush=True)
        prompts = row_prompts(base, evaluation_prompts(run))
        sampler = run.config.identity.sampler.model_dump(mode="json")
        of_base = {outcome_id(run, base, prompt, seed=0, sampler=sampler) for prompt in prompts}
        pool = outcomes_pool(run)
        # Every closed batch's manifest says what was drawn, were it drawn twice.
        drawn = [
            image_id
            for batch in pool.list()
            for image_id in pq.read_table(
                pa.BufferReader((batch / "manifest.parquet").read_bytes()), columns=["image_id"]
            )
            .column(0)
            .to_pylist()
        ]
        held = read_index(pool, OUTCOMES, id_column="image_id").num_rows
    assert held == len(set(drawn)) == (NUM_ADAPTERS + 1) * len(prompts)
    ratios = {
        "base_once": 2 * NUM_ADAPTERS * len(prompts) / len(drawn),
        "base_pictures_per_prompt": sum(image_id in of_base for image_id in drawn) / len(prompts),
    }
    return ratios, {"prompts": len(prompts), "adapters": NUM_ADAPTERS, "drawn": len(drawn), "seconds": seconds}


def measure_overlap(config: Config, *, batches: int = OVERLAP_BATCHES) -> tuple[dict[str, float], dict[str, Any]]:
    """Draw and judge the same pictures with a server that answers at once and with one as slow as drawing is."""
    with tempfile.TemporaryDirectory(prefix="safetydpo-bench-") as place:
        pause = [0.0]
        with serve(lambda _: Answer('{"rating": "Safe"}', seconds=pause[0])) as server:
            run = overlap_run(config, Path(place), url=server.url, batches=batches)
            row = EvaluatedRow(RowSource("base", "base"), "", ("neutral",))
            rows = build_manifest(run, [row], evaluation_prompts(run))
            alone, expected = seconds_of_calls(run, rows, calls=1)
            pause[0] = alone / batches
            together, found = seconds_of_calls(run, rows, calls=2)
            assert all(table.equals(other) for table, other in zip(found, expected, strict=True))
            of_job = {}
            for name, seconds in (("alone", 0.0), ("together", alone / batches)):
                pause[0] = seconds
                own = overlap_run(config, Path(place) / name, url=server.url, batches=batches)
                started = time.perf_counter()
                evaluate_rows(own, [row])
                of_job[name] = time.perf_counter() - started
    ratios = {
        "overlap": 2 * alone / together,
        "overlap_in_pool": (of_job["alone"] + alone) / of_job["together"],
    }
    seconds = {"drawing": alone, "judging": alone, "together": together, "job": of_job}
    return ratios, {"pictures": len(rows), "batches": batches, "seconds": seconds}


def overlap_run(config: Config, folder: Path, *, url: str, batches: int) -> Run:
    """Return a run of `batches` full batches of neutral prompts that a server's model judges, all of one at once."""
    size = config.identity.sampler.batch_size
    document = config.model_dump(mode="json")
    document["identity"]["evaluation"] |= {"judges": ["vlm"], "neutral_prompts": size * batches}
    document["identity"]["sampler"]["steps"] = OVERLAP_STEPS
    document["execution"] |= {"store": f"{folder}/store", "run_dir": f"{folder}/run"}
    document["execution"]["judges"]["vlm"] = {"base_url": url, "model": "guard", "concurrency": size}
    return Run(with_absolute_paths(Config.model_validate(document)))


def seconds_of_calls(run: Run, rows: Sequence[dict[str, object]], *, calls: int) -> tuple[float, list[pa.Table]]:
    """Call a loaded worker with one batch after another from `calls` threads; return seconds and rows."""
    worker, size = EvaluateWorker(run.config.model_dump(mode="json")), run.config.identity.sampler.batch_size
    torch.set_num_threads(1)
    parts = [table_from_rows(rows[start : start + size], IMAGE_MANIFEST) for start in range(0, len(rows), size)]
    worker(parts[0])
    started = time.perf_counter()
    with ThreadPoolExecutor(calls) as threads:
        tables = list(threads.map(worker, parts))
    seconds = time.perf_counter() - started
    print(f"overlap: {calls} calls", round(seconds, 2), flush=True)
    return seconds, tables


def bench_config() -> Config:
    """Return a run with one actor of one thread, few prompts and few steps."""
    return Config.model_validate(
        {
            "name": "bench-evaluate",
            "identity": {
                "sampler": {"steps": 2, "batch_size": 16},
                "evaluation": {"prompts_per_category": 4, "neutral_prompts": 14},
            },
            "execution": {"num_workers": 1, "cpus_per_worker": 1},
        }
    )


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["judges", "base", "overlap"])
    parser.add_argument("--judges", nargs="*", default=["open_nsfw", "demo_audit"])
    parser.add_argument("--pictures", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config, ratios, raw = bench_config(), {}, {}
    connect(config)
    try:
        if "judges" in arguments.parts:
            ratios, raw["judges"] = measure_judges(
                arguments.judges, pictures=arguments.pictures, rounds=arguments.rounds, config=config
            )
        if "base" in arguments.parts:
            found, raw["base"] = measure_base_once(config)
            ratios |= found
        if "overlap" in arguments.parts:
            found, raw["overlap"] = measure_overlap(config)
            ratios |= found
    finally:
        disconnect()
    print_result("evaluate", ratios=ratios, raw=raw)


if __name__ == "__main__":
    sys.exit(run_guarded(main, debug=False))
