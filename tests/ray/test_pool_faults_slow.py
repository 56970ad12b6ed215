"""Faults of the generation job that take longer: one bad prompt in a thousand, other worker counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_jobs.generate_pairs import render_stage
from ray_jobs.pools import PoolStage, check_error_rate, fill_pool
from ray_jobs.run import Run
from safetydpo.artifacts.manifest import verify_rows
from safetydpo.artifacts.pool_index import read_pool
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import Config
from safetydpo.pairs.manifest import image_row
from tests.ray.toy_workers import DeadlyRender, PoisonedRender

pytestmark = pytest.mark.slow


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


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_prompt_that_ends_its_worker_becomes_an_error_row(cluster: None, small: Config, store: Location):
    """Ray would start the worker again without end. The other 15 pictures are those of a pool without that prompt."""
    run = drawing(small, steps=1, batch_size=4)
    prompts = [f"cat on {('blue', 'green', 'white')[index % 3]}" for index in range(16)]
    prompts[5] = "poison on blue"
    plain = render_stage(run, "pictures")
    stage = PoolStage(plain.label, plain.output, plain.id_column, DeadlyRender, plain.arguments, plain.batch_size)
    manifest = pictures(run, prompts)
    index = fill_pool(store / "deadly", manifest, stage, execution=run.config.execution)
    bad = manifest.column("image_id")[5].as_py()
    assert check_error_rate(index, limit=0.1) == [bad]
    error = index.filter(pc.equal(index.column("status"), "error")).to_pylist()
    assert [(row["attempt"], row["error"]) for row in error] == [
        (3, "its worker's process ended 2 times while it made this row alone (out of memory, or a crash)")
    ]
    others = manifest.filter(pc.not_equal(manifest.column("image_id"), bad))
    fill_pool(store / "plain", others, plain, execution=run.config.execution)
    found = [
        {row["image_id"]: row["sha256"] for row in read_pool(store / name, IMAGES, id_column="image_id").to_pylist()}
        for name in ("deadly", "plain")
    ]
    assert found[0] == {**found[1], bad: ""}
