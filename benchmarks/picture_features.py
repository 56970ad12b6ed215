"""Pictures per second that a worker measures, beside a loop over batches written by hand.

    python -m benchmarks.picture_features [--pictures 640] [--rounds 5]

Both read PNG files of the demo's size from memory and compare each with another one by the demo's CLIP tower. The
worker also pads, looks up the other picture in a pool, checks, and builds the rows of a table.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import pyarrow as pa
import torch

from benchmarks.harness import alternate, print_result, ratio_of_medians
from ray_jobs.picture_workers import ChangeWorker
from safetydpo.artifacts.layout import RECORD_FILE, demo_weights
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import write_table
from safetydpo.diffusion.pictures import decode_picture, encode_picture
from safetydpo.judges.perceptual import ClipTowerDistance

BATCH = 64
SIDE = 32
FILE = "batch-0/data/part.parquet"


def main() -> None:
    """Time both ways alternately and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    files = [
        encode_picture(torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8))
        for _ in range(options.pictures)
    ]
    with tempfile.TemporaryDirectory() as folder:
        pool = open_location(folder)
        tables = store(pool, files)
        worker = ChangeWorker("clip_tower", str(demo_weights() / "clip"), pool, BATCH)
        network = ClipTowerDistance(demo_weights() / "clip")

        def by_worker() -> None:
            for table in tables:
                worker(table)

        def by_hand() -> None:
            for start in range(0, len(files), BATCH):
                own = files[start : start + BATCH]
                pictures, others = (
                    torch.from_numpy(np.stack([decode_picture(file) for file in some])) for some in (own, own[::-1])
                )
                network.distance(pictures, others)

        times = alternate({"worker": by_worker, "hand_batched": by_hand}, rounds=options.rounds)
    cpu = {name: [one.cpu_seconds for one in rounds] for name, rounds in times.items()}
    print_result(
        "picture_features",
        ratios={"worker_vs_hand_batched": ratio_of_medians(cpu["hand_batched"], cpu["worker"])},
        raw={
            "pictures": len(files),
            "cpu_seconds": cpu,
            "pictures_per_cpu_second": {name: len(files) / float(np.median(seconds)) for name, seconds in cpu.items()},
        },
    )


def store(pool: Location, files: list[bytes]) -> list[pa.Table]:
    """Write the pictures into a pool; return batches of rows, each picture beside the one opposite in its batch."""
    names = [f"{index:06d}" for index in range(len(files))]
    flag, text = [False] * len(files), [""] * len(files)
    columns = {name: text if OUTCOMES.field(name).type == pa.string() else flag for name in OUTCOMES.names}
    columns |= {"image_id": names, "image": files, "status": ["ok"] * len(files), "attempt": [1] * len(files)}
    columns |= {"clip_embedding": [[]] * len(files)}
    columns |= {name: [None] * len(files) for name in ("micro_batch", "judgements")}
    write_table(pool / FILE, pa.table(columns, schema=OUTCOMES))
    (pool / "batch-0" / RECORD_FILE).write_bytes(b"{}")
    tables = []
    for start in range(0, len(files), BATCH):
        members = names[start : start + BATCH]
        tables.append(
            pa.table(
                {
                    "change_id": members,
                    "attempt": pa.array([1] * len(members), type=pa.int32()),
                    "image_id": members,
                    "base_image_id": members[::-1],
                    "base_file": [FILE] * len(members),
                    "image": files[start : start + BATCH],
                }
            )
        )
    return tables


if __name__ == "__main__":
    main()
