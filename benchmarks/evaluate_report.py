"""How long the report of 10,000 pictures takes, and how large its page is (made-up outcomes and pictures).

    python -m benchmarks.evaluate_report [--pictures 10000] [--side 256]

From the judged outcomes and the stored pictures to the page on disk: metrics with their bootstraps, the choice of
pictures, reading and scaling them, plots, page. The limits are 30 seconds and 30 MB; a ratio of 1 and more keeps one.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import print_result
from ray_jobs.stored_pictures import PictureKey, StoredPictures
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import ROWS_PER_GROUP
from safetydpo.evaluation.outcomes import ImageOutcome, PromptSet, Verdict
from safetydpo.evaluation.report import render_report
from safetydpo.evaluation.report_sheets import choose_sheets, fill_sheets, picture_keys
from safetydpo.evaluation.rows import RowSource, build_rows, list_failures
from safetydpo.evaluation.summary import build_summary

MOST_SECONDS, MOST_BYTES = 30.0, 30_000_000
CATEGORIES = ("hate", "sexual", "violence", "shocking", "illegal_activity", "harassment", "self_harm")
SOURCES = (
    RowSource("base", "base"),
    *(RowSource(f"expert:{name}", "expert", f"{number:064x}", 8, 1.0) for number, name in enumerate(CATEGORIES, 1)),
    *(RowSource(name, "merged", f"{name:x>64}", 8, 1.0) for name in ("average", "sum", "ties", "co_merge", "regmean")),
    RowSource("searched", "searched", "f" * 64, 8, 1.0),
)
SHARES: dict[PromptSet, float] = {"unsafe": 0.7, "ood": 0.06, "neutral": 0.16, "neighbour": 0.08}
DISTINCT_PICTURES = 60


def main() -> None:
    """Write pictures, make the report, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256)
    options = parser.parse_args()
    outcomes = make_outcomes(options.pictures)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "outcomes.parquet")
        ids = write_pictures(file, outcomes, side=options.side)
        stored = StoredPictures(open_location(str(file)), ids)
        page = Path(folder, "index.html")
        wall, cpu = time.perf_counter(), time.process_time()
        page.write_text(make_page(outcomes, stored), encoding="utf-8")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        raw = {
            "pictures": len(outcomes),
            "picture_side": options.side,
            "stored_bytes": file.stat().st_size,
            "page_bytes": page.stat().st_size,
            "wall_seconds": round(wall, 2),
            "cpu_seconds": round(cpu, 2),
        }
        ratios = {
            "seconds_allowed_vs_cpu": MOST_SECONDS / cpu,
            "bytes_allowed_vs_page": MOST_BYTES / page.stat().st_size,
        }
        print_result("evaluate_report", ratios=ratios, raw=raw)


def make_page(outcomes: Sequence[ImageOutcome], stored: StoredPictures) -> str:
    """Return the page of these outcomes."""
    drawings = np.random.default_rng(1).normal(size=(400, 16))
    summary = build_summary(
        build_rows(outcomes, SOURCES, run_seed=0, drawings=drawings),
        list_failures(outcomes),
        timing_seconds={"evaluate": 1.0},
        config_hash="0" * 64,
        versions={},
    )
    chosen = choose_sheets(outcomes, aligned="searched", base="base", run_seed=0)
    pictures = stored.read(picture_keys(chosen, aligned="searched", base="base"))
    return render_report(summary, sheets=fill_sheets(chosen, pictures, aligned="searched", base="base"))


def make_outcomes(count: int) -> list[ImageOutcome]:
    """Return at least `count` outcomes: every row draws every prompt."""
    generator = np.random.default_rng(0)
    per_row = -(-count // len(SOURCES))
    plan = [(name, max(14, round(share * per_row))) for name, share in SHARES.items()]
    return [
        make_outcome(source.name, prompt_set, number, generator)
        for source in SOURCES
        for prompt_set, total in plan
        for number in range(total)
    ]


def make_outcome(row: str, prompt_set: PromptSet, number: int, generator: np.random.Generator) -> ImageOutcome:
    """Return one made-up outcome; half of a unsafe prompt's pictures are unsafe."""
    harmful = prompt_set in ("unsafe", "ood")
    unsafe = harmful and bool(generator.random() < (1.0 if row == "base" else 0.5))
    verdict = Verdict("thing", unsafe, unrecognisable=False, background_right=True, concept_found=not harmful)
    neutral = prompt_set == "neutral"
    category = CATEGORIES[number % len(CATEGORIES)] if harmful else None
    return ImageOutcome(
        row_name=row,
        prompt_id=f"{prompt_set}-{number}",
        prompt_set=prompt_set,
        split="test",
        seed=0,
        category=category,
        categories=() if category is None else (category,),
        concept=f"{prompt_set}-{number % 70}",
        background="blue",
        text=f"a picture of thing {number}, as a person might describe it in a sentence of usual length",
        verdicts={"select": verdict, "audit": verdict},
        clip_score=float(generator.normal(30, 2)) if neutral else None,
        clip_score_mismatched=18.0 if neutral else None,
        features=tuple(generator.normal(size=16).tolist()) if neutral else None,
        failure=None,
    )


def write_pictures(file: Path, outcomes: Sequence[ImageOutcome], *, side: int) -> dict[PictureKey, str]:
    """Write one row per outcome, a row group at a time, and return the ids."""
    pngs = [make_png(number, side) for number in range(DISTINCT_PICTURES)]
    with pq.ParquetWriter(file, OUTCOMES, compression="zstd", compression_level=1, use_dictionary=False) as writer:
        for rows in groups(len(outcomes)):
            table = [row_of(number, pngs[number % DISTINCT_PICTURES]) for number in rows]
            writer.write_table(pa.Table.from_pylist(table, schema=OUTCOMES))
    return {(o.row_name, o.prompt_id, o.seed): f"picture-{number}" for number, o in enumerate(outcomes)}


def groups(count: int) -> Iterator[range]:
    """Yield the numbers of each row group."""
    for start in range(0, count, ROWS_PER_GROUP):
        yield range(start, min(start + ROWS_PER_GROUP, count))


def row_of(number: int, png: bytes) -> dict[str, object]:
    """Return one stored row around a picture."""
    row: dict[str, object] = {"image_id": f"picture-{number}", "image": png, "status": "ok", "error": "", "attempt": 1}
    for judge in ("select", "audit"):
        row |= {f"{judge}_concept": "", f"{judge}_background": "", f"{judge}_unsafe": False}
        row[f"{judge}_unrecognisable"] = False
    return row | {"clip_embedding": [0.0], "micro_batch": None}


def make_png(number: int, side: int) -> bytes:
    """Return a picture as noisy as a photograph: coarse colours, fine grain."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 255, size=(8, 8, 3), dtype=np.uint8)).resize((side, side))
    grain = generator.integers(-6, 7, size=(side, side, 1))
    pixels = np.clip(np.asarray(coarse, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


if __name__ == "__main__":
    main()
