"""Two batches under way in one actor of a pool, through Ray Data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.evaluate import EvaluatedRow, build_manifest, evaluation_prompts, outcomes_stage
from ray_jobs.evaluation_worker import EvaluateWorker
from ray_jobs.pools import PoolStage, fill_pool
from ray_jobs.run import Run
from safetydpo.artifacts.pool_index import read_rows
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import Config
from safetydpo.evaluation.rows import RowSource
from tests.judges.vision_server import serve
from tests.ray.fresh_process import in_fresh_process
from tests.ray.test_final_judges import SAFE, config_of
from tests.ray.toy_workers import OUTPUT, MeetingWorker, manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.mark.parametrize(("calls", "wait_seconds"), [(1, 0.2), (2, 20.0)])
def test_a_worker_sees_as_many_calls_as_its_stage_asks_for(
    small: Config, store: Location, calls: int, wait_seconds: float
) -> None:
    stage = PoolStage("meeting", OUTPUT, "row_id", MeetingWorker, {"wait_seconds": wait_seconds}, 4)
    execution = small.execution.model_copy(update={"num_workers": 1})
    rows = manifest(32)
    index = fill_pool(store, rows, replace(stage, calls_per_worker=calls), execution=execution)
    found = read_rows(store, OUTPUT, index, id_column="row_id").to_pylist()
    assert len(found) == 32
    assert {row["status"] for row in found} == {"ok"}
    assert max(row["length"] for row in found) == calls


def test_test_pictures_of_two_calls_are_those_of_one(small: Config, tmp_path: Path) -> None:
    """A judge that waits for its server: rows and bytes are those of a worker called with one batch after another."""
    with serve(lambda _: replace(SAFE, seconds=0.1)) as server:
        vlm = {"vlm": {"base_url": server.url, "model": "guard"}}
        config = config_of(tmp_path, evaluation={"judges": ["vlm"], "neutral_prompts": 24}, judges=vlm)
        run = Run(config.model_copy(update={"execution": config.execution.model_copy(update={"num_workers": 1})}))
        base = EvaluatedRow(RowSource("base", "base"), "", ("neutral",))
        table = table_from_rows(build_manifest(run, [base], evaluation_prompts(run)), IMAGE_MANIFEST)
        stage = outcomes_stage(run)
        assert (stage.calls_per_worker, len(table)) == (2, 24)
        pool = run.store / "pool"
        index = fill_pool(pool, table, stage, execution=run.config.execution)
        found = read_rows(pool, OUTCOMES, index, id_column="image_id")
        expected = in_fresh_process(_one_after_another, run.config.model_dump(mode="json"), table)
    wanted = sorted(expected, key=lambda row: str(row["image_id"]))
    for name in OUTCOMES.names:
        assert found.column(name).to_pylist() == [row[name] for row in wanted], name


def _one_after_another(config: dict[str, object], table: object) -> list[dict[str, object]]:
    import torch

    torch.set_num_threads(1)
    worker = EvaluateWorker(config)
    parts = [table.slice(start, 3) for start in range(0, len(table), 3)]  # type: ignore[attr-defined,arg-type]
    return [row for part in parts for row in worker(part).to_pylist()]
