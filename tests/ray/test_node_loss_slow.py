"""A node is lost while the generation stage draws: the run ends complete, and as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.workers import LatentWorker, RenderWorker
from safetydpo.artifacts.latents import latent_means
from safetydpo.artifacts.manifest import verify_rows
from safetydpo.artifacts.schemas import IMAGE_MANIFEST
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from tests.ray.node_loss_pictures import make_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As each worker has; the number changes the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(folder: Path, pool: str) -> pa.Table:
    """Return all rows that stand in the files of a pool, picked by nobody; each must stand there once."""
    (place,) = (folder / "store" / pool).iterdir()
    table = pa.concat_tables([pq.read_table(file) for file in place.glob("batch-*/data/*.parquet")])
    assert pc.count_distinct(table.column(0)).as_py() == table.num_rows, pool
    return table


@pytest.mark.usefixtures("_one_thread")
def test_the_generation_stage_loses_a_node_in_mid_batch(tmp_path: Path):
    """Three nodes, three actors, 52 pictures; a node goes with its actors once two files stand there.

    Every row stands there once, and pictures and latents have the bytes that one process gives them without Ray.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray.node_loss_pictures", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    # Ray tells of what it lost on the same stream, sometimes afterwards.
    lost = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert lost["alive"] == 2
    assert lost["actors_lost"] >= 1, "the node must have been at work"
    assert 2 <= lost["files_before"] < 12, "and must go in the middle of it"
    assert lost["pictures"] == 52
    (pairs,) = (tmp_path / "store" / "pairs").iterdir()
    manifest = read_table(open_location(str(pairs / "images.parquet")), IMAGE_MANIFEST)
    pictures = rows_of(tmp_path, "images")
    assert verify_rows(manifest.column("image_id"), pictures.column("image_id")).is_exact
    identity = make_config(tmp_path, None).identity
    drawn: dict[str, bytes] = {}
    worker = RenderWorker(identity.base.model_dump(), identity.sampler.model_dump())
    for start in range(0, manifest.num_rows, 4):
        drawn |= {row["image_id"]: row["image"] for row in worker(manifest.slice(start, 4)).to_pylist()}
    found = dict(zip(pictures.column("image_id").to_pylist(), pictures.column("sha256").to_pylist(), strict=True))
    assert found == {image_id: hashlib.sha256(picture).hexdigest() for image_id, picture in drawn.items()}
    latents = latent_means(rows_of(tmp_path, "latents"))
    used = pictures.filter(pc.is_in(pictures.column("image_id"), value_set=pa.array(sorted(latents))))
    expected = latent_means(LatentWorker(identity.base.model_dump(), batch_size=64)(used))
    assert {name: value.tobytes() for name, value in latents.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }
    assert rows_of(tmp_path, "verdicts").num_rows == 52
    assert rows_of(tmp_path, "captions").num_rows > 0
