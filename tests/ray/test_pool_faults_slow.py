"""Faults of the generation job that take longer: a lost node, one bad prompt in a thousand, other worker counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_jobs.generate_pairs import render_stage
from ray_jobs.pools import PoolStage, check_error_rate, fill_pool
from ray_jobs.run import Run
from safetydpo.artifacts.manifest import verify_rows
from safetydpo.artifacts.pool_index import read_index, read_pool
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import Config
from safetydpo.pairs.manifest import image_row
from tests.ray.toy_workers import OUTPUT, PoisonedRender

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def drawing(small: Config, *, steps: int, batch_size: int = 16, workers: int = 2) -> Run:
    changes = {"sampler": {"steps": steps, "batch_size": batch_size}}
    execution = small.execution.model_copy(update={"num_workers": workers})
    return Run(
        Config.model_validate({"name": "faults", "identity": changes}).model_copy(update={"execution": execution})
    )


def pictures(run: Run, prompts: list[str]) -> pa.Table:
    common: dict[str, Any] = {
        "base_fingerprint": run.base_fingerprint,
        "sampler": run.config.identity.sampler.model_dump(mode="json"),
    }
    rows = [image_row(f"row-{index:04d}", "benign", text, seed=index, **common) for index, text in enumerate(prompts)]
    return table_from_rows(rows, IMAGE_MANIFEST)


def test_a_node_that_is_lost_in_the_middle(tmp_path: Path):
    """Three nodes, four actors, 120 rows; a node goes once some files stand there. Every row is made, once."""
    pool = tmp_path / "pool"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray.node_loss", str(pool)],
        cwd=ROOT,
        env={**os.environ, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["alive"] == 2
    assert 4 <= found["written_before"][0] < 60, "the node must go in the middle of the work"
    assert found["rows"] == 120
    # read_pool picks one of doubled rows, so the files themselves are counted too.
    written = pa.concat_tables([pa.parquet.read_table(file) for file in pool.glob("batch-*/data/*.parquet")])
    wanted = [f"row-{index:03d}" for index in range(120)]
    failed_first = 1  # row-003 fails at its first attempt, and its error row stands in the first batch
    assert written.num_rows == 120 + failed_first
    good = written.filter(pc.equal(written.column("status"), "ok"))
    assert verify_rows(wanted, good.column("row_id")).is_exact
    assert read_index(open_location(str(pool)), OUTPUT, id_column="row_id").num_rows == 120


def test_one_poisoned_prompt_in_a_thousand(cluster: None, small: Config, store: Location):
    """999 pictures are drawn and the poisoned one is an error row, tried three times, within the limit of 1 %."""
    run = drawing(small, steps=1)
    prompts = [f"cat on {('blue', 'green', 'white')[index % 3]}" for index in range(1000)]
    prompts[531] = "poison on blue"
    stage = render_stage(run, "pictures")
    stage = PoolStage(stage.label, stage.output, stage.id_column, PoisonedRender, stage.arguments, stage.batch_size)
    manifest = pictures(run, prompts)
    index = fill_pool(store, manifest, stage, execution=run.config.execution)
    bad = manifest.column("image_id")[531].as_py()
    assert check_error_rate(index, limit=0.01) == [bad]
    assert verify_rows(manifest.column("image_id"), index.column("image_id")).is_exact
    error = index.filter(pc.equal(index.column("status"), "error")).to_pylist()
    assert [(row["error"], row["attempt"]) for row in error] == [("this prompt cannot be drawn", 3)]
    attempts = sorted(json.loads((batch / "record.json").read_bytes())["attempt"] for batch in store.list())
    assert attempts == [1, 2, 3]


def test_workers_order_and_position_never_change_a_byte(cluster: None, small: Config, tmp_path: Path):
    """One actor and rows in order, two actors and rows turned round, and a part of the rows: equal files."""
    prompts = [
        f"{name} on {colour}" for name in ("cat", "rocket", "bomb", "rose", "umbrella") for colour in ("blue", "white")
    ] * 5
    hashes: list[dict[str, str]] = []
    for number, (workers, order) in enumerate(((1, 1), (2, -1), (2, 3))):
        run = drawing(small, steps=2, workers=workers)
        manifest = pictures(run, prompts)
        chosen = manifest.take(pa.array(list(range(manifest.num_rows))[::order]))
        pool = open_location(str(tmp_path / f"pool-{number}"))
        fill_pool(pool, chosen, render_stage(run, "pictures"), execution=run.config.execution)
        rows = read_pool(pool, IMAGES, id_column="image_id")
        hashes.append(dict(zip(rows.column("image_id").to_pylist(), rows.column("sha256").to_pylist(), strict=True)))
        assert rows.column("micro_batch").to_pylist() == [16] * chosen.num_rows
    assert len(set(hashes[0].values())) == 50
    assert hashes[1] == hashes[0]
    assert hashes[2].items() <= hashes[0].items()
    assert len(hashes[2]) == 17
