"""How long the whole report stage takes for 10,000 made-up test pictures of a real run, by the clock.

    python -m benchmarks.report_stage CONFIG [key=value …] [--pictures 10000] [--side 256]

CONFIG (with its settings) is a run whose search is closed: `safetydpo search CONFIG …`; its store is used. Test
pictures, judgements and embeddings are made up and closed like those of an evaluation, of as many seeds of the config's
own prompts as are needed; then `write_report` is called as the pipeline does. So what is timed reads the outcomes and
compares their CLIP features, computes every metric with its bootstraps, reads overlap, winners, trials and curves,
publishes the adapter, writes scores and tables, and draws the page with all of its plots and pictures. Networks that a
config asks beside the judges (`identity.evaluation.measures.perceptual`) are left out: they measure, and take as long
as there are pictures. The limits are 30 seconds and 30 MB; a ratio of 1 and more keeps one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.evaluate_report import DISTINCT_PICTURES, MOST_BYTES, MOST_SECONDS, groups, make_png
from benchmarks.harness import print_result
from ray_jobs.evaluate import OUTCOMES_FILE, EvaluatedRow, build_manifest, evaluation_prompts, list_rows, outcomes_key
from ray_jobs.final_judges import clip_of
from ray_jobs.pipeline import Chain, run_stages
from ray_jobs.report import Finished, page_file, write_report
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.config.load import load_config
from safetydpo.judges.clip import ClipScorer

ROLES = ("select", "audit")


def main() -> None:
    """Close made-up outcomes, time the report, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        chain, rows = enough_rows(options, work)
        run = chain.run
        manifest = build_manifest(run, rows, evaluation_prompts(run))
        width = len(ClipScorer(clip_of(run.config.identity)).embed_texts(["a picture"])[0])
        pngs = [make_png(number, options.side) for number in range(DISTINCT_PICTURES)]
        # No evaluation has this number: made-up outcomes are never taken for measured ones.
        key = replace(outcomes_key(run, manifest), recipe_version=0)
        record = run.build("outcomes", key, lambda folder: close_outcomes(folder, manifest, pngs, width=width))
        finished = Finished(
            chain.experts, needed(chain.search), needed(chain.searched), record, rows, chain.merged,
            needed(chain.diagnosis), chain.pairs,
        )  # fmt: skip
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            write_report(run, finished)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        finally:
            run.folder(key).delete()
        size = len(page_file(run, redacted=False).read_bytes())
    raw = {
        "pictures": len(manifest),
        "rows": len(rows),
        "picture_side": options.side,
        "page_bytes": size,
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
    }
    ratios = {"seconds_allowed_vs_wall": MOST_SECONDS / wall, "bytes_allowed_vs_page": MOST_BYTES / size}
    print_result("report_stage", ratios=ratios, raw=raw)


def enough_rows(options: argparse.Namespace, work: str) -> tuple[Chain, list[EvaluatedRow]]:
    """Return the run with as many seeds as give the pictures, in a folder of its own, and the rows of its table."""
    changes = [*options.settings, f"run_dir={Path(work) / 'run'}", "identity.evaluation.measures.perceptual=[]"]
    chain = run_stages(load_config(options.config, [*changes, "identity.evaluation.seeds=[0]"]), last="search")
    rows = list_rows(chain.run, chain.experts, chain.merged, chain.searched)
    once = len(build_manifest(chain.run, rows, evaluation_prompts(chain.run)))
    seeds = list(range(-(-options.pictures // once)))
    chain.run = Run(with_absolute_paths(load_config(options.config, [*changes, f"identity.evaluation.seeds={seeds}"])))
    return chain, rows


def close_outcomes(
    folder: Location, manifest: Sequence[Mapping[str, Any]], pngs: Sequence[bytes], *, width: int
) -> Mapping[str, Any]:
    """Write one outcome per picture, a row group at a time; half of the unsafe prompts' pictures are unsafe."""
    generator = np.random.default_rng(0)
    file = folder.make_folder() / OUTCOMES_FILE
    with pq.ParquetWriter(file.local_path, OUTCOMES, compression="zstd", compression_level=1) as writer:
        for numbers in groups(len(manifest)):
            made = [
                outcome_row(manifest[number], pngs[number % len(pngs)], width=width, generator=generator)
                for number in numbers
            ]
            writer.write_table(pa.Table.from_pylist(made, schema=OUTCOMES))
    return {"fingerprint": "made up", "counts": {"pictures": len(manifest), "failed": 0}}


def outcome_row(
    picture: Mapping[str, Any], png: bytes, *, width: int, generator: np.random.Generator
) -> dict[str, object]:
    """Return one stored row around a picture."""
    unsafe = picture["side"] in ("unsafe", "ood") and bool(generator.random() < 0.5)
    row: dict[str, object] = {"image_id": picture["image_id"], "image": png, "status": "ok", "error": "", "attempt": 1}
    for role in ROLES:
        row |= {f"{role}_concept": "", f"{role}_background": "", f"{role}_unsafe": unsafe}
        row[f"{role}_unrecognisable"] = False
    return row | {"clip_embedding": generator.normal(size=width).astype(np.float32).tolist(), "micro_batch": None}


def needed(found: Any) -> Any:
    """Return what a stage made, or say that it is missing."""
    if found is None:
        raise SystemExit("expected a run with a closed search, found one without: run `safetydpo search CONFIG` first")
    return found


if __name__ == "__main__":
    main()
